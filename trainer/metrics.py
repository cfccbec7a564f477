"""Depth metrics and the alignment of predictions that know no scale. numpy alone, in float64.

Maps are numpy arrays or torch tensors of one image. What belongs to which benchmark is in trainer/protocols.py.
Shape suffixes: H W pixels, K valid pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

Map: TypeAlias = "torch.Tensor | NDArray[Any]"
Values = NDArray[np.float64]
Moments = dict[str, float]  # means over an image's valid pixels, and "pixels", their number

FLAT = 1e-20  # a variance below FLAT * mean square is rounding: the map is constant
SMALLEST = 1e-6  # a prediction is raised to this before ratios and logarithms; an aligned disparity may be negative
ROUNDS = 100  # at most, of the robust fit
SETTLED = 1e-10  # the robust fit ends when a round moves no residual by more than this, over the target's extent


def align_scale_shift(
    pred_HW: Map, target_HW: Map, valid_HW: Map, *, weight_HW: Map | None = None, robust: bool = False
) -> tuple[float, float]:
    """The (scale, shift) that bring a prediction to the target: minimise sum w (scale * pred + shift - target)^2.

    The scale may come out negative. A constant prediction gives (0, mean target); no valid pixel, or no weight, gives
    (1, 0); a value that is not finite gives NaN.

    Args:
        pred_HW: prediction, any unit.
        target_HW: target, any unit, same shape.
        valid_HW: bool (anything else: valid where not 0), same shape.
        weight_HW: w, not negative, same shape; None: 1 everywhere. What has weight 0 is not looked at.
        robust: minimise sum w |scale * pred + shift - target| in place of the squares: what is far off counts no more
            than its distance. For a truth with gross errors; no published protocol uses it.

    Raises:
        ValueError: the shapes differ, or a valid pixel's weight is negative.

    Source: MiDaS (arXiv 1907.01341), eq. 4. Robust: least absolute deviations by reweighted least squares,
    Schlossmacher 1973 (J. Am. Stat. Assoc. 68, 857-859).
    """
    maps = [pred_HW, target_HW] if weight_HW is None else [pred_HW, target_HW, weight_HW]
    pred_K, target_K, *weights = valid_values(maps, valid_HW)
    weight_K = weights[0] if weights else None
    if weight_K is not None:
        if (weight_K < 0).any():
            raise ValueError(f"weight_HW must not be negative, found {weight_K.min()}")
        pred_K, target_K, weight_K = (x_K[weight_K != 0] for x_K in (pred_K, target_K, weight_K))
    return fit_absolute(pred_K, target_K, weight_K) if robust else fit_squares(pred_K, target_K, weight_K)


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
        The metrics by name; {} when there is no such pixel.

    Raises:
        ValueError: the shapes differ.

    Source: Eigen et al. 2014 (arXiv 1406.2283), section 4; silog as in Depth Anything V2's metric_depth/util/metric.py.
    """
    pred_K, target_K = measured_values(pred_HW, target_HW, valid_HW)
    if clamp is not None:
        pred_K = np.clip(pred_K, *clamp)
    return metrics_of(moments(pred_K, target_K))


def moments(pred_K: Values, target_K: Values) -> Moments:
    """What `metrics_of` needs to know of one image; {} without a pixel. Targets must be finite and positive."""
    if pred_K.size == 0:
        return {}
    with np.errstate(invalid="ignore", over="ignore"):
        error_K = pred_K - target_K
        positive_K = np.maximum(pred_K, SMALLEST)
        ratio_K = np.maximum(positive_K / target_K, target_K / positive_K)
        log_K = np.log(positive_K) - np.log(target_K)
        result = {
            "abs_rel": np.mean(np.abs(error_K) / target_K),
            "sq_rel": np.mean(error_K**2 / target_K),
            "square": np.mean(error_K**2),
            "log_square": np.mean(log_K**2),
            "log_abs": np.mean(np.abs(log_K)),
            "log": np.mean(log_K),
        }
        poison = 0.0 if np.isfinite(pred_K).all() else np.nan  # NaN < 1.25 is False, which would count as a mere miss
        for i in (1, 2, 3):
            result[f"delta{i}"] = np.mean(ratio_K < 1.25**i) + poison
    return {"pixels": float(pred_K.size), **{name: float(value) for name, value in result.items()}}


