"""Depth metrics, the alignment of relative predictions, and their mean over images.

Maps are torch tensors or numpy arrays of one image; everything is computed on the CPU in float64. Shape suffixes: H W
pixels, K valid pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

Map = torch.Tensor | NDArray[Any]
Space = Literal["depth", "disparity"]

FLAT = 1e-20  # a variance below FLAT * mean square is rounding: the map is constant
SMALLEST = 1e-6  # a prediction is raised to this before ratios and logarithms; an aligned disparity may be negative


def align_scale_shift(pred_HW: Map, target_HW: Map, valid_HW: Map) -> tuple[float, float]:
    """Least squares over the valid pixels: the (scale, shift) that minimise sum (scale * pred + shift - target)^2.

    The scale may come out negative. A constant prediction gives (0, mean target); no valid pixel gives (1, 0); a value
    that is not finite gives NaN.

    Args:
        pred_HW: prediction, any unit.
        target_HW: target, any unit, same shape.
        valid_HW: bool (anything else: valid where not 0), same shape.

    Raises:
        ValueError: the shapes differ.

    Source: MiDaS (arXiv 1907.01341), eq. 4.
    """
    pred_K, target_K = _valid_values(pred_HW, target_HW, valid_HW)
    return _fit(pred_K, target_K)


def depth_metrics(
    pred_HW: Map, target_HW: Map, valid_HW: Map, *, clamp: tuple[float, float] | None = None
) -> dict[str, float]:
    """Error and accuracy of one image, over the valid pixels whose target is finite and positive.

    abs_rel, sq_rel, rmse, rmse_log, log10, silog (lower is better), delta1, delta2, delta3 (the fraction whose ratio to
    the target is below 1.25, 1.25^2, 1.25^3). rmse and sq_rel have the maps' unit. Ratios and logarithms see the
    prediction raised to 1e-6, so a prediction that is not positive misses every delta. NaN gives NaN.

    Args:
        pred_HW: prediction in the target's unit: depth in metres, or aligned disparity.
        target_HW: ground truth, same shape.
        valid_HW: bool (anything else: valid where not 0), same shape.
        clamp: limits applied to the prediction first, in its unit.

    Returns:
        The metrics by name; {} when there is no such pixel, which `MetricMean` counts as a skipped image.

    Raises:
        ValueError: the shapes differ.

    Source: Eigen et al. 2014 (arXiv 1406.2283), section 4; silog as in Depth Anything V2's metric_depth/util/metric.py.
    """
    pred_K, target_K = _measured_values(pred_HW, target_HW, valid_HW)
    if clamp is not None:
        pred_K = np.clip(pred_K, *clamp)
    return _metrics(pred_K, target_K)


def relative_depth_metrics(
    pred_disparity_HW: Map,
    depth_m_HW: Map,
    valid_HW: Map,
    max_depth: float | None = None,
    space: Space = "depth",
) -> dict[str, float]:
    """Metrics of a relative prediction after aligning scale and shift to 1 / depth, per image. Two protocols exist.

    "depth": aligned disparity is raised to 1 / max_depth, inverted, and compared with the depth in metres (MiDaS; the
    evaluation of MoGe, with max_depth the deepest valid pixel). "disparity": the aligned disparity itself is compared
    with 1 / depth (the tables of Depth Anything V1 and V2). Their numbers cannot be compared with each other.

    Args:
        pred_disparity_HW: predicted disparity, any scale and shift, larger is nearer.
        depth_m_HW: ground truth in metres, same shape.
        valid_HW: bool, same shape. Should leave out what is deeper than max_depth.
        max_depth: metres; None: the deepest valid pixel. Used by "depth" only.
        space: "depth" | "disparity".

    Returns:
        As `depth_metrics`; in "disparity" rmse and sq_rel are in 1 / metres.

    Raises:
        ValueError: the shapes differ, `space` is unknown or max_depth is not positive.

    Source: MiDaS (arXiv 1907.01341); Depth Anything V1 (arXiv 2401.10891), appendix.
    """
    pred_K, depth_K = _measured_values(pred_disparity_HW, depth_m_HW, valid_HW)
    scale, shift = _fit(pred_K, _inverse(depth_K))
    with np.errstate(invalid="ignore"):
        return _metrics_of_disparity(scale * pred_K + shift, depth_K, max_depth, space)


def best_constant_metrics(
    depth_m_HW: Map, valid_HW: Map, max_depth: float | None = None, space: Space = "depth"
) -> dict[str, float]:
    """What an image without any content would score: the prediction is the median of its valid disparities.

    Arguments, result and errors as in `relative_depth_metrics`. A prediction worth anything is better than this.
    """
    _, depth_K = _measured_values(depth_m_HW, depth_m_HW, valid_HW)
    disparity_K = _inverse(depth_K)
    median = float(np.median(disparity_K)) if disparity_K.size else 0.0
    return _metrics_of_disparity(np.full_like(disparity_K, median), depth_K, max_depth, space)


@dataclass
class MetricMean:
    """Means over images, each image counting the same however many pixels it has. Mergeable and picklable.

    `skipped` counts images that had nothing to measure. An image whose metric is NaN makes the mean NaN.
    """

    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    images: int = 0
    skipped: int = 0

    def add(self, metrics: Mapping[str, float]) -> None:
        """Add one image; {} is a skipped one."""
        if not metrics:
            self.skipped += 1
            return
        self.images += 1
        for name, value in metrics.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(value)
            self.counts[name] = self.counts.get(name, 0) + 1

    def merge(self, other: MetricMean) -> None:
        """Add the images of `other`, for example another rank's."""
        for name, value in other.sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
            self.counts[name] = self.counts.get(name, 0) + other.counts[name]
        self.images += other.images
        self.skipped += other.skipped

    def mean(self) -> dict[str, float]:
        """Mean per metric; {} before the first image."""
        return {name: total / self.counts[name] for name, total in self.sums.items()}


