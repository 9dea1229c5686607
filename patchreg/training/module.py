"""The LightningModule around a cascade."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn

from patchreg.cascade import PatchCascade, PreparedPair, Result
from patchreg.cascade.storage import load_matching, model_folder
from patchreg.datasets import Pair
from patchreg.errors import InputError
from patchreg.training.evaluation import Evaluation, evaluate
from patchreg.training.objective import Objective, sum_of_stages
from patchreg.training.stepwise import with_gradients

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Optimization:
    """AdamW with a linear warm-up and a cosine decay, both counted in steps.

    Args:
        learning_rate: at its highest.
        weight_decay: of AdamW.
        warmup_steps: from a hundredth of the learning rate up.
        final_fraction: of the learning rate at the end of training.
        betas: of AdamW.
    """

    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    warmup_steps: int = 100
    final_fraction: float = 0.01
    betas: tuple[float, float] = (0.9, 0.99)

    def optimizer(self, module: nn.Module) -> torch.optim.AdamW:
        """Of the parameters of a module that are trained. Not fused: Lightning clips no gradients of such a one."""
        trained = [p for p in module.parameters() if p.requires_grad]
        return torch.optim.AdamW(trained, self.learning_rate, betas=self.betas, weight_decay=self.weight_decay)

    def schedule(self, module: L.LightningModule) -> dict[str, Any]:
        """The optimizer of a module and its learning rate at every step, as Lightning takes them.

        Raises:
            InputError: the module's trainer has no last step.
        """
        optimizer = self.optimizer(module)
        estimated = module.trainer.estimated_stepping_batches
        if not 1 <= estimated < math.inf:
            raise InputError("training has no end: set trainer.max_steps or trainer.max_epochs, the schedule needs it")
        steps = int(estimated)
        warmup = min(self.warmup_steps, steps // 2)
        scheduler = CosineLRScheduler(
            optimizer,
            t_initial=max(1, steps - warmup),
            lr_min=self.learning_rate * self.final_fraction,
            warmup_t=warmup,
            warmup_lr_init=self.learning_rate / 100,
            warmup_prefix=True,
            t_in_epochs=False,
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class RegistrationModule(L.LightningModule):
    """Trains, validates and runs a cascade.

    Training draws chains of patches; validation and testing register whole images as :func:`patchreg.register` does,
    without its refinement.

    Args:
        cascade: the model.
        objective: what to minimise.
        optimization: how.
        patch_batch: patches that go through a network together in validation.
        initial_model: a model of the zoo or a run's folder ``model`` to start from: weights of the same name and shape
            are taken over. For fine-tuning, and for training a cascade stage after stage.
    """

    def __init__(
        self,
        cascade: PatchCascade,
        objective: Objective,
        optimization: Optimization | None = None,
        patch_batch: int = 4,
        initial_model: str | None = None,
    ) -> None:
        super().__init__()
        self.cascade, self.objective = cascade, objective
        self.optimization = optimization or Optimization()
        self.patch_batch = patch_batch
        if initial_model is not None:
            taken, own = load_matching(cascade, model_folder(initial_model))
            log.info("%d of %d weight tensors taken from %s", taken, own, initial_model)

    def prepare(self, pair: Pair) -> PreparedPair:
        """Make both images of a pair ready for the cascade."""
        fixed = self.cascade.prepare(pair.fixed, pair.fixed_labels)
        moving = self.cascade.prepare(pair.moving, pair.moving_labels)
        return PreparedPair(fixed, moving, pair.moving_warp, pair.fixed_warp)

    def forward(self, batch: Sequence[Pair]) -> list[Result]:
        """Register every pair of a batch."""
        return [self.register(self.prepare(pair)) for pair in batch]

    def register(self, pair: PreparedPair) -> Result:
        """Register one pair, covering the whole image."""
        return self.cascade.register(
            pair.fixed, pair.moving, pair.initial, batch=self.patch_batch, fixed_warp=pair.fixed_warp
        )

    def loss(self, pairs: Sequence[PreparedPair], scale: float = 1.0) -> tuple[Tensor, dict[str, Tensor]]:
        """One training pass: what to minimise, and its terms.

        Where gradients stop between stages they are taken stage by stage, and the activations of one stage exist at a
        time; the result's backward pass only hands them out (:func:`patchreg.training.stepwise.with_gradients`).

        Args:
            pairs: images of any sizes, spacings and orientations.
            scale: of the gradients while they are computed, against underflow in half precision.
        """
        stepwise = self.cascade.stop_gradients and torch.is_grad_enabled()
        parameters = [p for p in self.cascade.parameters() if p.requires_grad]
        parts: list[Tensor | None] = []
        terms: dict[str, Tensor] = {}
        for output in self.cascade.steps(pairs):
            part, found = self.objective.of(output)
            del output  # with its activations, before the next stage runs
            if stepwise and part is not None and part.requires_grad:
                part = with_gradients(part, parameters, scale)
            parts.append(part)
            terms.update(found)
        return sum_of_stages(parts), terms

    def _scaler(self) -> Any:
        return getattr(self.trainer.precision_plugin, "scaler", None)

    def _loss_scale(self) -> float:
        scaler = self._scaler()
        return 1.0 if scaler is None else float(scaler.get_scale())

    def training_step(self, batch: Sequence[Pair], batch_idx: int) -> Tensor:
        total, terms = self.loss([self.prepare(pair) for pair in batch], self._loss_scale())
        if not bool(torch.isfinite(total)):
            names = ", ".join(pair.name for pair in batch)
            raise InputError(
                f"the loss is {float(total)} at step {self.global_step} ({names}): lower the learning rate, or look at these images"
            )
        self.log("train/loss", total, prog_bar=True, batch_size=len(batch))
        self.log_dict({f"train/{name}": value for name, value in terms.items()}, batch_size=len(batch))
        return total

    def validation_step(self, batch: Sequence[Pair], batch_idx: int) -> Any:
        return self._evaluate(batch, "val")

    def test_step(self, batch: Sequence[Pair], batch_idx: int) -> Any:
        return self._evaluate(batch, "test")

    def predict_step(self, batch: Sequence[Pair], batch_idx: int) -> list[tuple[Pair, Result]]:
        return list(zip(batch, self(batch), strict=True))

    def _evaluate(self, batch: Sequence[Pair], split: str) -> list[Evaluation]:
        found = []
        for pair in batch:
            prepared = self.prepare(pair)
            result = self.register(prepared)
            evaluation = evaluate(prepared, result, self.objective.labels)
            for name, value in evaluation.metrics.items():
                known = math.isfinite(value)  # every rank must log the same names; what is unknown weighs nothing
                self.log(
                    f"{split}/{name}",
                    value if known else 0.0,
                    prog_bar=name in ("dice", "similarity"),
                    on_epoch=True,
                    on_step=False,
                    batch_size=int(known),
                    sync_dist=True,
                )
            found.append(evaluation)
        return found

    def configure_optimizers(self) -> Any:
        return self.optimization.schedule(self)

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        optimizer.zero_grad()  # Lightning would keep the gradients through the next step's forward pass

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The schedule is a function of the step and of the settings: a resumed run follows the settings it is given."""
        checkpoint["lr_schedulers"] = []

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        scheduler.step_update(num_updates=self.global_step)
