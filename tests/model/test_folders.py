"""Folders: what their JSON says about a network is believed only where it makes sense and the weights agree."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from model import DepthAnything, Preset, WeightsError
from model.files import write_safetensors
from model.save import record_of, save_huggingface
from model.weights import FORMAT_VERSION, open_weights
from tests.model import formats, huggingface
from tests.model.test_layouts import METRIC, MLP, SWIGLU, same, write_folder


def refusal(path: Path, named: str = "", **how: Any) -> str:
    """What follows the path, or the file in it, in the message with which it is refused."""
    with pytest.raises(WeightsError) as caught:
        DepthAnything.from_pretrained(path, **how)
    message, start = str(caught.value), f"{path / named}: "
    assert message.startswith(start) and message.isprintable() and len(message) < 700, message
    return message.removeprefix(start)


# --- config.json of transformers ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as transformers writes it; the tests change its config.json."""
    tensors = formats.huggingface_4(formats.official(huggingface.loud_network(METRIC)), METRIC)
    return write_folder(tmp_path_factory.mktemp("hub") / "theirs", tensors, formats.lean_config(METRIC))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backbone_config": None}, "backbone_config is None; expected the table of a DINOv2"),
        ({"backbone_config": "dinov2"}, "backbone_config is 'dinov2'; expected the table"),
        ({"patch_size": 16}, "patch_size is 16; this network has 14"),
        ({"reassemble_factors": [2, 1, 1, 0.5]}, "reassemble_factors is [2, 1, 1, 0.5]; this network has"),
        ({"head_in_index": 0}, "head_in_index is 0; this network has -1"),
        ({"reassemble_hidden_size": 65}, "reassemble_hidden_size is 65, the backbone's hidden_size 64; they must be"),
        ({"neck_hidden_sizes": [16, 16, 24]}, "neck_hidden_sizes is [16, 16, 24]; expected four whole numbers"),
        ({"neck_hidden_sizes": None}, "neck_hidden_sizes is None; expected four whole numbers"),
        ({"fusion_hidden_size": None}, "fusion_hidden_size is None; expected a whole number above 0"),
        ({"head_hidden_size": "32"}, "head_hidden_size is '32'; expected a whole number above 0"),
        ({"depth_estimation_type": "ordinal"}, "depth_estimation_type is 'ordinal'; expected relative or metric"),
        ({"depth_estimation_type": None}, "depth_estimation_type is None; expected relative or metric"),
        ({"max_depth": "deep"}, "could not convert string to float: 'deep'"),
        ({"max_depth": 10**400}, "int too large to convert to float"),
    ],
)
def test_a_config_of_another_network(theirs: Path, change: dict, message: str) -> None:
    (theirs / "config.json").write_text(json.dumps({**formats.lean_config(METRIC), **change}))
    assert refusal(theirs, "config.json").startswith(message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "swin"}, "backbone_config.model_type is 'swin'; this network has 'dinov2'"),
        ({"patch_size": 16}, "backbone_config.patch_size is 16; this network has 14"),
        ({"hidden_act": "relu"}, "backbone_config.hidden_act is 'relu'; this network has 'gelu'"),
        ({"qkv_bias": False}, "backbone_config.qkv_bias is False; this network has True"),
        ({"apply_layernorm": False}, "backbone_config.apply_layernorm is False; this network has True"),
        ({"out_indices": [1, 2, 4]}, "out_indices is [1, 2, 4]; expected four whole numbers"),
        ({"out_indices": None}, "out_indices is None; expected four whole numbers"),
        ({"out_indices": 4}, "out_indices is 4; expected four whole numbers"),
        ({"out_indices": ["1", "2", "3", "4"]}, "out_indices is ['1', '2', '3', '4']; expected four whole numbers"),
        ({"out_indices": [0, 1, 2, 3]}, "out_indices is [0, 1, 2, 3]; blocks count from 1 to 4"),
        ({"out_indices": [1, 2, 3, 5]}, "out_indices is [1, 2, 3, 5]; blocks count from 1 to 4"),
        ({"out_indices": [4, 3, 2, 1]}, "preset custom: taps (3, 2, 1, 0) must be 4 rising block numbers"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0; expected a whole number above 0"),
        ({"num_attention_heads": 3}, "preset custom: width 64 is not a multiple of heads 3"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True; expected a whole number above 0"),
        ({"image_size": [112, 112]}, "image_size is [112, 112]; expected a whole number above 0"),
    ],
)
def test_a_config_of_another_backbone(theirs: Path, change: dict, message: str) -> None:
    config = formats.lean_config(METRIC)
    config["backbone_config"] |= change
    (theirs / "config.json").write_text(json.dumps(config))
    assert refusal(theirs, "config.json").startswith(message)


