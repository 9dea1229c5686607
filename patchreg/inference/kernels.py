"""Which implementations of the operations run here, and whether they are right."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from patchreg import ops
from patchreg.ops import cpu
from patchreg.ops.dispatch import why_not_native

Operation = Callable[..., Tensor]

_SHAPE = (13, 17, 11)


@dataclass(frozen=True)
class Target:
    """A device, and what runs the operations on it."""

    device: torch.device
    name: str
    """Of the processor, or of the GPU."""
    reason: str | None
    """Why there are no native kernels; None where they are active."""

    @property
    def backend(self) -> str:
        """What ``backend="auto"`` takes for float32."""
        return "native" if self.reason is None else "reference (PyTorch)"


@dataclass(frozen=True)
class Check:
    """One operation, in one variant, on one device, compared with the reference in float64."""

    operation: str
    variant: str
    target: Target
    value_error: float
    gradient_error: float
    """Relative L2 errors; the gradient's is the largest of all inputs'."""

    @property
    def passed(self) -> bool:
        """Whether both errors are what rounding explains."""
        tolerance = 2e-2 if "float16" in self.variant or "bfloat16" in self.variant else 1e-4
        return self.value_error < tolerance and self.gradient_error < 10 * tolerance


def list_targets() -> list[Target]:
    """This machine's devices: the CPU, and every GPU that torch finds."""
    devices = [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]
    return [Target(d, _device_name(d), why_not_native(d.type, d.index, (torch.float32,))) for d in devices]


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{properties.name}, compute capability {properties.major}.{properties.minor}"
    extension = cpu.find_extension()
    active = f"{cpu.threads()} threads"
    return active if extension is None else f"{active}, {extension.instruction_set()} instructions"


def check_kernels(targets: list[Target]) -> Iterator[Check]:
    """Run every operation in every variant on each target: its value and gradients against float64.

    The first check of a kernel on a GPU compiles it, which takes a fraction of a second.
    """
    for target in targets:
        for operation, variant, function, inputs in _variants():
            yield Check(operation, variant, target, *_errors(function, inputs, target, variant))


def _variants() -> Iterator[tuple[str, str, Operation, list[Tensor]]]:
    """Name, variant, the function of its inputs, and the inputs, in float64."""
    generator = torch.Generator().manual_seed(0)

    def made(channels: int) -> Tensor:
        return torch.rand((2, channels, *_SHAPE), generator=generator, dtype=torch.float64)

    image, other, u, v = made(2), made(2), 3 * made(3) - 1.5, made(3)
    affine = torch.eye(3, 4, dtype=torch.float64) + 0.05 * torch.rand((3, 4), generator=generator, dtype=torch.float64)
    mask = (torch.rand((2, 1, *_SHAPE), generator=generator) > 0.3).double()

    def masked(function: Operation) -> Operation:
        return lambda a, b, **k: function(a, b, mask=mask.to(a.device, a.dtype), **k)

    for window in (3, 5, 7, 9, 11):
        yield "lncc", f"window {window}", partial(ops.lncc, window=window), [image, other]
    yield "lncc", "Gaussian", partial(ops.lncc, window=5, kernel="gaussian"), [image, other]
    yield "lncc", "mask", masked(partial(ops.lncc, window=5)), [image, other]
    yield "lncc", "map", partial(ops.lncc, window=5, reduction="none"), [image, other]
    for dtype in ("float16", "bfloat16"):
        yield "lncc", dtype, partial(ops.lncc, window=5, reduction="sum"), [image, other]
    for bins in (16, 32, 64, 128):
        yield "mutual_information", f"{bins} bins", partial(ops.mutual_information, bins=bins), [image, other]
    yield "mutual_information", "Gaussian", partial(ops.mutual_information, window="gaussian"), [image, other]
    yield "mutual_information", "mask", masked(partial(ops.mutual_information, normalized=True)), [image, other]
    for padding in ("zeros", "border"):
        yield "warp", padding, partial(ops.warp, padding=padding), [image, u, affine]
    yield "warp", "float16", partial(ops.warp, padding="border"), [image, u, affine]
    yield "warp", "nearest", lambda i, d, **k: ops.warp(i, d.detach(), mode="nearest", **k), [image, u]
    yield (
        "warp",
        "label",
        lambda i, d, **k: ops.warp((4 * i.detach()).round(), d.detach(), mode="label", **k),
        [image, u],
    )
    yield "compose", "affine", ops.compose, [u, v, affine]
    yield "integrate", "7 steps", ops.integrate, [v]


def _errors(function: Operation, inputs: list[Tensor], target: Target, variant: str) -> tuple[float, float]:
    """The relative errors of the value, and of the gradients, of what ``backend="auto"`` runs in the variant's dtype."""
    dtype = getattr(torch, variant) if "float" in variant else torch.float32
    rounded = [x.to(dtype).double() for x in inputs]
    exact = _run(partial(function, backend="reference"), rounded)
    found = _run(function, [x.to(target.device, dtype) for x in rounded])
    errors = [
        float((a.double().cpu() - b).norm() / b.norm().clamp(min=1e-30)) for a, b in zip(found, exact, strict=True)
    ]
    return errors[0], max(errors[1:], default=0.0)


def _run(function: Operation, inputs: list[Tensor]) -> list[Tensor]:
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    value = function(*inputs)
    if value.requires_grad:
        (value.float() if value.dtype in (torch.float16, torch.bfloat16) else value).square().sum().backward()
    return [value.detach(), *(x.grad for x in inputs if x.grad is not None)]
