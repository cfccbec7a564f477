"""A stand-in for DINOv2 where none can be had: masked-patch prediction on unlabelled images, without any label.

The encoder sees a colour-perturbed image with a share of its patches blanked and predicts, at the blanked places, the
clean luminance normalised per patch (SimMIM, arXiv 2111.09886; the per-patch normalisation of MAE, arXiv 2111.06377,
section 4). So its features must tell structure and disregard colour. It is no DINOv2: the quickstart uses it because
weights cannot be shipped; whoever has a DINOv2 file needs no pretext.

Shape suffixes: B batch, C channel, H W pixels, N patch tokens, D width, P pixels of a patch.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from dataio.spec import RoleNeeds
from dataio.types import Batch
from model import DepthAnything
from model.save import save_encoder
from model.vit import Encoder
from trainer.config import Section
from trainer.config_train import ModelSection
from trainer.tasks.base import Forward, Task, encoder_decoder_groups, weight_of

PATCH = 14
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


class PretextOptions(Section):
    """How much of an image is blanked."""

    mask_ratio: float = Field(default=0.5, gt=0, lt=1)


class MaskedPrediction(nn.Module):
    """Encoder and a linear head from each token to the luminance of its patch."""

    def __init__(self, encoder: Encoder, width: int) -> None:
        super().__init__()
        self.pretrained = encoder
        self.head = nn.Linear(width, PATCH * PATCH)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """[B, 3, H, W] -> predicted normalised patches [B, N, P]."""
        features_BND = self.pretrained(image_BCHW).last_BND
        patches_BNP: Tensor = self.head(features_BND)
        return patches_BNP


class TrainingTask(Task):
    """Term `masked`: per-image mean over blanked patches of the squared error."""

    Options: ClassVar[type[Section]] = PretextOptions

    def __init__(self, options: PretextOptions, model: ModelSection) -> None:
        super().__init__(options, model)
        self.opt = options

    @property
    def needs(self) -> Mapping[str, RoleNeeds]:
        return {"unlabelled": RoleNeeds(target="none")}

    @property
    def views(self) -> tuple[str, ...]:
        return ("student", "clean")

    def build(self) -> nn.Module:
        network = DepthAnything.from_preset(self.model.preset, encoder_weights=self.model.encoder_weights)
        return MaskedPrediction(network.pretrained, network.preset.width)

    def parameter_groups(self, module: nn.Module) -> dict[str, list[tuple[str, nn.Parameter]]]:
        return encoder_decoder_groups(module)

    @property
    def term_weights(self) -> dict[str, float]:
        return {"masked": 1.0}

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        return {"masked": weight_of(batch, "unlabelled")}

    def sums(self, forward: Forward, batch: Batch) -> dict[str, Tensor]:
        image_BCHW = batch.views["student"]
        grid = (image_BCHW.shape[2] // PATCH, image_BCHW.shape[3] // PATCH)
        mask_BN = draw_masks(batch, grid[0] * grid[1], self.opt.mask_ratio).to(image_BCHW.device)
        mask_B1HW = F.interpolate(mask_BN.unflatten(1, grid).unsqueeze(1).float(), scale_factor=PATCH, mode="nearest")
        pred_BNP = forward(image_BCHW * (1 - mask_B1HW)).float()
        error_BN = (pred_BNP - normalised_patches(batch.views["clean"])).square().mean(-1)
        loss_B = (error_BN * mask_BN).sum(1) / mask_BN.sum(1)
        return {"masked": (loss_B * batch.weight_B).sum()}

    def export(self, module: nn.Module, folder: str) -> None:
        assert isinstance(module, MaskedPrediction)
        os.makedirs(folder, exist_ok=True)
        save_encoder(module.pretrained, os.path.join(folder, "encoder.safetensors"))

    def preview(self, module: nn.Module, image_BCHW: Tensor) -> Tensor:
        """The predicted patches laid out as an image."""
        patches_BNP: Tensor = module(image_BCHW)
        return F.fold(patches_BNP.transpose(1, 2), tuple(image_BCHW.shape[2:]), PATCH, stride=PATCH)[:, 0]


def normalised_patches(image_BCHW: Tensor) -> Tensor:
    """Luminance of each patch with zero mean and unit variance: [B, N, P]. A flat patch stays zero."""
    luma_B1HW = (image_BCHW * image_BCHW.new_tensor(LUMA).view(1, 3, 1, 1)).sum(1, keepdim=True)
    patches_BNP = F.unfold(luma_B1HW, PATCH, stride=PATCH).transpose(1, 2)
    centred_BNP = patches_BNP - patches_BNP.mean(-1, keepdim=True)
    return centred_BNP / (centred_BNP.square().mean(-1, keepdim=True) + 1e-3).sqrt()


def draw_masks(batch: Batch, tokens: int, ratio: float) -> Tensor:
    """Blanked patches of each image, float [B, N]: a function of its key and of the batch's place in the run."""
    position = sum(batch.cursor.values())
    mask_BN = np.zeros((len(batch), tokens), np.float32)
    for row, key in enumerate(batch.keys):
        bits = np.random.Philox(key=zlib.crc32(f"{key}:{position}".encode()))
        mask_BN[row, np.argsort(bits.random_raw(tokens), kind="stable")[: max(1, round(ratio * tokens))]] = 1
    return torch.from_numpy(mask_BN)