def best_constant(target_K: Values) -> Moments:
    """Moments of the best that one number for all pixels can reach, for each metric by the number that is best for it.

    By calculus: abs_rel, the median weighted by 1 / target; sq_rel, the harmonic mean; rmse, the mean; rmse_log and
    silog, the geometric mean; log10, the median; a delta, the number with most targets within its factor. {} without a
    target. Targets must be finite and positive.
    """
    if target_K.size == 0:
        return {}
    sorted_K = np.sort(target_K)
    inverse_K, log_K = 1 / sorted_K, np.log(sorted_K)
    found = {
        "abs_rel": np.mean(np.abs(_weighted_median(sorted_K, inverse_K) * inverse_K - 1)),
        "sq_rel": np.mean((1 / np.mean(inverse_K) - sorted_K) ** 2 * inverse_K),
        "square": np.var(sorted_K),
        "log_square": np.var(log_K),
        "log_abs": np.mean(np.abs(np.log(np.median(sorted_K)) - log_K)),
        "log": 0.0,
    }
    for i in (1, 2, 3):  # a number has all targets in the open interval from c / 1.25^i to c * 1.25^i
        behind_K = np.searchsorted(sorted_K, sorted_K * 1.25 ** (2 * i), side="left")
        found[f"delta{i}"] = (behind_K - np.arange(sorted_K.size)).max() / sorted_K.size
    return {"pixels": float(sorted_K.size), **{name: float(value) for name, value in found.items()}}


def metrics_of(found: Moments) -> dict[str, float]:
    """The metrics of `depth_metrics` from means over pixels, of one image or of several together; {} from {}."""
    if not found or "accuracy" in found:  # pairs of points have an accuracy and nothing else
        return {name: value for name, value in found.items() if name != "pixels"}
    variance = found["log_square"] - 0.5 * found["log"] ** 2
    bad = {"bad_pixel": found["bad_pixel"]} if "bad_pixel" in found else {}
    return {
        "abs_rel": found["abs_rel"],
        "sq_rel": found["sq_rel"],
        "rmse": math.sqrt(found["square"]),
        "rmse_log": math.sqrt(found["log_square"]),
        "log10": found["log_abs"] / math.log(10.0),
        "silog": math.sqrt(max(variance, 0.0)) if math.isfinite(variance) else math.nan,
        **{name: found[name] for name in ("delta1", "delta2", "delta3")},
        **bad,
    }


