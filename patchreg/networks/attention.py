"""Self-attention within windows of a token grid."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn

from patchreg.networks.checkpointing import run_part
from patchreg.types import Shape3

SCORES_BYTES = 2**26
"""Of the scores that exist at one time, in float32."""

SEPARATION = 4096.0
"""Taken from the scores between regions that must not see each other: their weight is then 0 even in float64."""


class WindowAttention(nn.Module):
    """Multi-head attention within windows, with a learned bias for every relative position.

    Any token grid is taken. It is padded at its end with zero tokens to multiples of the window; they take part. A shifted
    grid is moved by half a window, cyclically, so that its windows join what the windows of the block before part;
    tokens that meet only across the border of the volume do not see each other. Along an axis that one window covers
    nothing is shifted.

    Args:
        dim: channels of a token, a multiple of ``heads``.
        heads: of attention.
        window: tokens of a window along the axes.
        shifted: whether the windows are shifted by half their size.

    References:
        Liu et al. 2021, arXiv:2103.14030, section 3.2 and eq. (4); Chen et al. 2022, arXiv:2111.10480, for three axes.
    """

    index: Tensor

    def __init__(self, dim: int, heads: int, window: Shape3, shifted: bool) -> None:
        super().__init__()
        self.heads, self.window, self.shifted = heads, window, shifted
        self.scale = (dim // heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)
        a, b, c = (2 * n - 1 for n in window)
        self.table = nn.Parameter(torch.empty(a * b * c, heads))
        trunc_normal_(self.table, std=0.02)
        self.register_buffer("index", relative_positions(window), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, I, J, K, dim) to the same shape."""
        full, shift = self.frame(x.shape[1:4])
        return self.framed(x, full, shift, regions(full, shift, x.device) if any(shift) else None)

    def frame(self, grid: Sequence[int]) -> tuple[list[int], list[int]]:
        """Tokens along the axes of the padded grid, and by how many it is shifted."""
        full = [n + -n % w for n, w in zip(grid, self.window, strict=True)]
        return full, [w // 2 if self.shifted and n > w else 0 for n, w in zip(full, self.window, strict=True)]

    def framed(self, x: Tensor, full: Sequence[int], shift: Sequence[int], codes: Tensor | None) -> Tensor:
        """Pad, shift, attend, and undo both.

        Args:
            x: (B, I, J, K, dim).
            full: tokens of the padded grid, multiples of the window.
            shift: of the grid.
            codes: (1, *full, 1), the region of each token of the shifted grid. None: all see each other.
        """
        grid = x.shape[1:4]
        if list(grid) != list(full):
            i, j, k = (a - b for a, b in zip(full, grid, strict=True))
            x = F.pad(x, (0, 0, 0, k, 0, j, 0, i))
        if any(shift):
            x = x.roll([-s for s in shift], (1, 2, 3))
        of_windows = None if codes is None else split(codes, self.window)[..., 0]
        x = join(self.attention(split(x, self.window), of_windows), self.window, full)
        if any(shift):
            x = x.roll(list(shift), (1, 2, 3))
        return x[:, : grid[0], : grid[1], : grid[2]]

    def attention(self, x: Tensor, codes: Tensor | None) -> Tensor:
        """Tokens by window (N, L, dim), and their regions (n, L), to the same shape."""
        length, dim = x.shape[1:]
        q, k, v = self.qkv(x).view(-1, length, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        if codes is not None:
            q, k = separate(q, k, codes, self.scale)
            v = v.contiguous()  # or it would hold the memory of all three
        bias = self.table[self.index].permute(2, 0, 1)[None]
        out: Tensor = self.proj(attend(q, k, v, bias, self.scale).transpose(1, 2).flatten(2))
        return out


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
    """``softmax(scale q k^T + bias) v``, of which the scores are never kept.

    Runs by chunks of windows. On a GPU the fused kernel makes no scores; it does make the bias's gradient for every
    window, which the chunks bound. On the CPU no fused kernel takes a bias that needs a gradient, and the plain
    computation would keep its scores: each chunk is computed again in the backward pass. Channels are padded to
    multiples of 8, without which no fused kernel takes half precision.

    Args:
        q: (N, heads, L, D).
        k: the same shape.
        v: (N, heads, L, d).
        bias: (1, heads, L, L), shared by all windows.
        scale: of the products.

    Returns:
        (N, heads, L, d).
    """

    def chunk(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)

    width = v.shape[-1]
    q, k, v = (F.pad(x, (0, -x.shape[-1] % 8)) if x.shape[-1] % 8 else x for x in (q, k, v))
    size = max(1, SCORES_BYTES // (4 * bias.numel()))
    chunks = [
        run_part("stored" if q.is_cuda else "checkpoint", chunk, *part, bias)
        for part in zip(q.split(size), k.split(size), v.split(size), strict=True)
    ]
    return (chunks[0] if len(chunks) == 1 else torch.cat(chunks))[..., :width]


def separate(q: Tensor, k: Tensor, codes: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Append channels to queries and keys, so that tokens of different regions do not see each other.

    With the region's unit vector ``e``, the channels are ``a (1 - e)`` and ``-a e``: their product is exactly 0 within
    a region, and ``-a^2`` across. So one bias serves all windows, where a mask would be one for each.

    Args:
        q: (B * n, heads, L, d).
        k: the same shape.
        codes: (n, L), the region of each token, 0 to 7.
        scale: of the products.

    Returns:
        Both, (B * n, heads, L, d + 8).
    """
    size = (SEPARATION / scale) ** 0.5
    own = F.one_hot(codes, 8).to(q.dtype)[None, :, None]

    def append(x: Tensor, extra: Tensor) -> Tensor:
        x = x.unflatten(0, (-1, codes.shape[0]))
        return torch.cat([x, extra.expand(*x.shape[:-1], 8)], dim=-1).flatten(0, 1)

    return append(q, size * (1 - own)), append(k, -size * own)


def regions(grid: Sequence[int], shift: Sequence[int], device: torch.device) -> Tensor:
    """(1, *grid, 1): for each token of a shifted grid, along which axes it came from the other end, as bits."""
    code = torch.zeros((1, *grid, 1), dtype=torch.int64, device=device)
    for axis, moved in enumerate(shift):
        if moved:
            code.narrow(1 + axis, grid[axis] - moved, moved).add_(1 << axis)
    return code


def relative_positions(window: Shape3) -> Tensor:
    """(L, L): for each pair of tokens of a window, the row of its relative position in the table of biases."""
    axes = [torch.arange(n) for n in window]
    points = torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1)
    i, j, k = (d + n - 1 for d, n in zip(points[:, :, None] - points[:, None], window, strict=True))
    return (i * (2 * window[1] - 1) + j) * (2 * window[2] - 1) + k


def split(x: Tensor, window: Shape3) -> Tensor:
    """Tokens (B, I, J, K, C), sizes multiples of the window, by window: (B * n, L, C)."""
    a, b, c = window
    x = x.unflatten(3, (-1, c)).unflatten(2, (-1, b)).unflatten(1, (-1, a))
    return x.permute(0, 1, 3, 5, 2, 4, 6, 7).flatten(4, 6).flatten(0, 3)


def join(x: Tensor, window: Shape3, grid: Sequence[int]) -> Tensor:
    """The inverse of :func:`split`: (B, I, J, K, C) on ``grid``."""
    (i, j, k), (a, b, c) = grid, window
    x = x.view(-1, i // a, j // b, k // c, a, b, c, x.shape[-1]).permute(0, 1, 4, 2, 5, 3, 6, 7)
    return x.reshape(-1, i, j, k, x.shape[-1])
