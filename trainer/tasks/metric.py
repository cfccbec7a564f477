"""Fine-tuning to metres: labelled depths, a sigmoid head times the preset's largest depth, SiLog.

The one training program that Depth Anything V2 published (repository, metric_depth/train.py and util/loss.py). It
starts from a trained encoder and a random decoder: `model.encoder_weights`, which reads the encoder of a whole network
too. There the loss is that of a batch's pixels together, and NaN for a batch without any; here it is that of an image,
and an image without a pixel in range does not count.

Shape suffixes: B batch, C channel, H W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from dataio.spec import RoleNeeds
from dataio.types import Batch
from trainer.config import ConfigError, Section
from trainer.config_train import ModelSection
from trainer.losses import silog_loss
from trainer.tasks.base import DepthTask, Forward


class MetricOptions(Section):
    """Which depths are learned from: those of min_depth metres up to the preset's max_depth_m."""

    min_depth: float = Field(default=0.001, gt=0, description="metres")
    mean_weight: float = Field(default=0.5, ge=0, le=1, description="how much of a common factor is forgiven; 1: all")


class TrainingTask(DepthTask):
    """Term `labelled`: mean over the images with a depth in range of SiLog."""

    Options: ClassVar[type[Section]] = MetricOptions
    head: ClassVar[Literal["relative", "metric"]] = "metric"

    def __init__(self, options: MetricOptions, model: ModelSection) -> None:
        super().__init__(options, model)
        self.opt = options
        if options.min_depth >= self.max_depth_m:
            raise ConfigError(
                f"task.min_depth: found {options.min_depth}; must be below the {self.max_depth_m:g} m of "
                f"model.preset {self.preset.name!r}"
            )

    @property
    def max_depth_m(self) -> float:
        """The largest depth that the network can say, metres."""
        assert self.preset.max_depth_m is not None  # a preset with the metric head has it
        return self.preset.max_depth_m

    @property
    def needs(self) -> Mapping[str, RoleNeeds]:
        return {"labelled": RoleNeeds(target="depth_m")}

    @property
    def term_weights(self) -> dict[str, float]:
        return {"labelled": 1.0}

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        return {"labelled": self._weights(batch, self._valid(batch)).sum()}

    def sums(self, forward: Forward, batch: Batch) -> dict[str, Tensor]:
        depth_BHW = forward(batch.views["student"]).depth_m_BHW
        valid_BHW = self._valid(batch)
        loss_B = silog_loss(depth_BHW, batch.targets["depth_m"].value_BHW, valid_BHW, self.opt.mean_weight)
        return {"labelled": (loss_B * self._weights(batch, valid_BHW)).sum()}

    def preview(self, module: nn.Module, image_BCHW: Tensor) -> Tensor:
        """Inverse depth, 1 / m: larger is nearer."""
        depth_BHW: Tensor = module(image_BCHW).depth_m_BHW
        return 1 / depth_BHW.clamp(min=self.opt.min_depth)

    def _valid(self, batch: Batch) -> Tensor:
        """Pixels that are learned from: bool [B, H, W]."""
        depth_BHW = batch.targets["depth_m"].value_BHW
        return (batch.region_BHW > 0) & (depth_BHW >= self.opt.min_depth) & (depth_BHW <= self.max_depth_m)

    def _weights(self, batch: Batch, valid_BHW: Tensor) -> Tensor:
        """Weight of every image, 0 where no pixel is in range: [B]."""
        return batch.weight_B * valid_BHW.flatten(1).any(1)
