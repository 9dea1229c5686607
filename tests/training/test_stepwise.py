"""Gradients stage by stage are those of the whole, in the memory of one stage."""

from __future__ import annotations

import gc

import pytest
import torch
from cascade_parts import made_pair, small_cascade

from patchreg.cascade import PatchCascade, Stage
from patchreg.losses import LNCC, Diffusion
from patchreg.memory import LivePeak
from patchreg.networks import VoxelMorph
from patchreg.training import Objective, RegistrationModule
from patchreg.training.stepwise import with_gradients


def deep_cascade(stages: int) -> PatchCascade:
    torch.manual_seed(0)
    sizes = {"encoder": (16, 16), "decoder": (16,), "final": (16,)}
    return PatchCascade([Stage(VoxelMorph(**sizes), patch_shape=24, spacing=3.0) for _ in range(stages)])


def plain_gradients(module, pair):
    module.cascade.zero_grad()
    torch.manual_seed(1)
    total, terms = module.objective(module.cascade([pair]))
    total.backward()
    return total, terms, [p.grad for p in module.cascade.parameters()]


@pytest.mark.parametrize("repeats", [1, 3])
def test_values_and_gradients_are_those_of_the_whole(repeats):
    module = RegistrationModule(small_cascade(), Objective(LNCC(5), Diffusion(), stage_weights=[1.0, 2.0, 3.0]))
    module.cascade.stages[1].repeats = repeats
    pair = made_pair()
    total, terms, gradients = plain_gradients(module, pair)
    module.cascade.zero_grad()
    for scale in (1.0, 1024.0):
        torch.manual_seed(1)
        stepped, found = module.loss([pair], scale)
        assert torch.allclose(stepped, total)
        assert {k: float(v) for k, v in found.items()} == {k: float(v) for k, v in terms.items()}
        stepped.backward()
    for parameter, gradient in zip(module.cascade.parameters(), gradients, strict=True):
        assert torch.allclose(parameter.grad, 2 * gradient, rtol=1e-4, atol=1e-9)  # both scales, accumulated


def test_gradients_that_cross_stages_are_taken_together():
    module = RegistrationModule(deep_cascade(2), Objective(LNCC(5), Diffusion()))
    module.cascade.stop_gradients = False
    pair = made_pair()
    _, _, gradients = plain_gradients(module, pair)
    module.cascade.zero_grad()
    torch.manual_seed(1)
    module.loss([pair])[0].backward()
    for parameter, gradient in zip(module.cascade.parameters(), gradients, strict=True):
        assert torch.allclose(parameter.grad, gradient, rtol=1e-4, atol=1e-9)


def test_further_stages_cost_no_activations():
    def peak(stages: int, stepwise: bool) -> int:
        module = RegistrationModule(deep_cascade(stages), Objective(LNCC(5), Diffusion()))
        pair = made_pair(step=4.0)
        pair.fixed.at(3.0), pair.moving.at(3.0)
        gc.collect()
        with LivePeak() as memory:
            total = module.loss([pair])[0] if stepwise else module.objective(module.cascade([pair]))[0]
            total.backward()
        return memory.peak

    assert peak(4, stepwise=True) < 1.25 * peak(1, stepwise=True)  # gradients, and the fields found so far
    assert peak(4, stepwise=False) > 2.5 * peak(1, stepwise=False)


def test_the_gradients_are_handed_out_once():
    x = torch.ones(3, requires_grad=True)
    unused = torch.ones(3, requires_grad=True)
    value = with_gradients((2 * x).sum(), [x, unused])
    (3 * value).backward(retain_graph=True)
    assert torch.equal(x.grad, torch.full((3,), 6.0))
    assert unused.grad is None
    with pytest.raises(RuntimeError, match="one backward pass"):
        value.backward()
