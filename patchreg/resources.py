"""Where the files that ship with the package are: in the wheel, or in a checkout."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).parent


def resource_folder(name: str) -> Path:
    """The folder ``models``, ``configs``, ``data`` or ``csrc``, wherever this installation keeps it.

    Args:
        name: of the folder at the root of the repository.

    Raises:
        FileNotFoundError: the installation lacks it.
    """
    for folder in (_PACKAGE / "_resources" / name, _PACKAGE.parent / name):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"this installation of patchreg lacks its folder '{name}': install it again")
