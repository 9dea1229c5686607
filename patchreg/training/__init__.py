"""Training: the LightningModule, what it minimises, and its callbacks."""

from patchreg.training.callbacks import PeakMemory, Pictures, SaveRun, TransformWriter
from patchreg.training.module import Optimization, RegistrationModule
from patchreg.training.objective import Objective

__all__ = ["Objective", "Optimization", "PeakMemory", "Pictures", "RegistrationModule", "SaveRun", "TransformWriter"]
