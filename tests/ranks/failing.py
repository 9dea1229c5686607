"""Work that fails in one of two processes, which needs nothing but torch."""

from __future__ import annotations

import os
import signal


class Options:
    """Of a command."""

    device, verbose = "cpu", False


def die(group, options):
    """As where a process takes too much memory."""
    if group.rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    group.barrier().wait()


def raise_error(group, options):
    """A mistake in the program."""
    if group.rank() == 0:
        raise KeyError("what nobody thought of")
    group.barrier().wait()
