"""Patches of images and of the same images at low resolution, to learn the one from the other."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import lightning as L
import torch
import torch.nn.functional as F
import torchio as tio
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from patchreg.datasets.manifest import SPLITS, read_manifest
from patchreg.datasets.modules import SynthesisDataModule
from patchreg.datasets.synthesis import Synthesis, crop_to_content
from patchreg.errors import InputError
from patchreg.spatial import Volume
from patchreg.spatial.foreground import percentile

IMAGE, CONTENT = "image", "content"
BACKGROUND = 0.05
"""Of the range: where all channels are smaller in size, no patch has its centre."""


class SuperResolutionDataModule(L.LightningDataModule):
    """Patches of images, and their means over blocks of voxels: what a scanner of lower resolution would give.

    Each image is divided by the 99.9th percentile of its absolute values, so that it runs from 0 (or -1) to about 1.
    Patches lie at random around voxels that are not background. Batches are dictionaries: ``"high"`` (B, C, rP, rP, rP)
    and ``"low"`` (B, C, P, P, P), float32.

    Args:
        manifest: CSV or JSON with a column ``image`` (of one or more channels) and one ``split``; no subject in two
            splits. None: images made from procedural heads.
        upsampling: r, voxels of a block along each axis.
        patch: P, low-resolution voxels along each side.
        patches_per_image: each time that an image is read.
        validation_patches: of each image of validation and testing, always the same ones.
        queue: patches kept in memory, from which batches are drawn in random order.
        phantoms: different heads where there is no manifest; a tenth of them, at least two, for each of validation and
            testing.
        phantom_spacing_mm: of their voxels, at high resolution.
        synthesis: how images of the heads are made.
        batch_size: patches in a batch.
        num_workers: processes that read images.

    Raises:
        InputError: sizes from which no patches can be made.

    References:
        Alexander et al. 2017, doi:10.1016/j.neuroimage.2017.02.089, for low resolution by means over blocks; Blumberg et
        al. 2018, arXiv:1808.05577, section 3, for patches of 11^3.
    """

    def __init__(
        self,
        manifest: str | None = None,
        upsampling: int = 2,
        patch: int = 11,
        patches_per_image: int = 64,
        validation_patches: int = 64,
        queue: int = 1024,
        phantoms: int = 20,
        phantom_spacing_mm: float = 2.0,
        synthesis: Synthesis | None = None,
        batch_size: int = 32,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        counts = (patch, patches_per_image, validation_patches, batch_size)
        if min(counts) < 1 or upsampling < 2 or queue < patches_per_image:
            raise InputError(
                "super-resolution takes positive counts, upsampling from 2, and a queue of at least patches_per_image; "
                f"got patch, patches_per_image, validation_patches, batch_size {counts}, upsampling {upsampling} and "
                f"queue {queue}"
            )
        self.manifest = None if manifest is None else Path(manifest)
        self.upsampling, self.patch, self.queue = upsampling, patch, queue
        self.patches_per_image, self.validation_patches = patches_per_image, validation_patches
        self.synthesis = synthesis or Synthesis(thick_probability=0.0, blur_mm=0.0, noise=0.0)
        self.phantoms, self.phantom_spacing_mm = phantoms, phantom_spacing_mm
        self.batch_size, self.num_workers = batch_size, num_workers
        self._made: dict[str, list[tio.Subject]] = {}

    def subjects(self, split: str) -> list[tio.Subject]:
        """The images of ``"train"``, ``"val"`` or ``"test"``, files unread, made ones made once."""
        if self.manifest is not None:
            images = [entry.image for entry in read_manifest(self.manifest, split).images]
            if not images or None in images:
                raise InputError(
                    f"{self.manifest}: split {split!r} has no images, or rows without one; give a column 'image'"
                )
            return [tio.Subject({IMAGE: tio.ScalarImage(path)}) for path in images]
        if split not in self._made:
            heads = SynthesisDataModule(phantoms=self.phantoms, phantom_spacing_mm=self.phantom_spacing_mm)
            start = SPLITS.index(split) * 10_000
            self._made[split] = [
                _made(self.synthesis, crop_to_content(source()), start + index)
                for index, source in enumerate(heads.sources(split))
            ]
        return self._made[split]

    def train_dataloader(self) -> DataLoader[tio.Subject]:
        dataset = tio.SubjectsDataset(self.subjects("train"), transform=_prepared)
        ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        queue = tio.Queue(
            dataset,
            self.queue,
            self.patches_per_image * ranks,  # of its own images; Lightning divides the epoch by the ranks
            self._sampler(),
            subject_sampler=DistributedSampler(dataset) if ranks > 1 else None,
            num_workers=self.num_workers,
            shuffle_subjects=ranks == 1,
        )
        return self._loader(queue)

    def val_dataloader(self) -> DataLoader[tio.Subject]:
        return self._loader(self.fixed_patches("val"))

    def test_dataloader(self) -> DataLoader[tio.Subject]:
        return self._loader(self.fixed_patches("test"))

    def fixed_patches(self, split: str) -> Dataset[tio.Subject]:
        """Always the same patches of the images of a split."""
        sampler = self._sampler()
        patches: list[tio.Subject] = []
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SPLITS.index(split))
            for subject in tio.SubjectsDataset(self.subjects(split), transform=_prepared):
                patches.extend(sampler(subject, self.validation_patches))
        return _Listed(patches)

    def _sampler(self) -> tio.WeightedSampler:
        return tio.WeightedSampler(self.patch * self.upsampling, CONTENT)

    def _loader(self, dataset: Dataset[tio.Subject]) -> DataLoader[tio.Subject]:
        return DataLoader(dataset, self.batch_size, collate_fn=partial(_collate, upsampling=self.upsampling))


class _Listed(Dataset[tio.Subject]):
    def __init__(self, patches: Sequence[tio.Subject]) -> None:
        self.patches = patches

    def __len__(self) -> int:
        return len(self.patches)

    def __getitem__(self, index: int) -> tio.Subject:
        return self.patches[index]


def _collate(patches: Sequence[tio.Subject], upsampling: int) -> dict[str, Tensor]:
    high = torch.stack([patch[IMAGE].data.float() for patch in patches])
    return {"low": F.avg_pool3d(high, upsampling), "high": high}


def _made(synthesis: Synthesis, labels: Volume, seed: int) -> tio.Subject:
    generator = torch.Generator().manual_seed(seed)
    contrast = synthesis.draw_contrast(int(labels.data.max()), generator)
    image = synthesis.make(labels, contrast, synthesis.draw_strip(generator), generator)
    return tio.Subject({IMAGE: tio.ScalarImage(tensor=image.data, affine=image.grid.affine.numpy())})


def _prepared(subject: tio.Subject) -> tio.Subject:
    """Scale the image, and say where patches may have their centres."""
    image = subject[IMAGE]
    data = image.data.float()
    data = data / max(percentile(data.abs(), 99.9), torch.finfo(torch.float32).tiny)
    content = (data.abs() > BACKGROUND).any(dim=0, keepdim=True)
    return tio.Subject(
        {
            IMAGE: tio.ScalarImage(tensor=data, affine=image.affine),
            CONTENT: tio.Image(tensor=content.float(), affine=image.affine, type=tio.SAMPLING_MAP),
        }
    )
