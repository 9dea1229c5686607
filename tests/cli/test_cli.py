"""The command line as a user meets it: files in, files out, exit status, one sentence on stderr."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
from cascade_parts import small_cascade
from inference_parts import head, save

from patchreg.cascade.storage import save_cascade
from patchreg.cli.main import main
from patchreg.spatial import Affine, Volume

NETWORK = {"class_path": "patchreg.networks.VoxelMorph", "init_args": {"encoder": [4, 8], "decoder": [8], "final": []}}
AFFINE = {
    "class_path": "patchreg.networks.KeypointAffine",
    "init_args": {"encoder": [4, 8], "decoder": [8], "keypoints": 8},
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A small pair with labels, and a small model, as files."""
    folder = tmp_path_factory.mktemp("files")
    for name, seed in (("fixed", 0), ("moving", 1)):
        image, labels = head(seed, 6.0)
        shift = Affine.translation((5.0, 0, 0)).matrix if name == "moving" else Affine.identity().matrix
        save(Volume(image.data, image.grid.moved(shift)), folder / f"{name}.nii.gz", np.int16)
        save(Volume(labels.data, labels.grid.moved(shift)), folder / f"{name}_labels.nii.gz", np.int16)

    def stage(network, **options):
        return {"class_path": "patchreg.cascade.Stage", "init_args": {"network": network, "patch_shape": 16, **options}}

    stages = [stage(AFFINE, predicts="affine"), stage(NETWORK), stage(NETWORK, spacing=3.0, patches=2)]
    save_cascade(
        folder / "model",
        small_cascade(),
        {"class_path": "patchreg.cascade.PatchCascade", "init_args": {"stages": stages}},
    )
    return folder


def register(files, *more):
    arguments = [
        "register",
        "--fixed",
        files / "fixed.nii.gz",
        "--moving",
        files / "moving.nii.gz",
        "--model",
        files / "model",
        "-q",
    ]
    return [str(a) for a in (*arguments, *more)]


