"""Local normalised cross correlation in plain PyTorch, in the symbols of the papers."""

from __future__ import annotations

import torch
from torch import Tensor

from patchreg.ops.windows import box_sum, convolve, gaussian_kernel
from patchreg.types import Reduction


def lncc(
    fixed: Tensor, moving: Tensor, window: int, eps: float, mask: Tensor | None, reduction: Reduction, kernel: str
) -> Tensor:
    """See :func:`patchreg.ops.lncc`."""
    dtype = torch.promote_types(fixed.dtype, torch.float32)
    I, J = fixed.to(dtype), moving.to(dtype)
    n: Tensor | float = float(window**3)
    if mask is not None:
        mask = (mask > 0).to(dtype)
        I, J = I * mask, J * mask
        n = (n - _window_sum(1 - mask, window, kernel)).clamp(min=1)  # what lies outside the volume counts, as zeros
    I_sum, J_sum = _window_sum(I, window, kernel), _window_sum(J, window, kernel)
    II_sum, JJ_sum = _window_sum(I * I, window, kernel), _window_sum(J * J, window, kernel)
    cross = _window_sum(I * J, window, kernel) - I_sum * J_sum / n
    I_var, J_var = II_sum - I_sum * I_sum / n, JJ_sum - J_sum * J_sum / n

    rounding = 16 * torch.finfo(dtype).eps
    constant = (I_var <= rounding * II_sum) | (J_var <= rounding * JJ_sum)
    if mask is not None:
        constant = constant | (mask == 0)
    denominator = torch.where(constant, 1.0, I_var * J_var + eps)
    cc = torch.where(constant, 0.0, cross) ** 2 / denominator
    if reduction == "none":
        return cc
    if reduction == "sum":
        return cc.sum()
    return cc.mean() if mask is None else cc.sum() / (mask.sum() * cc.shape[1])


def _window_sum(x: Tensor, window: int, kernel: str) -> Tensor:
    if kernel == "box":
        return box_sum(x, window)
    weights = gaussian_kernel(window / 6, window // 2, x) * window
    for dim in (2, 3, 4):
        x = convolve(x, weights, dim, mode="constant")
    return x
