"""The PatchMorph cascade."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import nn

from patchreg.cascade.chain import PreparedPair, StageOutput, run_chain
from patchreg.cascade.cover import Result, cover_all
from patchreg.cascade.prepared import Normalization, Prepared
from patchreg.cascade.stage import Stage
from patchreg.errors import InputError
from patchreg.spatial import Affine, Transform, Volume
from patchreg.types import Progress

Parts = Literal["all", "affine", "deformable"]


class PatchCascade(nn.Module):
    """Stages from coarse to fine, each a network on patches of constant size, linked in world coordinates.

    A stage samples the fixed image on its patch, and the moving image on the same patch through the transform found so
    far, and its answer is composed onto that transform. Images are interpolated once, whatever the number of stages.
    The published text of PatchMorph leaves patch sizes, counts and weights open; here they are arguments of the stages.

    Args:
        stages: coarse to fine; affine stages before deformable ones.
        normalization: of intensities, a part of the model.
        stop_gradients: whether, in training, a stage's loss leaves the stages before it alone.

    Raises:
        InputError: no stages, or an affine one after a deformable one.

    References:
        Skibbe et al. 2023, arXiv:2312.06958.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        normalization: Normalization | None = None,
        stop_gradients: bool = True,
    ) -> None:
        super().__init__()
        kinds = [stage.predicts == "affine" for stage in stages]
        if not kinds:
            raise InputError("a cascade needs at least one stage")
        if kinds != sorted(kinds, reverse=True):
            raise InputError("affine stages must come before deformable ones")
        self.stages = nn.ModuleList(stages)
        self.normalization = normalization or Normalization()
        self.stop_gradients = stop_gradients

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def prepare(self, volume: Volume, labels: Volume | None = None, mask: Volume | None = None) -> Prepared:
        """Make one image ready: find its content and the range of its intensities."""
        return Prepared(volume, self.normalization, labels, mask)

    def forward(self, pairs: Sequence[PreparedPair], generator: torch.Generator | None = None) -> list[StageOutput]:
        """One training pass: a chain of random nested patches for every pair.

        Args:
            pairs: images of any sizes, spacings and orientations.
            generator: of the patches; None uses torch's own.

        Returns:
            The outputs of every stage and repeat, to compute losses from.
        """
        return list(self.steps(pairs, generator))

    def steps(self, pairs: Sequence[PreparedPair], generator: torch.Generator | None = None) -> Iterator[StageOutput]:
        """:meth:`forward` one stage at a time; see :func:`patchreg.cascade.chain.run_chain`."""
        return run_chain(self._stages(), pairs, self.stop_gradients, generator)

    def register(
        self,
        fixed: Prepared,
        moving: Prepared,
        initial: Transform | None = None,
        parts: Parts = "all",
        batch: int = 4,
        passes: int | None = None,
        seed: int = 0,
        progress: Progress | None = None,
        fixed_warp: Transform | None = None,
    ) -> Result:
        """Cover the whole image, stage by stage.

        Args:
            fixed: the image whose space the result lies in.
            moving: the image that is moved.
            initial: where to start, fixed world to moving world. None: both worlds as they are.
            parts: which stages run: ``"all"``, the ``"affine"`` ones, or the ``"deformable"`` ones.
            batch: patches that go through a network together.
            passes: times a deformable stage covers the image, instead of its own setting.
            seed: of the random patches of further passes.
            progress: told after every batch of patches.
            fixed_warp: the fixed image is seen through it, as in training. None: as it is.
        """
        generator = torch.Generator().manual_seed(seed)
        stages = [s for s in self._stages() if parts == "all" or (s.predicts == "affine") == (parts == "affine")]
        pair = PreparedPair(fixed, moving, initial or Affine.identity(), fixed_warp or Affine.identity())
        training = self.training
        self.eval()
        try:
            return cover_all(stages, pair, batch, self.device, generator, passes, progress)
        finally:
            self.train(training)

    def _stages(self) -> list[Stage]:
        return [stage for stage in self.stages if isinstance(stage, Stage)]
