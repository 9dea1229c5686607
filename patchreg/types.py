"""Names for the shapes and choices that cross layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias

Shape3: TypeAlias = tuple[int, int, int]
"""Voxels along the three array dimensions (I, J, K)."""

Spacing3: TypeAlias = tuple[float, float, float]
"""Millimetres between neighbouring voxels along (I, J, K)."""

Backend: TypeAlias = Literal["auto", "reference", "native"]
Interpolation: TypeAlias = Literal["linear", "nearest", "label"]
Padding: TypeAlias = Literal["zeros", "border"]
Reduction: TypeAlias = Literal["mean", "sum", "none"]

Memory: TypeAlias = Literal["stored", "recompute"]
"""What an operation keeps for its backward pass: what makes it fast, or nothing of volume size."""

Activations: TypeAlias = Literal["stored", "checkpoint", "reversible"]
"""What a network keeps of its activations for its backward pass: all; the inputs of its parts; of reversible stacks only
the output, and of the rest the inputs of its parts."""

Progress: TypeAlias = Callable[[str, int, int], None]
"""Called with the name of what is being done, how many parts are done, and how many there are."""
