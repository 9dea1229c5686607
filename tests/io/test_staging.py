from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys

import pytest

from patchreg.errors import InputError, OutputError
from patchreg.io import staged_file, staged_folder


def listing(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def test_folder_appears_whole(tmp_path):
    target = tmp_path / "a" / "out"
    with staged_folder(target) as work:
        (work / "one.txt").write_text("1")
        assert not target.exists()
    assert listing(tmp_path) == ["a", "a/out", "a/out/one.txt"]


@pytest.mark.parametrize(
    "error", [InputError("bad input"), KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")]
)
def test_nothing_is_left_of_a_failure(tmp_path, error):
    with (
        pytest.raises(type(error) if not isinstance(error, OSError) else OutputError),
        staged_folder(tmp_path / "a" / "out") as work,
    ):
        (work / "one.txt").write_text("1")
        raise error
    assert listing(tmp_path) == []


def test_existing_files_survive_a_failure_and_strangers_a_success(tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    (target / "mine.txt").write_text("mine")
    (target / "one.txt").write_text("old")
    with pytest.raises(InputError), staged_folder(target) as work:
        (work / "one.txt").write_text("half")
        raise InputError("bad")
    assert (target / "one.txt").read_text() == "old"
    with staged_folder(target) as work:
        (work / "one.txt").write_text("new")
    assert (target / "one.txt").read_text() == "new"
    assert (target / "mine.txt").read_text() == "mine"
    assert listing(tmp_path) == ["out", "out/mine.txt", "out/one.txt"]


def test_files_are_replaced_whole(tmp_path):
    target = tmp_path / "image.nii.gz"
    target.write_text("old")
    with pytest.raises(InputError), staged_file(target) as work:
        work.write_text("half")
        raise InputError("bad")
    assert target.read_text() == "old"
    with staged_file(target) as work:
        assert work.name == "image.nii.gz"
        work.write_text("new")
    assert target.read_text() == "new"
    assert listing(tmp_path) == ["image.nii.gz"]


def test_a_full_disk_is_said_in_one_sentence(tmp_path):
    with (
        pytest.raises(OutputError, match="no space left to write the results") as caught,
        staged_folder(tmp_path / "out"),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert str(tmp_path / "out") in str(caught.value)


def test_a_real_limit_on_file_size_leaves_nothing(tmp_path):
    """The operating system refuses in the middle of a real image, as a full disk does."""
    script = (
        "import sys, numpy as np, nibabel as nib\n"
        "from pathlib import Path\n"
        "from patchreg.io import staged_folder\n"
        "from patchreg.errors import OutputError\n"
        "try:\n"
        "    with staged_folder(Path(sys.argv[1])) as work:\n"
        "        nib.save(nib.Nifti1Image(np.random.rand(64, 64, 64), np.eye(4)), work / 'image.nii.gz')\n"
        "except OutputError as error:\n"
        "    print(error)\n"
        "    sys.exit(2)\n"
    )

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "out")],
        capture_output=True,
        text=True,
        preexec_fn=limit,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "no space left" in done.stdout
    assert listing(tmp_path) == []


def test_targets_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="is a file; give a folder"), staged_folder(tmp_path / "file"):
        pass
    with pytest.raises(OutputError, match="is a folder; give the name of a file"), staged_file(tmp_path):
        pass
    with pytest.raises(OutputError, match="cannot be written"), staged_folder(tmp_path / "file" / "below"):
        pass
    with pytest.raises(OutputError, match="cannot be written"), staged_folder(tmp_path.__class__("/proc/patchreg/out")):
        pass


def test_a_folder_that_exists_is_staged_within(tmp_path):
    """It may be all of a mounted disk: nothing can be renamed into it from beside it."""
    target = tmp_path / "mounted"
    target.mkdir()
    with staged_folder(target) as work:
        assert work.parent == target
        (work / "a").write_text("new")
        assert [p.name for p in tmp_path.iterdir()] == ["mounted"]
    assert [p.name for p in target.iterdir()] == ["a"]


def test_trouble_with_another_file_is_not_blamed_on_the_output(tmp_path):
    with pytest.raises(PermissionError), staged_folder(tmp_path / "out"):
        raise PermissionError(13, "permission denied", str(tmp_path / "input.nii.gz"))
