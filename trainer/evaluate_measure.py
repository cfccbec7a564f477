"""One image under one protocol: this is what the fields of trainer/protocols.py mean.

Shape suffixes: H W pixels, K valid pixels.
"""

from __future__ import annotations

import numpy as np

from trainer.metrics import (
    SMALLEST,
    Map,
    Moments,
    Values,
    best_constant,
    fit_absolute,
    fit_squares,
    measured_values,
    moments,
)
from trainer.protocols import Protocol


def measure(
    protocol: Protocol,
    pred_HW: Map,
    depth_m_HW: Map,
    valid_HW: Map,
    *,
    metric: bool = False,
    min_depth_m: float = 0.0,
    max_depth_m: float | None = None,
) -> Moments:
    """Moments of one image (`trainer.metrics.metrics_of` makes metrics of them); {} when no pixel can be measured.

    Args:
        pred_HW: disparity of any scale and shift (larger is nearer), or metres when `metric`.
        depth_m_HW: ground truth in metres, same shape.
        valid_HW: bool, same shape: the pixels that count. What is beyond the limits should not be among them.
        min_depth_m, max_depth_m: the benchmark's limits, for protocols that clip to them.

    Raises:
        ValueError: the shapes differ, the protocol needs metres or a cap and has none, or the cap is not positive.
    """
    check(protocol, metric=metric, max_depth_m=max_depth_m)
    pred_K, depth_K = measured_values(pred_HW, depth_m_HW, valid_HW)
    if pred_K.size == 0:
        return {}
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        if protocol.align == "disparity":
            found = _in_disparity(protocol, pred_K, depth_K, metric, (min_depth_m, max_depth_m))
        else:
            if protocol.align == "depth":
                scale, shift = _fit(protocol, pred_K, depth_K)
                pred_K = scale * pred_K + shift
            found = moments(_clipped(protocol, pred_K, min_depth_m, max_depth_m), depth_K)
    return {**found, "bad_pixel": 1 - found["delta1"]} if protocol.bad_pixel else found


def check(protocol: Protocol, *, metric: bool, max_depth_m: float | None) -> None:
    """Whether `measure` can be asked for this. Raises ValueError that says what is missing."""
    if protocol.needs_metres and not metric:
        raise ValueError(
            f"protocol {protocol.name!r} compares depths, this network predicts disparity; use 'marigold-disparity', "
            "'depth' or 'disparity'"
        )
    if max_depth_m is not None and not max_depth_m > 0:
        raise ValueError(f"max_depth must be positive metres, got {max_depth_m}")
    if protocol.needs_cap and max_depth_m is None:
        raise ValueError(f"protocol {protocol.name!r} needs a cap; set max_depth, or name a benchmark that has one")


def constant(depth_m_HW: Map, valid_HW: Map) -> Moments:
    """The best that one depth for the whole image could score, in metres; each metric has its own best depth.

    A network worth its name is better than this, although this has seen the truth.
    """
    return best_constant(measured_values(depth_m_HW, depth_m_HW, valid_HW)[1])


def _in_disparity(
    protocol: Protocol, pred_K: Values, depth_K: Values, metric: bool, limits: tuple[float, float | None]
) -> Moments:
    """Aligned to 1 / depth, compared there or, inverted, in metres. A depth is inverted first."""
    disparity_K = 1 / np.maximum(pred_K, SMALLEST) if metric else pred_K
    scale, shift = _fit(protocol, disparity_K, 1 / depth_K)
    aligned_K = scale * disparity_K + shift
    if protocol.compare == "disparity":
        return moments(aligned_K, 1 / depth_K)
    floor = protocol.floor
    if floor in ("cap", "cap or truth") and limits[1] is not None:
        least = 1 / limits[1]
    elif isinstance(floor, float):
        least = floor
    else:
        least = 1 / float(depth_K.max())
    return moments(_clipped(protocol, 1 / np.maximum(aligned_K, least), *limits), depth_K)


def _fit(protocol: Protocol, pred_K: Values, target_K: Values) -> tuple[float, float]:
    if protocol.fit_positive:
        keep_K = ~(pred_K <= 0)  # NaN stays and shows
        pred_K, target_K = pred_K[keep_K], target_K[keep_K]
    return (fit_absolute if protocol.robust else fit_squares)(pred_K, target_K)


def _clipped(protocol: Protocol, depth_K: Values, min_depth_m: float, max_depth_m: float | None) -> Values:
    if not protocol.clip:
        return depth_K
    return np.maximum(np.clip(depth_K, min_depth_m, max_depth_m), SMALLEST)
