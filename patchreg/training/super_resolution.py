"""The LightningModule of super-resolution."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanSquaredError, Metric
from torchmetrics.image import PeakSignalNoiseRatio

from patchreg.errors import InputError
from patchreg.training.module import Optimization


class SuperResolutionModule(L.LightningModule):
    """Trains a network to give high-resolution patches from low-resolution ones, by the mean squared error.

    Validation logs the root of it and the peak signal-to-noise ratio in dB, for a range of 1, and beside them those of
    trilinear interpolation, which the network must beat.

    Args:
        network: from (B, C, P, P, P) to r times the resolution, or the middle of that, such as
            :class:`patchreg.networks.ESPCN`.
        optimization: how.

    References:
        Blumberg et al. 2018, arXiv:1808.05577, section 3.
    """

    def __init__(self, network: nn.Module, optimization: Optimization | None = None) -> None:
        super().__init__()
        self.network = network
        self.optimization = optimization or Optimization()
        self.metrics = nn.ModuleDict(
            {
                name: metric
                for method in ("", "_trilinear")
                for name, metric in (
                    (f"rmse{method}", MeanSquaredError(squared=False)),
                    (f"psnr{method}", PeakSignalNoiseRatio(data_range=1.0)),
                )
            }
        )

    def forward(self, low: Tensor) -> Tensor:
        """The network's answer."""
        out: Tensor = self.network(low)
        return out

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        found = self(batch["low"])
        loss = F.mse_loss(found, middle(batch["high"], found))
        self.log("train/loss", loss, prog_bar=True, batch_size=len(found))
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "val")

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "test")

    def _evaluate(self, batch: dict[str, Tensor], split: str) -> None:
        found = self(batch["low"]).float()
        high = middle(batch["high"], found).contiguous()
        linear = F.interpolate(batch["low"], size=batch["high"].shape[2:], mode="trilinear", align_corners=False)
        for method, answer in (("", found), ("_trilinear", middle(linear, found))):
            for measure in ("rmse", "psnr"):
                name = measure + method
                metric = self.metrics[name]
                assert isinstance(metric, Metric)
                metric.update(answer.contiguous(), high)
                self.log(
                    f"{split}/{name}", metric, on_epoch=True, on_step=False, prog_bar=name in ("psnr", "psnr_trilinear")
                )

    def configure_optimizers(self) -> Any:
        return self.optimization.schedule(self)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The schedule is a function of the step and of the settings."""
        checkpoint["lr_schedulers"] = []

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        scheduler.step_update(num_updates=self.global_step)


def middle(x: Tensor, like: Tensor) -> Tensor:
    """The middle of ``x`` of the size of ``like``.

    Raises:
        InputError: it is larger, or not in the middle of whole voxels.
    """
    cut = [a - b for a, b in zip(x.shape[2:], like.shape[2:], strict=True)]
    if min(cut) < 0 or any(n % 2 for n in cut) or x.shape[:2] != like.shape[:2]:
        raise InputError(
            f"a network that gives {tuple(like.shape)} does not fit patches {tuple(x.shape)} of high resolution: use the "
            "same channels and upsampling for the network and the data"
        )
    i, j, k = (slice(n // 2, size - n // 2) for n, size in zip(cut, x.shape[2:], strict=True))
    return x[:, :, i, j, k]
