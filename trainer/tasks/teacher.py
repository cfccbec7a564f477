"""The teacher: labelled images only, affine-invariant loss (arXiv 2401.10891, section 3.1)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from dataio.spec import RoleNeeds
from dataio.types import Batch
from trainer.losses import regional_affine_invariant_loss
from trainer.tasks.base import DepthTask, Forward, weight_of


class TrainingTask(DepthTask):
    """Term `labelled`: mean over labelled images of the affine-invariant loss in disparity."""

    needs: ClassVar[Mapping[str, RoleNeeds]] = {"labelled": RoleNeeds()}

    @property
    def term_weights(self) -> dict[str, float]:
        return {"labelled": 1.0}

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        return {"labelled": weight_of(batch, "labelled")}

    def sums(self, forward: Forward, batch: Batch) -> dict[str, Tensor]:
        pred_BHW = forward(batch.views["student"]).disparity_BHW
        target_BHW = batch.targets["disparity"].value_BHW
        loss_B = regional_affine_invariant_loss(pred_BHW.float(), target_BHW, batch.region_BHW, num_regions=1)
        return {"labelled": (loss_B * batch.weight_B).sum()}
