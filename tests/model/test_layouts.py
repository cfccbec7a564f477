"""Reading: every format that weights come in gives the same network, whichever of its shapes the file has.

The files are written by `tests/model/formats.py`, which knows nothing of `model/layouts`, and by the other libraries.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from timm.layers import SwiGLUPacked
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from model import PRESETS, DepthAnything, Encoder, Preset, WeightsError
from model.layouts.huggingface import preset_from_config
from model.weights import candidates, open_weights
from tests.model import formats, huggingface

SWIGLU = PRESETS["tiny-swiglu"]
# The published architecture in small, as V1 has it: the last four blocks, a plain MLP, no multiple of four.
V1 = replace(
    SWIGLU, name="v1-tiny", ffn="mlp", depth=5, taps=(1, 2, 3, 4), output_align_corners=False, position_mode="official"
)
MLP = replace(V1, name="v2-tiny", depth=8, taps=(1, 3, 5, 7), output_align_corners=True)
METRIC = PRESETS["tiny-swiglu-metric-indoor"]
ALL = (SWIGLU, V1, MLP, METRIC)


def save(path: Path, content: Any) -> Path:
    """Writes a file as training scripts do."""
    torch.save(content, path)
    return path


def same(a: nn.Module, b: nn.Module, but: tuple[str, ...] = ()) -> bool:
    """Whether two networks hold the same bits; the tensors `but` are zeros in the second."""
    one, two = a.state_dict(), b.state_dict()
    equal = all(torch.equal(one[k].view(torch.int32), two[k].view(torch.int32)) for k in one if k not in but)
    return list(one) == list(two) and equal and not any(two[k].any() for k in but)


def check(net: DepthAnything, path: Path, layout: str, mode: str, *, dropped: bool = False, asked: bool = True) -> None:
    """Asserts that a file is this network, under the layout's name and with its position mode.

    dropped: whether the format has no room for the five unused tensors; asked: whether the preset must be named.
    """
    preset = net.preset if asked else None
    again = DepthAnything.from_pretrained(path, preset=preset, position_mode="official")
    unused = tuple(formats.UNUSED) if dropped else ()
    assert same(net, again, unused)
    assert again.fingerprint() == net.fingerprint()
    report = again.loaded
    assert report is not None and report.layout == layout and sorted(report.filled) == sorted(unused)
    assert report.matched == len(net.state_dict()) - len(unused)
    assert (report.missing, report.unexpected, report.path) == ((), (), str(path))
    # The name of a preset leaves the mode to the layout; a Preset brings its own.
    assert open_weights(path).layout.position_mode == mode
    if not asked or net.preset.name in PRESETS:
        name = net.preset.name if asked else None
        assert DepthAnything.from_pretrained(path, name).preset.position_mode == mode
    if asked:
        own = replace(net.preset, position_mode="exact")
        assert DepthAnything.from_pretrained(path, own).preset == own


# --- the authors' names -------------------------------------------------------------------------------------------


def bare(tensors: dict[str, Tensor]) -> Any:
    return OrderedDict(tensors)


def under_model(tensors: dict[str, Tensor]) -> Any:
    return {"model": dict(tensors)}


def parallel(tensors: dict[str, Tensor]) -> Any:
    return {f"module.{k}": v for k, v in tensors.items()}


def compiled(tensors: dict[str, Tensor]) -> Any:
    return {f"_orig_mod.{k}": v for k, v in tensors.items()}


def compiled_parallel(tensors: dict[str, Tensor]) -> Any:
    return {"state_dict": {f"module._orig_mod.{k}": v for k, v in tensors.items()}, "step": 7}


def metric_training(tensors: dict[str, Tensor]) -> Any:
    """`latest.pth` of Depth-Anything-V2's metric_depth/train.py, its optimizer after a step."""
    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([{"params": [weight], "lr": 5e-6, "name": "encoder"}], betas=(0.9, 0.999))
    weight.sum().backward()
    optimizer.step()
    scores = {"d1": 0.97, "abs_rel": 0.06, "rmse": torch.tensor(0.2)}
    return {"model": parallel(tensors), "optimizer": optimizer.state_dict(), "epoch": 3, "previous_best": scores}


