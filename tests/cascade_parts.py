"""Small networks with known answers, and small cascades."""

from __future__ import annotations

import torch
from conftest import blobs, known_transform, oriented_grid
from torch import Tensor, nn

from patchreg.cascade import PatchCascade, Prepared, PreparedPair, Stage
from patchreg.cascade.prepared import Normalization
from patchreg.networks import KeypointAffine, VoxelMorph
from patchreg.spatial import Volume


class Constant(nn.Module):
    """Answers the same displacement, in voxels of the patch, whatever it sees; remembers what it saw."""

    def __init__(self, voxels: tuple[float, float, float]) -> None:
        super().__init__()
        self.answer = nn.Parameter(torch.tensor(voxels, dtype=torch.float32))
        self.seen: list[tuple[Tensor, Tensor]] = []

    def forward(self, fixed: Tensor, moving: Tensor) -> Tensor:
        self.seen.append((fixed.detach(), moving.detach()))
        return self.answer[None, :, None, None, None].expand(fixed.shape[0], 3, *fixed.shape[2:])


class ConstantAffine(nn.Module):
    """Answers the same affine map in the patch's frame."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.answer = nn.Parameter(matrix)

    def forward(self, fixed: Tensor, moving: Tensor) -> Tensor:
        return self.answer[None].expand(fixed.shape[0], 3, 4)


class Pointwise(nn.Module):
    """A displacement that depends on each voxel alone, so that patches must agree with the whole."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, fixed: Tensor, moving: Tensor) -> Tensor:
        return self.scale * torch.cat([fixed - moving, fixed * moving, moving], dim=1)


def small_cascade() -> PatchCascade:
    torch.manual_seed(0)
    network = {"encoder": (4, 8), "decoder": (8,), "final": ()}
    return PatchCascade(
        [
            Stage(KeypointAffine((4, 8), (8,), 8), "affine", 16),
            Stage(VoxelMorph(**network), "displacement", 16),
            Stage(VoxelMorph(**network), "displacement", 16, spacing=3.0, patches=2),
        ]
    )


def prepared(volume: Volume, labels: Volume | None = None) -> Prepared:
    return Prepared(volume, Normalization(), labels)


def made_pair(fixed_orientation: str = "RAS", moving_orientation: str = "RAS", step: float = 2.0) -> PreparedPair:
    """Two images of one formula, the second deformed by a known transform, each stored its own way."""
    fixed = blobs(oriented_grid(fixed_orientation, (step, step, step)), seed=1)
    source = blobs(oriented_grid("RAS", (1.5, 1.5, 1.5), extent_mm=110), seed=1)
    grid = oriented_grid(moving_orientation, (step, step, step))
    moving = Volume(known_transform(size_mm=4.0).on(grid).sample(source)[0], grid, "moving")
    return PreparedPair(prepared(fixed), prepared(moving))
