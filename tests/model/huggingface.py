"""Transformers' Depth Anything as a second opinion: the same weights under its names, written down independently.

The names are those that transformers 5 has in memory (`modeling_depth_anything.py`, `modeling_dinov2.py`; the giant's
two packed SwiGLU matrices are two modules there). Shape suffixes: B batch, C channel, H W pixels, g side of the stored
grid, T tokens with the class token first, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import DepthAnything, Preset
from model.presets import PositionMode

SAME = ("norm1", "norm2", "mlp.fc1", "mlp.fc2")
HEAD = {"output_conv1": "conv1", "output_conv2.0": "conv2", "output_conv2.2": "conv3"}


def names(official: Mapping[str, Tensor], preset: Preset) -> dict[str, Tensor]:
    """The official tensors (SwiGLU's called fc1 and fc2) under transformers' names; slices are views."""
    out = {
        "backbone.embeddings.cls_token": official["pretrained.cls_token"],
        "backbone.embeddings.mask_token": official["pretrained.mask_token"],
        "backbone.embeddings.position_embeddings": official["pretrained.pos_embed"],
    }
    for kind in ("weight", "bias"):
        out |= _backbone_names(official, preset, kind) | _decoder_names(official, kind)
    for k in range(4):
        out[f"neck.convs.{k}.weight"] = official[f"depth_head.scratch.layer{k + 1}_rn.weight"]
    return out


def _backbone_names(official: Mapping[str, Tensor], preset: Preset, kind: str) -> dict[str, Tensor]:
    patch = official[f"pretrained.patch_embed.proj.{kind}"]
    out = {f"backbone.embeddings.patch_embeddings.projection.{kind}": patch}
    out[f"backbone.layernorm.{kind}"] = official[f"pretrained.norm.{kind}"]
    for i in range(preset.depth):
        ours, theirs = f"pretrained.blocks.{i}", f"backbone.encoder.layer.{i}"
        block = {"attn.proj": "attention.o_proj", **{name: name for name in SAME}}
        if preset.ffn == "swiglu":
            del block["mlp.fc1"], block["mlp.fc2"]
            gate, up = official[f"{ours}.mlp.fc1.{kind}"].chunk(2)
            out[f"{theirs}.mlp.gate_proj.{kind}"], out[f"{theirs}.mlp.up_proj.{kind}"] = gate, up
            out[f"{theirs}.mlp.down_proj.{kind}"] = official[f"{ours}.mlp.fc2.{kind}"]
        out |= {f"{theirs}.{new}.{kind}": official[f"{ours}.{old}.{kind}"] for old, new in block.items()}
        for part, tensor in zip("qkv", official[f"{ours}.attn.qkv.{kind}"].chunk(3), strict=True):
            out[f"{theirs}.attention.{part}_proj.{kind}"] = tensor
        for k in (1, 2):
            out[f"{theirs}.layer_scale{k}.lambda1"] = official[f"{ours}.ls{k}.gamma"]
    return out


def _decoder_names(official: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    out = {}
    for i in range(4):
        layer = f"neck.reassemble_stage.layers.{i}"
        out[f"{layer}.projection.{kind}"] = official[f"depth_head.projects.{i}.{kind}"]
        if i != 2:
            out[f"{layer}.resize.{kind}"] = official[f"depth_head.resize_layers.{i}.{kind}"]
        # Theirs are counted from the deepest, the official ones from the shallowest.
        ours, theirs = f"depth_head.scratch.refinenet{4 - i}", f"neck.fusion_stage.layers.{i}"
        out[f"{theirs}.projection.{kind}"] = official[f"{ours}.out_conv.{kind}"]
        for r in (1, 2):
            for c in (1, 2):
                unit = official[f"{ours}.resConfUnit{r}.conv{c}.{kind}"]
                out[f"{theirs}.residual_layer{r}.convolution{c}.{kind}"] = unit
    return out | {f"head.{new}.{kind}": official[f"depth_head.scratch.{old}.{kind}"] for old, new in HEAD.items()}


def config(preset: Preset) -> Any:
    """transformers' configuration of a preset."""
    from transformers import DepthAnythingConfig, Dinov2Config

    backbone = Dinov2Config(
        hidden_size=preset.width, num_hidden_layers=preset.depth, num_attention_heads=preset.heads,
        image_size=14 * preset.grid, patch_size=14, layer_norm_eps=1e-6, use_swiglu_ffn=preset.ffn == "swiglu",
        out_indices=[tap + 1 for tap in preset.taps], apply_layernorm=True, reshape_hidden_states=False,
    )  # fmt: skip
    return DepthAnythingConfig(
        backbone_config=backbone, reassemble_hidden_size=preset.width, neck_hidden_sizes=list(preset.out_channels),
        fusion_hidden_size=preset.features, head_hidden_size=preset.head_channels,
        depth_estimation_type=preset.head, max_depth=int(preset.max_depth_m or 1),
    )  # fmt: skip


def twin(net: DepthAnything) -> nn.Module:
    """transformers' network with the weights of ours, whose memory it shares."""
    from transformers import DepthAnythingForDepthEstimation

    with torch.device("meta"):
        theirs = DepthAnythingForDepthEstimation(config(net.preset))
    theirs.load_state_dict(names(net.state_dict(), net.preset), strict=True, assign=True)
    return theirs.eval()


def in_mode(net: DepthAnything, mode: PositionMode) -> DepthAnything:
    """Ours with another `position_mode`; the weights are shared."""
    with torch.device("meta"):
        other = DepthAnything(replace(net.preset, position_mode=mode))
    other.load_state_dict(net.state_dict(), strict=True, assign=True)
    return other.eval()


def official_positions() -> AbstractContextManager[Any]:
    """transformers with the originals' resize of position embeddings: scale factors ((n + 0.1) / g), bicubic."""
    from transformers.models.dinov2.modeling_dinov2 import Dinov2Embeddings

    def resize(self: Any, embeddings: Tensor, height: int, width: int) -> Tensor:
        pos_1TD = self.position_embeddings
        g = int((pos_1TD.shape[1] - 1) ** 0.5)
        if embeddings.shape[1] == pos_1TD.shape[1] and height == width:
            return pos_1TD
        factors = ((height // 14 + 0.1) / g, (width // 14 + 0.1) / g)
        pos_1Dgg = pos_1TD[:, 1:].reshape(1, g, g, -1).permute(0, 3, 1, 2)
        pos_1Dhw = F.interpolate(pos_1Dgg, scale_factor=factors, mode="bicubic", antialias=False)
        return torch.cat([pos_1TD[:, :1], pos_1Dhw.flatten(2).transpose(1, 2)], dim=1)

    return mock.patch.object(Dinov2Embeddings, "interpolate_pos_encoding", resize)


@torch.no_grad()
def loud_network(preset: str | Preset, seed: int = 0) -> DepthAnything:
    """Random weights as large as training's or larger, so that no part hides: LayerScale and positions of variance 1.

    Every sub-layer answers with about the size of its input; a relative map stays above its last ReLU.
    """
    net = DepthAnything.from_preset(preset).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in net.named_parameters():
        parameter.normal_(0, 1, generator=generator)
        if name.endswith(("gamma", "pos_embed", "cls_token", "mask_token")):
            continue
        if "norm" in name:
            parameter.mul_(0.3).add_(1.0 if name.endswith("weight") else 0.0)
        elif name.endswith("bias"):
            parameter.mul_(0.1)
        else:
            parameter.mul_(parameter[0].numel() ** -0.5)
    if net.preset.head == "relative":
        dict(net.named_parameters())["depth_head.scratch.output_conv2.2.bias"].fill_(4.0)
    return net
