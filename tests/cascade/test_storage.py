from __future__ import annotations

import pytest
import torch
import yaml
from cascade_parts import small_cascade
from safetensors.torch import load_file, save_file

from patchreg.cascade.storage import load_cascade, load_matching, model_folder, save_cascade, weights_hash
from patchreg.errors import InputError, ModelNotFound

NETWORK = {"class_path": "patchreg.networks.VoxelMorph", "init_args": {"encoder": [4, 8], "decoder": [8], "final": []}}
AFFINE = {
    "class_path": "patchreg.networks.KeypointAffine",
    "init_args": {"encoder": [4, 8], "decoder": [8], "keypoints": 8},
}


def config(**second):
    def stage(network, **options):
        return {"class_path": "patchreg.cascade.Stage", "init_args": {"network": network, "patch_shape": 16, **options}}

    stages = [stage(AFFINE, predicts="affine"), stage(NETWORK), stage(NETWORK, spacing=3.0, patches=2, **second)]
    return {"class_path": "patchreg.cascade.PatchCascade", "init_args": {"stages": stages}}


def test_a_cascade_survives_saving(tmp_path):
    cascade = small_cascade()
    save_cascade(tmp_path / "model", cascade, config())
    again = load_cascade(tmp_path / "model")
    assert not again.training
    assert again.stages[2].spacing == (3.0, 3.0, 3.0)
    for name, tensor in cascade.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)
    assert len(weights_hash(tmp_path / "model")) == 64


def test_files_that_do_not_belong_together(tmp_path):
    save_cascade(tmp_path / "model", small_cascade(), config())
    weights = load_file(tmp_path / "model" / "model.safetensors")
    (tmp_path / "model" / "config.yaml").write_text(
        yaml.safe_dump({"cascade": config(patch_shape=8) | {"class_path": "no.such.Thing"}})
    )
    with pytest.raises(InputError, match="config.yaml: describes no cascade"):
        load_cascade(tmp_path / "model")
    save_cascade(tmp_path / "model", small_cascade(), config())
    weights.popitem()
    save_file(weights, tmp_path / "model" / "model.safetensors")
    with pytest.raises(InputError, match="weights do not fit"):
        load_cascade(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(InputError, match="model.safetensors"):
        load_cascade(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    with pytest.raises(ModelNotFound, match="has no model.safetensors"):
        load_cascade(tmp_path / "model")


def test_matching_weights_are_taken_over(tmp_path):
    cascade = small_cascade()
    save_cascade(tmp_path / "model", cascade, config())
    torch.manual_seed(7)
    other = small_cascade()
    torch.nn.init.zeros_(other.stages[0].network.head.weight)
    other.stages[2].network.flow = torch.nn.Conv3d(8, 5, 3)  # of another shape
    taken, own = load_matching(other, tmp_path / "model")
    assert (taken, own) == (len(cascade.state_dict()) - 2, len(other.state_dict()))
    assert torch.equal(other.stages[0].network.head.weight, cascade.stages[0].network.head.weight)
    save_file({"stranger": torch.zeros(1)}, tmp_path / "model" / "model.safetensors")
    with pytest.raises(InputError, match="not one of its weights fits"):
        load_matching(other, tmp_path / "model")


def test_unknown_models_are_named_with_what_there_is(tmp_path):
    with pytest.raises(ModelNotFound, match="no model 'nonsense': give one of the zoo"):
        model_folder("nonsense")
    with pytest.raises(ModelNotFound, match="has no model.safetensors"):
        model_folder(tmp_path)
