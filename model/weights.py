"""Weights to networks, from any format, strictly.

`model/files.py` reads bytes, `model/layouts/` knows the names; here they meet a network; `model/save.py` is the way
back. In memory the names are the official ones but for the giant's SwiGLU, which timm calls fc1 and fc2 and DINOv2 w12
and w3.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from model import files, layouts
from model.files import one_line, some
from model.layouts import Layout, Tensors
from model.layouts.huggingface import preset_from_config
from model.presets import PRESETS, PositionMode, Preset, get_preset
from model.types import UNUSED, LoadReport, WeightsError

if TYPE_CHECKING:
    from model.depth_anything import DepthAnything
    from model.vit import Encoder

FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Source:
    """A file, understood: tensors under official names, and what is known about the network."""

    contents: files.Contents
    layout: Layout
    tensors: Tensors
    preset: Preset | None = None  # recorded beside the tensors
    fingerprint: str | None = None  # likewise

    @property
    def path(self) -> str:
        return self.contents.path

    @property
    def has_decoder(self) -> bool:
        return any(k.startswith("depth_head.") for k in self.tensors)


# --- networks in memory -------------------------------------------------------------------------------------------


def shapes_only() -> bool:
    """Whether networks are being built under `torch.device("meta")`: of any size, in no memory, with no values."""
    return torch.get_default_device().type == "meta"


@torch.no_grad()
def materialise(module: nn.Module) -> None:
    """Give a module built on the meta device CPU memory filled with NaN."""
    module.to_empty(device="cpu")
    for tensor in module.state_dict().values():
        tensor.fill_(float("nan"))


def require_finite(module: nn.Module, source: str) -> None:
    """Raises WeightsError naming the first tensors that are not finite: never set, or broken in the file."""
    _require_finite(module.state_dict(), source)


def _require_finite(tensors: Mapping[str, Tensor], source: str) -> None:
    # As float32, which float64's values may not fit into.
    broken = [name for name, tensor in tensors.items() if not tensor.float().isfinite().all()]
    if broken:
        raise WeightsError(f"{source}: not finite (NaN or infinite) in {some(broken)}; this file cannot be used")


def official_state(module: nn.Module) -> Tensors:
    """A network's or an encoder's tensors under official names (an encoder's without `pretrained.`)."""
    return layouts.unpack_swiglu(module.state_dict())


def _names_in_memory(tensors: Mapping[str, Tensor]) -> Tensors:
    return {k.replace(".mlp.w12.", ".mlp.fc1.").replace(".mlp.w3.", ".mlp.fc2."): v for k, v in tensors.items()}


def fingerprint(tensors: Mapping[str, Tensor], preset: Preset) -> str:
    """sha256 (hex) over the tensors and over what tensors cannot say: heads, taps, head, max_depth, position mode.

    Tensors enter by official name and shape, and by value as float32. The five that nothing reads are left out. So it
    is the same whatever format a network came in.
    """
    facts: dict[str, Any] = {
        "heads": preset.heads,
        "taps": list(preset.taps),
        "head": [preset.head, preset.head_stride],
        "max_depth_m": preset.max_depth_m,
        "position_mode": preset.position_mode,
    }
    if preset.fusion != "interpolate":
        facts["fusion"] = preset.fusion
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        if name not in UNUSED:
            tensor = tensor.detach().cpu().float().contiguous()
            digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


# --- reading ------------------------------------------------------------------------------------------------------


def open_weights(path: str | os.PathLike[str], ema: bool | None = None) -> Source:
    """Read a path and find out what it is. Raises WeightsError."""
    contents = files.read(path, ema)
    layout = layouts.recognise(contents.tensors)
    if layout is None:
        raise WeightsError(f"{contents.path}: {_foreign(contents.tensors)}")
    recorded, digest = _recorded(contents)
    tensors = layouts.to_official(contents.tensors, layout)
    return Source(contents=contents, layout=layout, tensors=tensors, preset=recorded, fingerprint=digest)


def _recorded(contents: files.Contents) -> tuple[Preset | None, str | None]:
    """Preset and fingerprint out of our own facts, or the preset out of a Hugging Face config.json."""
    try:
        theirs = None
        if contents.config is not None and contents.config.get("model_type") == "depth_anything":
            theirs = preset_from_config(contents.config)
        if contents.record is None:
            return theirs, None
        record = dict(contents.record)
        version, digest = record.pop("format_version", None), record.pop("fingerprint", None)
        if version != FORMAT_VERSION:
            raise ValueError(f"format_version is {version}, expected {FORMAT_VERSION}: not a folder of ours")
        ours = Preset.from_config(record)
        what = ("heads", "taps", "head", "max_depth_m")
        if theirs is not None and any(getattr(theirs, field) != getattr(ours, field) for field in what):
            raise ValueError(f"config.json describes {theirs.name}, but the weights were saved as {ours.name}")
        return ours, digest
    except (ValueError, TypeError, AttributeError, ArithmeticError) as error:
        where = contents.path
        if os.path.isdir(where):
            where = os.path.join(where, "manifest.json" if "training" in contents.container else "config.json")
        raise WeightsError(f"{where}: {one_line(error, 200)}") from error


def choose_preset(source: Source, preset: str | Preset | None, position_mode: PositionMode | None = None) -> Preset:
    """The preset asked for, else the one recorded, else the only one that fits; with its position mode.

    The mode is the one asked for, else the recorded one, else the layout's. Raises WeightsError.
    """
    chosen = _choose(source, preset)
    if position_mode is None and source.preset is not None:
        position_mode = source.preset.position_mode
    if position_mode is None and not isinstance(preset, Preset):
        position_mode = source.layout.position_mode
    if position_mode not in (None, "official", "exact"):
        raise WeightsError(f"position_mode is {position_mode!r}; allowed: official, exact")
    return chosen if position_mode is None else replace(chosen, position_mode=position_mode)


def _choose(source: Source, preset: str | Preset | None) -> Preset:
    # The tensors say by themselves whether the class token is read out.
    projects = any(k.startswith("depth_head.readout_projects.") for k in source.tensors)
    if preset is not None:
        asked = get_preset(preset)
        if projects:
            asked = replace(asked, readout="project")
        if not isinstance(preset, Preset) and source.preset is not None:
            asked = replace(asked, fusion=source.preset.fusion)
        if source.preset is not None and not source.preset.same_network(asked):
            found, wanted = source.preset.config(), asked.config()
            unlike = [k for k in found if found[k] != wanted[k] and k != "position_mode"]
            what = f" ({some(unlike)} differ)" if found["preset"] == wanted["preset"] else ""
            raise WeightsError(
                f"{source.path}: was saved as {source.preset.name}, not {asked.name}{what}; leave preset out"
            )
        return asked
    if source.preset is not None:
        return source.preset
    if not source.has_decoder:
        raise WeightsError(f"{source.path}: {_only_encoder(source)}")
    fitting = candidates(source)
    if len(fitting) == 1:
        return replace(get_preset(fitting[0]), readout="project" if projects else "ignore")
    if fitting:
        raise WeightsError(
            f"{source.path}: the file cannot tell which network it is; name the preset (--preset, preset=), one of "
            + ", ".join(fitting)
        )
    raise WeightsError(f"{source.path}: no preset has these shapes; is the file complete?")


def candidates(source: Source) -> list[str]:
    """Names of the presets that a file can be: its layout allows them and its shapes fit."""
    return [name for name in fitting_presets(source.tensors) if source.layout.holds(PRESETS[name])]


def fitting_presets(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the presets whose encoder, and decoder if there is one, have the shapes of these official tensors."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    token, positions = (shapes.get(f"pretrained.{n}", ()) for n in ("cls_token", "pos_embed"))
    if len(token) != 3 or len(positions) != 3:
        return []
    numbers = (re.match(r"pretrained\.blocks\.(\d+)\.", k) for k in shapes)
    depth = 1 + max((int(m[1]) for m in numbers if m), default=-1)
    decoder = [shapes.get(f"depth_head.scratch.{k}.weight") for k in ("layer1_rn", "output_conv2.0")]

    def fits(p: Preset) -> bool:
        same_encoder = (p.width, p.depth, p.grid**2 + 1) == (token[2], depth, positions[1])
        return same_encoder and decoder in (
            [None, None],
            [(p.features, p.out_channels[0], 3, 3), (p.head_channels, p.features // 2, 3, 3)],
        )

    return [name for name, preset in PRESETS.items() if fits(preset)]


def check_fingerprint(source: Source, tensors: Mapping[str, Tensor]) -> None:
    """Raises WeightsError when the tensors are not those that were saved."""
    if source.fingerprint is None or source.preset is None:
        return
    if fingerprint(tensors, source.preset) != source.fingerprint:
        raise WeightsError(f"{source.path}: the weights do not match the fingerprint saved with them; copy it again")


def load_network(
    net: DepthAnything, source: Source, *, allow_missing: Sequence[str] = (), allow_unexpected: Sequence[str] = ()
) -> LoadReport:
    """Copy a file into a network, and say what matched.

    Args:
        net: the network; its values stay where a tensor is allowed to be missing.
        source: the file.
        allow_missing, allow_unexpected: shell patterns of official names.

    Raises:
        WeightsError: names and shapes are not equal, but for these, or a value is not finite; before anything is
            copied.
    """
    if not source.has_decoder and not allow_missing:
        raise WeightsError(f"{source.path}: {_only_encoder(source)}")
    report, tensors = match(source, official_state(net), net.preset, allow_missing, allow_unexpected)
    net.load_state_dict(_names_in_memory(tensors), strict=True)
    return report


def load_encoder(encoder: Encoder, path: str | os.PathLike[str]) -> LoadReport:
    """Copy an encoder's file (DINOv2, timm, Hugging Face), or a whole network's encoder, into an encoder.

    Raises WeightsError, before anything is copied.
    """
    source = open_weights(path)
    source = replace(source, tensors={k: v for k, v in source.tensors.items() if not k.startswith("depth_head.")})
    wanted = {f"pretrained.{k}": v for k, v in official_state(encoder).items()}
    report, tensors = match(source, wanted, encoder.preset)
    encoder.load_state_dict(_names_in_memory({k.removeprefix("pretrained."): v for k, v in tensors.items()}))
    return report


def match(
    source: Source,
    wanted: Mapping[str, Tensor],
    preset: Preset,
    allow_missing: Sequence[str] = (),
    allow_unexpected: Sequence[str] = (),
) -> tuple[LoadReport, Tensors]:
    """What to load, for every name that is wanted. Raises WeightsError, saying all that does not fit."""
    found = source.tensors
    absent = [k for k in wanted if k not in found]
    filled = [k for k in absent if k in UNUSED]
    kept = [k for k in absent if k not in UNUSED and _matches(k, allow_missing)]
    surplus = [k for k in found if k not in wanted]
    ignored = [k for k in surplus if _matches(k, allow_unexpected)]
    both = [k for k in wanted if k in found]
    problems = {
        "missing": [k for k in absent if k not in filled and k not in kept],
        "unexpected": [k for k in surplus if k not in ignored],
        "of another shape": [
            f"{k} {list(found[k].shape)} for {list(wanted[k].shape)}" for k in both if found[k].shape != wanted[k].shape
        ],
        "not floating point": [k for k, v in found.items() if not v.is_floating_point() and k not in ignored],
    }
    if any(problems.values()):
        parts = ", ".join(f"{len(names)} {what} ({some(names)})" for what, names in problems.items() if names)
        raise WeightsError(f"{source.path}: does not fit preset {preset.name}: {parts}; {_advice(source, preset)}")
    _require_finite({k: found[k] for k in both}, source.path)
    report = LoadReport(
        path=source.path, container=source.contents.container, layout=source.layout.name, preset=preset.name,
        matched=len(both), filled=tuple(filled), missing=tuple(kept), unexpected=tuple(ignored),
    )  # fmt: skip
    # Nothing reads what is filled: zero, not random, so that a file imported twice is the same.
    zeros = {k: torch.zeros_like(wanted[k], device="cpu") for k in filled}
    return report, {k: found[k] if k in found else zeros.get(k, wanted[k]) for k in wanted}


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


_REGISTERS = "a DINOv2 with register tokens; Depth Anything uses the one without"


def _has_registers(source: Source) -> bool:
    return any(k.endswith(("register_tokens", "reg_token")) for k in source.tensors)


def _advice(source: Source, preset: Preset) -> str:
    if _has_registers(source):
        return _REGISTERS
    fitting = fitting_presets(source.tensors)
    if preset.name in fitting:
        return "its sizes are this preset's: is the file complete, and a Depth Anything's?"
    if fitting:
        return f"this file fits preset {', '.join(fitting)}"
    return "no preset has these shapes; is the file complete?"


def _only_encoder(source: Source) -> str:
    if _has_registers(source):
        return _REGISTERS
    return "only an encoder, no depth_head; use from_preset(..., encoder_weights=...) with the preset of its size"


def _foreign(tensors: Mapping[str, Tensor]) -> str:
    return (
        f"not such a network by its names ({some(list(tensors))}); expected the authors' (pretrained.*, depth_head.*), "
        "Hugging Face's, Distill-Any-Depth's, muggled_dpt's, or an encoder's (DINOv2, timm)"
    )
