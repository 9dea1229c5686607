"""What benchmarks/ops.py compares: our operations, and who else computes the same.

Rivals are written here from the published equations, or imported where they are installed; none of their code is copied.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from patchreg import ops
from patchreg.types import Shape3

Inputs = dict[str, Tensor]
Function = Callable[..., Tensor]


@dataclass(frozen=True)
class Pass:
    """Forward alone, or with the gradient to some of the inputs.

    Attributes:
        name: as tables show it.
        wanted: the inputs that get a gradient.
        volumes: that must be read or written at least, once in either direction, in units of one channel of the image.
    """

    name: str
    wanted: tuple[str, ...]
    volumes: float


@dataclass(frozen=True)
class Contender:
    """One implementation.

    Attributes:
        name: as tables show it.
        function: of the inputs by name.
        same: whether it computes the very number that we do; what does not is only timed.
        lacks: the inputs to which it has no gradient.
        prepare: the inputs in its own layout, which is not timed.
        devices: where it runs.
    """

    name: str
    function: Function
    same: bool = True
    lacks: tuple[str, ...] = ()
    prepare: Callable[[Inputs], Inputs] = field(default=lambda inputs: inputs)
    devices: tuple[str, ...] = ("cpu", "cuda")


@dataclass(frozen=True)
class Case:
    """One operation in one variant: the inputs it is timed with, the passes, ours, and the others."""

    op: str
    variant: str
    make: Callable[[Shape3, torch.Generator], Inputs]
    passes: tuple[Pass, ...]
    operation: Function
    rivals: Callable[[], list[Contender]]
    shaped_like: str | None = None
    """The input of whose shape the result is; None for a scalar."""
    tolerance: float = 1e-6
    """Relative error of our value in float32 that is still right; ten times as much of a gradient."""

    @property
    def name(self) -> str:
        """Operation and variant."""
        return f"{self.op} {self.variant}".strip()


def image(shape: Shape3, generator: torch.Generator) -> Tensor:
    """Smooth tissue with texture, and a background of exact zeros around it: (1, 1, *shape), from 0 to 1."""
    on = {"generator": generator, "device": generator.device}
    coarse = torch.rand((1, 1, *(max(2, n // 6) for n in shape)), **on)
    tissue = F.interpolate(coarse, size=shape, mode="trilinear", align_corners=True)
    tissue.mul_(0.8).add_(torch.rand(tissue.shape, **on), alpha=0.2)
    i, j, k = (torch.linspace(-1, 1, n, device=generator.device) for n in shape)
    tissue[0, 0][i[:, None, None] ** 2 + j[:, None] ** 2 + k**2 > 0.8] = 0
    return tissue


def pair(shape: Shape3, generator: torch.Generator) -> Inputs:
    return {"fixed": image(shape, generator), "moving": image(shape, generator)}


def smooth_field(shape: Shape3, generator: torch.Generator, size: float) -> Tensor:
    """A smooth displacement of at most ``size`` voxels: (1, 3, *shape)."""
    coarse = torch.rand((1, 3, *(max(2, n // 12) for n in shape)), generator=generator, device=generator.device)
    coarse.mul_(2).sub_(1)
    return F.interpolate(coarse, size=shape, mode="trilinear", align_corners=True).mul_(size)


# Similarity: what must move are two images for the value, the two again for the gradient, and each gradient.
SIMILARITY = (
    Pass("forward", (), 2),
    Pass("forward + backward to moving", ("moving",), 5),
    Pass("forward + backward to both", ("fixed", "moving"), 6),
)


def voxelmorph_formula(fixed: Tensor, moving: Tensor, window: int, total: Function) -> Tensor:
    """Squared NCC by window sums, Balakrishnan et al. 2019, arXiv:1809.05231, eq. (6)."""
    n = window**3
    I, J, II, JJ, IJ = (total(x, window) for x in (fixed, moving, fixed * fixed, moving * moving, fixed * moving))
    cross = IJ - I * J / n
    return (cross * cross / ((II - I * I / n) * (JJ - J * J / n) + 1e-5)).mean()


def full_convolution(x: Tensor, window: int) -> Tensor:
    return F.conv3d(x, x.new_ones(1, 1, window, window, window), padding=window // 2)


def separable_convolution(x: Tensor, window: int) -> Tensor:
    for dim in range(3):
        shape, padding = [1, 1, 1, 1, 1], [0, 0, 0]
        shape[2 + dim], padding[dim] = window, window // 2
        x = F.conv3d(x, x.new_ones(shape), padding=padding)
    return x


def imported(module: str, name: str) -> Callable[..., torch.nn.Module]:
    """A class of another package, which may not be there."""
    found: Callable[..., torch.nn.Module] = getattr(importlib.import_module(module), name)
    return found


def negative(loss: torch.nn.Module) -> Function:
    """A loss of (prediction, target) as a similarity of the pair."""
    return lambda fixed, moving: -loss(moving, fixed)


def lncc_rivals(window: int) -> list[Contender]:
    compiled = torch.compile(partial(voxelmorph_formula, window=window, total=separable_convolution), dynamic=True)
    found = [
        Contender("VoxelMorph's formula", partial(voxelmorph_formula, window=window, total=full_convolution)),
        *optional(
            ("MONAI", lambda: lncc_of_monai(window)),
            ("FireANTs, torch", lambda: lncc_of_fireants(window)),
            ("fireants_fused_ops", lambda: lncc_of_fireants_fused(window)),
            ("fused_lncc", lambda: lncc_of_fused_lncc(window)),
        ),
    ]
    return [*found, Contender("separable convolutions, torch.compile", compiled)]  # last: compiling takes a while


def lncc_of_monai(window: int) -> Contender:
    loss = imported("monai.losses", "LocalNormalizedCrossCorrelationLoss")
    return Contender("MONAI", negative(loss(kernel_size=window, smooth_nr=0.0, smooth_dr=1e-5)))


def lncc_of_fireants(window: int) -> Contender:
    """Its small constant is added to a product of variances that are means, where ours are sums: hence the power."""
    loss = imported("fireants.losses.cc", "LocalNormalizedCrossCorrelationLoss")
    return Contender("FireANTs, torch", negative(loss(kernel_size=window, smooth_nr=0.0, smooth_dr=1e-5 / window**6)))


def lncc_of_fireants_fused(window: int) -> Contender:
    """With its exact gradient; it multiplies the small constant by the voxels of the window."""
    loss = imported("fireants.losses.fusedcc", "FusedLocalNormalizedCrossCorrelationLoss")
    exact = loss(kernel_size=window, smooth_nr=0.0, smooth_dr=1e-5 / window**9, use_ants_gradient=False)
    return Contender("fireants_fused_ops", negative(exact), devices=("cuda",))


def lncc_of_fused_lncc(window: int) -> Contender:
    loss = importlib.import_module("fused_lncc").fused_lncc_loss
    return Contender(
        "fused_lncc",
        lambda fixed, moving: 1 - loss(moving, fixed, kernel_size=window),
        lacks=("fixed",),
        devices=("cuda",),
    )


def information_rivals(bins: int) -> list[Contender]:
    return optional(
        ("MONAI, B-spline", lambda: information_of_monai(bins, "b-spline")),
        ("MONAI, Gaussian", lambda: information_of_monai(bins, "gaussian")),
        ("FireANTs, torch", lambda: information_of_fireants(bins)),
        ("fireants_fused_ops", lambda: information_of_fireants_fused(bins)),
    )


def information_of_monai(bins: int, kernel: str) -> Contender:
    loss = imported("monai.losses", "GlobalMutualInformationLoss")(kernel_type=kernel, num_bins=bins)
    name = "MONAI, B-spline" if kernel == "b-spline" else "MONAI, Gaussian"
    # Its B-spline is of order zero for the fixed image, which has no slope.
    return Contender(name, negative(loss), same=False, lacks=("fixed",) if kernel == "b-spline" else ())


def information_of_fireants(bins: int) -> Contender:
    loss = imported("fireants.losses.mi", "GlobalMutualInformationLoss")(num_bins=bins)
    return Contender("FireANTs, torch", negative(loss), same=False)


def information_of_fireants_fused(bins: int) -> Contender:
    loss = imported("fireants.losses.fusedmi", "FusedGlobalMutualInformationLoss")(num_bins=bins)
    return Contender("fireants_fused_ops", negative(loss), same=False, devices=("cuda",))


def by_grid_sample(image: Tensor, displacement: Tensor, padding: str = "zeros") -> Tensor:
    """Sampling by torch's own operations, with the identity grid made: what most registration code does."""
    shape = image.shape[2:]
    identity = torch.eye(3, 4, dtype=image.dtype, device=image.device)[None]
    grid = F.affine_grid(identity, [1, 1, *shape], align_corners=True)
    unit = torch.tensor([2 / max(1, n - 1) for n in shape], dtype=image.dtype, device=image.device)
    grid = grid + (displacement * unit[:, None, None, None]).flip(1).permute(0, 2, 3, 4, 1)
    return F.grid_sample(image, grid, padding_mode=padding, align_corners=True)


