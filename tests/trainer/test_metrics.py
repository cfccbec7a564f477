"""Alignment against numpy's least squares and an exhaustive search, every metric against its definition, and means."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.metrics import (
    align_scale_shift,
    best_constant,
    depth_metrics,
    mean_over_images,
    mean_over_pixels,
    metrics_of,
    moments,
)

# Each metric from its definition, with plain loops in float64: p the prediction, t the truth.
Pixels = list[tuple[float, float]]


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def _delta(power: int) -> Callable[[Pixels], float]:
    return lambda pixels: _mean([float(max(p / t, t / p) < 1.25**power) for p, t in pixels])


DEFINITIONS: dict[str, Callable[[Pixels], float]] = {
    "abs_rel": lambda pixels: _mean([abs(p - t) / t for p, t in pixels]),
    "sq_rel": lambda pixels: _mean([(p - t) ** 2 / t for p, t in pixels]),
    "rmse": lambda pixels: math.sqrt(_mean([(p - t) ** 2 for p, t in pixels])),
    "rmse_log": lambda pixels: math.sqrt(_mean([(math.log(p) - math.log(t)) ** 2 for p, t in pixels])),
    "log10": lambda pixels: _mean([abs(math.log10(p) - math.log10(t)) for p, t in pixels]),
    "silog": lambda pixels: math.sqrt(
        _mean([math.log(p / t) ** 2 for p, t in pixels]) - 0.5 * _mean([math.log(p / t) for p, t in pixels]) ** 2
    ),
    "delta1": _delta(1),
    "delta2": _delta(2),
    "delta3": _delta(3),
}


def scene(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A noisy relative disparity, the depth in metres, the valid pixels; garbage where not valid."""
    rng = np.random.default_rng(seed)
    depth = rng.uniform(1, 20, (13, 17))
    pred = 3 / depth + 2 + rng.normal(0, 0.05, depth.shape)
    valid = rng.random(depth.shape) > 0.3
    depth[~valid], pred[~valid] = np.nan, np.inf
    return pred.astype(np.float32), depth.astype(np.float32), valid


# Alignment


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    size=st.integers(2, 300),
    scale=st.floats(-1e3, 1e3),
    offset=st.floats(-1e3, 1e3),
    spread=st.floats(1e-2, 1e2),
    weighted=st.booleans(),
)
def test_alignment_is_numpys_least_squares(
    seed: int, size: int, scale: float, offset: float, spread: float, weighted: bool
) -> None:
    rng = np.random.default_rng(seed)
    pred = offset + spread * rng.normal(size=(1, size))
    target = scale * rng.normal(size=(1, size)) + pred
    weight = rng.uniform(0.1, 3, (1, size)) if weighted else None
    root = np.ones(size) if weight is None else np.sqrt(weight[0])
    middle = pred.mean()  # the reference's own condition is better about the middle; the fit there is the same line
    rows = np.stack([pred[0] - middle, np.ones(size)], 1) * root[:, None]
    (a, b), *_ = np.linalg.lstsq(rows, target[0] * root, rcond=None)
    got_scale, got_shift = align_scale_shift(pred, target, np.ones((1, size), bool), weight_HW=weight)
    magnitude = np.abs(target).max() / spread
    assert abs(got_scale - a) <= 1e-9 * max(abs(a), magnitude)
    at_middle = got_scale * middle + got_shift
    assert abs(at_middle - b) <= 1e-9 * max(abs(b), np.abs(target).max(), abs(got_scale * middle))


def test_alignment_sees_valid_pixels_only_and_takes_tensors() -> None:
    pred, depth, valid = scene()
    x, y = pred[valid].astype(float), 1 / depth[valid].astype(float)
    expected = np.linalg.lstsq(np.stack([x, np.ones_like(x)], 1), y, rcond=None)[0]
    disparity = np.where(valid, 1 / depth.astype(float), np.nan)
    assert align_scale_shift(pred, disparity, valid) == pytest.approx(tuple(expected), rel=1e-9)
    tensors = [torch.from_numpy(x) for x in (pred, disparity, valid)]
    assert align_scale_shift(*tensors) == align_scale_shift(pred, disparity, valid)
    half = torch.from_numpy(pred).bfloat16()
    assert align_scale_shift(half, disparity, valid)[0] == pytest.approx(expected[0], rel=0.1)


def test_alignment_recovers_scale_and_shift_far_from_zero() -> None:
    x = 1e6 + np.random.default_rng(1).random((5, 5))
    scale, shift = align_scale_shift(x, -2 * x + 7, np.ones((5, 5), bool))
    assert scale == pytest.approx(-2, rel=1e-6) and scale * 1e6 + shift == pytest.approx(-2e6 + 7)


