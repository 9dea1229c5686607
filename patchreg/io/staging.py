"""Outputs that appear whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from patchreg.errors import OutputError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def staged_folder(target: Path) -> Iterator[Path]:
    """A temporary folder in ``target``, or beside it where it is not there yet, whose files move into it when the block ends well.

    Files of the same names in an existing ``target`` are replaced one by one, each atomically; other files there stay.
    When the block fails nothing of it is left.

    Raises:
        OutputError: ``target`` cannot be written to, or the disk is full. Writability is found out before the block
            runs.
    """
    if target.exists() and not target.is_dir():
        raise OutputError(f"{target}: is a file; give a folder for the results")
    with _beside(target, within=True) as folder:
        yield folder
        reporting(target, lambda: _publish(folder, target))


@contextmanager
def staged_file(target: Path) -> Iterator[Path]:
    """A temporary path beside ``target``, of the same name, renamed onto it when the block ends well.

    Raises:
        OutputError: ``target`` cannot be written, or the disk is full.
    """
    if target.is_dir():
        raise OutputError(f"{target}: is a folder; give the name of a file")
    with _beside(target) as folder:
        yield folder / target.name
        reporting(target, lambda: os.replace(folder / target.name, target))


@contextmanager
def staged_store(target: Path) -> Iterator[Path]:
    """A temporary path for a folder that is one image, such as OME-Zarr, put in the place of ``target`` when the block ends well.

    What ``target`` was before is replaced as a whole; for a moment between two renames there is neither.

    Raises:
        OutputError: ``target`` cannot be written, or the disk is full.
    """
    if target.exists() and not target.is_dir():
        raise OutputError(f"{target}: is a file; give another name for the folder")
    with _beside(target) as folder:
        yield folder / target.name
        reporting(target, lambda: _replace(folder / target.name, target, folder / "replaced"))


def reserve(file: IO[bytes], folder: Path, size: int) -> None:
    """Take ``size`` bytes of the disk that ``folder`` is on for an open file, so that writing them cannot fail later.

    Where the system has no such call, it is only looked whether there is as much.

    Raises:
        OSError: there is no space for them.
    """
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, max(1, size))
    elif shutil.disk_usage(folder).free < size:
        raise OSError(errno.ENOSPC, "no space left on device")
    else:
        file.truncate(size)


def require_space(path: Path, size: int) -> None:
    """Make sure that ``size`` bytes can be written at ``path``: for libraries that crash where a disk fills up.

    Raises:
        OutputError: they cannot.
    """
    try:
        with tempfile.TemporaryFile(dir=path.absolute().parent) as file:
            reserve(file, path.absolute().parent, size)
    except OSError as error:
        raise OutputError(message(path, error)) from error


@contextmanager
def _beside(target: Path, within: bool = False) -> Iterator[Path]:
    made: list[Path] = []
    parent = target.absolute().parent
    try:
        for folder in [parent, *parent.parents]:
            if folder.exists():
                break
            made.append(folder)
        parent.mkdir(parents=True, exist_ok=True)
        if target.is_dir() and not os.access(target, os.W_OK):
            raise PermissionError(errno.EACCES, "permission denied")
        inside = target if within and target.is_dir() else parent  # a folder that exists may be all of a mounted disk
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=inside))
    except OSError as error:
        _remove_empty(made)
        raise OutputError(f"{target}: cannot be written ({_reason(error)}); choose another place") from error
    work.chmod(0o755)
    try:
        yield work
    except OSError as error:
        ours = error.errno in _FULL or str(work) in (str(error.filename or ""), str(Path(error.filename or "").parent))
        if isinstance(error, OutputError) or not ours:
            raise
        raise OutputError(message(target, error)) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
        _remove_empty(made)


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:
            return


def _publish(folder: Path, target: Path) -> None:
    if not target.exists():
        os.rename(folder, target)
        return
    for item in sorted(folder.iterdir()):
        os.replace(item, target / item.name)


def _replace(folder: Path, target: Path, aside: Path) -> None:
    there = target.exists()
    if there:
        os.rename(target, aside)
    try:
        os.rename(folder, target)
    except OSError:
        if there:
            os.rename(aside, target)
        raise


def reporting(target: Path, action: Callable[[], None]) -> None:
    """Run something that writes, and raise :class:`OutputError` where the system refuses."""
    try:
        action()
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(message(target, error)) from error


def message(target: Path, error: OSError) -> str:
    """One sentence that names the output and the remedy."""
    if error.errno in _FULL:
        return f"{target}: no space left to write the results ({_reason(error)}); free some or choose another place"
    return f"{target}: cannot be written ({_reason(error)}); choose another place"


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).lower()
