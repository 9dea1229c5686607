"""Composition of displacements, and from it scaling and squaring."""

from __future__ import annotations

from typing import get_args

from torch import Tensor

from patchreg.errors import InputError
from patchreg.ops import checks
from patchreg.ops.compose import native, reference
from patchreg.ops.dispatch import is_native
from patchreg.ops.warp.arguments import complete
from patchreg.types import Backend, Memory, Padding


def compose(
    u: Tensor,
    v: Tensor,
    affine: Tensor | None = None,
    scale: Tensor | float | None = None,
    padding: Padding = "border",
    backend: Backend = "auto",
) -> Tensor:
    """The displacement ``v(x) + u(A x + t + S v(x))`` of "``v`` first, then ``u``".

    With neither ``affine`` nor ``scale`` both fields share a lattice and their unit is its voxel. A field on another
    lattice is composed by giving the map from voxels of ``v`` to voxels of ``u`` and the scale of ``v`` in them.

    Args:
        u: the displacement applied second, (B, 3, I, J, K).
        v: the displacement applied first, (B, 3, i, j, k); components in the unit of ``u``.
        affine: ``[A | t]``, (3, 4) or (B, 3, 4), from voxels of ``v`` to voxels of ``u``. None: the identity.
        scale: ``S``, a number, (3, 3) or (B, 3, 3), from the unit of ``v`` to voxels of ``u``. None: the identity.
        padding: what ``u`` is outside its lattice.
        backend: see :mod:`patchreg.ops`.

    Returns:
        (B, 3, i, j, k), on the lattice and in the unit of ``v``.

    Raises:
        InputError: shapes, dtypes or devices that do not go together.

    References:
        Vercauteren et al. 2009, doi:10.1016/j.neuroimage.2008.10.040, sec. 2.1.
    """
    checks.volume("u", u, channels=3)
    checks.volume("v", v, channels=3)
    checks.same_device("u", u, "v", v)
    affine, scale, _ = complete(u, v, affine, scale, None, "linear", padding)
    implementation = native if is_native("compose", backend, u, v) else reference
    return implementation.compose(u, v, affine, scale, padding)


def integrate(
    velocity: Tensor,
    steps: int = 7,
    padding: Padding = "border",
    memory: Memory = "recompute",
    backend: Backend = "auto",
) -> Tensor:
    """The displacement ``exp(v) - id`` of a stationary velocity, by scaling and squaring.

    Extra memory of the native kernels, in fields of float32 and the shape of ``velocity``, the result and the gradient
    included: two for the result; for the gradient four while it is made (with up to 8 steps, five up to 16), of which
    ``memory="stored"`` needs two, but keeps ``steps - 1`` from the forward to the backward pass, where ``"recompute"`` keeps
    none. Half precision is integrated in float32. The reference, which runs where no kernel can, keeps about 15 fields
    for every step.

    Args:
        velocity: ``v``, (B, 3, I, J, K), in voxels of its own lattice.
        steps: squarings; the velocity is divided by ``2**steps`` first.
        padding: what the field is outside its lattice.
        memory: whether the fields on the way are kept for the backward pass, ``"stored"``, or made again from the velocity,
            ``"recompute"``: with 7 steps 9 squarings more, which make it about 1.4 times as long.
        backend: see :mod:`patchreg.ops`.

    Returns:
        (B, 3, I, J, K), in voxels.

    Raises:
        InputError: not a field, or a negative number of steps.

    References:
        Arsigny et al. 2006, doi:10.1007/11866565_113, sec. 3; Dalca et al. 2018, arXiv:1805.04605, sec. 3.1.
    """
    checks.volume("velocity", velocity, channels=3)
    if steps < 0:
        raise InputError(f"steps must not be negative, got {steps}")
    if padding not in get_args(Padding):
        raise InputError(f"padding must be one of {get_args(Padding)}, got {padding!r}")
    if memory not in get_args(Memory):
        raise InputError(f"memory must be one of {get_args(Memory)}, got {memory!r}")
    if is_native("integrate", backend, velocity):
        return native.integrate(velocity, steps, padding, memory)
    return reference.integrate(velocity, steps, padding)
