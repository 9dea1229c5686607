from __future__ import annotations

import json

import pytest
import yaml

from patchreg.cli.main import main

STAGE = {
    "class_path": "patchreg.cascade.Stage",
    "init_args": {
        "patch_shape": 32,
        "network": {
            "class_path": "patchreg.networks.VoxelMorph",
            "init_args": {"encoder": [4, 8], "decoder": [8], "final": [], "norm": True},
        },
    },
}


@pytest.fixture
def config(tmp_path, monkeypatch):
    """A small experiment, in the folder that the command runs in."""
    monkeypatch.chdir(tmp_path)
    logger = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "runs"}}
    experiment = {
        "seed_everything": 1,
        "model": {
            "class_path": "patchreg.training.RegistrationModule",
            "init_args": {
                "cascade": {"class_path": "patchreg.cascade.PatchCascade", "init_args": {"stages": [STAGE]}},
                "objective": {"similarity": {"class_path": "patchreg.losses.LNCC"}, "regularity": None},
                "initial_model": "a/run/that/is/not/there",
            },
        },
        "data": {
            "class_path": "patchreg.datasets.SynthesisDataModule",
            "init_args": {"phantom_spacing_mm": 8.0, "batch_size": 2},
        },
        "trainer": {"max_steps": 1, "accelerator": "cpu", "logger": logger},
    }

    def write(**changes):
        path = tmp_path / "experiment.yaml"
        path.write_text(yaml.safe_dump({**experiment, **changes}))
        return str(path)

    return write


def run(capsys, *arguments):
    assert main(["memory", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_what_is_printed_is_what_json_says_and_nothing_is_left(config, capsys, tmp_path):
    path = config()
    found = run(capsys, "--config", path, "--device-gb", "2")
    assert found["image"] == {"shape": [24, 28, 26], "spacing_mm": [8.0] * 3, "source": "phantoms"}
    assert (found["batch_size"], found["precision"], found["device"]["kind"]) == (2, "32", "cpu")
    training = found["training"]
    assert sum(training["kinds"].values()) == training["total"]
    assert training["needed"] == int(1.1 * training["total"]) + 2**29
    assert found["fits"] is True
    assert found["proposals"] == []
    assert main(["memory", "--config", path, "--device-gb", "2", "-q"]) == 0
    said = capsys.readouterr().out
    assert "24x28x26 at 8 mm" in said
    assert "FITS 2.00 GiB" in said
    for kind in training["kinds"]:
        assert kind in said
    assert [p.name for p in tmp_path.iterdir()] == ["experiment.yaml"]


def test_options_are_passed_on_and_images_may_be_given(config, capsys):
    options = ("--data.batch_size", "1", "--trainer.precision", "bf16-mixed", "--trainer.accelerator", "auto")
    given = ("--image-shape", "200", "160", "180", "--image-spacing", "0.5")
    found = run(capsys, "--config", config(), *options, *given)
    assert (found["batch_size"], found["precision"], found["device"]["kind"]) == (1, "bf16-mixed", "gpu")
    assert found["image"] == {"shape": [200, 160, 180], "spacing_mm": [0.5] * 3, "source": "as given"}
    assert found["training"]["kinds"]["images"] > 2 * 4 * 200 * 160 * 180


def test_pairs_may_be_shared_by_several_ranks(config, capsys):
    strategy = {"class_path": "patchreg.distributed.GridParallelStrategy", "init_args": {"grid_parallel_size": 4}}
    path = config(trainer={"max_steps": 1, "accelerator": "cpu", "devices": 4, "strategy": strategy, "logger": False})
    shared, alone = run(capsys, "--config", path), run(capsys, "--config", path, "--ranks", "1")
    assert (shared["ranks"], alone["ranks"]) == (4, 1)
    activations = [found["training"]["kinds"]["activations"] for found in (shared, alone)]
    assert activations[0] < 0.5 * activations[1]
    assert main(["memory", "--config", path, "--ranks", "0"]) == 2
    assert "--ranks" in capsys.readouterr().err


def test_proposals_are_places_in_the_configuration_that_fit(config, capsys, tmp_path):
    path = config()
    needed = run(capsys, "--config", path)["training"]["needed"]
    found = run(capsys, "--config", path, "--device-gb", str((needed - 2**18) / 2**30))
    assert found["fits"] is False
    first = found["proposals"][0]
    place = "model.init_args.cascade.init_args.stages[0].init_args.network.init_args.memory"
    assert first["changes"] == {place: "checkpoint"}
    changed = yaml.safe_load((tmp_path / "experiment.yaml").read_text())
    changed["model"]["init_args"]["cascade"]["init_args"]["stages"][0]["init_args"]["network"]["init_args"]["memory"] = "checkpoint"  # fmt: skip
    again = run(capsys, "--config", config(**changed))
    assert again["training"]["needed"] == first["training"]["needed"] < needed
    assert main(["memory", "--config", path, "--device-gb", "0.1", "-q"]) == 0
    assert "DOES NOT FIT" in capsys.readouterr().out


def test_validation_that_does_not_fit_is_told(config, capsys):
    fine = {**STAGE, "init_args": {**STAGE["init_args"], "spacing": 0.6}}
    cascade = {"class_path": "patchreg.cascade.PatchCascade", "init_args": {"stages": [fine]}}
    objective = {"similarity": {"class_path": "patchreg.losses.LNCC"}, "regularity": None}
    path = config(
        model={
            "class_path": "patchreg.training.RegistrationModule",
            "init_args": {"cascade": cascade, "objective": objective},
        }
    )
    arguments = ("--config", path, "--image-shape", "160", "160", "160", "--image-spacing", "0.6")
    found = run(capsys, *arguments)
    assert found["validation"]["total"] >= found["inference"]["total"]
    between = (found["training"]["needed"] + found["validation"]["needed"]) / 2 / 2**30
    assert found["training"]["needed"] < found["validation"]["needed"]
    assert main(["memory", *arguments, "--device-gb", str(between), "-q"]) == 0
    said = capsys.readouterr().out
    assert "VALIDATION DOES NOT FIT" in said
    assert "\nFITS" in said


def error(capsys, *arguments):
    assert main(["memory", *arguments]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    return lines[0]


def test_bad_input_is_told_in_one_sentence(config, capsys, tmp_path):
    path = config()
    assert "none.yaml: no such configuration" in error(capsys, "--config", "none.yaml")
    assert "positive number" in error(capsys, "--config", path, "--device-gb", "-1")
    assert "three positive numbers" in error(capsys, "--config", path, "--image-shape", "1", "0", "1")
    assert "one or three" in error(capsys, "--config", path, "--image-spacing", "1", "2")
    assert "'batch_sise' is not accepted" in error(capsys, "--config", path, "--data.batch_sise", "1")
    assert "only 32, bf16-mixed" in error(capsys, "--config", path, "--trainer.precision", "64-true")
    (tmp_path / "text.yaml").write_text("just text")
    assert "describes no experiment" in error(capsys, "--config", "text.yaml")
    boring = config(model={"class_path": "lightning.pytorch.demos.boring_classes.BoringModel"})
    assert "BoringModel cannot be estimated" in error(capsys, "--config", boring)


def test_wrong_usage_is_told_too(config, capsys):
    for arguments in ([], ["--config", config(), "--image-shape", "10", "20"]):
        with pytest.raises(SystemExit) as stopped:
            main(["memory", *arguments])
        assert stopped.value.code == 2
    with pytest.raises(SystemExit):
        main(["models", "--nonsense"])
    assert "unrecognized arguments: --nonsense" in capsys.readouterr().err
