"""The files of a registration, written as a whole or, by several processes, each its slab."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from torch import Tensor

from patchreg.distributed.partition import Partition
from patchreg.distributed.slab import Slab
from patchreg.inference.ranks import Ranks
from patchreg.io import SlabContents, SlabSink, Storage, nifti, staged_slabs, write_vectors
from patchreg.spatial import Grid, Volume


@dataclass(frozen=True)
class OutputFolder:
    """Where files go: ``.nii.gz`` from one process; from several, ``.nii`` or ``.ome.zarr``, which need no process that
    holds the whole.

    Args:
        path: of the folder, which is there.
        ranks: who write.
        zarr: write images, where several processes do, as OME-Zarr.
    """

    path: Path
    ranks: Ranks
    zarr: bool = False

    def image(self, name: str, volume: Volume, header: nib.Nifti1Header, storage: Storage | None = None) -> None:
        """Write a volume (1, I, J, K).

        Args:
            name: of the file, without its ending.
            volume: on a slab, this rank's part.
            header: whose orientation codes and units are kept.
            storage: how to store voxels. None: as the tensor has them.
        """
        if self.ranks.group is None:
            nifti.write(self.path / f"{name}.nii.gz", volume.data[0], volume.grid, header, storage)
            return
        storage = storage or Storage(np.dtype(str(volume.data.dtype).removeprefix("torch.")))
        if self.zarr and (storage.slope, storage.intercept) != (1.0, 0.0):
            storage = Storage(np.dtype(np.float32))  # OME-Zarr has no scaling
        contents = SlabContents(volume.grid.whole, 1, storage, header)
        self._shared(f"{name}{'.ome.zarr' if self.zarr else '.nii'}", volume.data, volume.grid, contents)

    def vectors(self, name: str, displacement_mm: Tensor, grid: Grid, header: nib.Nifti1Header) -> None:
        """Write a displacement (1, 3, I, J, K) on a grid, RAS mm, as ITK has it; of a slab this rank's part."""
        if self.ranks.group is None:
            write_vectors(self.path / f"{name}.nii.gz", displacement_mm, grid, header)
            return
        contents = SlabContents(grid.whole, 3, like=header, displacement=True)
        self._shared(f"{name}.nii", displacement_mm[0], grid, contents)

    def by_first(self, write: Callable[[Path], None]) -> None:
        """Let the first process write something small."""
        with self.ranks.together():
            if self.ranks.first:
                write(self.path)

    def _shared(self, name: str, data: Tensor, grid: Grid, contents: SlabContents) -> None:
        partition, start = Partition((grid.shape[0],)), 0
        if isinstance(grid, Slab):
            partition, start = grid.partition, grid.partition.starts[grid.rank]
        with ExitStack() as stack:
            made: SlabSink | None = None
            with self.ranks.together():
                if self.ranks.first:
                    made = stack.enter_context(
                        staged_slabs(self.path / name, contents, partition.dim - 2, partition.starts)
                    )
            sink = self.ranks.from_first(made)
            assert sink is not None
            with self.ranks.together():
                if grid.is_part or self.ranks.first:
                    sink.write(start, data)
            with self.ranks.together():
                stack.close()
