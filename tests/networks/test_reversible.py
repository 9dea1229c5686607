from __future__ import annotations

import copy
import gc

import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from timm.layers import DropPath
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from patchreg.errors import InputError, NoGradient
from patchreg.memory import LivePeak
from patchreg.networks.checkpointing import run_part
from patchreg.networks.reversible import ReversibleBlock, ReversibleConvBlock, ReversibleSequence

POLICIES = ("stored", "checkpoint", "reversible")


def conv_blocks(depth: int, half: int = 3, norm: bool = True) -> list[ReversibleConvBlock]:
    """Blocks that are no longer the identity."""
    torch.manual_seed(depth)
    blocks = [ReversibleConvBlock(half, norm=norm) for _ in range(depth)]
    for block in blocks:
        for function in (block.f, block.g):
            nn.init.kaiming_normal_(function.conv.weight)
            nn.init.normal_(function.conv.bias, std=0.1)
    return blocks


def run(sequence: ReversibleSequence, x: torch.Tensor, seed: int = 3) -> list[torch.Tensor]:
    """Output, gradient of the input, gradients of the parameters."""
    torch.manual_seed(seed)
    x = x.clone().requires_grad_()
    sequence.zero_grad()
    y = sequence(x)
    weight = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y).sin()
    (y * weight).sum().backward()
    assert x.grad is not None
    gradients = [p.grad for p in sequence.parameters()]
    return [y.detach(), x.grad, *(torch.zeros(()) if g is None else g.clone() for g in gradients)]


