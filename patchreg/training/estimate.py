"""The peak memory of a training step and of inference, found without a GPU and without computing anything."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
)
from torch.autograd.graph import saved_tensors_hooks

from patchreg.cascade import PreparedPair, Stage, cover
from patchreg.datasets import Pair, WorldAugmentation
from patchreg.distributed.communication import Pretended, Traffic, counting
from patchreg.distributed.convert import convert_sharded
from patchreg.distributed.slab import Slab
from patchreg.errors import InputError
from patchreg.fake import Fakes
from patchreg.memory import MemoryLog
from patchreg.ops.workspace import workspace
from patchreg.spatial import Affine, DisplacementField, Foreground, Grid, Transform, Volume
from patchreg.training.gpu_rules import HOST, as_on_gpu
from patchreg.training.module import RegistrationModule

KINDS = ("weights", "gradients", "optimizer", "images", "fields", "activations", "temporary")
"""What memory is taken by: ``fields`` are displacements, found or drawn; ``activations`` what is kept for the backward
pass, in inference what is inside a network; ``temporary`` all that is needed for a moment."""


@dataclass(frozen=True, eq=False)
class Setting:
    """What memory depends on, beside the model.

    Args:
        grid: of both images.
        batch_size: pairs of a training step.
        precision: that autocast computes in; None: float32 throughout.
        labels: what label maps are stored in; None: there are none.
        augmentation: of the pairs; None: none.
        gpu: whether a GPU is accounted for, not a CPU.
        ranks: that share each pair (:class:`patchreg.distributed.GridParallelStrategy`); the peak is that of one which has
            neighbours on both sides, where any has.
        reach: planes beyond its own that a rank samples from, because something is displaced so far.
    """

    grid: Grid
    batch_size: int = 1
    precision: torch.dtype | None = None
    labels: torch.dtype | None = None
    augmentation: WorldAugmentation | None = None
    gpu: bool = True
    ranks: int = 1
    reach: int = 4

    def shared(self) -> Grid:
        """The images' grid, or one rank's part of it."""
        if self.ranks == 1:
            return self.grid
        return Slab.of(self.grid, Pretended(1, self.ranks, self.reach))


@dataclass(frozen=True)
class Peak:
    """The largest number of bytes held at one time.

    Args:
        kinds: bytes of each of :data:`KINDS` at that moment; those that are zero are left out.
        host: bytes in host memory at most, where something is moved there.
        sent: what a rank sends to those that share the pairs with it, parameters' gradients excepted.
    """

    kinds: dict[str, int]
    host: int = 0
    sent: Traffic = field(default_factory=Traffic)

    @property
    def total(self) -> int:
        """On the device."""
        return sum(self.kinds.values())


def needed_bytes(peak: Peak) -> int:
    """What a device must have for a peak: a tenth more for what is not seen, and half a GiB for the driver's context."""
    return int(1.1 * peak.total) + 2**29


def training_peak(module: RegistrationModule, setting: Setting) -> Peak:
    """Peak of a training step after the first, with the optimiser's state.

    It is the sum of the tensors that exist at one time. What operators of torch take inside themselves, such as a
    convolution's workspace, is not known, and neither is what the allocator loses between tensors.

    Args:
        module: its weights are lost.
        setting: the step's.

    Raises:
        InputError: code whose course depends on the numbers in large tensors.
    """
    fakes, log = Fakes(), MemoryLog(workspace)
    _without_numbers(module, fakes)
    _share(module, setting)
    warp = _drawn(setting)
    module.train()
    with _account(module, setting, fakes, log):
        optimizer = _stepped(module, setting, log)
        pairs = [_pair(setting, warp, fakes, log) for _ in range(setting.batch_size)]
        if setting.ranks > 1:
            _look_ahead(module, pairs, setting)
        log.start()
        with counting() as sent:
            with _autocast(setting.precision):
                prepared = [module.prepare(pair) for pair in pairs]
                total, _ = module.loss(prepared)
            for pair in prepared:
                _label_images(pair, log)
            del prepared, pair
            total.backward()
        log.label("gradients", *(p.grad for p in module.parameters() if p.grad is not None))
        optimizer.step()
    module.zero_grad()
    return Peak(log.at_peak({HOST}), sum(log.at_peak(KINDS).values()), sent)


def inference_peak(module: RegistrationModule, setting: Setting) -> tuple[Peak, Peak]:
    """Peak of registering one pair in float32, with images and fields on the device, and with them on the host.

    ``patchreg register`` has them on the device if they take less than half of it. Its refinement is not counted. Of the
    images everything counts as content.

    Args:
        module: its weights are lost.
        setting: of which the grid and the device count.

    Raises:
        InputError: as :func:`training_peak`.
    """
    fakes, log = Fakes(), MemoryLog(workspace, kind="fields")
    _without_numbers(module, fakes)
    _share(module, setting)
    for stage in _stages(module):
        _watch(stage, log)
    batch = module.patch_batch
    with _account(module, setting, fakes, log), torch.no_grad(), _few_patches(2 * batch):
        fixed, moving = (module.cascade.prepare(_image(setting.shared(), fakes)) for _ in range(2))
        if setting.ranks > 1:
            module.cascade.register(fixed, moving, batch=batch, passes=1)  # networks look ahead
            log.start()
        found = module.cascade.register(fixed, moving, batch=batch, passes=1)
        _label_images(PreparedPair(fixed, moving), log)
        del found
    away = {"images", "fields"}
    return Peak(log.at_peak()), Peak(log.at_peak(away), sum(log.at_peak(set(KINDS) - away).values()))


