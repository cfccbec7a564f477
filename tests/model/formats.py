"""Every format that weights come in, written down a second time: plain loops over names, no tables of `model/layouts`.

The names are those of the formats' own code: Depth-Anything `dpt.py`, DINOv2 `vision_transformer.py`, transformers
`convert_depth_anything_to_hf.py`, muggled_dpt `convert_original_state_dict_keys.py`, Distill-Any-Depth `dam.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from model import DepthAnything, Preset
from tests.model import huggingface

Tensors = dict[str, Tensor]

UNUSED = [
    "pretrained.mask_token",
    "depth_head.scratch.refinenet4.resConfUnit1.conv1.weight",
    "depth_head.scratch.refinenet4.resConfUnit1.conv1.bias",
    "depth_head.scratch.refinenet4.resConfUnit1.conv2.weight",
    "depth_head.scratch.refinenet4.resConfUnit1.conv2.bias",
]
STAGES = ("spatial_upx4", "spatial_upx2", "spatial_noscale", "spatial_downx2")


def official_shapes(preset: Preset) -> dict[str, tuple[int, ...]]:
    """What the authors' file of a preset holds, counted out."""
    d, f = preset.width, preset.features
    # DINOv2 `SwiGLUFFNFused`: two thirds of 4 D, up to a multiple of 8.
    hidden = (int(4 * d * 2 / 3) + 7) // 8 * 8
    shapes: dict[str, tuple[int, ...]] = {
        "pretrained.cls_token": (1, 1, d), "pretrained.pos_embed": (1, preset.grid**2 + 1, d),
        "pretrained.mask_token": (1, d),
        "pretrained.patch_embed.proj.weight": (d, 3, 14, 14), "pretrained.patch_embed.proj.bias": (d,),
    }  # fmt: skip
    for i in range(preset.depth):
        block = f"pretrained.blocks.{i}"
        linear = {"attn.qkv": (3 * d, d), "attn.proj": (d, d)}
        if preset.ffn == "swiglu":
            linear |= {"mlp.w12": (2 * hidden, d), "mlp.w3": (d, hidden)}
        else:
            linear |= {"mlp.fc1": (4 * d, d), "mlp.fc2": (d, 4 * d)}
        for name, shape in linear.items():
            shapes |= {f"{block}.{name}.weight": shape, f"{block}.{name}.bias": shape[:1]}
        for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "ls1.gamma", "ls2.gamma"):
            shapes[f"{block}.{name}"] = (d,)
    shapes |= {"pretrained.norm.weight": (d,), "pretrained.norm.bias": (d,)}
    c = preset.out_channels
    convolutions = {f"projects.{i}": (c[i], d, 1, 1) for i in range(4)}
    convolutions |= {
        "resize_layers.0": (c[0], c[0], 4, 4), "resize_layers.1": (c[1], c[1], 2, 2),
        "resize_layers.3": (c[3], c[3], 3, 3),
    }  # fmt: skip
    for k in (1, 2, 3, 4):
        convolutions[f"scratch.refinenet{k}.out_conv"] = (f, f, 1, 1)
        for unit in (1, 2):
            for conv in (1, 2):
                convolutions[f"scratch.refinenet{k}.resConfUnit{unit}.conv{conv}"] = (f, f, 3, 3)
        shapes[f"depth_head.scratch.layer{k}_rn.weight"] = (f, c[k - 1], 3, 3)
    convolutions |= {
        "scratch.output_conv1": (f // 2, f, 3, 3), "scratch.output_conv2.0": (preset.head_channels, f // 2, 3, 3),
        "scratch.output_conv2.2": (1, preset.head_channels, 1, 1),
    }  # fmt: skip
    for name, shape in convolutions.items():
        shapes |= {f"depth_head.{name}.weight": shape, f"depth_head.{name}.bias": shape[:1]}
    return shapes


def official(net: DepthAnything) -> Tensors:
    """The authors' names; the giant's two matrices are called w12 and w3 there."""
    out = {}
    for name, tensor in net.state_dict().items():
        if net.preset.ffn == "swiglu":
            name = name.replace(".mlp.fc1.", ".mlp.w12.").replace(".mlp.fc2.", ".mlp.w3.")
        out[name] = tensor
    return out


def blank(preset: Preset) -> Tensors:
    """The authors' file of a preset, all zeros that take no room."""
    return {name: torch.zeros(1).expand(shape) for name, shape in official_shapes(preset).items()}


def encoder(tensors: Tensors) -> Tensors:
    """DINOv2's own file."""
    return {k.removeprefix("pretrained."): v for k, v in tensors.items() if k.startswith("pretrained.")}


def timm(tensors: Tensors) -> Tensors:
    """timm's: without the mask token, SwiGLU as fc1 and fc2."""
    out = {}
    for name, tensor in encoder(tensors).items():
        if name != "mask_token":
            out[name.replace("mlp.w12", "mlp.fc1").replace("mlp.w3", "mlp.fc2")] = tensor
    return out


def distill(tensors: Tensors, mask_token: bool, chunks: int = 1) -> Tensors:
    """Distill-Any-Depth's large model: `backbone`, blocks in chunks that count on, the mask token maybe deleted."""
    depth = len({name.split(".")[2] for name in tensors if name.startswith("pretrained.blocks.")})
    out = {}
    for name, tensor in tensors.items():
        if name == "pretrained.mask_token" and not mask_token:
            continue
        if name.startswith("pretrained.blocks."):
            _, _, i, rest = name.split(".", 3)
            name = f"backbone.blocks.{int(i) * chunks // depth}.{i}.{rest}"
        elif name.startswith("pretrained."):
            name = name.replace("pretrained.", "backbone.", 1)
        out[name] = tensor
    return out


def huggingface_5(tensors: Tensors, preset: Preset) -> Tensors:
    """The names of transformers 5's modules."""
    in_memory = {k.replace("mlp.w12", "mlp.fc1").replace("mlp.w3", "mlp.fc2"): v for k, v in tensors.items()}
    return huggingface.names(in_memory, preset)


def huggingface_4(tensors: Tensors, preset: Preset) -> Tensors:
    """The names in every file on the hub."""
    d = preset.width
    out = {
        "backbone.embeddings.cls_token": tensors["pretrained.cls_token"],
        "backbone.embeddings.mask_token": tensors["pretrained.mask_token"],
        "backbone.embeddings.position_embeddings": tensors["pretrained.pos_embed"],
    }
    for kind in ("weight", "bias"):
        patch = "patch_embed.proj"
        out[f"backbone.embeddings.patch_embeddings.projection.{kind}"] = tensors[f"pretrained.{patch}.{kind}"]
        out[f"backbone.layernorm.{kind}"] = tensors[f"pretrained.norm.{kind}"]
        for i in range(preset.depth):
            theirs, ours = f"backbone.encoder.layer.{i}", f"pretrained.blocks.{i}"
            qkv = tensors[f"{ours}.attn.qkv.{kind}"]
            out[f"{theirs}.attention.attention.query.{kind}"] = qkv[:d]
            out[f"{theirs}.attention.attention.key.{kind}"] = qkv[d : 2 * d]
            out[f"{theirs}.attention.attention.value.{kind}"] = qkv[2 * d :]
            out[f"{theirs}.attention.output.dense.{kind}"] = tensors[f"{ours}.attn.proj.{kind}"]
            out[f"{theirs}.norm1.{kind}"] = tensors[f"{ours}.norm1.{kind}"]
            out[f"{theirs}.norm2.{kind}"] = tensors[f"{ours}.norm2.{kind}"]
            mlp = {"fc1": "fc1", "fc2": "fc2"}
            if preset.ffn == "swiglu":
                mlp = {"weights_in": "w12", "weights_out": "w3"}
            for new, old in mlp.items():
                out[f"{theirs}.mlp.{new}.{kind}"] = tensors[f"{ours}.mlp.{old}.{kind}"]
        for i in range(4):
            stage = f"neck.reassemble_stage.layers.{i}"
            out[f"{stage}.projection.{kind}"] = tensors[f"depth_head.projects.{i}.{kind}"]
            if i != 2:
                out[f"{stage}.resize.{kind}"] = tensors[f"depth_head.resize_layers.{i}.{kind}"]
        for k in (1, 2, 3, 4):
            fusion, net = f"neck.fusion_stage.layers.{4 - k}", f"depth_head.scratch.refinenet{k}"
            out[f"{fusion}.projection.{kind}"] = tensors[f"{net}.out_conv.{kind}"]
            for r in (1, 2):
                for c in (1, 2):
                    unit = tensors[f"{net}.resConfUnit{r}.conv{c}.{kind}"]
                    out[f"{fusion}.residual_layer{r}.convolution{c}.{kind}"] = unit
        for n, name in ((1, "output_conv1"), (2, "output_conv2.0"), (3, "output_conv2.2")):
            out[f"head.conv{n}.{kind}"] = tensors[f"depth_head.scratch.{name}.{kind}"]
    for k in (1, 2, 3, 4):
        out[f"neck.convs.{k - 1}.weight"] = tensors[f"depth_head.scratch.layer{k}_rn.weight"]
    for i in range(preset.depth):
        for n in (1, 2):
            out[f"backbone.encoder.layer.{i}.layer_scale{n}.lambda1"] = tensors[f"pretrained.blocks.{i}.ls{n}.gamma"]
    return out


def muggled(tensors: Tensors, preset: Preset, version: int) -> dict[str, Tensors]:
    """muggled_dpt's five parts."""
    parts: dict[str, Tensors] = {"patch_embed": {}, "imgencoder": {}, "reassemble": {}, "fusion": {}, "head": {}}
    positions = tensors["pretrained.pos_embed"]
    parts["imgencoder"]["cls_token"] = tensors["pretrained.cls_token"]
    parts["imgencoder"]["posenc.cls_embedding"] = positions[:, :1]
    parts["imgencoder"]["posenc.base_patch_embedding"] = positions[:, 1:]
    per_stage = preset.depth // 4
    for i in range(preset.depth):
        old, new = f"pretrained.blocks.{i}", f"blocks.{i}"
        if version == 2:
            new = f"stages.{i // per_stage}.blocks.{i % per_stage}"
        parts["imgencoder"][f"{new}.scale_attn"] = tensors[f"{old}.ls1.gamma"]
        parts["imgencoder"][f"{new}.scale_mlp"] = tensors[f"{old}.ls2.gamma"]
    for kind in ("weight", "bias"):
        parts["patch_embed"][f"proj.{kind}"] = tensors[f"pretrained.patch_embed.proj.{kind}"]
        parts["imgencoder"][f"outnorm.{kind}"] = tensors[f"pretrained.norm.{kind}"]
        for i in range(preset.depth):
            old, new = f"pretrained.blocks.{i}", f"blocks.{i}"
            if version == 2:
                new = f"stages.{i // per_stage}.blocks.{i % per_stage}"
            renamed = {"norm1": "norm1", "norm2": "norm2", "attn.qkv": "attn.qkv", "attn.proj": "attn.proj"}
            if preset.ffn == "swiglu":
                renamed |= {"mlp.w12": "mlp.inner_linear_doubled", "mlp.w3": "mlp.outer_linear"}
            else:
                renamed |= {"mlp.fc1": "mlp.layers.0", "mlp.fc2": "mlp.layers.2"}
            for was, is_ in renamed.items():
                parts["imgencoder"][f"{new}.{is_}.{kind}"] = tensors[f"{old}.{was}.{kind}"]
        for i, stage in enumerate(STAGES):
            parts["reassemble"][f"{stage}.resample.0.{kind}"] = tensors[f"depth_head.projects.{i}.{kind}"]
            if i != 2:
                parts["reassemble"][f"{stage}.resample.1.{kind}"] = tensors[f"depth_head.resize_layers.{i}.{kind}"]
            old, new = f"depth_head.scratch.refinenet{i + 1}", f"blocks.{i}"
            parts["fusion"][f"{new}.scale_proj_seq.2.{kind}"] = tensors[f"{old}.out_conv.{kind}"]
            for conv, place in ((1, 1), (2, 3)):
                if i != 3:
                    unit = tensors[f"{old}.resConfUnit1.conv{conv}.{kind}"]
                    parts["fusion"][f"{new}.conv_reassembly.resconv_seq.{place}.{kind}"] = unit
                unit = tensors[f"{old}.resConfUnit2.conv{conv}.{kind}"]
                parts["fusion"][f"{new}.scale_proj_seq.0.resconv_seq.{place}.{kind}"] = unit
        parts["head"][f"spatial_upsampler.0.{kind}"] = tensors[f"depth_head.scratch.output_conv1.{kind}"]
        parts["head"][f"proj_1ch.0.{kind}"] = tensors[f"depth_head.scratch.output_conv2.0.{kind}"]
        parts["head"][f"proj_1ch.2.{kind}"] = tensors[f"depth_head.scratch.output_conv2.2.{kind}"]
    for i, stage in enumerate(STAGES):
        parts["reassemble"][f"{stage}.fuse_proj.weight"] = tensors[f"depth_head.scratch.layer{i + 1}_rn.weight"]
    return parts


def flat(parts: dict[str, Tensors]) -> Tensors:
    """muggled_dpt's parts as the state dict of the whole network."""
    return {f"{part}.{name}": tensor for part, table in parts.items() for name, tensor in table.items()}


# What transformers 4 leaves out of config.json because it is the default.
MODEL_DEFAULTS = {
    "patch_size": 14, "reassemble_hidden_size": 384, "reassemble_factors": [4, 2, 1, 0.5], "head_in_index": -1,
    "neck_hidden_sizes": [48, 96, 192, 384], "fusion_hidden_size": 64, "head_hidden_size": 32,
    "depth_estimation_type": "relative", "max_depth": 1,
}  # fmt: skip
DINOV2_DEFAULTS = {
    "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "mlp_ratio": 4, "image_size": 224,
    "patch_size": 14, "use_swiglu_ffn": False, "apply_layernorm": True, "reshape_hidden_states": True,
}  # fmt: skip


def lean_config(preset: Preset) -> dict[str, Any]:
    """config.json as transformers 4 writes it."""
    backbone = {
        "hidden_size": preset.width, "num_hidden_layers": preset.depth, "num_attention_heads": preset.heads,
        "mlp_ratio": 4, "image_size": 14 * preset.grid, "patch_size": 14, "use_swiglu_ffn": preset.ffn == "swiglu",
        "out_indices": [tap + 1 for tap in preset.taps], "apply_layernorm": True, "reshape_hidden_states": False,
    }  # fmt: skip
    model = {
        "patch_size": 14, "reassemble_hidden_size": preset.width, "reassemble_factors": [4, 2, 1, 0.5],
        "head_in_index": -1, "neck_hidden_sizes": list(preset.out_channels), "fusion_hidden_size": preset.features,
        "head_hidden_size": preset.head_channels, "depth_estimation_type": preset.head,
        "max_depth": int(preset.max_depth_m or 1),
    }  # fmt: skip
    lean = {k: v for k, v in model.items() if v != MODEL_DEFAULTS[k]}
    inner = {k: v for k, v in backbone.items() if k not in DINOV2_DEFAULTS or v != DINOV2_DEFAULTS[k]}
    return {"model_type": "depth_anything", "backbone_config": {"model_type": "dinov2", **inner}, **lean}


def published_config(version: int, **changes: Any) -> dict[str, Any]:
    """config.json of the small models as the hub has it (transformers 4.39)."""
    taps = {1: [9, 10, 11, 12], 2: [3, 6, 9, 12]}[version]
    return {
        "_commit_hash": None, "architectures": ["DepthAnythingForDepthEstimation"], "backbone": None,
        "backbone_config": {
            "architectures": ["Dinov2Model"], "hidden_size": 384, "image_size": 518, "model_type": "dinov2",
            "num_attention_heads": 6, "out_features": [f"stage{i}" for i in taps], "out_indices": taps,
            "reshape_hidden_states": False, "torch_dtype": "float32",
        },
        "fusion_hidden_size": 64, "head_hidden_size": 32, "head_in_index": -1, "initializer_range": 0.02,
        "model_type": "depth_anything", "neck_hidden_sizes": [48, 96, 192, 384], "patch_size": 14,
        "reassemble_factors": [4, 2, 1, 0.5], "reassemble_hidden_size": 384, "torch_dtype": "float32",
        "transformers_version": None, "use_pretrained_backbone": False, **changes,
    }  # fmt: skip
