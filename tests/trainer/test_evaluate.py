"""Evaluation against a computation by hand, with a predictor whose answers are known."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from cluster.storage import StorageError
from dataio.dali_frames import FramePipeline
from dataio.dataset import Dataset
from dataio.frames import read_frames
from dataio.spec import DataError
from model.presets import get_preset
from tests.dataio.fakes import jpeg, png, smooth, unlabelled, write_dataset
from trainer.config import parse_config
from trainer.config_evaluate import EvaluateConfig
from trainer.evaluate import DatasetResult, evaluate
from trainer.evaluate_images import Measurement, predict_frames
from trainer.inference import sizer

INPUT = 28
SIZES = [(28, 42), (42, 28), (60, 90), (28, 28)]


class Known:
    """Predicts the mean of the colours as disparity: what was painted into the image."""

    metric = False
    device = torch.device("cpu")

    def __init__(self, preset: str = "v2-vits") -> None:
        self.preset = get_preset(preset)
        self.batches: list[tuple[int, ...]] = []

    @property
    def network(self) -> Any:
        return self

    def fingerprint(self) -> str:
        return "known"

    def __call__(self, image_BCHW: Tensor) -> tuple[Tensor, None]:
        self.batches.append(tuple(image_BCHW.shape))
        return self.value(image_BCHW.mean(1)), None

    def value(self, grey_BHW: Tensor) -> Tensor:
        return grey_BHW


class Metres(Known):
    metric = True

    def __init__(self) -> None:
        super().__init__("v2-vits-metric-indoor")

    def value(self, grey_BHW: Tensor) -> Tensor:
        return torch.full_like(grey_BHW, 2.0)


class Ramp(Known):
    """Every pixel tells where it is: 100 * row + column."""

    def value(self, grey_BHW: Tensor) -> Tensor:
        height, width = grey_BHW.shape[1:]
        return (100.0 * torch.arange(height)[:, None] + torch.arange(width)).expand_as(grey_BHW)


class Broken(Known):
    def value(self, grey_BHW: Tensor) -> Tensor:
        return torch.full_like(grey_BHW, float("nan"))


def depth(seed: int, height: int, width: int) -> np.ndarray:
    """1 to 9 metres, smooth, in millimetres, with a hole."""
    code_HW = 1000 + smooth(seed + 50, height, width)[..., 0].astype(np.uint16) * 31
    code_HW[:5, :7] = 0
    return code_HW


def sample(seed: int, height: int, width: int) -> dict[str, bytes]:
    return {"depth.png": png(depth(seed, height, width)), "jpg": jpeg(smooth(seed, height, width))}


def samples() -> dict[str, dict[str, bytes]]:
    return {f"k{i}": sample(i, *SIZES[i % len(SIZES)]) for i in range(7)}


def run(folders: list[Any], out: Path, predictor: Known | None = None, **changes: Any) -> list[DatasetResult]:
    return evaluate(config_of(folders, out, **changes), predictor=predictor or Known())  # type: ignore[arg-type]


def config_of(datasets: list[Any], out: Path, **changes: Any) -> EvaluateConfig:
    values = {"weights": "/w", "datasets": datasets, "input_size": INPUT, "batch": 2, "out": str(out)}
    return parse_config(EvaluateConfig, values | {"cluster": {"threads": 1}} | changes)


def by_hand(prediction_HW: np.ndarray, depth_HW: np.ndarray, max_depth: float | None = None) -> dict[str, float]:
    """abs_rel and delta1 after least squares to the disparity, in depth and in disparity."""
    valid_HW = (depth_HW > 0) & (depth_HW < (max_depth or np.inf))
    p_K, t_K = prediction_HW[valid_HW].astype(np.float64), 1 / depth_HW[valid_HW].astype(np.float64)
    scale, shift = np.linalg.lstsq(np.stack([p_K, np.ones_like(p_K)], 1), t_K, rcond=None)[0]
    aligned_K, depth_K = scale * p_K + shift, 1 / t_K
    metres_K = 1 / np.maximum(aligned_K, 1 / (max_depth or depth_K.max()))
    ratio_K = np.maximum(metres_K / depth_K, depth_K / metres_K)
    return {
        "depth": float(np.mean(np.abs(metres_K - depth_K) / depth_K)),
        "disparity": float(np.mean(np.abs(aligned_K - t_K) / t_K)),
        "delta1": float(np.mean(ratio_K < 1.25)),
    }


def predicted(members: dict[str, bytes], size: tuple[int, int]) -> np.ndarray:
    """What `Known` sees of an image that is not resized: its own pixels, normalised."""
    image = np.asarray(Image.open(io.BytesIO(members["jpg"]))).astype(np.float64) / 255
    assert image.shape[:2] == size
    return ((image - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)).mean(-1)


@pytest.mark.parametrize("max_depth", [None, 6.0])
def test_it_is_the_mean_over_images_of_the_computation_by_hand(tmp_path: Path, max_depth: float | None) -> None:
    members = {f"k{i}": sample(i, *SIZES[i]) for i in (0, 1, 3)}  # sizes that are not resized
    folder = write_dataset(tmp_path / "d", [members])
    predictor = Known()
    (result,) = run([folder], tmp_path / "out", predictor, max_depth=max_depth)
    hand = [by_hand(predicted(members[f"k{i}"], SIZES[i]), depth(i, *SIZES[i]) / 1000, max_depth) for i in (0, 1, 3)]
    assert result.images == 3 and result.skipped == {} and result.dataset == folder
    means = {name: np.mean([row[name] for row in hand]) for name in hand[0]}
    assert result.means["depth"]["abs_rel"] == pytest.approx(means["depth"], rel=5e-3)
    assert result.means["disparity"]["abs_rel"] == pytest.approx(means["disparity"], rel=5e-3)
    assert result.means["depth"]["delta1"] == pytest.approx(means["delta1"], abs=5e-3)
    assert result.means["constant"]["abs_rel"] > 0
    assert sorted(predictor.batches) == [(1, 3, 28, 28), (1, 3, 28, 42), (1, 3, 42, 28)]


def test_sizes_are_mixed_and_all_count(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "d", [samples()])
    predictor = Known()
    (result,) = run([folder], tmp_path / "out", predictor)
    assert result.images == 7
    assert {(28, 42), (42, 28), (28, 28)} == {shape[2:] for shape in predictor.batches}
    assert max(shape[0] for shape in predictor.batches) == 2
    content = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert content["datasets"][0]["means"] == result.means
    assert (content["fingerprint"], content["settings"]["input_size"]) == ("known", INPUT)
    sheet = Image.open(tmp_path / "out" / "sheet.png")
    assert sheet.size == (3 * 90, sum(SIZES[i % 4][0] + 4 for i in range(7)))


def painted(height: int, width: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """An image and the disparity that is painted into it, so that `Known` is right but for the JPEG."""
    grey_HW = smooth(seed, height, width)[..., 0]
    return np.repeat(grey_HW[..., None], 3, -1), grey_HW.astype(np.float64) / 255 + 0.2


def npy(value_HW: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, value_HW.astype(np.float32))
    return out.getvalue()


def test_a_right_prediction_is_nearly_perfect_also_with_npy_holes_and_sky(tmp_path: Path) -> None:
    found = {}
    for i, kind in enumerate(("png", "npy", "sky")):
        image, disparity_HW = painted(60, 90, i)
        depth_HW = 1 / disparity_HW
        depth_HW[:30, :40] = 0
        if kind == "npy":
            depth_HW[:30, :40] = np.nan
            found[kind] = {"depth.npy": npy(depth_HW), "jpg": jpeg(image)}
            continue
        found[kind] = {"depth.png": png(np.rint(depth_HW * 1000).astype(np.uint16)), "jpg": jpeg(image)}
        if kind == "sky":
            sky_HW = np.zeros((60, 90), np.uint8)
            sky_HW[:, 60:] = 255
            depth_HW[:, 60:] = 30.0  # what a sensor says of the sky is nothing
            found[kind]["depth.png"] = png(np.rint(depth_HW * 1000).astype(np.uint16))
            found[kind]["sky.png"] = png(sky_HW)
    for kind, members in found.items():
        folder = write_dataset(tmp_path / kind, [{"k": members}])
        (result,) = run([folder], tmp_path / "out")
        assert result.images == 1
        assert result.means["depth"]["abs_rel"] < 0.05, kind
        assert result.means["depth"]["delta1"] > 0.97, kind
        assert result.means["constant"]["delta1"] < 0.9, kind


@pytest.mark.parametrize(("preset", "aligned"), [("v1-vits", False), ("v2-vits", True), ("tiny", True)])
def test_a_prediction_is_resized_as_its_network_s_authors_do(tmp_path: Path, preset: str, aligned: bool) -> None:
    """infer_image: V1 resizes with align_corners=False, V2 with True. They differ most at the border."""

    def places(small: int, large: int) -> np.ndarray:
        if aligned:
            return np.linspace(0, small - 1, large)
        return np.clip((np.arange(large) + 0.5) * small / large - 0.5, 0, small - 1)

    dataset = Dataset.open(write_dataset(tmp_path / "d", [{"k": sample(0, 60, 90)}]))
    predictor: Any = Ramp(preset)
    what = Measurement(protocols=("depth",), align_corners=predictor.preset.output_align_corners, batch=1)
    frames = read_frames(dataset, dataset.shards[0], sizer(INPUT))
    predict = lambda image_BCHW: predictor(image_BCHW)[0]  # noqa: E731
    ((_, value_HW),) = predict_frames(frames, predict, what, FramePipeline(1, 1, "cpu"))
    assert predictor.batches == [(1, 3, 28, 42)]
    assert value_HW is not None
    assert np.allclose(value_HW, 100 * places(28, 60)[:, None] + places(42, 90), atol=1e-2)


def test_every_bad_sample_is_counted_by_its_reason(tmp_path: Path) -> None:
    good = sample(0, 28, 42)
    found = {
        "good": good,
        "cut": {**good, "jpg": good["jpg"][:-300]},
        "no_image": {**good, "jpg": b"nothing"},
        "no_truth": unlabelled(1, 28, 42),
        "half_truth": {**good, "depth.png": good["depth.png"][:-100]},
        "grey_truth": {**good, "depth.png": png(np.ones((28, 42), np.uint8))},
        "hollow": {**good, "depth.png": png(np.zeros((28, 42), np.uint16))},
        "other_size": {**good, "depth.png": png(depth(0, 20, 20))},
        "bad_sky": {**good, "sky.png": png(np.zeros((28, 42), np.uint8))[:-20]},
        "far": {**good, "depth.png": png(np.full((28, 42), 50_000, np.uint16))},
    }
    folder = write_dataset(tmp_path / "d", [found])
    seen: list[tuple[int, int]] = []
    config = {"weights": "/w", "datasets": [folder], "input_size": INPUT, "out": str(tmp_path / "out"), "max_depth": 20}
    (result,) = evaluate(
        parse_config(EvaluateConfig, config),
        predictor=Known(),  # type: ignore[arg-type]
        on_progress=lambda *now: seen.append(now),
    )
    assert result.images == 1
    assert {reason: sorted(keys) for reason, keys in result.skipped.items()} == {
        "bad_image": ["cut", "no_image"],
        "missing_target": ["no_truth"],
        "bad_target": ["bad_sky", "grey_truth", "half_truth"],
        "no_valid_pixels": ["far", "hollow"],
        "size_mismatch": ["other_size"],
    }
    assert seen == [(i, 10) for i in range(1, 11)]
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text())["datasets"][0]["skipped"] == result.skipped


def test_a_set_where_nothing_is_usable(tmp_path: Path) -> None:
    good = write_dataset(tmp_path / "good", [samples()])
    run([good], tmp_path / "out")
    folder = write_dataset(tmp_path / "d", [{f"k{i}": unlabelled(i) for i in range(3)}])
    (result,) = run([folder], tmp_path / "out")
    assert result.images == 0
    assert result.skipped == {"missing_target": ["k0", "k1", "k2"]}
    assert result.means == {"depth": {}, "disparity": {}, "constant": {}}
    assert not (tmp_path / "out" / "sheet.png").exists()  # the earlier one is not this one's


def test_only_the_first_samples_and_several_sets(tmp_path: Path) -> None:
    items = list(samples().items())
    one = write_dataset(tmp_path / "one", [dict(items[:3]), dict(items[3:])])
    two = write_dataset(tmp_path / "two", [dict(items[:2])])
    first, second = run([one, two], tmp_path / "out", limit=4)
    assert (first.images, second.images) == (4, 2)
    assert first.means["depth"]["abs_rel"] != second.means["depth"]["abs_rel"]
    (alone,) = run([write_dataset(tmp_path / "four", [dict(items[:4])])], tmp_path / "out")
    assert alone.means["depth"] == pytest.approx(first.means["depth"], rel=1e-5)


def test_a_network_of_metres_is_not_aligned(tmp_path: Path) -> None:
    members = {"depth.png": png(np.full((28, 42), 4000, np.uint16)), "jpg": jpeg(smooth(0, 28, 42))}
    (result,) = run([write_dataset(tmp_path / "d", [{"k": members}])], tmp_path / "out", Metres())
    assert result.means.keys() == {"metric", "constant"}
    assert result.means["metric"]["abs_rel"] == pytest.approx(0.5)
    assert result.means["metric"]["rmse"] == pytest.approx(2.0)


def test_a_prediction_that_is_no_number_shows(tmp_path: Path) -> None:
    (result,) = run([write_dataset(tmp_path / "d", [samples()])], tmp_path / "out", Broken())
    assert np.isnan(result.means["depth"]["abs_rel"])
    text = (tmp_path / "out" / "evaluation.json").read_text()
    assert "NaN" not in text
    assert json.loads(text)["datasets"][0]["means"]["depth"]["abs_rel"] is None


def test_what_cannot_be_evaluated_is_refused_first(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "photos", [{"k": unlabelled(0)}], with_depth=False)
    with pytest.raises(DataError, match="photos: has no depth to compare with"):
        run([folder], tmp_path / "out")
    with pytest.raises(DataError, match="nowhere"):
        run([str(tmp_path / "nowhere")], tmp_path / "out")
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(StorageError, match="taken"):
        run([write_dataset(tmp_path / "d", [samples()])], tmp_path / "taken")
