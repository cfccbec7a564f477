"""The encoder: DINOv2's ViT/14 with timm's blocks, under DINOv2's own parameter names.

Sources: DINOv2 (arXiv 2304.07193); Depth-Anything-V2 `depth_anything_v2/dinov2.py`.
Shape suffixes: B batch, C channel, H W pixels, h w patches, N patch tokens (row-major), T tokens with the class token
first, D width.
"""

from __future__ import annotations

import os
from typing import Any, Self

import torch
import torch.nn.functional as F
from timm.layers import SwiGLUPacked
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model import weights
from model.positions import position_embedding
from model.preprocess import PATCH
from model.presets import Preset, get_preset
from model.types import EncoderOutput

PIECE = 2**21  # attention scores at a time, 4 MiB in bfloat16


class Attention(nn.Module):
    """Multi-head self-attention under timm's and DINOv2's names; the heads' width sets the softmax' scale."""

    def __init__(self, width: int, heads: int, fused: bool) -> None:
        super().__init__()
        self.heads, self.fused = heads, fused
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x_BTD: Tensor, *_: Any, **__: Any) -> Tensor:
        """Tokens [B, T, D] -> [B, T, D]. timm's block hands over masks that are None, under names of its version."""
        q, k, v = self.qkv(x_BTD).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if not self.fused:
            out = _plain_attention(q, k, v)
        elif _plain_is_faster(q):
            out = _attention_in_pieces(q, k, v)
        else:
            out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).flatten(2))


def _plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(-1) @ v


def _attention_in_pieces(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    # So many heads and rows at a time that the scores stay in the cache, and in memory that the allocator keeps: whole,
    # they are mapped and given back in every block, and the page faults cost as much as the rest of the network.
    tokens = k.shape[2]
    heads, rows = max(1, PIECE // tokens**2), max(1, PIECE // tokens)
    some_heads = zip(*(x.flatten(0, 1).split(heads) for x in (q, k, v)), strict=True)
    out = [torch.cat([_plain_attention(part, k_, v_) for part in q_.split(rows, 1)], 1) for q_, k_, v_ in some_heads]
    return torch.cat(out).unflatten(0, q.shape[:2])


def _plain_is_faster(q: Tensor) -> bool:
    # PyTorch's fused CPU kernel takes as long in bfloat16 as in float32; two matrix products and a softmax take half
    # (docs/log.md). Not where a gradient is wanted, which would keep the scores of every block.
    slow_kernel = q.device.type == "cpu" and q.dtype == torch.bfloat16
    return slow_kernel and not torch.is_grad_enabled() and not torch.compiler.is_compiling()


class Encoder(nn.Module):
    """DINOv2 ViT/14 without registers.

    The frozen `mask_token` takes no part in the forward pass; it is kept so that files interchange.
    `activation_checkpointing`: recompute each block in the backward pass instead of keeping its activations.
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
            block.attn = Attention(preset.width, preset.heads, preset.fused_attention)
        self.activation_checkpointing = False
        self.cls_token = vit.cls_token
        self.pos_embed = vit.pos_embed
        self.mask_token = nn.Parameter(torch.zeros(1, preset.width), requires_grad=False)
        self.patch_embed = vit.patch_embed
        self.blocks = vit.blocks
        self.norm = vit.norm

    @classmethod
    def from_preset(cls, preset: str | Preset, encoder_weights: str | os.PathLike[str] | None = None) -> Self:
        """A fresh encoder, or one read from a DINOv2 file (hub or timm names) or a whole Depth Anything's file.

        Under `torch.device("meta")` it has shapes and nothing else, and no file is read.

        Raises:
            WeightsError: unknown preset, or the file does not fit.
        """
        if weights.shapes_only():
            return cls(get_preset(preset))
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

    def forward(self, image_BCHW: Tensor) -> EncoderOutput:
        """Tokens of an ImageNet-normalised image whose sides are multiples of 14.

        Raises:
            ValueError: not a float [B, 3, H, W], or a side that is not a multiple of 14.
        """
        check_image(image_BCHW, self.preset.multiple)
        # Not through timm's own forward, whose assertions print the size and so tie a compiled graph to it.
        patches_BhwD = self.patch_embed.proj(image_BCHW).permute(0, 2, 3, 1)
        _, h, w, _ = patches_BhwD.shape
        pos_1TD = position_embedding(self.pos_embed, h, w, self.preset.position_mode)
        if not torch.is_autocast_enabled(image_BCHW.device.type):
            pos_1TD = pos_1TD.to(patches_BhwD.dtype)
        patches_BND = patches_BhwD.flatten(1, 2) + pos_1TD[:, 1:]
        cls_B1D = (self.cls_token + pos_1TD[:, :1]).to(patches_BND.dtype).expand(patches_BND.shape[0], -1, -1)
        x_BTD = torch.cat([cls_B1D, patches_BND], dim=1)
        recompute = self.activation_checkpointing and torch.is_grad_enabled()
        taps: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            if recompute:  # nothing in a block is random
                x_BTD = checkpoint(block, x_BTD, use_reentrant=False, preserve_rng_state=False)
            else:
                x_BTD = block(x_BTD)
            if i in self.preset.taps:
                taps.append(self.norm(x_BTD))
        last_BTD = taps[-1] if self.preset.taps[-1] == self.preset.depth - 1 else self.norm(x_BTD)
        return EncoderOutput([t[:, 1:] for t in taps], [t[:, 0] for t in taps], last_BTD[:, 1:])


def check_image(image_BCHW: Tensor, multiple: int = PATCH) -> None:
    """Raises ValueError, naming what was found and expected, unless a float [B, 3, H, W] with fitting sides."""
    if not isinstance(image_BCHW, Tensor):
        raise ValueError(f"expected images [B, 3, H, W], found {type(image_BCHW).__name__}; see infer_image for arrays")
    shape = image_BCHW.shape
    if len(shape) != 4 or shape[1] != 3:
        raise ValueError(f"expected images [B, 3, H, W], found shape {list(shape)}")
    if not image_BCHW.is_floating_point():
        raise ValueError(f"expected ImageNet-normalised float images, found {image_BCHW.dtype}; see infer_image")
    if shape[2] % multiple or shape[3] % multiple or not shape[2] or not shape[3]:
        raise ValueError(f"expected sides that are multiples of {multiple}, found {shape[2]} x {shape[3]}")
