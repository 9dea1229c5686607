from __future__ import annotations

import pytest
import torch

from patchreg.ops.compose import native
from patchreg.ops.workspace import workspace


@pytest.fixture
def fields_made(monkeypatch):
    """Counts the fields that the kernels of scaling and squaring make for themselves."""
    made = []
    original = native._Squaring.take

    def take(self):
        made.extend([1] if not self.free else [])
        return original(self)

    monkeypatch.setattr(native._Squaring, "take", take)
    return made


@pytest.mark.parametrize("memory", ["recompute", "stored"])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 7, 8, 9, 16, 17])
def test_scaling_and_squaring_makes_as_many_fields_as_are_told(steps, memory, fields_made):
    velocity = torch.rand((1, 3, 5, 6, 7))
    stored = memory == "stored"
    arguments = (velocity, steps, True, stored)
    _, fields = torch.ops.patchreg.integrate(*arguments)
    assert workspace(torch.ops.patchreg.integrate.default, arguments) == velocity.nbytes * len(fields_made)
    fields_made.clear()
    arguments = (torch.rand_like(velocity), velocity, fields, steps, True)
    torch.ops.patchreg.integrate_backward(*arguments)
    taken = workspace(torch.ops.patchreg.integrate_backward.default, arguments)
    assert taken == velocity.nbytes * (len(fields_made) - 1)  # one of them is the result


def test_nothing_is_told_of_other_operators():
    assert workspace(torch.ops.aten.add.Tensor, (torch.ones(3), torch.ones(3))) == 0