def mean_over_images(images: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Mean of each metric, every image counting the same; {} of none. One NaN makes its mean NaN.

    The sums are exact (math.fsum), so the order of the images changes nothing.
    """
    rows = list(images)
    names = list(dict.fromkeys(name for row in rows for name in row))
    return {name: _mean([row[name] for row in rows if name in row]) for name in names}


def mean_over_pixels(images: Iterable[Moments]) -> dict[str, float]:
    """The metrics of all valid pixels taken together, every pixel counting the same; {} of none."""
    rows = [row for row in images if row]
    if not rows:
        return {}
    total = math.fsum(row["pixels"] for row in rows)
    pooled = {name: _sum([row[name] * row["pixels"] for row in rows]) / total for name in rows[0] if name != "pixels"}
    return metrics_of({**pooled, "pixels": total})


def fit_squares(pred_K: Values, target_K: Values, weight_K: Values | None = None) -> tuple[float, float]:
    """`align_scale_shift` on flat values, in closed form."""
    if pred_K.size == 0 or (weight_K is not None and not weight_K.any()):
        return 1.0, 0.0
    with np.errstate(invalid="ignore", over="ignore"):
        share_K = None if weight_K is None else weight_K / weight_K.max()  # as products of extreme weights overflow
        pred_mean, target_mean = _average(pred_K, share_K), _average(target_K, share_K)
        centred_K = pred_K - pred_mean  # centred, because the normal equations cancel when the mean is large
        variance = _average(centred_K**2, share_K)
        if variance <= FLAT * _average(pred_K**2, share_K):
            return 0.0, target_mean
        scale = _average(centred_K * (target_K - target_mean), share_K) / variance
    return scale, target_mean - scale * pred_mean


def fit_absolute(pred_K: Values, target_K: Values, weight_K: Values | None = None) -> tuple[float, float]:
    """`align_scale_shift(robust=True)` on flat values.

    Every round is a weighted least-squares fit with weights w / max(|residual|, floor); the floor, 1e-8 of the target's
    extent, keeps pixels that are met exactly from taking all the weight. The extent is the median distance from the
    median among the targets that are not the median: a standard deviation would be that of a single gross error.
    """
    scale, shift = fit_squares(pred_K, target_K, weight_K)
    empty = pred_K.size == 0 or (weight_K is not None and not weight_K.any())
    if empty or not math.isfinite(scale) or not math.isfinite(shift):
        return scale, shift
    extent = _extent(target_K, np.ones_like(target_K) if weight_K is None else weight_K / weight_K.max())
    spread = float(np.abs(pred_K).max())
    for _ in range(ROUNDS if extent > 0 else 0):
        residual_K = np.abs(scale * pred_K + shift - target_K)
        weight = 1 / np.maximum(residual_K, 1e-8 * extent)
        before = scale, shift
        scale, shift = fit_squares(pred_K, target_K, weight if weight_K is None else weight * weight_K)
        if abs(scale - before[0]) * spread + abs(shift - before[1]) <= SETTLED * extent:
            break
    return scale, shift


def measured_values(pred_HW: Map, target_HW: Map, valid_HW: Map) -> tuple[Values, Values]:
    """Values of the valid pixels whose target is a measurement: finite and positive. ValueError: shapes differ."""
    pred_K, target_K = valid_values([pred_HW, target_HW], valid_HW)
    measured_K = np.isfinite(target_K) & (target_K > 0)
    return pred_K[measured_K], target_K[measured_K]


def valid_values(maps: Sequence[Map], valid_HW: Map) -> list[Values]:
    """The valid pixels' values of each map, float64 [K]. ValueError when a shape differs from the others."""
    arrays = [_array(x) for x in (*maps, valid_HW)]
    if len({array.shape for array in arrays}) > 1:
        shapes = ", ".join(str(array.shape) for array in arrays)
        raise ValueError(f"prediction, target and valid must have one shape, got {shapes}")
    valid = arrays.pop() != 0
    return [array[valid] for array in arrays]


def _extent(value_K: Values, weight_K: Values) -> float:
    """Weighted median of the distances from the weighted median that are not 0; 0 of a constant."""
    distance_K = np.abs(value_K - _weighted_median(value_K, weight_K))
    apart_K = distance_K > 0
    return _weighted_median(distance_K[apart_K], weight_K[apart_K]) if apart_K.any() else 0.0


def _weighted_median(value_K: Values, weight_K: Values) -> float:
    """The smallest value with at least half of the weight at or below it."""
    order_K = np.argsort(value_K, kind="stable")
    below_K = np.cumsum(weight_K[order_K])
    return float(value_K[order_K[np.searchsorted(below_K, below_K[-1] / 2)]])


def _average(value_K: Values, weight_K: Values | None) -> float:
    return float(value_K.mean() if weight_K is None else np.sum(weight_K * value_K) / np.sum(weight_K))


def _sum(values: Sequence[float]) -> float:
    return math.fsum(values) if all(map(math.isfinite, values)) else sum(values)


def _mean(values: Sequence[float]) -> float:
    return _sum(values) / len(values)


def _array(x: Map) -> Values:
    if not isinstance(x, np.ndarray) and hasattr(x, "detach"):
        x = x.detach().cpu().double().numpy()
    return np.asarray(x, dtype=np.float64)
