"""The teacher: labelled images only, affine-invariant loss (arXiv 2401.10891, section 3.1)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor, nn

from dataio.spec import RoleNeeds
from dataio.types import Batch
from model import DepthAnything
from trainer.losses import regional_affine_invariant_loss
from trainer.tasks.base import Forward, Task, encoder_decoder_groups, weight_of


class TrainingTask(Task):
    """Term `labelled`: mean over labelled images of the affine-invariant loss in disparity."""

    needs: ClassVar[Mapping[str, RoleNeeds]] = {"labelled": RoleNeeds()}

    def build(self) -> nn.Module:
        return build_depth_network(self)

    def parameter_groups(self, module: nn.Module) -> dict[str, list[tuple[str, nn.Parameter]]]:
        return encoder_decoder_groups(module)

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

    def export(self, module: nn.Module, folder: str) -> None:
        assert isinstance(module, DepthAnything)
        module.save_pretrained(folder)

    def preview(self, module: nn.Module, image_BCHW: Tensor) -> Tensor:
        disparity_BHW: Tensor = module(image_BCHW).disparity_BHW
        return disparity_BHW


def build_depth_network(task: Task) -> DepthAnything:
    """The network of `model:`, whole when `weights` names a file, else with its encoder from `encoder_weights`."""
    if task.model.weights:
        return DepthAnything.from_pretrained(task.model.weights, preset=task.model.preset)
    return DepthAnything.from_preset(task.model.preset, encoder_weights=task.model.encoder_weights)
