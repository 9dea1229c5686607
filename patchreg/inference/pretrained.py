"""The zoo, and models trained by users."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from patchreg.cascade import PatchCascade
from patchreg.cascade.storage import WEIGHTS, load_cascade, model_folder, weights_hash, zoo_folders

DEFAULT_MODEL = "any_contrast"


@dataclass(frozen=True)
class ModelCard:
    """A model of the zoo.

    Args:
        name: to give to ``--model``.
        folder: where it is.
        title: first line of its card.
        text: the card, in Markdown.
        megabytes: size of its weights.
    """

    name: str
    folder: Path
    title: str
    text: str
    megabytes: float


def model_cards() -> list[ModelCard]:
    """All models that ship with patchreg."""
    found = []
    for folder in zoo_folders():
        card = folder / "README.md"
        text = card.read_text() if card.is_file() else ""
        title = text.strip().splitlines()[0].lstrip("# ") if text.strip() else folder.name
        found.append(ModelCard(folder.name, folder, title, text, (folder / WEIGHTS).stat().st_size / 1e6))
    return found


def load_model(name: str | Path = DEFAULT_MODEL) -> PatchCascade:
    """A pretrained cascade, in evaluation mode on the CPU.

    Args:
        name: of a model of the zoo (``patchreg models`` lists them), or a folder with ``config.yaml`` and
            ``model.safetensors``.

    Raises:
        ModelNotFound: there is no such model.
        InputError: its files cannot be read.
    """
    return load_cascade(model_folder(name))


def model_identity(name: str | Path) -> dict[str, str]:
    """Name and SHA-256 of the weights, to reproduce a result."""
    folder = model_folder(name)
    return {"name": folder.name if folder in zoo_folders() else str(folder), "sha256": weights_hash(folder)}
