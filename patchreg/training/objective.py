"""What training minimises."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from patchreg.cascade import StageOutput
from patchreg.errors import InputError
from patchreg.fake import is_fake
from patchreg.losses import LabelSet, SoftDice, centroid_distance_mm
from patchreg.spatial import MappedGrid, Volume


@dataclass(frozen=True)
class Objective:
    """A weighted sum over stages of similarity, regularity, and overlap of labels where there are any.

    Args:
        similarity: a loss of (fixed, moved, mask), such as :class:`patchreg.losses.LNCC`. None: labels alone.
        regularity: a loss of (displacement in mm, spacing in mm) on what a deformable stage adds, such as
            :class:`patchreg.losses.Diffusion`.
        similarity_weight: weight of the similarity.
        regularity_weight: its weight; a list has one for every stage.
        labels: label values whose overlap counts.
        overlap_weight: weight of soft Dice over ``labels``, in deformable stages.
        overlap_stride: take it at every n-th voxel of a patch along each dimension, from a random first one: networks
            answer smoothly, and 2 costs an eighth.
        centroid_weight: weight, per cm, of the distance between centres of ``labels``, in affine stages.
        stage_weights: weight of every stage's sum. None: one each.
        masked: leave out of the similarity where the moving image was not there to be sampled.

    Raises:
        InputError: nothing to minimise, or weights without labels.
    """

    similarity: nn.Module | None
    regularity: nn.Module | None
    similarity_weight: float = 1.0
    regularity_weight: float | list[float] = 1.0
    labels: list[int] | None = None
    overlap_weight: float = 0.0
    overlap_stride: int = 1
    centroid_weight: float = 0.0
    stage_weights: list[float] | None = None
    masked: bool = False

    def __post_init__(self) -> None:
        if self.similarity is None and self.overlap_weight == 0 and self.centroid_weight == 0:
            raise InputError("the objective has nothing to minimise: give a similarity, or labels and their weights")
        if (self.overlap_weight or self.centroid_weight) and not self.labels:
            raise InputError("overlap_weight and centroid_weight need labels")

    def of(self, output: StageOutput) -> tuple[Tensor | None, dict[str, Tensor]]:
        """One stage's share of the total, None where no term applies, and every term by name before weighting."""
        weight = 1.0 if self.stage_weights is None else _pick(self.stage_weights, output.index, "stage_weights")
        total: Tensor | None = None
        terms: dict[str, Tensor] = {}
        for name, factor, value in self._terms(output):
            terms[f"stage{output.index}/{name}"] = value.detach()
            part = weight * factor * value.to(output.fixed.device, torch.float32)
            total = part if total is None else total + part
        return total, terms

    def __call__(self, outputs: Sequence[StageOutput]) -> tuple[Tensor, dict[str, Tensor]]:
        """The total, and every term by name (``stage0/similarity``, ...) before weighting; of repeats the last.

        Raises:
            InputError: no term applies.
        """
        parts, terms = zip(*(self.of(output) for output in outputs), strict=True) if outputs else ((), ())
        return sum_of_stages(parts), {name: value for each in terms for name, value in each.items()}

    def _terms(self, output: StageOutput) -> list[tuple[str, float, Tensor]]:
        found: list[tuple[str, float, Tensor]] = []
        here = output.grids[0]
        if self.similarity is not None:
            with torch.autocast(output.fixed.device.type, enabled=False):
                mask = output.inside if self.masked and _selects(output) else None
                value = here.measure(self.similarity, output.fixed.float(), output.moved.float(), mask)
            found.append(("similarity", self.similarity_weight, value))
        if output.update_mm is not None and self.regularity is not None:
            each = zip(output.update_mm, output.grids, strict=True)
            rough = [g.measure(self.regularity, u[None], g.spacing) for u, g in each]
            weight = self.regularity_weight
            factor = weight if isinstance(weight, (int, float)) else _pick(weight, output.index, "regularity_weight")
            found.append(("regularity", factor, torch.stack(rough).mean()))
        labels = None if self.labels is None else LabelSet(self.labels)
        if labels is not None and output.update_mm is not None and self.overlap_weight:
            fixed, moving = _labelled(output, self.overlap_stride)
            if fixed:
                found.append(("overlap", self.overlap_weight, here.measure(SoftDice(labels), fixed, moving)))
        if labels is not None and output.update_mm is None and self.centroid_weight:
            distances = [
                centroid_distance_mm(f.at(4.0), m.at(4.0), pair.fixed_warp, transform, labels)
                for pair, transform in zip(output.pairs, output.transforms, strict=True)
                if (f := pair.fixed.labels) is not None and (m := pair.moving.labels) is not None
            ]
            if distances:
                found.append(("centroids_mm", self.centroid_weight / 10, torch.stack(distances).mean()))
        return found


def sum_of_stages(parts: Sequence[Tensor | None]) -> Tensor:
    """The total of the stages' shares.

    Raises:
        InputError: there is none to take a gradient of.
    """
    found = [part for part in parts if part is not None and part.requires_grad]
    if not found:
        raise InputError("no term of the objective applies to these pairs: do they have labels?")
    return torch.stack(found).sum()


def _selects(output: StageOutput) -> bool:
    """Whether the moving image was there to be sampled anywhere."""
    return is_fake(output.inside) or bool(output.grids[0].add_up(output.inside.sum()) > 0)


Points = list[tuple[MappedGrid, Volume]]


def _labelled(output: StageOutput, stride: int) -> tuple[Points, Points]:
    """Points of the patches whose pairs have labels, with the label maps at the patch's resolution: fixed, moving."""
    fixed: Points = []
    moving: Points = []
    for pair, of_fixed, of_moving in zip(output.pairs, output.fixed_points, output.mapped, strict=True):
        spacing = min(of_fixed.grid.spacing)
        if pair.fixed.labels is None or pair.moving.labels is None:
            continue
        i, j, k = torch.randint(stride, (3,)).tolist()
        fixed.append((of_fixed.strided(stride, (i, j, k)), pair.fixed.labels.at(spacing)))
        moving.append((of_moving.strided(stride, (i, j, k)), pair.moving.labels.at(spacing)))
    return fixed, moving


def _pick(values: Sequence[float], index: int, name: str) -> float:
    if index >= len(values):
        raise InputError(f"{name} has {len(values)} numbers, but the cascade has a stage {index + 1}")
    return values[index]