def test_a_config_that_counts_from_the_end_or_knows_no_depth(theirs: Path) -> None:
    config = formats.lean_config(METRIC)
    config["backbone_config"]["out_indices"] = [1, -3, 3, -1]
    (theirs / "config.json").write_text(json.dumps({**config, "max_depth": None}))
    preset = open_weights(theirs).preset
    assert preset is not None and preset.taps == (0, 1, 2, 3)
    # transformers 4 took 1 m then; 5 has no such network.
    assert (preset.name, preset.head, preset.max_depth_m) == ("custom", "metric", 1.0)


@pytest.mark.parametrize("model_type", ["zoedepth", 5, None])
def test_a_config_of_an_unknown_kind_says_nothing(theirs: Path, model_type: object) -> None:
    (theirs / "config.json").write_text(json.dumps({**formats.lean_config(METRIC), "model_type": model_type}))
    assert refusal(theirs).startswith("the file cannot tell which network it is; name the preset")
    assert DepthAnything.from_pretrained(theirs, METRIC.name).preset == replace(METRIC, position_mode="exact")


def test_a_config_of_other_sizes_than_the_weights(theirs: Path) -> None:
    config = formats.lean_config(METRIC)
    config["fusion_hidden_size"] = 24
    (theirs / "config.json").write_text(json.dumps(config))
    assert "does not fit preset custom: " in refusal(theirs) and "this file fits preset tiny-swiglu" in refusal(theirs)


V1_TAPS = {"out_indices": [5, 6, 7, 8], "out_features": None}


