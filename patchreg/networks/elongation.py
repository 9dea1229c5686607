"""Any network made deeper, for the memory of one further activation a place."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.instancenorm import _InstanceNorm

from patchreg.errors import InputError
from patchreg.networks.checkpointing import run_part
from patchreg.networks.reversible import ReversibleConvBlock, ReversibleSequence
from patchreg.networks.unet import ConvBlock
from patchreg.types import Activations


class Preceded(nn.Module):
    """A layer with a stack of reversible blocks before it, which has the layer's place in its network.

    The layer's weights keep their names in the state dict, so that those of the network as it was can be loaded into
    the longer one; those of the stack stand beside them under ``elongation``.

    Args:
        layer: what the stack's output goes into, with anything else that the layer takes.
        channels: of the layer's first input, even.
        blocks: in the stack.
        memory: what is kept for the backward pass. Unless ``"stored"``, a layer that is more than a convolution (which
            keeps its input only) runs again in the backward pass, so that of stack and layer together nothing is kept
            but the stack's output.
        kernel_size: odd side of the stack's kernels.
        norm: instance normalisation in the stack.
    """

    def __init__(
        self, layer: nn.Module, channels: int, blocks: int, memory: Activations, kernel_size: int, norm: bool
    ) -> None:
        super().__init__()
        self.memory = memory
        self.elongation = ReversibleSequence(
            [ReversibleConvBlock(channels // 2, kernel_size, norm) for _ in range(blocks)], memory
        )
        self.layer = layer
        self.train(layer.training)
        self.register_state_dict_post_hook(_short_names)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_long_names)  # type: ignore[no-untyped-call]

    def forward(self, x: Tensor, *others: Any) -> Any:
        """Of x (B, channels, I, J, K) and whatever else the layer takes, what the layer gives."""
        memory: Activations = "stored" if isinstance(self.layer, nn.Conv3d | nn.ConvTranspose3d) else self.memory
        return run_part(memory, self.layer, self.elongation(x), *others)


def _short_names(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    inner = f"{prefix}layer."
    for name in [name for name in state if name.startswith(inner)]:
        state[prefix + name.removeprefix(inner)] = state.pop(name)


def _long_names(module: nn.Module, state: dict[str, Any], prefix: str, *others: Any) -> None:
    inner, stack = f"{prefix}layer.", f"{prefix}elongation."
    for name in [name for name in state if name.startswith(prefix) and not name.startswith((inner, stack))]:
        state[inner + name.removeprefix(prefix)] = state.pop(name)


def elongate(
    network: nn.Module,
    blocks: int,
    before: Sequence[str],
    memory: Activations = "reversible",
    kernel_size: int = 3,
    norm: bool = True,
) -> nn.Module:
    """Put a stack of reversible blocks before each of some layers of a network, in place.

    The stacks are the identity at the start: the longer network gives exactly what the network gave (up to rounding
    before a step of a :class:`patchreg.networks.UNet`'s decoder, which then makes a tensor that it did without). With
    ``memory: reversible`` a stack keeps its output for the backward pass, however many blocks it has.

    Args:
        network: any. Its layers must be called with what enters them as the first argument.
        blocks: in every stack.
        before: names of layers, as in ``network.named_modules()``: three-dimensional convolutions, their blocks
            (:class:`patchreg.networks.unet.ConvBlock`), instance or group normalisations, and ``nn.Sequential`` of
            which the first is one of these.
        memory: what stacks and layers keep for the backward pass: see :class:`Preceded`.
        kernel_size: odd side of the stacks' kernels.
        norm: instance normalisation in the stacks.

    Returns:
        The network that was given.

    Raises:
        InputError: no such layer, or one into which goes no volume of an even number of channels.

    References:
        Blumberg et al. 2018, arXiv:1808.05577, section 2.
    """
    if blocks < 1:
        raise InputError(f"a network is made longer by at least one block before a layer, got {blocks}")
    if not before:
        raise InputError("name at least one layer to put blocks before")
    if twice := sorted({name for name in before if list(before).count(name) > 1}):
        raise InputError(f"layers named twice: {', '.join(twice)}; give more blocks instead")
    modules = dict(network.named_modules())
    found = []
    for name in before:
        if name not in modules or not name:
            near = difflib.get_close_matches(name, [m for m in modules if m], cutoff=0.4)
            raise InputError(
                f"{type(network).__name__} has no layer {name!r}"
                + (f"; did you mean {', '.join(near)}?" if near else "; its named_modules() lists them")
            )
        if isinstance(modules[name], Preceded):
            raise InputError(f"{name} has blocks before it already: give more blocks when it is made longer")
        channels = _channels(modules[name])
        if channels is None:
            raise InputError(
                f"what enters {name} ({type(modules[name]).__name__}) is not known: name a three-dimensional "
                "convolution or a block that begins with one"
            )
        if channels % 2:
            raise InputError(
                f"{channels} channels enter {name}, and a reversible block splits them into halves: name layers that "
                "an even number enters"
            )
        found.append((name, modules[name], channels))
    for name, layer, channels in found:
        longer = Preceded(layer, channels, blocks, memory, kernel_size, norm)
        for like in itertools.islice(itertools.chain(layer.parameters(), network.parameters()), 1):
            longer.elongation.to(like.device, like.dtype)
        parent, _, attribute = name.rpartition(".")
        setattr(modules[parent], attribute, longer)
    return network


def _channels(layer: nn.Module) -> int | None:
    """Channels of the volume that enters a layer; None where it is not known, or no volume."""
    match layer:
        case nn.Conv3d() | nn.ConvTranspose3d():
            return layer.in_channels
        case nn.GroupNorm():
            return layer.num_channels
        case _InstanceNorm() | nn.BatchNorm3d():
            return layer.num_features
        case ConvBlock():
            return _channels(layer.conv)
        case nn.Sequential() if len(layer):
            return _channels(layer[0])
        case _:
            return None


class Elongated(nn.Module):
    """A network with stacks of reversible blocks before some of its layers, for configurations.

    Args:
        network: any, as for :func:`elongate`, which changes it.
        blocks: in every stack.
        before: names of layers of the network.
        memory: what stacks and layers keep for the backward pass.
        kernel_size: odd side of the stacks' kernels.
        norm: instance normalisation in the stacks.

    Raises:
        InputError: as :func:`elongate`.

    References:
        Blumberg et al. 2018, arXiv:1808.05577.
    """

    def __init__(
        self,
        network: nn.Module,
        blocks: int,
        before: Sequence[str],
        memory: Activations = "reversible",
        kernel_size: int = 3,
        norm: bool = True,
    ) -> None:
        super().__init__()
        self.network = elongate(network, blocks, before, memory, kernel_size, norm)

    def forward(self, *inputs: Any) -> Any:
        """Whatever the network takes, to what it gives."""
        return self.network(*inputs)
