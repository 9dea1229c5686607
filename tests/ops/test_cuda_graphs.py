"""The operations captured into CUDA graphs, on other streams, and compiled: what only a GPU can tell."""

from __future__ import annotations

import pytest
import torch

from patchreg import ops

pytestmark = pytest.mark.gpu

SHAPE = (13, 10, 19)

CASES = {
    "lncc": lambda x, y, u, mask, affine: ops.lncc(x, y, 9, backend="native"),
    "lncc again": lambda x, y, u, mask, affine: ops.lncc(x, y, 5, mask=mask, memory="recompute", backend="native"),
    "lncc Gaussian": lambda x, y, u, mask, affine: ops.lncc(x, y, 11, kernel="gaussian", backend="native"),
    "lncc map": lambda x, y, u, mask, affine: ops.lncc(x, y, 7, reduction="none", backend="native"),
    "mutual information": lambda x, y, u, mask, affine: ops.mutual_information(x, y, mask=mask, backend="native"),
    "warp": lambda x, y, u, mask, affine: ops.warp(x, u, affine, backend="native") * y,
    "compose": lambda x, y, u, mask, affine: ops.compose(u, x * y * u, backend="native"),
    "integrate": lambda x, y, u, mask, affine: ops.integrate(u, backend="native") * x * y,
}


@pytest.fixture(params=CASES)
def step(request, generator):
    """A function of two images, a field and an affine map, and its gradients to all of them that it depends on."""
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    affine = torch.eye(3, 4, dtype=torch.float64) + 0.01 * torch.rand(3, 4, generator=generator, dtype=torch.float64)
    inputs = [torch.rand(1, n, *SHAPE, generator=generator) for n in (1, 1, 3)]
    inputs = [x.cuda().requires_grad_() for x in (*inputs, affine)]
    mask = (torch.rand(1, 1, *SHAPE, generator=generator) > 0.2).float().cuda()

    def run(operation=CASES[request.param]):
        x, y, u, a = inputs
        value = operation(x, y, u, mask, a)
        grads = torch.autograd.grad(value.square().sum(), inputs, allow_unused=True)
        return [value, *(g for g in grads if g is not None)]

    run.inputs, run.operation = inputs, CASES[request.param]
    return run


def check(found, expected):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.detach().abs().max()))


def test_a_graph_is_replayed_on_other_numbers(step, generator):
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    with torch.no_grad():
        for x in step.inputs[:3]:
            x.copy_(torch.rand(x.shape, generator=generator))
    graph.replay()
    check(found, step())


def test_work_stays_on_the_current_stream(step):
    """Whose inputs are still being written: a launch on another stream would read what was there before."""
    expected = step()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    given = [x.detach().clone() for x in step.inputs]
    with torch.cuda.stream(stream), torch.no_grad():
        for x in step.inputs:
            x.zero_()
        torch.cuda._sleep(20_000_000)
        for x, value in zip(step.inputs, given, strict=True):
            x.copy_(value)
    with torch.cuda.stream(stream):
        found = step()
    stream.synchronize()
    check(found, expected)


def test_nothing_waits_for_the_gpu(step, request):
    if any(name in request.node.name for name in ("lncc again", "mutual information")):
        pytest.skip("the mask is looked at, outside of graphs")
    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_it_compiles(step):
    check(step(torch.compile(step.operation, fullgraph=True, backend="aot_eager")), step())
