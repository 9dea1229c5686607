"""The search, on a formula in place of the estimate; tests/cli/test_memory.py has it with the estimate itself."""

from __future__ import annotations

import pytest
from conftest import REPOSITORY

from patchreg.cascade.storage import build_cascade
from patchreg.errors import InputError
from patchreg.losses import LNCC
from patchreg.spatial import Grid
from patchreg.training import Objective, RegistrationModule, proposals
from patchreg.training.estimate import Peak, Setting

KEPT = {"stored": 1.0, "checkpoint": 0.6, "reversible": 0.3}


@pytest.fixture(autouse=True)
def formula(monkeypatch):
    def peak(module, setting):
        total, patches = 0.0, setting.batch_size
        for stage in module.cascade.stages:
            patches *= stage.patches
            if min(stage.patch_shape) < 32:
                raise InputError("this network takes 32 voxels or more")
            network = stage.network
            factor = 0.1 if network.offload else KEPT[network.memory]
            if not stage.frozen:
                total += factor * patches * stage.patch_shape[0] ** 3
        return Peak({"activations": int(total * (1 if setting.precision is None else 0.5))})

    monkeypatch.setattr(proposals, "training_peak", peak)
    return peak


def cascade_config(*stages, **network):
    options = {"encoder": [4, 8], "decoder": [8], "final": [], "memory": "stored", "offload": False, "reversible": 0}

    def stage(given):
        network_config = {"class_path": "patchreg.networks.VoxelMorph", "init_args": {**options, **network}}
        arguments = {"network": network_config, "patch_shape": 64, **given}
        return {"class_path": "patchreg.cascade.Stage", "init_args": arguments}

    return {"class_path": "patchreg.cascade.PatchCascade", "init_args": {"stages": [stage(s) for s in stages]}}


def found(formula, config, share, gpu=False, batch_size=1):
    """What is proposed for a device that takes a share of the peak."""
    setting = Setting(Grid.aligned((0, 0, 0), (64, 64, 64), 2.0), gpu=gpu, batch_size=batch_size)
    module = RegistrationModule(build_cascade({"cascade": config}), Objective(LNCC(5), None))
    limit = share * formula(module, setting).total
    proposed = proposals.propose(module, config, setting, lambda p: p.total <= limit)
    assert all(p.peak.total <= limit for p in proposed)
    return [p.changes for p in proposed]


MEMORY, OFFLOAD = "0.init_args.network.init_args.memory", "0.init_args.network.init_args.offload"
PATCH = "0.init_args.patch_shape"


def test_the_same_gradients_in_less_memory_come_first(formula):
    changes = found(formula, cascade_config({}), 0.7, batch_size=2)
    assert changes == [{MEMORY: "checkpoint"}, {"batch_size": 1}, {PATCH: 48}]


def test_ways_are_combined(formula):
    changes = found(formula, cascade_config({}), 0.35, batch_size=2)
    assert changes[0] == {MEMORY: "checkpoint", "batch_size": 1}
    assert {MEMORY: "checkpoint", PATCH: 48} in changes


def test_reversible_networks_are_run_as_such(formula):
    assert found(formula, cascade_config({}, reversible=4, memory="checkpoint"), 0.6)[0] == {MEMORY: "reversible"}


def test_a_network_within_a_network_is_found():
    inner = {"class_path": "patchreg.networks.VoxelMorph", "init_args": {"memory": "stored", "reversible": 0}}
    outer = {
        "class_path": "patchreg.networks.Elongated",
        "init_args": {"network": inner, "before": ["flow"], "memory": "stored"},
    }
    levels = list(proposals._policies([{"init_args": {"network": outer}}], gpu=False))
    place = "0.init_args.network.init_args"
    checkpoint = {f"{place}.memory": "checkpoint", f"{place}.network.init_args.memory": "checkpoint"}
    assert levels == [{}, checkpoint, {**checkpoint, f"{place}.memory": "reversible"}]


def test_on_a_gpu_half_precision_and_offloading_too(formula):
    image = cascade_config({"spacing": "image"})
    assert found(formula, image, 0.5, gpu=True) == [{"precision": "bf16-mixed"}, {MEMORY: "checkpoint", OFFLOAD: True}]
    assert found(formula, image, 0.5) == []


def test_patches_are_fewer_and_frozen_stages_are_left_alone(formula):
    config = cascade_config({"frozen": True, "patch_shape": [64, 32, 48]}, {"spacing": 2.0, "patches": 4})
    del config["init_args"]["stages"][1]["init_args"]["network"]["init_args"]["memory"]
    changes = found(formula, config, 0.5, batch_size=2)
    assert changes[0] == {"batch_size": 1}
    assert found(formula, config, 0.25, batch_size=2)[0] == {"batch_size": 1, "1.init_args.patches": 2}
    assert not any(place.startswith("0.init_args.network") for change in changes for place in change)


def test_patches_that_a_network_does_not_take_are_passed_over(formula):
    changes = found(formula, cascade_config({}, memory="checkpoint"), 0.3)
    assert changes == [{PATCH: 32}]
    assert found(formula, cascade_config({}, memory="checkpoint"), 0.1) == []


def test_no_proposal_is_more_than_another(formula):
    config = cascade_config({}, {"spacing": 2.0, "patches": 2}, reversible=2)
    for share in (0.5, 0.2):
        changes = found(formula, config, share, batch_size=4, gpu=True)
        assert len(changes) == 3
        for i, one in enumerate(changes):
            assert not any(other.items() <= one.items() for j, other in enumerate(changes) if i != j)


@pytest.mark.parametrize("path", sorted((REPOSITORY / "configs" / "experiment").glob("*.yaml")), ids=lambda p: p.stem)
def test_there_are_ways_to_go_for_every_experiment_of_pairs(path, formula):
    from patchreg.cli.experiment import read_experiment

    experiment = read_experiment([path])
    if not isinstance(experiment.model, RegistrationModule):
        pytest.skip("not of pairs")
    stages = experiment.config["model"]["init_args"]["cascade"]["init_args"]["stages"]
    levels = [
        list(proposals._policies(stages, True)),
        list(proposals._batches(stages, 8)),
        list(proposals._patches(stages)),
    ]
    assert len(levels[1]) >= 4
    assert sum(map(len, levels)) > 6
