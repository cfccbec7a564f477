"""Networks to files: our own folder, Hugging Face's, and one file under the names of any layout; all atomically."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch

from model import files, layouts
from model.files import some
from model.layouts import Tensors
from model.layouts.huggingface import config_of, processor_of
from model.presets import Preset
from model.types import WeightsError
from model.weights import FORMAT_VERSION, fingerprint, official_state

if TYPE_CHECKING:
    from model.depth_anything import DepthAnything
    from model.vit import Encoder

# Layouts of one file that a network can be written in.
FILE_LAYOUTS = ("official", "distill-any-depth", "muggled", "dinov2", "timm")


def record_of(preset: Preset, digest: str | None = None) -> dict[str, Any]:
    """The facts that go beside the tensors: preset, taps, head and so on, and their fingerprint."""
    return {"format_version": FORMAT_VERSION, **preset.config()} | ({"fingerprint": digest} if digest else {})


def save_network(net: DepthAnything, folder: str | os.PathLike[str]) -> None:
    """Write model.safetensors (official names) and config.json (our facts), each atomically, config.json last.

    config.json carries the fingerprint, so a crash between the two over an older folder is noticed when reading.
    """
    tensors, record = _prepare(net, torch.float32)
    folder = _make_folder(folder)
    files.write_safetensors(os.path.join(folder, "model.safetensors"), tensors, record)
    files.write_json(os.path.join(folder, "config.json"), record)


def save_huggingface(net: DepthAnything, folder: str | os.PathLike[str], dtype: torch.dtype = torch.float32) -> None:
    """Write the folder that transformers' `DepthAnythingForDepthEstimation.from_pretrained` loads strictly.

    Our own facts are in the safetensors header: read back by us, the network is the same, position mode included;
    transformers always resizes position embeddings in the mode "exact". Raises WeightsError where it has no such
    network.
    """
    config = config_of(net.preset)
    tensors, record = _prepare(net, dtype)
    folder = _make_folder(folder)
    names = layouts.LAYOUTS["huggingface"].from_official(tensors)
    files.write_safetensors(os.path.join(folder, "model.safetensors"), names, record)
    files.write_json(os.path.join(folder, "preprocessor_config.json"), processor_of(net.preset))
    files.write_json(os.path.join(folder, "config.json"), {**config, "torch_dtype": str(dtype).removeprefix("torch.")})


def export_file(
    net: DepthAnything, path: str | os.PathLike[str], layout: str = "official", dtype: torch.dtype = torch.float32
) -> None:
    """Write one file of a layout: safetensors where the name ends so, else as `torch.save` does.

    `dinov2` and `timm` hold the encoder alone. Raises WeightsError for a layout that cannot hold this network.
    """
    path = os.fspath(path)
    if layout not in FILE_LAYOUTS:
        raise WeightsError(f"layout is {layout!r}; a file is one of {', '.join(FILE_LAYOUTS)}")
    tensors, record = _prepare(net, dtype)
    if layout == "muggled":
        layout = "muggled-v1" if net.preset.name.startswith("v1-") else "muggled-v2"
    chosen = layouts.LAYOUTS[layout]
    if not chosen.encoder_only and not chosen.holds(net.preset):
        raise WeightsError(f"{net.preset.name}: {chosen.title} cannot hold this network; use --layout official")
    try:
        names = chosen.from_official(tensors)
    except KeyError as error:
        raise WeightsError(f"{net.preset.name}: {chosen.title} has no place for {error.args[0]}") from error
    # A bare encoder has no taps and no head; its facts would be another network's.
    facts = None if chosen.encoder_only else record
    write = files.write_safetensors if path.endswith(".safetensors") else files.write_pth
    write(path, names, facts)


def _prepare(net: DepthAnything, dtype: torch.dtype) -> tuple[Tensors, dict[str, Any]]:
    """Official tensors in the dtype to be written, and the facts, whose fingerprint is of what is written."""
    if not dtype.is_floating_point:
        raise WeightsError(f"{net.preset.name}: cannot be written as {dtype}; export in float32, float16 or bfloat16")
    tensors = {k: v.detach().cpu().to(dtype) for k, v in official_state(net).items()}
    broken = [k for k, v in tensors.items() if not v.isfinite().all()]
    if broken:
        raise WeightsError(f"{net.preset.name}: {some(broken)} not finite in {dtype}; export in float32 or bfloat16")
    return tensors, record_of(net.preset, fingerprint(tensors, net.preset))


def save_encoder(encoder: Encoder, path: str | os.PathLike[str]) -> None:
    """Write an encoder as one safetensors file with DINOv2's hub names, for `encoder_weights`."""
    files.write_safetensors(os.fspath(path), official_state(encoder))


def _make_folder(folder: str | os.PathLike[str]) -> str:
    folder = os.fspath(folder)
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise WeightsError(f"{folder}: cannot be made ({error.strerror}); name another folder") from error
    return folder
