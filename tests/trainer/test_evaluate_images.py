"""Every sample once and to the same last bit, however many share the work; crops, splits and what is left out."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dataio.dataset import Dataset
from dataio.spec import DataError
from model.presets import get_preset
from tests.dataio.fakes import jpeg, png, smooth, unlabelled, write_dataset
from trainer.config import ConfigError
from trainer.evaluate_images import (
    OUTSIDE,
    ImageResult,
    Measurement,
    cut_units,
    in_order,
    mean_of,
    measure_part,
    measurement,
)
from trainer.metrics import mean_over_pixels

SIZES = [(28, 42), (42, 28), (28, 28)]
RELATIVE, METRIC = get_preset("tiny"), get_preset("tiny-metric-indoor")


def grey(image_BCHW: Tensor) -> Tensor:
    """A network whose answer depends on which images it sees together, as a real one's last bits do; and not by a scale
    and a shift, which no aligned metric would notice."""
    grey_BHW = image_BCHW.mean(1)
    return grey_BHW + 0.05 * image_BCHW.mean() * grey_BHW**2


def truth_png(seed: int, height: int, width: int) -> bytes:
    """1 to 9 metres in millimetres, a hole in the corner."""
    code_HW = 1000 + smooth(seed + 50, height, width)[..., 0].astype(np.uint16) * 31
    code_HW[:5, :7] = 0
    return png(code_HW)


def sample(seed: int, height: int, width: int) -> dict[str, bytes]:
    return {"depth.png": truth_png(seed, height, width), "jpg": jpeg(smooth(seed, height, width))}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """13 good samples in shards of 5, 1 and 8, two neighbours of one size, keys not in order; one without a truth."""
    made = {f"k{(i * 5) % 13:02d}": sample(i, *SIZES[i // 2 % 3]) for i in range(13)}
    made["hollow"] = {**sample(0, 28, 28), "depth.png": png(np.zeros((28, 28), np.uint16))}
    items = list(made.items())
    shards = [dict(items[:5]), dict(items[5:6]), dict(items[6:])]
    return Dataset.open(write_dataset(tmp_path_factory.mktemp("images") / "my data", shards))


def settings(**changes: Any) -> Measurement:
    return measurement(RELATIVE, input_size=28, batch=2, **changes)


def parts(dataset: Dataset, of: int, what: Measurement) -> list[list[ImageResult]]:
    return [measure_part(dataset, grey, what, part=part, of=of) for part in range(of)]


@pytest.mark.parametrize("of", [1, 2, 3, 9])
@pytest.mark.parametrize("limit", [None, 1, 7])
def test_every_sample_is_measured_once_and_to_the_same_bit(dataset: Dataset, of: int, limit: int | None) -> None:
    what = settings(limit=limit)
    alone = in_order(measure_part(dataset, grey, what))
    shared = [result for part in parts(dataset, of, what) for result in part]
    assert len(shared) == len({result.key for result in shared}) == (limit or 14)
    assert in_order(pickle.loads(pickle.dumps(shared))) == alone
    assert [result.key for result in alone] == sorted(result.key for result in alone)
    for average in ("images", "pixels"):
        assert mean_of(shared, "depth", average) == mean_of(alone, "depth", average)
    assert mean_of(shared) == mean_of(shared, "depth") != mean_of(shared, "disparity")


def test_units_cover_the_dataset_and_never_span_two_shards(dataset: Dataset) -> None:
    for size in (1, 2, 5, 64):
        for limit in (None, 0, 4, 6, 100):
            units = cut_units(dataset, limit, size)
            places = [unit.place + i for unit in units for i in range(unit.end - unit.begin)]
            assert places == list(range(14 if limit is None else min(limit, 14)))
            assert all(0 < unit.end - unit.begin <= size for unit in units)
            assert all(unit.end <= dataset.shards[unit.shard].samples for unit in units)


def test_an_image_without_valid_pixels_is_named_and_in_no_mean(dataset: Dataset) -> None:
    found = measure_part(dataset, grey, settings())
    (hollow,) = [result for result in found if result.reason]
    assert (hollow.key, hollow.reason, hollow.values, hollow.metrics) == ("hollow", "no_valid_pixels", {}, {})
    good = [result for result in found if not result.reason]
    expected = np.mean([result.metrics["depth"]["abs_rel"] for result in good])
    assert mean_of(found)["abs_rel"] == pytest.approx(float(expected), rel=1e-12)
    assert mean_of(found, average="pixels") == mean_over_pixels([result.values["depth"] for result in good])
    assert mean_of([hollow]) == {} == mean_of([])


def test_a_prediction_may_be_of_a_network_in_training(dataset: Dataset) -> None:
    scale = torch.nn.Parameter(torch.ones(()))
    found = measure_part(dataset, lambda image_BCHW: scale * grey(image_BCHW), settings(limit=3))
    assert found == measure_part(dataset, grey, settings(limit=3))


def test_a_dataset_without_depth_is_refused(tmp_path: Path) -> None:
    photos = Dataset.open(write_dataset(tmp_path / "photos", [{"k": unlabelled(0)}], with_depth=False))
    with pytest.raises(DataError, match="photos: has no depth to compare with"):
        measure_part(photos, grey, settings())


def test_holes_are_in_no_image_s_pixels(dataset: Dataset) -> None:
    pixels = {result.values["depth"]["pixels"] for result in measure_part(dataset, grey, settings()) if result.values}
    assert pixels == {height * width - 35 for height, width in SIZES}


def test_only_nearer_pixels_count(tmp_path: Path) -> None:
    """A cap does not count itself, a benchmark's as little as one's own."""
    code = np.full((28, 42), 5000, np.uint16)
    code[:4], code[4:6] = 9000, 20000
    path = write_dataset(tmp_path / "d", [{"k": {"png": png(smooth(0, 28, 42)), "depth.png": png(code)}}])
    for cap, rows in ((None, 28), (20.1, 28), (20.0, 26), (9.1, 26), (9.0, 22)):
        (found,) = measure_part(Dataset.open(path), grey, settings(max_depth=cap))
        assert found.values["depth"]["pixels"] == rows * 42, cap
    (found,) = measure_part(Dataset.open(path), grey, settings(max_depth=5.0))
    assert found.reason == "no_valid_pixels"


@pytest.mark.parametrize(
    ("preset", "protocol", "expected"),
    [
        (RELATIVE, None, ("depth", "disparity")),
        (METRIC, None, ("metric",)),
        (RELATIVE, "moge", ("moge",)),
        (METRIC, ("metric", "disparity"), ("metric", "disparity")),
    ],
)
def test_the_protocol_goes_by_the_head(preset: Any, protocol: Any, expected: tuple[str, ...]) -> None:
    made = measurement(preset, protocol=protocol)
    assert (made.protocols, made.metric) == (expected, preset.head == "metric")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"protocol": "metric"}, "protocol: found 'metric'; protocol 'metric' compares depths"),
        ({"protocol": "midas"}, "protocol: found 'midas'; protocol 'midas' needs a cap"),
        ({"protocol": "deph"}, "protocol: found 'deph'; no such protocol; did you mean 'depth'?"),
        ({"benchmark": "nyv"}, "benchmark: found 'nyv'; no such benchmark; did you mean 'nyu'?"),
    ],
)
def test_what_does_not_go_together_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words.replace("?", r"\?")):
        measurement(RELATIVE, **options)


def test_the_limits_are_the_narrower_of_benchmark_and_configuration() -> None:
    assert measurement(RELATIVE, benchmark="kitti").limits_m == (1e-3, 80)
    assert measurement(RELATIVE, benchmark="kitti", max_depth=50).limits_m == (1e-3, 50)
    assert measurement(RELATIVE, benchmark="nyu", max_depth=50).limits_m == (1e-3, 10)
    assert measurement(RELATIVE, benchmark="nyu", protocol="midas").protocols == ("midas",)
    assert measurement(RELATIVE, max_depth=50).limits_m == (0.0, 50)


def coarse(seed: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """A photograph, and its depth map with values near and far (5 to 200 m)."""
    rng = np.random.default_rng(seed)
    return smooth(seed, height, width), rng.uniform(5_000, 200_000, (height, width)).clip(0, 65535).astype(np.uint16)


def test_kitti_is_cut_before_the_network_sees_it(tmp_path: Path) -> None:
    """The same numbers as of a dataset that was cut by hand, crop and cap included."""
    image, code = coarse(0, 375, 1242)
    whole = {"png": png(image), "depth.png": png(code)}
    cut = {"png": png(image[23:, 13:1229]), "depth.png": png(code[23:, 13:1229])}
    small = {"png": png(image[:300]), "depth.png": png(code[:300])}
    seen: list[tuple[int, ...]] = []

    def predict(image_BCHW: Tensor) -> Tensor:
        seen.append(tuple(image_BCHW.shape))
        return image_BCHW.mean(1)

    what = settings(benchmark="kitti", protocol="disparity")
    found = {}
    for name, members in (("whole", whole), ("cut", cut), ("small", small)):
        opened = Dataset.open(write_dataset(tmp_path / name, [{"k": members}]))
        (found[name],) = measure_part(opened, predict, what)
    assert seen == [(1, 3, 28, 98)] * 2  # of 352 x 1216; 375 x 1242 would be 28 x 98 too, hence the comparison below
    assert found["whole"].values == found["cut"].values
    inside = code[23:, 13:1229][143:349, 43:1172]
    assert found["whole"].values["disparity"]["pixels"] == (inside < 80_000).sum()
    assert found["small"].reason == "not_the_benchmarks_size"
    plain = measure_part(Dataset.open(str(tmp_path / "whole")), predict, settings(protocol="disparity"))
    assert plain[0].values != found["whole"].values


def test_the_splits_of_diode_are_told_by_the_key(tmp_path: Path) -> None:
    keys = {
        f"val/{domain}/scene_00019/scan_0018{n}/{n}": n for n, domain in enumerate(("indoors", "outdoor", "indoors"))
    }
    path = write_dataset(tmp_path / "diode", [{key: sample(n, 28, 28) for key, n in keys.items()}])
    for name, images in (("diode", 3), ("diode-indoor", 2), ("diode-outdoor", 1)):
        found = measure_part(Dataset.open(path), grey, settings(benchmark=name))
        assert sum(result.reason is None for result in found) == images
        assert {result.reason for result in found} <= {None, OUTSIDE} and len(found) == 3


def test_a_network_of_metres(dataset: Dataset) -> None:
    what = measurement(METRIC, input_size=28, batch=4)
    found = measure_part(dataset, lambda image_BCHW: torch.full_like(image_BCHW[:, 0], 2.0), what)
    by_hand = [abs(2 - 1 - smooth(50, 28, 42)[..., 0].astype(float) * 0.031)]
    (first,) = [result for result in found if result.key == "k00"]
    depth = 1 + smooth(50, 28, 42)[..., 0].astype(float) * 0.031
    measured = np.ones((28, 42), bool)
    measured[:5, :7] = False
    expected = (by_hand[0] / depth)[measured].mean()
    assert first.metrics["metric"]["abs_rel"] == pytest.approx(float(expected), rel=1e-6)
