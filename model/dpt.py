"""The decoder: DPT (arXiv 2103.13413) as Depth Anything uses it, under the official parameter names.

Sources: Depth-Anything `depth_anything/dpt.py` and `blocks.py`; V2 is the same.
Shape suffixes: B batch, C channel, H W pixels, h w patches, N patch tokens (row-major), D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.preprocess import PATCH
from model.presets import Preset
from model.types import EncoderOutput


def _resize(x_BCHW: Tensor, height: int, width: int) -> Tensor:
    return F.interpolate(x_BCHW, size=(height, width), mode="bilinear", align_corners=True)


class ResidualConvUnit(nn.Module):
    """x + conv2(relu(conv1(relu(x)))), 3x3, same size and channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        # Not in place: the residual still needs x before its ReLU.
        return x_BCHW + self.conv2(F.relu(self.conv1(F.relu(x_BCHW))))


class FusionBlock(nn.Module):
    """Adds a refined skip to the deeper map, refines, resizes, mixes channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.out_conv = nn.Conv2d(channels, channels, 1)
        self.resConfUnit1 = ResidualConvUnit(channels)
        self.resConfUnit2 = ResidualConvUnit(channels)

    def forward(self, deep_BCHW: Tensor, skip_BCHW: Tensor | None, size: tuple[int, int] | None) -> Tensor:
        """deep and skip [B, C, H, W] of one size (the deepest block has no skip) -> [B, C, *size or 2 H, 2 W]."""
        if skip_BCHW is not None:
            deep_BCHW = deep_BCHW + self.resConfUnit1(skip_BCHW)
        deep_BCHW = self.resConfUnit2(deep_BCHW)
        if size is None:
            return self.out_conv(F.interpolate(deep_BCHW, scale_factor=2, mode="bilinear", align_corners=True))
        return self.out_conv(_resize(deep_BCHW, *size))


class Scratch(nn.Module):
    """Only a namespace: the official files keep everything after reassembly under `scratch`."""

    def __init__(self, preset: Preset) -> None:
        super().__init__()
        features = preset.features
        c1, c2, c3, c4 = preset.out_channels
        self.layer1_rn = nn.Conv2d(c1, features, 3, padding=1, bias=False)
        self.layer2_rn = nn.Conv2d(c2, features, 3, padding=1, bias=False)
        self.layer3_rn = nn.Conv2d(c3, features, 3, padding=1, bias=False)
        self.layer4_rn = nn.Conv2d(c4, features, 3, padding=1, bias=False)
        self.refinenet1 = FusionBlock(features)
        self.refinenet2 = FusionBlock(features)
        self.refinenet3 = FusionBlock(features)
        self.refinenet4 = FusionBlock(features)
        self.output_conv1 = nn.Conv2d(features, features // 2, 3, padding=1)
        self.output_conv2 = nn.Sequential(
            nn.Conv2d(features // 2, preset.head_channels, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(preset.head_channels, 1, 1),
        )


class DPT(nn.Module):
    """Four taps of tokens -> one map at pixel resolution: disparity >= 0 (ReLU) or depth in metres (sigmoid).

    `scratch.refinenet4.resConfUnit1` never takes part (there is no skip at the deepest level): kept, because the
    official files hold it, and frozen, so that distributed training does not wait for its gradient.
    """

    def __init__(self, preset: Preset) -> None:
        super().__init__()
        self.preset = preset
        c1, c2, _, c4 = preset.out_channels
        self.projects = nn.ModuleList(nn.Conv2d(preset.width, channels, 1) for channels in preset.out_channels)
        self.resize_layers = nn.ModuleList(
            [
                nn.ConvTranspose2d(c1, c1, kernel_size=4, stride=4),
                nn.ConvTranspose2d(c2, c2, kernel_size=2, stride=2),
                nn.Identity(),
                nn.Conv2d(c4, c4, kernel_size=3, stride=2, padding=1),
            ]
        )
        if preset.readout == "project":
            self.readout_projects = nn.ModuleList(
                nn.Sequential(nn.Linear(2 * preset.width, preset.width), nn.GELU()) for _ in preset.taps
            )
        self.scratch = Scratch(preset)
        self.scratch.refinenet4.resConfUnit1.requires_grad_(False)

    @torch.no_grad()
    def initialise(self) -> None:
        """PyTorch's defaults, as the originals; the last bias is the preset's where it has one (our choice)."""
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
                module.reset_parameters()
        if self.preset.head_bias is not None:
            dict(self.named_parameters())["scratch.output_conv2.2.bias"].fill_(self.preset.head_bias)

    def reassemble(self, tokens: EncoderOutput, h: int, w: int) -> list[Tensor]:
        """Taps [B, N, D] -> maps [B, features, ., .] at 4, 2, 1 and 1/2 times the patch grid, shallow to deep."""
        maps = []
        scratch = self.scratch
        reduce = (scratch.layer1_rn, scratch.layer2_rn, scratch.layer3_rn, scratch.layer4_rn)
        for i, (project, resize, to_features) in enumerate(
            zip(self.projects, self.resize_layers, reduce, strict=True)
        ):
            tap_BND = tokens.taps[i]
            if self.preset.readout == "project":
                class_BND = tokens.classes[i][:, None].expand_as(tap_BND)
                tap_BND = self.readout_projects[i](torch.cat([tap_BND, class_BND], dim=2))
            # Tokens are channels-last memory already: a view, no copy, and the convolutions stay in that format.
            tap_BDhw = tap_BND.unflatten(1, (h, w)).permute(0, 3, 1, 2)
            maps.append(to_features(resize(project(tap_BDhw))))
        return maps

    def forward(self, tokens: EncoderOutput, h: int, w: int) -> Tensor:
        """The encoder's taps, four of [B, h * w, D] -> [B, 14 h, 14 w], float32."""
        scratch = self.scratch
        l1, l2, l3, l4 = self.reassemble(tokens, h, w)
        # On even grids doubling gives the same sizes; said as a factor, an exported graph needs no shape arithmetic.
        even = self.preset.fusion == "even"
        path = scratch.refinenet4(l4, None, None if even else l3.shape[2:])
        path = scratch.refinenet3(path, l3, None if even else l2.shape[2:])
        path = scratch.refinenet2(path, l2, None if even else l1.shape[2:])
        path = scratch.refinenet1(path, l1, None)
        stride = self.preset.head_stride
        path = _resize(scratch.output_conv1(path), h * PATCH // stride, w * PATCH // stride)
        conv, relu, last = scratch.output_conv2
        path = relu(conv(path))
        # The last layer leaves reduced precision: a bfloat16 map would have no more than 128 levels per octave.
        with torch.autocast(path.device.type, enabled=False):
            out_B1HW = last(path.to(last.weight.dtype)).float()
            max_depth_m = self.preset.max_depth_m
            out_B1HW = F.relu(out_B1HW) if max_depth_m is None else out_B1HW.sigmoid() * max_depth_m
            if stride > 1:
                out_B1HW = _resize(out_B1HW, h * PATCH, w * PATCH)
        return out_B1HW.squeeze(1)
