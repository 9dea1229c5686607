"""Networks that are converted, and what they are refused for."""

from __future__ import annotations

import copy
import logging
import pickle

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks.comparison import error, limit, random, slab, slab_error
from torch import nn
from torch.utils.checkpoint import checkpoint

from patchreg.distributed import Partition, counting
from patchreg.distributed.convert import convert_plain, convert_sharded
from patchreg.distributed.layers.base import ShardedLayer
from patchreg.distributed.layout import Layout
from patchreg.distributed.scope import Scope
from patchreg.errors import InputError, UnsupportedSharding
from patchreg.networks.checkpointing import run_part
from patchreg.networks.surroundings import surrounded


class Squeeze(nn.Module):
    """Weighs channels by their means, of a level that all ranks hold whole."""

    def __init__(self, width):
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x):
        return x * self.linear(x.mean((2, 3, 4))).sigmoid()[:, :, None, None, None]


class Level(nn.Module):
    """Convolutions of many kinds, with tokens between them."""

    def __init__(self, width):
        super().__init__()
        self.norm = nn.InstanceNorm3d(width, affine=True)
        self.conv = nn.Conv3d(width, width, 3, padding=1, padding_mode="replicate", bias=False)
        self.token_norm, self.linear = nn.LayerNorm(width), nn.Linear(width, width)
        self.drop, self.drop_channels = nn.Dropout(0.0), nn.Dropout3d(0.25)

    def forward(self, x):
        x = F.leaky_relu(self.norm(self.conv(x)), 0.2)
        tokens = x.flatten(2).transpose(1, 2)
        tokens = tokens + self.drop(F.gelu(self.linear(self.token_norm(tokens))))
        return self.drop_channels(tokens.transpose(1, 2).reshape(x.shape))


class Network(nn.Module):
    """A network of somebody else's, from two images to a displacement."""

    def __init__(self, memory="stored"):
        super().__init__()
        self.memory = memory
        self.first = nn.Sequential(nn.Conv3d(2, 4, 3, padding=1, bias=False), nn.BatchNorm3d(4), nn.ReLU(inplace=True))
        self.down = nn.ModuleList([nn.Conv3d(4, 6, 3, 2, 1), nn.MaxPool3d(2), nn.AvgPool3d(2)])
        self.levels = nn.ModuleList([Level(4), Level(6), Level(6)])
        self.bottom = Squeeze(6)
        self.up = nn.ModuleList(
            [
                nn.Upsample(scale_factor=2, mode="trilinear"),
                nn.ConvTranspose3d(6, 6, 2, 2),
                nn.Upsample(scale_factor=2, mode="nearest"),
            ]
        )
        self.last = nn.Sequential(nn.GroupNorm(2, 10), nn.Conv3d(10, 3, 1))

    def forward(self, fixed, moving):
        x = self.first(torch.cat([fixed, moving], 1))
        skips = []
        for down, level in zip(self.down, self.levels, strict=True):
            x = run_part(self.memory, level, x)
            skips.append(x)
            x = run_part(self.memory, down, x)
        x = self.bottom(x)
        for up in self.up:
            x = up(x)
            x = torch.cat([x, skips.pop()], 1) if len(skips) == 1 else x + skips.pop()
        return self.last(x)


def scoped(group, sizes, dim=2):
    return Scope(Layout(Partition(sizes, dim)), group)


def cut(whole, scope):
    return slab(whole, scope.layout.base, scope.group)


def images(shape, total, dim, dtype):
    shape = list(shape)
    shape[dim] = total
    return [random((2, 1, *shape[2:]), seed, dtype, seed == 1) for seed in (1, 2)]


