"""Pairs of image files, read by torchio."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torchio as tio
from torch.utils.data import Dataset

from patchreg.datasets.augmentation import WorldAugmentation
from patchreg.datasets.manifest import Entry
from patchreg.datasets.pair import Pair
from patchreg.datasets.share import data_rank
from patchreg.errors import InputError
from patchreg.io import read_image
from patchreg.spatial import Affine, Transform, Volume, foreground


@dataclass(frozen=True, eq=False)
class _Loaded:
    image: Volume
    labels: Volume | None


class FilePairs(Dataset[Pair]):
    """Pairs of files.

    Args:
        pairs: (fixed, moving).
        count: of pairs in an epoch, drawn at random. None: every pair once, in order, without augmentation drawn anew.
        transform: a torchio transform of each image and its labels, for example of intensities.
        augmentation: random affine maps and deformations of each image.
        seed: of the augmentation where ``count`` is None, so that validation never changes.

    Raises:
        InputError: no pairs, or a file that is no image.
    """

    def __init__(
        self,
        pairs: Sequence[tuple[Entry, Entry]],
        count: int | None,
        transform: tio.Transform | None = None,
        augmentation: WorldAugmentation | None = None,
        seed: int = 0,
    ) -> None:
        if not pairs:
            raise InputError("the manifest has no pairs for this split")
        self.pairs, self.count, self.transform, self.seed = list(pairs), count, transform, seed
        self.augmentation = augmentation or WorldAugmentation()

    def __len__(self) -> int:
        return len(self.pairs) if self.count is None else self.count

    def __getitem__(self, index: int) -> Pair:
        generator = generator_for(None if self.count is not None else self.seed + index)
        if self.count is not None:
            index = int(torch.randint(len(self.pairs), (1,), generator=generator))
        entries = self.pairs[index]
        fixed, moving = (self._load(entry) for entry in entries)
        name = " to ".join((e.image or e.labels).name for e in reversed(entries))  # type: ignore[union-attr]
        return augmented(fixed.image, moving.image, fixed.labels, moving.labels, self.augmentation, generator, name)

    def _load(self, entry: Entry) -> _Loaded:
        if entry.image is None:
            raise InputError(f"{entry.labels}: has no image; use SynthesisDataModule for label maps alone")
        images: dict[str, tio.Image] = {"image": tio.ScalarImage(entry.image)}
        if entry.labels is not None:
            images["labels"] = tio.LabelMap(entry.labels)
        try:
            subject = tio.Subject(images)
            subject.load()
        except (RuntimeError, OSError, ValueError) as error:
            raise InputError(f"{entry.image}: cannot be read as an image ({error})") from error
        if self.transform is not None:
            subject = self.transform(subject)
        labels = read_image(subject["labels"], "labels").volume if entry.labels is not None else None
        return _Loaded(read_image(subject["image"]).volume, labels)


def generator_for(seed: int | None) -> torch.Generator:
    """A generator from a seed; or from torch's own random state, which Lightning seeds for every loader process, and
    the rank, as without such processes all ranks have one state."""
    if seed is None:
        seed = int(torch.randint(2**62, (1,))) + data_rank()
    return torch.Generator().manual_seed(seed)


def augmented(
    fixed: Volume,
    moving: Volume,
    fixed_labels: Volume | None,
    moving_labels: Volume | None,
    augmentation: WorldAugmentation,
    generator: torch.Generator,
    name: str,
) -> Pair:
    """A pair with random affine maps put into its grids, and random deformations beside them."""
    sides: list[tuple[Volume, Volume | None, Transform]] = []
    for image, labels in ((fixed, fixed_labels), (moving, moving_labels)):
        affine = augmentation.draw_affine(foreground(image).center_mm, generator)
        seen = _moved(image, affine)
        labelled = None if labels is None else _moved(labels, affine)
        sides.append((seen, labelled, augmentation.draw_warp(foreground(seen), generator)))
    (f, fl, fw), (m, ml, mw) = sides
    return Pair(f, m, fl, ml, fw, mw, name)


def _moved(volume: Volume, affine: Affine) -> Volume:
    return Volume(volume.data, volume.grid.moved(affine.matrix), volume.name)