@pytest.mark.parametrize("preset", [SWIGLU, V1, METRIC], ids=lambda p: p.name)
@pytest.mark.parametrize("wrap", [bare, under_model, parallel, compiled, compiled_parallel, metric_training])
def test_the_authors_files(tmp_path: Path, wrap: Callable[..., Any], preset: Preset) -> None:
    net = huggingface.loud_network(preset)
    path = save(tmp_path / "latest.pth", wrap(formats.official(net)))
    check(net, path, "official", "official")
    tensors = open_weights(path).tensors
    assert {k: tuple(v.shape) for k, v in tensors.items()} == formats.official_shapes(preset)


def test_the_old_container_and_safetensors(tmp_path: Path) -> None:
    net = huggingface.loud_network(SWIGLU)
    torch.save(formats.official(net), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    check(net, tmp_path / "old.pth", "official", "official")
    safetensors.torch.save_file(parallel(formats.official(net)), tmp_path / "a.safetensors")
    check(net, tmp_path / "a.safetensors", "official", "official")


def test_the_tensors_say_whether_the_class_token_is_read(tmp_path: Path) -> None:
    net = huggingface.loud_network(replace(MLP, readout="project"))
    path = save(tmp_path / "w.pth", formats.official(net))
    for asked in (MLP, net.preset):
        again = DepthAnything.from_pretrained(path, asked)
        assert same(net, again) and again.preset == net.preset and again.fingerprint() == net.fingerprint()


# --- Distill-Any-Depth --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize("mask_token", [True, False])
def test_distill_any_depth(tmp_path: Path, mask_token: bool, chunks: int) -> None:
    net = huggingface.loud_network(MLP)
    tensors = formats.distill(formats.official(net), mask_token, chunks)
    assert "backbone.blocks.0.3.norm1.weight" in tensors and ("backbone.mask_token" in tensors) == mask_token
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(tensors, path)
    again = DepthAnything.from_pretrained(path, preset=MLP)
    unused = () if mask_token else ("pretrained.mask_token",)
    assert same(net, again, unused) and again.fingerprint() == net.fingerprint()
    assert again.loaded is not None and again.loaded.filled == unused
    assert again.loaded.layout == "distill-any-depth" and again.preset.position_mode == "official"


# --- Hugging Face -------------------------------------------------------------------------------------------------


def write_folder(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any], how: str = "safetensors") -> Path:
    """A folder as the hub has it: one file or two with an index, safetensors or pickled."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    whole = {"safetensors": "model.safetensors", "bin": "pytorch_model.bin"}[how.removesuffix("-parts")]
    names = sorted(tensors)
    parts = {whole: names}
    if how.endswith("-parts"):
        stem, suffix = whole.split(".")
        parts = {f"{stem}-0000{i + 1}-of-00002.{suffix}": names[i::2] for i in range(2)}
        index = {"metadata": {"total_size": 1}, "weight_map": {n: f for f, held in parts.items() for n in held}}
        (folder / f"{whole}.index.json").write_text(json.dumps(index))
    for file, held in parts.items():
        table = {name: tensors[name].clone() for name in held}
        if whole.endswith("bin"):
            torch.save(table, folder / file)
        else:
            safetensors.torch.save_file(table, folder / file, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("preset", ALL, ids=lambda p: p.name)
@pytest.mark.parametrize(("names", "layout"), [(formats.huggingface_4, ""), (formats.huggingface_5, "-5")])
def test_hugging_face(tmp_path: Path, names: Callable[..., Any], layout: str, preset: Preset) -> None:
    net = huggingface.loud_network(preset)
    tensors = names(formats.official(net), preset)
    check(net, save(tmp_path / "w.pth", tensors), f"huggingface{layout}", "exact")
    for how in ("safetensors", "bin", "safetensors-parts", "bin-parts"):
        folder = write_folder(tmp_path / how, tensors, formats.lean_config(preset), how)
        check(net, folder, f"huggingface{layout}", "exact", asked=False)
        said, known = open_weights(folder).preset.config(), preset.config()
        ours = {"preset", "position_mode", "head_bias", "output_align_corners"}  # what transformers has no word for
        assert {k for k in known if said[k] != known[k]} <= ours
        assert said["preset"] == (preset.name if preset.name in PRESETS else "custom")


@pytest.mark.parametrize("preset", ALL, ids=lambda p: p.name)
def test_folders_and_state_dicts_of_transformers_itself(tmp_path: Path, preset: Preset) -> None:
    net = huggingface.loud_network(preset)
    theirs = huggingface.twin(net)
    theirs.save_pretrained(tmp_path / "whole")
    theirs.save_pretrained(tmp_path / "parts", max_shard_size="200KB")
    assert (tmp_path / "parts" / "model.safetensors.index.json").is_file()
    for folder in (tmp_path / "whole", tmp_path / "parts"):
        check(net, folder, "huggingface", "exact", asked=False)
    check(net, save(tmp_path / "w.pth", theirs.state_dict()), "huggingface-5", "exact")


@pytest.mark.parametrize("preset", ALL, ids=lambda p: p.name)
def test_transformers_loads_what_we_write(tmp_path: Path, preset: Preset) -> None:
    from transformers import DepthAnythingForDepthEstimation, DPTImageProcessor

    net = huggingface.loud_network(preset)
    net.save_pretrained(tmp_path, layout="huggingface")
    theirs, info = DepthAnythingForDepthEstimation.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    mine = huggingface.twin(net).state_dict()
    assert list(theirs.state_dict()) == list(mine)
    assert all(torch.equal(v, mine[k]) for k, v in theirs.state_dict().items())
    expected = huggingface.config(preset).to_dict()
    got = theirs.config.to_dict()
    of_the_file = {"architectures", "dtype", "backbone_config", "_name_or_path"}
    assert {k for k in expected if got[k] != expected[k]} <= of_the_file
    inner, wanted = got["backbone_config"], expected["backbone_config"]
    assert {k for k in wanted if inner[k] != wanted[k]} <= of_the_file
    image_BCHW = torch.randn(1, 3, 112, 112, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        depth_BHW = theirs.eval()(image_BCHW).predicted_depth
        prediction = net(image_BCHW)
    ours_BHW = prediction.disparity_BHW if preset.head == "relative" else prediction.depth_m_BHW
    assert (depth_BHW - ours_BHW).abs().max() <= 1e-5 * ours_BHW.mean()  # the stored grid: both modes are the same
    processor = DPTImageProcessor.from_pretrained(tmp_path)
    assert (processor.size["height"], processor.ensure_multiple_of, processor.keep_aspect_ratio) == (112, 14, True)


# --- which network it is ------------------------------------------------------------------------------------------

VITS = ["v1-vits", "v2-vits", "v2-vits-metric-indoor", "v2-vits-metric-outdoor"]


@pytest.mark.parametrize(
    ("write", "expected"),
    [
        pytest.param(lambda t, p: t, VITS, id="official"),
        pytest.param(lambda t, p: metric_training(t), VITS, id="metric training"),
        pytest.param(formats.huggingface_4, VITS, id="Hugging Face, a file alone"),
        pytest.param(formats.huggingface_5, VITS, id="Hugging Face in memory"),
        pytest.param(lambda t, p: formats.distill(t, True), ["v2-vits"], id="Distill-Any-Depth"),
        pytest.param(lambda t, p: formats.muggled(t, p, 1), ["v1-vits"], id="muggled V1"),
        pytest.param(lambda t, p: formats.flat(formats.muggled(t, p, 2)), [VITS[1], *VITS[2:]], id="muggled V2"),
    ],
)
def test_what_a_file_can_be(tmp_path: Path, write: Callable[..., Any], expected: list[str]) -> None:
    path = save(tmp_path / "w.pth", write(formats.blank(PRESETS["v2-vits"]), PRESETS["v2-vits"]))
    assert candidates(open_weights(path)) == expected
    if len(expected) == 1:
        net = DepthAnything.from_pretrained(path)
        mode = "exact" if expected == ["v1-vits"] else "official"
        assert net.preset == replace(PRESETS[expected[0]], position_mode=mode)
    else:
        with pytest.raises(WeightsError) as caught:
            DepthAnything.from_pretrained(path)
        message = "the file cannot tell which network it is; name the preset (--preset, preset=), one of"
        assert str(caught.value) == f"{path}: {message} {', '.join(expected)}"


@pytest.mark.parametrize(
    ("version", "changes", "expected"),
    [
        (1, {}, "v1-vits"),
        (2, {}, "v2-vits"),
        (2, {"depth_estimation_type": "metric", "max_depth": 20}, "v2-vits-metric-indoor"),
        (2, {"depth_estimation_type": "metric", "max_depth": 80}, "v2-vits-metric-outdoor"),
        (2, {"depth_estimation_type": "relative", "max_depth": 1}, "v2-vits"),
        (2, {"depth_estimation_type": "relative", "max_depth": None}, "v2-vits"),
    ],
)
def test_published_folders_say_which_preset(tmp_path: Path, version: int, changes: dict, expected: str) -> None:
    preset = PRESETS[expected]
    tensors = formats.huggingface_4(formats.blank(preset), preset)
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(formats.published_config(version, **changes)))
    torch.save(tensors, folder / "pytorch_model.bin")
    assert open_weights(folder).preset == replace(preset, position_mode="exact")
    if expected == "v1-vits":
        assert DepthAnything.from_pretrained(folder).preset == replace(preset, position_mode="exact")
        wrong = "was saved as v1-vits, not v2-vits; leave preset out"
        with pytest.raises(WeightsError, match=wrong):
            DepthAnything.from_pretrained(folder, preset="v2-vits")


@pytest.mark.parametrize("name", [n for n, preset in PRESETS.items() if preset.head_stride == 1])
def test_a_config_without_defaults_is_the_preset(name: str) -> None:
    config = formats.lean_config(PRESETS[name])
    if name == "v2-vitb":  # everything of DINOv2's base model is a default
        assert set(config["backbone_config"]) == {"model_type", "image_size", "out_indices", "reshape_hidden_states"}
    assert preset_from_config(config) == replace(PRESETS[name], position_mode="exact")
    del config["backbone_config"]["out_indices"]
    config["backbone_config"]["out_features"] = [f"stage{i + 1}" for i in PRESETS[name].taps]
    assert preset_from_config(config) == replace(PRESETS[name], position_mode="exact")


def test_the_authors_own_folder_on_the_hub_asks_for_its_preset(tmp_path: Path) -> None:
    """V1's: PyTorchModelHubMixin's config.json, which is not of transformers."""
    config = {"encoder": "vits", "features": 64, "out_channels": [48, 96, 192, 384], "use_clstoken": False}
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.save(formats.blank(PRESETS["v1-vits"]), tmp_path / "pytorch_model.bin")
    with pytest.raises(WeightsError, match="one of v1-vits, v2-vits"):
        DepthAnything.from_pretrained(tmp_path)
    net = DepthAnything.from_pretrained(tmp_path, preset="v1-vits")
    assert net.preset == PRESETS["v1-vits"] and net.loaded is not None and net.loaded.layout == "official"


# --- muggled_dpt --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize(("preset", "version"), [(SWIGLU, 2), (MLP, 2), (METRIC, 2), (V1, 1), (MLP, 1)])
def test_muggled(tmp_path: Path, preset: Preset, version: int, nested: bool) -> None:
    net = huggingface.loud_network(preset)
    parts = formats.muggled(formats.official(net), preset, version)
    path = save(tmp_path / "w.pth", parts if nested else formats.flat(parts))
    check(net, path, f"muggled-v{version}", "exact", dropped=True)


# --- encoders -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", [SWIGLU, V1], ids=lambda p: p.name)
def test_encoders(tmp_path: Path, preset: Preset) -> None:
    from transformers import Dinov2Model

    net = huggingface.loud_network(preset)
    tensors = formats.official(net)
    theirs = Dinov2Model(huggingface.config(preset).backbone_config)
    prefix = "backbone."
    in_memory = {k.removeprefix(prefix): v for k, v in formats.huggingface_5(tensors, preset).items() if prefix in k}
    theirs.load_state_dict(in_memory, strict=True)
    theirs.save_pretrained(tmp_path / "hf")
    vit = small_timm(preset)
    vit.load_state_dict(formats.timm(tensors), strict=True)
    files = {
        save(tmp_path / "hub.pth", formats.encoder(tensors)): (),
        save(tmp_path / "timm.pth", vit.state_dict()): ("mask_token",),
        save(tmp_path / "dad.pth", formats.distill(tensors, mask_token=True, chunks=2)): (),
        save(tmp_path / "muggled.pth", formats.muggled(tensors, preset, 1)): ("mask_token",),
        save(tmp_path / "hf-5.pth", theirs.state_dict()): (),
        tmp_path / "hf": (),
    }
    for path, zero in files.items():
        assert same(net.pretrained, Encoder.from_preset(preset, encoder_weights=path), zero), path
        assert same(net.pretrained, DepthAnything.from_preset(preset, encoder_weights=path).pretrained, zero), path


def small_timm(preset: Preset) -> VisionTransformer:
    """timm's own network of a preset's encoder; its SwiGLU is that of its giants."""
    hidden = (int(4 * preset.width * 2 / 3) + 7) // 8 * 8
    more: dict[str, Any] = {}
    if preset.ffn == "swiglu":
        more = {"mlp_ratio": 2 * hidden / preset.width, "mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU}
    return VisionTransformer(
        img_size=14 * preset.grid, patch_size=14, num_classes=0, embed_dim=preset.width, depth=preset.depth,
        num_heads=preset.heads, init_values=1e-5, **more,
    )  # fmt: skip


def test_timms_published_encoder_has_these_names(tmp_path: Path) -> None:
    theirs = timm.create_model("vit_small_patch14_dinov2", pretrained=False, num_classes=0)
    encoder = Encoder.from_preset("v2-vits", encoder_weights=save(tmp_path / "timm.pth", theirs.state_dict()))
    state = encoder.state_dict()
    assert all(torch.equal(state[k], v) for k, v in theirs.state_dict().items())
    assert set(state) - set(theirs.state_dict()) == {"mask_token"} and not encoder.mask_token.any()


def test_a_read_out_that_is_asked_for_may_be_missing(tmp_path: Path) -> None:
    net = DepthAnything.from_preset("tiny-swiglu")
    net.save_pretrained(tmp_path / "w")
    (tmp_path / "w" / "config.json").unlink()
    tensors = safetensors.torch.load_file(tmp_path / "w" / "model.safetensors")
    safetensors.torch.save_file(tensors, tmp_path / "plain.safetensors")
    asked = replace(PRESETS["tiny-swiglu"], readout="project")
    again = DepthAnything.from_pretrained(
        tmp_path / "plain.safetensors", asked, allow_missing=["depth_head.readout_projects.*"]
    )
    assert again.preset.readout == "project" and again.loaded is not None and len(again.loaded.missing) == 8