def network(group, sizes, dim, memory, dtype):
    """Errors of the displacement, of the gradients and of running statistics."""
    torch.manual_seed(4)
    plain = Network().double()
    mine = convert_sharded(copy.deepcopy(plain).to(dtype))
    mine.memory = memory
    scope = scoped(group, sizes, dim)
    whole = images((2, 1, 16, 24, 16), sum(sizes), dim, torch.float64)
    torch.manual_seed(7)
    expected = plain(*whole)
    state = torch.get_rng_state()
    direction = random(tuple(expected.shape), 5, grad=False)
    (expected * direction).sum().backward()

    own = [cut(image.to(dtype), scope) for image in whole]
    torch.manual_seed(7)
    with surrounded(scope):
        out = mine(*own)
    assert torch.equal(torch.get_rng_state(), state)  # numbers that come later are those of one process
    (out * cut(direction.to(dtype), scope)).sum().backward()
    found = [slab_error(out, expected, scope.layout.base, group)]
    found.append(slab_error(own[0].grad, whole[0].grad, scope.layout.base, group))
    for p, q in zip(mine.parameters(), plain.parameters(), strict=True):
        dist.all_reduce(p.grad, group=group)
        found.append(float((p.grad - q.grad).norm() / max(q.grad.norm(), 100)))  # of a bias before a norm it is zero
    return found + [error(p.double(), q.double()) for p, q in zip(mine.buffers(), plain.buffers(), strict=True)]


@pytest.mark.parametrize("memory", ["stored", "checkpoint"])
@pytest.mark.parametrize(("ranks", "sizes", "dim"), [(2, (10, 14), 2), (3, (8, 8, 8), 4), (4, (4, 7, 3, 10), 3)])
def test_a_network_equals_one_process(pool, ranks, sizes, dim, memory):
    assert max(map(max, pool.run(ranks, network, sizes, dim, memory, torch.float64))) < limit(torch.float64)


def test_a_network_in_single_precision(pool):
    assert max(map(max, pool.run(2, network, (12, 12), 2, "stored", torch.float32))) < limit(torch.float32)


def test_without_a_scope_nothing_changes():
    torch.manual_seed(1)
    plain = Network().eval()
    network = convert_sharded(copy.deepcopy(plain))
    assert convert_sharded(network) is network
    assert sum(isinstance(module, ShardedLayer) for module in network.modules()) == 19
    assert len(network._forward_pre_hooks) == 1
    assert {k: v.tolist() for k, v in network.state_dict().items()} == {
        k: v.tolist() for k, v in plain.state_dict().items()
    }
    pair = [random((1, 1, 16, 16, 16), seed, torch.float32, False) for seed in (1, 2)]
    expected = plain(*pair)
    for other in (network, copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert torch.equal(other(*pair), expected)
        assert len(other._forward_pre_hooks) == 1
    convert_plain(network)
    assert not network._forward_pre_hooks
    assert [type(m) for m in network.modules()] == [type(m) for m in plain.modules()]
    assert torch.equal(network(*pair), expected)


def test_subclasses_are_left_alone():
    class Own(nn.Conv3d):
        pass

    assert type(convert_sharded(Own(1, 1, 1))) is Own


def untouched(group):
    """Looking ahead changes nothing of a network, and sends nothing."""
    torch.manual_seed(1)
    network = convert_sharded(nn.Sequential(nn.Conv3d(1, 2, 3, padding=1), nn.BatchNorm3d(2), nn.Dropout(0.5)))
    before = copy.deepcopy(network.state_dict())
    state = torch.get_rng_state()
    scope = scoped(group, (6, 6))
    hook = next(iter(network._forward_pre_hooks.values()))
    with surrounded(scope), counting() as sent:
        hook(network, (torch.ones(1, 1, 6, 5, 5),), {})
    same = all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    seen = {scope.names[layer]: totals for layer, totals in scope.totals.items()}
    hooks = sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in network.modules())
    return same, torch.equal(state, torch.get_rng_state()), sent.messages + sent.collective, seen, hooks


def test_looking_ahead_touches_nothing(pool):
    for found in pool.run(2, untouched):
        assert found == (True, True, 0, {"0": (12,), "1": (12,), "2": (12,)}, 1)


class Last(nn.Module):
    """A part that does something."""

    def __init__(self, do):
        super().__init__()
        self.do = do

    def forward(self, x):
        return self.do(x)


