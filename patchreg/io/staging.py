"""Outputs that appear whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
    with _beside(target) as folder:
        yield folder
        _reporting(target, lambda: _publish(folder, target))


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
        _reporting(target, lambda: os.replace(folder / target.name, target))


def require_space(path: Path, size: int) -> None:
    """Make sure that ``size`` bytes can be written at ``path``: for libraries that crash where a disk fills up.

    Raises:
        OutputError: they cannot.
    """
    try:
        with tempfile.TemporaryFile(dir=path.absolute().parent) as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, max(1, size))
            elif shutil.disk_usage(path.absolute().parent).free < size:
                raise OSError(errno.ENOSPC, "no space left on device")
    except OSError as error:
        raise OutputError(_message(path, error)) from error


@contextmanager
def _beside(target: Path) -> Iterator[Path]:
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
        inside = target if target.is_dir() else parent  # a folder that exists may be all of a mounted disk
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
        raise OutputError(_message(target, error)) from error
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


def _reporting(target: Path, action: object) -> None:
    try:
        action()  # type: ignore[operator]
    except OSError as error:
        raise OutputError(_message(target, error)) from error


def _message(target: Path, error: OSError) -> str:
    if error.errno in _FULL:
        return f"{target}: no space left to write the results ({_reason(error)}); free some or choose another place"
    return f"{target}: cannot be written ({_reason(error)}); choose another place"


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).lower()
