"""Bad files: each is refused in one line that names it, says what was found and what to do; nothing is half-loaded."""

from __future__ import annotations

import argparse
import copy
import json
import os
import re
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from model import PRESETS, DepthAnything, Encoder, WeightsError, files
from model.files import write_pth, write_safetensors
from model.save import record_of
from model.types import UNUSED
from model.weights import load_encoder, load_network, open_weights
from tests.model import formats, huggingface
from tests.model.test_layouts import MLP, SWIGLU, V1, same, save, write_folder

BIAS = "depth_head.scratch.output_conv1.bias"


@pytest.fixture(scope="module")
def net() -> DepthAnything:
    """A network that the tests only read."""
    return huggingface.loud_network(SWIGLU)


@pytest.fixture
def state(net: DepthAnything) -> dict[str, Tensor]:
    """The authors' names and its tensors."""
    return formats.official(net)


def refusal(path: Path, preset: str | None = "tiny-swiglu", named: Path | None = None, **how: Any) -> str:
    """The message with which a path is refused, by both ways in, and a network in memory keeps its values."""
    with pytest.raises(WeightsError) as caught:
        DepthAnything.from_pretrained(path, preset=preset, **how)
    message = str(caught.value)
    assert message.startswith(str(named or path)) and message.isprintable() and len(message) < 1000
    if not how:
        into = DepthAnything.from_preset(SWIGLU)
        before = copy.deepcopy(into)
        with pytest.raises(WeightsError):
            load_network(into, open_weights(path))
        if "depth_head" not in message:
            with pytest.raises(WeightsError):
                load_encoder(into.pretrained, path)
        assert same(into, before)
    return message


def outcome(path: Path) -> str:
    """Why a file is refused; empty when it is not."""
    try:
        DepthAnything.from_pretrained(path, preset=SWIGLU)
    except WeightsError as error:
        return str(error)
    return ""


# --- bytes --------------------------------------------------------------------------------------------------------

PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + bytes(50)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty; copy or download it again"),
        (b"a note on weights", "neither safetensors nor a PyTorch file; give .safetensors, .pth or a saved folder"),
        (b"<!doctype html><html>", "neither safetensors nor"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 99\n", "neither safetensors nor"),
        (PNG, "neither safetensors nor"),
        (b"PK", "broken or truncated"),
        (b"PK\3\4" + bytes(64), "broken or truncated"),
        (b"\x80\x02", "broken or truncated"),
        (b"\x80\x02}q\0.", "broken"),
        (b"\0" * 4096, "neither safetensors nor"),
        (struct.pack("<Q", 2**63) + b'{"a":1}', "broken or truncated safetensors"),
        (struct.pack("<Q", 10**9) + b'{"a":1}', "broken or truncated safetensors"),
        (struct.pack("<Q", 2) + b"{}", "expected a network's state dict"),
        (struct.pack("<Q", 7) + b'{"a":1}', "broken or truncated safetensors"),
        (struct.pack("<Q", 60000) + b'{"a":' * 12000, "broken or truncated safetensors"),
    ],
)
def test_bytes_that_are_no_weights(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "w.pth").write_bytes(content)
    assert message in refusal(tmp_path / "w.pth")


