from __future__ import annotations

import pytest
import torch
from torch import nn

from patchreg.fake import SMALL, Fakes, is_fake


def test_what_is_large_has_no_numbers_and_what_is_small_has():
    fakes = Fakes()
    with fakes:
        matrix = torch.linalg.inv(2 * torch.eye(4))
        assert float(matrix[0, 0]) == 0.5
        assert not is_fake(matrix)
        made = torch.zeros(100, 100, 100)
        spread = torch.arange(100.0)[:, None, None] * torch.arange(100.0)[:, None] * torch.arange(100.0)
        assert is_fake(made)
        assert is_fake(spread)
        assert spread.shape == (100, 100, 100)
        assert not is_fake(torch.zeros(SMALL))
        assert is_fake(fakes.empty((2,)) * matrix[0, :2])


def test_a_volume_for_which_there_is_no_memory():
    fakes = Fakes()
    with fakes:
        volume = fakes.empty((1, 1, 10_000, 10_000, 10_000))
        assert torch.nn.functional.avg_pool3d(volume, 10).shape == (1, 1, 1000, 1000, 1000)


def test_counts_of_labels_have_the_length_that_is_asked_for():
    fakes = Fakes()
    with fakes:
        counts = torch.bincount(fakes.empty((1000,), torch.int64), minlength=7)
    assert counts.shape == (7,)
    assert counts.dtype == torch.int64


def test_a_converted_module_trains_and_shares_what_it_shared():
    module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    module[2].weight = module[0].weight
    module[0].bias.requires_grad_(False)
    fakes = Fakes()
    fakes.convert(module)
    assert module[2].weight is module[0].weight
    assert all(is_fake(t) for t in (*module.parameters(), *module.buffers()))
    with fakes:
        module(fakes.empty((3, 4))).sum().backward()
    assert module[0].weight.grad.shape == (4, 4)
    assert module[0].bias.grad is None


def test_numbers_in_the_place_of_a_fake_pass_their_gradient_on():
    fakes = Fakes()
    weight = nn.Parameter(fakes.empty((3,)))
    with fakes:
        answer = fakes.known(2 * weight, torch.tensor([1.0, 2.0, 3.0]))
        assert answer.tolist() == [1.0, 2.0, 3.0]
        (answer * fakes.empty((3,))).sum().backward()
    assert is_fake(weight.grad)
    assert weight.grad.shape == (3,)


def test_numbers_of_a_large_tensor_cannot_be_asked_for():
    fakes = Fakes()
    with fakes, pytest.raises(Exception, match="local_scalar_dense"):
        float(fakes.empty((100,)).max())
