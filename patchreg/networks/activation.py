"""Instance normalisation and leaky ReLU that keep no more than they must for the backward pass."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from patchreg.networks.surroundings import kind


def normalized_relu(x: Tensor, norm: nn.Module, slope: float) -> Tensor:
    """``leaky_relu(norm(x))``, in place of what the norm made.

    ``nn.InstanceNorm3d`` is batch normalisation of (1, B C, I, J, K), and gives a view of the result. Changing that in
    place would make autograd copy it three times in the backward pass; so it is changed before it is viewed.

    Args:
        x: (B, C, I, J, K). Kept for the backward pass.
        norm: instance normalisation without running statistics, for which this is meant; others are called as they are.
        slope: of the leaky ReLU.

    Returns:
        The same shape. Kept for the backward pass, as it will be by a convolution that takes it.
    """
    if kind(norm) is not nn.InstanceNorm3d:
        return F.leaky_relu(norm(x), slope)
    assert isinstance(norm, nn.InstanceNorm3d)
    batch = x.shape[0]
    weight, bias = (None if p is None else p.repeat(batch) for p in (norm.weight, norm.bias))
    flat = x.contiguous().view(1, -1, *x.shape[2:])
    flat = F.batch_norm(flat, None, None, weight, bias, training=True, eps=norm.eps)
    return F.leaky_relu_(flat, slope).view(x.shape)
