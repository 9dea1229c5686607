from __future__ import annotations

import json

import nibabel as nib
import numpy as np
import pytest
import torch
import torchio as tio

from patchreg.datasets import ManifestDataModule, WorldAugmentation
from patchreg.datasets.manifest import read_manifest
from patchreg.errors import InputError


@pytest.fixture
def files(tmp_path):
    rng = np.random.default_rng(0)
    for name in "abcd":
        image = rng.random((9, 8, 7)).astype(np.float32)
        nib.save(nib.Nifti1Image(image, np.diag([2.0, 2, 3, 1])), tmp_path / f"{name}.nii.gz")
        nib.save(
            nib.Nifti1Image((image > 0.5).astype(np.uint8), np.diag([2.0, 2, 3, 1])), tmp_path / f"{name}_seg.nii.gz"
        )
    return tmp_path


def write(folder, text, name="manifest.csv"):
    (folder / name).write_text(text)
    return str(folder / name)


def test_images_are_paired_all_to_all(files):
    path = write(
        files,
        "image,labels,split\n"
        + "".join(f"{n}.nii.gz,{n}_seg.nii.gz,{s}\n" for n, s in zip("abcd", ["train"] * 3 + ["val"], strict=True)),
    )
    module = ManifestDataModule(path)
    pairs = module.pairs("train")
    assert len(pairs) == 6
    assert {(f.image.name[0], m.image.name[0]) for f, m in pairs} == {(x, y) for x in "abc" for y in "abc" if x != y}
    pair = module.dataset("train")[0]
    assert pair.fixed.grid.spacing == pytest.approx((2, 2, 3))
    assert pair.fixed_labels.data.dtype == torch.int32
    with pytest.raises(InputError, match="has no pairs for split 'val'"):
        module.dataset("val")


def test_images_go_to_an_atlas(files):
    path = write(files, "image,split\nb.nii.gz,train\nc.nii.gz,train\n")
    module = ManifestDataModule(
        path, pairing="to-atlas", atlas=str(files / "a.nii.gz"), atlas_labels=str(files / "a_seg.nii.gz")
    )
    assert [(f.image.name, m.image.name) for f, m in module.pairs("train")] == [
        ("a.nii.gz", "b.nii.gz"),
        ("a.nii.gz", "c.nii.gz"),
    ]
    with pytest.raises(InputError, match="needs an atlas"):
        ManifestDataModule(path, pairing="to-atlas")


def test_given_pairs_and_json(files):
    rows = [{"fixed": "a.nii.gz", "moving": "b.nii.gz", "moving_labels": "b_seg.nii.gz", "split": "test"}]
    path = write(files, json.dumps(rows), "manifest.json")
    pair = ManifestDataModule(path).dataset("test")[0]
    assert pair.name == "b.nii.gz to a.nii.gz"
    assert pair.fixed_labels is None
    assert pair.moving_labels is not None


def test_torchio_transforms_and_augmentation_apply_to_training_alone(files):
    path = write(
        files,
        "image,labels,split\n" + "".join(f"{n}.nii.gz,{n}_seg.nii.gz,{s}\n" for s in ("train", "val") for n in "ab"),
    )
    module = ManifestDataModule(path, transform=tio.RescaleIntensity((5, 6)), augmentation=WorldAugmentation(20))
    torch.manual_seed(0)
    train, val = module.dataset("train")[0], module.dataset("val")[0]
    assert float(train.fixed.data.min()) == 5
    assert float(val.fixed.data.max()) < 1
    assert not torch.allclose(train.fixed.grid.linear, val.fixed.grid.linear)
    assert torch.equal(train.fixed.grid.affine, train.fixed_labels.grid.affine)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "lists no images"),
        ("picture,split\na.nii.gz,train\n", "row 2: unknown columns"),
        ("image,split\nmissing.nii.gz,train\n", "row 2: image .*missing.nii.gz: no such file"),
        ("image,split\na.nii.gz,holdout\n", "row 2: split must be one of"),
        ("image,labels,split\n,,train\n", "row 2: names neither image nor labels"),
    ],
)
def test_bad_manifests_are_named_with_their_row(files, text, says):
    with pytest.raises(InputError, match=says) as caught:
        read_manifest(files / write(files, text).split("/")[-1], "train")
    assert "manifest.csv" in str(caught.value)


def test_bad_files_of_a_manifest_are_named(files):
    (files / "bad.nii.gz").write_text("no image")
    path = write(files, "image,split\na.nii.gz,train\nbad.nii.gz,train\n")
    with pytest.raises(InputError, match="bad.nii.gz"):
        ManifestDataModule(path).dataset("train")[0]
    (files / "bad.json").write_text("{")
    with pytest.raises(InputError, match="not a readable manifest"):
        read_manifest(files / "bad.json", "train")
    with pytest.raises(InputError, match="no such manifest"):
        read_manifest(files / "none.csv", "train")
