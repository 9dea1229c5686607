"""Which patch, which transform, in which order."""

from patchreg.cascade.cascade import PatchCascade
from patchreg.cascade.chain import PreparedPair, StageOutput, shared_grid
from patchreg.cascade.cover import Result
from patchreg.cascade.prepared import Normalization, Prepared
from patchreg.cascade.stage import Stage

__all__ = ["Normalization", "PatchCascade", "Prepared", "PreparedPair", "Result", "Stage", "StageOutput", "shared_grid"]