@contextmanager
def _account(module: nn.Module, setting: Setting, fakes: Fakes, log: MemoryLog) -> Iterator[None]:
    """Within the block nothing is computed, and everything is logged."""

    def keep(tensor: Tensor) -> Tensor:
        log.suggest("activations", tensor)
        return tensor

    try:
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(devices=[]))
            torch.manual_seed(0)  # of the patches' places
            if setting.gpu:
                stack.enter_context(as_on_gpu(fakes, log))
            stack.enter_context(fakes)
            stack.enter_context(log)
            stack.enter_context(saved_tensors_hooks(keep, lambda tensor: tensor))
            log.label("weights", *module.parameters(), *module.buffers())
            yield
    except (DataDependentOutputException, DynamicOutputShapeException, UnsupportedFakeTensorException) as error:
        raise InputError(
            f"the memory of this model cannot be known without running it: its course depends on the numbers in a large "
            f"tensor ({error}); run a few steps with patchreg fit, which tells its peak at the end"
        ) from error


def _share(module: RegistrationModule, setting: Setting) -> None:
    """Let networks run on slabs where pairs are shared."""
    if setting.ranks > 1:
        for stage in _stages(module):
            convert_sharded(stage.network)


def _look_ahead(module: RegistrationModule, pairs: Sequence[Pair], setting: Setting) -> None:
    """Let networks see what they will run on, which they remember: not a part of a step."""
    with _autocast(setting.precision):
        module.loss([module.prepare(pair) for pair in pairs])
    gc.collect()


def _autocast(precision: torch.dtype | None) -> torch.autocast:
    return torch.autocast("cpu", precision or torch.bfloat16, enabled=precision is not None, cache_enabled=False)


def _stages(module: RegistrationModule) -> list[Stage]:
    return [stage for stage in module.cascade.stages if isinstance(stage, Stage)]


def _without_numbers(module: RegistrationModule, fakes: Fakes) -> None:
    """Make the weights fake; affine stages answer a matrix with numbers, which geometry needs."""
    fakes.convert(module)
    for stage in _stages(module):
        if stage.predicts == "affine":
            stage.network.register_forward_hook(lambda _, inputs, answer: fakes.known(answer, _near_identity(answer)))


def _near_identity(answer: Tensor) -> Tensor:
    """Affine maps of a patch's frame, (B, 3, 4); not the identity, for which there are short cuts."""
    matrix = torch.eye(3, 4)
    matrix[:, 3] = 1e-3
    return matrix.expand(answer.shape)


def _stepped(module: RegistrationModule, setting: Setting, log: MemoryLog) -> torch.optim.Optimizer:
    """The optimiser after a step."""
    optimizer = module.optimization.optimizer(module)
    for group in optimizer.param_groups:
        group["foreach"] = setting.gpu  # as torch chooses by itself
        for parameter in group["params"]:
            parameter.grad = torch.empty_like(parameter)
            log.label("gradients", parameter.grad)
    optimizer.step()
    state: list[dict[str, Any]] = list(optimizer.state.values())
    log.label("optimizer", *(value for values in state for value in values.values() if isinstance(value, Tensor)))
    optimizer.zero_grad()
    return optimizer


def _image(grid: Grid, fakes: Fakes, dtype: torch.dtype = torch.float32) -> Volume:
    return Volume(fakes.empty((1, *grid.shape), dtype), grid)


def _pair(setting: Setting, warp: Transform, fakes: Fakes, log: MemoryLog) -> Pair:
    grid = setting.shared()
    fixed, moving = (_image(grid, fakes) for _ in range(2))
    labels = [None if setting.labels is None else _image(grid, fakes, setting.labels) for _ in range(2)]
    log.label("images", *(volume.data for volume in (fixed, moving, *labels) if volume is not None))
    warps = [warp, warp]
    if isinstance(warp, DisplacementField):
        fields = [warp.displacement_mm.clone() for _ in range(2)]
        log.label("fields", *fields)
        warps = [DisplacementField(warp.grid, field, warp.padding) for field in fields]
    return Pair(fixed, moving, labels[0], labels[1], warps[0], warps[1])


def _drawn(setting: Setting) -> Transform:
    """A random deformation as the data have them, of the whole image: small enough to be computed."""
    if setting.augmentation is None:
        return Affine.identity()
    content = Foreground(setting.grid.center, *setting.grid.bounds())
    return setting.augmentation.draw_warp(content, torch.Generator())


def _label_images(pair: PreparedPair, log: MemoryLog) -> None:
    log.label("images", *(volume.data for image in (pair.fixed, pair.moving) for volume in image.volumes()))


def _watch(stage: Stage, log: MemoryLog) -> None:
    """What happens in a stage's network counts as activations."""

    def enter(_: nn.Module, inputs: Sequence[Tensor]) -> None:
        log.label("activations", *inputs)
        log.kind = "activations"

    def leave(_: nn.Module, inputs: Sequence[Tensor], answer: Tensor) -> None:
        log.kind = "fields"

    stage.network.register_forward_pre_hook(enter)
    stage.network.register_forward_hook(leave)


@contextmanager
def _few_patches(count: int) -> Iterator[None]:
    """Within the block an image is covered by its first patches alone: the others take the same memory again."""
    place: Any = cover
    original = place.tile
    place.tile = lambda *arguments: original(*arguments)[:count]
    try:
        yield
    finally:
        place.tile = original
