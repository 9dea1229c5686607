"""Finding out together that a call is right, before anybody waits for a message that never comes."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from patchreg.distributed import communication as comm
from patchreg.errors import InputError


class Facts:
    """What one rank says about a call.

    Args:
        operation: its name.

    Attributes:
        own: two numbers that a rank has of its own, to be brought to all.
        gathered: after the agreement, those of every rank.
    """

    def __init__(self, operation: str) -> None:
        self._same: dict[str, str] = {"operation": operation}
        self.own = (0, 0)
        self.gathered: list[tuple[int, int]] = []

    def same(self, **facts: object) -> None:
        """Add what must be the same on all ranks."""
        self._same |= {name: str(fact) for name, fact in facts.items()}

    def tensor(self, name: str, tensor: Tensor | None, split: int | None = None) -> None:
        """Add what must be the same of a tensor: all but the size of the dimension along which it is split."""
        if tensor is None:
            self.same(**{name: None})
            return
        shape = ["split" if dim == split else size for dim, size in enumerate(tensor.shape)]
        wants = tensor.requires_grad and torch.is_grad_enabled()
        self.same(**{name: f"{tensor.dtype} {shape} on {tensor.device.type}, {'with' if wants else 'no'} gradient"})

    @property
    def text(self) -> str:
        """All that must be the same."""
        return json.dumps(self._same)

    @property
    def digest(self) -> int:
        """A number that stands for it."""
        return int.from_bytes(hashlib.blake2b(self.text.encode(), digest_size=7).digest(), "big")


@contextlib.contextmanager
def agreement(operation: str, group: dist.ProcessGroup, check: bool = True) -> Iterator[Facts]:
    """Check the arguments of a call within the block; all ranks leave it, or all ranks raise.

    The cost is one gathering of 32 bytes of every rank, for which all wait; where the group has no CPU backend the host waits
    for the GPU, too.

    Args:
        operation: its name.
        group: all its ranks must come here.
        check: False: nothing is exchanged; what is wrong on one rank leaves the others waiting until the group's timeout.

    Raises:
        InputError: this rank's own error, another rank's, or what they do not agree upon.
    """
    facts = Facts(operation)
    try:
        yield facts
    except Exception:
        if check:
            _tell(facts, True, group)
        raise
    if check:
        _settle(facts, group)


def traffic(ranks: int) -> comm.Traffic:
    """What an agreement sends."""
    return comm.Traffic.gathering(32, ranks)


def _tell(facts: Facts, failed: bool, group: dist.ProcessGroup) -> list[list[int]]:
    numbers = [int(failed), facts.digest, *facts.own]
    mine = torch.tensor(numbers, dtype=torch.int64, device=comm.control_device(group))
    return [tensor.tolist() for tensor in comm.gather_all(mine, group)]


def _settle(facts: Facts, group: dist.ProcessGroup) -> None:
    said = _tell(facts, False, group)
    failed = [rank for rank, numbers in enumerate(said) if numbers[0]]
    if failed:
        raise InputError(f"rank {failed[0]} of the group raised an error in the same call: see what it says")
    if len({numbers[1] for numbers in said}) > 1:
        raise InputError(_difference(facts, group))
    facts.gathered = [(numbers[2], numbers[3]) for numbers in said]


def _difference(facts: Facts, group: dist.ProcessGroup) -> str:
    """Who says what, of the first thing that the ranks do not agree upon."""
    device = comm.control_device(group)
    text = torch.tensor(list(facts.text.encode()), dtype=torch.uint8, device=device)
    lengths = [int(n) for n in comm.gather_all(torch.tensor([text.numel()], device=device), group)]
    padded = torch.nn.functional.pad(text, (0, max(lengths) - text.numel()))
    texts = [bytes(t[:n].tolist()).decode() for t, n in zip(comm.gather_all(padded, group), lengths, strict=True)]
    all_facts = [json.loads(text) for text in texts]
    for name in dict.fromkeys(name for each in all_facts for name in each):
        values = [each.get(name, "missing") for each in all_facts]
        if len(set(values)) > 1:
            other = next(rank for rank, value in enumerate(values) if value != values[0])
            operation = all_facts[0]["operation"]
            return (
                f"the ranks do not agree in {operation}: {name} is {values[0]} on rank 0 and {values[other]} on rank "
                f"{other} of the group; every rank must call it with the same arguments"
            )
    raise AssertionError("the same facts have one digest")
