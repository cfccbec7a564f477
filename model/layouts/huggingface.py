"""Hugging Face: the names of `DepthAnythingForDepthEstimation` and `Dinov2Model`, and their config.json.

Sources: transformers `convert_depth_anything_to_hf.py`, `modeling_depth_anything.py`, `modeling_dinov2.py`,
`configuration_*.py`. Files keep the names of transformers 4 (which 5 reads and writes too); the names of 5's modules in
memory, as in a plain `torch.save(model.state_dict())`, are read as well. Blocks are counted from 1 in `out_indices`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from model.layouts.base import Join, Layout, join, pairs
from model.preprocess import IMAGENET_MEAN, IMAGENET_STD, PATCH
from model.presets import PRESETS, Preset
from model.types import WeightsError

_EMBEDDINGS = """
pretrained.cls_token embeddings.cls_token
pretrained.mask_token embeddings.mask_token
pretrained.pos_embed embeddings.position_embeddings
pretrained.patch_embed.proj.{p} embeddings.patch_embeddings.projection.{p}
pretrained.norm.{p} layernorm.{p}
"""
_BLOCK = """
norm1.{p} norm1.{p}
norm2.{p} norm2.{p}
ls1.gamma layer_scale1.lambda1
ls2.gamma layer_scale2.lambda1
mlp.fc1.{p} mlp.fc1.{p}
mlp.fc2.{p} mlp.fc2.{p}
"""
_BLOCK_4 = """
attn.proj.{p} attention.output.dense.{p}
mlp.w12.{p} mlp.weights_in.{p}
mlp.w3.{p} mlp.weights_out.{p}
"""
_BLOCK_5 = """
attn.proj.{p} attention.o_proj.{p}
mlp.w3.{p} mlp.down_proj.{p}
"""


def _table(prefix: str, block: str) -> str:
    lines = []
    for row in _EMBEDDINGS.strip().splitlines():
        official, here = row.split()
        lines.append(f"{official} {prefix}{here}")
    for row in (_BLOCK.strip() + block).strip().splitlines():
        official, here = row.split()
        lines.append(f"pretrained.blocks.{{i}}.{official} {prefix}encoder.layer.{{i}}.{here}")
    if not prefix:
        return "\n".join(lines)
    for k in range(4):
        lines += [
            f"depth_head.projects.{k}.{{p}} neck.reassemble_stage.layers.{k}.projection.{{p}}",
            f"depth_head.resize_layers.{k}.{{p}} neck.reassemble_stage.layers.{k}.resize.{{p}}",
            f"depth_head.scratch.layer{k + 1}_rn.weight neck.convs.{k}.weight",
        ]
        official, here = f"depth_head.scratch.refinenet{k + 1}", f"neck.fusion_stage.layers.{3 - k}"
        lines.append(f"{official}.out_conv.{{p}} {here}.projection.{{p}}")
        for unit in (1, 2):
            for conv in (1, 2):
                lines.append(
                    f"{official}.resConfUnit{unit}.conv{conv}.{{p}} "
                    f"{here}.residual_layer{unit}.convolution{conv}.{{p}}"
                )
    for official, conv in (("output_conv1", 1), ("output_conv2.0", 2), ("output_conv2.2", 3)):
        lines.append(f"depth_head.scratch.{official}.{{p}} head.conv{conv}.{{p}}")
    return "\n".join(lines)


def _joins(prefix: str, *names: str) -> tuple[Join, ...]:
    return (join("pretrained.blocks.{i}.attn.qkv.{p}", *(f"{prefix}encoder.layer.{{i}}.{n}.{{p}}" for n in names)),)


_NAMES_4 = ("attention.attention.query", "attention.attention.key", "attention.attention.value")
_NAMES_5 = ("attention.q_proj", "attention.k_proj", "attention.v_proj")


def _layout(prefix: str, version: int) -> Layout:
    in_memory = version == 5
    token, mark = f"{prefix}embeddings.cls_token", ".attention.q_proj."

    def recognise(names: Collection[str]) -> bool:
        return token in names and in_memory == any(mark in n for n in names)

    joins = _joins(prefix, *(_NAMES_5 if in_memory else _NAMES_4))
    if in_memory:
        gates = (f"{prefix}encoder.layer.{{i}}.mlp.{n}.{{p}}" for n in ("gate_proj", "up_proj"))
        joins += (join("pretrained.blocks.{i}.mlp.w12.{p}", *gates),)
    what = "Depth Anything" if prefix else "DINOv2's encoder"
    return Layout(
        name=("huggingface" if prefix else "huggingface-dinov2") + ("-5" if in_memory else ""),
        title=f"Hugging Face, {what}" + (", transformers 5's names in memory" if in_memory else ""),
        recognise=recognise,
        names=pairs(_table(prefix, _BLOCK_5 if in_memory else _BLOCK_4)),
        joins=joins,
        encoder_only=not prefix,
        position_mode="exact",
    )


HUGGINGFACE, HUGGINGFACE_5 = (_layout("backbone.", version) for version in (4, 5))
HUGGINGFACE_DINOV2, HUGGINGFACE_DINOV2_5 = (_layout("", version) for version in (4, 5))


# --- config.json --------------------------------------------------------------------------------------------------

# What transformers leaves out of a file because it is the default there.
_MODEL_DEFAULTS: dict[str, Any] = {
    "patch_size": 14, "reassemble_hidden_size": 384, "reassemble_factors": [4, 2, 1, 0.5],
    "neck_hidden_sizes": [48, 96, 192, 384], "fusion_hidden_size": 64, "head_in_index": -1, "head_hidden_size": 32,
    "depth_estimation_type": "relative", "max_depth": None,
}  # fmt: skip
_BACKBONE_DEFAULTS: dict[str, Any] = {
    "model_type": "dinov2", "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "mlp_ratio": 4,
    "hidden_act": "gelu", "layer_norm_eps": 1e-6, "image_size": 224, "patch_size": 14, "num_channels": 3,
    "qkv_bias": True, "use_swiglu_ffn": False, "apply_layernorm": True, "out_indices": None,
}  # fmt: skip
# What our networks cannot do otherwise.
_MODEL_FIXED = {"patch_size": PATCH, "reassemble_factors": [4, 2, 1, 0.5], "head_in_index": -1}
_BACKBONE_FIXED = {
    "model_type": "dinov2", "mlp_ratio": 4, "hidden_act": "gelu", "layer_norm_eps": 1e-6, "patch_size": PATCH,
    "num_channels": 3, "qkv_bias": True, "apply_layernorm": True,
}  # fmt: skip


def preset_from_config(config: Mapping[str, Any]) -> Preset:
    """The network that a `DepthAnythingForDepthEstimation` config.json describes, position mode "exact".

    Named after the published preset it equals, else "custom". Raises ValueError naming the field.
    """
    if not isinstance(config.get("backbone_config"), Mapping):
        raise ValueError(f"backbone_config is {config.get('backbone_config')!r}; expected the table of a DINOv2")
    model = {**_MODEL_DEFAULTS, **config}
    backbone = {**_BACKBONE_DEFAULTS, **config["backbone_config"]}
    for table, fixed, where in ((model, _MODEL_FIXED, ""), (backbone, _BACKBONE_FIXED, "backbone_config.")):
        for field, value in fixed.items():
            if table[field] != value:
                raise ValueError(f"{where}{field} is {table[field]!r}; this network has {value!r}")
    if model["reassemble_hidden_size"] != backbone["hidden_size"]:
        raise ValueError(
            f"reassemble_hidden_size is {model['reassemble_hidden_size']!r}, the backbone's hidden_size "
            f"{backbone['hidden_size']!r}; they must be equal"
        )
    if model["depth_estimation_type"] not in ("relative", "metric"):
        raise ValueError(f"depth_estimation_type is {model['depth_estimation_type']!r}; expected relative or metric")
    metric = model["depth_estimation_type"] == "metric"
    preset = Preset(
        name="custom",
        width=_whole(backbone, "hidden_size"),
        depth=_whole(backbone, "num_hidden_layers"),
        heads=_whole(backbone, "num_attention_heads"),
        taps=_taps(backbone),
        features=_whole(model, "fusion_hidden_size"),
        out_channels=_four(model["neck_hidden_sizes"], "neck_hidden_sizes"),
        ffn="swiglu" if backbone["use_swiglu_ffn"] else "mlp",
        grid=_whole(backbone, "image_size") // PATCH,
        head="metric" if metric else "relative",
        max_depth_m=float(model["max_depth"] or 1) if metric else None,
        head_channels=_whole(model, "head_hidden_size"),
        position_mode="exact",
    )
    for known in PRESETS.values():
        # What the file cannot say, and what is only ours, does not make another network.
        alike = replace(
            known, name="custom", position_mode="exact", head_bias=None, output_align_corners=True, fused_attention=True
        )
        if alike == preset:
            return replace(known, position_mode="exact")
    return preset


def _whole(table: Mapping[str, Any], field: str) -> int:
    if type(table[field]) is not int or table[field] < 1:
        raise ValueError(f"{field} is {table[field]!r}; expected a whole number above 0")
    return int(table[field])


def _taps(backbone: Mapping[str, Any]) -> tuple[int, int, int, int]:
    indices = backbone["out_indices"]
    if indices is None and backbone.get("out_features"):
        indices = [int(str(stage).removeprefix("stage")) for stage in backbone["out_features"]]
    depth = backbone["num_hidden_layers"]
    taps = [i - 1 if i >= 0 else i + depth for i in _four(indices, "out_indices")]
    if not all(0 <= tap < depth for tap in taps):
        raise ValueError(f"out_indices is {indices!r}; blocks count from 1 to {depth}")
    return taps[0], taps[1], taps[2], taps[3]


def _four(values: Any, field: str) -> tuple[int, int, int, int]:
    if not isinstance(values, (list, tuple)) or len(values) != 4 or not all(isinstance(v, int) for v in values):
        raise ValueError(f"{field} is {values!r}; expected four whole numbers")
    return tuple(values)


def config_of(preset: Preset) -> dict[str, Any]:
    """config.json for `DepthAnythingForDepthEstimation.from_pretrained`.

    Raises:
        WeightsError: the network is one that transformers has not.
    """
    for field, value in (("head_stride", 1), ("readout", "ignore")):
        if getattr(preset, field) != value:
            raise WeightsError(
                f"{preset.name}: {field} is {getattr(preset, field)!r}, which transformers' network has not "
                f"(there: {value!r}); export with --layout official"
            )
    if preset.max_depth_m is not None and preset.max_depth_m != int(preset.max_depth_m):
        raise WeightsError(f"{preset.name}: max_depth_m is {preset.max_depth_m}; transformers takes whole metres only")
    taps = [i + 1 for i in preset.taps]
    return {
        "architectures": ["DepthAnythingForDepthEstimation"],
        "model_type": "depth_anything",
        "backbone_config": {
            "model_type": "dinov2",
            "architectures": ["Dinov2Model"],
            "hidden_size": preset.width,
            "num_hidden_layers": preset.depth,
            "num_attention_heads": preset.heads,
            "image_size": preset.grid * PATCH,
            "patch_size": PATCH,
            "use_swiglu_ffn": preset.ffn == "swiglu",
            "out_indices": taps,
            "out_features": [f"stage{i}" for i in taps],
            "apply_layernorm": True,
            "reshape_hidden_states": False,
        },
        "patch_size": PATCH,
        "reassemble_hidden_size": preset.width,
        "reassemble_factors": [4, 2, 1, 0.5],
        "neck_hidden_sizes": list(preset.out_channels),
        "fusion_hidden_size": preset.features,
        "head_in_index": -1,
        "head_hidden_size": preset.head_channels,
        "depth_estimation_type": preset.head,
        "max_depth": 1 if preset.max_depth_m is None else int(preset.max_depth_m),
    }


def processor_of(preset: Preset) -> dict[str, Any]:
    """preprocessor_config.json: `DPTImageProcessor` as the published folders have it."""
    side = preset.grid * PATCH
    return {
        "image_processor_type": "DPTImageProcessor",
        "do_resize": True,
        "size": {"height": side, "width": side},
        "keep_aspect_ratio": True,
        "ensure_multiple_of": PATCH,
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(IMAGENET_MEAN),
        "image_std": list(IMAGENET_STD),
        "do_pad": False,
    }
