"""Local normalised cross correlation on CUDA: which kernel, over which parts of the volume."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from patchreg.ops.cuda import launch
from patchreg.ops.lncc.tiles import Mode, Tile, chunk_length
from patchreg.ops.windows import gaussian_kernel

NAMES: dict[torch.dtype, str] = {
    torch.float32: "float",
    torch.float16: "patchreg::Half",
    torch.bfloat16: "patchreg::BFloat16",
}
"""What kernels call the dtypes that they read."""

_FUSED_WINDOWS = (3, 5, 7, 9)
_MOST_IN_A_SLICE = 2**31  # voxels, that the fused kernel can count
_SCRATCH_BYTES = 40 * 2**20
_THREADS = 256  # of a block of csrc/cuda/lncc_any.cu


def _fused_entry(dtype: torch.dtype, tile: Tile) -> str:
    masked = str(tile.masked).lower()
    return f"patchreg::lncc<{NAMES[dtype]}, {tile.radius}, {int(tile.mode)}, {masked}>"


def _any_entry(name: str, dtype: torch.dtype | None = None) -> str:
    return f"patchreg::lncc_any_{name}" + (f"<{NAMES[dtype]}>" if dtype else "")


ENTRIES: list[tuple[str, str]] = [
    *(
        ("lncc.cu", _fused_entry(torch.float32, Tile(r, m, k)))
        for r in (1, 2, 3, 4)
        for m in Mode
        for k in (False, True)
    ),
    *(("lncc.cu", _fused_entry(t, Tile(4, m, True))) for t in (torch.float16, torch.bfloat16) for m in Mode),
    *(("lncc_any.cu", _any_entry(name, t)) for name in ("rows", "derive", "gradients") for t in NAMES),
    *(("lncc_any.cu", _any_entry(name)) for name in ("columns", "sum")),
]
"""Kernels that stand for all."""


class Options(NamedTuple):
    """What every function here takes beside the images."""

    mask: Tensor | None
    window: int
    eps: float
    gaussian: bool


@dataclass(frozen=True)
class _Wanted:
    """Where the results go; None for what is not wanted."""

    value_map: Tensor | None = None
    grad_fixed: Tensor | None = None
    grad_moving: Tensor | None = None

    @property
    def mode(self) -> Mode:
        return Mode((self.grad_fixed is not None) + (self.grad_moving is not None))


def value(fixed: Tensor, moving: Tensor, mask: Tensor | None, window: int, eps: float, gaussian: bool) -> Tensor:
    """The sum of the squared correlation over all voxels.

    Args:
        fixed: (B, C, I, J, K), contiguous, float32, float16 or bfloat16.
        moving: likewise.
        mask: (B, 1, I, J, K), uint8, contiguous; voxels where it is zero enter no window and no sum.
        window: odd side of the window, in voxels.
        eps: added to the product of the variances.
        gaussian: whether the window is a Gaussian instead of a box.

    Returns:
        A float32 scalar.
    """
    return _sweep(fixed, moving, Options(mask, window, eps, gaussian), None, _Wanted())


def value_map(fixed: Tensor, moving: Tensor, mask: Tensor | None, window: int, eps: float, gaussian: bool) -> Tensor:
    """The squared correlation at every voxel, float32; arguments as for :func:`value`."""
    values = torch.empty_like(fixed, dtype=torch.float32)
    _sweep(fixed, moving, Options(mask, window, eps, gaussian), None, _Wanted(value_map=values))
    return values


def value_and_gradients(
    fixed: Tensor,
    moving: Tensor,
    mask: Tensor | None,
    upstream: Tensor | None,
    window: int,
    eps: float,
    gaussian: bool,
    to_fixed: bool,
    to_moving: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The sum, and the gradients of the map times ``upstream``, summed.

    Args:
        fixed: as for :func:`value`, and so are those not named here.
        moving: as for :func:`value`.
        mask: as for :func:`value`.
        upstream: float32 on the same device: a scalar, or a map of the shape of ``fixed``; None for one.
        window: as for :func:`value`.
        eps: as for :func:`value`.
        gaussian: as for :func:`value`.
        to_fixed: whether the gradient to ``fixed`` is wanted.
        to_moving: whether that to ``moving`` is.

    Returns:
        The sum, a float32 scalar, and the gradients in float32, None where not wanted.
    """
    grads = [torch.empty_like(fixed, dtype=torch.float32) if wanted else None for wanted in (to_fixed, to_moving)]
    options = Options(mask, window, eps, gaussian)
    total = _sweep(fixed, moving, options, upstream, _Wanted(None, *grads))
    return total, grads[0], grads[1]


