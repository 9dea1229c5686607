"""What a kernel is asked to do, for CPU and GPU alike."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from patchreg.types import Shape3


@dataclass(frozen=True, eq=False)
class Job:
    """``gain * (I(A x + t + S u(x)) + u(x))``, the last term only where ``add``; all tensors contiguous, on one device.

    Args:
        image: ``I``, (B or 1, C, I, J, K). None where only its gradient is wanted, which does not depend on it.
        image_shape: its shape.
        displacement: ``u``, (B or 1, 3, *shape), or None.
        affine: ``[A | t]``, (B or 1, 3, 4) float64. None: the identity.
        scale: ``S``, (B or 1, 3, 3) float64. None: ``step`` times the identity.
        shape: of the output.
        border: the nearest voxel's value outside the image, not zero.
        step: see ``scale``.
        gain: a factor of the result.
        add: whether the displacement is added to what is sampled; C is 3 then.
        nearest: the nearest voxel's value, not the linear one.
    """

    image: Tensor | None
    image_shape: tuple[int, ...]
    displacement: Tensor | None
    affine: Tensor | None
    scale: Tensor | None
    shape: Shape3
    border: bool
    step: float = 1.0
    gain: float = 1.0
    add: bool = False
    nearest: bool = False

    @cached_property
    def batches(self) -> tuple[int, int, int, int]:
        """The batch sizes of image, displacement, affine and scale; 1 for what is absent or shared."""
        displacement, affine, scale = (
            1 if t is None else t.shape[0] for t in (self.displacement, self.affine, self.scale)
        )
        return self.image_shape[0], displacement, affine, scale

    @property
    def batch(self) -> int:
        """Of the output."""
        return max(self.batches)

    @property
    def channels(self) -> int:
        """Of the image and the output."""
        return self.image_shape[1]


@dataclass(frozen=True, eq=False)
class Gradients:
    """Where gradients go; None for those that are not wanted.

    Args:
        image: (B or 1, C, I, J, K) float32; added to, unless it is also the ``displacement``.
        displacement: like the displacement, of any dtype that kernels store; overwritten. It may be the same tensor as
            ``image``, which then gets the sum of both gradients.
        affine: (B or 1, 3, 4) float64; zeros.
        scale: (B or 1, 3, 3) float64; zeros.
    """

    image: Tensor | None = None
    displacement: Tensor | None = None
    affine: Tensor | None = None
    scale: Tensor | None = None
