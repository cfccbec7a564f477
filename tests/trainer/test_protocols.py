"""Every protocol on small maps against a computation of its own, crops against rows and columns counted by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from trainer.benchmarks import BENCHMARKS, get_benchmark
from trainer.config import ConfigError, absolute_paths, apply_override, parse_config
from trainer.config_evaluate import EvaluateConfig
from trainer.evaluate_measure import constant, measure
from trainer.metrics import metrics_of
from trainer.protocols import PROTOCOLS, get_protocol

DISPARITY = [name for name, protocol in PROTOCOLS.items() if protocol.align == "disparity"]


def scene(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A noisy relative disparity (partly below 0), the depth in metres, the valid pixels; garbage where not valid."""
    rng = np.random.default_rng(seed)
    depth = rng.uniform(1, 20, (13, 17))
    pred = 3 / depth - 0.3 + rng.normal(0, 0.1, depth.shape)
    valid = rng.random(depth.shape) > 0.3
    depth[~valid], pred[~valid] = np.nan, np.inf
    return pred, depth, valid


def line(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    a, b = np.linalg.lstsq(np.stack([x, np.ones_like(x)], 1), y, rcond=None)[0]
    return float(a), float(b)


def scores(pred: np.ndarray, target: np.ndarray) -> dict[str, float]:
    ratio = np.maximum(np.maximum(pred, 1e-6) / target, target / np.maximum(pred, 1e-6))
    return {
        "abs_rel": float(np.mean(np.abs(pred - target) / target)),
        "rmse": float(np.sqrt(np.mean((pred - target) ** 2))),
        "delta1": float(np.mean(ratio < 1.25)),
    }


def got(name: str, pred: np.ndarray, depth: np.ndarray, valid: np.ndarray, **options: Any) -> dict[str, float]:
    return metrics_of(measure(PROTOCOLS[name], pred, depth, valid, **options))


def approx(name: str, expected: dict[str, float], *maps: np.ndarray, **options: Any) -> None:
    found = got(name, *maps, **options)
    assert {key: found[key] for key in expected} == pytest.approx(expected, rel=1e-9), name


def test_disparity_compares_disparities() -> None:
    pred, depth, valid = scene()
    x, z = pred[valid], depth[valid]
    a, b = line(x, 1 / z)
    assert (a * x + b).min() < 0  # not raised: such a pixel misses every delta
    approx("disparity", scores(a * x + b, 1 / z), pred, depth, valid)
    approx("disparity", scores(a * x + b, 1 / z), pred, depth, valid, max_depth_m=9.0)  # a cap masks, and no more


def test_depth_midas_and_moge_raise_the_disparity_and_invert_it() -> None:
    pred, depth, valid = scene()
    x, z = pred[valid], depth[valid]
    a, b = line(x, 1 / z)
    by_truth = scores(1 / np.maximum(a * x + b, 1 / z.max()), z)
    by_cap = scores(1 / np.maximum(a * x + b, 1 / 30.0), z)
    assert by_truth != by_cap
    approx("moge", by_truth, pred, depth, valid)
    approx("moge", by_truth, pred, depth, valid, max_depth_m=30.0)
    approx("midas", by_cap, pred, depth, valid, max_depth_m=30.0)
    approx("depth", by_truth, pred, depth, valid)
    approx("depth", by_cap, pred, depth, valid, max_depth_m=30.0)
    bad = got("midas", pred, depth, valid, max_depth_m=30.0)["bad_pixel"]
    assert bad == pytest.approx(1 - by_cap["delta1"]) and "bad_pixel" not in got("moge", pred, depth, valid)


def test_marigold_in_disparity_fits_positive_pixels_and_clips_depths() -> None:
    pred, depth, valid = scene()
    x, z = pred[valid], depth[valid]
    assert (x <= 0).any() and (x > 0).any()
    a, b = line(x[x > 0], 1 / z[x > 0])
    raised = 1 / np.maximum(a * x + b, 1e-3)
    assert raised.max() == pytest.approx(1000)
    approx("marigold-disparity", scores(raised, z), pred, depth, valid)
    clipped = scores(np.clip(raised, 2.0, 15.0), z)
    approx("marigold-disparity", clipped, pred, depth, valid, min_depth_m=2.0, max_depth_m=15.0)


def test_marigold_in_depth_fits_depths_then_clips() -> None:
    _, depth, valid = scene()
    metres = 2 * depth - 5 + np.random.default_rng(1).normal(0, 2, depth.shape)
    x, z = metres[valid], depth[valid]
    a, b = line(x, z)
    approx("marigold", scores(np.maximum(a * x + b, 1e-6), z), metres, depth, valid, metric=True)
    clipped = scores(np.clip(a * x + b, 2.0, 15.0), z)
    approx("marigold", clipped, metres, depth, valid, metric=True, min_depth_m=2.0, max_depth_m=15.0)


def test_metres_are_taken_as_they_are_or_clipped() -> None:
    _, depth, valid = scene()
    metres = depth * 1.4
    x, z = metres[valid], depth[valid]
    approx("metric", scores(x, z), metres, depth, valid, metric=True, max_depth_m=10.0)
    clipped = scores(np.clip(x, 1e-3, 10.0), z)
    approx("zoedepth", clipped, metres, depth, valid, metric=True, min_depth_m=1e-3, max_depth_m=10.0)


def test_by_hand() -> None:
    """Three pixels at 1, 2 and 4 m; the fit of (1, 0, 0) to (1, 1/2, 1/4) is 0.625 x + 0.375."""
    depth, pred = np.array([[1.0, 2.0, 4.0]]), np.array([[1.0, 0.0, 0.0]])
    maps = (pred, depth, depth > 0)
    approx("disparity", {"abs_rel": (0 + 0.25 + 0.5) / 3, "delta1": 1 / 3}, *maps)
    inverted = (0 + abs(1 / 0.375 - 2) / 2 + abs(1 / 0.375 - 4) / 4) / 3
    approx("moge", {"abs_rel": inverted}, *maps)
    approx("midas", {"abs_rel": (0 + 0 + 0.5) / 3, "bad_pixel": 1 / 3}, *maps, max_depth_m=2.0)


def test_the_robust_protocol_passes_over_a_broken_part_of_the_truth() -> None:
    depth = np.random.default_rng(2).uniform(1, 10, (20, 20))
    pred, broken = 5 / depth + 1, depth.copy()
    broken[:6] = 0.05
    assert got("depth-robust", pred, broken, depth > 0)["delta1"] == pytest.approx(0.7)
    assert got("depth", pred, broken, depth > 0)["delta1"] < 0.5


@pytest.mark.parametrize("name", DISPARITY)
def test_an_aligned_protocol_does_not_see_scale_and_shift(name: str) -> None:
    pred, depth, valid = scene(3)
    pred = pred - pred[valid].min() + 0.1  # marigold's fit asks for a sign
    before = got(name, pred, depth, valid, max_depth_m=40.0)
    after = got(name, 37.0 * pred + 11.0, depth, valid, max_depth_m=40.0)
    rough = 1e-3 if name == "depth-robust" else 1e-9  # an iteration ends a little sooner or later
    assert after == pytest.approx(before, rel=rough)
    perfect = got(name, 5 / depth + 0.3, depth, valid, max_depth_m=40.0)
    assert perfect["abs_rel"] < 1e-6 and perfect["delta1"] == 1.0


@pytest.mark.parametrize("name", [name for name in PROTOCOLS if name != "pairs"])
def test_masked_pixels_are_never_counted(name: str) -> None:
    pred, depth, valid = scene(4)
    metric = PROTOCOLS[name].needs_metres
    pred = depth * 1.1 if metric else pred
    options = {"metric": metric, "max_depth_m": 30.0}
    before = got(name, pred, depth, valid, **options)
    pred, depth = np.where(valid, pred, 1e9), np.where(valid, depth, 5.0)
    assert got(name, pred, depth, valid, **options) == before
    assert got(name, pred, depth, np.zeros_like(valid), **options) == {}
    assert measure(PROTOCOLS[name], pred, depth, valid, **options)["pixels"] == valid.sum()


@pytest.mark.parametrize("name", [name for name in PROTOCOLS if name != "pairs"])
def test_a_prediction_that_is_no_number_shows(name: str) -> None:
    pred, depth, valid = scene(5)
    pred = np.where(np.arange(pred.size).reshape(pred.shape) == np.flatnonzero(valid)[0], np.nan, 1.0 + pred)
    found = got(name, pred, depth, valid, metric=PROTOCOLS[name].needs_metres, max_depth_m=30.0)
    assert all(map(math.isnan, found.values()))


def test_metres_are_inverted_where_disparity_is_aligned() -> None:
    _, depth, valid = scene(6)
    assert got("disparity", 3 * depth, depth, valid, metric=True)["abs_rel"] < 1e-9
    assert got("disparity", 3 * depth, depth, valid)["abs_rel"] > 0.3


def test_what_a_protocol_needs() -> None:
    pred, depth, valid = scene()
    with pytest.raises(ValueError, match="'marigold' compares depths, this network predicts disparity; use 'marigold-"):
        got("marigold", pred, depth, valid)
    with pytest.raises(ValueError, match="'midas' needs a cap; set max_depth, or name a benchmark"):
        got("midas", pred, depth, valid)
    with pytest.raises(ValueError, match="max_depth must be positive metres, got 0"):
        got("depth", pred, depth, valid, max_depth_m=0.0)


def test_the_best_constant() -> None:
    """Of 1, 2 and 4 m. AbsRel: 1 m, which has more than half of the weights 1, 1/2 and 1/4, and not the median."""
    depth = np.array([[1.0, 2.0, 4.0, np.nan]])
    found = metrics_of(constant(depth, depth > 0))
    assert found["abs_rel"] == pytest.approx((0 + 1 / 2 + 3 / 4) / 3)
    assert found["rmse"] == pytest.approx(np.std([1, 2, 4]))
    assert found["rmse_log"] == pytest.approx(math.log(2) * math.sqrt(2 / 3))
    assert [found[f"delta{i}"] for i in (1, 2, 3)] == pytest.approx([1 / 3, 2 / 3, 2 / 3])
    assert constant(depth, depth < 0) == {}


# Benchmarks


def counted(name: str, height: int, width: int, depth_m: float = 5.0) -> tuple[int, int, int, int] | None:
    """First row, last row + 1, first column, last column + 1 of what counts; the crop's box must be full."""
    depth = np.full((height, width), depth_m)
    inside = get_benchmark(name).counts(depth, np.ones(depth.shape, bool))
    if not inside.any():
        return None
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    box = (int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1)
    assert inside.sum() == (box[1] - box[0]) * (box[3] - box[2])
    return box


def test_the_eigen_crop_of_nyu() -> None:
    assert counted("nyu", 480, 640) == (45, 471, 41, 601)
    assert get_benchmark("nyu").image_box(480, 640) == (0, 0, 480, 640)
    assert get_benchmark("nyu").image_box(426, 560) is None
    assert counted("nyu-midas", 480, 640) == (0, 480, 0, 640)


def test_the_crops_of_kitti() -> None:
    """352 * .40810811 = 143.7, 352 * .99189189 = 349.1, 1216 * .03594771 = 43.7, 1216 * .96405229 = 1172.3."""
    assert get_benchmark("kitti").image_box(375, 1242) == (23, 13, 352, 1216)
    assert get_benchmark("kitti").image_box(376, 1241) == (24, 12, 352, 1216)
    assert get_benchmark("kitti").image_box(352, 1216) == (0, 0, 352, 1216)
    assert get_benchmark("kitti").image_box(351, 1216) is None
    assert counted("kitti", 352, 1216) == (143, 349, 43, 1172)
    assert counted("kitti-marigold", 352, 1216) == (117, 321, 43, 1172)  # 352 * .3324324 = 117.0, * .91351351 = 321.6
    assert counted("kitti-garg", 375, 1242) == (153, 371, 44, 1197)


# min, max (metres; None: no cap), images of the published split, counted rows and columns of a 480 x 640 image
NYU_CROP, WHOLE, GARG_CROP = (45, 471, 41, 601), (0, 480, 0, 640), (195, 476, 23, 616)  # .40810811 * 480 = 195.9, ...
LIMITS: dict[str, tuple[float, float | None, int | None, tuple[int, int, int, int]]] = {
    "nyu": (0.001, 10, 654, NYU_CROP),
    "nyu-midas": (0, 10, 654, WHOLE),
    "kitti": (0.001, 80, 652, GARG_CROP),
    "kitti-marigold": (0.00001, 80, 652, (159, 438, 23, 616)),  # .3324324 * 480 = 159.6, .91351351 * 480 = 438.5
    "kitti-garg": (0, 50, 697, GARG_CROP),
    "sintel": (0, 72, None, WHOLE),
    "ddad": (0.001, 80, None, WHOLE),
    "eth3d": (0, 72, 454, WHOLE),
    "eth3d-marigold": (0.00001, None, 454, WHOLE),
    "diode": (0.6, 350, 771, WHOLE),
    "diode-indoor": (0.6, 350, 325, WHOLE),
    "diode-outdoor": (0.6, 350, 446, WHOLE),
    "diode-outdoor-zoedepth": (0.001, 80, 446, GARG_CROP),
    "scannet": (0.001, 10, 800, WHOLE),
    "ibims": (0, 10, 100, NYU_CROP),
    "sunrgbd": (0, 8, None, NYU_CROP),
    "hypersim": (0.001, 80, None, NYU_CROP),
    "vkitti2": (0.001, 80, None, GARG_CROP),
    **{
        f"{name}-moge": (0, None, None, WHOLE)
        for name in ("nyu", "kitti", "eth3d", "ibims", "sintel", "ddad", "diode", "gso")
    },
}  # fmt: skip
CUT = {"kitti", "kitti-marigold", "vkitti2"}  # to 352 x 1216
ONLY_480_640 = {"nyu", "ibims"}
KEYS = {"diode-indoor": "indoors", "diode-outdoor": "outdoor", "diode-outdoor-zoedepth": "outdoor"}


def test_every_benchmark_has_its_limits_here() -> None:
    assert LIMITS.keys() | {"da-2k"} == BENCHMARKS.keys()
    assert get_benchmark("da-2k").images is None  # published as "1K"


@pytest.mark.parametrize("name", LIMITS)
def test_limits_are_exclusive(name: str) -> None:
    low, high, _, box = LIMITS[name]
    inside = (low + 1e-7, (high or 1e9) - 1e-4)
    assert [counted(name, 480, 640, depth) for depth in inside] == [box, box]
    for depth in (low, low - 1e-7, *([high, high + 1e-4] if high else [])):
        assert counted(name, 480, 640, depth) is None, depth
    assert counted(name, 480, 640, math.nan) is None


@pytest.mark.parametrize("name", LIMITS)
def test_the_split_and_what_the_network_sees_of_an_image(name: str) -> None:
    benchmark = get_benchmark(name)
    assert benchmark.images == LIMITS[name][2]
    assert benchmark.keys == KEYS.get(name, "")
    whole = None if name in ONLY_480_640 else (0, 0, 400, 1300)
    assert benchmark.image_box(400, 1300) == ((48, 42, 352, 1216) if name in CUT else whole)
    assert benchmark.image_box(480, 640) == (None if name in CUT else (0, 0, 480, 640))


def test_what_counts_is_valid_too() -> None:
    valid = np.zeros((480, 640), bool)
    valid[44:46, 100] = True
    found = get_benchmark("nyu").counts(np.full((480, 640), 5.0), valid)
    assert found.sum() == 1 and found[45, 100]


def test_every_entry_says_where_it_comes_from() -> None:
    for name, protocol in PROTOCOLS.items():
        assert protocol.name == name and protocol.summary and len(protocol.source) > 10
    for name, benchmark in BENCHMARKS.items():
        assert benchmark.name == name and benchmark.title and len(benchmark.source) > 10
    assert PROTOCOLS["disparity"].choice and BENCHMARKS["kitti"].choice  # the papers publish neither crops nor caps


# Configuration


def refusal(**changes: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(EvaluateConfig, {"weights": "/w", "datasets": ["/d"]} | changes)
    return str(caught.value)


def test_datasets_are_paths_or_mappings() -> None:
    values = {"weights": "w", "datasets": ["a b/c", {"path": "d", "benchmark": "nyu", "protocols": ["midas"]}]}
    config = parse_config(EvaluateConfig, absolute_paths(values, "/base"))
    plain, nyu = config.datasets
    assert (plain.path, plain.benchmark, plain.protocols) == ("/base/a b/c", None, None)
    assert (nyu.path, nyu.benchmark, nyu.protocols) == ("/base/d", "nyu", ("midas",))
    assert parse_config(EvaluateConfig, config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"datasets": [{"path": "/d", "benchmark": "nyv"}]}, "datasets.0.benchmark: found 'nyv'; no such benchmark; "),
        ({"datasets": [{"path": "/d", "benchmark": "KITTI"}]}, "did you mean 'kitti'?"),
        ({"datasets": [{"path": "/d", "benchmark": "zzz"}]}, "known: nyu, nyu-midas, kitti,"),
        ({"datasets": [{"path": "/d", "benchmrk": "nyu"}]}, "unknown key; did you mean 'benchmark'?"),
        ({"datasets": [{"benchmark": "nyu"}]}, "datasets.0.path: missing"),
        ({"datasets": [3]}, "datasets.0: found 3"),
        ({"datasets": "/d"}, "datasets: found '/d'"),
        ({"datasets": []}, "datasets: found []; name at least one dataset"),
        ({"datasets": [{"path": "/d", "benchmark": "da-2k", "protocols": ["depth"]}]}, "da-2k has pairs of points"),
        ({"protocols": ["dept"]}, "no such protocol; did you mean 'depth'?"),
        ({"protocols": []}, "protocols: found []; name at least one"),
        ({"protocols": ["pairs"]}, "pairs goes with benchmark da-2k alone"),
        ({"average": "pixel"}, "average: found 'pixel'; input should be 'images' or 'pixels'"),
        ({"cluster": {"workers": 0}}, "cluster.workers: found 0"),
        ({"worst": -1}, "worst: found -1"),
    ],
)
def test_a_wrong_configuration_says_what_is_right(changes: dict[str, Any], words: str) -> None:
    found = refusal(**changes)
    assert words in found and "; datasets:" not in found  # one mistake, one clause


@pytest.mark.parametrize(
    ("override", "remedy"),
    [
        ("datasets.0.benchmark=nyu", "--set 'datasets=[...]'"),
        ("a.b.datasets.0=/d", "--set 'a.b.datasets=[...]'"),
        ("weights.x=1", "--set 'weights=VALUE'"),
    ],
)
def test_an_override_into_a_list_names_what_to_do(override: str, remedy: str) -> None:
    values: dict[str, Any] = {"weights": "/w", "datasets": [{"path": "/d"}], "a": {"b": {"datasets": ["/d"]}}}
    with pytest.raises(ConfigError) as caught:
        apply_override(values, override)
    assert str(caught.value).endswith(f"; edit the file, or give all of it as YAML: {remedy}")
    apply_override(values, "datasets=[{path: /d, benchmark: nyu}]")
    (entry,) = parse_config(EvaluateConfig, {"weights": "/w", "datasets": values["datasets"]}).datasets
    assert entry.benchmark == "nyu"


def test_an_unknown_protocol_is_refused() -> None:
    with pytest.raises(ValueError, match="did you mean 'marigold'"):
        get_protocol("marigld")