def test_alignment_corners() -> None:
    target, everywhere = np.array([[1.0, 2.0, 6.0]]), np.ones((1, 3), bool)
    for robust in (False, True):
        assert align_scale_shift(np.full((1, 3), 0.1), target, everywhere, robust=robust)[0] == 0.0
        assert align_scale_shift(target, target, ~everywhere, robust=robust) == (1.0, 0.0)
        nan = align_scale_shift(np.array([[1.0, np.nan, 2.0]]), target, everywhere, robust=robust)
        assert all(map(math.isnan, nan))
    assert align_scale_shift(np.full((1, 3), 0.1), target, everywhere) == (0.0, pytest.approx(3.0))
    assert align_scale_shift(np.zeros((1, 3)), target, everywhere) == (0.0, pytest.approx(3.0))
    assert align_scale_shift(target, target, np.array([[True, False, False]])) == (0.0, 1.0)
    with pytest.raises(ValueError, match=r"\(1, 3\), \(3, 1\)"):
        align_scale_shift(target, target.T, everywhere)


def test_weights_count_as_repeated_pixels() -> None:
    rng = np.random.default_rng(2)
    pred, target, times = rng.random((1, 9)), rng.random((1, 9)), rng.integers(0, 4, (1, 9))
    repeated = [np.repeat(x, times[0], axis=1) for x in (pred, target)]
    everywhere = np.ones((1, 9), bool)
    got = align_scale_shift(pred, target, everywhere, weight_HW=times)
    assert got == pytest.approx(align_scale_shift(*repeated, np.ones_like(repeated[0], bool)), rel=1e-12)
    assert align_scale_shift(pred, target, everywhere, weight_HW=1e300 * times) == pytest.approx(got, rel=1e-12)
    assert align_scale_shift(pred, target, everywhere, weight_HW=0 * times) == (1.0, 0.0)
    with pytest.raises(ValueError, match="weight_HW must not be negative, found -1"):
        align_scale_shift(pred, target, everywhere, weight_HW=-np.ones((1, 9)))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_the_robust_fit_has_the_least_absolute_error(seed: int, weighted: bool) -> None:
    """A line of least absolute deviations goes through two of the points: try all pairs."""
    rng = np.random.default_rng(seed)
    pred, target = rng.normal(size=(1, 11)), rng.normal(size=(1, 11))
    weight = rng.uniform(0.2, 2, (1, 11)) if weighted else np.ones((1, 11))

    def error(scale: float, shift: float) -> float:
        return float(np.sum(weight * np.abs(scale * pred + shift - target)))

    best = math.inf
    for i, j in itertools.combinations(range(11), 2):
        scale = (target[0, i] - target[0, j]) / (pred[0, i] - pred[0, j])
        best = min(best, error(scale, target[0, i] - scale * pred[0, i]))
    everywhere = np.ones((1, 11), bool)
    robust = align_scale_shift(pred, target, everywhere, weight_HW=weight if weighted else None, robust=True)
    assert best <= error(*robust) <= best * (1 + 1e-3)
    assert error(*robust) < error(*align_scale_shift(pred, target, everywhere, weight_HW=weight))


def test_the_robust_fit_passes_over_gross_errors() -> None:
    rng = np.random.default_rng(3)
    pred = rng.random((20, 20))
    target = 4 * pred + 1
    target[rng.random((20, 20)) < 0.3] = 50.0
    everywhere = np.ones((20, 20), bool)
    assert align_scale_shift(pred, target, everywhere, robust=True) == pytest.approx((4, 1), abs=1e-6)
    assert align_scale_shift(pred, target, everywhere)[1] > 5


@pytest.mark.parametrize("robust", [False, True])
@pytest.mark.parametrize("value", [1e12, math.nan, math.inf])
def test_a_pixel_of_weight_0_is_not_looked_at(robust: bool, value: float) -> None:
    rng = np.random.default_rng(8)
    pred, target, weight = rng.random((1, 9)), rng.random((1, 9)), rng.uniform(0.1, 2, (1, 9))
    everywhere = np.ones((1, 9), bool)
    expected = align_scale_shift(pred[:, 1:], target[:, 1:], everywhere[:, 1:], weight_HW=weight[:, 1:], robust=robust)
    weight[0, 0] = 0
    for broken in (pred, target):
        kept, broken[0, 0] = broken[0, 0], value
        assert align_scale_shift(pred, target, everywhere, weight_HW=weight, robust=robust) == expected
        broken[0, 0] = kept


