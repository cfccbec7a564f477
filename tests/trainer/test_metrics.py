"""Alignment against numpy's least squares, metrics against hand-computed values, and the two protocols."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest
import torch

from trainer.metrics import (
    MetricMean,
    align_scale_shift,
    best_constant_metrics,
    depth_metrics,
    relative_depth_metrics,
)


def scene(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A noisy relative disparity, the depth in metres, the valid pixels; garbage where not valid."""
    rng = np.random.default_rng(seed)
    depth = rng.uniform(1, 20, (13, 17))
    pred = 3 / depth + 2 + rng.normal(0, 0.05, depth.shape)
    valid = rng.random(depth.shape) > 0.3
    depth[~valid], pred[~valid] = np.nan, np.inf
    return pred.astype(np.float32), depth.astype(np.float32), valid


def test_alignment_is_numpys_least_squares() -> None:
    pred, depth, valid = scene()
    x, y = pred[valid].astype(float), 1 / depth[valid].astype(float)
    expected = np.linalg.lstsq(np.stack([x, np.ones_like(x)], 1), y, rcond=None)[0]
    disparity = np.where(valid, 1 / depth.astype(float), np.nan)
    assert align_scale_shift(pred, disparity, valid) == pytest.approx(tuple(expected), rel=1e-9)
    tensors = [torch.from_numpy(x) for x in (pred, disparity, valid)]
    assert align_scale_shift(*tensors) == align_scale_shift(pred, disparity, valid)


def test_alignment_recovers_scale_and_shift_far_from_zero() -> None:
    x = 1e6 + np.random.default_rng(1).random((5, 5))
    scale, shift = align_scale_shift(x, -2 * x + 7, np.ones((5, 5), bool))
    assert scale == pytest.approx(-2, rel=1e-6) and scale * 1e6 + shift == pytest.approx(-2e6 + 7)


def test_alignment_corners() -> None:
    target, everywhere = np.array([[1.0, 2.0, 6.0]]), np.ones((1, 3), bool)
    assert align_scale_shift(np.full((1, 3), 0.1), target, everywhere) == (0.0, pytest.approx(3.0))
    assert align_scale_shift(np.zeros((1, 3)), target, everywhere) == (0.0, pytest.approx(3.0))
    assert align_scale_shift(target, target, np.array([[True, False, False]])) == (0.0, 1.0)
    assert align_scale_shift(target, target, ~everywhere) == (1.0, 0.0)
    assert all(map(math.isnan, align_scale_shift(np.array([[1.0, np.nan, 2.0]]), target, everywhere)))
    with pytest.raises(ValueError, match=r"\(1, 3\), \(3, 1\)"):
        align_scale_shift(target, target.T, everywhere)


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


def test_metrics_corners() -> None:
    target, everywhere = np.array([[2.0, 4.0]]), np.ones((1, 2), bool)
    assert depth_metrics(target, target, ~everywhere) == {}
    assert depth_metrics(target, np.array([[0.0, np.nan]]), everywhere) == {}
    assert depth_metrics(target, np.array([[2.0, 0.0]]), everywhere)["abs_rel"] == 0.0
    assert all(map(math.isnan, depth_metrics(np.array([[2.0, np.nan]]), target, everywhere).values()))
    negative = depth_metrics(np.array([[-2.0, -4.0]]), target, everywhere)
    assert negative["delta3"] == 0.0 and negative["abs_rel"] == 2.0 and math.isfinite(negative["log10"])
    assert depth_metrics(np.array([[0.1, 9.0]]), target, everywhere, clamp=(2.0, 4.0))["abs_rel"] == 0.0


@pytest.mark.parametrize("space", ["depth", "disparity"])
def test_a_perfect_relative_prediction_is_perfect_in_both_spaces(space: str) -> None:
    _, depth, valid = scene(2)
    pred = 5 / depth - 0.3
    got = relative_depth_metrics(pred, depth, valid, space=space)
    assert got["abs_rel"] < 1e-6 and got["delta1"] == 1.0


