from __future__ import annotations

import pytest
import torch

from patchreg.datasets import SynthesisDataModule, WorldAugmentation, phantom
from patchreg.datasets.synthesis import Synthesis, crop_to_content
from patchreg.errors import InputError
from patchreg.spatial import Grid, MappedGrid, Volume

QUIET = {"texture": 0.0, "bias": 0.0, "blur_mm": 0.0, "thick_probability": 0.0, "noise": 0.0, "gamma": 0.0}


def test_without_randomness_the_image_is_its_contrast(generator):
    labels = phantom(0, 6.0)
    contrast = torch.linspace(0, 1, 600)
    image = Synthesis(**QUIET).make(labels, contrast, False, generator)
    expected = contrast[labels.data.long()]
    assert torch.allclose(image.data, expected / expected.max(), atol=1e-6)
    assert image.grid == labels.grid


def test_groups_share_an_intensity(generator):
    contrast = Synthesis(groups=[[2, 41], [3, 42]]).draw_contrast(60, generator)
    assert contrast[2] == contrast[41] != contrast[3] == contrast[42]
    assert len(contrast.unique()) > 50


def test_pairs_share_contrast_as_often_as_asked(generator):
    for probability in (0.0, 1.0):
        first, second = Synthesis(same_contrast_probability=probability).draw_pair(100, generator)
        assert (float((first - second).abs().mean()) < 0.03) == (probability == 1)


def test_stripping_leaves_the_content(generator):
    labels = phantom(0, 6.0)
    synthesis = Synthesis(content=[2, 3, 41, 42], strip_probability=1.0, **QUIET)
    assert synthesis.draw_strip(generator)
    image = synthesis.make(labels, torch.full((600,), 0.5), True, generator)
    kept = torch.isin(labels.data, torch.tensor([2, 3, 41, 42]))
    assert image.data[kept].min() > 0.9
    assert image.data[~kept].max() == 0


def test_crop_and_thick_slices_stay_in_place(generator):
    """Whatever the random crop and slice thickness, the image shows the labels where they are in the world."""
    labels = phantom(0, 4.0)
    contrast = torch.zeros(600)
    contrast[[2, 41, 3, 42]] = 1.0
    reference = Synthesis(**QUIET).make(labels, contrast, False, generator)
    synthesis = Synthesis(**{**QUIET, "thick_probability": 1.0}, crop=0.2, thickness_mm=12.0)
    seen = set()
    for _ in range(6):
        image = synthesis.make(labels, contrast, False, generator)
        seen.add(image.grid.shape)
        expected = MappedGrid.identity(image.grid).sample(reference)[0]
        error = (image.data / image.data.max() - expected).abs().mean()
        assert error < 0.1
    assert len(seen) > 3


def test_noise_and_bias_change_the_image_but_not_its_range(generator):
    labels = phantom(0, 6.0)
    image = Synthesis().make(labels, torch.rand(600), False, generator)
    assert torch.isfinite(image.data).all()
    assert float(image.data.min()) >= 0
    assert float(image.data.max()) < 2


def test_crop_to_content():
    grid = Grid.aligned((0, 0, 0), (20, 20, 20), 1.0)
    data = torch.zeros((1, 20, 20, 20), dtype=torch.int32)
    data[0, 8:10, 5, 12] = 3
    cut = crop_to_content(Volume(data, grid), margin=2)
    assert cut.grid.shape == (6, 5, 5)
    where = cut.data[0].nonzero()[0]
    assert torch.allclose(cut.grid.to_world(where), grid.to_world(torch.tensor([8.0, 5, 12])))
    with pytest.raises(InputError, match="no label but zero"):
        crop_to_content(Volume(torch.zeros_like(data), grid, "empty"))


@pytest.mark.parametrize("bad", [{"strip_probability": 1.5}, {"noise": -1.0}, {"crop": 0.6}, {"bias_points": 1}])
def test_bad_settings(bad):
    with pytest.raises(InputError, match="synthesis"):
        Synthesis(**bad)


def data_module(**options):
    settings = {"phantoms": 8, "phantom_spacing_mm": 6.0, "pairs_per_epoch": 4, "validation_pairs": 2}
    return SynthesisDataModule(**settings, **options)


def test_training_pairs_change_and_validation_pairs_do_not():
    module = data_module(augmentation=WorldAugmentation(10, 10, 0.1, 0.05, 5))
    torch.manual_seed(0)
    train = module.dataset("train")
    assert len(train) == 4
    assert not torch.equal(train[0].fixed.grid.affine, train[0].fixed.grid.affine)
    first, again = module.dataset("val")[1], module.dataset("val")[1]
    assert torch.equal(first.fixed.data, again.fixed.data)
    assert torch.equal(first.moving.grid.affine, again.moving.grid.affine)
    assert first.name != module.dataset("test")[1].name
    for split, seeds in (("train", range(0, 4)), ("val", range(4, 6)), ("test", range(6, 8))):
        assert [source.args[0] for source in module.sources(split)] == list(seeds)


def test_pairs_are_consistent():
    """Labels lie where their image lies, and images and labels of one head are moved together."""
    pair = data_module(augmentation=WorldAugmentation(20, 30)).dataset("val")[0]
    for image, labels in ((pair.fixed, pair.fixed_labels), (pair.moving, pair.moving_labels)):
        there = MappedGrid.identity(image.grid).sample(labels, mode="nearest")[0] > 0
        assert float(image.data[there].mean()) > 3 * float(image.data[~there].mean())


def test_loaders_give_lists_of_pairs():
    batch = next(iter(data_module(batch_size=2).train_dataloader()))
    assert len(batch) == 2
    moved = batch[0].to("cpu")
    assert torch.equal(moved.fixed.data, batch[0].fixed.data)


def test_thinned_label_maps():
    module = data_module(thin=2)
    assert module.dataset("train").load(0).grid.spacing == pytest.approx((12, 12, 12))


def test_too_few_label_maps(tmp_path):
    (tmp_path / "labels.nii.gz").write_text("")
    manifest = tmp_path / "manifest.csv"
    manifest.write_text("labels,split\nlabels.nii.gz,train\n")
    with pytest.raises(InputError, match=r"manifest.csv: split 'train' has 1 label maps"):
        SynthesisDataModule(str(manifest)).dataset("train")
