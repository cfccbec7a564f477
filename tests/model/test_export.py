"""Exported files compute what the network computes, at sizes that the export never saw; and leave nothing half-written.

Shape suffixes: B batch, C channel, H W pixels.
"""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor

from model import DepthAnything, Preset, WeightsError, export, get_preset
from model.export import export_onnx, export_program, smallest_side
from tests.model.plain import loud

# Together every choice that a preset has, each more than once.
NETWORKS: list[tuple[str, dict[str, str]]] = [
    ("tiny", {}),
    ("tiny-swiglu-metric-indoor", {"position_mode": "exact", "readout": "project"}),
    ("tiny-metric-outdoor", {"fusion": "even", "readout": "project"}),
    ("tiny-swiglu", {"fusion": "even", "position_mode": "exact"}),
]
# float32 in another order, as a share of the map's largest value: measured up to 2.7e-6 on the tiny networks
# and 9.4e-6 on v2-vits, as far as the network is from itself in float64. The other position mode: 0.16 and more.
ROUNDING = 3e-5

EXPORTS: dict[str, Callable[[DepthAnything, str], export.ExportReport]] = {
    ".onnx": export_onnx,
    ".pt2": export_program,
}


def sizes(preset: Preset, fewest: int) -> list[tuple[int, int, int]]:
    """(batch, height, width): the least, thin, the stored grid's own, odd and non-square, larger than the stored."""
    m = preset.multiple
    own = preset.grid * 14
    return [
        (1, fewest * m, fewest * m), (1, fewest * m, 3 * m), (2, 3 * m, fewest * m), (1, own, own), (3, 4 * m, 9 * m),
        (1, 13 * m, 5 * m),
    ]  # fmt: skip


def images(shapes: list[tuple[int, int, int]]) -> list[Tensor]:
    """Normal noise [B, 3, H, W] of each shape."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(b, 3, h, w, generator=generator) for b, h, w in shapes]


def maps(net: DepthAnything, images_BCHW: list[Tensor]) -> list[np.ndarray]:
    """What the network itself returns."""
    with torch.no_grad():
        predictions = [net(image_BCHW) for image_BCHW in images_BCHW]
    found = [p.disparity_BHW if p.depth_m_BHW is None else p.depth_m_BHW for p in predictions]
    return [map_BHW.numpy() for map_BHW in found]


def onnx_maps(path: str, images_BCHW: list[Tensor]) -> list[np.ndarray]:
    """What onnxruntime makes of a file."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return [session.run(None, {"image": image_BCHW.numpy()})[0] for image_BCHW in images_BCHW]


def assert_same(found: list[np.ndarray], expected: list[np.ndarray], rounding: float = ROUNDING) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == np.float32
        np.testing.assert_allclose(one, other, rtol=0, atol=rounding * other.max())


def assert_says_what_it_is(facts: dict[str, str], net: DepthAnything) -> None:
    assert Preset.from_config(json.loads(facts["preset"])) == net.preset
    assert facts["fingerprint"] == net.fingerprint()
    assert facts["multiple"] == str(net.preset.multiple)
    assert json.loads(facts["mean"]) == [0.485, 0.456, 0.406]
    assert json.loads(facts["std"]) == [0.229, 0.224, 0.225]
    assert facts["output"] == ("depth_m" if net.preset.head == "metric" else "disparity")
    assert ("metres" if net.preset.head == "metric" else "larger is nearer") in facts["meaning"]


def assert_names_no_machine(path: Path) -> None:
    content = path.read_bytes()
    assert b"site-packages" not in content
    assert str(Path(__file__).resolve().parents[2]).encode() not in content


