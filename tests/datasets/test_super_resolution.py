from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from patchreg.datasets import SuperResolutionDataModule
from patchreg.errors import InputError


def small(**options) -> SuperResolutionDataModule:
    return SuperResolutionDataModule(
        **{"phantoms": 6, "phantom_spacing_mm": 6.0, "patch": 5, "patches_per_image": 4, "validation_patches": 3,
           "queue": 8, "batch_size": 4, **options}
    )  # fmt: skip


def test_low_resolution_is_the_mean_of_blocks():
    torch.manual_seed(0)
    batches = list(small().train_dataloader())
    assert [batch["low"].shape for batch in batches] == [(4, 1, 5, 5, 5)] * 2  # two of six heads, four patches each
    for batch in batches:
        assert batch["high"].shape == (4, 1, 10, 10, 10)
        expected = batch["high"].unflatten(2, (5, 2)).unflatten(4, (5, 2)).unflatten(6, (5, 2)).mean(dim=(3, 5, 7))
        assert torch.allclose(batch["low"], expected, atol=1e-6)
        assert 0.5 < batch["high"].amax() < 2
        assert (batch["high"][:, 0, 5, 5, 5] > 0.05).all()  # around what is not background


def test_validation_patches_are_always_the_same_and_of_other_heads():
    first, second = (next(iter(small().val_dataloader())) for _ in range(2))
    assert torch.equal(first["high"], second["high"])
    data = small(validation_patches=1)
    val, test = (next(iter(loader)) for loader in (data.val_dataloader(), data.test_dataloader()))
    assert not torch.equal(val["high"], test["high"])
    state = torch.get_rng_state()
    data.val_dataloader()
    assert torch.equal(torch.get_rng_state(), state)


def test_files_of_several_channels(tmp_path):
    import nibabel as nib

    rows = ["image,split"]
    for number, split in enumerate(("train", "train", "val")):
        tensor = np.random.default_rng(number).normal(size=(14, 15, 16, 6)).astype(np.float32) * 800
        nib.save(nib.Nifti1Image(tensor, np.diag([2.0, 2, 2, 1])), tmp_path / f"{number}.nii.gz")
        rows.append(f"{number}.nii.gz,{split}")
    (tmp_path / "manifest.csv").write_text("\n".join(rows))
    data = small(manifest=str(tmp_path / "manifest.csv"), upsampling=3, patch=4)
    batch = next(iter(data.train_dataloader()))
    assert batch["high"].shape == (4, 6, 12, 12, 12)
    assert torch.allclose(batch["low"], F.avg_pool3d(batch["high"], 3))
    assert 0.9 < batch["high"].abs().amax() < 2
    with pytest.raises(InputError, match="split 'test' has no images"):
        data.test_dataloader()


@pytest.mark.parametrize("arguments", [{"upsampling": 1}, {"patch": 0}, {"queue": 3}])
def test_what_cannot_be_is_refused(arguments):
    with pytest.raises(InputError, match="a queue of at least patches_per_image"):
        small(**arguments)
