"""Stored voxels to tensors: what type each kind of image has, and which values it may not hold."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from patchreg.errors import InputError

Kind = Literal["image", "labels", "mask"]

DTYPES: dict[Kind, torch.dtype] = {"image": torch.float32, "labels": torch.int32, "mask": torch.uint8}


def converted(data: np.ndarray, kind: Kind, name: str, where: str = "") -> Tensor:
    """Voxels of any shape as a tensor of the same shape: intensities float32, labels int32, masks uint8 (0 or 1).

    Args:
        data: values, scaled as their file says.
        kind: what they are.
        name: of the file, for messages.
        where: what part of the file they are, for messages, such as ``" in [0:16, 0:256, 0:256]"``.

    Raises:
        InputError: NaN or infinite values; labels that are not whole numbers.
    """
    if data.dtype.kind == "f":
        bad = int(data.size - np.isfinite(data).sum())
        if bad:
            raise InputError(
                f"{name}: {bad} of {data.size} voxels{where} are NaN or infinite; replace them, for example by 0"
            )
    if kind == "mask":
        return torch.from_numpy((data != 0).astype(np.uint8))
    if kind == "labels":
        whole = np.rint(data) if data.dtype.kind == "f" else data
        large = data.size > 0 and max(-float(data.min()), float(data.max())) >= 2**31
        if large or not np.array_equal(whole, data):
            raise InputError(f"{name}: a label map needs whole numbers, but it has others; is it an intensity image?")
        return torch.from_numpy(whole.astype(np.int32))
    return torch.from_numpy(np.ascontiguousarray(data, dtype=np.float32))
