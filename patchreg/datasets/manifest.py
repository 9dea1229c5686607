"""Lists of files: which images belong to which split, and which are pairs."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path

from patchreg.errors import InputError

SPLITS = ("train", "val", "test")
_IMAGE = {"image", "labels", "split"}
_PAIR = {"fixed", "moving", "fixed_labels", "moving_labels", "split"}


@dataclass(frozen=True)
class Entry:
    """One image of a manifest, or one side of a pair.

    Args:
        image: intensities. None where only labels are given, to synthesise from.
        labels: its label map, if any.
    """

    image: Path | None
    labels: Path | None = None


@dataclass(frozen=True)
class Manifest:
    """The files of one split: images to pair with each other, or pairs.

    Args:
        images: every image of the split.
        pairs: (fixed, moving) of every pair of the split; empty where the manifest lists images.
    """

    images: tuple[Entry, ...]
    pairs: tuple[tuple[Entry, Entry], ...]


def read_manifest(path: Path, split: str) -> Manifest:
    """Read the rows of one split.

    A CSV file has a header line, a JSON file a list of objects. Columns are either ``image, labels, split`` or
    ``fixed, moving, fixed_labels, moving_labels, split``; ``image`` may be left out where there are ``labels``. Paths
    are relative to the manifest. Rows without a split belong to ``train``.

    Raises:
        InputError: no such file, unknown columns, a row that names no file or a file that is not there.
    """
    rows = _rows(path)
    images: list[Entry] = []
    pairs: list[tuple[Entry, Entry]] = []
    for number, row in rows:
        where = f"{path}, row {number}"
        named = row.get("split") or "train"
        if named not in SPLITS:
            raise InputError(f"{where}: split must be one of {', '.join(SPLITS)}, got {named!r}")
        if named != split:
            continue
        if "fixed" in row or "moving" in row:
            sides = [_entry(path, where, row, side, f"{side}_labels") for side in ("fixed", "moving")]
            pairs.append((sides[0], sides[1]))
        else:
            images.append(_entry(path, where, row, "image", "labels"))
    return Manifest(tuple(images), tuple(pairs))


def _rows(path: Path) -> list[tuple[int, dict[str, str]]]:
    if not path.is_file():
        raise InputError(f"{path}: no such manifest; give a CSV or JSON file")
    try:
        if path.suffix.lower() == ".json":
            rows = list(enumerate(json.loads(path.read_text()), start=1))
        else:
            with path.open(newline="") as file:
                rows = list(enumerate(csv.DictReader(file), start=2))
    except (json.JSONDecodeError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: not a readable manifest ({error}); give a CSV or JSON file") from error
    if not rows or not all(isinstance(row, dict) for _, row in rows):
        raise InputError(
            f"{path}: lists no images; give rows of {', '.join(sorted(_IMAGE))} or {', '.join(sorted(_PAIR))}"
        )
    for number, row in rows:
        unknown = set(row) - _IMAGE - _PAIR
        if unknown:
            raise InputError(
                f"{path}, row {number}: unknown columns {sorted(map(str, unknown))}; known are {sorted(_IMAGE | _PAIR)}"
            )
    return [(number, {k: str(v).strip() for k, v in row.items() if v}) for number, row in rows]


def _entry(manifest: Path, where: str, row: dict[str, str], image: str, labels: str) -> Entry:
    found = []
    for column in (image, labels):
        name = row.get(column)
        file = manifest.parent / name if name else None
        if file is not None and not file.is_file():
            raise InputError(f"{where}: {column} {file}: no such file; paths are relative to the manifest")
        found.append(file)
    if found == [None, None]:
        raise InputError(f"{where}: names neither {image} nor {labels}")
    return Entry(found[0], found[1])