def test_the_two_protocols_by_hand() -> None:
    pred, depth, valid = scene(3)
    x, z = pred[valid].astype(float), depth[valid].astype(float)
    a, b = np.linalg.lstsq(np.stack([x, np.ones_like(x)], 1), 1 / z, rcond=None)[0]
    aligned = a * x + b
    assert (aligned < 1 / z.max()).any()  # the clamp matters

    got = relative_depth_metrics(pred, depth, valid, space="disparity")
    assert got["abs_rel"] == pytest.approx(np.mean(np.abs(aligned - 1 / z) * z))
    for max_depth, deepest in ((None, z.max()), (12.0, 12.0)):
        got = relative_depth_metrics(pred, depth, valid, max_depth)
        metres = 1 / np.maximum(aligned, 1 / deepest)
        assert got["abs_rel"] == pytest.approx(np.mean(np.abs(metres - z) / z))
        assert got["delta1"] == pytest.approx(np.mean(np.maximum(metres / z, z / metres) < 1.25))


def test_a_negative_aligned_disparity_misses_every_delta() -> None:
    depth = np.array([[1.0, 1.0, 1000.0, 1000.0, 1000.0]])
    pred = np.array([[1.0, 1.0, 0.5, 0.5, -0.5]])
    scale, shift = align_scale_shift(pred, 1 / depth, depth > 0)
    aligned = scale * pred + shift
    assert aligned[0, 4] < 0 < aligned[0, 3]
    got = relative_depth_metrics(pred, depth, depth > 0, space="disparity")
    assert got == depth_metrics(aligned, 1 / depth, depth > 0)
    last = depth_metrics(aligned[:, 4:], 1 / depth[:, 4:], depth[:, 4:] > 0)
    assert last["delta3"] == 0.0 and last["abs_rel"] > 1


def test_relative_metrics_corners() -> None:
    pred, depth, valid = scene(4)
    assert relative_depth_metrics(pred, depth, np.zeros_like(valid)) == {}
    broken = np.where(valid, np.nan, 0.0)
    assert all(map(math.isnan, relative_depth_metrics(broken, depth, valid).values()))
    with pytest.raises(ValueError, match="'depth' or 'disparity', got 'metres'"):
        relative_depth_metrics(pred, depth, valid, space="metres")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_depth must be positive metres, got 0"):
        relative_depth_metrics(pred, depth, valid, max_depth=0)


def test_best_constant() -> None:
    depth = np.array([[1.0, 2.0, 4.0]])
    got = best_constant_metrics(depth, depth > 0)
    assert got["abs_rel"] == pytest.approx((1 + 0 + 0.5) / 3) and got["delta1"] == pytest.approx(1 / 3)
    assert best_constant_metrics(depth, depth > 0, space="disparity")["abs_rel"] == pytest.approx((0.5 + 0 + 1) / 3)
    assert best_constant_metrics(depth, depth < 0) == {}


def test_metric_mean_merges_and_travels() -> None:
    rows = [{"abs_rel": 0.1, "delta1": 0.5}, {"abs_rel": 0.3, "delta1": 0.7}, {}, {"abs_rel": 0.8, "delta1": 0.0}]
    whole, first, second = MetricMean(), MetricMean(), MetricMean()
    for i, row in enumerate(rows):
        whole.add(row)
        (first if i < 1 else second).add(row)
    first.merge(pickle.loads(pickle.dumps(second)))
    assert first.mean() == pytest.approx(whole.mean())
    assert first.mean() == pytest.approx({"abs_rel": 0.4, "delta1": 0.4})
    assert (first.images, first.skipped) == (3, 1)
    assert MetricMean().mean() == {}
    whole.add({"abs_rel": math.nan})
    assert math.isnan(whole.mean()["abs_rel"]) and whole.mean()["delta1"] == pytest.approx(0.4)
