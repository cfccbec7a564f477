"""A network as one file that other programs run: ONNX, or torch.export's .pt2.

Both take `image`, float32 [B, 3, H, W], ImageNet-normalised, and return `disparity` or `depth_m`, float32 [B, H, W].
Batch and sides are free; the sides are multiples of `preset.multiple`. A .pt2 refuses other sides and those below
`smallest_side`, which torch.export's guards need; ONNX runtimes check neither, and an ONNX file cuts a remainder off.
Shape suffixes: B batch, C channel, H W pixels.
"""

from __future__ import annotations

import contextlib
import glob
import json
import logging
import os
import re
import secrets
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from model.preprocess import IMAGENET_MEAN, IMAGENET_STD, PATCH
from model.presets import Preset
from model.types import WeightsError

if TYPE_CHECKING:
    from model.depth_anything import DepthAnything

FORMAT_VERSION = 1
METADATA_FILE = "fathom.json"  # in a .pt2: the name among `extra_files`
FIRST_OPSET = 18  # torch's exporter is written for it, and only converts to older ones where that happens to succeed
# A protobuf, so an ONNX file, ends at 2 GiB. Weights above this go to a second file; the rest is room for the graph.
EXTERNAL_ABOVE_BYTES = 1536 * 2**20

# The largest difference to the network that a file may have: this share of the map's standard deviation, and, for maps
# that hardly vary, a few steps of float32 at its largest value. Our choice, from tiny and v2-vits with initial and with
# much larger weights: onnxruntime differs by up to 4.4e-4 deviations, the network from itself in float64 by 2.4e-4;
# the other position mode, a small mistake for an exporter to make, by 0.6 and more.
SHARE_OF_DEVIATION = 1e-2
SHARE_OF_LARGEST = 2e-6

_REMEDY = "install the versions of constraints.txt"


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """What was written and how it was compared with the network."""

    path: str
    size_bytes: int  # of everything written
    data_path: str | None  # ONNX, large networks: the weights, which must stay beside `path`
    opset: int | None  # ONNX only
    max_difference: float | None  # in the map's unit; None: onnxruntime is not installed, nothing was run
    checked_with: str  # packages and versions


def export_onnx(net: DepthAnything, path: str | os.PathLike[str], opset: int = FIRST_OPSET) -> ExportReport:
    """Write a network as ONNX, and check the file against the network before it gets its name.

    Its `metadata_props` are those of `metadata`. Weights above 1.5 GiB lie in `PATH.<8 hex digits>.data` beside it; the
    data of an earlier export to the same path is deleted when the new file stands.

    Args:
        net: on the CPU, float32.
        path: ends in .onnx; its folder exists. An older file is replaced.
        opset: of ONNX's own operators; 18 or later, what torch's exporter and the runtime know.

    Raises:
        WeightsError: missing packages, a path that cannot be written, an opset that cannot be made, or a file that
            computes something else; nothing is left behind.
    """
    path = os.fspath(path)
    onnx = _need("onnx")
    _need("onnxscript")
    if not FIRST_OPSET <= opset <= onnx.defs.onnx_opset_version():
        raise WeightsError(
            f"opset {opset}: this onnx {onnx.__version__} and torch's exporter write {FIRST_OPSET} to "
            f"{onnx.defs.onnx_opset_version()}; {FIRST_OPSET} runs almost everywhere"
        )
    _require_plain(net)
    with _beside(path, ".onnx") as (temporary, data_path):
        model = _to_onnx(net, opset)
        if model.opset_imports[""] != opset:
            raise WeightsError(f"opset {opset}: torch's exporter made {model.opset_imports['']}; ask for {FIRST_OPSET}")
        weights_bytes = sum(value.const_value.nbytes for value in model.graph.initializers.values())
        external = os.path.basename(data_path) if weights_bytes > EXTERNAL_ABOVE_BYTES else None
        import_module("onnxscript").ir.save(model, temporary, external_data=external)
        onnx.checker.check_model(temporary, full_check=True)
        checked_with, difference = f"onnx.checker {onnx.__version__}", None
        runtime = _import_or_none("onnxruntime")
        if runtime is not None:
            checked_with += f", onnxruntime {runtime.__version__}"
            difference = _largest_difference(net, _onnx_runner(runtime, temporary, opset), path)
        files = [temporary] + ([data_path] if external else [])
        size_bytes = sum(map(os.path.getsize, files))
    return ExportReport(
        path=path, size_bytes=size_bytes, data_path=data_path if external else None, opset=opset,
        max_difference=difference, checked_with=checked_with,
    )  # fmt: skip


