"""A pair of files in, a transform out."""

from patchreg.inference.apply import apply_transform
from patchreg.inference.evaluate import evaluate_files
from patchreg.inference.pipeline import register
from patchreg.inference.pretrained import load_model, model_cards
from patchreg.inference.refine import Refinement
from patchreg.inference.registration import Registration

__all__ = ["Refinement", "Registration", "apply_transform", "evaluate_files", "load_model", "model_cards", "register"]
