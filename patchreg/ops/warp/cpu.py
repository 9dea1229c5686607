"""The CPU's kernels: ``csrc/cpu/warp.cpp``."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from patchreg.ops.cpu import STORAGE, address, extension, threads
from patchreg.ops.warp.job import Gradients, Job


def sample(job: Job, out: Tensor) -> None:
    """Linear sampling into ``out``, (B, C, *shape), of any dtype that kernels store."""
    extension().warp(
        **_describe(job), out=address(out), image_storage=_storage(job.image), out_storage=STORAGE[out.dtype],
        gain=job.gain, add=job.add,
    )  # fmt: skip


def sample_words(job: Job, out: Tensor, infinity: int) -> None:
    """Nearest sampling, or the neighbours' vote, into ``out``, of the dtype of the image, whatever it is.

    Args:
        job: what is sampled where.
        out: (B, C, *shape).
        infinity: the bits of that number where labels are floats, 0 where they are integers.
    """
    extension().warp_words(
        **_describe(job), out=address(out), word_bytes=out.element_size(), infinity=infinity, nearest=job.nearest
    )


def differentiate(job: Job, upstream: Tensor, gradients: Gradients) -> None:
    """The gradients that are wanted, from ``upstream``: d(loss) / d(out)."""
    g = gradients
    extension().warp_backward(
        **_describe(job), upstream=address(upstream), grad_image=address(g.image),
        grad_displacement=address(g.displacement), grad_affine=address(g.affine), grad_scale=address(g.scale),
        image_storage=_storage(job.image), out_storage=STORAGE[upstream.dtype], grad_storage=_storage(g.displacement),
        nearest=job.nearest, gain=job.gain, add=job.add,
    )  # fmt: skip


def _storage(tensor: Tensor | None) -> int:
    return 0 if tensor is None else STORAGE[tensor.dtype]


def _describe(job: Job) -> dict[str, Any]:
    return {
        "image": address(job.image),
        "displacement": address(job.displacement),
        "affine": address(job.affine),
        "scale": address(job.scale),
        "batch": job.batch,
        "channels": job.channels,
        "size": job.shape,
        "image_size": job.image_shape[2:],
        "batches": job.batches,
        "border": job.border,
        "displacement_storage": _storage(job.displacement),
        "step": job.step,
        "threads": threads(),
    }