REFUSED = {
    "a mean": (lambda x: x.mean((2, 3, 4)), "mean"),
    "a mean of everything": (lambda x: x - x.mean(), "mean"),
    "a sum in pieces": (lambda x: x.flatten(2).sum(-1), "sum"),
    "a norm": (lambda x: F.instance_norm(x), "batch_norm"),
    "statistics of tokens": (lambda x: F.layer_norm(x, x.shape[2:]), "layer_norm"),
    "interpolation": (lambda x: F.interpolate(x, scale_factor=2), "upsample"),
    "a pooling": (lambda x: F.max_pool3d(x, 2), "max_pool3d"),
    "a pooling to one": (lambda x: F.adaptive_avg_pool3d(x, 1), "mean"),
    "a convolution": (lambda x: F.conv3d(x, torch.ones(1, 2, 3, 1, 1), padding=(1, 0, 0)), "convolution"),
    "a stride": (lambda x: F.conv3d(x, torch.ones(1, 2, 1, 1, 1), stride=2), "convolution"),
    "roll": (lambda x: x.roll(1, 2), "roll"),
    "flip": (lambda x: x.flip(2), "flip"),
    "padding": (lambda x: F.pad(x, (0, 0, 0, 0, 1, 1)), "constant_pad_nd"),
    "other padding": (lambda x: F.pad(x, (1, 1, 1, 1, 1, 1), mode="reflect"), "pad"),
    "a part": (lambda x: x[:, :, 1:], "slice"),
    "every second": (lambda x: x[:, :, ::2], "slice"),
    "one plane": (lambda x: x[:, :, 3], "select"),
    "cumulative": (lambda x: x.cumsum(2), "cumsum"),
    "softmax": (lambda x: x.softmax(2), "softmax"),
    "softmax of tokens": (lambda x: x.flatten(2).softmax(-1), "softmax"),
    "attention": (lambda x: F.scaled_dot_product_attention(*[x.flatten(2).mT[:, None]] * 3), "bmm"),
    "products": (lambda x: x.flatten(2) @ x.flatten(2).mT, "bmm"),
    "covariance": (lambda x: torch.einsum("bcijk,bdijk->bcd", x, x), "bmm"),
    "blocks": (lambda x: x.unflatten(2, (-1, 2)), "view"),
    "joined with itself": (lambda x: torch.cat([x, x], 2), "cat"),
    "numbers of its own": (lambda x: x + torch.arange(x.shape[2])[:, None, None], "add"),
    "a position": (lambda x: x + torch.ones(x.shape[2]).cumsum(0)[:, None, None], "add"),
    "a count": (
        lambda x: x / F.conv3d(torch.ones(1, 1, *x.shape[2:]), torch.ones(1, 1, 3, 1, 1), padding=(1, 0, 0)),
        "div",
    ),
    "a frame": (lambda x: x * F.pad(x.new_ones(x.shape[2] - 2), (1, 1))[:, None, None], "mul"),
    "a grid": (lambda x: F.grid_sample(x, torch.zeros(1, 4, 4, 4, 3), align_corners=False), "grid_sampler"),
    "noise": (lambda x: x + torch.randn_like(x), "randn_like"),
    "noise of a shape": (lambda x: x + torch.randn(x.shape), "add"),
    "dropout": (lambda x: F.dropout(x, 0.5, True), "bernoulli"),
    "a decision": (lambda x: x if float(x.flatten()[0]) > 0 else -x, "select"),
    "a buffer": (lambda x: x.new_zeros(x.shape).add_(x).mean(), "add"),
    "sorting": (lambda x: x.sort(2)[0], "sort"),
    "gather": (lambda x: x.gather(2, torch.zeros(1, 2, 3, 4, 4, dtype=torch.int64)), "gather"),
}
LOCAL = {
    "channels": lambda x: x.mean(1, keepdim=True) * x.softmax(1),
    "across": lambda x: x - x.mean((3, 4), keepdim=True),
    "constants": lambda x: torch.cat([x, torch.zeros_like(x), x.new_ones(x.shape), torch.zeros(x.shape)], 1),
    "views": lambda x: x.permute(0, 2, 3, 4, 1).flatten(0, 2)[:, None].squeeze(1).unflatten(0, (x.shape[0], -1)),
    "planes as a batch": lambda x: F.conv2d(x.transpose(1, 2).flatten(0, 1), torch.ones(2, 2, 3, 3), padding=1),
    "attention in planes": lambda x: F.scaled_dot_product_attention(*[x.permute(0, 2, 3, 4, 1).flatten(2, 3)] * 3),
    "attention along lines": lambda x: F.scaled_dot_product_attention(*[x.permute(0, 2, 3, 4, 1)] * 3),
    "padding": lambda x: F.pad(x, (1, 2, 3, 4, 0, 0, 1, 0)),
    "a kernel in planes": lambda x: F.conv3d(x, torch.ones(2, 2, 1, 3, 3), padding=(0, 1, 1)),
    "einsum": lambda x: torch.einsum("bcijk,dc->bdijk", x, torch.ones(3, 2)),
    "pieces": lambda x: torch.stack(x.chunk(2, 1), 2).flatten(1, 2) + torch.stack(x.unbind(1), 1),
    "in place": lambda x: F.relu_(x.clone()).mul_(2).clamp_(0, 1).add_(x[:, :1]),
    "noise of channels": lambda x: x * torch.rand(1, 2, 1, 1, 1) + F.dropout3d(x, 0.5, True),
    "normalised": lambda x: F.layer_norm(F.normalize(x, dim=1).permute(0, 2, 3, 4, 1), (2,)),
    "choice": lambda x: torch.where(x > 0, x, 0).to(torch.float64),
}


