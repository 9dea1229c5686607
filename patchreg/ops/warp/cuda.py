"""The GPU's kernels: ``csrc/cuda/warp.cu``."""

from __future__ import annotations

import itertools
import warnings

import torch
from torch import Tensor

from patchreg.ops.cuda import launch
from patchreg.ops.warp.job import Gradients, Job

NAMES: dict[torch.dtype | None, str] = {
    None: "float",  # an absent tensor, whose type is never asked for
    torch.float32: "float",
    torch.float16: "patchreg::Half",
    torch.bfloat16: "patchreg::BFloat16",
}
"""What kernels call the dtypes that they compute with."""

_WORDS = {1: "unsigned char", 2: "patchreg::u16", 4: "patchreg::u32", 8: "unsigned long long"}
_WORD_DTYPES = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

_TILE = (2, 4, 32)  # voxels along i, j, k that a block has, a thread each
_ROUNDS = 8  # tiles along i that a block takes where it forms sums
_SUMS = 21
_TO_IMAGE, _TO_DISPLACEMENT, _TO_MAPS = 1, 2, 4


def sample(job: Job, out: Tensor) -> None:
    """As :func:`patchreg.ops.warp.cpu.sample`."""
    entry = _entry("forward", _name(job.image), _name(job.displacement), _name(out), job.border, _maps(job))
    arguments = [job.image, job.displacement, out, *_lattice(job), job.gain, int(job.add)]
    _launch(entry, job, out.device, arguments)


def sample_words(job: Job, out: Tensor, infinity: int) -> None:
    """As :func:`patchreg.ops.warp.cpu.sample_words`."""
    word = out.element_size()
    entry = _entry("words", _WORDS[word], _name(job.displacement), job.border, _maps(job), job.nearest)
    assert job.image is not None
    image, result = (t.view(_WORD_DTYPES[word]) for t in (job.image, out))
    _launch(entry, job, out.device, [image, job.displacement, result, *_lattice(job), infinity])


def differentiate(job: Job, upstream: Tensor, gradients: Gradients) -> None:
    """As :func:`patchreg.ops.warp.cpu.differentiate`.

    Raises:
        RuntimeError: torch's deterministic algorithms are asked for, and a gradient to the image.
    """
    if gradients.image is not None:
        _tell_of_atomics()
    if job.nearest:
        entry = _entry("nearest_backward", _name(job.displacement), _name(upstream), job.border, _maps(job))
        _launch(entry, job, upstream.device, [job.displacement, upstream, gradients.image, *_lattice(job)])
        return
    shares = job.displacement is not None and job.batches[1] < job.batch
    wanted = (gradients.image is not None) * _TO_IMAGE + (gradients.displacement is not None) * _TO_DISPLACEMENT
    to_maps = gradients.affine is not None or gradients.scale is not None
    if to_maps and wanted & _TO_DISPLACEMENT and shares:
        # A displacement that the batch shares wants its sum, a map wants one for every entry: one after the other.
        _differentiate(job, upstream, Gradients(affine=gradients.affine, scale=gradients.scale), _TO_MAPS, 1)
        to_maps = False
    entries = job.batch if shares and wanted & _TO_DISPLACEMENT else 1
    if wanted or to_maps:
        _differentiate(job, upstream, gradients, wanted + to_maps * _TO_MAPS, entries)


def _tell_of_atomics() -> None:
    """What torch does before its own operations whose sums differ from run to run."""
    if not torch.are_deterministic_algorithms_enabled():
        return
    message = (
        "the gradient of warp, compose and integrate to what they sample is added up in no fixed order on CUDA: use "
        "the CPU, or torch.use_deterministic_algorithms(True, warn_only=True)"
    )
    if not torch.is_deterministic_algorithms_warn_only_enabled():
        raise RuntimeError(message)
    warnings.warn(message, stacklevel=2)


