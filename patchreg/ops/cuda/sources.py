"""The CUDA C++ text that ships with the package."""

from __future__ import annotations

import re
from pathlib import Path

from patchreg.resources import resource_folder

_INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)


def source_folders() -> tuple[Path, Path]:
    """Where kernels and the headers that they may include are kept: ``csrc/cuda`` and ``csrc/common``."""
    folder = resource_folder("csrc")
    return folder / "cuda", folder / "common"


def read_sources(source: str | Path) -> dict[str, str]:
    """The text of a kernel file and of every header that it includes, in turn, by name; the file itself is first.

    Args:
        source: name of a file of ``csrc/cuda``, or the path of one elsewhere.

    Raises:
        FileNotFoundError: the file, or a header that it includes, is in neither folder.
    """
    folders = source_folders()
    path = Path(source)
    texts: dict[str, str] = {}
    waiting = [path if path.is_absolute() else folders[0] / path]
    while waiting:
        path = waiting.pop()
        if path.name in texts:
            continue
        texts[path.name] = path.read_text(encoding="utf-8")
        waiting += [_find_header(name, path, folders) for name in _INCLUDE.findall(texts[path.name])]
    return texts


def _find_header(name: str, included_from: Path, folders: tuple[Path, Path]) -> Path:
    for folder in (included_from.parent, *folders):
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(
        f"{included_from.name} includes {name}, which is neither in csrc/cuda nor in csrc/common: install patchreg again"
    )
