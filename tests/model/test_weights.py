"""Weights: bit-identical round trips, and one readable line for everything that does not fit."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch

from model import PRESETS, DepthAnything, Encoder, Preset, WeightsError
from model.files import write_safetensors
from model.save import save_encoder
from model.weights import fingerprint, official_state

SWIGLU = replace(PRESETS["tiny"], name="tiny-swiglu", ffn="swiglu")


def fresh(preset: str | Preset = "tiny", seed: int = 0) -> DepthAnything:
    torch.manual_seed(seed)
    net = DepthAnything.from_preset(preset)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return net


def official(net: DepthAnything) -> dict[str, torch.Tensor]:
    return official_state(net)


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    one, two = a.state_dict(), b.state_dict()
    return list(one) == list(two) and all(torch.equal(one[k], two[k]) for k in one)


def refusal(path: Path, preset: str | Preset | None = "tiny") -> str:
    with pytest.raises(WeightsError) as caught:
        DepthAnything.from_pretrained(path, preset=preset)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message and len(message) < 900
    return message


# --- round trips --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["tiny", "tiny-metric-indoor", SWIGLU])
def test_a_saved_folder_comes_back_bit_identical(tmp_path: Path, preset: str | Preset) -> None:
    net = fresh(preset)
    net.save_pretrained(tmp_path / "w")
    again = DepthAnything.from_pretrained(tmp_path / "w")
    assert same(net, again) and again.preset == net.preset
    assert again.fingerprint() == net.fingerprint()
    assert sorted(os.listdir(tmp_path / "w")) == ["config.json", "model.safetensors"]
    image_BCHW = torch.randn(1, 3, 56, 70)
    assert all(torch.equal(*pair) for pair in [[n.pretrained(image_BCHW).last_BND for n in (net, again)]])


def test_the_saved_files_say_what_tensors_cannot(tmp_path: Path) -> None:
    net = fresh(SWIGLU)
    net.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["preset"] == "tiny-swiglu" and config["taps"] == [0, 1, 2, 3] and config["head"] == "relative"
    assert config["max_depth_m"] is None and config["position_mode"] == "official"
    assert config["fingerprint"] == net.fingerprint()
    names = set(safetensors.torch.load_file(tmp_path / "model.safetensors"))
    assert {"pretrained.blocks.0.mlp.w12.weight", "pretrained.blocks.3.mlp.w3.bias"} <= names
    assert not any(".fc1." in n for n in names)


def test_saving_over_an_older_folder_and_from_channels_last(tmp_path: Path) -> None:
    fresh(seed=1).save_pretrained(tmp_path)
    net = fresh(seed=2).to(memory_format=torch.channels_last)
    net.save_pretrained(tmp_path)
    assert same(DepthAnything.from_pretrained(tmp_path), net)


@pytest.mark.parametrize("wrap", ["flat", "model", "state_dict", "module", "both", "half"])
def test_official_pth_files(tmp_path: Path, wrap: str) -> None:
    net = fresh()
    state: dict = official(net)
    if wrap in ("module", "both"):
        state = {f"module.{k}": v for k, v in state.items()}
    if wrap in ("model", "both"):
        state = {"model": state, "epoch": 3, "optimizer": {"state": {}}}
    if wrap == "state_dict":
        state = {"state_dict": state}
    if wrap == "half":
        net.load_state_dict({k: v.half().float() for k, v in net.state_dict().items()})
        state = {k: v.half() for k, v in state.items()}
    torch.save(state, tmp_path / "w.pth")
    assert same(DepthAnything.from_pretrained(tmp_path / "w.pth", preset="tiny"), net)


def test_a_lone_safetensors_file(tmp_path: Path) -> None:
    net = fresh(SWIGLU)
    write_safetensors(str(tmp_path / "w.safetensors"), official(net))
    assert same(DepthAnything.from_pretrained(tmp_path / "w.safetensors", preset=SWIGLU), net)


@pytest.mark.parametrize("preset", [PRESETS["tiny"], SWIGLU])
@pytest.mark.parametrize("source", ["hub", "timm", "saved", "whole", "folder"])
def test_encoder_files(tmp_path: Path, preset: Preset, source: str) -> None:
    net = fresh(preset)
    path = tmp_path / "encoder"
    if source == "hub":
        torch.save(official_state(net.pretrained), path)
    elif source == "timm":
        torch.save({k: v for k, v in net.pretrained.state_dict().items() if k != "mask_token"}, path)
        net.pretrained.mask_token.data.zero_()
    elif source == "saved":
        save_encoder(net.pretrained, path)
    elif source == "whole":
        torch.save(official(net), path)
    else:
        net.save_pretrained(path)
    assert same(DepthAnything.from_preset(preset, encoder_weights=path).pretrained, net.pretrained)
    assert same(Encoder.from_preset(preset, encoder_weights=path), net.pretrained)


# --- the fingerprint ----------------------------------------------------------------------------------------------


def test_the_fingerprint_knows_tensors_and_what_they_cannot_say() -> None:
    net = fresh()
    prints = {net.fingerprint()}
    for change in ({"heads": 2}, {"head_stride": 1}, {"head": "metric", "max_depth_m": 20.0}):
        other = DepthAnything.from_preset(replace(net.preset, **change))
        other.load_state_dict(net.state_dict())
        prints.add(other.fingerprint())
    deep = replace(net.preset, depth=6, taps=(0, 1, 2, 3))
    a, b = fresh(deep), fresh(replace(deep, taps=(2, 3, 4, 5)))
    assert same(a, b) and a.fingerprint() != b.fingerprint()
    net.depth_head.scratch.output_conv1.bias.data[0] += 1e-6
    prints.add(net.fingerprint())
    assert len(prints) == 5
    tensors = official(net)
    indoor, outdoor = (PRESETS[f"tiny-metric-{place}"] for place in ("indoor", "outdoor"))
    variants = [indoor, outdoor, replace(indoor, position_mode="exact"), replace(indoor, fusion="even")]
    assert len({fingerprint(tensors, preset) for preset in variants}) == 4
    before = net.fingerprint()
    net.pretrained.mask_token.data += 1  # nothing reads it, and some formats drop it
    assert net.fingerprint() == before and net.bfloat16().float().fingerprint() != before


# --- what does not fit --------------------------------------------------------------------------------------------


def test_missing_empty_and_foreign_files(tmp_path: Path) -> None:
    path = tmp_path / "w"
    assert "No such file" in refusal(path)
    path.write_bytes(b"")
    assert "empty" in refusal(path)
    path.write_bytes(b"not weights at all, but text")
    assert "neither safetensors nor" in refusal(path)
    torch.save([1, 2, 3], path)
    assert "no table of tensors" in refusal(path)
    torch.save({"a": torch.zeros(2), "b": torch.zeros(3)}, path)
    assert "(a, b); expected the authors' (pretrained.*, depth_head.*)" in refusal(path, None)
    assert refusal(path) == refusal(path, None)


@pytest.mark.parametrize("layout", ["safetensors", "pth", "legacy"])
@pytest.mark.parametrize("part", [0.00001, 0.001, 0.5, 0.999])
def test_truncated_files(tmp_path: Path, layout: str, part: float) -> None:
    path = tmp_path / "w"
    if layout == "safetensors":
        write_safetensors(str(path), official(fresh()))
    else:
        torch.save(official(fresh()), path, _use_new_zipfile_serialization=layout == "pth")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * part)])
    refusal(path)


class Evil:
    def __reduce__(self) -> tuple:
        return (os.system, ("touch evil",))


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Evil()}, tmp_path / "w.pth")
    assert "runs code" in refusal(tmp_path / "w.pth")
    assert not (tmp_path / "evil").exists()


def test_names_shapes_types_and_values_are_strict(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    state = official(fresh())

    def refused(changes: dict, drop: str | None = None) -> str:
        torch.save({k: v for k, v in {**state, **changes}.items() if k != drop}, path)
        return refusal(path)

    bias = "depth_head.scratch.output_conv1.bias"
    assert f"1 missing ({bias})" in refused({}, drop=bias)
    assert "1 unexpected (depth_head.extra)" in refused({"depth_head.extra": torch.zeros(1)})
    assert f"1 of another shape ({bias} [3] for [16])" in refused({bias: torch.zeros(3)})
    assert f"not floating point ({bias})" in refused({bias: torch.zeros(16, dtype=torch.int64)})
    assert f"not finite (NaN or infinite) in {bias}" in refused({bias: torch.full((16,), float("nan"))})


def test_a_file_of_another_size_says_which(tmp_path: Path) -> None:
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in DepthAnything(PRESETS["v2-vits"]).state_dict().items()}
    torch.save({k: torch.zeros(1).expand(s) for k, s in shapes.items()}, tmp_path / "s.pth")
    message = refusal(tmp_path / "s.pth", "v2-vitb")
    assert "this file fits preset v1-vits, v2-vits" in message and "v2-vitb:" in message and "..." in message
    assert "one of v1-vits, v2-vits, " in refusal(tmp_path / "s.pth", None)


def test_an_encoder_is_no_network_and_registers_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "e.safetensors"
    encoder = fresh().pretrained
    save_encoder(encoder, path)
    for preset in (None, "tiny"):
        assert "only an encoder" in refusal(path, preset)
    with pytest.raises(WeightsError, match="fits preset tiny"):
        DepthAnything.from_preset("v2-vits", encoder_weights=path)
    write_safetensors(str(path), {**encoder.state_dict(), "register_tokens": torch.zeros(1, 4, 96)})
    with pytest.raises(WeightsError, match="register_tokens"):
        DepthAnything.from_preset("tiny", encoder_weights=path)
    with pytest.raises(WeightsError, match="No such file"):
        Encoder.from_preset("tiny", encoder_weights=tmp_path / "none")


def test_broken_folders(tmp_path: Path) -> None:
    assert "no config.json in this folder" in refusal(tmp_path, None)
    fresh().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert "was saved as tiny, not v2-vits" in refusal(tmp_path, "v2-vits")

    def refused(changes: dict, drop: str | None = None) -> str:
        edited = {k: v for k, v in {**config, **changes}.items() if k != drop}
        (tmp_path / "config.json").write_text(json.dumps(edited))
        return refusal(tmp_path, None)

    assert "format_version is 9" in refused({"format_version": 9})
    assert "unknown or missing fields: taps" in refused({}, drop="taps")
    assert "4 rising block numbers" in refused({"taps": [3, 2, 1, 0]})
    assert "of another shape" in refused({"features": 64})
    assert "do not match the fingerprint" in refused({"heads": 2})
    (tmp_path / "config.json").write_text("{")
    refusal(tmp_path, None)
    (tmp_path / "config.json").write_text("[]")
    refusal(tmp_path, None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    fresh(seed=5).save_pretrained(tmp_path / "other")
    os.replace(tmp_path / "other" / "model.safetensors", tmp_path / "model.safetensors")
    assert "do not match the fingerprint" in refusal(tmp_path, None)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = fresh()
    net.save_pretrained(tmp_path)

    def fail(*_: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(WeightsError, match=r"model\.safetensors: cannot be written \(disk full\)"):
            fresh(seed=3).save_pretrained(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]
    assert same(DepthAnything.from_pretrained(tmp_path), net)
