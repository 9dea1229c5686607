from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist
from ranks.comparison import CASES, error, limit, random, slab, slab_error, smooth, split

from patchreg import distributed, ops
from patchreg.distributed import Partition
from patchreg.distributed.exchange import Plan
from patchreg.distributed.sampler import takes_ring
from patchreg.ops import cpu

# No voxel lands on a plane, where the slope is that to one side or the other, as numbers are rounded.
ROTATION = torch.tensor([[0.0, 1.1017, 0, 0.313], [-1.0519, 0.1, 0, 12], [0.0523, 0, 0.9, 0.4]], dtype=torch.float64)
"""A quarter turn: every slab of the output sees the whole image."""
NEARLY_STILL = torch.tensor(
    [[1.0213, 0.0317, 0, -0.4123], [0.0119, 0.9817, 0, 0.6171], [0, -0.0213, 1.0119, 0.2157]], dtype=torch.float64
)


def compare(group, partition, output, options):
    """Errors of value and gradients against one process in float64: to image, displacement, affine and scale."""
    dtype, batch, reach = options.get("dtype", torch.float64), options.get("batch", 2), options.get("reach", 1.5)
    how = {name: options[name] for name in ("mode", "padding") if name in options}
    dim = partition.dim
    shape, out_shape = [13, 12, 11], [10, 12, 9]
    shape[dim - 2], out_shape[dim - 2] = partition.total, output.total
    image = smooth((batch, 2, *shape), 1)
    u = (reach * (2 * smooth((1, 3, *out_shape), 2, grad=False) - 1)).requires_grad_()
    affine = options.get("affine", NEARLY_STILL).clone().requires_grad_()
    scale = torch.tensor([[1.0, 0.1, 0], [0, 0.9, 0], [0.05, 0, 1.1]], dtype=torch.float64).requires_grad_()
    if options.get("scale") == "number":
        scale = 0.7
    inputs = [x for x in (image, u, affine, scale) if isinstance(x, torch.Tensor)]
    if options.get("mode") == "nearest":
        u, affine, scale, inputs = u.detach(), affine.detach(), None, [image]
    whole = ops.warp(image, u, affine, scale, backend="reference", **how)
    direction = random(tuple(whole.shape), 3, grad=False)
    expected = torch.autograd.grad((whole * direction).sum(), inputs)

    own_image, own_u = slab(image.to(dtype), partition, group), slab(u.to(dtype), output, group)
    own_affine, own_scale = (
        x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x
        for x in (affine, scale)
    )
    out = distributed.warp(
        own_image,
        partition,
        own_u,
        own_affine,
        own_scale,
        output=output,
        group=group,
        method=options.get("method", "auto"),
        **how,
    )
    rank = dist.get_rank(group)
    (out * output.cut(direction.to(dtype), rank)).sum().backward()
    errors = {
        "value": slab_error(out, whole, output, group),
        "image": slab_error(own_image.grad, expected[0], partition, group),
    }
    if own_u.grad is not None:
        errors["displacement"] = slab_error(own_u.grad, expected[1], output, group)
        errors["affine"] = error(own_affine.grad, expected[2])
    if isinstance(own_scale, torch.Tensor):
        errors["scale"] = error(own_scale.grad, expected[3])
    return errors


def check(pool, ranks, partition, output, **options):
    allowed = limit(options.get("dtype", torch.float64))
    for errors in pool.run(ranks, compare, partition, output, options):
        assert max(errors.values()) < allowed, (errors, partition, output, options)


@pytest.mark.parametrize("method", ["exchange", "ring"])
@pytest.mark.parametrize(("ranks", "shares"), CASES)
def test_value_and_gradients_of_one_process(pool, ranks, shares, method):
    for dim, padding in itertools.product((2, 3, 4), ("zeros", "border")):
        for affine in (NEARLY_STILL, ROTATION):
            partition, output = split(13, shares, dim), split(10, tuple(reversed(shares)), dim)
            check(pool, ranks, partition, output, method=method, padding=padding, affine=affine)
        check(pool, ranks, partition, output, method=method, padding=padding, mode="nearest")


@pytest.mark.parametrize("method", ["exchange", "ring"])
def test_kernels_in_float32(pool, method):
    for ranks, shares in CASES:
        for padding, affine in itertools.product(("zeros", "border"), (NEARLY_STILL, ROTATION)):
            options = {"method": method, "padding": padding, "affine": affine, "dtype": torch.float32}
            check(pool, ranks, split(13, shares), split(10, shares), **options)


@pytest.mark.parametrize("method", ["exchange", "ring"])
def test_displacements_of_any_reach(pool, method):
    """Halos wider than slabs, and positions outside the image on both sides."""
    for reach in (0.0, 8.0, 40.0):
        for padding in ("zeros", "border"):
            check(
                pool, 4, Partition((5, 1, 4, 3)), Partition((2, 3, 4, 1)), method=method, reach=reach, padding=padding
            )
    check(pool, 3, Partition((5, 5, 3)), Partition((3, 4, 3)), method=method, scale="number", batch=1)


