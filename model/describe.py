"""What a weights file is, without building the network: for `fathom weights show`."""

from __future__ import annotations

import math
import os
from collections import Counter
from typing import Any

import torch

from model import weights
from model.depth_anything import DepthAnything
from model.layouts import LAYOUTS
from model.presets import PositionMode, Preset
from model.types import UNUSED, WeightsError


def describe(
    path: str | os.PathLike[str],
    preset: str | None = None,
    *,
    position_mode: PositionMode | None = None,
    ema: bool | None = None,
) -> dict[str, Any]:
    """Everything a file says about its network, as JSON values.

    `preset` is None where the file cannot tell; `candidates` names those that fit. With a preset come its facts, what
    matched, and the fingerprint; `problem` says why the file would not load.

    Raises:
        WeightsError: no file, not tensors, or no network's names.
    """
    source = weights.open_weights(path, ema)
    parameters = Counter[str]()
    for name, tensor in source.tensors.items():
        parameters["encoder" if name.startswith("pretrained.") else "decoder"] += math.prod(tensor.shape)
    told: dict[str, Any] = {
        "path": source.path,
        "container": source.contents.container,
        "layout": source.layout.name,
        "names": LAYOUTS[source.layout.name].title,
        "tensors": len(source.tensors),
        "dtypes": sorted({str(t.dtype).removeprefix("torch.") for t in source.contents.tensors.values()}),
        "parameters": {**parameters, "total": parameters.total()},
        "unused": sorted(set(source.tensors) & UNUSED),
        "has_decoder": source.has_decoder,
        "recorded": source.preset.name if source.preset is not None else None,
        "candidates": weights.candidates(source),
        "preset": None,
    }
    if source.has_decoder and (preset or source.preset or len(told["candidates"]) == 1):
        told |= _as(source, weights.choose_preset(source, preset, position_mode))
    return told


def _as(source: weights.Source, preset: Preset) -> dict[str, Any]:
    told: dict[str, Any] = {
        "preset": preset.name,
        "taps": list(preset.taps),
        "head": preset.head,
        "max_depth_m": preset.max_depth_m,
        "position_mode": preset.position_mode,
        "readout": preset.readout,
        "fusion": preset.fusion,
        "problem": None,
    }
    with torch.device("meta"):
        net = DepthAnything(preset)
    try:
        report, tensors = weights.match(source, weights.official_state(net), preset)
        weights.check_fingerprint(source, tensors)
    except WeightsError as error:
        return told | {"problem": str(error)}
    return told | {
        "matched": report.matched,
        "filled": list(report.filled),
        "fingerprint": weights.fingerprint(tensors, preset),
    }