def refusals(group, sizes):
    """What is said of every network, and bytes that were sent until then."""
    found = {}
    for name, (do, _) in REFUSED.items():
        network = convert_sharded(nn.Sequential(nn.Conv3d(1, 2, 3, padding=1), nn.Sequential(Last(do))))
        found[name] = said(network, group, sizes)
    return found


def said(network, group, sizes):
    scope = scoped(group, sizes)
    x = torch.ones(1, 1, sizes[dist.get_rank(group)], 4, 4)
    with surrounded(scope), counting() as sent:
        try:
            network(x)
            return "nothing", sent.messages
        except (UnsupportedSharding, InputError) as error:
            return str(error), sent.messages + sent.collective


def test_what_joins_planes_is_refused_before_anything_is_sent(pool):
    one, two = pool.run(2, refusals, (7, 5))
    assert one == two
    for name, (_, operator) in REFUSED.items():
        text, sent = one[name]
        assert "layer '1.0' (Last) cannot run on slabs of a volume" in text, name
        assert operator in text, (name, text)
        assert sent == 0


def local(group, sizes):
    """Errors of things that are local."""
    scope, found = scoped(group, sizes), {}
    whole = random((1, 2, 12, 4, 4), 1, torch.float32, False)
    for name, do in LOCAL.items():
        network = convert_sharded(nn.Sequential(Last(do)))
        torch.manual_seed(3)
        expected = do(whole)
        torch.manual_seed(3)
        with surrounded(scope):
            out = network(cut(whole, scope))
        low, high = scope.span(12)
        dim = next(d for d, n in enumerate(expected.shape) if n % 12 == 0)
        times = expected.shape[dim] // 12
        found[name] = error(out, expected.narrow(dim, low * times, (high - low) * times))
    return found


def test_what_is_local_runs(pool):
    for found in pool.run(2, local, (7, 5)):
        assert not {name: error for name, error in found.items() if error > 1e-6}


SETTINGS = {
    "'reflect'": lambda: nn.Conv3d(1, 1, 3, padding=1, padding_mode="reflect"),
    "indices": lambda: nn.MaxPool3d(2, return_indices=True),
    "'area'": lambda: nn.Upsample(scale_factor=2, mode="area"),
    "ParametrizedConv3d": lambda: nn.utils.parametrizations.weight_norm(nn.Conv3d(1, 1, 3, padding=1)),
    "exchanges its statistics itself": lambda: nn.SyncBatchNorm(1),
    "not made from the split input": lambda: Whole(),
    "as many": lambda: Twice(),
    "AdaptiveAvgPool3d": lambda: nn.AdaptiveAvgPool3d(2),
}


