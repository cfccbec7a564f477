"""The paper's losses written out by hand, a stand-in for the engine, and a checkpoint without a run.

Shape suffixes: B batch, C channel, H W pixels, N tokens, D width, K pixels of one region.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dataio.types import Batch
from model.types import DepthPrediction
from tests.trainer.batches import SIZE
from trainer.checkpoint import WEIGHTS, About, TrainState, commit, fingerprint, partial_folder, write_tensors


class Forward:
    """Stands for the engine: a disparity and features given beforehand, both leaves of the graph."""

    def __init__(self, disparity_BHW: Tensor, features_BND: Tensor | None = None) -> None:
        self.disparity_BHW = disparity_BHW.requires_grad_()
        self.features_BND = None if features_BND is None else features_BND.requires_grad_()

    def __call__(self, image_BCHW: Tensor, features: bool = False) -> DepthPrediction:
        assert features == (self.features_BND is not None)
        assert image_BCHW.shape[0] == self.disparity_BHW.shape[0]
        return DepthPrediction(disparity_BHW=self.disparity_BHW, features_BND=self.features_BND)


def without_weight(batch: Batch, *rows: int) -> Batch:
    """These rows have pixels and regions but no weight."""
    weight_B = batch.weight_B.clone()
    weight_B[list(rows)] = 0
    return replace(batch, weight_B=weight_B)


def some_disparity(batch: Batch) -> Tensor:
    return torch.rand(len(batch), SIZE, SIZE, generator=torch.Generator().manual_seed(9))


def normalised(x_K: Tensor) -> Tensor:
    """Equations 2 and 3 of the paper, by hand: the lower median and the mean absolute deviation from it."""
    centred_K = x_K - x_K.sort().values[(len(x_K) - 1) // 2]
    return centred_K / centred_K.abs().mean()


def by_hand(pred_HW: Tensor, target_HW: Tensor, region_HW: Tensor) -> float:
    """Every region normalised by its own median and deviation, the image's mean over all valid pixels."""
    total, area = 0.0, 0
    for label in (1, 2):
        pixels_HW = region_HW == label
        if pixels_HW.any():
            total += float((normalised(pred_HW[pixels_HW]) - normalised(target_HW[pixels_HW])).abs().sum())
            area += int(pixels_HW.sum())
    return total / max(area, 1)


def expected_losses(batch: Batch, pred_BHW: Tensor) -> list[float]:
    target_BHW = batch.targets["disparity"].value_BHW
    return [by_hand(pred_BHW[i].detach(), target_BHW[i], batch.region_BHW[i]) for i in range(len(batch))]


def checkpoint_of(root: Path, module: nn.Module, record: Any) -> str:
    """A training checkpoint of a network that no optimizer has seen yet; its folder."""
    tensors = {name: tensor.detach().contiguous() for name, tensor in module.state_dict().items()}
    files = {WEIGHTS: write_tensors(partial_folder(str(root), 1), WEIGHTS, tensors)}
    state = TrainState(step=1, applied_steps=0, cursor={})
    return commit(str(root), state, files, fingerprint(tensors), About(network=record))
