"""The authors' own names, and those that differ from them in a prefix.

Sources: Depth-Anything and Depth-Anything-V2 `dpt.py` (V1's and V2's names are the same); Distill-Any-Depth
`modeling/archs/dam/dam.py`, whose large model calls the encoder `backbone`, keeps its blocks in chunks and may lack the
mask token; DINOv2 `dinov2/models/vision_transformer.py`; timm `vision_transformer.py`.
"""

from __future__ import annotations

from model.layouts.base import Layout, Tensors, pairs
from model.presets import Preset

_BLOCK = ("norm1.{p}", "attn.qkv.{p}", "attn.proj.{p}", "ls1.gamma", "norm2.{p}", "ls2.gamma")
_ENCODER = (
    "cls_token", "pos_embed", "mask_token", "patch_embed.proj.{p}", "norm.{p}",
    *(f"blocks.{{i}}.{part}" for part in (*_BLOCK, "mlp.fc1.{p}", "mlp.fc2.{p}", "mlp.w12.{p}", "mlp.w3.{p}")),
)  # fmt: skip
_DECODER = (
    "projects.{i}.{p}", "resize_layers.{i}.{p}", "readout_projects.{i}.0.{p}", "scratch.layer{i}_rn.weight",
    "scratch.refinenet{i}.out_conv.{p}", "scratch.refinenet{i}.resConfUnit{j}.conv1.{p}",
    "scratch.refinenet{i}.resConfUnit{j}.conv2.{p}", "scratch.output_conv1.{p}", "scratch.output_conv2.{i}.{p}",
)  # fmt: skip


def _table(encoder: str, decoder: str | None = "depth_head.") -> str:
    lines = [f"pretrained.{name} {encoder}{name}" for name in _ENCODER]
    if decoder is not None:
        lines += [f"depth_head.{name} {decoder}{name}" for name in _DECODER]
    return "\n".join(lines)


OFFICIAL = Layout(
    name="official",
    title="the authors' names (V1, V2, metric)",
    recognise=lambda names: any(n.startswith("pretrained.") for n in names),
    names=pairs(_table("pretrained.")),
)


def _v2_relative(preset: Preset) -> bool:
    return preset.head == "relative" and not preset.name.startswith("v1-")


DISTILL = Layout(
    name="distill-any-depth",
    title="Distill-Any-Depth's names, large model",
    recognise=lambda names: "backbone.cls_token" in names,
    names=pairs(_table("backbone.")),
    holds=_v2_relative,
)

# DINOv2 and timm differ in the mask token, which timm drops, and in the names of a SwiGLU.
DINOV2 = Layout(
    name="dinov2",
    title="DINOv2's encoder",
    recognise=lambda names: "cls_token" in names and "mask_token" in names,
    names=pairs(_table("", None)),
    encoder_only=True,
)


_TIMM_NAMES = _table("", None).replace(" blocks.{i}.mlp.w12", " blocks.{i}.mlp.fc1")
_TIMM_NAMES = _TIMM_NAMES.replace(" blocks.{i}.mlp.w3", " blocks.{i}.mlp.fc2")

TIMM = Layout(
    name="timm",
    title="timm's encoder",
    recognise=lambda names: "cls_token" in names,
    names=pairs(_TIMM_NAMES),
    drops=frozenset(["pretrained.mask_token"]),
    encoder_only=True,
)


def unpack_swiglu(tensors: Tensors) -> Tensors:
    """timm's names of a SwiGLU, fc1 (both halves packed) and fc2, -> w12 and w3; a plain MLP keeps its names."""
    out: Tensors = {}
    for name, tensor in tensors.items():
        stem, _, last = name.rpartition(".mlp.")
        if stem and last.split(".")[0] in ("fc1", "fc2") and _is_packed(tensors, stem):
            name = f"{stem}.mlp.{last.replace('fc1', 'w12').replace('fc2', 'w3')}"
        out[name] = tensor
    return out


def _is_packed(tensors: Tensors, stem: str) -> bool:
    rows, columns = (tensors.get(f"{stem}.mlp.{fc}.weight") for fc in ("fc1", "fc2"))
    if rows is None or columns is None or not rows.ndim == columns.ndim == 2:
        return False
    return rows.shape[0] == 2 * columns.shape[1]