def integrate_by_grid_sample(velocity: Tensor, steps: int) -> Tensor:
    displacement = velocity / 2**steps
    for _ in range(steps):
        displacement = displacement + by_grid_sample(displacement, displacement, "border")
    return displacement


def warp_rivals() -> list[Contender]:
    fused = optional(("fireants_fused_ops", warp_of_fireants_fused))
    return [Contender("affine_grid + grid_sample", by_grid_sample), *fused]


def warp_of_fireants_fused() -> Contender:
    sample = importlib.import_module("fireants.interpolator.fused_grid_sample").fused_grid_sampler_3d

    def prepare(inputs: Inputs) -> Inputs:
        """It takes displacements in units of half the image, last and reversed."""
        u = inputs["displacement"]
        unit = torch.tensor([2 / (n - 1) for n in u.shape[2:]], device=u.device)
        return {**inputs, "displacement": (u * unit[:, None, None, None]).flip(1).permute(0, 2, 3, 4, 1).contiguous()}

    return Contender(
        "fireants_fused_ops",
        lambda image, displacement: sample(image, grid=displacement, align_corners=True),
        prepare=prepare,
        devices=("cuda",),
    )


def optional(*wanted: tuple[str, Callable[[], Contender]]) -> list[Contender]:
    """Those that are installed; for the others a contender that says why it does not run."""
    found = []
    for name, make in wanted:
        try:
            found.append(make())
        except Exception as error:  # a package that is half there can raise anything
            found.append(Contender(name, partial(not_here, f"{type(error).__name__}: {error}"), devices=()))
    return found


