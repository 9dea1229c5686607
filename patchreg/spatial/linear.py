"""Linear maps of vector components."""

from __future__ import annotations

from torch import Tensor

from patchreg.ops.precision import full_precision


@full_precision
def apply_linear(matrix: Tensor, field: Tensor) -> Tensor:
    """Multiply the components (dim 1) of a field (B, 3, I, J, K) by a (3, 3) matrix."""
    return (matrix.to(field.device, field.dtype) @ field.flatten(2)).unflatten(2, field.shape[2:])
