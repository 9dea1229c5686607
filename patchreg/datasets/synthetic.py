"""Pairs of images synthesised from label maps."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.utils.data import Dataset

from patchreg.datasets.augmentation import WorldAugmentation
from patchreg.datasets.files import augmented, generator_for
from patchreg.datasets.pair import Pair
from patchreg.datasets.synthesis import Synthesis, crop_to_content
from patchreg.errors import InputError
from patchreg.spatial import Volume


class SyntheticPairs(Dataset[Pair]):
    """Two different label maps, each made into an image.

    Args:
        sources: functions that give label maps (1, I, J, K); each is called once and its label map kept, cut to its
            content, as int16.
        count: of pairs in an epoch.
        synthesis: how images are made.
        augmentation: random affine maps and deformations of each.
        seed: None draws new pairs always; a number gives the same pairs in the same order every time.
        thin: keep every n-th voxel of the label maps along each dimension, for stages that see no more.

    Raises:
        InputError: fewer than two label maps, or negative labels.
    """

    def __init__(
        self,
        sources: Sequence[Callable[[], Volume]],
        count: int,
        synthesis: Synthesis,
        augmentation: WorldAugmentation,
        seed: int | None,
        thin: int = 1,
    ) -> None:
        if len(sources) < 2:
            raise InputError(f"synthesis needs at least two label maps, got {len(sources)}")
        self.sources, self.count, self.seed, self.thin = list(sources), count, seed, thin
        self.synthesis, self.augmentation = synthesis, augmentation
        self._kept: dict[int, Volume] = {}

    def __len__(self) -> int:
        return self.count

    def load(self, index: int) -> Volume:
        """A label map, from memory after the first time."""
        if index not in self._kept:
            volume = crop_to_content(self.sources[index]()).thinned((self.thin,) * 3)
            if int(volume.data.min()) < 0 or int(volume.data.max()) > 32767:
                raise InputError(f"{volume.name}: labels must be from 0 to 32767 to synthesise images")
            self._kept[index] = Volume(volume.data.to(torch.int16), volume.grid, volume.name)
        return self._kept[index]

    def __getitem__(self, index: int) -> Pair:
        generator = generator_for(None if self.seed is None else self.seed + index)
        first, second = torch.randperm(len(self.sources), generator=generator)[:2].tolist()
        labels = self.load(first), self.load(second)
        largest = max(int(volume.data.max()) for volume in labels)
        contrasts = self.synthesis.draw_pair(largest, generator)
        fixed, moving = (
            self.synthesis.make(volume, contrast, self.synthesis.draw_strip(generator), generator)
            for volume, contrast in zip(labels, contrasts, strict=True)
        )
        name = f"{labels[1].name} to {labels[0].name}"
        return augmented(fixed, moving, labels[0], labels[1], self.augmentation, generator, name)
