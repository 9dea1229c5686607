"""LightningDataModules: pairs from files, from label maps, from phantoms."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import lightning as L
import torch
import torchio as tio
from torch.utils.data import DataLoader, Dataset

from patchreg.datasets.augmentation import WorldAugmentation
from patchreg.datasets.example import Example
from patchreg.datasets.files import FilePairs
from patchreg.datasets.manifest import SPLITS, Entry, read_manifest
from patchreg.datasets.pair import Pair, collate
from patchreg.datasets.phantom import phantom, phantom_grid
from patchreg.datasets.synthesis import Synthesis
from patchreg.datasets.synthetic import SyntheticPairs
from patchreg.errors import InputError
from patchreg.io import read_grid, read_image
from patchreg.spatial import Grid, Volume


class PairDataModule(L.LightningDataModule):
    """What all sources of pairs share.

    Args:
        batch_size: pairs in a batch.
        num_workers: processes that load and make images.
    """

    def __init__(self, batch_size: int = 1, num_workers: int = 0) -> None:
        super().__init__()
        self.batch_size, self.num_workers = batch_size, num_workers

    def dataset(self, split: str) -> Dataset[Pair]:
        """The pairs of ``"train"``, ``"val"`` or ``"test"``."""
        raise NotImplementedError

    def example(self) -> Example:
        """What a training pair is like, found without reading or making a voxel."""
        return Example(f"{type(self).__name__} does not say")

    def train_dataloader(self) -> DataLoader[Pair]:
        return self._loader("train", shuffle=True)

    def val_dataloader(self) -> DataLoader[Pair]:
        return self._loader("val", shuffle=False)

    def test_dataloader(self) -> DataLoader[Pair]:
        return self._loader("test", shuffle=False)

    def predict_dataloader(self) -> DataLoader[Pair]:
        return self._loader("test", shuffle=False)

    def _loader(self, split: str, shuffle: bool) -> DataLoader[Pair]:
        return DataLoader(
            self.dataset(split),
            batch_size=self.batch_size if split == "train" else 1,
            shuffle=shuffle,
            num_workers=self.num_workers,
            collate_fn=collate,
            persistent_workers=self.num_workers > 0,
        )


class ManifestDataModule(PairDataModule):
    """Pairs of image files listed in a manifest.

    Args:
        manifest: CSV or JSON; rows of ``image, labels, split`` are paired as ``pairing`` says, rows of ``fixed, moving,
            fixed_labels, moving_labels, split`` are taken as they are.
        pairing: ``"all-to-all"``, every ordered pair of different images; ``"to-atlas"``, every image to the atlas.
        atlas: fixed image of all pairs where ``pairing`` is ``"to-atlas"``.
        atlas_labels: its label map.
        pairs_per_epoch: drawn at random in training. None: as many as there are.
        validation_pairs: at most, in validation and in testing, spread over all there are.
        transform: a torchio transform of each training image and its labels.
        augmentation: random affine maps and deformations of each training image.
        batch_size: pairs in a batch.
        num_workers: processes that load images.
    """

    def __init__(
        self,
        manifest: str,
        pairing: str = "all-to-all",
        atlas: str | None = None,
        atlas_labels: str | None = None,
        pairs_per_epoch: int | None = None,
        validation_pairs: int = 16,
        transform: tio.Transform | None = None,
        augmentation: WorldAugmentation | None = None,
        batch_size: int = 1,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size, num_workers)
        if pairing not in ("all-to-all", "to-atlas"):
            raise InputError(f"pairing must be 'all-to-all' or 'to-atlas', got {pairing!r}")
        if (pairing == "to-atlas") != (atlas is not None):
            raise InputError("pairing 'to-atlas' needs an atlas, and only it takes one")
        self.manifest, self.pairing = Path(manifest), pairing
        self.atlas = None if atlas is None else Entry(Path(atlas), None if atlas_labels is None else Path(atlas_labels))
        self.pairs_per_epoch, self.validation_pairs = pairs_per_epoch, validation_pairs
        self.transform, self.augmentation = transform, augmentation

    def pairs(self, split: str) -> list[tuple[Entry, Entry]]:
        """All pairs of a split."""
        found = read_manifest(self.manifest, split)
        if found.pairs and self.atlas is None:
            return list(found.pairs)
        if self.atlas is not None:
            return [(self.atlas, image) for image in found.images]
        return list(itertools.permutations(found.images, 2))

    def dataset(self, split: str) -> Dataset[Pair]:
        pairs = self.pairs(split)
        if not pairs:
            raise InputError(
                f"{self.manifest}: has no pairs for split {split!r}; give its rows a column 'split' ({', '.join(SPLITS)})"
            )
        if split == "train":
            return FilePairs(pairs, self.pairs_per_epoch or len(pairs), self.transform, self.augmentation)
        step = max(1, len(pairs) // self.validation_pairs)
        return FilePairs(pairs[::step][: self.validation_pairs], None)

    def example(self) -> Example:
        """The header of the atlas, or of the first training image."""
        try:
            entry = self.atlas
            if entry is None:
                found = read_manifest(self.manifest, "train")
                entry = next(iter(found.images), None) or next((fixed for fixed, _ in found.pairs), None)
            if entry is None or entry.image is None:
                return Example(f"{self.manifest}: has no training images")
            grid = read_grid(entry.image)[0]
        except InputError as error:
            return Example(str(error))
        changed = "" if self.transform is None else ", before data.transform"
        return Example(f"{entry.image}{changed}", grid, None if entry.labels is None else torch.int32)


class SynthesisDataModule(PairDataModule):
    """Pairs of images synthesised from label maps, so that training needs no images at all.

    Args:
        manifest: CSV or JSON with a column ``labels`` and one ``split``. None: pairs of procedural phantoms.
        synthesis: how images are made.
        augmentation: random affine maps and deformations of each image, in training and validation alike.
        pairs_per_epoch: drawn anew in every epoch.
        validation_pairs: always the same ones.
        phantoms: different heads where there is no manifest; a tenth of them, at least two, for each of validation and
            testing.
        phantom_spacing_mm: of their voxels.
        thin: keep every n-th voxel of the label maps along each dimension, for stages that see no more.
        batch_size: pairs in a batch.
        num_workers: processes that make images.
    """

    def __init__(
        self,
        manifest: str | None = None,
        synthesis: Synthesis | None = None,
        augmentation: WorldAugmentation | None = None,
        pairs_per_epoch: int = 200,
        validation_pairs: int = 8,
        phantoms: int = 40,
        phantom_spacing_mm: float = 2.0,
        thin: int = 1,
        batch_size: int = 1,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size, num_workers)
        self.manifest = None if manifest is None else Path(manifest)
        self.synthesis, self.augmentation = synthesis or Synthesis(), augmentation or WorldAugmentation()
        self.pairs_per_epoch, self.validation_pairs = pairs_per_epoch, validation_pairs
        self.phantoms, self.phantom_spacing_mm, self.thin = phantoms, phantom_spacing_mm, thin

    def sources(self, split: str) -> Sequence[Callable[[], Volume]]:
        """Functions that give the label maps of a split."""
        if self.manifest is None:
            held_out = max(2, self.phantoms // 10)
            starts = {"train": 0, "val": self.phantoms - 2 * held_out, "test": self.phantoms - held_out}
            stops = {"train": starts["val"], "val": starts["test"], "test": self.phantoms}
            return [partial(phantom, seed, self.phantom_spacing_mm) for seed in range(starts[split], stops[split])]
        entries = read_manifest(self.manifest, split).images
        return [partial(_read_labels, entry.labels) for entry in entries if entry.labels is not None]

    def dataset(self, split: str) -> Dataset[Pair]:
        sources = self.sources(split)
        if len(sources) < 2:
            where = self.manifest or "phantoms"
            raise InputError(f"{where}: split {split!r} has {len(sources)} label maps, and a pair needs two")
        count, seed = (
            (self.pairs_per_epoch, None) if split == "train" else (self.validation_pairs, SPLITS.index(split) * 10_000)
        )
        return SyntheticPairs(sources, count, self.synthesis, self.augmentation, seed, self.thin)

    def example(self) -> Example:
        """The header of the first label map; of phantoms their grid. The images are smaller, cut to the content."""
        stored = torch.int16
        if self.manifest is None:
            return Example("phantoms", _thinned(phantom_grid(self.phantom_spacing_mm), self.thin), stored)
        try:
            entries = read_manifest(self.manifest, "train").images
            maps = [entry.labels for entry in entries if entry.labels is not None]
            if not maps:
                return Example(f"{self.manifest}: has no training label maps", None, stored)
            grid = read_grid(maps[0])[0]
        except InputError as error:
            return Example(str(error), None, stored)
        thinned = "" if self.thin == 1 else f", thinned by {self.thin}"
        return Example(f"{maps[0]}{thinned}", _thinned(grid, self.thin), stored)


def _thinned(grid: Grid, step: int) -> Grid:
    return grid if step == 1 else grid.with_spacing([s * step for s in grid.spacing])


def _read_labels(path: Path) -> Volume:
    return read_image(path, "labels").volume
