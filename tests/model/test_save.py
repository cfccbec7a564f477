"""Writing: every format gives back the same bits, other programs read it, and a failed write leaves what was there."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, seed, settings
from hypothesis import strategies as st

from model import PRESETS, DepthAnything, Encoder, Preset, WeightsError, files, save
from model.files import write_pth, write_safetensors
from model.save import FILE_LAYOUTS, export_file, save_huggingface
from model.weights import open_weights
from tests.model import formats, huggingface
from tests.model.test_layouts import MLP, SWIGLU, V1, same, small_timm

TINY = PRESETS["tiny"]
READOUT = replace(MLP, name="readout", readout="project")
KINDS = (*FILE_LAYOUTS, "huggingface folder", "own folder")
ENCODERS = ("dinov2", "timm")
# (kind, preset) that the format has no room for, and the reason it gives.
REFUSED = {
    ("distill-any-depth", "v1-tiny"): "Distill-Any-Depth's names, large model cannot hold this network",
    ("muggled", "readout"): "muggled_dpt's parts, V2 has no place for depth_head.readout_projects.0.0.weight",
    ("huggingface folder", "tiny"): "head_stride is 2, which transformers' network has not (there: 1)",
    ("huggingface folder", "readout"): "readout is 'project', which transformers' network has not (there: 'ignore')",
}


def random_bits(preset: Preset, number: int) -> DepthAnything:
    """A network of any finite float32 there is: subnormal, negative zero, huge."""
    net = DepthAnything.from_preset(preset).eval()
    generator = torch.Generator().manual_seed(number)
    for tensor in net.state_dict().values():
        bits = torch.randint(-(2**31), 2**31, tensor.shape, generator=generator).to(torch.int32)
        values = bits.view(torch.float32)
        tensor.copy_(torch.where(values.isfinite(), values, torch.tensor(-0.0)))
    return net


@cache
def loud(preset: Preset, number: int = 0) -> DepthAnything:
    """A network that the tests only read."""
    return huggingface.loud_network(preset, number)


def write(net: DepthAnything, kind: str, folder: Path, dtype: torch.dtype = torch.float32, suffix: str = "pth") -> Path:
    """Writes a network in one of KINDS and returns where."""
    if kind == "huggingface folder":
        save_huggingface(net, folder / "hf", dtype)
        return folder / "hf"
    if kind == "own folder":
        net.save_pretrained(folder / "ours")
        return folder / "ours"
    export_file(net, folder / f"w.{suffix}", kind, dtype)
    return folder / f"w.{suffix}"


# --- round trips --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("preset", [SWIGLU, TINY, V1, READOUT], ids=lambda p: p.name)
def test_what_is_written_comes_back_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, kind: str, preset: Preset
) -> None:
    if (kind, preset.name) in REFUSED:
        folder = tmp_path_factory.mktemp("refused")
        with pytest.raises(WeightsError) as caught:
            write(DepthAnything.from_preset(preset), kind, folder)
        message = str(caught.value)
        assert message.startswith(f"{preset.name}: ") and REFUSED[kind, preset.name] in message
        assert "\n" not in message and not list(folder.iterdir())
        return

    @seed(0)
    @settings(max_examples=3, deadline=None, database=None)
    @given(number=st.integers(0, 2**31), suffix=st.sampled_from(["pth", "safetensors"]), exact=st.booleans())
    def check(number: int, suffix: str, exact: bool) -> None:
        net = random_bits(replace(preset, position_mode="exact" if exact else "official"), number)
        path = write(net, kind, tmp_path_factory.mktemp("w"), suffix=suffix)
        if kind in ENCODERS:
            zero = ("mask_token",) if kind == "timm" else ()
            assert same(net.pretrained, Encoder.from_preset(net.preset, encoder_weights=path), zero)
            return
        again = DepthAnything.from_pretrained(path)
        dropped = tuple(formats.UNUSED) if kind == "muggled" else ()
        assert same(net, again, dropped)
        assert again.preset == net.preset and again.fingerprint() == net.fingerprint()
        assert again.loaded is not None and sorted(again.loaded.filled) == sorted(dropped)
        mode = "official" if exact else "exact"
        other = DepthAnything.from_pretrained(path, position_mode=mode)
        assert other.preset == replace(net.preset, position_mode=mode) and other.fingerprint() != net.fingerprint()

    check()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", [k for k in KINDS if k not in (*ENCODERS, "own folder")])
def test_half_precision_is_rounded_once_and_its_fingerprint_is_that_of_the_file(
    tmp_path: Path, kind: str, dtype: torch.dtype
) -> None:
    net = huggingface.loud_network(SWIGLU)
    path = write(net, kind, tmp_path, dtype, "safetensors")
    file = path / "model.safetensors" if path.is_dir() else path
    assert {tensor.dtype for tensor in safetensors.torch.load_file(file).values()} == {dtype}
    again = DepthAnything.from_pretrained(path)
    assert again.fingerprint() == open_weights(path).fingerprint != net.fingerprint()
    assert again.preset == net.preset and again.pretrained.pos_embed.dtype == torch.float32
    with torch.no_grad():
        for tensor in net.state_dict().values():
            tensor.copy_(tensor.to(dtype))
    assert same(net, again, tuple(formats.UNUSED) if kind == "muggled" else ())
    # The network in memory stays what it was, in its own precision.
    other = DepthAnything.from_preset(TINY).to(dtype)
    write(other, "official", tmp_path)
    assert other.pretrained.pos_embed.dtype == dtype
    loaded = DepthAnything.from_pretrained(tmp_path / "w.pth")
    assert same(loaded, other.float()) and loaded.fingerprint() == other.fingerprint()


def test_values_that_a_precision_has_not_are_refused(tmp_path: Path) -> None:
    net = DepthAnything.from_preset(TINY)
    net.depth_head.projects[2].bias.data[0] = 1e5
    with pytest.raises(WeightsError, match=r"tiny: depth_head\.projects\.2\.bias not finite in torch\.float16; export"):
        export_file(net, tmp_path / "w.pth", dtype=torch.float16)
    with pytest.raises(WeightsError, match=r"cannot be written as torch\.int8"):
        export_file(net, tmp_path / "w.pth", dtype=torch.int8)
    with pytest.raises(WeightsError, match="layout is 'mugled'; a file is one of official, distill-any-depth, muggled"):
        export_file(net, tmp_path / "w.pth", "mugled")
    with pytest.raises(WeightsError, match="layout is 'onnx'; a folder is official or huggingface"):
        net.save_pretrained(tmp_path, "onnx")
    assert not list(tmp_path.iterdir())


# --- what other programs see --------------------------------------------------------------------------------------


def test_an_exported_pth_is_a_flat_table_that_still_knows_its_network(tmp_path: Path) -> None:
    net = loud(V1)
    path = write(net, "official", tmp_path)
    table = torch.load(path, weights_only=True)
    assert {k: tuple(v.shape) for k, v in table.items()} == formats.official_shapes(V1)
    assert type(table) is dict and all(torch.equal(v, table[k]) for k, v in formats.official(net).items())
    assert DepthAnything.from_pretrained(path).preset == V1
    # Saved again by another program it is only tensors.
    torch.save(table, tmp_path / "again.pth")
    with pytest.raises(WeightsError, match="no preset has these shapes"):
        DepthAnything.from_pretrained(tmp_path / "again.pth")
    # Neither the time nor the name is in the file.
    export_file(net, tmp_path / "other name.pth")
    assert (tmp_path / "other name.pth").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("preset", [SWIGLU, V1], ids=lambda p: p.name)
def test_every_layout_holds_the_names_of_its_own_code(tmp_path: Path, preset: Preset) -> None:
    net = loud(preset)
    tensors = formats.official(net)
    version = 1 if preset is V1 else 2
    expected = {
        "official": tensors,
        "distill-any-depth": {k.replace("pretrained.", "backbone."): v for k, v in tensors.items()},
        "muggled": formats.flat(formats.muggled(tensors, preset, version)),
        "dinov2": formats.encoder(tensors),
        "timm": formats.timm(tensors),
        "huggingface folder": formats.huggingface_4(tensors, preset),
    }
    for kind, wanted in expected.items():
        if (kind, preset.name) in REFUSED:
            continue
        path = write(net, kind, tmp_path, suffix="safetensors")
        file = path / "model.safetensors" if path.is_dir() else path
        found = safetensors.torch.load_file(file)
        assert sorted(found) == sorted(wanted), kind
        assert all(torch.equal(v, wanted[k]) for k, v in found.items()), kind
        if kind == "timm":
            small_timm(preset).load_state_dict(found, strict=True)


def test_an_encoders_file_says_nothing_of_a_network(tmp_path: Path) -> None:
    path = write(loud(SWIGLU), "timm", tmp_path)
    assert open_weights(path).preset is None
    with pytest.raises(WeightsError, match="only an encoder, no depth_head"):
        DepthAnything.from_pretrained(path)


# --- atomic writes ------------------------------------------------------------------------------------------------


def names(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


@pytest.mark.parametrize("kind", [*KINDS, "safetensors"])
@pytest.mark.parametrize("where", ["write", "fsync", "replace"])
def test_a_write_that_fails_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, where: str
) -> None:
    def write_it(number: int) -> Path:
        net = loud(SWIGLU, number)
        if kind == "safetensors":
            return write(net, "official", tmp_path, suffix="safetensors")
        return write(net, kind, tmp_path)

    path = write_it(0)
    before = names(tmp_path), {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()}

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    def fail_as_libraries_do(_: object, target: object, *__: object, **___: object) -> None:
        if hasattr(target, "write"):
            target.write(b"half of it")
            raise RuntimeError("PytorchStreamWriter failed writing file\ndata/0: file write failed")
        Path(str(target)).write_bytes(b"half of it")
        raise safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        if where == "write":
            patch.setattr(torch, "save", fail_as_libraries_do)
            patch.setattr(safetensors.torch, "save_file", fail_as_libraries_do)
        else:
            patch.setattr(os, where, fail)
        with pytest.raises(WeightsError, match="cannot be written") as caught:
            write_it(1)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    assert before == (names(tmp_path), {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()})


def test_an_interrupt_leaves_no_temporary_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_pth(str(tmp_path / "w.pth"), {"a": torch.ones(2)})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077])
def test_files_have_the_mode_that_the_umask_gives(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        net = DepthAnything.from_preset(TINY)
        net.save_pretrained(tmp_path / "ours")
        write(net, "official", tmp_path)
        write(net, "official", tmp_path, suffix="safetensors")
    finally:
        os.umask(before)
    written = [f for f in tmp_path.rglob("*") if f.is_file()]
    assert len(written) == 4
    assert {stat.S_IMODE(f.stat().st_mode) for f in written} == {0o666 & ~mask}


@pytest.mark.parametrize("kind", KINDS)
def test_spaces_and_umlauts(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "Tiefe für alle, 深度"
    folder.mkdir()
    net = loud(SWIGLU)
    for suffix in ("pth", "safetensors"):
        path = write(net, kind, folder, suffix=suffix)
        if kind in ENCODERS:
            assert Encoder.from_preset(SWIGLU, encoder_weights=path).cls_token.equal(net.pretrained.cls_token)
        else:
            assert DepthAnything.from_pretrained(str(path)).fingerprint() == net.fingerprint()


@pytest.mark.parametrize("writer", [write_pth, write_safetensors])
def test_places_that_cannot_be_written(tmp_path: Path, writer: Callable[..., None]) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    for place, reason in (
        ("none/w", "No such file or directory"),
        ("folder", "Is a directory"),
        ("file/w", "Not a directory"),
    ):
        with pytest.raises(WeightsError) as caught:
            writer(str(tmp_path / place), {"a": torch.ones(2)})
        assert str(caught.value).startswith(f"{tmp_path / place}: cannot be written ({reason})")
    net = DepthAnything.from_preset(SWIGLU)
    for layout in ("official", "huggingface"):
        with pytest.raises(WeightsError, match=r"file: cannot be made \(File exists\); name another folder"):
            net.save_pretrained(tmp_path / "file", layout)
    assert names(tmp_path) == ["file", "folder"] and (tmp_path / "file").read_text() == "mine"


def test_a_crash_between_the_two_files_of_a_folder_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for layout, message in (("official", "do not match the fingerprint"), ("huggingface", "config.json")):
        folder = tmp_path / layout
        first, second = loud(SWIGLU, 0), loud(replace(SWIGLU, heads=1), 1)
        first.save_pretrained(folder, layout)

        def fail(*_: object) -> None:
            raise WeightsError("config.json: cannot be written")

        with monkeypatch.context() as patch:
            patch.setattr(files, "write_json", fail)
            with pytest.raises(WeightsError):
                second.save_pretrained(folder, layout)
        with pytest.raises(WeightsError, match=message):
            DepthAnything.from_pretrained(folder)


def test_the_record_of_a_checkpoint_is_a_preset(tmp_path: Path) -> None:
    for preset in (TINY, V1, READOUT):
        record = save.record_of(preset, "digest")
        again = json.loads(json.dumps(record))
        assert (again.pop("format_version"), again.pop("fingerprint")) == (1, "digest")
        assert Preset.from_config(again) == preset
