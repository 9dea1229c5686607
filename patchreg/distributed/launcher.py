"""Lightning's launcher, which ends all processes of a node with a reason when one of them ends without success."""

from __future__ import annotations

import atexit
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from lightning.fabric.plugins import ClusterEnvironment
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher

from patchreg.distributed.failures import GRACE, Guard


class GridLauncher(_SubprocessScriptLauncher):
    """Starts a process for every device of a node, unless torchrun or SLURM did.

    Lightning's own kills all others, the first process included, up to five seconds after one has ended, whatever they
    were about to say, and does not end the others when the first dies. Here they learn of it from each other (see
    :mod:`patchreg.distributed.failures`), and are killed if they are still there a while later.

    Args:
        environment: of the processes.
        processes: on this node.
        nodes: how many.
        guard: turns what a process raises into what the user should know.
    """

    def __init__(self, environment: ClusterEnvironment, processes: int, nodes: int, guard: Guard) -> None:
        super().__init__(environment, processes, nodes)
        self._guard = guard

    def launch(self, function: Callable[..., Any], *args: Any, trainer: Any = None, **options: Any) -> Any:
        self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        if not self.cluster_environment.creates_processes_externally:
            self._call_children_scripts()
            atexit.register(self._reap)
            threading.Thread(target=self._watch, name="children", daemon=True).start()
        try:
            return function(*args, **options)
        except BaseException as error:
            instead = self._guard.explain(error)
            if instead is None:
                raise
            raise instead from error

    def _watch(self) -> None:
        """Wait for a child to fail; then this process has a while to end by itself."""
        while not any(codes := [child.poll() for child in self.procs]):
            if all(code == 0 for code in codes):
                return
            time.sleep(0.5)
        time.sleep(GRACE)
        for child in self.procs:
            if child.poll() is None:
                child.kill()
        code = next(code for code in codes if code)
        sys.stderr.write("patchreg: a process of this training ended without success: see its message\n")
        sys.stderr.flush()
        os._exit(code if 0 < code < 128 else 1)

    def _reap(self) -> None:
        """At the exit of this process, if it has failed: see to it that its children end."""
        until = time.monotonic() + GRACE
        for child in self.procs if self._guard.has_failed else ():
            try:
                child.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.kill()
