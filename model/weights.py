"""Weights in and out: files to networks, strictly, and networks to files, atomically.

In a file the names are the official ones (Depth-Anything's `pretrained.` and `depth_head.`, DINOv2's own inside); in
memory they are the same but for the giant's SwiGLU, which timm calls fc1 and fc2 and DINOv2 w12 and w3.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from model.presets import PRESETS, Preset, get_preset
from model.types import WeightsError

if TYPE_CHECKING:
    from model.depth_anything import DepthAnything
    from model.vit import Encoder

Tensors = dict[str, Tensor]

FORMAT_VERSION = 1
# The official files hold these five tensors, which no forward pass reads and no gradient reaches.
UNUSED = frozenset(
    ["pretrained.mask_token"]
    + [f"depth_head.scratch.refinenet4.resConfUnit1.conv{c}.{kind}" for c in (1, 2) for kind in ("weight", "bias")]
)


@dataclass(frozen=True, kw_only=True)
class WeightsFile:
    """What a path holds: tensors under their names in memory, and what config.json says beside them, if anything."""

    path: str
    tensors: Tensors
    preset: Preset | None = None
    fingerprint: str | None = None


# --- networks in memory -------------------------------------------------------------------------------------------


@torch.no_grad()
def materialise(module: nn.Module) -> None:
    """Give a module built on the meta device CPU memory filled with NaN."""
    module.to_empty(device="cpu")
    for tensor in module.state_dict().values():
        tensor.fill_(float("nan"))


def require_finite(module: nn.Module, source: str) -> None:
    """Raises WeightsError naming the first tensors that are not finite: never set, or broken in the file."""
    broken = [name for name, tensor in module.state_dict().items() if not tensor.isfinite().all()]
    if broken:
        raise WeightsError(f"{source}: not finite (NaN or infinite) in {_some(broken)}; this file cannot be used")


def fingerprint(net: DepthAnything) -> str:
    """sha256 (hex) over the tensors and over what tensors cannot say: heads, taps, head, max_depth, position mode.

    Tensors enter by official name, dtype, shape and bytes. The five that nothing reads are left out, so that a format
    which drops them gives the same fingerprint.
    """
    preset = net.preset
    facts = {
        "heads": preset.heads,
        "taps": list(preset.taps),
        "head": [preset.head, preset.head_stride],
        "max_depth_m": preset.max_depth_m,
        "position_mode": preset.position_mode,
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name, tensor in sorted(to_official(net.state_dict(), preset).items()):
        if name not in UNUSED:
            tensor = tensor.detach().cpu().contiguous()
            digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


# --- names --------------------------------------------------------------------------------------------------------


def to_official(state: Mapping[str, Tensor], preset: Preset) -> Tensors:
    """Names in memory -> names in the official files."""
    if preset.ffn != "swiglu":
        return dict(state)
    return {k.replace(".mlp.fc1.", ".mlp.w12.").replace(".mlp.fc2.", ".mlp.w3."): v for k, v in state.items()}


def from_official(state: Mapping[str, Tensor]) -> Tensors:
    """Names in the official (or timm's) files -> names in memory."""
    return {k.replace(".mlp.w12.", ".mlp.fc1.").replace(".mlp.w3.", ".mlp.fc2."): v for k, v in state.items()}


def unwrap(path: str, content: Any) -> Tensors:
    """The flat {name: tensor} inside a loaded file: under `model` or `state_dict`, `module.` prefixes stripped.

    Raises:
        WeightsError: there is none.
    """
    while isinstance(content, Mapping):
        nested = next((k for k in ("model", "state_dict") if isinstance(content.get(k), Mapping)), None)
        if nested is None:
            break
        content = content[nested]
    if not isinstance(content, Mapping) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        found = _some(list(map(str, content))) if isinstance(content, Mapping) and content else type(content).__name__
        raise WeightsError(f"{path}: holds no table of tensors (found {found}); expected a network's state dict")
    while all(k.startswith("module.") for k in content):
        content = {k.removeprefix("module."): v for k, v in content.items()}
    return dict(content)


# --- reading ------------------------------------------------------------------------------------------------------


def read_tensors(path: str) -> Tensors:
    """The tensors of a .safetensors or .pth file, told apart by content. Raises WeightsError in one line."""
    try:
        with open(path, "rb") as file:
            head = file.read(9)
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({error.strerror}); give a weights file or folder") from error
    if not head:
        raise WeightsError(f"{path}: the file is empty; copy or download it again")
    content: Any
    if head[8:9] == b"{":
        try:
            content = safetensors.torch.load_file(path)
        except (safetensors.SafetensorError, OSError, ValueError) as error:
            raise WeightsError(f"{path}: broken or truncated safetensors ({_line(error)}); copy it again") from error
    elif head[:2] in (b"PK", b"\x80\x02"):
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise WeightsError(
                f"{path}: refused: a broken pickle, or one that runs code beyond tensors; save its state dict alone"
            ) from error
        except MemoryError:
            raise
        except Exception as error:  # torch's unpickler lets struct.error, IndexError and more escape on broken bytes
            raise WeightsError(f"{path}: broken or truncated .pth ({_line(error)}); copy it again") from error
    else:
        raise WeightsError(f"{path}: neither safetensors nor a PyTorch file; give .safetensors, .pth or a saved folder")
    return unwrap(path, content)


def open_weights(path: str | os.PathLike[str]) -> WeightsFile:
    """Read a file, or a folder made by `save_pretrained`. Raises WeightsError."""
    path = os.fspath(path)
    if not os.path.isdir(path):
        return WeightsFile(path=path, tensors=from_official(read_tensors(path)))
    config_path = os.path.join(path, "config.json")
    try:
        with open(config_path, encoding="utf-8") as file:
            config = json.load(file)
        version = config.pop("format_version", None)
        digest = config.pop("fingerprint", None)
        if version != FORMAT_VERSION:
            raise ValueError(f"format_version is {version}, expected {FORMAT_VERSION}: not a folder of ours")
        preset = Preset.from_config(config)
    except OSError as error:
        raise WeightsError(f"{config_path}: cannot be read ({error.strerror}); give a folder that was saved") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise WeightsError(f"{config_path}: {_line(error)}") from error
    tensors = from_official(read_tensors(os.path.join(path, "model.safetensors")))
    return WeightsFile(path=path, tensors=tensors, preset=preset, fingerprint=digest)


def choose_preset(source: WeightsFile, preset: str | Preset | None) -> Preset:
    """The preset asked for, else the one recorded, else the only one that fits. Raises WeightsError."""
    if preset is not None:
        asked = get_preset(preset)
        if source.preset not in (None, asked):
            raise WeightsError(f"{source.path}: was saved as {source.preset.name}, not {asked.name}; leave preset out")
        return asked
    if source.preset is not None:
        return source.preset
    fitting = fitting_presets(source.tensors) if _has_decoder(source.tensors) else []
    if len(fitting) == 1:
        return get_preset(fitting[0])
    if fitting:
        raise WeightsError(
            f"{source.path}: the file cannot tell which network it is; pass preset=, one of {_all(fitting)}"
        )
    raise WeightsError(f"{source.path}: {_not_ours(source.tensors)}")


def load_network(net: DepthAnything, source: WeightsFile) -> None:
    """Copy a file into a network. Raises WeightsError, before anything is copied, unless names and shapes are equal."""
    if not _has_decoder(source.tensors):
        raise WeightsError(f"{source.path}: {_not_ours(source.tensors)}")
    _check(source.path, source.tensors, net.state_dict(), net.preset)
    net.load_state_dict(source.tensors, strict=True)


def load_encoder(encoder: Encoder, path: str | os.PathLike[str]) -> None:
    """Copy DINOv2's weights (hub or timm names), or a whole Depth Anything's encoder, into an encoder.

    timm's files have no `mask_token`: it keeps its value. Raises WeightsError, before anything is copied.
    """
    source = open_weights(path)
    tensors = source.tensors
    if any(k.startswith("pretrained.") for k in tensors):
        tensors = {k.removeprefix("pretrained."): v for k, v in tensors.items() if not k.startswith("depth_head.")}
    state = encoder.state_dict()
    tensors = {"mask_token": state["mask_token"], **tensors}
    _check(source.path, tensors, state, encoder.preset)
    encoder.load_state_dict(tensors, strict=True)


def fitting_presets(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the presets whose encoder, and decoder if there is one, have the shapes of these tensors."""
    bare = {k.removeprefix("pretrained."): tuple(v.shape) for k, v in tensors.items()}
    whole = _has_decoder(tensors)
    if not {"cls_token", "pos_embed"} <= set(bare):
        return []
    if len(bare["cls_token"]) != 3 or len(bare["pos_embed"]) != 3:
        return []
    width, positions = bare["cls_token"][2], bare["pos_embed"][1]
    depth = 1 + max((int(m[1]) for m in (re.match(r"blocks\.(\d+)\.", k) for k in bare) if m), default=-1)
    decoder = [bare.get(f"depth_head.scratch.{k}.weight") for k in ("layer1_rn", "output_conv2.0")]

    def fits(p: Preset) -> bool:
        shapes = [(p.features, p.out_channels[0], 3, 3), (p.head_channels, p.features // 2, 3, 3)]
        same_encoder = (p.width, p.depth, p.grid**2 + 1) == (width, depth, positions)
        return same_encoder and (decoder == shapes or not whole)

    return [name for name, preset in PRESETS.items() if fits(preset)]


def _has_decoder(tensors: Mapping[str, Tensor]) -> bool:
    return any(k.startswith("depth_head.") for k in tensors)


def _check(path: str, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], preset: Preset) -> None:
    missing = [k for k in wanted if k not in found]
    unexpected = [k for k in found if k not in wanted]
    shapes = [
        f"{k} {list(found[k].shape)} for {list(wanted[k].shape)}"
        for k in wanted
        if k in found and found[k].shape != wanted[k].shape
    ]
    integers = [k for k, v in found.items() if not v.is_floating_point()]
    parts = [
        f"{len(names)} {what} ({_some(names)})"
        for what, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape", shapes),
            ("not floating point", integers),
        )
        if names
    ]
    if parts:
        fitting = fitting_presets(found)
        if preset.name in fitting:
            advice = "its sizes are this preset's: is the file complete, and a Depth Anything's?"
        elif fitting:
            advice = f"this file fits preset {_all(fitting)}"
        else:
            advice = _not_ours(found, whole=_has_decoder(wanted))
        raise WeightsError(f"{path}: does not fit preset {preset.name}: {', '.join(parts)}; {advice}")


def _not_ours(tensors: Mapping[str, Tensor], whole: bool = True) -> str:
    if "register_tokens" in tensors or "reg_token" in tensors:
        return "a DINOv2 with register tokens; Depth Anything uses the one without"
    if "cls_token" in tensors and whole:
        return "only an encoder, no depth_head; use from_preset(..., encoder_weights=...) with the preset of its size"
    if "cls_token" in tensors or any(k.startswith("pretrained.") for k in tensors):
        return "no preset has these shapes; is the file complete?"
    expected = "pretrained.* and depth_head.*" if whole else "DINOv2's cls_token, pos_embed, blocks.*, norm.*"
    return f"not such a network by its names ({_some(list(tensors))}); expected {expected}"


def _some(names: list[str], limit: int = 3) -> str:
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")


def _all(names: list[str]) -> str:
    return ", ".join(names)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__


# --- writing ------------------------------------------------------------------------------------------------------


def save_network(net: DepthAnything, folder: str | os.PathLike[str]) -> None:
    """Write model.safetensors and config.json, each atomically, config.json last.

    config.json carries the fingerprint, so a crash between the two over an older folder is noticed when reading.
    """
    folder = os.fspath(folder)
    os.makedirs(folder, exist_ok=True)
    write_tensors(to_official(net.state_dict(), net.preset), os.path.join(folder, "model.safetensors"))
    config = {"format_version": FORMAT_VERSION, **net.preset.config(), "fingerprint": fingerprint(net)}
    _replace(os.path.join(folder, "config.json"), (json.dumps(config, indent=2) + "\n").encode())


def save_encoder(encoder: Encoder, path: str | os.PathLike[str]) -> None:
    """Write an encoder as one safetensors file with DINOv2's hub names, for `encoder_weights`."""
    write_tensors(to_official(encoder.state_dict(), encoder.preset), os.fspath(path))


def write_tensors(tensors: Mapping[str, Tensor], path: str) -> None:
    """Write {name: tensor} as safetensors, atomically."""
    plain = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    _replace(path, safetensors.torch.save(plain, metadata={"format": "pt"}))


def _replace(path: str, content: bytes) -> None:
    temporary = os.path.join(os.path.dirname(path) or ".", f".{os.path.basename(path)}.{secrets.token_hex(4)}")
    try:
        with open(temporary, "xb") as file:  # with the user's umask, which tempfile would ignore
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