def test_register_apply_evaluate(files, tmp_path, capsys):
    out = tmp_path / "out"
    assert main([*register(files, "-o", out, "--moving-labels", files / "moving_labels.nii.gz")]) == 0
    assert {p.name for p in out.iterdir()} == {
        "moved.nii.gz", "moved_labels.nii.gz", "transform.h5", "displacement.nii.gz", "inverse_displacement.nii.gz",
        "summary.json", "report.html", "uncertainty.nii.gz",
    }  # fmt: skip
    assert json.loads((out / "summary.json").read_text())["model"]["sha256"]

    again = tmp_path / "again.nii.gz"
    moving = [str(out / "transform.h5"), str(files / "moving.nii.gz"), "--reference", str(files / "fixed.nii.gz")]
    assert main(["apply", *moving, "-o", str(again)]) == 0
    assert np.abs(nib.load(again).get_fdata() - nib.load(out / "moved.nii.gz").get_fdata()).max() <= 1

    labels = [
        str(out / "transform.h5"),
        str(files / "moving_labels.nii.gz"),
        "--reference",
        str(files / "fixed.nii.gz"),
    ]
    assert main(["apply", *labels, "-o", str(tmp_path / "l.nii.gz"), "--interpolation", "label"]) == 0
    assert np.array_equal(
        nib.load(tmp_path / "l.nii.gz").get_fdata(), nib.load(out / "moved_labels.nii.gz").get_fdata()
    )

    capsys.readouterr()
    scored = [
        "evaluate",
        "--fixed-labels",
        files / "fixed_labels.nii.gz",
        "--moved-labels",
        out / "moved_labels.nii.gz",
    ]
    scored = [str(a) for a in (*scored, "--displacement", out / "displacement.nii.gz")]
    assert main([*scored, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert 0 < found["dice_mean"] < 1
    assert found["folding_percent"] < 5
    assert found["displacement_mean_mm"] > 1
    assert main(scored) == 0
    assert f"{found['dice_mean']:.3f}" in capsys.readouterr().out


def test_the_inverse_takes_the_fixed_image_back(files, tmp_path):
    out = tmp_path / "out"
    assert main(register(files, "-o", out)) == 0
    back = tmp_path / "back.nii.gz"
    fixed = [
        str(out / "transform.h5"),
        str(files / "fixed.nii.gz"),
        "--reference",
        str(files / "moving.nii.gz"),
        "--inverse",
    ]
    assert main(["apply", *fixed, "-o", str(back)]) == 0
    moving, returned = nib.load(files / "moving.nii.gz"), nib.load(back)
    assert np.allclose(moving.affine, returned.affine, atol=1e-4)
    field = str(out / "inverse_displacement.nii.gz")
    other = tmp_path / "other.nii.gz"
    assert (
        main(
            ["apply", field, str(files / "fixed.nii.gz"), "--reference", str(files / "moving.nii.gz"), "-o", str(other)]
        )
        == 0
    )
    a, b = returned.get_fdata(), nib.load(other).get_fdata()
    assert np.mean(np.abs(a - b) < 0.05 * a.max()) > 0.99


@pytest.mark.parametrize("kind", ["rigid", "affine"])
def test_linear_registrations_write_an_affine(files, tmp_path, kind):
    assert main(register(files, "-o", tmp_path / "out", "--transform", kind, "--no-refine")) == 0
    from patchreg.io import read_transform

    assert len(read_transform(tmp_path / "out" / "transform.h5").transforms) == 1


def snapshot(folder):
    return sorted((str(p.relative_to(folder)), p.stat().st_size) for p in folder.rglob("*"))


def bad_input(files, folder):
    """Arguments of ``register`` that must fail, and what stderr must say."""
    rng = np.random.default_rng(0)
    good = nib.load(files / "fixed.nii.gz")

    def write(name, array, affine=None):
        nib.save(nib.Nifti1Image(array, good.affine if affine is None else affine), folder / name)
        return folder / name

    volume = rng.random((8, 8, 8)).astype(np.float32)
    nan = volume.copy()
    nan[0, 0, 0] = np.nan
    (folder / "text.nii.gz").write_text("no image")
    singular = nib.Nifti1Image(volume, np.eye(4))
    singular.header["sform_code"], singular.header["qform_code"] = 1, 0
    raw = bytearray(singular.to_bytes())
    header = nib.Nifti1Header(bytes(raw[:348]))
    header["sform_code"], header["srow_x"] = 1, [0, 0, 0, 0]
    raw[:348] = header.binaryblock
    (folder / "singular.nii").write_bytes(bytes(raw))
    fixed, moving = str(files / "fixed.nii.gz"), str(files / "moving.nii.gz")
    model = ["--model", str(files / "model")]

    def images(a, b, *more):
        return ["--fixed", str(a), "--moving", str(b), *model, *map(str, more)]

    return {
        "missing file": (images(folder / "none.nii.gz", moving), "none.nii.gz: no such file"),
        "not an image": (images(fixed, folder / "text.nii.gz"), "text.nii.gz: not a readable image"),
        "2-D": (images(write("flat.nii.gz", volume[0]), moving), "flat.nii.gz: has shape (8, 8), no volumes; give a 3-D image"),
        "4-D": (images(fixed, write("series.nii.gz", rng.random((6, 6, 6, 5)))), "series.nii.gz: has shape (6, 6, 6, 5), 5 volumes; give one"),
        "NaN": (images(fixed, write("nan.nii.gz", nan)), "nan.nii.gz: 1 of 512 voxels are NaN or infinite"),
        "constant": (images(write("flat3.nii.gz", np.ones((8, 8, 8))), moving), "flat3.nii.gz: every voxel is 1"),
        "empty mask": (
            images(fixed, moving, "--fixed-mask", write("mask.nii.gz", np.zeros((8, 8, 8), np.uint8))), "mask.nii.gz: the mask is empty",
        ),
        "singular affine": (images(folder / "singular.nii", moving), "singular.nii: the affine is singular"),
        "unknown model": (["--fixed", fixed, "--moving", moving, "--model", "nonsense"], "no model 'nonsense': give one of the zoo"),
        "not a transform": (images(fixed, moving, "--initial-transform", fixed), "fixed.nii.gz: has shape"),
        "unknown device": (images(fixed, moving, "--device", "tpu9"), "device 'tpu9' is unknown"),
        "labels that are none": (images(fixed, moving, "--moving-labels", write("frac.nii.gz", volume)), "frac.nii.gz: a label map needs whole numbers"),
    }  # fmt: skip


BAD = [
    "missing file", "not an image", "2-D", "4-D", "NaN", "constant", "empty mask", "singular affine", "unknown model",
    "not a transform", "unknown device", "labels that are none",
]  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_one_sentence_status_2_and_nothing_written(files, tmp_path, capsys, kind):
    arguments, says = bad_input(files, tmp_path)[kind]
    before = snapshot(tmp_path)
    assert main(["register", *arguments, "-o", str(tmp_path / "deep" / "out"), "-q"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("patchreg: ")
    assert says in lines[0]
    assert snapshot(tmp_path) == before


def test_unwritable_output_is_found_before_the_work(files, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    for target in (tmp_path / "file", tmp_path / "file" / "out"):
        assert main(register(files, "-o", target)) == 2
        assert str(target) in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


def test_a_full_disk_leaves_nothing(files, tmp_path):
    """The operating system refuses files of over 200 kB: as on a full disk, in the middle of the outputs."""
    code = (
        "import resource, sys\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))\n"
        "from patchreg.cli.main import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    arguments = register(files, "-o", tmp_path / "out", "--no-refine")
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "out" in done.stderr.strip().splitlines()[-1]
    assert snapshot(tmp_path) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_folder_without_permission(files, tmp_path, capsys):
    tmp_path.chmod(0o500)
    try:
        assert main(register(files, "-o", tmp_path / "out")) == 2
        assert "cannot be written" in capsys.readouterr().err
    finally:
        tmp_path.chmod(0o700)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "required: COMMAND"),
        (["nonsense"], "invalid choice"),
        (["register", "--fixed", "a.nii"], "--moving"),
        (["register", "--fixed", "a", "--moving", "b", "-o", "c", "--transform", "bspline"], "invalid choice"),
        (["apply", "t.h5", "i.nii"], "--reference"),
        (["evaluate"], "--fixed-labels"),
    ],
)
def test_wrong_usage_is_status_2(arguments, says, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert says in capsys.readouterr().err


def test_bad_files_of_the_other_commands(files, tmp_path, capsys):
    fixed, labels = str(files / "fixed.nii.gz"), str(files / "fixed_labels.nii.gz")
    other, _ = head(0, 8.0)
    coarse = str(save(other, tmp_path / "coarse.nii.gz", np.int16))
    bad = tmp_path / "bad.h5"
    bad.write_text("no transform")
    for arguments, says in (
        (
            ["apply", str(bad), fixed, "--reference", fixed, "-o", str(tmp_path / "o.nii.gz")],
            "bad.h5: not an ITK transform",
        ),
        (["apply", "none.h5", fixed, "--reference", fixed, "-o", str(tmp_path / "o.nii.gz")], "none.h5: no such file"),
        (
            ["apply", str(bad), fixed, "--reference", fixed, "-o", str(tmp_path / "o.png")],
            "end the name in .nii or .nii.gz",
        ),
        (["evaluate", "--fixed-labels", labels, "--moved-labels", coarse], "lies on another grid"),
        (["models", "nonsense"], "no model 'nonsense' in the zoo"),
    ):
        assert main(arguments) == 2
        assert says in capsys.readouterr().err
    assert {p.name for p in tmp_path.iterdir()} == {"coarse.nii.gz", "bad.h5"}


def test_kernels_and_version(capsys):
    assert main(["kernels", "--check"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("cpu ")
    checks = [line for line in out.splitlines() if "relative error" in line]
    assert {line.split()[1] for line in checks} == {"compose", "integrate", "lncc", "mutual_information", "warp"}
    assert "all right" in out
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0


def test_a_wrong_kernel_is_told(capsys, monkeypatch):
    from patchreg import ops

    right = ops.lncc
    monkeypatch.setattr(ops, "lncc", lambda *a, backend="auto", **k: right(*a, backend=backend, **k) * (
        1 if backend == "reference" else 1.01
    ))  # fmt: skip
    assert main(["kernels", "--check"]) == 2
    assert "lncc (window 3) on cpu" in capsys.readouterr().err


def test_without_a_compiler_the_reason_is_told(capsys, monkeypatch):
    from patchreg.ops import cpu

    monkeypatch.setattr(cpu, "find_extension", lambda: None)
    assert main(["kernels"]) == 0
    out = capsys.readouterr().out
    assert "reference (PyTorch)" in out
    assert "install a C++17 compiler" in out


def test_every_command_has_help(capsys):
    for command in ("register", "apply", "evaluate", "models", "kernels", "demo"):
        with pytest.raises(SystemExit) as caught:
            main([command, "--help"])
        assert caught.value.code == 0
        assert len(capsys.readouterr().out) > 200