@pytest.mark.parametrize("change", [V1_TAPS, {"num_attention_heads": 4}, {"out_indices": [1, 2, 3, 4]}])
def test_a_config_that_contradicts_our_facts_in_the_header(tmp_path: Path, change: dict) -> None:
    save_huggingface(huggingface.loud_network(MLP), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["backbone_config"] |= change
    (tmp_path / "config.json").write_text(json.dumps(config))
    message = "config.json describes custom, but the weights were saved as v2-tiny"
    assert refusal(tmp_path, "config.json") == message


def test_our_own_folder_holds_against_what_is_asked(tmp_path: Path) -> None:
    net = huggingface.loud_network(MLP)
    net.save_pretrained(tmp_path)
    assert DepthAnything.from_pretrained(tmp_path, replace(MLP, position_mode="exact")).preset == MLP
    assert refusal(tmp_path, preset="tiny") == "was saved as v2-tiny, not tiny; leave preset out"
    asked = replace(MLP, taps=(4, 5, 6, 7), heads=4)
    message = "was saved as v2-tiny, not v2-tiny (heads, taps differ); leave preset out"
    assert refusal(tmp_path, preset=asked) == message
    with pytest.raises(WeightsError, match="position_mode is 'bent'; allowed: official, exact"):
        DepthAnything.from_pretrained(tmp_path, position_mode="bent")


# --- folders without what they need -------------------------------------------------------------------------------


def test_folders_that_are_none_of_ours(tmp_path: Path) -> None:
    assert refusal(tmp_path) == "no config.json in this folder; give a weights file, or a folder that was saved"
    (tmp_path / "checkpoints").mkdir()
    assert refusal(tmp_path) == "a run's folder; name its weights/ or one of its checkpoints/step_* folders"
    for ema in (True, False):
        assert "averaged (EMA) and last ones are in training checkpoints only" in refusal(tmp_path, ema=ema)
    for text, message in (("{", "no JSON ("), ("[]", "expected a JSON table, found list"), ("[" * 10**5, "no JSON (")):
        (tmp_path / "config.json").write_text(text)
        assert refusal(tmp_path, "config.json").startswith(message)
    (tmp_path / "config.json").write_text("{}")
    assert refusal(tmp_path).startswith("none of model.safetensors, pytorch_model.bin (or their .index.json)")
    (tmp_path / "model.safetensors").mkdir()
    assert refusal(tmp_path).startswith("none of model.safetensors")


@pytest.mark.parametrize("named", ["../x.safetensors", "/etc/passwd", "a/../../x.safetensors", "parts/x", "", "..", 7])
def test_an_index_may_only_name_files_beside_it(tmp_path: Path, named: object) -> None:
    write_safetensors(str(tmp_path / "x.safetensors"), formats.official(huggingface.loud_network(SWIGLU)))
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": named}}))
    if named in ("", ".."):  # the folder itself, or the one above: no files
        with pytest.raises(WeightsError, match="is no regular file"):
            DepthAnything.from_pretrained(folder, SWIGLU)
    else:
        message = "has no weight_map of file names beside it; copy it again"
        assert refusal(folder, "model.safetensors.index.json", preset=SWIGLU) == message


@pytest.mark.parametrize("index", [{}, {"weight_map": None}, {"weight_map": ["a"]}, {"weight_map": {}}])
def test_an_index_without_files(tmp_path: Path, index: dict) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(WeightsError, match=r"weight_map|not such a network"):
        DepthAnything.from_pretrained(tmp_path, SWIGLU)


def test_a_folder_with_a_part_missing(tmp_path: Path) -> None:
    tensors = formats.huggingface_4(formats.official(huggingface.loud_network(SWIGLU)), SWIGLU)
    folder = write_folder(tmp_path / "f", tensors, formats.lean_config(SWIGLU), "safetensors-parts")
    part = folder / "model-00002-of-00002.safetensors"
    held = part.read_bytes()
    part.unlink()
    assert "No such file or directory" in refusal(folder, part.name)
    part.write_bytes(held[: len(held) // 2])
    assert "broken or truncated safetensors" in refusal(folder, part.name)
    write_safetensors(str(part), {"head.conv3.bias": torch.ones(1)})
    assert " missing (" in refusal(folder)


# --- training checkpoints -----------------------------------------------------------------------------------------


def write_checkpoint(folder: Path, nets: dict[str, DepthAnything], **changes: Any) -> Path:
    """A checkpoint's folder by hand; `changes` replace keys of its manifest, None removes them."""
    folder.mkdir()
    (folder / "optimizer.pt").write_bytes(b"not looked at")
    digests = {}
    for name, net in nets.items():
        write_safetensors(str(folder / name), formats.official(net))
        digests[name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    preset = next(iter(nets.values())).preset
    manifest = {"step": 7, "files": digests, "network": {"format_version": 1, **preset.config()}, **changes}
    (folder / "manifest.json").write_text(json.dumps({k: v for k, v in manifest.items() if v is not None}))
    return folder


@pytest.mark.parametrize("preset", [MLP, replace(METRIC, position_mode="exact", heads=4)], ids=["v2-tiny", "metric"])
def test_a_checkpoint_has_the_last_and_the_averaged_weights(tmp_path: Path, preset: Preset) -> None:
    last, averaged = huggingface.loud_network(preset, 1), huggingface.loud_network(preset, 2)
    folder = write_checkpoint(tmp_path / "step_7", {"weights.safetensors": last, "ema.safetensors": averaged})
    mean = ", averaged weights"
    for ema, net, more in ((False, last, ""), (True, averaged, mean), (None, averaged, mean)):
        again = DepthAnything.from_pretrained(folder, ema=ema)
        assert same(again, net) and again.preset == preset and again.fingerprint() == net.fingerprint()
        assert again.loaded is not None and again.loaded.container == f"training checkpoint{more}"
        assert again.loaded.path == str(folder)
    assert "was saved as" in refusal(folder, preset="v2-vits")
    record = {k: v for k, v in record_of(preset, "x").items() if k != "fingerprint"}
    assert record == {"format_version": FORMAT_VERSION, **preset.config()}  # what a checkpoint writes


def test_a_checkpoint_that_says_no_network_asks(tmp_path: Path) -> None:
    net = huggingface.loud_network(SWIGLU)
    folder = write_checkpoint(tmp_path / "step_7", {"weights.safetensors": net}, network=None)
    assert refusal(folder).startswith("the file cannot tell which network it is; name the preset")
    assert same(DepthAnything.from_pretrained(folder, "tiny-swiglu"), net)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        ([], "format_version is None, expected 1"),
        ("tiny", "dictionary update sequence element"),
        ({"format_version": 2}, "format_version is 2, expected 1: not a folder of ours"),
        ({"format_version": 1}, "unknown or missing fields: depth, features"),
        ({"format_version": 1, **SWIGLU.config(), "heads": 0}, ""),
        ({"format_version": 1, **SWIGLU.config(), "new": 0}, "unknown or missing fields: new"),
    ],
)
def test_a_checkpoint_whose_network_makes_no_sense(tmp_path: Path, network: object, message: str) -> None:
    nets = {"weights.safetensors": huggingface.loud_network(SWIGLU)}
    folder = write_checkpoint(tmp_path / "step_7", nets, network=network)
    assert refusal(folder, "manifest.json").startswith(message)


def test_damaged_checkpoints(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "step_7", {"weights.safetensors": huggingface.loud_network(SWIGLU)})
    assert refusal(folder, ema=True) == "no averaged weights (EMA) in this checkpoint's manifest.json"
    file = folder / "weights.safetensors"
    held = bytearray(file.read_bytes())
    held[-1] ^= 1
    file.write_bytes(held)
    message = "does not match its checksum in manifest.json; take an earlier checkpoint"
    assert refusal(folder, file.name) == message
    file.write_bytes(held[: len(held) // 2])
    assert refusal(folder, file.name) == message
    file.unlink()
    assert refusal(folder, file.name) == "cannot be read (No such file or directory); take an earlier checkpoint"
    for manifest, message in (
        ("", "no JSON ("),
        ("[]", "expected a JSON table, found list"),
    ):
        (folder / "manifest.json").write_text(manifest)
        assert refusal(folder, "manifest.json").startswith(message)
    for files in ({}, [], None, {"weights.safetensors": None}):
        (folder / "manifest.json").write_text(json.dumps({"files": files}))
        assert refusal(folder) == "no weights.safetensors in this checkpoint's manifest.json"
