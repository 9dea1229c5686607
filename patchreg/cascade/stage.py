"""One stage of a cascade: a network, what it predicts, and the patches it sees."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from patchreg.errors import InputError
from patchreg.spatial import Foreground, Grid
from patchreg.spatial.foreground import box_grid
from patchreg.spatial.linear import apply_linear
from patchreg.types import Shape3, Spacing3

Predicts = Literal["affine", "displacement", "velocity"]


class Stage(nn.Module):
    """A network and the lattice of its patches.

    Args:
        network: ``forward(fixed, moving)`` to a displacement or velocity (B, 3, I, J, K) in voxels of the patch, or to
            an affine map (B, 3, 4) in the patch's frame.
        predicts: which of them.
        patch_shape: voxels of a patch; a number for a cube. Ignored where the spacing is ``"image"``.
        spacing: of a patch's voxels in mm, one number or three for the world's (R, A, S);
            ``"whole"``: as coarse, and as isotropic, as it takes to see all content of the fixed image;
            ``"image"``: the patch is the fixed image's own grid, the ordinary full-volume network.
        margin_mm: around the content that is covered.
        overlap: of neighbouring patches in inference, as a fraction of the patch.
        passes: times the image is covered in inference; every pass after the first shifts the patches at random.
        repeats: times the stage runs, each on the result of the last, with the same weights.
        patches: drawn in training for each patch of the stage before.
        jitter: in training, how much of its size a ``"whole"`` patch is moved and grown at random.
        frozen: in training, leave the network as it is: it finds where later stages start, and no loss is taken.

    Raises:
        InputError: settings that do not go together.
    """

    def __init__(
        self,
        network: nn.Module,
        predicts: Predicts = "displacement",
        patch_shape: int | Sequence[int] = 64,
        spacing: float | Sequence[float] | str = "whole",
        margin_mm: float = 10.0,
        overlap: float = 0.25,
        passes: int = 1,
        repeats: int = 1,
        patches: int = 1,
        jitter: float = 0.05,
        frozen: bool = False,
    ) -> None:
        super().__init__()
        if predicts not in ("affine", "displacement", "velocity"):
            raise InputError(f"predicts must be 'affine', 'displacement' or 'velocity', got {predicts!r}")
        if isinstance(spacing, str) and spacing not in ("whole", "image"):
            raise InputError(f"spacing must be mm, 'whole' or 'image', got {spacing!r}")
        for name, value in (("passes", passes), ("repeats", repeats), ("patches", patches)):
            if value < 1:
                raise InputError(f"{name} must be at least 1, got {value}")
        if not 0 <= overlap < 1:
            raise InputError(f"overlap must be from 0 to below 1, got {overlap}")
        self.network = network
        self.predicts = predicts
        self.patch_shape: Shape3 = _three(patch_shape, int, "patch_shape")
        self.spacing: Spacing3 | str = spacing if isinstance(spacing, str) else _three(spacing, float, "spacing")
        self.margin_mm, self.overlap, self.jitter = margin_mm, overlap, jitter
        self.passes, self.repeats, self.patches = passes, repeats, patches
        self.frozen = frozen
        if frozen:
            network.requires_grad_(False)

    @property
    def sees_all(self) -> bool:
        """Whether one patch covers the content."""
        return isinstance(self.spacing, str)

    def lattice(self, content: Foreground, fixed: Grid) -> Grid:
        """The lattice that the stage's answers lie on, at least as large as a patch."""
        if self.spacing == "image":
            return fixed
        fixed = fixed.whole
        if self.spacing == "whole":
            size = content.high_mm - content.low_mm + 2 * self.margin_mm
            spacing = float((size / torch.tensor(self.patch_shape)).max())
            return Grid.aligned((content.low_mm + content.high_mm) / 2, self.patch_shape, spacing)
        assert not isinstance(self.spacing, str)
        grid = box_grid(content, fixed, self.margin_mm, self.spacing)
        shape = [max(n, p) for n, p in zip(grid.shape, self.patch_shape, strict=True)]
        return grid if tuple(shape) == grid.shape else Grid.aligned(grid.center, shape, self.spacing)

    def draw(self, content: Foreground, fixed: Grid, parent: Grid | None, generator: torch.Generator | None) -> Grid:
        """A patch for training: somewhere in the content and, as far as it fits, within its parent."""
        if self.spacing == "image":
            return fixed

        def uniform(n: int) -> Tensor:
            return torch.rand(n, generator=generator, dtype=torch.float64)

        if self.spacing == "whole":
            grid = self.lattice(content, fixed)
            grow = 1 + self.jitter * (2 * float(uniform(1)) - 0.5)
            extent = torch.tensor(grid.shape) * torch.tensor(grid.spacing)
            shift = self.jitter * extent * (2 * uniform(3) - 1) / 2
            return Grid.aligned(grid.center + shift, grid.shape, grid.spacing[0] * grow)
        assert not isinstance(self.spacing, str)
        half = torch.tensor(self.patch_shape) * torch.tensor(self.spacing, dtype=torch.float64) / 2
        low, high = content.low_mm - self.margin_mm + half, content.high_mm + self.margin_mm - half
        if parent is not None:
            parent_low, parent_high = parent.bounds()
            low, high = torch.maximum(low, parent_low + half), torch.minimum(high, parent_high - half)
        middle = (low + high) / 2
        low, high = torch.minimum(low, middle), torch.maximum(high, middle)  # too small to move in: centred
        return Grid.aligned(low + uniform(3) * (high - low), self.patch_shape, self.spacing)

    def predict(self, fixed: Tensor, moving: Tensor, grids: Sequence[Grid]) -> Tensor:
        """Run the network on patches and give its answer in the world.

        Args:
            fixed: (N, C, I, J, K), normalised.
            moving: the same shape, on the same grids through the transform so far.
            grids: of the N patches.

        Returns:
            Affine maps (N, 4, 4), float64, on the CPU; or displacements (N, 3, I, J, K) in mm.

        Raises:
            InputError: the network answered with another shape.
        """
        with grids[0].scope():
            answer = self.network(fixed, moving)
        wanted = (len(grids), 3, 4) if self.predicts == "affine" else (len(grids), 3, *fixed.shape[2:])
        if tuple(answer.shape) != wanted:
            name = type(self.network).__name__
            raise InputError(f"{name} must answer {self.predicts} of shape {wanted}, got {tuple(answer.shape)}")
        if self.predicts == "affine":
            return torch.stack([_to_world(a, grid) for a, grid in zip(answer, grids, strict=True)])
        answer = answer.float()
        if self.predicts == "velocity":
            answer = grids[0].integrate(answer)
        return torch.cat([apply_linear(g.linear, a[None]) for a, g in zip(answer, grids, strict=True)])


def frame(grid: Grid) -> Tensor:
    """(4, 4): from the patch's frame, centred and with its longest side from -1 to 1, to the world."""
    matrix = torch.eye(4, dtype=torch.float64)
    matrix[:3, :3] = grid.linear * (max(grid.shape) / 2)
    matrix[:3, 3] = grid.center
    return matrix


def _to_world(answer: Tensor, grid: Grid) -> Tensor:
    bottom = torch.tensor([[0.0, 0.0, 0.0, 1.0]], dtype=torch.float64)
    local = torch.cat([answer.to("cpu", torch.float64), bottom])
    f = frame(grid)
    return f @ local @ torch.linalg.inv(f)


T = TypeVar("T", int, float)


def _three(value: T | Sequence[T], kind: type[T], name: str) -> tuple[T, T, T]:
    values = [value] * 3 if isinstance(value, (int, float)) else list(value)
    if len(values) != 3 or min(values) <= 0:
        raise InputError(f"{name} must be one or three positive numbers, got {value!r}")
    a, b, c = (kind(v) for v in values)
    return a, b, c
