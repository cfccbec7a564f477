"""Networks and weights: images in, depth out. Imports nothing of the other rooms, and no torch until it is needed."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from model.depth_anything import DepthAnything
    from model.preprocess import IMAGENET_MEAN, IMAGENET_STD, lower_bound_size
    from model.presets import PRESETS, Preset, get_preset
    from model.types import DepthPrediction, WeightsError
    from model.vit import Encoder

_HOME = {
    "DepthAnything": "model.depth_anything",
    "Encoder": "model.vit",
    "DepthPrediction": "model.types",
    "WeightsError": "model.types",
    "PRESETS": "model.presets",
    "Preset": "model.presets",
    "get_preset": "model.presets",
    "IMAGENET_MEAN": "model.preprocess",
    "IMAGENET_STD": "model.preprocess",
    "lower_bound_size": "model.preprocess",
}

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "PRESETS",
    "DepthAnything",
    "DepthPrediction",
    "Encoder",
    "Preset",
    "WeightsError",
    "get_preset",
    "lower_bound_size",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