def _differentiate(job: Job, upstream: Tensor, gradients: Gradients, wanted: int, entries: int) -> None:
    image, displacement = gradients.image, gradients.displacement
    if image is not None and image is displacement:
        image.zero_()  # both gradients are added to it
    sums = None
    if wanted & _TO_MAPS:
        sums = upstream.new_empty((job.batch, _tiles(job, _ROUNDS), _SUMS), dtype=torch.float64)
    entry = _entry(
        "backward", _name(job.image), _name(job.displacement), _name(upstream), _name(displacement),
        job.border, _maps(job), wanted,
    )  # fmt: skip
    arguments = [job.image, job.displacement, upstream, image, displacement, sums, *_lattice(job)]
    _launch(entry, job, upstream.device, [*arguments, job.gain, int(job.add), entries], wanted & _TO_MAPS, entries)
    if sums is not None:
        _add_up(sums, gradients)


def _add_up(sums: Tensor, gradients: Gradients) -> None:
    """Write the sums over tiles, and over the batch where it shares a map."""
    for gradient, part in ((gradients.affine, sums[..., :12]), (gradients.scale, sums[..., 12:])):
        if gradient is not None:
            of_entries = part.sum(dim=1)
            total = of_entries if gradient.shape[0] == sums.shape[0] else of_entries.sum(dim=0)
            gradient.copy_(total.view_as(gradient))


def _launch(
    entry: str,
    job: Job,
    device: torch.device,
    arguments: list[launch.Argument],
    sums: int = 0,
    entries: int = 1,
) -> None:
    if max(*job.shape, *job.image_shape[2:]) >= 2**23:
        raise RuntimeError("an axis of 2^23 voxels or more cannot be sampled")
    blocks = _tiles(job, _ROUNDS if sums else 1) * (job.batch // entries)
    launch.launch("warp.cu", entry, (blocks, 1, 1), _TILE[::-1], arguments, device)


def _tiles(job: Job, rounds: int) -> int:
    """Blocks that one batch entry takes."""
    i, j, k = (-(-n // t) for n, t in zip(job.shape, (_TILE[0] * rounds, *_TILE[1:]), strict=True))
    return i * j * k


def _maps(job: Job) -> bool:
    return job.affine is not None or job.scale is not None


def _lattice(job: Job) -> list[launch.Argument]:
    """The arguments that all kernels take."""
    voxels, image_voxels = (n * m * k for n, m, k in (job.shape, job.image_shape[2:]))
    each = (job.channels * image_voxels, 3 * voxels, 12, 9)
    strides = [0 if batch == 1 else size for batch, size in zip(job.batches, each, strict=True)]
    return [job.affine, job.scale, job.channels, *job.shape, *job.image_shape[2:], *strides, float(job.step)]


def _name(tensor: Tensor | None) -> str:
    return NAMES[None if tensor is None else tensor.dtype]


def _entry(kernel: str, *arguments: str | bool | int) -> str:
    """A kernel of ``warp.cu`` with its template arguments."""
    words = (str(a).lower() if isinstance(a, bool) else str(a) for a in arguments)
    return f"patchreg::warp_{kernel}<{', '.join(words)}>"


def _representative() -> list[str]:
    half, bfloat16 = "patchreg::Half", "patchreg::BFloat16"
    entries = []
    for border, maps in itertools.product((False, True), repeat=2):
        for image, field, out in (("float",) * 3, (half, "float", half), ("float", half, "float"), (bfloat16,) * 3):
            entries.append(_entry("forward", image, field, out, border, maps))
        for nearest in (False, True):
            entries += [_entry("words", word, "float", border, maps, nearest) for word in _WORDS.values()]
        entries.append(_entry("nearest_backward", "float", half, border, maps))
        for wanted in range(1, 8 if maps else 4):
            entries.append(_entry("backward", *("float",) * 4, border, maps, wanted))
        entries.append(_entry("backward", half, bfloat16, half, bfloat16, border, maps, _TO_IMAGE + _TO_DISPLACEMENT))
    return entries


ENTRIES: list[tuple[str, str]] = [("warp.cu", entry) for entry in _representative()]
"""Kernels that stand for all."""
