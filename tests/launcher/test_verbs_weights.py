"""`fathom weights`: what each verb prints and leaves behind, and how it ends."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from model import DepthAnything
from model.files import write_safetensors
from model.save import record_of
from model.weights import official_state
from tests.launcher.conftest import Run
from tests.trainer.checkpoints import save_checkpoint
from trainer.checkpoint import TrainState

GROUP = "weights"


def network(preset: str = "tiny-swiglu", seed: int = 0) -> DepthAnything:
    torch.manual_seed(seed)
    return DepthAnything.from_preset(preset)


def test_there_and_back_through_every_format(fathom: Run, tmp_path: Path) -> None:
    net = network()
    torch.save(official_state(net), tmp_path / "authors.pth")
    status, out, _ = fathom("import", "authors.pth", "--preset", "tiny-swiglu", "--out", "ours")
    assert status == 0 and "127 tensors matched" in out and net.fingerprint() in out
    assert out.splitlines()[-1] == "ours"
    targets = {
        "official": "o.pth", "distill-any-depth": "d.safetensors", "muggled": "m.pth", "huggingface": "hf",
    }  # fmt: skip
    for layout, target in targets.items():
        assert fathom("export", "ours", "--layout", layout, "--out", target) == (0, f"{target}\n", "")
        shown = json.loads(fathom("show", target, "--json")[1])
        assert (shown["preset"], shown["fingerprint"]) == ("tiny-swiglu", net.fingerprint()), layout
        assert fathom("import", target, "--out", f"again-{layout}")[0] == 0
        again = DepthAnything.from_pretrained(tmp_path / f"again-{layout}")
        dropped = layout == "muggled"  # the five tensors that nothing reads
        expected = {k: v for k, v in net.state_dict().items() if not dropped or v.requires_grad or "mask" not in k}
        same = [k for k, v in expected.items() if torch.equal(again.state_dict()[k], v)]
        assert len(same) == len(expected) - 4 * dropped


def test_show_says_what_a_file_cannot_tell(fathom: Run, tmp_path: Path) -> None:
    torch.save({"model": official_state(network("tiny"))}, tmp_path / "plain.pth")
    status, out, err = fathom("show", "plain.pth")
    assert (status, err) == (0, "")
    rows = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert rows["container"] == ".pth, under `model`" and rows["parameters"].startswith("785,425 ")
    assert rows["preset"].endswith("one of: tiny, tiny-metric-indoor, tiny-metric-outdoor")
    assert "fingerprint" not in rows
    rows = dict(line.split(maxsplit=1) for line in fathom("show", "plain.pth", "--preset", "tiny")[1].splitlines())
    assert rows["fingerprint"] == network("tiny").fingerprint()
    assert (rows["taps"], rows["head"], rows["positions"]) == ("0, 1, 2, 3", "relative", "official")
    told = json.loads(fathom("show", "plain.pth", "--preset", "tiny", "--position-mode", "exact", "--json")[1])
    assert told["position_mode"] == "exact" and told["fingerprint"] != rows["fingerprint"]


def test_show_of_an_encoder_and_of_a_file_that_does_not_fit(fathom: Run, tmp_path: Path) -> None:
    net = network("tiny")
    torch.save(official_state(net.pretrained), tmp_path / "encoder.pth")
    out = fathom("show", "encoder.pth")[1]
    assert "only an encoder" in out and "fits presets  tiny," in out
    state = official_state(net)
    del state["pretrained.norm.bias"]
    torch.save(state, tmp_path / "broken.pth")
    status, out, err = fathom("show", "broken.pth", "--preset", "tiny")
    assert status == 2 and "preset        tiny" in out and "1 missing (pretrained.norm.bias)" in err


def test_a_training_checkpoint_and_its_averaged_weights(fathom: Run, tmp_path: Path) -> None:
    net = network("tiny")
    state = TrainState(step=3, applied_steps=3, cursor={})
    record = record_of(net.preset)
    path = save_checkpoint(str(tmp_path / "c"), state, net.state_dict(), {}, keep=1, network=record)
    told = json.loads(fathom("show", path, "--json")[1])
    assert (told["preset"], told["container"], told["fingerprint"]) == (
        "tiny", "training checkpoint", net.fingerprint(),
    )  # fmt: skip
    assert fathom("import", path, "--out", "w")[0] == 0
    status, _, err = fathom("import", path, "--ema", "--out", "e")
    assert status == 2 and "no averaged weights (EMA)" in err and not (tmp_path / "e").exists()


def test_options_reach_the_file_that_is_written(fathom: Run, tmp_path: Path) -> None:
    net, averaged = network(), network(seed=1)
    state = TrainState(step=3, applied_steps=3, cursor={})
    path = Path(
        save_checkpoint(str(tmp_path), state, net.state_dict(), {}, keep=1, network=record_of(net.preset))
    )  # fmt: skip
    write_safetensors(str(path / "ema.safetensors"), averaged.state_dict())
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["ema.safetensors"] = hashlib.sha256((path / "ema.safetensors").read_bytes()).hexdigest()
    (path / "manifest.json").write_text(json.dumps(manifest))
    options = ("--position-mode", "exact", "--ema", "--dtype", "bfloat16", "--fusion", "even")
    for layout, out in (("official", "w.safetensors"), ("huggingface", "hf")):
        assert fathom("export", str(path), "--layout", layout, "--out", out, *options)[0] == 0
        told = json.loads(fathom("show", out, "--json")[1])
        assert (told["position_mode"], told["fusion"], told["dtypes"]) == ("exact", "even", ["bfloat16"])
        again = DepthAnything.from_pretrained(tmp_path / out)
        expected = {k: v.bfloat16().float() for k, v in averaged.state_dict().items()}
        assert all(torch.equal(v, expected[k]) for k, v in again.state_dict().items())


def test_show_does_not_vouch_for_changed_weights(fathom: Run, tmp_path: Path) -> None:
    network().save_pretrained(tmp_path / "w")
    tensors = load_file(tmp_path / "w" / "model.safetensors")
    tensors["pretrained.norm.bias"] += 1
    write_safetensors(str(tmp_path / "w" / "model.safetensors"), tensors)
    for verb in (("show", "w"), ("import", "w", "--out", "x")):
        status, _, err = fathom(*verb)
        assert status == 2 and "do not match the fingerprint" in err and "fingerprint " not in fathom("show", "w")[1]


def test_exceptions_are_named_one_by_one(fathom: Run, tmp_path: Path) -> None:
    state = official_state(network("tiny"))
    del state["depth_head.scratch.output_conv1.bias"]
    torch.save({**state, "extra.weight": torch.zeros(1)}, tmp_path / "odd.pth")
    status, _, err = fathom("import", "odd.pth", "--preset", "tiny", "--out", "w")
    assert status == 2 and "output_conv1.bias" in err and "extra.weight" in err and not (tmp_path / "w").exists()
    arguments = ("--allow-missing", "*.output_conv1.bias", "--allow-unexpected", "extra.*")
    status, out, _ = fathom("import", "odd.pth", "--preset", "tiny", "--out", "w", *arguments)
    assert status == 0 and "1 absent, allowed: initial values: depth_head.scratch.output_conv1.bias" in out
    assert "1 left out, allowed: extra.weight" in out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("show", "nothing.pth"), "cannot be read"),
        (("show", "t", "--position-mode", "nearest"), "official or exact"),
        (("export", "t", "--layout", "caffe", "--out", "x"), "one of huggingface, official"),
        (("export", "t", "--layout", "onnx", "--out", "x.pth"), "must end with .onnx"),
        (("export", "t", "--fusion", "odd", "--out", "x.pth"), "interpolate or even"),
        (("export", "t", "--out", ""), "name a file or folder"),
        (("show", "pipe"), "no regular file"),
        (("export", "t", "--dtype", "int8", "--out", "x.pth"), "one of float32, float16, bfloat16"),
        (("export", "t", "--layout", "onnx", "--dtype", "float16", "--out", "x.onnx"), "written in float32"),
        (("export", "t", "--layout", "huggingface", "--out", "x"), "head_stride"),
        (("export", "t", "--out", "t/config.json.pth/x.pth"), "cannot be written"),
        (("export", "t", "--layout", "official", "--out", "there.pth"), "is there already"),
        (("import", "t", "--preset", "tiny-swiglu", "--out", "x"), "was saved as tiny"),
        (("import", "t", "--preset", "tinny", "--out", "x"), "nearest: tiny"),
        (("import", "t", "--out", "t"), "is there already"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(
    fathom: Run, tmp_path: Path, arguments: tuple[str, ...], says: str
) -> None:
    network("tiny").save_pretrained(tmp_path / "t")
    (tmp_path / "there.pth").write_bytes(b"mine")
    os.mkfifo(tmp_path / "pipe")
    status, out, err = fathom(*arguments)
    assert (status, out) == (2, "") and says in err and len(err.splitlines()) == 1
    assert (tmp_path / "there.pth").read_bytes() == b"mine" and not (tmp_path / "x").exists()


def test_onnx_and_program_by_the_command_line(fathom: Run, tmp_path: Path) -> None:
    network("tiny").save_pretrained(tmp_path / "t")
    for layout, name in (("onnx", "n.onnx"), ("torch-export", "n.pt2")):
        status, out, _ = fathom("export", "t", "--layout", layout, "--out", name)
        assert (status, out) == (0, f"{name}\n") and (tmp_path / name).stat().st_size > 100_000
