"""Second, plain implementations of the encoder and the decoder, and a network that hides nothing from them.

Shape suffixes: B batch, C channel, H W pixels, h w patches, N patch tokens, T tokens with the class token, D width.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from model import DepthAnything, get_preset
from model.types import EncoderOutput


def loud(preset: str = "tiny", seed: int = 0, **changes: Any) -> DepthAnything:
    """A network whose LayerScale, position embedding and biases are large, so that no part can hide."""
    torch.manual_seed(seed)
    net = DepthAnything.from_preset(replace(get_preset(preset), **changes))
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name.endswith(("gamma", "pos_embed", "cls_token")):
                parameter.normal_(0, 1)
            elif name.endswith("norm.bias") or "norm1" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif name.startswith("depth_head.") and name.endswith("weight"):
                parameter.mul_(3**0.5)  # PyTorch's default makes every layer's output a third as large as its input
    return net


def plain_encoder(net: DepthAnything, image_BCHW: Tensor) -> list[Tensor]:
    """Every block's tokens [B, T, D] through the final norm; written out from DINOv2's definition."""
    w = {k.removeprefix("pretrained."): v for k, v in net.state_dict().items()}
    p = net.preset
    size_B, _, height, width = image_BCHW.shape
    x = F.conv2d(image_BCHW, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=14)
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat([w["cls_token"].expand(size_B, -1, -1), x], 1)
    x = x + plain_position(w["pos_embed"], height // 14, width // 14, p.position_mode)
    out = []
    for i in range(p.depth):
        b = f"blocks.{i}."

        def linear(x: Tensor, name: str, b: str = b) -> Tensor:
            return x @ w[f"{b}{name}.weight"].T + w[f"{b}{name}.bias"]

        y = F.layer_norm(x, (p.width,), w[b + "norm1.weight"], w[b + "norm1.bias"], 1e-6)
        q, k, v = linear(y, "attn.qkv").reshape(size_B, -1, 3, p.heads, p.width // p.heads).permute(2, 0, 3, 1, 4)
        attention = (q @ k.transpose(-1, -2) / (p.width // p.heads) ** 0.5).softmax(-1)
        y = linear((attention @ v).transpose(1, 2).flatten(2), "attn.proj")
        x = x + w[b + "ls1.gamma"] * y
        y = F.layer_norm(x, (p.width,), w[b + "norm2.weight"], w[b + "norm2.bias"], 1e-6)
        if p.ffn == "swiglu":
            gate, value = linear(y, "mlp.fc1").chunk(2, -1)
            y = linear(F.silu(gate) * value, "mlp.fc2")
        else:
            y = linear(F.gelu(linear(y, "mlp.fc1")), "mlp.fc2")
        x = x + w[b + "ls2.gamma"] * y
        out.append(F.layer_norm(x, (p.width,), w["norm.weight"], w["norm.bias"], 1e-6))
    return out


def plain_position(pos_1TD: Tensor, h: int, w: int, mode: str) -> Tensor:
    """The resize as a direct sum: cubic kernel a = -0.75 at source (i + 0.5) g / n - 0.5, edges repeated.

    n is h or w, and 0.1 more where the originals' factors (h + 0.1) / g are meant.
    """
    grid = int((pos_1TD.shape[1] - 1) ** 0.5)
    if (h, w) == (grid, grid):
        return pos_1TD
    extra = 0.1 if mode == "official" else 0.0

    def matrix(n: int) -> Tensor:
        m, a = torch.zeros(n, grid, dtype=torch.float64), -0.75
        for i in range(n):
            source = (i + 0.5) * grid / (n + extra) - 0.5
            first = int(np.floor(source))
            for j in range(first - 1, first + 3):
                t = abs(source - j)
                near = (a + 2) * t**3 - (a + 3) * t**2 + 1
                far = a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a
                m[i, min(max(j, 0), grid - 1)] += near if t <= 1 else far
        return m

    patches = pos_1TD[0, 1:].double().reshape(grid, grid, -1)
    patches = torch.einsum("ia,jb,abd->ijd", matrix(h), matrix(w), patches).float()
    return torch.cat([pos_1TD[:, :1], patches.reshape(1, h * w, -1)], 1)


def plain_decoder(net: DepthAnything, tokens: EncoderOutput, h: int, w: int) -> Tensor:
    """DPT written out level by level from the recipe, on the raw tensors."""
    s = {k.removeprefix("depth_head."): v for k, v in net.state_dict().items()}

    def conv(x: Tensor, name: str, **kw: int) -> Tensor:
        return F.conv2d(x, s[f"{name}.weight"], s.get(f"{name}.bias"), **kw)

    def unit(x: Tensor, name: str) -> Tensor:
        return conv(conv(x.relu(), f"{name}.conv1", padding=1).relu(), f"{name}.conv2", padding=1) + x

    def up(x: Tensor, size: tuple[int, int]) -> Tensor:
        return F.interpolate(x, size, mode="bilinear", align_corners=True)

    maps = []
    for i, tap in enumerate(tokens.taps):
        if net.preset.readout == "project":  # Linear(2 D, D) of patch and class token, then GELU
            joined = torch.cat([tap, tokens.classes[i][:, None].expand_as(tap)], 2)
            name = f"readout_projects.{i}.0"
            tap = F.gelu(joined @ s[f"{name}.weight"].T + s[f"{name}.bias"])
        x = conv(tap.transpose(1, 2).reshape(len(tap), -1, h, w).contiguous(), f"projects.{i}")
        if i < 2:
            x = F.conv_transpose2d(
                x, s[f"resize_layers.{i}.weight"], s[f"resize_layers.{i}.bias"], stride=4 if i == 0 else 2
            )
        if i == 3:
            x = conv(x, "resize_layers.3", stride=2, padding=1)
        maps.append(conv(x, f"scratch.layer{i + 1}_rn", padding=1))
    path = maps[3]
    for k in (4, 3, 2, 1):
        name = f"scratch.refinenet{k}"
        if k < 4:
            path = path + unit(maps[k - 1], f"{name}.resConfUnit1")
        path = unit(path, f"{name}.resConfUnit2")
        size = maps[k - 2].shape[2:] if k > 1 else (path.shape[2] * 2, path.shape[3] * 2)
        path = conv(up(path, size), f"{name}.out_conv")
    stride = net.preset.head_stride
    path = up(conv(path, "scratch.output_conv1", padding=1), (14 * h // stride, 14 * w // stride))
    path = conv(conv(path, "scratch.output_conv2.0", padding=1).relu(), "scratch.output_conv2.2")
    path = path.relu() if net.preset.head == "relative" else path.sigmoid() * net.preset.max_depth_m
    return (up(path, (14 * h, 14 * w)) if stride > 1 else path)[:, 0]