def test_a_pixel_of_next_to_no_weight_does_not_set_the_robust_fit_s_floor() -> None:
    """With the standard deviation as the extent, every residual is below the floor, and the fit one of squares."""
    rng = np.random.default_rng(9)
    pred = rng.random((1, 101))
    target, weight = 4 * pred + 1, np.ones((1, 101))
    target[0, 1:31] += 50.0  # what the robust fit is for
    target[0, 0], weight[0, 0] = 1e12, 1e-6
    found = align_scale_shift(pred, target, np.ones((1, 101), bool), weight_HW=weight, robust=True)
    assert found == pytest.approx((4, 1), abs=1e-6)


# The best constant


def tried(target: np.ndarray) -> np.ndarray:
    """Constants to try: a fine geometric grid, the targets, and what lies halfway between two of them."""
    grid = np.geomspace(target.min() / 2, target.max() * 2, 4001)
    between = [math.sqrt(a * b) for a, b in itertools.combinations(target, 2)]
    return np.concatenate([grid, target, between])


@pytest.mark.parametrize(
    "target",
    [
        np.random.default_rng(10).uniform(0.5, 20, 23),
        np.random.default_rng(11).lognormal(0, 1.5, 24),
        np.array([1.0, 2.0, 4.0]),
        np.array([2.0, 2.0, 2.0, 5.0, 5.0, 9.0, 9.0, 9.0, 9.0, 1.0]),  # ties
        np.array([3.0, 3.0]),
        np.array([1.0, 1.5625]),  # 1.25^2 apart: no number is within both, as the limits do not count
        np.array([1.0, 1.5624]),
        np.array([7.3]),
    ],
    ids=["uniform", "log-normal", "three", "ties", "equal", "at the limit", "below the limit", "one"],
)
def test_no_constant_is_better_than_the_best(target: np.ndarray) -> None:
    found = metrics_of(best_constant(target))
    rows = [metrics_of(moments(np.full_like(target, value), target)) for value in tried(target)]
    assert found.keys() == DEFINITIONS.keys()
    for name in DEFINITIONS:
        values = [row[name] for row in rows]
        best = max(values) if name.startswith("delta") else min(values)
        if name.startswith("delta"):
            assert found[name] == best, name
        else:  # the grid may just miss the minimum
            assert found[name] <= best + 1e-12, name
            assert found[name] == pytest.approx(best, rel=1e-3, abs=1e-12), name


def test_a_pixel_that_stands_twice_weighs_twice() -> None:
    target = np.random.default_rng(12).uniform(0.5, 20, 9)
    times = np.random.default_rng(13).integers(1, 5, 9)
    order = np.random.default_rng(14).permutation(times.sum())
    repeated = best_constant(np.repeat(target, times)[order])
    assert repeated["pixels"] == times.sum()
    for name, power in {"square": 2, "sq_rel": 2, "abs_rel": 1}.items():
        value = np.concatenate([target, np.linspace(0.3, 25, 5001)])
        error = np.abs(value[:, None] - target) ** power / (1 if name == "square" else target)
        best = (error @ times / times.sum()).min()
        assert repeated[name] == pytest.approx(best, rel=1e-4) and repeated[name] <= best + 1e-12, name


def test_the_best_constant_of_nothing_is_nothing() -> None:
    assert best_constant(np.array([])) == {}


# Metrics


