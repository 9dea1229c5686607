"""Fixtures that several folders share."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported; see patchreg/cli/main.py

import numpy as np
import pytest
import torch
from tolerances import Tolerances

from patchreg.ops.windows import gaussian_smooth
from patchreg.spatial import Affine, Composite, DisplacementField, Grid, Volume
from patchreg.spatial.patches import window

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def tolerances() -> Tolerances:
    """The one table of tolerances."""
    return Tolerances()


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(1234)


@pytest.fixture
def development_data() -> Path:
    """Real volumes that are never part of the project; a test that needs them skips where they are not."""
    folder = Path(os.environ.get("PATCHREG_DEVELOPMENT_DATA", REPOSITORY.parent / "shared" / "data"))
    if not (folder / "scans").is_dir():
        pytest.skip(f"no development data in {folder}: set PATCHREG_DEVELOPMENT_DATA")
    return folder


def blobs(grid: Grid, seed: int = 0, count: int = 40, width_mm: float = 7.0) -> Volume:
    """A smooth image given by a formula of world coordinates, so that it is the same image on every grid."""
    rng = np.random.default_rng(seed)
    points = grid.points()
    image = torch.zeros(grid.shape, dtype=torch.float64)
    for _ in range(count):
        center = torch.from_numpy(rng.uniform(-30, 30, 3))
        image += float(rng.uniform(0.2, 1.0)) * torch.exp(-((points - center) ** 2).sum(-1) / (2 * width_mm**2))
    return Volume((100 * image).float()[None], grid, "blobs")


def known_transform(seed: int = 0, size_mm: float = 5.0, affine: bool = True) -> Composite:
    """A smooth displacement of at most ``size_mm`` that fades out at +-60 mm, then an affine map."""
    generator = torch.Generator().manual_seed(seed)
    grid = Grid.aligned((0, 0, 0), (31, 31, 31), 4.0)
    noise = gaussian_smooth(torch.randn((1, 3, *grid.shape), generator=generator), (4.0,) * 3) * window(grid.shape)
    noise = noise / noise.norm(dim=1).max() * size_mm
    matrix = torch.eye(4, dtype=torch.float64)
    if affine:
        matrix[:3, :3] += 0.06 * torch.randn(3, 3, generator=generator, dtype=torch.float64)
        matrix[:3, 3] = 3 * torch.randn(3, generator=generator, dtype=torch.float64)
    return Composite([DisplacementField(grid, noise), Affine(matrix)])


def oblique_direction() -> torch.Tensor:
    from patchreg.datasets.augmentation import rotation_matrix

    return rotation_matrix(torch.tensor([0.3, -0.2, 0.25]))


def oriented_grid(orientation: str, spacing: tuple[float, float, float], extent_mm: float = 80.0) -> Grid:
    """A grid centred on the origin: RAS, LAS, LPS, LIA, or oblique, covering a cube of the world."""
    directions = {
        "RAS": torch.eye(3, dtype=torch.float64),
        "LAS": torch.diag(torch.tensor([-1.0, 1, 1], dtype=torch.float64)),
        "LPS": torch.diag(torch.tensor([-1.0, -1, 1], dtype=torch.float64)),
        "LIA": torch.tensor([[-1.0, 0, 0], [0, 0, 1], [0, -1, 0]], dtype=torch.float64),
        "oblique": oblique_direction(),
    }
    step = torch.tensor(spacing, dtype=torch.float64)
    larger = 1.5 if orientation == "oblique" else 1.0
    shape = [max(2, round(larger * extent_mm / s)) for s in spacing]
    affine = torch.eye(4, dtype=torch.float64)
    affine[:3, :3] = directions[orientation] * step
    affine[:3, 3] = -affine[:3, :3] @ ((torch.tensor(shape, dtype=torch.float64) - 1) / 2)
    return Grid(shape, affine)


@pytest.fixture(params=["RAS", "LAS", "LPS", "LIA", "oblique"])
def oriented(request: pytest.FixtureRequest) -> Grid:
    """The same part of the world, stored five ways, with voxels of three sizes."""
    return oriented_grid(request.param, (2.0, 2.5, 3.0))


@pytest.fixture
def save_volume(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes a volume as NIfTI and gives its path."""
    import nibabel as nib  # here, so that the tests of patchreg.ops run with torch alone

    def save(volume: Volume, name: str = "image.nii.gz", dtype: type = np.float32) -> Path:
        path = tmp_path / name
        nib.save(nib.Nifti1Image(volume.data[0].numpy().astype(dtype), volume.grid.affine.numpy()), path)
        return path

    return save