def error(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """The largest relative L2 error. Biases before a normalisation have no gradient but noise, and do not count."""
    worst = 0.0
    for a, b in zip(found, expected, strict=True):
        if b.norm() > 1e-3:
            worst = max(worst, float((a - b).norm() / b.norm()))
    return worst


@pytest.fixture
def x(generator):
    return torch.randn((2, 6, 7, 6, 5), generator=generator)


@pytest.mark.parametrize("depth", [1, 4])
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("memory", ["checkpoint", "reversible"])
def test_gives_the_gradients_of_the_stored_version(memory, depth, norm, x):
    stored = ReversibleSequence(conv_blocks(depth, norm=norm), "stored").double()
    other = ReversibleSequence(copy.deepcopy(list(stored.blocks)), memory)
    assert torch.equal(other(x.double()), stored(x.double()))
    assert error(run(other, x.double()), run(stored, x.double())) < 1e-10


def test_float32_at_depth_16(x):
    """Against the stored version in float32; measured 2e-6, where the stored version itself is 1e-6 from float64."""
    stored = ReversibleSequence(conv_blocks(16), "stored")
    other = ReversibleSequence(copy.deepcopy(list(stored.blocks)))
    assert error(run(other, x), run(stored, x)) < 1e-5


def test_eval_mode(x):
    stored = ReversibleSequence(conv_blocks(3), "stored").double().eval()
    other = ReversibleSequence(copy.deepcopy(list(stored.blocks))).eval()
    assert error(run(other, x.double()), run(stored, x.double())) < 1e-10


def test_the_input_is_found_again(x):
    for block in conv_blocks(4):
        halves = x.chunk(2, 1)
        for found, given in zip(block.inverse(*block(*halves)), halves, strict=True):
            assert (found - given).abs().max() < 2e-6
        for found, given in zip(block.double().inverse(*block(*x.double().chunk(2, 1))), halves, strict=True):
            assert (found - given).abs().max() < 1e-14


def test_the_papers_equations():
    """y1 = x1 + f(x2), y2 = x2 + g(y1), with f and g that are numbers."""

    class Times(nn.Module):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.factor = nn.Parameter(torch.tensor(factor))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.factor * x

    sequence = ReversibleSequence([ReversibleBlock(Times(2.0), Times(3.0))], dim=-1)
    x = torch.tensor([[5.0, 7.0]], requires_grad=True)
    y = sequence(x)
    assert y.tolist() == [[5 + 2 * 7, 7 + 3 * 19]]
    y.sum().backward()
    # y1 + y2 = x1 + f x2 + x2 + g (x1 + f x2)
    assert x.grad.tolist() == [[1 + 3, 2 + 1 + 3 * 2]]
    assert [p.grad.item() for p in sequence.parameters()] == [7 + 3 * 7, 19]


def test_a_new_block_is_the_identity(x):
    sequence = ReversibleSequence([ReversibleConvBlock(3) for _ in range(4)])
    assert torch.equal(sequence(x), x)


@pytest.mark.parametrize("memory", POLICIES)
def test_autocast(memory, x):
    """The streams stay float32: bfloat16 within f and g costs the gradients what it costs those of the stored one."""
    stored = ReversibleSequence(conv_blocks(8), "stored")
    exact = run(copy.deepcopy(stored).double(), x.double())
    other = ReversibleSequence(copy.deepcopy(list(stored.blocks)), memory)
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = run(stored, x), run(other, x)
        torch.manual_seed(3)
        y = other(x.bfloat16().requires_grad_())
    assert y.dtype == torch.float32
    y.sum().backward()  # outside autocast
    assert error(found, expected) < 2e-3
    assert error(found, exact) < 1.1 * error(expected, exact)


@pytest.mark.parametrize("memory", POLICIES)
def test_half_precision_weights(memory, x):
    sequence = ReversibleSequence(conv_blocks(4), memory).bfloat16()
    stored = ReversibleSequence(copy.deepcopy(list(sequence.blocks)), "stored")
    found = run(sequence, x.bfloat16())
    assert {t.dtype for t in found} == {torch.bfloat16}
    assert error(found, run(stored, x.bfloat16())) < 1e-2


@pytest.mark.parametrize("layer", [nn.Dropout(0.4), DropPath(0.5), nn.Dropout3d(0.3)], ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("memory", ["checkpoint", "reversible"])
def test_random_layers_draw_the_same_twice_and_disturb_nobody(layer, memory, x):
    blocks = [
        ReversibleBlock(nn.Sequential(b.f, copy.deepcopy(layer)), nn.Sequential(copy.deepcopy(layer), b.g))
        for b in conv_blocks(3)
    ]
    stored = ReversibleSequence(blocks, "stored").double()
    other = ReversibleSequence(copy.deepcopy(blocks), memory)
    after = []
    for sequence in (stored, other):
        torch.manual_seed(3)
        y = sequence(x.double().requires_grad_())
        torch.rand(5)  # whatever else the program draws
        state = torch.get_rng_state()
        y.sum().backward()
        assert torch.equal(torch.get_rng_state(), state)
        after.append(state)
    assert torch.equal(*after)
    assert error(run(other, x.double()), run(stored, x.double())) < 1e-10
    assert not torch.equal(stored(x.double()), stored(x.double()))


def test_two_backward_passes_add_up(x):
    sequence = ReversibleSequence(conv_blocks(2)).double()
    x = x.double().requires_grad_()
    sequence(x).square().sum().backward()
    once = [p.grad.clone() for p in (x, *sequence.parameters())]
    y = sequence(x)
    y.square().sum().backward(retain_graph=True)
    y.square().sum().backward()
    for p, g in zip((x, *sequence.parameters()), once, strict=True):
        assert torch.allclose(p.grad, 3 * g)


def test_frozen_parameters_and_inputs_without_a_gradient(x):
    results = []
    for memory in POLICIES:
        sequence = ReversibleSequence(conv_blocks(3), memory).double()
        sequence.blocks[0].requires_grad_(False)
        sequence.blocks[1].f.requires_grad_(False)
        sequence.blocks[2].g.conv.bias.requires_grad_(False)
        parameters = [p for p in sequence.parameters() if p.requires_grad]
        sequence(x.double()).square().sum().backward()
        assert all((p.grad is not None) == p.requires_grad for p in sequence.parameters())
        results.append([p.grad for p in parameters])
        assert not ReversibleSequence(list(sequence.blocks[:1]), memory)(x.double()).requires_grad
    for found in results[1:]:
        assert error(found, results[0]) < 1e-10


def test_only_the_input_needs_a_gradient(x):
    results = []
    for memory in POLICIES:
        sequence = ReversibleSequence(conv_blocks(3), memory).double().requires_grad_(False)
        results.append(run(sequence, x.double())[:2])
    assert error(results[2], results[0]) < 1e-10


def test_autograd_grad_of_one_parameter(x):
    results = []
    for memory in ("stored", "reversible"):
        sequence = ReversibleSequence(conv_blocks(3), memory).double()
        wanted = sequence.blocks[1].g.conv.weight
        results.append(torch.autograd.grad(sequence(x.double()).square().sum(), wanted))
        assert all(p.grad is None for p in sequence.parameters())
    assert error(results[1], results[0]) < 1e-10


def test_shared_weights_and_weights_of_the_streams_size(x):
    """One block used twice; and a weight that is added to the stream, whose gradient is the stream's own."""

    class Shift(nn.Module):
        def __init__(self, *shape: int) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.zeros(shape))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.shift

    shape = (2, 3, 7, 6, 5)
    results = []
    for memory in ("stored", "reversible"):
        block, *others = conv_blocks(2)
        shifted = [ReversibleBlock(Shift(*shape), Shift(*shape)) for _ in range(2)]
        sequence = ReversibleSequence([shifted[0], block, *others, block, shifted[1]], memory).double()
        results.append(run(sequence, x.double()))
    assert error(results[1], results[0]) < 1e-10


def test_no_gradient_wanted(x):
    for memory in POLICIES:
        sequence = ReversibleSequence(conv_blocks(3), memory)
        expected = sequence(x).detach()
        with torch.no_grad():
            assert torch.equal(sequence(x), expected)
        with torch.inference_mode():
            assert torch.equal(sequence(x), expected)


def test_strange_layouts(x):
    """A transposed input, a channels-last one, and a gradient that is an expanded number."""
    for layout in (x.transpose(2, 4), x.to(memory_format=torch.channels_last_3d), x[..., ::2]):
        results = []
        for memory in ("stored", "reversible"):
            sequence = ReversibleSequence(conv_blocks(2), memory).double()
            given = layout.double().requires_grad_()
            sequence(given).sum().backward()
            results.append([given.grad, *(p.grad for p in sequence.parameters())])
        assert error(results[1], results[0]) < 1e-10


def test_within_a_checkpointed_part(x):
    results = []
    for memory in ("stored", "reversible"):
        sequence = ReversibleSequence(conv_blocks(2), memory).double()
        given = x.double().requires_grad_()
        run_part("checkpoint", lambda t, s=sequence: s(t).tanh(), given).square().sum().backward()
        results.append([given.grad, *(p.grad for p in sequence.parameters())])
    assert error(results[1], results[0]) < 1e-10


def test_checkpointed_parts_within(x):
    class Checkpointed(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return run_part("checkpoint", self.inner, x)

    stored = ReversibleSequence(conv_blocks(2), "stored").double()
    blocks = [ReversibleBlock(Checkpointed(b.f), Checkpointed(b.g)) for b in copy.deepcopy(list(stored.blocks))]
    assert error(run(ReversibleSequence(blocks), x.double()), run(stored, x.double())) < 1e-10


@pytest.mark.parametrize("whole", [False, True])
def test_compiled(whole, x):
    torch._dynamo.reset()
    stored = ReversibleSequence(conv_blocks(2), "stored").double()
    sequence = ReversibleSequence(copy.deepcopy(list(stored.blocks)))
    if whole:
        compiled = torch.compile(sequence, backend="aot_eager")
    else:
        for block in sequence.blocks:
            block.f, block.g = (torch.compile(f, backend="aot_eager") for f in (block.f, block.g))
        compiled = sequence
    assert error(run(compiled, x.double()), run(stored, x.double())) < 1e-10


def test_fake_tensors():
    with FakeTensorMode():
        sequence = ReversibleSequence([ReversibleConvBlock(4) for _ in range(2)])
        x = torch.empty(1, 8, 16, 16, 16, requires_grad=True)
        sequence(x).sum().backward()
        assert x.grad.shape == x.shape
        with torch.autocast("cpu", torch.bfloat16):
            assert sequence(x).dtype == torch.float32


def live_bytes(depth: int, memory: str) -> tuple[int, int]:
    """Peak of a training step beyond parameters and their gradients; bytes of the input."""
    with FakeTensorMode():
        sequence = ReversibleSequence([ReversibleConvBlock(8) for _ in range(depth)], memory)
        x = torch.empty(1, 16, 32, 32, 32, requires_grad=True)
        gc.collect()
        with LivePeak() as counted:
            sequence(x).sum().backward()
        gradients = sum(p.numel() * p.element_size() for p in sequence.parameters())
        return counted.peak - gradients, x.numel() * x.element_size()


def test_memory_does_not_grow_with_depth():
    peaks = {depth: live_bytes(depth, "reversible")[0] for depth in (1, 2, 4, 8, 16)}
    for depth in (1, 2, 4, 8):
        assert peaks[2 * depth] < 1.02 * peaks[depth]
    volume = live_bytes(1, "reversible")[1]
    assert peaks[16] < 5 * volume
    assert live_bytes(16, "stored")[0] > 30 * volume
    assert 15 * volume < live_bytes(16, "checkpoint")[0] < 25 * volume


def test_offloading_does_not_move_the_weights(x):
    """Hooks on saved tensors see the output, and nothing else."""
    sequence = ReversibleSequence(conv_blocks(3))
    seen = []

    def pack(t):
        seen.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = sequence(x.requires_grad_())
    assert len(seen) == 1
    assert torch.equal(seen[0], y)
    y.sum().backward()


def test_second_derivatives_are_refused(x):
    x = x.requires_grad_()
    y = ReversibleSequence(conv_blocks(1))(x)
    with pytest.raises(NoGradient, match="second derivative"):
        torch.autograd.grad(y.sum(), x, create_graph=True)
    y = ReversibleSequence(conv_blocks(1), "stored")(x)
    torch.autograd.grad(torch.autograd.grad(y.square().sum(), x, create_graph=True)[0].sum(), x)


def test_a_step_before_the_backward_pass_is_refused(x):
    sequence = ReversibleSequence(conv_blocks(1))
    y = sequence(x)
    with torch.no_grad():
        sequence.blocks[0].f.conv.weight.mul_(2)
    with pytest.raises(NoGradient, match="changed between"):
        y.sum().backward()


def test_bad_blocks_are_refused(x):
    with pytest.raises(InputError, match="splits dim 1 into halves, and its size 5 is odd"):
        ReversibleSequence(conv_blocks(1))(x[:, :5])
    with pytest.raises(InputError, match=r"g\.1 is a BatchNorm3d"):
        ReversibleBlock(nn.Identity(), nn.Sequential(nn.ReLU(), nn.BatchNorm3d(3)))
    with pytest.raises(InputError, match="f is a InstanceNorm3d"):
        ReversibleBlock(nn.InstanceNorm3d(3, track_running_stats=True), nn.Identity())
    with pytest.raises(InputError, match="at least one block"):
        ReversibleSequence([])
    with pytest.raises(InputError, match="must be one of stored, checkpoint, reversible, got 'none'"):
        ReversibleSequence(conv_blocks(1), "none")
    with pytest.raises(InputError, match=r"keep the shape .* Conv3d gives \(2, 4, 7, 6, 5\)"):
        ReversibleSequence([ReversibleBlock(nn.Conv3d(3, 4, 1), nn.Identity())])(x)
    with pytest.raises(InputError, match="LeakyReLU.*changes its input in place"):
        ReversibleSequence([ReversibleBlock(nn.LeakyReLU(inplace=True), nn.Identity())])(x.requires_grad_())
    with pytest.raises(InputError, match="odd kernel_size"):
        ReversibleConvBlock(3, 2)


class Net(nn.Module):
    def __init__(self, memory: str) -> None:
        super().__init__()
        self.first = nn.Conv3d(1, 6, 1)
        self.sequence = ReversibleSequence(conv_blocks(2), memory)
        self.last = nn.Conv3d(6, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.sequence(self.first(x)))


def pairs() -> torch.Tensor:
    return torch.randn((4, 1, 6, 6, 6), generator=torch.Generator().manual_seed(5)).double()


def net(memory: str) -> nn.Module:
    torch.manual_seed(7)
    return Net(memory).double()


def rank_gradients(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    network = nn.parallel.DistributedDataParallel(net("reversible"))
    for x in pairs()[rank::world].split(1):
        network(x).square().mean().backward()  # two backward passes add up
    torch.save([p.grad for p in network.parameters()], f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_have_the_gradients_of_one(tmp_path):
    mp.spawn(rank_gradients, (2, str(tmp_path)), nprocs=2)
    one = net("stored")
    for x in pairs().split(1):
        one(x).square().mean().div(2).backward()
    expected = [p.grad for p in one.parameters()]
    for rank in range(2):
        assert error(torch.load(tmp_path / f"{rank}.pt"), expected) < 1e-10


def test_learns(x):
    """A step of an optimiser goes downhill."""
    sequence = ReversibleSequence([ReversibleConvBlock(3) for _ in range(2)])
    optimizer = torch.optim.Adam(sequence.parameters(), 1e-2)
    losses = []
    for _ in range(20):
        loss = F.mse_loss(sequence(x), x.roll(1, 2))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
