"""The names of muggled_dpt, which splits a network into five parts and drops what no forward pass reads.

Source: muggled_dpt `lib/v1_depthanything` and `lib/v2_depthanything`, `state_dict_conversion/
convert_original_state_dict_keys.py`. V1's encoder has its blocks in a row; V2's has them in four stages. Position
embeddings are resized to the exact size there.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from model.layouts.base import Layout, Tensors, join, pairs
from model.types import UNUSED

STAGES = 4
_STAGED = re.compile(r"imgencoder\.stages\.(\d+)\.blocks\.(\d+)\.")

_BLOCK = """
norm1.{p} norm1.{p}
attn.qkv.{p} attn.qkv.{p}
attn.proj.{p} attn.proj.{p}
ls1.gamma scale_attn
norm2.{p} norm2.{p}
mlp.fc1.{p} mlp.layers.0.{p}
mlp.fc2.{p} mlp.layers.2.{p}
mlp.w12.{p} mlp.inner_linear_doubled.{p}
mlp.w3.{p} mlp.outer_linear.{p}
ls2.gamma scale_mlp
"""

_REST = """
pretrained.patch_embed.proj.{p} patch_embed.proj.{p}
pretrained.cls_token imgencoder.cls_token
pretrained.norm.{p} imgencoder.outnorm.{p}
depth_head.scratch.output_conv1.{p} head.spatial_upsampler.0.{p}
depth_head.scratch.output_conv2.{i}.{p} head.proj_1ch.{i}.{p}
"""


def _table() -> str:
    lines = _REST.strip().splitlines()
    for row in _BLOCK.strip().splitlines():
        official, here = row.split()
        lines.append(f"pretrained.blocks.{{i}}.{official} imgencoder.blocks.{{i}}.{here}")
    for k, stage in enumerate(("spatial_upx4", "spatial_upx2", "spatial_noscale", "spatial_downx2")):
        lines += [
            f"depth_head.projects.{k}.{{p}} reassemble.{stage}.resample.0.{{p}}",
            f"depth_head.resize_layers.{k}.{{p}} reassemble.{stage}.resample.1.{{p}}",
            f"depth_head.scratch.layer{k + 1}_rn.weight reassemble.{stage}.fuse_proj.weight",
        ]
        official, here = f"depth_head.scratch.refinenet{k + 1}", f"fusion.blocks.{k}"
        lines.append(f"{official}.out_conv.{{p}} {here}.scale_proj_seq.2.{{p}}")
        for unit, part in (("resConfUnit1", "conv_reassembly"), ("resConfUnit2", "scale_proj_seq.0")):
            for conv, place in (("conv1", 1), ("conv2", 3)):
                lines.append(f"{official}.{unit}.{conv}.{{p}} {here}.{part}.resconv_seq.{place}.{{p}}")
    return "\n".join(lines)


_POSITIONS = join(
    "pretrained.pos_embed", "imgencoder.posenc.cls_embedding", "imgencoder.posenc.base_patch_embedding", dim=1, first=1
)


_SHARED: dict[str, Any] = {
    "names": pairs(_table()),
    "joins": (_POSITIONS,),
    "drops": UNUSED,
    "position_mode": "exact",
}


def _recognise_v1(names: Collection[str]) -> bool:
    return any(n.startswith("imgencoder.blocks.") for n in names)


def _recognise_v2(names: Collection[str]) -> bool:
    return any(n.startswith("imgencoder.stages.") for n in names)


MUGGLED_V1 = Layout(
    name="muggled-v1",
    title="muggled_dpt's parts, V1",
    recognise=_recognise_v1,
    **_SHARED,
    holds=lambda preset: preset.name.startswith("v1-"),
)


@dataclass(frozen=True, kw_only=True)
class _Staged(Layout):
    """Block i is `stages.s.blocks.k`, each stage a quarter of the depth."""

    def to_official(self, tensors: Mapping[str, Tensor]) -> Tensors:
        staged = {name: (int(m[1]), int(m[2])) for name in tensors if (m := _STAGED.match(name))}
        number = {place: i for i, place in enumerate(sorted(set(staged.values())))}
        plain = {}
        for name, tensor in tensors.items():
            if name in staged:
                name = _STAGED.sub(f"imgencoder.blocks.{number[staged[name]]}.", name)
            plain[name] = tensor
        return super().to_official(plain)

    def from_official(self, tensors: Mapping[str, Tensor]) -> Tensors:
        out: Tensors = {}
        plain = super().from_official(tensors)
        depth = len({n.split(".")[2] for n in plain if n.startswith("imgencoder.blocks.")})
        for name, tensor in plain.items():
            if name.startswith("imgencoder.blocks."):
                _, _, i, rest = name.split(".", 3)
                stage, k = divmod(int(i), depth // STAGES)
                name = f"imgencoder.stages.{stage}.blocks.{k}.{rest}"
            out[name] = tensor
        return out


MUGGLED_V2 = _Staged(
    name="muggled-v2",
    title="muggled_dpt's parts, V2",
    recognise=_recognise_v2,
    **_SHARED,
    holds=lambda preset: not preset.name.startswith("v1-") and preset.depth % STAGES == 0,
)