@pytest.mark.parametrize("name", DEFINITIONS)
@pytest.mark.parametrize("seed", range(3))
def test_each_metric_is_its_definition(name: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    target = rng.uniform(0.5, 80, (9, 11))
    pred = target * np.exp(rng.normal(0.1, 0.4, target.shape))
    valid = rng.random(target.shape) > 0.4
    target[0, 0], target[0, 1], target[0, 2], valid[0, :3] = 0.0, np.nan, np.inf, True  # no measurements
    counted = valid & np.isfinite(target) & (target > 0)
    pixels = list(zip(pred[counted].tolist(), target[counted].tolist(), strict=True))
    assert depth_metrics(pred, target, valid)[name] == pytest.approx(DEFINITIONS[name](pixels), rel=1e-12)


def test_there_are_no_other_metrics() -> None:
    pred, target, valid = np.ones((2, 2)), np.ones((2, 2)), np.ones((2, 2), bool)
    assert depth_metrics(pred, target, valid).keys() == DEFINITIONS.keys()


def test_metrics_by_hand() -> None:
    pred = np.array([[1.0, 3.0, 4.0, 99.0]])
    target = np.array([[1.0, 2.0, 8.0, 1.0]])
    got = depth_metrics(pred, target, np.array([[True, True, True, False]]))
    logs = np.log([1.0, 1.5, 0.5])
    expected = {
        "abs_rel": (0 + 0.5 + 0.5) / 3,
        "sq_rel": (0 + 1 / 2 + 16 / 8) / 3,
        "rmse": math.sqrt(17 / 3),
        "rmse_log": math.sqrt(np.mean(logs**2)),
        "log10": np.mean(np.abs(logs)) / math.log(10),
        "silog": math.sqrt(np.mean(logs**2) - 0.5 * np.mean(logs) ** 2),
        "delta1": 1 / 3,
        "delta2": 2 / 3,
        "delta3": 2 / 3,
    }
    assert got == pytest.approx(expected)
    assert depth_metrics(target, target, target > 0)["delta1"] == 1.0


def test_what_metrics_do_not_see() -> None:
    """Swapping prediction and truth leaves the ratios and logarithms; a common unit leaves what has none."""
    rng = np.random.default_rng(4)
    pred, target = rng.uniform(1, 9, (2, 8, 8))
    everywhere = np.ones((8, 8), bool)
    got, swapped = depth_metrics(pred, target, everywhere), depth_metrics(target, pred, everywhere)
    scaled = depth_metrics(1000 * pred, 1000 * target, everywhere)
    for name in ("delta1", "delta2", "delta3", "rmse_log", "log10", "silog", "rmse"):
        assert swapped[name] == pytest.approx(got[name], rel=1e-12), name
    for name in got.keys() - {"rmse", "sq_rel"}:
        assert scaled[name] == pytest.approx(got[name], rel=1e-12), name
    assert scaled["rmse"] == pytest.approx(1000 * got["rmse"]) and scaled["sq_rel"] == pytest.approx(
        1000 * got["sq_rel"]
    )
    assert swapped["abs_rel"] != pytest.approx(got["abs_rel"])


def test_a_masked_pixel_changes_nothing() -> None:
    pred, depth, valid = scene(5)
    got = depth_metrics(pred, depth, valid)
    for value in (0.0, np.nan, np.inf, -1e30):
        pred[~valid], depth[~valid] = value, 7.0
        assert depth_metrics(pred, depth, valid) == got


def test_metrics_corners() -> None:
    target, everywhere = np.array([[2.0, 4.0]]), np.ones((1, 2), bool)
    assert depth_metrics(target, target, ~everywhere) == {}
    assert depth_metrics(target, np.array([[0.0, np.nan]]), everywhere) == {}
    assert depth_metrics(target, np.array([[2.0, 0.0]]), everywhere)["abs_rel"] == 0.0
    assert all(map(math.isnan, depth_metrics(np.array([[2.0, np.nan]]), target, everywhere).values()))
    negative = depth_metrics(np.array([[-2.0, -4.0]]), target, everywhere)
    assert negative["delta3"] == 0.0 and negative["abs_rel"] == 2.0 and math.isfinite(negative["log10"])
    assert depth_metrics(np.array([[0.1, 9.0]]), target, everywhere, clamp=(2.0, 4.0))["abs_rel"] == 0.0
    infinite = depth_metrics(np.array([[2.0, np.inf]]), target, everywhere)
    assert infinite["abs_rel"] == math.inf and math.isnan(infinite["delta1"])


# Means


def test_the_mean_over_images_is_exact_in_any_order() -> None:
    rng = np.random.default_rng(6)
    rows = [{"abs_rel": float(x), "delta1": float(1 / x)} for x in rng.lognormal(0, 20, 50)]
    whole = mean_over_images(rows)
    for seed in range(5):
        random.Random(seed).shuffle(rows)
        assert mean_over_images(rows) == whole
    assert whole["abs_rel"] == math.fsum(row["abs_rel"] for row in rows) / 50
    assert mean_over_images([]) == {}
    broken = mean_over_images([*rows, {"abs_rel": math.nan, "delta1": 0.5}, {"abs_rel": math.inf, "delta1": 0.5}])
    assert math.isnan(broken["abs_rel"]) and math.isfinite(broken["delta1"])


def test_the_mean_over_pixels_is_that_of_one_large_image() -> None:
    rng = np.random.default_rng(7)
    target = rng.uniform(1, 50, 60)
    pred = target * np.exp(rng.normal(0.2, 0.3, 60))
    parts = [moments(pred[cut], target[cut]) for cut in (slice(0, 5), slice(5, 6), slice(6, 6), slice(6, 60))]
    everywhere = np.ones((1, 60), bool)
    assert mean_over_pixels(parts) == pytest.approx(depth_metrics(pred[None], target[None], everywhere), rel=1e-12)
    images = mean_over_images([metrics_of(part) for part in parts if part])
    assert images["abs_rel"] != pytest.approx(mean_over_pixels(parts)["abs_rel"])
    assert mean_over_pixels([{}]) == {}
