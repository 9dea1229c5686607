from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from patchreg.fake import Fakes
from patchreg.memory import MemoryLog
from patchreg.ops.dispatch import why_not_native
from patchreg.training.gpu_rules import FLOAT32_ON_CPU, FLOAT32_ON_GPU, as_on_gpu


def has_rule(name: str, key: str) -> bool:
    base, _, overload = name.partition(".")
    operator = getattr(getattr(torch.ops.aten, base), overload or "default")
    return torch._C._dispatch_has_kernel_for_dispatch_key(operator.name(), key)


@pytest.mark.parametrize("name", [*FLOAT32_ON_GPU, *FLOAT32_ON_CPU])
def test_torch_has_these_rules_for_one_device_alone(name):
    assert has_rule(name, "AutocastCUDA") == (name in FLOAT32_ON_GPU)
    assert has_rule(name, "AutocastCPU") == (name in FLOAT32_ON_CPU)


def dtypes(fakes: Fakes) -> list[torch.dtype]:
    x = fakes.empty((1, 4, 8, 8, 8), torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        found = [F.layer_norm(x, (8,)), x.softmax(-1), x**2, F.avg_pool3d(x, 2), F.conv3d(x, x)]
        with torch.autocast("cpu", enabled=False):
            found.append(F.layer_norm(x, (8,)))
    return [y.dtype for y in found]


def test_autocast_is_that_of_a_gpu_within_the_block_alone():
    half, full = torch.bfloat16, torch.float32
    fakes = Fakes()
    with fakes:
        before = dtypes(fakes)
        with as_on_gpu(fakes, MemoryLog()):
            assert dtypes(fakes) == [full, full, full, half, half, half]
        assert dtypes(fakes) == before == [half, half, half, full, half, half]


def test_kernels_count_as_present_within_the_block():
    with as_on_gpu(Fakes(), MemoryLog()):
        assert why_not_native("cuda", 0, (torch.float32,)) is None
        assert why_not_native("cuda", 0, (torch.float64,)) is not None
    if not torch.cuda.is_available():
        assert why_not_native("cuda", 0, (torch.float32,)) is not None