def on_faces(group, method, padding, sizes):
    """Positions on whole planes, also those between slabs: values, and the slopes towards the next plane.

    In float32, for the kernels: the reference loses whole numbers to rounding, and so the side of the slope.
    """
    partition = Partition(sizes)
    image = random((1, 1, 9, 4, 5), 1, torch.float32)
    u = torch.zeros(1, 3, 9, 4, 5)
    u[:, 0] = torch.randint(-5, 6, (9, 4, 5), generator=torch.Generator().manual_seed(2))
    errors = []
    for mode in ("linear", "nearest"):
        for shift in (
            (0.0, 0.5, -0.5) if mode == "nearest" else (0.0,)
        ):  # halves are rounded to even planes of the volume
            v = (u + torch.tensor([shift, 0, 0])[:, None, None, None]).requires_grad_(mode == "linear")
            own_image, own_v = slab(image, partition, group), slab(v, partition, group)
            whole = ops.warp(image, v, mode=mode, padding=padding)
            out = distributed.warp(own_image, partition, own_v, group=group, mode=mode, padding=padding, method=method)
            errors.append(slab_error(out, whole, partition, group))
            whole.square().sum().backward()
            out.square().sum().backward()
            errors.append(slab_error(own_image.grad, image.grad, partition, group))
            if mode == "linear":
                errors.append(slab_error(own_v.grad, v.grad, partition, group))
            image.grad = None
    return errors


@pytest.mark.parametrize("method", ["exchange", "ring"])
@pytest.mark.parametrize("padding", ["zeros", "border"])
def test_whole_and_half_steps_across_faces(pool, method, padding):
    if cpu.find_extension() is None:
        pytest.skip("the kernels were not compiled")
    for sizes in ((3, 4, 2), (4, 3, 2)):
        assert max(map(max, pool.run(3, on_faces, method, padding, sizes))) < 1e-6


def near_faces(group, method, padding, slope, dtype):
    """Positions that are whole numbers but for rounding: the slopes must be those to one side or the other."""
    partition = Partition((3, 4, 2, 5))
    image = random((1, 1, 14, 6, 5), 1)
    affine = torch.eye(3, 4, dtype=torch.float64)
    affine[0] = torch.tensor([slope, 0.1, 0.3, -0.4])
    u = torch.zeros(1, 3, 14, 6, 5, dtype=torch.float64)
    sides = []
    for shift in (-1e-7, 1e-7):
        v = (u + torch.tensor([shift, 0, 0], dtype=torch.float64)[:, None, None, None]).requires_grad_()
        ops.warp(image, v, affine, padding=padding).sum().backward()
        sides.append(partition.cut(v.grad[:, :1], dist.get_rank(group)))
    own = slab(u.to(dtype).requires_grad_(), partition, group)
    distributed.warp(
        slab(image.detach().to(dtype), partition, group),
        partition,
        own,
        affine,
        group=group,
        padding=padding,
        method=method,
    ).sum().backward()
    errors = torch.stack([(own.grad[:, :1] - side).abs() for side in sides])
    return float(errors.amin(dim=0).max()), int((errors.amax(dim=0) > 1e-3).sum())


@pytest.mark.parametrize("method", ["exchange", "ring"])
@pytest.mark.parametrize("padding", ["zeros", "border"])
def test_positions_next_to_planes(pool, method, padding):
    kinks = 0
    for slope in (0.3, 0.7, 1.1, 1.3, -1.1):
        for dtype in (torch.float64, torch.float32):
            for difference, found in pool.run(4, near_faces, method, padding, slope, dtype):
                assert difference < 1e-4, slope
                kinks += found
    assert kinks > 30  # the test has something to see


def labels_alike(group, partition, method, mode, padding, dtype):
    shape = [13, 12, 11]
    shape[partition.dim - 2] = partition.total
    image = (6 * smooth((1, 1, *shape), 1, grad=False)).to(dtype)
    u = 8 * smooth((1, 3, *shape), 2, torch.float32, grad=False) - 4
    u[..., 0, 0, 0] = torch.nan
    whole = ops.warp(image, u, NEARLY_STILL, mode=mode, padding=padding)
    own, own_u = slab(image, partition, group), slab(u, partition, group)
    out = distributed.warp(own, partition, own_u, NEARLY_STILL, group=group, mode=mode, padding=padding, method=method)
    return out.dtype == dtype and torch.equal(out, partition.cut(whole, dist.get_rank(group)))


@pytest.mark.parametrize("method", ["exchange", "ring"])
@pytest.mark.parametrize("mode", ["nearest", "label"])
def test_labels_stay_labels(pool, mode, method):
    for (ranks, shares), padding in itertools.product(CASES, ("zeros", "border")):
        assert all(pool.run(ranks, labels_alike, split(13, shares), method, mode, padding, torch.int16))
    assert all(pool.run(3, labels_alike, Partition((5, 0, 7), 3), method, mode, "zeros", torch.uint8))


