"""Windowed attention, and the encoder made of it."""

from __future__ import annotations

import math
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F

from patchreg.errors import InputError
from patchreg.networks import attention, swin
from patchreg.networks.attention import WindowAttention, join, split
from patchreg.networks.swin import PatchMerging, SwinEncoder, SwinSize


def layer(window, shifted, dim=12, heads=3):
    torch.manual_seed(0)
    made = WindowAttention(dim, heads, window, shifted).double()
    for p in made.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return made


@contextmanager
def saved_sizes():
    """How many numbers each tensor has that is kept within the block."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        yield kept


def dense(made: WindowAttention, x: torch.Tensor) -> torch.Tensor:
    """The same from its definition: every pair of tokens of the padded grid, and a mask that leaves those of a window.

    A shifted window begins half a window off; what that cuts off at either end of an axis is a window of its own.
    """
    grid = x.shape[1:4]
    full = [math.ceil(n / w) * w for n, w in zip(grid, made.window, strict=True)]
    padded = x.new_zeros((x.shape[0], *full, x.shape[4]))
    padded[:, : grid[0], : grid[1], : grid[2]] = x
    points = torch.stack(torch.meshgrid(*[torch.arange(n) for n in full], indexing="ij"), dim=-1).view(-1, 3)
    window = torch.tensor(made.window)
    shift = torch.tensor([w // 2 if made.shifted and n > w else 0 for n, w in zip(full, made.window, strict=True)])
    place = torch.div(points - shift, window, rounding_mode="floor")
    together = (place[:, None] == place[None]).all(dim=-1)
    offset = (points[:, None] - points[None]).clamp(1 - window, window - 1) + window - 1
    sides = 2 * window - 1
    row = (offset[..., 0] * sides[1] + offset[..., 1]) * sides[2] + offset[..., 2]
    q, k, v = made.qkv(padded.flatten(1, 3)).unflatten(-1, (3, made.heads, -1)).permute(2, 0, 3, 1, 4)
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + made.table[row].permute(2, 0, 1)
    out = scores.masked_fill(~together, -math.inf).softmax(dim=-1) @ v
    out = made.proj(out.transpose(1, 2).flatten(2)).view(padded.shape)
    return out[:, : grid[0], : grid[1], : grid[2]]


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize(
    ("grid", "window"), [((4, 6, 8), (2, 3, 4)), ((5, 3, 7), (2, 3, 4)), ((5, 7, 4), (3, 5, 3)), ((2, 2, 9), (3, 3, 3))]
)
def test_attention_is_that_of_an_explicit_mask(grid, window, shifted, generator, tolerances):
    made = layer(window, shifted)
    x = torch.randn((2, *grid, 12), generator=generator, dtype=torch.float64, requires_grad=True)
    wanted = [x, *made.parameters()]
    found, expected = made(x), dense(made, x)
    weight = torch.randn(found.shape, generator=generator, dtype=torch.float64)
    assert torch.allclose(found, expected, atol=tolerances.value_float64)
    for a, b in zip(
        torch.autograd.grad(found, wanted, weight), torch.autograd.grad(expected, wanted, weight), strict=True
    ):
        assert torch.allclose(a, b, atol=tolerances.value_float64)


def test_attention_in_half_precision(generator, tolerances):
    made = layer((2, 3, 4), True)
    x = torch.randn((1, 4, 6, 8, 12), generator=generator)
    expected = dense(made, x.double())
    made.float()
    with torch.autocast("cpu", torch.bfloat16):
        found = made(x)
    assert found.dtype == torch.bfloat16
    assert (found - expected).norm() < tolerances.half * expected.norm()


@pytest.mark.parametrize("autocast", [False, True])
def test_shifted_windows_join_neighbours_but_not_the_ends(autocast, generator):
    """What a token sees of the others along an axis, by the gradient of its answer."""
    window = (2, 1, 1)
    x = torch.randn((1, 6, 1, 1, 12), generator=generator, requires_grad=True)
    sees = []
    for shifted in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = layer(window, shifted).float()(x)
        rows = [torch.autograd.grad(out[0, i].square().sum(), x, retain_graph=True)[0] for i in range(6)]
        sees.append([[j for j in range(6) if row[0, j].abs().max() > 0] for row in rows])
    assert sees[0] == [[0, 1], [0, 1], [2, 3], [2, 3], [4, 5], [4, 5]]
    assert sees[1] == [[0], [1, 2], [1, 2], [3, 4], [3, 4], [5]]


def test_nothing_is_shifted_along_an_axis_that_one_window_covers(generator):
    x = torch.randn((1, 3, 4, 2, 12), generator=generator, dtype=torch.float64)
    assert torch.equal(layer((4, 4, 2), True)(x), layer((4, 4, 2), False)(x))
    assert not torch.allclose(layer((4, 2, 2), True)(x), layer((4, 2, 2), False)(x))


@pytest.mark.parametrize("heads", [2, 3])  # 6 channels a head are padded, 4 as well
def test_chunks_change_nothing_and_no_scores_are_kept(heads, generator, monkeypatch, tolerances):
    made, length, windows = layer((4, 4, 4), True, heads=heads), 64, 12
    x = torch.randn((2, 8, 12, 4, 12), generator=generator, dtype=torch.float64)
    results = []
    for size in (2**26, 4 * heads * length**2 * 5):
        monkeypatch.setattr(attention, "SCORES_BYTES", size)
        with saved_sizes() as kept:
            out = made(x)
        assert max(kept) < windows * length**2
        results.append([out, *torch.autograd.grad(out.square().sum(), list(made.parameters()))])
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, atol=tolerances.value_float64)


def test_windows_are_split_and_joined(generator):
    x = torch.randn((2, 4, 6, 3, 5), generator=generator)
    windows = split(x, (2, 3, 1))
    assert windows.shape == (2 * 2 * 2 * 3, 6, 5)
    assert torch.equal(windows[0], x[0, :2, :3, :1].reshape(6, 5))
    assert torch.equal(windows[-1], x[1, 2:, 3:, 2:].reshape(6, 5))
    assert torch.equal(join(windows, (2, 3, 1), (4, 6, 3)), x)


def test_merging_takes_any_grid(generator):
    made = PatchMerging(4)
    x = torch.randn((2, 3, 4, 5, 4), generator=generator)
    out = made(x)
    assert out.shape == (2, 2, 2, 3, 8)
    whole = made(F.pad(x, (0, 0, 0, 1, 0, 0, 0, 1)))
    assert torch.equal(out, whole)
    corner = made.reduction(made.norm(x[:, :2, :2, :2].reshape(2, -1)))
    assert torch.allclose(out[:, 0, 0, 0], corner, atol=1e-6)


def test_levels_of_the_encoder(generator):
    made = SwinEncoder(2, SwinSize(4, (1, 2, 1), (1, 2, 2)), (2, 3, 2))
    assert made.multiple == 16
    tokens = made(torch.randn((2, 2, 32, 48, 16), generator=generator))
    assert [tuple(t.shape) for t in tokens] == [(2, 8, 12, 4, 4), (2, 4, 6, 2, 8), (2, 2, 3, 1, 16)]


def test_drop_path_grows_from_zero_at_the_first_block():
    made = SwinEncoder(2, SwinSize(4, (2, 3), (1, 2), 0.4), (2, 2, 2))
    rates = [m.drop_prob for m in made.modules() if isinstance(m, swin.DropPath)]
    assert rates == pytest.approx([0, 0, 0.1, 0.1, 0.2, 0.2, 0.3, 0.3, 0.4, 0.4])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"depths": (2,)}, "as many positive numbers"),
        ({"depths": (), "heads": ()}, "as many positive numbers"),
        ({"embed": 0}, "as many positive numbers"),
        ({"heads": (3, 2)}, "3 heads do not divide the 4 channels of level 1"),
        ({"drop_path": 1.0}, "drop_path must be from 0 to below 1"),
    ],
)
def test_bad_sizes_are_refused(arguments, says):
    with pytest.raises(InputError, match=says):
        SwinSize(**({"embed": 4, "depths": (2, 2), "heads": (2, 2)} | arguments))


def test_windows_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match=r"three positive numbers of tokens, got \(2, 2\)"):
        SwinEncoder(2, SwinSize(4, (1,), (1,)), (2, 2))
    made = SwinEncoder(2, SwinSize(4, (1, 1), (1, 1)), (5, 6, 7))
    made.check_size((20, 24, 25))
    with pytest.raises(InputError, match=r"\(20, 24, 24\).*\(6, 6, 6\) tokens.*window of \(5, 6, 7\).*smaller window"):
        made.check_size((20, 24, 24))
