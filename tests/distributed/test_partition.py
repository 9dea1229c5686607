from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from patchreg.distributed import Partition, halo_widths
from patchreg.distributed.partition import reads
from patchreg.errors import InputError

WINDOWS = [
    (kernel, stride, padding, dilation)
    for kernel in (1, 2, 3, 4, 5)
    for stride in (1, 2, 3)
    for padding in (0, 1, 2, 4)
    for dilation in (1, 2)
]


def test_even_slabs():
    assert Partition.even(10, 4).sizes == (3, 3, 2, 2)
    assert Partition.even(2, 4).sizes == (1, 1, 0, 0)
    assert Partition.even(100, 3, multiple=16).sizes == (48, 32, 20)
    assert Partition.even(96, 4, multiple=16).sizes == (32, 32, 16, 16)
    assert Partition.even(17, 3, multiple=16).sizes == (16, 1, 0)


def test_places():
    p = Partition((4, 0, 3, 2), 3)
    assert p.total == 9
    assert p.starts == (0, 4, 4, 7)
    assert p.spans == ((0, 4), (4, 4), (4, 7), (7, 9))
    assert [p.owner(plane) for plane in range(9)] == [0, 0, 0, 0, 2, 2, 2, 3, 3]
    volume = torch.arange(9.0).expand(1, 1, 2, 9).unsqueeze(-1)
    assert torch.equal(torch.cat([p.cut(volume, rank) for rank in range(4)], dim=3), volume)
    assert p.scaled(2).sizes == (8, 0, 6, 4)


@pytest.mark.parametrize("sizes", [(7, 5), (1, 8, 3), (0, 9, 4), (5, 0, 0, 6), (5, 6, 0)])
def test_outputs_and_halos_of_windows(sizes):
    """Outputs lie where their centre is; slabs extended by the halos, cut or padded, give exactly these outputs."""
    for window in WINDOWS:
        check_window(Partition(sizes), window)


def check_window(p, window):
    kernel, stride, padding, dilation = window
    if p.total + 2 * padding < dilation * (kernel - 1) + 1:
        with pytest.raises(InputError, match="does not fit"):
            p.after_conv(*window)
        return
    out = p.after_conv(*window)
    volume = torch.arange(1.0, p.total + 1, dtype=torch.float64)[None, None]
    weight = torch.rand((1, 1, kernel), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole = F.conv1d(volume, weight, None, stride, padding, dilation)
    assert out.total == whole.shape[2]
    owners = [
        p.owner(min(max(o * stride - padding + dilation * ((kernel - 1) // 2), 0), p.total - 1))
        for o in range(out.total)
    ]
    assert out.sizes == tuple(owners.count(rank) for rank in range(p.ranks))
    padded = F.pad(volume, (30, 30))
    found = []
    for (start, stop), (left, right) in zip(p.spans, halo_widths(p, *window), strict=True):
        extended = padded[..., 30 + start - left : 30 + stop + right]
        found.append(F.conv1d(extended, weight, None, stride, 0, dilation) if extended.numel() else volume[..., :0])
    assert torch.allclose(torch.cat(found, dim=2), whole, rtol=1e-14)


def test_usual_layers_keep_slabs_in_place():
    p = Partition((8, 4, 4, 0))
    assert p.after_conv(3, 1, 1) == p
    assert p.after_conv(5, 1, 4, 2) == p
    assert p.after_conv(3, 2, 1).sizes == (4, 2, 2, 0)
    assert p.after_conv(2, 2).sizes == (4, 2, 2, 0)
    assert halo_widths(p, 3, 1, 1) == ((1, 1), (1, 1), (1, 1), (0, 0))
    assert halo_widths(p, 3, 2, 1) == ((1, 0), (1, 0), (1, 0), (0, 0))
    assert halo_widths(p, 2, 2) == ((0, 0),) * 4
    assert halo_widths(Partition((3, 3)), 1, 2) == ((0, 0), (-1, -1))
    assert reads(Partition((3, 3)), 3, 1, 1) == ((-1, 4), (2, 7))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Partition(()), "a size for every rank"),
        (lambda: Partition((0, 0)), "not all zero"),
        (lambda: Partition((4, -1)), "none negative"),
        (lambda: Partition((4, 4), 1), "dim 2, 3 or 4"),
        (lambda: Partition.even(4, 0), "must be positive"),
        (lambda: Partition((4, 4)).owner(8), "no plane 8"),
        (lambda: Partition((4, 4)).after_conv(0), "must be positive"),
        (lambda: Partition((4, 4)).cut(torch.zeros(1, 1, 7, 2, 2), 0), "must have 8 planes"),
    ],
)
def test_mistakes_are_told(make, says):
    with pytest.raises(InputError, match=says):
        make()
