"""The hot operations: tensors in, tensors out, index coordinates, no geometry.

Each operation is a folder with a ``reference.py`` in plain PyTorch and a public function that chooses between it and a
native kernel: ``backend="auto"`` takes the fastest that can run, ``"reference"`` the plain one, and ``"native"`` raises
:class:`patchreg.errors.BackendUnavailable` where no kernel can.
"""

from patchreg.ops.compose import compose, integrate
from patchreg.ops.lncc import lncc
from patchreg.ops.mutual_information import mutual_information
from patchreg.ops.warp import warp

__all__ = ["compose", "integrate", "lncc", "mutual_information", "warp"]
