"""The encoder: DINOv2's ViT/14 with timm's blocks, under DINOv2's own parameter names.

Sources: DINOv2 (arXiv 2304.07193); Depth-Anything-V2 `depth_anything_v2/dinov2.py`.
Shape suffixes: B batch, C channel, H W pixels, h w patches, N patch tokens (row-major), T tokens with the class token
first, D width.
"""

from __future__ import annotations

import os
from typing import Self

import torch
import torch.nn.functional as F
from timm.layers import SwiGLUPacked
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from model import weights
from model.preprocess import PATCH
from model.presets import Preset, get_preset

# DINOv2 resizes position embeddings by a scale factor that aims at (patches + 0.1), against rounding down: the result
# differs from a resize to the exact size, and the published weights were trained with it.
POSITION_OFFSET = 0.1


class Encoder(nn.Module):
    """DINOv2 ViT/14 without registers; all tokens returned are through the shared final LayerNorm.

    The frozen `mask_token` takes no part in the forward pass; it is kept so that files interchange.
    """

    def __init__(self, preset: Preset) -> None:
        super().__init__()
        self.preset = preset
        swiglu = preset.ffn == "swiglu"
        # DINOv2's SwiGLU width: two thirds of 4 x width, rounded up to a multiple of 8; two such, packed.
        packed = 2 * ((int(4 * preset.width * 2 / 3) + 7) // 8 * 8)
        vit = VisionTransformer(
            img_size=preset.grid * PATCH,
            patch_size=PATCH,
            num_classes=0,
            embed_dim=preset.width,
            depth=preset.depth,
            num_heads=preset.heads,
            init_values=1.0,
            dynamic_img_size=True,
            weight_init="skip",
            **(dict(mlp_ratio=packed / preset.width, mlp_layer=SwiGLUPacked, act_layer=nn.SiLU) if swiglu else {}),
        )
        for block in vit.blocks:
            block.attn.fused_attn = preset.fused_attention
        self.cls_token = vit.cls_token
        self.pos_embed = vit.pos_embed
        self.mask_token = nn.Parameter(torch.zeros(1, preset.width), requires_grad=False)
        self.patch_embed = vit.patch_embed
        self.blocks = vit.blocks
        self.norm = vit.norm

    @classmethod
    def from_preset(cls, preset: str | Preset, encoder_weights: str | os.PathLike[str] | None = None) -> Self:
        """A fresh encoder, or one read from a DINOv2 file (hub or timm names) or a whole Depth Anything's file.

        Raises:
            WeightsError: unknown preset, or the file does not fit.
        """
        with torch.device("meta"):
            encoder = cls(get_preset(preset))
        weights.materialise(encoder)
        encoder.initialise()
        if encoder_weights is not None:
            weights.load_encoder(encoder, encoder_weights)
        weights.require_finite(encoder, str(encoder_weights or "initialisation"))
        return encoder

    @torch.no_grad()
    def initialise(self) -> None:
        """DINOv2's initial values: linear layers truncated normal 0.02 and bias 0, LayerScale 1, class token ~1e-6."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, (nn.LayerNorm, nn.Conv2d)):
                module.reset_parameters()
        for name, parameter in self.named_parameters():
            if name.endswith(".gamma"):
                nn.init.ones_(parameter)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.cls_token, std=1e-6)
        nn.init.zeros_(self.mask_token)

    def position_embedding(self, h: int, w: int) -> Tensor:
        """Position embedding for a grid of h x w patches: [1, 1 + h * w, D], float32.

        The stored one itself when the grid is the stored one; otherwise its patch part resized bicubically, without
        antialiasing, by the scale factors (h + 0.1) / grid and (w + 0.1) / grid (Depth-Anything-V2 `dinov2.py`,
        `interpolate_pos_encoding`).
        """
        grid = self.preset.grid
        pos_1TD = self.pos_embed.float()
        if (h, w) == (grid, grid):
            return pos_1TD
        pos_1Dhw = pos_1TD[:, 1:].reshape(1, grid, grid, -1).permute(0, 3, 1, 2)
        scale = ((h + POSITION_OFFSET) / grid, (w + POSITION_OFFSET) / grid)
        pos_1Dhw = F.interpolate(pos_1Dhw, scale_factor=scale, mode="bicubic", antialias=False)
        return torch.cat([pos_1TD[:, :1], pos_1Dhw.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)

    def forward(self, image_BCHW: Tensor) -> tuple[list[Tensor], Tensor]:
        """Tokens of an ImageNet-normalised image whose sides are multiples of 14.

        Returns:
            the four taps [B, N, D], shallow to deep, and the last block's patch tokens [B, N, D]; all through the
            final LayerNorm, class token dropped.

        Raises:
            ValueError: not a float [B, 3, H, W], or a side that is not a multiple of 14.
        """
        check_image(image_BCHW)
        patches_BhwD = self.patch_embed(image_BCHW)
        _, h, w, _ = patches_BhwD.shape
        pos_1TD = self.position_embedding(h, w)
        if not torch.is_autocast_enabled(image_BCHW.device.type):
            pos_1TD = pos_1TD.to(patches_BhwD.dtype)
        patches_BND = patches_BhwD.flatten(1, 2) + pos_1TD[:, 1:]
        cls_B1D = (self.cls_token + pos_1TD[:, :1]).to(patches_BND.dtype).expand(len(patches_BND), -1, -1)
        x_BTD = torch.cat([cls_B1D, patches_BND], dim=1)
        taps = []
        for i, block in enumerate(self.blocks):
            x_BTD = block(x_BTD)
            if i in self.preset.taps:
                taps.append(self.norm(x_BTD[:, 1:]))
        last = taps[-1] if self.preset.taps[-1] == self.preset.depth - 1 else self.norm(x_BTD[:, 1:])
        return taps, last


def check_image(image_BCHW: Tensor) -> None:
    """Raises ValueError, naming what was found and expected, unless a float [B, 3, H, W] with sides multiples of 14."""
    shape = tuple(image_BCHW.shape)
    if len(shape) != 4 or shape[1] != 3:
        raise ValueError(f"expected images [B, 3, H, W], found shape {list(shape)}")
    if not image_BCHW.is_floating_point():
        raise ValueError(f"expected ImageNet-normalised float images, found {image_BCHW.dtype}; see infer_image")
    if shape[2] % PATCH or shape[3] % PATCH or not shape[2] or not shape[3]:
        raise ValueError(f"expected sides that are multiples of {PATCH}, found {shape[2]} x {shape[3]}")
