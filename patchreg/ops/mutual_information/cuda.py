"""Mutual information on CUDA: three launches for the value, one for the gradients, and nothing waits for the device."""

from __future__ import annotations

import functools
import math
import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from patchreg.ops.cuda import launch

SOURCE = "mutual_information.cu"
TYPES = {torch.float32: "float", torch.float16: "patchreg::Half", torch.bfloat16: "patchreg::BFloat16"}

_WINDOWS = (4, 8)  # bins that an intensity falls into: B-spline, Gaussian
_MEASURE_THREADS, _ADD_THREADS, _EVALUATE_THREADS, _GATHER_THREADS = 256, 512, 512, 256
_HEAD = 8  # numbers before the counts of each pair
_MOST_SHARED = 68 * 1024  # bytes for the histogram of a block: up to 128 bins
_COPIES_SHARED = 36 * 1024  # bytes that copies of a small one may take

ENTRIES: list[tuple[str, str]] = [
    *((SOURCE, f"patchreg::measure<{kind}>") for kind in TYPES.values()),
    (SOURCE, "patchreg::evaluate"),
    *(
        (SOURCE, f"patchreg::{kernel}<{kind}, {taps}, {shared}>")
        for kernel in ("add_voxels", "gather_voxels")
        for kind in TYPES.values()
        for taps in _WINDOWS
        for shared in ("true", "false")
    ),
]
"""Every kernel of the source."""


def joint_information(
    fixed: Tensor,
    moving: Tensor,
    weight: Tensor | None,
    bins: int,
    gaussian: bool,
    normalized: bool,
    ends: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`patchreg.ops.mutual_information.native.joint_information`."""
    shape, device = fixed.shape[:2], fixed.device
    pairs, channels, voxels = shape.numel(), shape[1], fixed[0, 0].numel()
    values = torch.empty(shape, dtype=torch.float32, device=device)
    slopes = torch.empty((*shape, bins, bins), dtype=torch.float32, device=device)
    ranges = torch.empty((*shape, 4), dtype=torch.float64, device=device)
    counts = torch.zeros((pairs, _HEAD + bins * bins), dtype=torch.int64, device=device)
    images = (fixed, moving, weight)
    of_batch = weight is not None and weight.shape[0] > 1
    given = [_bits(end) for end in ends]
    wanted = [math.isnan(end) for end in ends]
    kind, taps = TYPES[fixed.dtype], _WINDOWS[gaussian]
    if wanted[0] or wanted[2] or weight is not None:
        blocks = _blocks(voxels, pairs, 16 * _MEASURE_THREADS, 8, device)
        launch.launch(
            SOURCE,
            f"patchreg::measure<{kind}>",
            (blocks * pairs, 1, 1),
            (_MEASURE_THREADS, 1, 1),
            [*images, counts, blocks, voxels, channels, of_batch, bins, wanted[0], wanted[2]],
            device,
        )
    copies, shared = _copies(bins, device)
    blocks = _blocks(voxels, pairs, 4 * _ADD_THREADS, 2, device)
    launch.launch(
        SOURCE,
        f"patchreg::add_voxels<{kind}, {taps}, {_boolean(shared > 0)}>",
        (blocks * pairs, 1, 1),
        (_ADD_THREADS, 1, 1),
        [*images, counts, blocks, voxels, channels, of_batch, bins, copies, *given],
        device,
        shared,
    )
    launch.launch(
        SOURCE,
        "patchreg::evaluate",
        (pairs, 1, 1),
        (_EVALUATE_THREADS, 1, 1),
        [counts, ranges, values, slopes, bins, gaussian, weight is not None, normalized, *given],
        device,
        2 * bins * 8,
    )
    return values, slopes, ranges


def gather_gradients(
    fixed: Tensor,
    moving: Tensor,
    weight: Tensor | None,
    ranges: Tensor,
    slopes: Tensor,
    upstream: Tensor,
    grad_fixed: Tensor | None,
    grad_moving: Tensor | None,
    gaussian: bool,
) -> None:
    """Write the gradients that are there; see :func:`patchreg.ops.mutual_information.native.gradients`."""
    pairs, voxels, bins = fixed.shape[:2].numel(), fixed[0, 0].numel(), slopes.shape[-1]
    of_batch = weight is not None and weight.shape[0] > 1
    shared = 4 * bins * (bins + 1)
    shared = shared if shared <= _most_shared(fixed.device) else 0
    blocks = _blocks(voxels, pairs, 4 * _GATHER_THREADS, 4, fixed.device)
    tensors = [fixed, moving, weight, ranges, slopes, upstream, grad_fixed, grad_moving]
    launch.launch(
        SOURCE,
        f"patchreg::gather_voxels<{TYPES[fixed.dtype]}, {_WINDOWS[gaussian]}, {_boolean(shared > 0)}>",
        (blocks * pairs, 1, 1),
        (_GATHER_THREADS, 1, 1),
        [*tensors, blocks, voxels, fixed.shape[1], of_batch, bins],
        fixed.device,
        shared,
    )


def _copies(bins: int, device: torch.device) -> tuple[int, int]:
    """Copies of the histogram in a block's shared memory, and the bytes that they take; (1, 0) where not one fits."""
    size = 4 * bins * (bins + 1)
    if size > _most_shared(device):
        return 1, 0
    copies = 1
    while copies < 8 and 2 * copies * size <= _COPIES_SHARED:
        copies *= 2
    return copies, copies * size


def _blocks(voxels: int, pairs: int, voxels_per_block: int, per_multiprocessor: int, device: torch.device) -> int:
    """Blocks for each pair: as many as run at once, but none with less than ``voxels_per_block``."""
    most = -(-_multiprocessors(device) * per_multiprocessor // pairs)
    return max(1, min(-(-voxels // voxels_per_block), most))


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


@functools.cache
def _most_shared(device: torch.device) -> int:
    """Bytes of dynamic shared memory for a histogram; a little is left for the kernel's own."""
    if device.type != "cuda":
        return _MOST_SHARED
    return min(_MOST_SHARED, torch.cuda.get_device_properties(device).shared_memory_per_block_optin - 1024)


def _bits(value: float) -> int:
    """A double as the integer of the same bits: kernels take no doubles."""
    bits: int = struct.unpack("<q", struct.pack("<d", value))[0]
    return bits


def _boolean(value: bool) -> str:
    return "true" if value else "false"
