from __future__ import annotations

import torch

from patchreg.memory import MemoryLog


def test_the_peak_is_divided_by_kinds_that_are_told_later():
    with MemoryLog() as log:
        first = torch.zeros(1000)
        second = first + 1  # the peak: 8000 bytes
        view = second[10:]
        del first
        third = torch.zeros(10)
        log.label("kept", second)
        log.suggest("other", view)  # shares memory with what was told already
        log.suggest("small", third)
    assert log.peak == 8000
    assert log.at_peak() == {"temporary": 4000, "kept": 4000}
    assert log.at_peak({"temporary"}) == {"kept": 4000, "small": 40}
    assert log.at_peak({"temporary", "kept"}) == {"small": 40}


def test_the_peak_is_looked_for_from_the_start_on_but_what_was_there_counts():
    with MemoryLog() as log:
        kept, large = torch.zeros(10), torch.zeros(1000)
        del large
        log.start()
        more = torch.zeros(20)
    assert log.at_peak() == {"temporary": 40 + 80}
    assert kept.numel() + more.numel() == 30


def test_what_an_operator_takes_inside_itself_counts_while_it_runs():
    def inside(func, args):
        return 500 if func is torch.ops.aten.mul.Tensor else 0

    with MemoryLog(inside) as log:
        x = torch.zeros(100)
        y = x * 2
        z = y + 1
    assert log.live == 1200
    assert log.at_peak() == {"temporary": 400 + 400 + 500}
    assert z.numel() == 100


def test_memory_made_again_in_the_same_place_is_another():
    with MemoryLog() as log:
        for kind in ("a", "b"):
            log.label(kind, torch.zeros(1000))
    assert log.at_peak() == {"a": 4000}
