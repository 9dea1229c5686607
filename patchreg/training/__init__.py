"""Training: the LightningModule, what it minimises, and its callbacks."""

from patchreg.training.callbacks import PeakMemory, Pictures, SaveRun, TransformWriter
from patchreg.training.module import Optimization, RegistrationModule
from patchreg.training.objective import Objective
from patchreg.training.super_resolution import SuperResolutionModule

__all__ = [
    "Objective",
    "Optimization",
    "PeakMemory",
    "Pictures",
    "RegistrationModule",
    "SaveRun",
    "SuperResolutionModule",
    "TransformWriter",
]