def export_program(net: DepthAnything, path: str | os.PathLike[str]) -> ExportReport:
    """Write a network as torch.export's program, and check the file against the network before it gets its name.

    `torch.export.load(path).module()` runs it with torch alone. `metadata` is JSON in the extra file `fathom.json`:
    `torch.export.load(path, extra_files=(files := {"fathom.json": ""}))`.

    Args:
        net: on the CPU, float32.
        path: ends in .pt2; its folder exists. An older file is replaced.

    Raises:
        WeightsError: a path that cannot be written, or a file that computes something else; nothing is left behind.
    """
    path = os.fspath(path)
    _require_plain(net)
    with _beside(path, ".pt2") as (temporary, _):
        with _quiet():
            torch.export.save(_trace(net), temporary, extra_files={METADATA_FILE: json.dumps(metadata(net), indent=2)})
            run = torch.export.load(temporary).module()
        difference = _largest_difference(net, run, path)
        size_bytes = os.path.getsize(temporary)
    return ExportReport(
        path=path, size_bytes=size_bytes, data_path=None, opset=None, max_difference=difference,
        checked_with=f"torch {torch.__version__}",
    )  # fmt: skip


def metadata(net: DepthAnything) -> dict[str, str]:
    """What an exported file says about itself, as text; lists and the preset's config as JSON."""
    relative = net.preset.head == "relative"
    return {
        "format_version": str(FORMAT_VERSION),
        "preset": json.dumps(net.preset.config()),
        "fingerprint": net.fingerprint(),
        "input": "image: RGB / 255, minus mean, divided by std, float32 [B, 3, H, W]",
        "mean": json.dumps(IMAGENET_MEAN),
        "std": json.dumps(IMAGENET_STD),
        "multiple": str(net.preset.multiple),
        "output": output_name(net.preset),
        "meaning": "disparity >= 0 in an arbitrary unit, larger is nearer" if relative else "depth in metres",
    }


def output_name(preset: Preset) -> str:
    """The name of an exported file's output."""
    return "disparity" if preset.head == "relative" else "depth_m"


def smallest_side(preset: Preset) -> int:
    """The smallest side in pixels that a .pt2 takes: 42, or 56 with even fusion.

    torch.export reasons about sizes above 1 only, and the decoder's deepest map has half of the patches, rounded up.
    """
    return preset.multiple * _fewest(preset)


def _fewest(preset: Preset) -> int:
    return 3 if preset.fusion == "interpolate" else 2


# --- tracing ------------------------------------------------------------------------------------------------------


class _Map(nn.Module):
    """The network, returning its one map: exporters know tensors, not our dataclass."""

    def __init__(self, net: DepthAnything) -> None:
        super().__init__()
        self.net = net

    def forward(self, image: Tensor) -> Tensor:
        prediction = self.net(image)
        return prediction.disparity_BHW if prediction.depth_m_BHW is None else prediction.depth_m_BHW


def _trace(net: DepthAnything) -> torch.export.ExportedProgram:
    """The program of `net` with free batch and sides."""
    multiple = net.preset.multiple
    # All sizes differ and none is 1: a size that an exporter takes for a constant would show in `_largest_difference`.
    example_BCHW = torch.zeros(2, 3, 5 * multiple, 7 * multiple)
    was_training = net.training
    net.eval()
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            program = torch.export.export(
                _Map(net).eval(), (example_BCHW,), dynamic_shapes=_free_sizes(net.preset), strict=False
            )
    finally:
        net.train(was_training)
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                node.meta.pop("stack_trace", None)  # names files and folders of this machine
    return program


def _free_sizes(preset: Preset) -> dict[str, Any]:
    batch, h, w = torch.export.Dim("batch", min=1), *(torch.export.Dim(side, min=_fewest(preset)) for side in "hw")
    return {"image": {0: batch, 2: preset.multiple * h, 3: preset.multiple * w}}


def _to_onnx(net: DepthAnything, opset: int) -> Any:
    """An onnxscript.ir.Model of `net`."""
    with _quiet():
        program = torch.onnx.export(
            _trace(net), dynamo=True, opset_version=opset, input_names=["image"],
            output_names=[output_name(net.preset)], dynamic_shapes=_free_sizes(net.preset), verbose=False,
        )  # fmt: skip
    assert program is not None
    model: Any = program.model
    model.metadata_props.update(metadata(net))
    return model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Exporters warn about their own parts; their errors are exceptions and pass."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


# --- checking -----------------------------------------------------------------------------------------------------