def _fit(pred_K: NDArray[np.float64], target_K: NDArray[np.float64]) -> tuple[float, float]:
    if pred_K.size == 0:
        return 1.0, 0.0
    with np.errstate(invalid="ignore"):
        pred_mean, target_mean = float(pred_K.mean()), float(target_K.mean())
        centred_K = pred_K - pred_mean  # centred, because the normal equations cancel when the mean is large
        variance = float(np.mean(centred_K**2))
        if variance <= FLAT * float(np.mean(pred_K**2)):
            return 0.0, target_mean
        scale = float(np.mean(centred_K * (target_K - target_mean))) / variance
    return scale, target_mean - scale * pred_mean


def _metrics_of_disparity(
    disparity_K: NDArray[np.float64], depth_K: NDArray[np.float64], max_depth: float | None, space: Space
) -> dict[str, float]:
    if space not in ("depth", "disparity"):
        raise ValueError(f"space must be 'depth' or 'disparity', got {space!r}")
    if max_depth is not None and not max_depth > 0:
        raise ValueError(f"max_depth must be positive metres, got {max_depth}")
    if depth_K.size == 0:
        return {}
    if space == "disparity":
        return _metrics(disparity_K, _inverse(depth_K))
    deepest = float(depth_K.max()) if max_depth is None else max_depth
    return _metrics(_inverse(np.maximum(disparity_K, 1.0 / deepest)), depth_K)


def _metrics(pred_K: NDArray[np.float64], target_K: NDArray[np.float64]) -> dict[str, float]:
    if pred_K.size == 0:
        return {}
    with np.errstate(invalid="ignore", over="ignore"):
        error_K = pred_K - target_K
        positive_K = np.maximum(pred_K, SMALLEST)
        ratio_K = np.maximum(positive_K / target_K, target_K / positive_K)
        log_K = np.log(positive_K) - np.log(target_K)
        log_variance = np.mean(log_K**2) - 0.5 * np.mean(log_K) ** 2
        result = {
            "abs_rel": np.mean(np.abs(error_K) / target_K),
            "sq_rel": np.mean(error_K**2 / target_K),
            "rmse": np.sqrt(np.mean(error_K**2)),
            "rmse_log": np.sqrt(np.mean(log_K**2)),
            "log10": np.mean(np.abs(log_K)) / np.log(10.0),
            "silog": np.sqrt(log_variance),
        }
        poison = 0.0 if np.isfinite(pred_K).all() else np.nan  # NaN < 1.25 is False, which would count as a mere miss
        for i in (1, 2, 3):
            result[f"delta{i}"] = np.mean(ratio_K < 1.25**i) + poison
    return {name: float(value) for name, value in result.items()}


def _inverse(x_K: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.reciprocal(x_K)


def _measured_values(pred_HW: Map, target_HW: Map, valid_HW: Map) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Values of the valid pixels whose target is a measurement: finite and positive."""
    pred_K, target_K = _valid_values(pred_HW, target_HW, valid_HW)
    measured_K = np.isfinite(target_K) & (target_K > 0)
    return pred_K[measured_K], target_K[measured_K]


def _valid_values(pred_HW: Map, target_HW: Map, valid_HW: Map) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    pred, target, valid = _array(pred_HW), _array(target_HW), _array(valid_HW) != 0
    if not pred.shape == target.shape == valid.shape:
        raise ValueError(
            f"prediction, target and valid must have one shape, got {pred.shape}, {target.shape}, {valid.shape}"
        )
    return pred[valid], target[valid]


def _array(x: Map) -> NDArray[np.float64]:
    if isinstance(x, torch.Tensor):
        x = x.detach().to("cpu", torch.float64).numpy()
    return np.asarray(x, dtype=np.float64)
