"""A cascade as a folder: ``config.yaml`` and ``model.safetensors``. Nothing is unpickled."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from patchreg.cascade.cascade import PatchCascade
from patchreg.errors import InputError, ModelNotFound
from patchreg.resources import resource_folder

CONFIG, WEIGHTS = "config.yaml", "model.safetensors"


def save_cascade(folder: Path, cascade: PatchCascade, config: dict[str, Any]) -> None:
    """Write a cascade.

    Args:
        folder: made where it does not exist.
        cascade: whose weights are written, as float32 on the CPU.
        config: ``class_path`` and ``init_args`` that build it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach().cpu().float().contiguous() for name, tensor in cascade.state_dict().items()}
    (folder / CONFIG).write_text(yaml.safe_dump({"cascade": config}, sort_keys=False))
    save_file(weights, folder / WEIGHTS)


def load_cascade(folder: Path) -> PatchCascade:
    """Read a cascade, in evaluation mode on the CPU.

    Raises:
        ModelNotFound: the folder lacks one of the two files.
        InputError: they cannot be read, or do not belong together.
    """
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise ModelNotFound(f"{folder}: has no {name}; a model is a folder with {CONFIG} and {WEIGHTS}")
    try:
        cascade = build_cascade(yaml.safe_load((folder / CONFIG).read_text()))
    except (yaml.YAMLError, InputError) as error:
        raise InputError(f"{folder / CONFIG}: describes no cascade ({error})") from error
    try:
        cascade.load_state_dict(load_file(folder / WEIGHTS))
    except (SafetensorError, RuntimeError, OSError) as error:
        raise InputError(f"{folder / WEIGHTS}: weights do not fit {CONFIG} ({str(error).splitlines()[0]})") from error
    return cascade.eval()


def build_cascade(config: Any) -> PatchCascade:
    """A cascade, with fresh weights, from ``{"cascade": {"class_path": ..., "init_args": ...}}``.

    Raises:
        InputError: the configuration does not describe one.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--cascade", type=PatchCascade, required=True)
    try:
        built = parser.instantiate(parser.parse_object(config)).cascade
    except Exception as error:  # jsonargparse raises many kinds
        raise InputError(" ".join(str(error).split())[:500]) from error
    assert isinstance(built, PatchCascade)
    return built


def load_matching(cascade: PatchCascade, folder: Path) -> tuple[int, int]:
    """Start a cascade from the weights of another: those of the same name and shape.

    Returns:
        How many of the cascade's tensors were loaded, and how many it has.

    Raises:
        InputError: not a single one fits.
    """
    own = cascade.state_dict()
    given = load_file(folder / WEIGHTS)
    fitting = {name: tensor for name, tensor in given.items() if name in own and own[name].shape == tensor.shape}
    if not fitting:
        raise InputError(f"{folder / WEIGHTS}: not one of its weights fits this cascade")
    cascade.load_state_dict(fitting, strict=False)
    return len(fitting), len(own)


def model_folder(name: str | Path) -> Path:
    """The folder of a model of the zoo, or of a model that a run saved.

    Raises:
        ModelNotFound: there is none of that name, and no such folder.
    """
    known = {folder.name: folder for folder in zoo_folders()}
    if str(name) in known:
        return known[str(name)]
    folder = Path(name)
    if (folder / WEIGHTS).is_file():
        return folder
    if folder.is_dir():
        raise ModelNotFound(f"{folder}: has no {WEIGHTS}; a model is a folder with {CONFIG} and {WEIGHTS}")
    names = ", ".join(known) or "none"
    raise ModelNotFound(
        f"no model {str(name)!r}: give one of the zoo ({names}), or a folder that a run saved as 'model'"
    )


def zoo_folders() -> list[Path]:
    """The folders of the models that ship with patchreg."""
    return [folder for folder in sorted(resource_folder("models").iterdir()) if (folder / WEIGHTS).is_file()]


def weights_hash(folder: Path) -> str:
    """SHA-256 of the weights file."""
    return hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
