"""How the disparity of one role's images is compared with its target: what teacher and student have in common.

Shape suffixes: B batch, H W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor

from dataio.types import Batch
from trainer.config import Section
from trainer.losses import (
    Normalisation,
    gradient_matching_loss,
    regional_affine_invariant_loss,
    regional_least_squares_loss,
)
from trainer.tasks.base import weight_of


class DisparityOptions(Section):
    """Options of every task that learns disparity. Depth Anything V1 has the defaults, V2 gradient_weight 2."""

    loss: Normalisation = Field(
        default="mad",
        description="mad: affine-invariant by median and deviation (Depth Anything); lsq: by least squares (MiDaS)",
    )
    gradient_weight: float = Field(default=0.0, ge=0, description="of gradient matching, beside 1 for the loss")
    gradient_scales: int = Field(default=4, ge=1, le=8)


@dataclass(frozen=True, kw_only=True)
class RoleLoss:
    """Terms ROLE and, with gradient matching, ROLE_gradient: means over the role's images.

    `weight` is that of both together; `trim` is of ROLE alone, as gradients are taken between all neighbours.
    """

    role: str
    weight: float
    options: DisparityOptions
    num_regions: int = 1  # 2 where CutMix may have pasted
    trim: float = 0.0  # with loss "mad" only

    @property
    def term_weights(self) -> dict[str, float]:
        """Weight of every term; none is 0."""
        weights = {self.role: self.weight, f"{self.role}_gradient": self.weight * self.options.gradient_weight}
        return {term: weight for term, weight in weights.items() if weight > 0}

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Images with weight, for every term: scalars."""
        return dict.fromkeys(self.term_weights, weight_of(batch, self.role))

    def sums(self, pred_BHW: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Sum over the role's images of every term's loss: differentiable scalars, 0 where the batch has no such rows.

        `pred_BHW` is of all rows of the batch.
        """
        rows, terms = batch.rows(self.role), self.term_weights
        if not len(pred_BHW[rows]):
            return dict.fromkeys(terms, pred_BHW[rows].sum())
        maps = (pred_BHW[rows], batch.targets["disparity"].value_BHW[rows], batch.region_BHW[rows])
        losses_B = {self.role: self._compare(*maps)}
        if self.options.gradient_weight > 0:
            losses_B[f"{self.role}_gradient"] = gradient_matching_loss(
                *maps, self.num_regions, self.options.gradient_scales, self.options.loss
            )
        return {term: torch.sum(losses_B[term] * batch.weight_B[rows]) for term in terms}

    def _compare(self, pred_BHW: Tensor, target_BHW: Tensor, region_BHW: Tensor) -> Tensor:
        if self.options.loss == "lsq":
            return regional_least_squares_loss(pred_BHW, target_BHW, region_BHW, self.num_regions)
        return regional_affine_invariant_loss(pred_BHW, target_BHW, region_BHW, self.num_regions, self.trim)