@pytest.mark.parametrize("dtype", ["F4", "F8_E8M0", "U16", "C64", "X9"])
def test_safetensors_of_dtypes_that_no_network_has(tmp_path: Path, dtype: str) -> None:
    header = json.dumps({"pretrained.cls_token": {"dtype": dtype, "shape": [2], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "w").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    refusal(tmp_path / "w")


@pytest.mark.parametrize("container", ["safetensors", "pth", "old"])
def test_truncated_and_bent_files(tmp_path: Path, state: dict[str, Tensor], container: str) -> None:
    path = tmp_path / "w"
    if container == "safetensors":
        write_safetensors(str(path), state, record_of(SWIGLU, "digest"))
    elif container == "pth":
        write_pth(str(path), state, record_of(SWIGLU, "digest"))
    else:
        torch.save(state, path, _use_new_zipfile_serialization=False)
    whole = path.read_bytes()
    for size in (1, 2, 8, 9, 20, 300, 2000, len(whole) // 2, len(whole) - 100, len(whole) - 1):
        path.write_bytes(whole[:size])
        refusal(path)
    rng = np.random.default_rng(0)
    for _ in range(30):  # bent anywhere: loads or is refused, nothing else
        bent = bytearray(whole)
        for place in rng.integers(0, min(len(whole), 20000), 3):
            bent[place] ^= 1 << rng.integers(8)
        path.write_bytes(bent)
        message = outcome(path)
        assert message == "" or (message.startswith(str(path)) and message.isprintable())


def test_a_zip_of_something_else(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        archive.writestr("photos/1.jpg", b"\xff\xd8")
    assert "broken or truncated .pth" in refusal(tmp_path / "photos.zip")
    torch.jit.script(nn.Linear(2, 2)).save(str(tmp_path / "script.pt"))
    assert "TorchScript" in refusal(tmp_path / "script.pt")


@pytest.mark.parametrize("record", [b"{", b"[1]", b"\xff", b"[" * 100000, b" " * (2 << 20)])
def test_damaged_facts_beside_the_tensors(tmp_path: Path, state: dict[str, Tensor], record: bytes) -> None:
    path = save(tmp_path / "w.pth", state)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("w/fathom.json", record)
    assert "the facts beside the tensors are damaged" in refusal(path)
    if record.isascii():
        safetensors.torch.save_file(state, path, metadata={"fathom": record.decode()})
        assert "the facts beside the tensors are damaged" in refusal(path)
    write_pth(str(path), state, record_of(SWIGLU, "digest"))
    path.write_bytes(path.read_bytes().replace(b'"heads": 2', b'"heads": 4'))  # one character: the zip's checksum
    assert "the facts beside the tensors are damaged (Bad CRC-32" in refusal(path, None)


# --- pickles ------------------------------------------------------------------------------------------------------


class Shell:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple:
        return os.system, (self.command,)


class Whole(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))


@pytest.mark.parametrize("new", [True, False])
def test_a_pickle_that_wants_to_run_code(tmp_path: Path, state: dict[str, Tensor], new: bool) -> None:
    path, proof = tmp_path / "w.pth", tmp_path / "proof"
    for content in (Shell(f"touch {proof}"), {"model": state, "note": Shell(f"touch {proof}")}):
        torch.save(content, path, _use_new_zipfile_serialization=new)
        message = refusal(path)
        assert "refused: a broken pickle, or one that runs code beyond tensors" in message
        assert f"({os.system.__module__}.system); save its state dict alone" in message
    folder = write_folder(tmp_path / "hf", {"a": torch.ones(1)}, formats.lean_config(SWIGLU), "bin")
    torch.save(Shell(f"touch {proof}"), folder / "pytorch_model.bin")
    assert f"({os.system.__module__}.system)" in refusal(folder)
    assert not proof.exists()


def test_a_whole_module_is_refused_by_name(tmp_path: Path) -> None:
    path = save(tmp_path / "w.pth", Whole())
    assert "(tests.model.test_files.Whole); save its state dict alone" in refusal(path)


def test_what_scripts_leave_beside_the_weights_is_no_obstacle(
    tmp_path: Path, net: DepthAnything, state: dict[str, Tensor]
) -> None:
    beside = {
        "args": argparse.Namespace(lr=5e-6, encoder="vits", sizes=[1, 2], nested=argparse.Namespace(a=None)),
        "best": np.float64(0.97), "d1": np.float32(0.5), "step": np.int64(7), "seen": np.int32(3), "ok": np.bool_(True),
        "epoch": 3, "name": "run", "lr": [0.1, None], "sizes": (14, 14), "rng": torch.get_rng_state(),
    }  # fmt: skip
    for new in (True, False):
        torch.save({"model": state, **beside}, tmp_path / "w.pth", _use_new_zipfile_serialization=new)
        assert same(DepthAnything.from_pretrained(tmp_path / "w.pth", preset=SWIGLU), net)
    # numpy 1 pickled its scalars under another module's name.
    torch.save({"model": state, "best": np.float64(0.97)}, tmp_path / "w.pth", _use_new_zipfile_serialization=False)
    old = (tmp_path / "w.pth").read_bytes()
    assert b"cnumpy._core.multiarray\nscalar\n" in old
    (tmp_path / "w.pth").write_bytes(old.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"))
    assert same(DepthAnything.from_pretrained(tmp_path / "w.pth", preset=SWIGLU), net)


@pytest.mark.parametrize(
    "content", [[1, 2], {}, {"model": {}}, {"model": None}, {"epoch": 3}, {"a": {}, "b": {}}, torch.ones(3), "text"]
)
def test_tables_without_a_network(tmp_path: Path, content: Any) -> None:
    message = refusal(save(tmp_path / "w.pth", content))
    assert "holds no table of tensors (found " in message and "expected a network's state dict" in message


def test_a_table_that_holds_itself(tmp_path: Path) -> None:
    content: dict[str, Any] = {}
    content["model"] = content
    assert "holds no table of tensors" in refusal(save(tmp_path / "w.pth", content))


# --- tensors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({BIAS: torch.ones(8, dtype=torch.int64)}, f"1 not floating point ({BIAS})"),
        ({BIAS: torch.ones(8, dtype=torch.complex64)}, f"1 not floating point ({BIAS})"),
        ({BIAS: torch.full((8,), float("nan"))}, f"not finite (NaN or infinite) in {BIAS}; this file cannot be used"),
        ({BIAS: torch.full((8,), float("inf"))}, f"not finite (NaN or infinite) in {BIAS}"),
        ({BIAS: torch.ones(8, dtype=torch.float64) * 1e300}, f"not finite (NaN or infinite) in {BIAS}"),
        ({BIAS: torch.ones(9)}, f"1 of another shape ({BIAS} [9] for [8])"),
        ({BIAS: torch.tensor(1.0)}, f"1 of another shape ({BIAS} [] for [8])"),
        ({BIAS: None}, f"1 missing ({BIAS}); its sizes are this preset's: is the file complete, and a Depth"),
        ({"depth_head.extra": torch.ones(1)}, "1 unexpected (depth_head.extra)"),
        ({"a\nb": torch.ones(1), "c" * 5000: torch.ones(1)}, "2 unexpected ('a\\nb', ccccc"),
        ({BIAS: torch.ones(8).to_sparse()}, f"sparse, nested or empty tensors ({BIAS})"),
        ({BIAS: torch.ones(8, device="meta")}, f"sparse, nested or empty tensors ({BIAS})"),
        ({"pretrained.blocks.0.mlp.fc1.bias": torch.tensor(1.0)}, "1 unexpected (pretrained.blocks.0.mlp.fc1.bias)"),
        ({f"pretrained.blocks.0.mlp.fc{k}.weight": torch.tensor(1.0) for k in (1, 2)}, "2 unexpected (pretrained.blo"),
        ({"pretrained.blocks.7.0.norm1.bias": torch.ones(64)}, "1 unexpected (pretrained.blocks.7.0.norm1.bias)"),
        ({"pretrained.register_tokens": torch.ones(1, 4, 64)}, "a DINOv2 with register tokens; Depth Anything"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*[Ss]parse")
def test_tensors_that_do_not_fit(tmp_path: Path, state: dict[str, Tensor], change: dict, message: str) -> None:
    content = {k: v for k, v in {**state, **change}.items() if v is not None}
    assert message in refusal(save(tmp_path / "w.pth", content))


def test_pieces_that_do_not_make_one_tensor(tmp_path: Path, state: dict[str, Tensor]) -> None:
    query, key = (f"backbone.encoder.layer.0.attention.attention.{n}.weight" for n in ("query", "key"))
    theirs = formats.huggingface_4(state, SWIGLU)
    # Together these have the right shape.
    longer = {query: torch.cat([theirs[query], theirs[key][:32]]), key: theirs[key][32:]}
    for change in ({key: torch.ones(3, 5, 7)}, {key: torch.tensor(1.0)}, longer, {key: None}):
        content = {k: v for k, v in {**theirs, **change}.items() if v is not None}
        assert "1 missing (pretrained.blocks.0.attn.qkv.weight)" in refusal(save(tmp_path / "w.pth", content))
    muggled = formats.flat(formats.muggled(state, SWIGLU, 2))
    place = "imgencoder.posenc.cls_embedding"
    for change in (
        {place: torch.ones(2)}, {place: torch.ones(1, 2, 64)}, {"imgencoder.stages.x": torch.ones(1)},
        {"imgencoder.stages.0.blocks.x.norm1.bias": torch.ones(64)},
        {"depth_head.projects.0.bias": torch.ones(16)},  # a second one, under its official name
    ):  # fmt: skip
        assert "unexpected (" in refusal(save(tmp_path / "w.pth", {**muggled, **change}))


@pytest.mark.parametrize(("inside", "asked"), [("v2-vitb", "v2-vits"), ("v2-vits", "v2-vitb"), ("tiny", "tiny-swiglu")])
def test_a_file_of_another_size_says_which(tmp_path: Path, inside: str, asked: str) -> None:
    path = save(tmp_path / "w.pth", formats.blank(PRESETS[inside]))
    size = inside.removeprefix("v2-")
    fits = ", ".join(n for n in PRESETS if re.fullmatch(rf"(v[12]-)?{size}(-metric-.*)?", n))
    message = refusal(path, asked)
    assert f"does not fit preset {asked}: " in message and message.endswith(f"; this file fits preset {fits}")


@pytest.mark.parametrize(
    "write", [lambda t, p: t, formats.huggingface_4, formats.huggingface_5, lambda t, p: formats.muggled(t, p, 2)]
)
def test_what_may_be_missing_or_left_out(tmp_path: Path, net: DepthAnything, write: Callable[..., Any]) -> None:
    state = formats.official(net)
    read_by_all = {k: v for k, v in state.items() if k not in UNUSED}
    tensors = write(state, SWIGLU)
    part, table = ("", tensors) if "head" not in tensors else ("head.", tensors["head"])
    (weight,) = (k for k, v in table.items() if torch.equal(v, state["depth_head.scratch.output_conv2.2.bias"]))
    del table[weight]
    table["loss.weight"] = torch.ones(2)
    path = save(tmp_path / "w.pth", tensors)
    assert "1 missing (depth_head.scratch.output_conv2.2.bias), 1 unexpected" in refusal(path)
    for half in ({"allow_missing": ["*.bias"]}, {"allow_unexpected": ["*loss.*"]}):
        refusal(path, **half)
    again = DepthAnything.from_pretrained(
        path, SWIGLU, allow_missing=["*output_conv2.?.bias"], allow_unexpected=["*loss.*"]
    )
    assert again.depth_head.scratch.output_conv2[2].bias.item() == SWIGLU.head_bias  # its initial value
    report = again.loaded
    assert report is not None and report.missing == ("depth_head.scratch.output_conv2.2.bias",)
    assert report.unexpected == (f"{part}loss.weight",) and report.matched + len(report.filled) == len(state) - 1
    mine = formats.official(again)
    assert all(torch.equal(mine[k], v) for k, v in read_by_all.items() if k not in report.missing)


def test_an_encoder_alone_with_a_decoder_that_may_be_missing(tmp_path: Path, net: DepthAnything) -> None:
    path = save(tmp_path / "e.pth", formats.encoder(formats.official(net)))
    assert "only an encoder, no depth_head; use from_preset" in refusal(path)
    again = DepthAnything.from_pretrained(path, SWIGLU, allow_missing=["depth_head.*"])
    assert same(again.pretrained, net.pretrained) and again.loaded is not None
    decoder = [k for k in formats.official(net) if k.startswith("depth_head.")]
    assert sorted((*again.loaded.missing, *again.loaded.filled)) == sorted(decoder)


# --- places -------------------------------------------------------------------------------------------------------


def test_paths_that_are_not_there(tmp_path: Path) -> None:
    assert "cannot be read (No such file or directory); give a weights file or folder" in refusal(tmp_path / "none")
    assert "cannot be read (No such file or directory)" in refusal(tmp_path / "none", ema=True)
    with pytest.raises(WeightsError, match=r"cannot be read \(embedded null byte\)"):
        DepthAnything.from_pretrained("a\0b", preset=V1)
    with pytest.raises(WeightsError, match="No such file"):
        Encoder.from_preset(MLP, encoder_weights=tmp_path / "none")


def test_a_file_that_may_not_be_read(tmp_path: Path, state: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "w.pth", state)
    path.chmod(0)
    if os.geteuid() == 0:  # who may read everything

        def deny(*_: object) -> None:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(files, "open", deny, raising=False)
    assert "cannot be read (Permission denied); give a weights file or folder" in refusal(path)
