from __future__ import annotations

import pytest
import torch
from cascade_parts import Constant, made_pair, small_cascade
from conftest import oriented_grid

from patchreg.cascade import PatchCascade, PreparedPair, Stage
from patchreg.spatial import Affine, Composite


def test_every_stage_gives_an_output_of_constant_size(generator):
    outputs = small_cascade()([made_pair(), made_pair("oblique", "LPS")], generator)
    assert [o.index for o in outputs] == [0, 1, 2]
    assert [o.fixed.shape[0] for o in outputs] == [2, 2, 4]
    for output in outputs:
        assert output.fixed.shape == output.moved.shape
        assert output.fixed.shape[2:] == (16, 16, 16)
        assert output.inside.dtype == torch.bool
    assert outputs[0].update_mm is None
    assert outputs[1].update_mm.shape == (2, 3, 16, 16, 16)


def test_stages_add_up_in_the_right_order():
    """Constant answers at two spacings: the chain moves every point by their sum in mm, in any orientation."""
    for orientation in ("RAS", "oblique"):
        stages = [
            Stage(Constant((1.0, 0, 0)), patch_shape=8, spacing=4.0),
            Stage(Constant((0, -2.0, 0)), patch_shape=8, spacing=1.5),
        ]
        outputs = PatchCascade(stages)([made_pair(orientation)])
        x = torch.tensor([[1.0, 2, 3]], dtype=torch.float64)
        assert torch.allclose(outputs[-1].transforms[0](x), x + torch.tensor([4.0, -3.0, 0]), atol=1e-5)


def test_the_next_stage_sees_the_moving_image_where_the_last_one_put_it():
    """The moving patch of stage two is what stage one moved, sampled anew at the finer spacing."""
    pair = made_pair()
    first, second = Constant((2.0, 0, 0)), Constant((0, 0, 0))
    outputs = PatchCascade([Stage(first, patch_shape=16, spacing=4.0), Stage(second, patch_shape=16, spacing=2.0)])(
        [pair]
    )
    grid = outputs[1].grids[0]
    moving = pair.moving.at(2.0)
    expected = Affine.translation((8.0, 0, 0)).on(grid).sample(moving)
    assert torch.allclose(second.seen[0][1], expected, atol=1e-5)
    assert torch.allclose(outputs[1].moved, expected, atol=1e-5)


def test_initial_transform_and_warps_are_part_of_the_chain():
    pair = made_pair()
    shifted = PreparedPair(pair.fixed, pair.moving, Affine.translation((5.0, 0, 0)), Affine.translation((0, 3.0, 0)))
    network = Constant((0, 0, 0))
    torch.manual_seed(0)
    output = PatchCascade([Stage(network, patch_shape=16, spacing=2.0)])([shifted])[0]
    grid = output.grids[0]
    assert torch.allclose(network.seen[0][0], Affine.translation((0, 3.0, 0)).on(grid).sample(pair.fixed.at(2.0)))
    assert torch.allclose(network.seen[0][1], Affine.translation((5.0, 0, 0)).on(grid).sample(pair.moving.at(2.0)))


@pytest.mark.parametrize("stop", [True, False])
def test_gradients_stop_at_a_stage_or_pass_through_the_chain(stop, generator):
    cascade = small_cascade()
    cascade.stop_gradients = stop
    outputs = cascade([made_pair()], generator)
    outputs[-1].moved.square().mean().backward()
    reached = [any(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in s.parameters()) for s in cascade.stages]
    assert reached == ([False, False, True] if stop else [True, True, True])


def test_gradient_through_the_chain_is_that_of_finite_differences():
    """Through two deformable stages and the sampling of the image, with respect to the first stage's answer."""
    pair = made_pair()

    def value(x: float) -> torch.Tensor:
        first = Constant((x, 0.3, 0.2)).double()
        torch.manual_seed(3)
        cascade = PatchCascade(
            [Stage(first, patch_shape=16, spacing=5.0), Stage(Constant((0.4, 0.3, 0.1)), patch_shape=16, spacing=2.0)],
            stop_gradients=False,
        )
        loss = cascade([pair])[1].moved.double().square().mean()
        loss.backward()
        return loss.detach(), first.answer.grad[0]

    eps = 1e-2
    _, slope = value(0.25)
    numeric = (value(0.25 + eps)[0] - value(0.25 - eps)[0]) / (2 * eps)
    assert abs(float(slope - numeric)) < 0.03 * abs(float(numeric))


def test_repeats_run_the_same_network_again():
    network = Constant((1.0, 0, 0))
    outputs = PatchCascade([Stage(network, patch_shape=8, spacing=2.0, repeats=3)])([made_pair()])
    assert len(outputs) == len(network.seen) == 3
    x = torch.zeros(1, 3, dtype=torch.float64)
    assert torch.allclose(outputs[-1].transforms[0](x), torch.tensor([[6.0, 0, 0]], dtype=torch.float64), atol=1e-5)


def test_frozen_stages_place_later_ones_and_learn_nothing(generator):
    cascade = small_cascade()
    frozen = PatchCascade(
        [Stage(cascade.stages[0].network, "affine", 16, frozen=True), cascade.stages[1]], stop_gradients=False
    )
    outputs = frozen([made_pair()], generator)
    assert [o.index for o in outputs] == [1]
    outputs[0].moved.mean().backward()
    assert all(p.grad is None for p in frozen.stages[0].parameters())
    assert len(Composite([outputs[0].transforms[0]]).transforms) == 3


def test_storage_of_the_images_does_not_matter():
    """The same pair stored otherwise gives the same patches and the same answers."""
    found = []
    for orientation in ("RAS", "LAS", "LPS", "LIA"):
        torch.manual_seed(5)
        found.append(small_cascade()([made_pair(orientation, orientation)])[-1])
    for other in found[1:]:
        assert (other.fixed - found[0].fixed).abs().max() < 0.02
        x = oriented_grid("RAS", (20.0, 20.0, 20.0)).points().reshape(-1, 3)
        assert (other.transforms[0](x) - found[0].transforms[0](x)).norm(dim=1).max() < 0.05