def without_displacement(group):
    partition, output = Partition((4, 4, 5)), Partition((7, 1, 6))
    image, affine = smooth((2, 1, 13, 6, 5), 1), torch.stack([NEARLY_STILL, ROTATION])
    whole = ops.warp(image, affine=affine, shape=(14, 7, 5))
    own = slab(image, partition, group)
    out = distributed.warp(own, partition, affine=affine, shape=(14, 7, 5), output=output, group=group)
    still = distributed.warp(own, partition, group=group)
    return slab_error(out, whole, output, group), slab_error(still, image, partition, group)


def test_affine_maps_alone(pool):
    assert max(map(max, pool.run(3, without_displacement))) < 1e-12


def nothing_in_sight(group, method):
    """All positions beyond the image, or nowhere."""
    partition = Partition((4, 5))
    image, u = (
        slab(random((1, 1, 9, 3, 3), 1), partition, group),
        torch.full((1, 3, partition.sizes[dist.get_rank(group)], 3, 3), 50.0),
    )
    u = u.double().requires_grad_()
    out = distributed.warp(image, partition, u, group=group, method=method)
    out.sum().backward()
    zero = bool((out == 0).all() and (image.grad == 0).all() and (u.grad == 0).all())
    border = distributed.warp(image, partition, u, group=group, method=method, padding="border")
    nan = distributed.warp(image, partition, u.detach() * torch.nan, group=group, method=method)
    return zero, bool((border == random((1, 1, 9, 3, 3), 1)[..., -1:, -1:, -1:]).all()), bool(nan.isnan().all())


@pytest.mark.parametrize("method", ["exchange", "ring"])
def test_nothing_in_sight(pool, method):
    assert all(map(all, pool.run(2, nothing_in_sight, method)))


def in_half_precision(group, dtype, method):
    partition = Partition((5, 4, 4))
    image, u = smooth((1, 1, 13, 6, 7), 1), (3 * smooth((1, 3, 13, 6, 7), 2, grad=False) - 1.5).requires_grad_()
    whole = ops.warp(image, u, padding="border")
    whole.square().sum().backward()
    own_image, own_u = slab(image.to(dtype), partition, group), slab(u.float(), partition, group)
    out = distributed.warp(own_image, partition, own_u, group=group, padding="border", method=method)
    out.float().square().sum().backward()
    assert out.dtype == own_image.grad.dtype == dtype
    return (
        slab_error(out, whole, partition, group),
        slab_error(own_image.grad, image.grad, partition, group),
        slab_error(own_u.grad, u.grad, partition, group),
    )


@pytest.mark.parametrize("method", ["exchange", "ring"])
def test_half_precision(pool, method, tolerances):
    assert max(map(max, pool.run(3, in_half_precision, torch.float16, method))) < tolerances.half
    assert max(map(max, pool.run(3, in_half_precision, torch.bfloat16, method))) < 3 * tolerances.half


def test_wide_exchanges_have_rounds():
    """What is on its way at a time is no more than a slab."""
    partition = Partition((4, 4, 4, 4))
    assert Plan(partition, ((0, 6), (3, 9), (7, 13), (10, 16))).rounds == [range(1, 4)]
    assert Plan(partition, ((0, 16),) * 4).rounds == [range(1, 2), range(2, 3), range(3, 4)]


def test_when_slabs_travel():
    partition = Partition((10, 10, 10, 10))
    assert not takes_ring(Plan(partition, ((0, 30), (0, 20), (5, 25), (30, 40))))
    assert takes_ring(Plan(partition, ((0, 40), (0, 20), (5, 25), (30, 40))))
    assert takes_ring(Plan(partition, ((0, 1),) * 4), "ring")
    assert not takes_ring(Plan(partition, ((0, 40),) * 4), "exchange")


def live_peak(group, partition, method, affine):
    """The most bytes that exist beside the slabs of image and displacement, in slabs of the image."""
    from patchreg.distributed import reach
    from patchreg.memory import LivePeak

    reach.VOXELS = 1 << 14  # less than a slab
    rank, shape = dist.get_rank(group), (partition.total, 48, 64)
    image = slab(random((1, 1, *shape), 1, torch.float32), partition, group)
    u = slab(random((1, 3, *shape), 2, torch.float32), partition, group)
    with LivePeak() as memory:
        distributed.warp(image, partition, u, affine, group=group, method=method).sum().backward()
    return memory.peak / (4 * partition.sizes[rank] * 48 * 64)


def test_no_rank_holds_the_whole_image(pool):
    """A quarter turn, in which every rank reads all planes: the volume is four slabs, and so is its gradient."""
    partition = Partition.even(192, 4)
    turn = torch.tensor([[0.0, 4, 0, 0], [1, 0, 0, 0], [0, 0, 1, 0]], dtype=torch.float64)
    exchanged, ring = (max(pool.run(4, live_peak, partition, method, turn)) for method in ("exchange", "ring"))
    still = max(pool.run(4, live_peak, partition, "auto", None))
    inputs, gradients = 4, 4
    assert ring - inputs - gradients < 6.5, ring  # slabs, and sums of their gradients, on their way; and a quarter more
    assert exchanged > ring + 3
    assert still - inputs - gradients < 2.5, still