class Whole(nn.Module):
    """Convolves an image of its own."""

    def __init__(self):
        super().__init__()
        self.image, self.conv = nn.Parameter(torch.ones(1, 1, 12, 4, 4)), nn.Conv3d(1, 1, 3, padding=1)

    def forward(self, x):
        return x + self.conv(self.image)


class Twice(nn.Module):
    """One convolution for two levels, of which a rank holds as many planes."""

    def __init__(self):
        super().__init__()
        self.pool, self.conv = nn.AvgPool3d((4, 1, 1)), nn.Conv3d(1, 1, 3, padding=1)

    def forward(self, x):
        return self.conv(x), self.conv(self.pool(x))


def settings(group, sizes):
    return {name: said(convert_sharded(nn.Sequential(make())), group, sizes) for name, make in SETTINGS.items()}


def test_settings_that_do_not_run_on_slabs(pool):
    # of 12 planes the second rank has 3, and of 3 planes too, which both hold
    one, two = pool.run(2, settings, (9, 3))
    assert one == two
    for name, (text, sent) in one.items():
        assert name in text, (name, text)
        assert "'0" in text, text
        assert sent == 0


def test_a_rank_without_planes(pool):
    for text, sent in pool.run(2, nobody, (12, 0)):
        assert "every rank needs planes" in text
        assert sent == 0


def nobody(group, sizes):
    return said(convert_sharded(nn.Conv3d(1, 1, 1)), group, sizes)


class Checkpointed(nn.Module):
    """By torch itself, which forgets the scope."""

    def __init__(self, reentrant):
        super().__init__()
        self.conv, self.reentrant = nn.Conv3d(1, 1, 3, padding=1), reentrant

    def forward(self, x):
        return checkpoint(self.conv, x, use_reentrant=self.reentrant)


def forgetful(group, reentrant):
    network = convert_sharded(Checkpointed(reentrant))
    scope = scoped(group, (4, 4))
    with surrounded(scope):
        out = network(torch.ones(1, 1, 4, 4, 4, requires_grad=True))
    try:
        out.sum().backward()
    except UnsupportedSharding as error:
        text = str(error)
    else:
        text = "nothing"
    whole = torch.ones(1, 1, 8, 4, 4, requires_grad=True)
    network(whole).sum().backward()  # without slabs it may do what it likes
    return text


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_of_torch(pool, reentrant):
    for text in pool.run(2, forgetful, reentrant):
        assert "run_part" in text


def drop(group, memory):
    """A layer's share of zeros, whether its gradient has them too, and what slabs have in common."""
    network = convert_sharded(nn.Sequential(nn.Dropout(0.25)))
    scope = scoped(group, (10, 10))
    x = torch.ones(1, 4, 10, 16, 16, requires_grad=True)
    torch.manual_seed(5)
    with surrounded(scope):
        network(x.detach())  # only to see that it draws anew
        out = network(x) if memory == "stored" else Last(lambda x: run_part(memory, network[0], x))(x)
    after = torch.rand(1)
    out.sum().backward()
    both = [torch.empty_like(out) for _ in range(2)]
    dist.all_gather(both, out.detach(), group=group)
    zeros = (out == 0).float().mean()
    return (
        float(zeros),
        torch.equal(out.detach(), x.grad),
        float((both[0] == both[1]).float().mean()),
        float(out.max()),
        float(after),
    )


@pytest.mark.parametrize("memory", ["stored", "checkpoint"])
def test_dropout(pool, memory):
    one, two = pool.run(2, drop, memory)
    for zeros, same, _, largest, _ in (one, two):
        assert abs(zeros - 0.25) < 0.02
        assert same
        assert largest == pytest.approx(1 / 0.75)
    assert abs(one[2] - (0.75**2 + 0.25**2)) < 0.03
    assert one[4] == two[4]


