"""The one place that talks to ``torch.distributed``: all that a rank sends goes through here, and is counted here."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from patchreg.errors import InputError

Group: TypeAlias = dist.ProcessGroup | DeviceMesh | None
"""The ranks that share a volume: a process group, a mesh of one axis, or None for all processes."""

Message: TypeAlias = tuple[Tensor, int]
"""A contiguous tensor that is sent from or received into, and the other rank, as numbered in the group."""


@dataclass
class Traffic:
    """What one rank sends.

    Args:
        point_to_point: bytes of the messages to single ranks.
        messages: how many they are.
        collective: bytes that a ring needs for the reductions and gatherings: ``2 n (R - 1) / R`` of every rank for the
            sum of ``n`` bytes over ``R`` ranks, ``n (R - 1)`` to gather them. The library may use another algorithm.
    """

    point_to_point: int = 0
    messages: int = 0
    collective: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(
            self.point_to_point + other.point_to_point,
            self.messages + other.messages,
            self.collective + other.collective,
        )

    @classmethod
    def reducing(cls, size: int, ranks: int) -> Traffic:
        """A sum or maximum of ``size`` bytes over ``ranks``."""
        return cls(collective=2 * size * (ranks - 1) // ranks)

    @classmethod
    def gathering(cls, size: int, ranks: int) -> Traffic:
        """``size`` bytes of each of the ``ranks`` brought to all."""
        return cls(collective=size * (ranks - 1))


class Pretended(dist.ProcessGroup):
    """A group of which one rank alone exists: nothing is sent, and everything is counted.

    With tensors without numbers (:mod:`patchreg.fake`) it tells what a rank of any number would hold and send.

    Args:
        rank: this one's number.
        ranks: how many there would be.
        reach: planes beyond its own that a rank is taken to sample, because displacements are not known.
    """

    def __init__(self, rank: int, ranks: int, reach: int = 4) -> None:
        super().__init__(rank, ranks)
        self.reach = reach


_counters: list[Traffic] = []


@contextlib.contextmanager
def counting() -> Iterator[Traffic]:
    """Count what this process sends within the block, backward passes included."""
    counter = Traffic()
    _counters.append(counter)
    try:
        yield counter
    finally:
        _counters[:] = [other for other in _counters if other is not counter]


def _count(sent: Traffic) -> None:
    for counter in _counters:
        counter.point_to_point += sent.point_to_point
        counter.messages += sent.messages
        counter.collective += sent.collective


def process_group(group: Group) -> dist.ProcessGroup:
    """The process group that ``group`` stands for.

    Raises:
        InputError: there is none, a mesh has several axes, or this process is not in it.
    """
    if isinstance(group, Pretended):
        return group
    if not (dist.is_available() and dist.is_initialized()):
        raise InputError(
            "the processes are not connected: start them with torchrun and call torch.distributed.init_process_group"
        )
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise InputError(f"a volume is split along one axis of a mesh, got {group.ndim}: take one, as mesh['grid']")
        group = group.get_group()
    found = dist.group.WORLD if group is None else group
    if not isinstance(found, dist.ProcessGroup) or dist.get_rank(found) < 0:
        raise InputError("this process is not in the group that was given: only its ranks may call this")
    return found


def rank_in(group: dist.ProcessGroup) -> int:
    """This process's number in the group."""
    return int(group.rank()) if isinstance(group, Pretended) else dist.get_rank(group)


def size_of(group: dist.ProcessGroup) -> int:
    """How many ranks there are."""
    return int(group.size()) if isinstance(group, Pretended) else dist.get_world_size(group)


def control_device(group: dist.ProcessGroup) -> torch.device:
    """Where small messages of the host should live: on the CPU where the group can, so that no GPU has to wait."""
    if isinstance(group, Pretended) or "cpu:" in dist.get_backend_config(group):
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def check_sends_from(device: torch.device, group: dist.ProcessGroup) -> None:
    """Raise unless the group can send tensors of a device from one rank to another.

    Raises:
        InputError: it cannot; Gloo alone takes no messages from GPUs.
    """
    if device.type == "cuda" and "cuda:nccl" not in dist.get_backend_config(group):
        raise InputError(
            f"the processes are connected by {dist.get_backend_config(group)}, which sends nothing from GPU to GPU: "
            "use init_process_group('cpu:gloo,cuda:nccl')"
        )


_awake: weakref.WeakKeyDictionary[dist.ProcessGroup, set[torch.device]] = weakref.WeakKeyDictionary()


def wake(device: torch.device, group: dist.ProcessGroup) -> None:
    """Let NCCL connect all ranks, once: it cannot when the first thing that it is asked for is a message of a few.

    All ranks must call this before messages.
    """
    if (
        device.type == "cpu"
        or size_of(group) == 1
        or isinstance(group, Pretended)
        or device in _awake.setdefault(group, set())
    ):
        return
    dist.all_reduce(torch.zeros(1, device=device), group=group)
    _awake[group].add(device)


def start_messages(sends: Sequence[Message], receives: Sequence[Message], group: dist.ProcessGroup) -> list[dist.Work]:
    """Begin to send and receive; the tensors must live, and stay as they are, until all that is returned was waited for.

    Messages between two ranks arrive in the order in which both name them.
    """
    _count(Traffic(sum(tensor.nbytes for tensor, _ in sends), len(sends)))
    if isinstance(group, Pretended):
        return []
    operations = [dist.P2POp(dist.irecv, tensor, group=group, group_peer=peer) for tensor, peer in receives]
    operations += [dist.P2POp(dist.isend, tensor, group=group, group_peer=peer) for tensor, peer in sends]
    return dist.batch_isend_irecv(operations) if operations else []


def finish_messages(works: Sequence[dist.Work]) -> None:
    """Wait for what :func:`start_messages` began: on a GPU its stream waits, not the host."""
    for work in works:
        work.wait()


def reduce_all(tensor: Tensor, how: Literal["sum", "max"], group: dist.ProcessGroup) -> Tensor:
    """The sum or maximum over the ranks, in place and returned, the same on all of them."""
    ranks = size_of(group)
    if ranks > 1 and tensor.numel():
        _count(Traffic.reducing(tensor.nbytes, ranks))
        if isinstance(group, Pretended):
            return tensor
        dist.all_reduce(tensor, dist.ReduceOp.SUM if how == "sum" else dist.ReduceOp.MAX, group=group)
    return tensor


def gather_all(tensor: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    """The tensors of all ranks, which must have one shape."""
    ranks = size_of(group)
    if ranks == 1:
        return [tensor]
    _count(Traffic.gathering(tensor.nbytes, ranks))
    if isinstance(group, Pretended):
        return [tensor.clone() for _ in range(ranks)]
    found = [torch.empty_like(tensor) for _ in range(ranks)]
    dist.all_gather(found, tensor, group=group)
    return found