def _onnx_runner(runtime: Any, path: str, opset: int) -> Callable[[Tensor], Tensor]:
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors
    try:
        session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its classes have no common base of their own
        raise WeightsError(
            f"opset {opset}: onnxruntime {runtime.__version__} refuses the file ({_line(error)}); "
            f"ask for {FIRST_OPSET}, or install a newer onnxruntime"
        ) from error
    return lambda image_BCHW: torch.from_numpy(session.run(None, {"image": image_BCHW.numpy()})[0])


def _largest_difference(net: DepthAnything, run: Callable[[Tensor], Tensor], path: str) -> float:
    """The largest absolute difference between a file and the network. Raises WeightsError when it is not rounding.

    Compared where an exporter's mistakes would show: at the stored position embedding's own grid, which the network
    takes as it is, with a batch of 1; and at a batch of 2 with two sides that are not the example's.
    """
    multiple = net.preset.multiple
    own = max(net.preset.grid * PATCH // multiple * multiple, smallest_side(net.preset))
    generator = torch.Generator().manual_seed(0)
    largest = 0.0
    for batch, height, width in ((1, own, own), (2, 9 * multiple, 4 * multiple)):
        image_BCHW = torch.randn(batch, 3, height, width, generator=generator)
        about = f"{path}: not written: for images of {list(image_BCHW.shape)} the exported network"
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            expected_BHW = _Map(net)(image_BCHW)
            try:
                found_BHW = run(image_BCHW)
            except MemoryError:
                raise
            except Exception as error:  # whatever a runtime raises
                raise WeightsError(f"{about} fails ({_line(error)}); {_REMEDY}") from error
        if found_BHW.shape != expected_BHW.shape:
            raise WeightsError(f"{about} returns {list(found_BHW.shape)}; {_REMEDY}")
        allowed = float(SHARE_OF_DEVIATION * expected_BHW.std() + SHARE_OF_LARGEST * expected_BHW.max())
        difference = float((found_BHW - expected_BHW).abs().max())
        if not difference <= allowed:  # nor NaN
            raise WeightsError(f"{about} differs by {difference:.2g}, more than rounding ({allowed:.2g}); {_REMEDY}")
        largest = max(largest, difference)
    return largest


def _require_plain(net: DepthAnything) -> None:
    found = sorted({f"{str(p.dtype).removeprefix('torch.')} on {p.device}" for p in net.parameters()})
    if found != ["float32 on cpu"]:
        raise WeightsError(f"the network is {', '.join(found)}; export it from float32 on cpu: net.float().cpu()")


# --- files and packages -------------------------------------------------------------------------------------------


def _import_or_none(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError:
        return None


def _need(name: str) -> Any:
    module = _import_or_none(name)
    if module is None:
        raise WeightsError(f"export to ONNX needs the package {name}: pip install fathom-depth[export]")
    return module


@contextlib.contextmanager
def _beside(path: str, suffix: str) -> Iterator[tuple[str, str]]:
    """Gives (temporary file, free name for its data) in the folder of `path`; the file becomes `path` at the end.

    The data file has its final name from the start, because the file says it; no other file refers to it. After an
    error both are gone. Raises WeightsError at once where nothing can be written.
    """
    folder, name = os.path.split(path)
    if not name.endswith(suffix) or name == suffix:
        raise WeightsError(f"{path}: expected a file name that ends in {suffix}")
    if os.path.isdir(path):
        raise WeightsError(f"{path}: is a folder; give the name of a file in it")
    token = secrets.token_hex(4)
    temporary = os.path.join(folder, f".{name.removesuffix(suffix)}.{token}{suffix}")
    data_path = os.path.join(folder, f"{name}.{token}.data")
    try:
        open(temporary, "xb").close()  # with the user's umask, which tempfile would ignore
        yield temporary, data_path
        for written in (data_path, temporary):
            if os.path.exists(written):
                with open(written, "rb+") as file:
                    os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        for written in (temporary, data_path):
            with contextlib.suppress(OSError):
                os.unlink(written)
        if isinstance(error, OSError):
            where = folder or os.getcwd()
            raise WeightsError(f"{path}: cannot be written to {where} ({error.strerror or error})") from error
        raise
    # The data of an earlier export, which the file that was replaced referred to.
    for old in glob.glob(os.path.join(glob.escape(folder), f"{glob.escape(name)}.*.data")):
        if old != data_path and re.fullmatch(r"\.[0-9a-f]{8}\.data", os.path.basename(old)[len(name) :]):
            with contextlib.suppress(OSError):
                os.unlink(old)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__