def inner(group):
    """A converted network within another one, and alone in the same scope."""
    scope = scoped(group, (6, 6))
    part = convert_sharded(nn.Sequential(nn.Conv3d(1, 1, 3, padding=1)))
    network = convert_sharded(nn.Sequential(nn.AvgPool3d((2, 1, 1)), part, nn.Upsample(scale_factor=(2, 1, 1)), part))
    whole = random((1, 1, 12, 4, 4), 1, torch.float32, False)
    expected = network(whole)
    with surrounded(scope):
        outs = [network(cut(whole, scope)) for _ in range(2)]
    return [slab_error(out, expected, scope.layout.base, group) for out in outs]


def test_a_converted_part_of_a_network(pool):
    assert max(map(max, pool.run(2, inner))) < limit(torch.float32)


def autocast(group, sizes):
    """In half precision errors are of its rounding; types are those of one process."""
    torch.manual_seed(2)
    plain = nn.Sequential(
        nn.Conv3d(1, 8, 3, padding=1), nn.InstanceNorm3d(8, affine=True), nn.Conv3d(8, 2, 3, 2, 1), nn.GroupNorm(1, 2)
    )
    mine = convert_sharded(copy.deepcopy(plain))
    scope, whole = scoped(group, sizes), random((1, 1, 12, 6, 6), 1, torch.float32)
    own = cut(whole, scope)
    with torch.autocast("cpu", torch.bfloat16):
        expected = plain(whole)
        with surrounded(scope):
            out = mine(own)
    direction = random(tuple(expected.shape), 3, grad=False)
    reference = copy.deepcopy(plain)(whole.detach())
    (expected * direction).sum().backward()
    low, high = scope.span(expected.shape[2])
    (out * direction[:, :, low:high]).sum().backward()
    return (
        expected.dtype == out.dtype,
        float((out - reference[:, :, low:high]).norm() / (expected - reference).norm()),
        slab_error(own.grad, whole.grad, scope.layout.base, group),
    )


def test_autocast(pool):
    for same, ratio, grad in pool.run(2, autocast, (8, 4)):
        assert same
        assert ratio < 1.5
        assert grad < 0.05


def frugal(group):
    """Bytes that a convolution keeps and sends, for a slab of 16 planes of 8 channels of 10 x 12."""
    torch.manual_seed(0)
    conv = convert_sharded(nn.Conv3d(8, 8, 3, padding=1))
    scope = scoped(group, (16, 16, 16))
    x = torch.rand(1, 8, 16, 10, 12, requires_grad=True)
    kept = []
    with surrounded(scope):
        conv(x)
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.nbytes), t)[1], lambda t: t)
        with hooks, counting() as sent:
            out = conv(x)
        with counting() as back:
            out.sum().backward()
    plane = 4 * 8 * 10 * 12
    return (
        (sum(kept) - conv.weight.nbytes) / plane,
        sent.point_to_point / plane,
        back.point_to_point / plane,
        sent.messages,
    )


def test_a_convolution_keeps_and_sends_planes(pool):
    first, middle, _ = pool.run(3, frugal)
    assert middle == (16 + 2, 2, 2, 2)
    assert first == (16 + 1, 1, 1, 1)


def whole_levels(group):
    records = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    log = logging.getLogger("patchreg.distributed.tracing")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        network = convert_sharded(nn.Sequential(nn.AvgPool3d(4), nn.Conv3d(1, 1, 1), nn.Conv3d(1, 1, 1)))
        for size in (8, 8, 12):
            with surrounded(scoped(group, (6, 6))):
                network(torch.ones(1, 1, 6, size, 8))
    finally:
        log.removeHandler(handler)
        log.setLevel(logging.NOTSET)
    return records


def test_levels_that_all_ranks_hold_are_told_once(pool):
    one, two = pool.run(2, whole_levels)
    assert one == ["1: every rank holds all 3 planes, too few to split"]
    assert two == []