def _sweep(fixed: Tensor, moving: Tensor, options: Options, upstream: Tensor | None, wanted: _Wanted) -> Tensor:
    if wanted.mode is Mode.GRADIENT and wanted.grad_fixed is None:  # the operation is symmetric
        fixed, moving, wanted = moving, fixed, _Wanted(grad_fixed=wanted.grad_moving)
    tile = Tile(options.window // 2, wanted.mode, options.mask is not None)
    device = _device(fixed)
    slice_size = fixed.shape[3] * fixed.shape[4]
    fused = not options.gaussian and options.window in _FUSED_WINDOWS
    if not fused or tile.shared_bytes > device.shared_bytes or slice_size >= _MOST_IN_A_SLICE:
        return _sweep_boxes(fixed, moving, options, upstream, wanted)
    return _sweep_fused(fixed, moving, options, upstream, wanted, tile, device.processors)


@dataclass(frozen=True)
class _Device:
    processors: int
    shared_bytes: int


def _device(tensor: Tensor) -> _Device:
    if launch.emulated():
        return _Device(processors=4, shared_bytes=99 * 1024)
    properties = torch.cuda.get_device_properties(tensor.device)
    return _Device(properties.multi_processor_count, properties.shared_memory_per_block_optin)


def _sweep_fused(
    fixed: Tensor,
    moving: Tensor,
    options: Options,
    upstream: Tensor | None,
    wanted: _Wanted,
    tile: Tile,
    processors: int,
) -> Tensor:
    batch, channels, depth, height, width = fixed.shape
    columns = batch * channels * tile.tiles(height, width)
    chunk = chunk_length(depth, columns, tile.warm_up, processors)
    chunks = -(-depth // chunk)
    partial_sums = torch.empty(columns * chunks, dtype=torch.float64, device=fixed.device)
    upstream_is_map = upstream is not None and upstream.ndim > 0
    launch.launch(
        "lncc.cu",
        _fused_entry(fixed.dtype, tile),
        (columns * chunks, 1, 1),
        (tile.threads, 1, 1),
        [
            *(fixed, moving, options.mask, upstream, upstream_is_map, partial_sums),
            *(wanted.value_map, wanted.grad_fixed, wanted.grad_moving),
            *(channels, depth, height, width, chunks, chunk, options.eps),
        ],
        fixed.device,
        tile.shared_bytes,
    )
    return partial_sums.sum().float()


@dataclass(frozen=True)
class _Span:
    """Slices or rows ``first`` to ``first + size - 1``."""

    first: int
    size: int

    def grown(self, by: int, limit: int) -> _Span:
        """Larger by as many on both sides, as far as there are any."""
        first = max(0, self.first - by)
        return _Span(first, min(limit, self.first + self.size + by) - first)


def _sweep_boxes(fixed: Tensor, moving: Tensor, options: Options, upstream: Tensor | None, wanted: _Wanted) -> Tensor:
    """Any window, one box of slices and rows after the other."""
    batch, channels, depth, height, _ = fixed.shape
    weights = None
    if options.gaussian:
        with fixed.device:  # nothing is copied from the host: that would wait, and break a CUDA graph
            weights = gaussian_kernel(options.window / 6, options.window // 2, torch.empty(0)) * options.window
    size_z, size_j = _box_size(fixed, options, wanted.mode)
    total = torch.zeros((), dtype=torch.float64, device=fixed.device)
    for b in range(batch):
        for c in range(channels):
            plane = _Plane(
                fixed[b, c],
                moving[b, c],
                None if options.mask is None else options.mask[b, 0],
                upstream[b, c] if upstream is not None and upstream.ndim > 0 else upstream,
                _Wanted(
                    *(None if t is None else t[b, c] for t in (wanted.value_map, wanted.grad_fixed, wanted.grad_moving))
                ),
                options.window // 2,
                options.eps,
                weights,
            )
            for z in range(0, depth, size_z):
                for j in range(0, height, size_j):
                    total += plane.sweep(_Span(z, min(size_z, depth - z)), _Span(j, min(size_j, height - j)))
    return total.float()


def _box_size(fixed: Tensor, options: Options, mode: Mode) -> tuple[int, int]:
    """Slices and rows of the boxes, as large as the scratch memory allows, and as near to a square."""
    depth, height, width = fixed.shape[2:]
    radius = options.window // 2
    limit = max(_SCRATCH_BYTES, depth * height * width * 4 // 2) // (4 * width)

    def rows(size: int) -> int:
        def span(by: int, length: int) -> int:
            return min(length, size + 2 * by * radius)

        if mode is Mode.VALUE:
            return 6 * span(1, depth) * (span(1, height) + span(0, height))
        return 6 * span(2, depth) * (span(2, height) + span(1, height)) + 5 * span(1, depth) * span(1, height)

    size = max(depth, height)
    while size > 8 and rows(size) > limit:
        size = (size + 1) // 2
    return min(size, depth), min(size, height)


@dataclass(frozen=True)
class _Plane:
    """One channel of one pair, and the kernels of ``csrc/cuda/lncc_any.cu`` over it."""

    fixed: Tensor
    moving: Tensor
    mask: Tensor | None
    upstream: Tensor | None
    wanted: _Wanted
    radius: int
    eps: float
    weights: Tensor | None

    @property
    def center(self) -> int:
        """The voxel whose intensities the gradient is formed about."""
        depth, height, width = self.fixed.shape
        return (depth // 2 * height + height // 2) * width + width // 2

    def sweep(self, z: _Span, j: _Span) -> Tensor:
        """The sum of the values in a box of slices and rows; what else is wanted of it is written."""
        depth, height, _ = self.fixed.shape
        if self.wanted.mode is Mode.VALUE:
            return self._derive(z, j, z, j)[0]
        around_z, around_j = z.grown(self.radius, depth), j.grown(self.radius, height)
        total, fields = self._derive(around_z, around_j, z, j)
        self._gradients(fields, around_z, around_j, z, j)
        return total

    def _derive(self, z: _Span, j: _Span, own_z: _Span, own_j: _Span) -> tuple[Tensor, Tensor]:
        """The sum of the values that are the box's own, and the fields of the box with its margins."""
        depth, height, width = self.fixed.shape
        numbers = 5 if self.mask is None else 6
        in_z, in_j = z.grown(self.radius, depth), j.grown(self.radius, height)
        over_k = self._empty(numbers, in_z.size, in_j.size, width)
        over_j = self._empty(numbers, in_z.size, j.size, width)
        with_fields = self.wanted.mode is not Mode.VALUE
        fields = self._empty(5 if with_fields else 0, z.size, j.size, width)
        voxels = z.size * j.size * width
        partial_sums = self.fixed.new_empty(-(-voxels // _THREADS), dtype=torch.float64)
        images = (self.fixed, self.moving, self.mask, self.weights)
        sizes = (self.radius, height, width, *_pair(in_z), *_pair(in_j))
        self._launch("rows", over_k[0], [*images, over_k, *sizes])
        options = (self.radius, self.mask is not None, height, width)
        self._launch("columns", over_j[0], [over_k, self.weights, over_j, *options, in_z.size, *_pair(in_j), *_pair(j)])
        upstream_is_map = self.upstream is not None and self.upstream.ndim > 0
        out = (partial_sums, self.wanted.value_map, fields if with_fields else None)
        places = (*_pair(in_z), *_pair(z), *_pair(j), *_pair(own_z), *_pair(own_j))
        self._launch(
            "derive",
            partial_sums,
            [
                *(over_j, *images, self.upstream, upstream_is_map, *out),
                *(self.radius, depth, height, width, *places, self.center, self.eps),
            ],
            voxels,
        )
        return partial_sums.sum(), fields

    def _gradients(self, fields: Tensor, in_z: _Span, in_j: _Span, z: _Span, j: _Span) -> None:
        _, height, width = self.fixed.shape
        over_k = torch.empty_like(fields)
        over_j = self._empty(5, in_z.size, j.size, width)
        rows = 5 * in_z.size * in_j.size
        self._launch("sum", over_k, [fields, self.weights, over_k, self.radius, rows, 0, width, 0, width, 1])
        places = (5 * in_z.size, *_pair(in_j), *_pair(j), width)
        self._launch("sum", over_j, [over_k, self.weights, over_j, self.radius, *places])
        images = (self.fixed, self.moving, self.mask, self.weights)
        sizes = (self.radius, height, width, *_pair(in_z), *_pair(z), *_pair(j))
        out = (self.wanted.grad_fixed, self.wanted.grad_moving)
        voxels = z.size * j.size * width
        self._launch("gradients", over_j, [over_j, *images, *out, *sizes, self.center], voxels)

    def _empty(self, *shape: int) -> Tensor:
        return self.fixed.new_empty(shape, dtype=torch.float32)

    def _launch(self, name: str, like: Tensor, arguments: list[launch.Argument], threads: int | None = None) -> None:
        dtype = None if name in ("columns", "sum") else self.fixed.dtype
        blocks = -(-(like.numel() if threads is None else threads) // _THREADS)
        device = self.fixed.device
        launch.launch("lncc_any.cu", _any_entry(name, dtype), (blocks, 1, 1), (_THREADS, 1, 1), arguments, device)


def _pair(span: _Span) -> tuple[int, int]:
    return span.first, span.size
