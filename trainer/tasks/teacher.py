"""The teacher: labelled images only, compared in disparity.

Depth Anything V1 (arXiv 2401.10891, section 3.1): the affine-invariant loss alone. V2 (arXiv 2406.09414, sections 5.2
and 7.1): the same and twice gradient matching, `gradient_weight: 2.0`. MiDaS (arXiv 1907.01341): `loss: lsq`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from dataio.spec import RoleNeeds
from dataio.types import Batch
from trainer.config import Section
from trainer.config_train import ModelSection
from trainer.losses_disparity import DisparityOptions, RoleLoss
from trainer.tasks.base import DepthTask, Forward


class TrainingTask(DepthTask):
    """Terms `labelled` and, where it has a weight, `labelled_gradient`."""

    Options: ClassVar[type[Section]] = DisparityOptions

    def __init__(self, options: DisparityOptions, model: ModelSection) -> None:
        super().__init__(options, model)
        self.loss = RoleLoss(role="labelled", weight=1.0, options=options)

    @property
    def needs(self) -> Mapping[str, RoleNeeds]:
        return {"labelled": RoleNeeds()}

    @property
    def term_weights(self) -> dict[str, float]:
        return self.loss.term_weights

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        return self.loss.counts(batch)

    def sums(self, forward: Forward, batch: Batch) -> dict[str, Tensor]:
        return self.loss.sums(forward(batch.views["student"]).disparity_BHW, batch)