def not_here(reason: str, **_: Tensor) -> Tensor:
    """Stands for an implementation that could not be imported."""
    raise ImportError(reason)


def similarity_case(op: str, variant: str, operation: Function, rivals: Callable[[], list[Contender]]) -> Case:
    return Case(op, variant, pair, SIMILARITY, operation, rivals)


CASES = [
    *(similarity_case("lncc", f"window {w}", partial(ops.lncc, window=w), partial(lncc_rivals, w)) for w in (9, 7)),
    similarity_case(
        "mutual_information", "32 bins", partial(ops.mutual_information, bins=32), partial(information_rivals, 32)
    ),
    Case(
        "warp",
        "",
        lambda shape, g: {"image": image(shape, g), "displacement": smooth_field(shape, g, 4.0)},
        (
            Pass("forward", (), 5),
            Pass("forward + backward to displacement", ("displacement",), 13),
            Pass("forward + backward to displacement and image", ("displacement", "image"), 14),
        ),
        ops.warp,
        warp_rivals,
        shaped_like="image",
        tolerance=1e-5,
    ),
    Case(
        "integrate",
        "7 steps",
        lambda shape, g: {"velocity": smooth_field(shape, g, 6.0)},
        (Pass("forward", (), 7 * 6), Pass("forward + backward", ("velocity",), 7 * 6 + 7 * 9)),
        partial(ops.integrate, steps=7),
        lambda: [Contender("affine_grid + grid_sample", partial(integrate_by_grid_sample, steps=7))],
        shaped_like="velocity",
        tolerance=1e-5,
    ),
]