@pytest.mark.parametrize(("name", "changes"), NETWORKS)
def test_onnx_computes_the_network_at_any_size(
    name: str, changes: dict[str, str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    net = loud(name, **changes)
    path = tmp_path / "net.onnx"
    random_before = torch.get_rng_state()
    with warnings.catch_warnings(record=True) as warned:
        report = export_onnx(net, str(path))
    assert (warned, *capfd.readouterr()) == ([], "", "")
    assert torch.equal(torch.get_rng_state(), random_before)
    assert net.training  # as it was
    assert (report.path, report.opset, report.data_path) == (str(path), 18, None)
    assert report.size_bytes == path.stat().st_size
    assert "onnx.checker" in report.checked_with and "onnxruntime" in report.checked_with
    assert [p.name for p in tmp_path.iterdir()] == ["net.onnx"]

    model = onnx.load(path)
    assert_says_what_it_is({p.key: p.value for p in model.metadata_props}, net)
    (output,) = model.graph.output
    assert output.name == ("depth_m" if net.preset.head == "metric" else "disparity")
    m = net.preset.multiple
    for value, axes in ((model.graph.input[0], ["batch", 3, f"{m}*h", f"{m}*w"]),
                        (output, ["batch", f"{m}*h", f"{m}*w"])):  # fmt: skip
        dims = value.type.tensor_type.shape.dim
        assert [d.dim_param or d.dim_value for d in dims] == axes
    assert_names_no_machine(path)

    noise = images(sizes(net.preset, fewest=1))
    expected = maps(net, noise)
    assert_same(onnx_maps(str(path), noise), expected)
    assert report.max_difference is not None and 0 < report.max_difference < ROUNDING * max(
        one.max() for one in expected
    )


ALONE = """
import json, sys
import numpy as np, torch
torch.set_num_threads(1)
files = {"fathom.json": ""}
run = torch.export.load("net.pt2", extra_files=files).module()
arrays = np.load("images.npz")
with torch.no_grad():
    np.savez("maps.npz", **{k: run(torch.from_numpy(arrays[k])).numpy() for k in arrays})
refused = []
for shape in json.loads(sys.argv[1]):
    try:
        run(torch.zeros(shape))
    except (AssertionError, RuntimeError, ValueError):
        refused.append(shape)
loaded = [m for m in ("model", "timm", "onnx", "safetensors") if m in sys.modules]
print(json.dumps({"facts": json.loads(files["fathom.json"]), "refused": refused, "loaded": loaded}))
"""


@pytest.mark.parametrize(("name", "changes"), NETWORKS)
def test_program_computes_the_network_at_any_size_with_torch_alone(
    name: str, changes: dict[str, str], tmp_path: Path
) -> None:
    net = loud(name, **changes)
    report = export_program(net, tmp_path / "net.pt2")
    assert (report.opset, report.size_bytes) == (None, (tmp_path / "net.pt2").stat().st_size)
    assert_names_no_machine(tmp_path / "net.pt2")

    m, least = net.preset.multiple, smallest_side(net.preset)
    noise = images(sizes(net.preset, fewest=least // m))
    np.savez(tmp_path / "images.npz", **{str(i): image_BCHW.numpy() for i, image_BCHW in enumerate(noise)})
    wrong = [[1, 3, least - m, least], [1, 3, least, least + 7], [1, 3, least + 1, least], [1, 4, least, least]]
    command = [sys.executable, "-I", "-c", ALONE, json.dumps(wrong)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert (answer["refused"], answer["loaded"]) == (wrong, [])
    assert_says_what_it_is(answer["facts"], net)
    found, expected = np.load(tmp_path / "maps.npz"), maps(net, noise)
    assert_same([found[str(i)] for i in range(len(noise))], expected)
    assert report.max_difference is not None and report.max_difference < ROUNDING * max(one.max() for one in expected)


@pytest.mark.slow
@pytest.mark.parametrize("position_mode", ["official", "exact"])
def test_published_small_network(tmp_path: Path, position_mode: str) -> None:
    """Measured, of a largest value of 2.6: ONNX 2.1e-5 at both sizes; .pt2 0 at 518 x 518 and 1.7e-5 at 392 x 518."""
    net = loud("v2-vits", position_mode=position_mode)
    noise = images([(1, 518, 518), (1, 392, 518)])
    expected = maps(net, noise)
    export_onnx(net, tmp_path / "net.onnx")
    assert_same(onnx_maps(str(tmp_path / "net.onnx"), noise), expected)
    export_program(net, tmp_path / "net.pt2")
    run = torch.export.load(tmp_path / "net.pt2").module()
    with torch.no_grad():
        assert_same([run(image_BCHW).numpy() for image_BCHW in noise], expected)


# --- what goes wrong ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported() -> tuple[DepthAnything, Any, torch.export.ExportedProgram]:
    """A network with what the exporters make of it, once: the tests below are about files."""
    net = DepthAnything.from_preset("tiny")
    return net, export._to_onnx(net, 18), export._trace(net)


@pytest.fixture
def net(exported: tuple[DepthAnything, Any, Any], monkeypatch: pytest.MonkeyPatch) -> DepthAnything:
    """That network; exporting it, or any other, gives its files."""
    network, model, program = exported
    monkeypatch.setattr(export, "_to_onnx", lambda *_: model)
    monkeypatch.setattr(export, "_trace", lambda *_: program)
    return network


def error_of(call: Callable[[], object]) -> str:
    """The one line of the WeightsError that a call must raise."""
    with pytest.raises(WeightsError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("suffix", EXPORTS)
def test_a_file_that_computes_something_else_is_not_written(net: DepthAnything, tmp_path: Path, suffix: str) -> None:
    other = DepthAnything.from_preset("tiny")
    (tmp_path / f"net{suffix}").write_text("the older file")
    message = error_of(lambda: EXPORTS[suffix](other, str(tmp_path / f"net{suffix}")))
    assert "not written" in message and "more than rounding" in message
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [(f"net{suffix}", "the older file")]


def test_a_program_of_one_size_is_not_written(
    net: DepthAnything, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.no_grad():
        frozen = torch.export.export(export._Map(net).eval(), (torch.zeros(1, 3, 112, 112),), strict=False)
    monkeypatch.setattr(export, "_trace", lambda _: frozen)
    assert "for images of [2, 3, 126, 56] the exported network fails" in error_of(
        lambda: export_program(net, tmp_path / "net.pt2")
    )
    assert list(tmp_path.iterdir()) == []


def test_large_weights_lie_beside_the_file(net: DepthAnything, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "EXTERNAL_ABOVE_BYTES", 0)
    path, bystander = tmp_path / "net.onnx", tmp_path / "net.onnx.notes.data"
    bystander.touch()
    first = export_onnx(net, path)
    assert first.data_path is not None and Path(first.data_path).parent == tmp_path
    assert first.size_bytes == path.stat().st_size + Path(first.data_path).stat().st_size
    noise = images([(1, 112, 112), (2, 42, 70)])
    assert_same(onnx_maps(str(path), noise), maps(net, noise))

    with monkeypatch.context() as patch:  # the first pair stays whole when a second export fails at the last moment
        patch.setattr(export.os, "replace", _full)
        error_of(lambda: export_onnx(net, path))
    assert set(tmp_path.iterdir()) == {path, bystander, Path(first.data_path)}
    assert_same(onnx_maps(str(path), noise), maps(net, noise))

    second = export_onnx(net, path)
    assert second.data_path is not None and second.data_path != first.data_path
    assert set(tmp_path.iterdir()) == {path, bystander, Path(second.data_path)}
    assert_same(onnx_maps(str(path), noise), maps(net, noise))


def _full(*_: object) -> None:
    raise OSError(28, "No space left on device")


def _interrupted(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("external", [False, True])
@pytest.mark.parametrize("suffix", EXPORTS)
def test_an_interrupted_write_leaves_nothing(
    net: DepthAnything, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, external: bool
) -> None:
    monkeypatch.setattr(export, "EXTERNAL_ABOVE_BYTES", 0 if external else 2**30)
    path = str(tmp_path / f"net{suffix}")
    monkeypatch.setattr(export.os, "replace", _interrupted)
    with pytest.raises(KeyboardInterrupt):
        EXPORTS[suffix](net, path)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(export.os, "replace", _full)
    assert f"{path}: cannot be written" in (message := error_of(lambda: EXPORTS[suffix](net, path)))
    assert "No space left" in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", EXPORTS)
def test_a_path_that_cannot_be_written_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    def too_early(*_: object) -> None:
        raise AssertionError("traced for nothing")

    monkeypatch.setattr(export, "_trace", too_early)
    net = DepthAnything.from_preset("tiny")
    (tmp_path / "file").touch()
    (tmp_path / f"folder{suffix}").mkdir()
    for name, reason in (
        (f"absent/net{suffix}", "No such file or directory"), (f"file/net{suffix}", "Not a directory"),
        (f"folder{suffix}", "is a folder"), ("net.zip", f"ends in {suffix}"), (suffix, f"ends in {suffix}"),
    ):  # fmt: skip
        message = error_of(lambda name=name: EXPORTS[suffix](net, str(tmp_path / name)))
        assert reason in message and str(tmp_path / name) in message
    assert {p.name for p in tmp_path.iterdir()} == {"file", f"folder{suffix}"}


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_a_missing_package_is_named_with_its_remedy(
    net: DepthAnything, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    message = error_of(lambda: export_onnx(net, tmp_path / "net.onnx"))
    assert f"needs the package {package}: pip install fathom-depth[export]" in message
    assert list(tmp_path.iterdir()) == []


def test_without_onnxruntime_the_report_says_that_nothing_was_run(
    net: DepthAnything, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    report = export_onnx(net, tmp_path / "net.onnx")
    assert report.max_difference is None
    assert report.checked_with == f"onnx.checker {onnx.__version__}"


@pytest.mark.parametrize("opset", [17, 99])
def test_an_opset_that_torch_does_not_write_is_refused(net: DepthAnything, tmp_path: Path, opset: int) -> None:
    assert f"opset {opset}: " in error_of(lambda: export_onnx(net, tmp_path / "net.onnx", opset=opset))


def test_an_opset_that_torch_silently_replaces_is_refused(net: DepthAnything, tmp_path: Path) -> None:
    # The fixture's exporter makes 18 whatever is asked, as torch's does above those that it knows.
    assert "opset 19: torch's exporter made 18" in error_of(lambda: export_onnx(net, tmp_path / "net.onnx", opset=19))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", EXPORTS)
def test_only_float32_is_exported(net: DepthAnything, tmp_path: Path, suffix: str) -> None:
    half = DepthAnything.from_preset(get_preset("tiny")).bfloat16()
    message = error_of(lambda: EXPORTS[suffix](half, str(tmp_path / f"net{suffix}")))
    assert "the network is bfloat16 on cpu" in message and "net.float().cpu()" in message
