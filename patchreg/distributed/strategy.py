"""Training on volumes that are split over several processes, as a strategy of Lightning."""

from __future__ import annotations

import logging
import os
from datetime import timedelta
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.utilities.seed import pl_worker_init_function
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import PostLocalSGDState
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

from patchreg.cascade import PatchCascade
from patchreg.datasets.share import draw_as
from patchreg.distributed.batches import share_out
from patchreg.distributed.communication import check_sends_from
from patchreg.distributed.convert import convert_sharded
from patchreg.distributed.failures import Guard, Training
from patchreg.distributed.gradients import Hook, mean_of_sums
from patchreg.distributed.launcher import GridLauncher
from patchreg.errors import InputError

log = logging.getLogger(__name__)

TIMEOUT = timedelta(minutes=10)
"""How long a process waits for another. A step's exchanges come within seconds; reading the next pair may take minutes."""


class GridParallelStrategy(DDPStrategy):
    """Data parallelism whose replicas are groups of processes, each of which shares one volume.

    The processes form a mesh of two axes, ``data`` and ``grid``. The ranks of a grid are neighbours (0 to n - 1, n to
    2 n - 1, ...), so that those of one node share a volume. They get the same pair, keep their slab of each of its volumes
    and run the networks together, exchanging halos. Grids get different pairs: with R processes in grids of n, sampling,
    random numbers, batch size, learning rate and logged values are those of plain data parallelism with R / n.

    Gradients: every rank of a grid has its part of the gradient of each parameter, the gradient is the sum of the parts,
    and the mean is taken over the grids. Both are one all-reduce of each of DDP's buckets while the backward pass runs.

    What runs on slabs: the network of each stage of every :class:`patchreg.cascade.PatchCascade` in the module; where
    there is none, each direct child module. They are converted in place, by
    :func:`patchreg.distributed.convert.convert_sharded`: parameters and names stay, and so do checkpoints, which are those
    of plain data parallelism and continue on any number of processes. Every :class:`patchreg.spatial.Volume` in a batch
    becomes a volume on a :class:`patchreg.distributed.slab.Slab` before it goes to the device; one with fewer than two
    planes for each rank stays whole. A module of your own enters ``volume.grid.scope()`` around its networks, and must give
    a loss that is the same on all ranks of a grid.

    A process that fails or dies ends all of them, with the reason (:class:`patchreg.errors.RankLost`).

    Args:
        grid_parallel_size: ranks that share a volume. None: all.
        timeout: how long a process waits for another that is alive but does not answer.
        process_group_backend: None: NCCL on GPUs, Gloo on CPUs.
        ddp_comm_hook: one that gives the mean over all ranks, as those of torch that compress; on any device.
        options: of Lightning's ``DDPStrategy`` and of torch's ``DistributedDataParallel``.

    Raises:
        InputError: a size that does not divide the number of processes, or an option that cannot be combined.

    References:
        Jena et al. 2025 (FFDP), arXiv:2509.25044, sec. 3.
    """

    def __init__(
        self,
        grid_parallel_size: int | None = None,
        timeout: timedelta | None = TIMEOUT,
        process_group_backend: str | None = None,
        **options: Any,
    ) -> None:
        if grid_parallel_size is not None and grid_parallel_size < 1:
            raise InputError(
                f"grid_parallel_size must be at least 1, or null for all processes, got {grid_parallel_size}"
            )
        if options.get("start_method", "popen") != "popen":
            raise InputError(
                f"start_method {options['start_method']!r}: processes of a grid are started anew (popen), by torchrun or by SLURM"
            )
        averaging = options.get("model_averaging_period") is not None
        if averaging or isinstance(options.get("ddp_comm_state"), PostLocalSGDState):
            raise InputError(
                "averaging models instead of gradients (post-local SGD) cannot be combined with grid parallelism"
            )
        if options.get("process_group") is not None:
            raise InputError("process_group is what the strategy makes: leave it out")
        timeout = timeout or TIMEOUT
        super().__init__(timeout=timeout, process_group_backend=process_group_backend, **options)
        self._wanted_size, self._seconds = grid_parallel_size, timeout.total_seconds()
        self._mesh: DeviceMesh | None = None

    # The mesh

    @property
    def grid_parallel_size(self) -> int:
        """Ranks that share a volume."""
        return self._world if self._wanted_size is None else self._wanted_size

    @property
    def data_parallel_size(self) -> int:
        """Volumes, or batches of them, that are trained on at a time."""
        return self._world // self.grid_parallel_size

    @property
    def data_rank(self) -> int:
        """This rank's coordinate on the axis ``data``."""
        return self.global_rank // self.grid_parallel_size

    @property
    def grid_rank(self) -> int:
        """This rank's coordinate on the axis ``grid``."""
        return self.global_rank % self.grid_parallel_size

    @property
    def mesh(self) -> DeviceMesh:
        """All ranks, with the axes ``data`` and ``grid``."""
        if self._mesh is None:
            raise InputError("the mesh is made when the trainer starts: the processes are not connected yet")
        return self._mesh

    @property
    def grid_group(self) -> dist.ProcessGroup:
        """The ranks that share a volume with this one."""
        return self.mesh.get_group("grid")

    @property
    def data_group(self) -> dist.ProcessGroup:
        """The ranks that hold the same part of other volumes."""
        return self.mesh.get_group("data")

    @property
    def _world(self) -> int:
        return self.num_nodes * self.num_processes

    def set_world_ranks(self) -> None:
        """Called when the trainer is made: what is wrong is found on every rank before anything waits."""
        size = self.grid_parallel_size
        if self._world % size:
            raise InputError(
                f"grid_parallel_size {size} does not divide the {self._world} processes ({self.num_processes} devices on each "
                f"of {self.num_nodes} nodes): set trainer.devices to a multiple of it"
            )
        super().set_world_ranks()
        if self.num_nodes > 1 and self.num_processes % size and self.is_global_zero:
            log.warning("grids of %d ranks on nodes of %d: halos travel between nodes", size, self.num_processes)

    def setup_distributed(self) -> None:
        super().setup_distributed()
        if dist.get_world_size() != self._world:
            raise InputError(f"{dist.get_world_size()} processes are connected, the trainer has {self._world}")
        if self._mesh is None:
            self._mesh = self._make_mesh()
        if self.grid_parallel_size > 1:
            check_sends_from(self.root_device, self.grid_group)
        assert self.lightning_module is not None
        self.lightning_module._device_mesh = self._mesh
        draw_as(self.data_rank)
        assert self.cluster_environment is not None
        self._guard.connect(self.broadcast, self.cluster_environment.main_address, self.lightning_module._trainer)

    def _make_mesh(self) -> DeviceMesh:
        """All ranks in groups of their own, even where one has all ranks: halos must not queue behind gradients.

        Beside NCCL they have Gloo, so that no GPU waits for the small messages by which ranks agree.
        """
        ranks = torch.arange(self._world).view(self.data_parallel_size, self.grid_parallel_size)
        backend = "cpu:gloo,cuda:nccl" if dist.get_backend() == "nccl" else None
        mine: list[dist.ProcessGroup] = []
        for axis, groups in (("data", ranks.T), ("grid", ranks)):
            for group in groups.tolist():  # all ranks make all groups, in the same order
                made = dist.new_group(group, timedelta(seconds=self._seconds), backend, group_desc=f"{axis} axis")
                if self.global_rank in group:
                    assert isinstance(made, dist.ProcessGroup)
                    mine.append(made)
        device = self.root_device.type
        return DeviceMesh.from_group(mine, device, mesh=ranks, mesh_dim_names=("data", "grid"))

    # Data

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        return {"num_replicas": self.data_parallel_size, "rank": self.data_rank}

    def process_dataloader(self, dataloader: object) -> object:
        """Loader processes draw what those of data parallelism with a process for each grid would draw."""
        seeded = int(os.environ.get("PL_SEED_WORKERS", "0"))
        if seeded and getattr(dataloader, "worker_init_fn", self) is None:
            dataloader.worker_init_fn = partial(pl_worker_init_function, rank=self.data_rank)  # type: ignore[attr-defined]
        return super().process_dataloader(dataloader)

    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        """Keep this rank's slab of every volume of a batch, and move it to the device.

        Raises:
            InputError: the ranks of a grid were given different volumes.
        """
        if self.grid_parallel_size > 1:
            batch = share_out(batch, self.grid_group)
        return super().batch_to_device(batch, device, dataloader_idx)

    # The module

    def setup(self, trainer: pl.Trainer) -> None:
        if self.grid_parallel_size > 1:
            assert self.lightning_module is not None
            for network in networks_of(self.lightning_module):
                convert_sharded(network)
        super().setup(trainer)

    def _register_ddp_hooks(self) -> None:
        hook: Hook | None = self._ddp_comm_hook
        if hook is not None and self._ddp_comm_wrapper is not None:
            hook = self._ddp_comm_wrapper(hook)
        if hook is not None or self.grid_parallel_size > 1:
            assert isinstance(self.model, DistributedDataParallel)
            self.model.register_comm_hook(self._ddp_comm_state, mean_of_sums(self.grid_parallel_size, hook))

    def reduce(self, tensor: Tensor, group: Any = None, reduce_op: Any = "mean") -> Tensor:
        """As with data parallelism: the ranks of a grid say the same, and a sum over all counts each grid once."""
        if group is None and str(reduce_op).lower().rsplit(".", 1)[-1] == "sum" and self._mesh is not None:
            group = self.data_group
        return super().reduce(tensor, group, reduce_op)

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:  # noqa: A002  Lightning's name
        """Of all ranks, not of all grids."""
        votes = super().reduce(torch.tensor(int(decision), device=self.root_device), reduce_op="sum")
        return int(votes) == self.world_size if all else int(votes) > 0

    # Failures

    def _configure_launcher(self) -> None:
        assert self.cluster_environment is not None
        self._guard = Guard(Training(self.global_rank, self._world, self.grid_parallel_size, self._seconds))
        self._launcher = GridLauncher(self.cluster_environment, self.num_processes, self.num_nodes, self._guard)

    def teardown(self) -> None:
        if self.lightning_module is not None:
            self.lightning_module._device_mesh = None  # which cannot be copied or pickled
        super().teardown()
        draw_as(None)
        self._guard.close()


StrategyRegistry.register(
    "grid_parallel",
    GridParallelStrategy,
    description="Volumes split over all processes, or over groups of them",
    override=True,
)


def networks_of(module: nn.Module) -> list[nn.Module]:
    """What runs on slabs: the networks of all cascades in the module, or else its children."""
    cascades = [m for m in module.modules() if isinstance(m, PatchCascade)]
    if cascades:
        return [stage.network for cascade in cascades for stage in cascade.stages]  # type: ignore[misc]
    return list(module.children())
