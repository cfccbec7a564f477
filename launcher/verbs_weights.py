"""`fathom weights import|export|show`: networks in and out of every format."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sys
from collections.abc import Iterator
from typing import Annotated, Any, cast

import typer

from launcher import options
from launcher.options import PositionOption, PresetOption

Path = Annotated[str, typer.Argument(metavar="PATH", help="A weights file, a folder, or a checkpoint (step_*).")]
EmaOption = Annotated[
    bool | None,
    typer.Option("--ema/--no-ema", help="A checkpoint's averaged weights, or its last ones; else averaged, if any."),
]
MissingOption = Annotated[
    list[str] | None,
    typer.Option("--allow-missing", metavar="PATTERN", help="Tensors that may be absent and keep initial values."),
]
UnexpectedOption = Annotated[
    list[str] | None, typer.Option("--allow-unexpected", metavar="PATTERN", help="Tensors that may be left out.")
]

FOLDERS = ("huggingface",)
SUFFIXES: dict[str, tuple[str, ...]] = {
    "official": (".pth", ".safetensors"),
    "distill-any-depth": (".pth", ".safetensors"),
    "muggled": (".pth", ".safetensors"),
    "dinov2": (".pth", ".safetensors"),
    "timm": (".pth", ".safetensors"),
    "onnx": (".onnx",),
    "torch-export": (".pt2",),
}
DTYPES = ("float32", "float16", "bfloat16")


def register(app: typer.Typer) -> None:
    """Adds the group."""
    group = typer.Typer(help="Import, export and look at networks.", no_args_is_help=True, rich_markup_mode=None)
    group.command("import")(import_)
    group.command("export")(export)
    group.command("show")(show)
    app.add_typer(group, name="weights")


def import_(
    path: Path,
    out: Annotated[str, typer.Option(help="Folder to write: model.safetensors and config.json.")],
    preset: PresetOption = None,
    position_mode: PositionOption = None,
    ema: EmaOption = None,
    allow_missing: MissingOption = None,
    allow_unexpected: UnexpectedOption = None,
) -> int:
    """Read a network of any format and write our folder, which says by itself what it is.

    Read are: the authors' .pth (V1, V2, metric), safetensors, Hugging Face folders, Distill-Any-Depth, muggled_dpt and
    training checkpoints. V1's and V2's .pth have the same names and shapes: --preset says which it is.

    \b
    Example:
      fathom weights import depth_anything_v2_vits.pth --preset v2-vits --out weights/v2-vits
      fathom weights import runs/student/checkpoints/step_00002000 --out weights/student
    """
    from model import DepthAnything

    _check_free(out)
    net = DepthAnything.from_pretrained(
        path, preset, position_mode=options.position_mode(position_mode), ema=ema, allow_missing=allow_missing or (),
        allow_unexpected=allow_unexpected or (),
    )  # fmt: skip
    with _cleaning_up():
        net.save_pretrained(out)
    report = net.loaded
    assert report is not None
    typer.echo(f"{report.container}; names: {report.layout}; {report.matched} tensors matched")
    for what, names in (
        ("absent, filled with zeros (nothing reads them)", report.filled),
        ("absent, allowed: initial values", report.missing),
        ("left out, allowed", report.unexpected),
    ):
        if names:
            typer.echo(f"{len(names)} {what}: {', '.join(names)}")
    typer.echo(f"preset {net.preset.name}, position mode {net.preset.position_mode}, fingerprint {net.fingerprint()}")
    typer.echo(out)
    return 0


def export(
    path: Path,
    out: Annotated[str, typer.Option(help="File to write, or folder for huggingface.")],
    layout: Annotated[str, typer.Option(help=f"One of: {', '.join((*FOLDERS, *SUFFIXES))}.")] = "official",
    preset: PresetOption = None,
    position_mode: PositionOption = None,
    fusion: Annotated[
        str | None, typer.Option(help="interpolate or even (every rise x2, sides multiples of 28); for exporters.")
    ] = None,
    ema: EmaOption = None,
    dtype: Annotated[str, typer.Option(help=f"One of: {', '.join(DTYPES)} (onnx: float32).")] = "float32",
) -> int:
    """Write a network for other programs: the authors' code, Hugging Face, ONNX, ...

    .safetensors and .pth are told by the name of --out. dinov2 and timm write the encoder alone. ONNX and torch-export
    take any batch and any sides that are multiples of 14, of ImageNet-normalised images.

    \b
    Example:
      fathom weights export runs/student/weights --layout huggingface --out student-hf
      fathom weights export runs/student/weights --layout onnx --out student.onnx
    """
    if layout not in (*FOLDERS, *SUFFIXES):
        raise typer.BadParameter(f"{layout!r}; one of {', '.join((*FOLDERS, *SUFFIXES))}", param_hint="--layout")
    if fusion not in (None, "interpolate", "even"):
        raise typer.BadParameter(f"{fusion!r}; interpolate or even", param_hint="--fusion")
    if dtype not in DTYPES:
        raise typer.BadParameter(f"{dtype!r}; one of {', '.join(DTYPES)}", param_hint="--dtype")
    _check_free(out)
    if layout in SUFFIXES and not out.endswith(SUFFIXES[layout]):
        raise typer.BadParameter(f"{out}: must end with {' or '.join(SUFFIXES[layout])}", param_hint="--out")
    if dtype != "float32" and layout in ("onnx", "torch-export"):
        raise typer.BadParameter(f"{dtype}: {layout} is written in float32", param_hint="--dtype")
    import torch

    from model import DepthAnything
    from model.save import export_file, save_huggingface

    mode = options.position_mode(position_mode)
    net = DepthAnything.from_pretrained(path, preset, position_mode=mode, fusion=cast(Any, fusion), ema=ema).eval()
    with _cleaning_up():
        if layout == "huggingface":
            save_huggingface(net, out, getattr(torch, dtype))
        elif layout in ("onnx", "torch-export"):
            from model.export import export_onnx, export_program

            (export_onnx if layout == "onnx" else export_program)(net, out)
        else:
            export_file(net, out, layout, getattr(torch, dtype))
    typer.echo(out)
    return 0


def show(
    path: Path,
    preset: PresetOption = None,
    position_mode: PositionOption = None,
    ema: EmaOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of a table.")] = False,
) -> int:
    """Say what a file is: preset, taps, layout, parameters, and the fingerprint that names its pseudo-labels.

    \b
    Example:
      fathom weights show runs/student/weights
      fathom weights show depth_anything_vitl14.pth --preset v1-vitl
    """
    from model.describe import describe

    told = describe(path, preset, position_mode=options.position_mode(position_mode), ema=ema)
    if as_json:
        typer.echo(json.dumps(told, indent=2))
    else:
        for name, value in _rows(told):
            typer.echo(f"{name:<14}{value}")
    if told.get("problem"):
        typer.echo(f"error: {told['problem']}", err=True)
        return 2
    return 0


def _rows(told: dict[str, Any]) -> list[tuple[str, str]]:
    count = told["parameters"]
    parts = ", ".join(f"{part} {count[part]:,}" for part in ("encoder", "decoder") if part in count)
    rows = [
        ("file", told["path"]),
        ("container", told["container"]),
        ("layout", f"{told['layout']}: {told['names']}"),
        ("tensors", f"{told['tensors']} of {', '.join(told['dtypes'])}"),
        ("parameters", f"{count['total']:,} ({parts})"),
    ]
    if told["unused"]:
        short = {re.sub(r"(resConfUnit1)\..*", r"\1.*", name.split(".", 1)[1]) for name in told["unused"]}
        rows.append(("never read", f"{len(told['unused'])} of them: {', '.join(sorted(short))}"))
    if told["preset"] is None:
        fits = ", ".join(told["candidates"]) or "none: no preset has these shapes"
        if not told["has_decoder"]:
            return [*rows, ("network", "only an encoder"), ("fits presets", fits)]
        return [*rows, ("preset", f"the file cannot tell; pass --preset, one of: {fits}")]
    head = told["head"] + ("" if told["max_depth_m"] is None else f", up to {told['max_depth_m']:g} m")
    rows += [
        ("preset", told["preset"] + (" (recorded)" if told["recorded"] else "")),
        ("taps", ", ".join(map(str, told["taps"]))),
        ("head", head),
        ("positions", told["position_mode"]),
    ]
    if "fingerprint" in told:
        rows.append(("matched", f"{told['matched']}, absent and never read: {len(told['filled'])}"))
        rows.append(("fingerprint", told["fingerprint"]))
    return rows


def _check_free(out: str) -> None:
    """An export never writes over another's work."""
    if not os.path.basename(out.rstrip(os.sep)):
        raise typer.BadParameter(f"{out!r}: name a file or folder", param_hint="--out")
    if (os.path.isdir(out) and os.listdir(out)) or os.path.isfile(out):
        raise typer.BadParameter(f"{out}: is there already; name another, or remove it", param_hint="--out")


@contextlib.contextmanager
def _cleaning_up() -> Iterator[None]:
    """SIGTERM unwinds, so that a half-written file goes."""
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
