"""What an evaluation leaves, and that it does not depend on who did the work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cluster.stop import StopFlag, Stopped
from dataio.dataset import Dataset
from dataio.spec import DataError
from model import DepthAnything
from tests.dataio.fakes import jpeg, png, smooth, unlabelled, write_dataset
from tests.trainer.test_evaluate import Broken, Known, Metres, config_of, depth, sample, samples
from trainer.config import ConfigError
from trainer.evaluate import Collected, evaluate, evaluated
from trainer.evaluate_baselines import GRID, mean_map
from trainer.evaluate_worker import Examiner, items_of, worst_first
from trainer.evaluate_write import DatasetResult, markdown

FILES = ("evaluation.json", "evaluation.md", "images.jsonl", "sheet.png", "worst.png")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    DepthAnything.from_preset("tiny").save_pretrained(str(folder))
    return str(folder)


def shards() -> list[dict[str, dict[str, bytes]]]:
    items = list(samples().items())
    return [dict(items[:3]), dict(items[3:4]), dict(items[4:])]


def read(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in FILES}


def known(config: Any, predictor: Known | None = None) -> list[DatasetResult]:
    return evaluate(config, predictor=predictor or Known())  # type: ignore[arg-type]


@pytest.mark.parametrize("workers", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_any_number_of_workers_leaves_the_same_bytes(tmp_path: Path, weights: str, workers: int) -> None:
    one = write_dataset(tmp_path / "my data", shards())
    two = write_dataset(tmp_path / "more", [{f"z{i}": sample(i, 28, 28) for i in range(2)}, {"a": unlabelled(0)}])
    found = {}
    for count in (1, workers):
        changes = {"weights": weights, "worst": 2, "cluster": {"workers": count, "threads": 1}}
        config = config_of([one, two], tmp_path / f"out{count}", **changes)
        seen: list[tuple[int, int]] = []
        results = evaluate(config, on_progress=lambda *now, seen=seen: seen.append(now))
        assert [(result.images, result.skipped) for result in results] == [(7, {}), (2, {"missing_target": ["a"]})]
        assert seen[-1] == (10, 10)
        found[count] = read(tmp_path / f"out{count}")
        assert evaluated(config) == results
    assert found[1] == found[workers]
    assert evaluated(config_of([one], tmp_path / "out1", weights=weights)) is None
    assert evaluated(config_of([one, two], tmp_path / "out1", weights=weights, flip=True)) is None
    content = json.loads((tmp_path / "out1" / "evaluation.json").read_text())
    del content["settings"]["version"]  # an earlier program's, which measured other things under these names
    (tmp_path / "out1" / "evaluation.json").write_text(json.dumps(content))
    assert evaluated(config_of([one, two], tmp_path / "out1", weights=weights, worst=2)) is None


def test_every_image_has_its_line(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "d", [{**samples(), "bare": unlabelled(3)}])
    (result,) = known(config_of([folder], tmp_path / "out"))
    lines = [json.loads(line) for line in (tmp_path / "out" / "images.jsonl").read_text().splitlines()]
    assert [line["key"] for line in lines] == ["bare", *(f"k{i}" for i in range(7))]
    assert lines[0] == {"dataset": folder, "key": "bare", "reason": "missing_target"}
    assert lines[1]["pixels"] == 28 * 42 - 35
    for protocol in ("depth", "disparity", "constant"):
        mean = np.mean([line["metrics"][protocol]["abs_rel"] for line in lines[1:]])
        assert result.means[protocol]["abs_rel"] == pytest.approx(float(mean), rel=1e-12)
    known(config_of([folder], tmp_path / "nan"), Broken())
    text = (tmp_path / "nan" / "images.jsonl").read_text()
    assert "NaN" not in text and json.loads(text.splitlines()[1])["metrics"]["depth"]["delta1"] is None


def test_the_average_may_be_over_pixels(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "d", shards())
    (pooled,) = known(config_of([folder], tmp_path / "pooled", average="pixels"))
    lines = [json.loads(line) for line in (tmp_path / "pooled" / "images.jsonl").read_text().splitlines()]
    weights = [line["pixels"] for line in lines]
    assert len(set(weights)) > 1
    for name in ("abs_rel", "delta1"):
        mean = np.average([line["metrics"]["disparity"][name] for line in lines], weights=weights)
        assert pooled.means["disparity"][name] == pytest.approx(float(mean), rel=1e-12)
    squares = np.average([line["metrics"]["depth"]["rmse"] ** 2 for line in lines], weights=weights)
    assert pooled.means["depth"]["rmse"] == pytest.approx(float(np.sqrt(squares)), rel=1e-12)


def test_the_worst_images_are_shown(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "d", shards())
    config = config_of([folder], tmp_path / "out", worst=3)
    examiner = Examiner(config.model_dump(mode="json"), predictor=Known())  # type: ignore[arg-type]
    outcomes = [examiner.process(item) for item in items_of(examiner.sets, None)]
    assert [len(outcome.worst) for outcome in outcomes] == [3, 1, 3]
    errors = {r.key: r.metrics["depth"]["abs_rel"] for outcome in outcomes for r in outcome.images}
    rows = sorted((row for outcome in outcomes for row in outcome.worst), key=worst_first)[:3]
    assert [row.key for row in rows] == sorted(errors, key=lambda key: -errors[key])[:3]
    assert all(row.picture is not None and row.score == errors[row.key] for row in rows)
    known(config)
    with Image.open(tmp_path / "out" / "worst.png") as sheet:
        heights = [row.picture.shape[0] for row in rows if row.picture is not None]
        assert sheet.height == sum(height + 16 + 4 for height in heights)
    for order in (outcomes, outcomes[::-1]):
        collected = Collected(3)
        for outcome in order:
            collected.add(outcome)
        assert [row.key for row in collected.worst] == [row.key for row in rows]
        assert [row.place for row in collected.first] == list(range(7))
    known(config_of([folder], tmp_path / "out", worst=0))
    assert not (tmp_path / "out" / "worst.png").exists()


def test_no_number_is_the_worst(tmp_path: Path) -> None:
    class Once(Known):
        def value(self, grey_BHW: torch.Tensor) -> torch.Tensor:
            broken = grey_BHW.shape[2] == 42 and not any(shape[3] == 42 for shape in self.batches[:-1])
            return grey_BHW * float("nan") if broken else grey_BHW

    folder = write_dataset(tmp_path / "d", [samples()])
    config = config_of([folder], tmp_path / "out", worst=1, batch=1)
    examiner = Examiner(config.model_dump(mode="json"), predictor=Once())  # type: ignore[arg-type]
    (outcome,) = (examiner.process(item) for item in items_of(examiner.sets, None))
    assert [row.score for row in outcome.worst] == [np.inf]


# The table


def table(result: DatasetResult, **changes: Any) -> str:
    return markdown(config_of(["/d"], Path("/out"), **changes), "f00d", [result])


def test_the_table_stands_beside_numbers_of_the_same_protocol() -> None:
    means = {"abs_rel": 0.05123, "delta1": 0.97}
    result = DatasetResult(
        dataset="/data/nyu|x",
        benchmark="nyu",
        images=600,
        means={"disparity": means, "depth": means, "constant": {"abs_rel": 0.4, "delta1": 0.3}},
        baselines={"mean-map": {"disparity": {"abs_rel": 0.3, "delta1": 0.5}}},
        skipped={"bad_image": [f"k{i}" for i in range(30)]},
        outside=7,
    )
    text = table(result)
    one, other = text.split("### disparity")[1].split("### depth")
    assert "| network | abs_rel ↓ | delta1 ↑ | source |" in one
    assert "| **these weights** | 0.05123 | 0.97 |  |" in one
    assert "| Depth Anything V2-L | 0.045 | 0.979 | arXiv 2406.09414, Table 2 |" in one
    assert "| mean-map | 0.3 | 0.5 | baseline |" in one and "best constant" not in one
    assert "V2-L" not in other and "| each image's best constant, by metric | 0.4 | 0.3 | baseline |" in other
    assert "600 images of 654 in the published split" in text and "The published numbers are of 654 images." in one
    assert "7 samples are not part" in text
    assert "bad_image: 30 (`k0`" in text and "`k19`, ...)" in text
    assert "Our choice for the tables of Depth Anything V1 and V2" in text and "caps, crops, masks" in one


@pytest.mark.parametrize("change", [{"limit": 5}, {"max_depth": 5}, {"average": "pixels"}])
def test_another_measurement_has_no_published_numbers(change: dict[str, Any]) -> None:
    result = DatasetResult(dataset="/d", benchmark="nyu", images=5, means={"disparity": {"abs_rel": 0.1}})
    text = table(result, **change)
    assert "V2-L" not in text and "make this another measurement" in text


def test_numbers_of_flip_averages_stand_beside_flip_averages() -> None:
    result = DatasetResult(dataset="/d", benchmark="kitti", images=652, means={"zoedepth": {"abs_rel": 0.1}})
    assert "fine-tuned" not in table(result) and "`flip: true` makes them comparable" in table(result)
    assert "| Depth Anything V2-L, fine-tuned | 0.045 |" in table(result, flip=True)
    result = DatasetResult(dataset="/d", benchmark="kitti", images=652, means={"disparity": {"abs_rel": 0.1}})
    assert "V2-L" not in table(result, flip=True)
    assert "are of the image alone; `flip: false` makes them comparable" in table(result, flip=True)
    assert "| Depth Anything V2-L | 0.074 |" in table(result) and "makes them comparable" not in table(result)


def test_published_numbers_of_another_input_size_have_a_note() -> None:
    result = DatasetResult(dataset="/d", benchmark="kitti", images=652, means={"disparity": {"abs_rel": 0.1}})
    for size, said in ((518, False), (392, True), (756, True)):
        text = table(result, input_size=size)
        assert "| Depth Anything V2-L | 0.074 |" in text
        assert (f"Here the shorter side is {size} pixels; the released networks' default is 518." in text) == said


@pytest.mark.parametrize(("benchmark", "images"), [("diode", 771), ("diode-indoor", 325)])
def test_that_a_split_is_inferred_is_said(benchmark: str, images: int) -> None:
    means = {name: {"abs_rel": 0.1} for name in ("disparity", "marigold-disparity")}
    result = DatasetResult(dataset="/d", benchmark=benchmark, images=images - 1, means=means)
    one, other = table(result, input_size=518).split("### disparity")[1].split("### marigold-disparity")
    assert "| Depth Anything V2-L | 0.066 |" in one and "| Depth Anything V1-L | 0.066 |" in one
    assert "V1 and V2 do not say which images of DIODE" in one and "is inferred" in one
    assert "The published numbers are of" not in one and "inferred" not in other  # Distill-Any-Depth names its list


def test_a_dataset_of_one_s_own_has_no_published_numbers() -> None:
    text = table(DatasetResult(dataset="/d", images=5, means={"disparity": {"abs_rel": 0.1}, "depth": {}}))
    assert "V2-L" not in text and "### depth" not in text and "## /d" in text


# Baselines, flips, protocols by dataset


def depth_png(value_HW: np.ndarray) -> bytes:
    return png(np.rint(value_HW * 1000).astype(np.uint16))


def test_the_mean_map_by_hand(tmp_path: Path) -> None:
    near, far = np.full((48, 64), 2.0), np.full((96, 128), 4.0)
    near[:24], far[:, :64] = 0, 8.0  # the upper half of the first has no depth
    made = {f"k{i}": {"jpg": jpeg(smooth(i, *d.shape)), "depth.png": depth_png(d)} for i, d in enumerate((near, far))}
    path = write_dataset(tmp_path / "train", [{"k0": made["k0"]}, {"k1": made["k1"], "bare": unlabelled(0)}])
    found = mean_map(Dataset.open(path))
    assert found.depth_m_RC.shape == GRID and found.images == 2
    assert found.depth_m_RC[0, 0] == pytest.approx(8.0) and found.depth_m_RC[0, 63] == pytest.approx(4.0)
    # below, four pixels of the second share a cell with one of the first
    assert found.depth_m_RC[47, 0] == pytest.approx((2 + 4 * 8) / 5)
    assert found.disparity_RC[47, 63] == pytest.approx((1 / 2 + 4 / 4) / 5)
    assert found.typical_m == pytest.approx((2 + 6) / 2)
    only = mean_map(Dataset.open(path), limit=1)
    assert only.images == 1 and np.allclose(only.depth_m_RC, 2.0)  # where nothing was seen, the mean of all
    capped = mean_map(Dataset.open(path), max_depth=5.0)
    assert capped.depth_m_RC[0, 63] == pytest.approx(4.0) and capped.typical_m == pytest.approx(3.0)
    at_cap = mean_map(Dataset.open(path), max_depth=4.0)  # as in the evaluation, a cap does not count itself
    assert at_cap.images == 1 and np.allclose(at_cap.depth_m_RC, 2.0)
    maps = found.predictions(metric=True)
    assert maps["mean-map"](48, 64) == pytest.approx(found.depth_m_RC)
    assert (maps["training-constant"](3, 5) == found.typical_m).all() and maps["mean-map"](10, 20).shape == (10, 20)


def test_a_baseline_is_measured_like_the_network(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "d", [{f"k{i}": sample(3, 48, 64) for i in range(2)}])
    baseline = {"dataset": folder}
    (result,) = known(config_of([folder], tmp_path / "out", baseline=baseline))
    assert result.baselines["mean-map"]["disparity"]["abs_rel"] < 1e-6  # it has seen these very images
    assert result.baselines["training-constant"]["disparity"]["abs_rel"] > 0.1
    (metres,) = known(config_of([folder], tmp_path / "out", baseline=baseline), Metres())
    assert metres.baselines["mean-map"]["metric"]["abs_rel"] < 1e-6
    assert "| mean-map |" in (tmp_path / "out" / "evaluation.md").read_text()
    photos = write_dataset(tmp_path / "photos", [{"k": unlabelled(0)}], with_depth=False)
    with pytest.raises(DataError, match="photos: has no depth to average"):
        known(config_of([folder], tmp_path / "out", baseline={"dataset": photos}))


def test_a_mean_map_is_cut_as_the_image_is(tmp_path: Path) -> None:
    """KITTI's images lose their upper rows: a map squeezed into what is left would be off by several per cent."""
    row_HW, column_HW = np.mgrid[:375, :1242]
    depth_HW = 5.0 + 0.1 * (375 - row_HW) + 0.01 * column_HW
    members = {"jpg": jpeg(smooth(0, 375, 1242)), "depth.png": depth_png(depth_HW)}
    folder = write_dataset(tmp_path / "kitti", [{f"k{i}": members for i in range(2)}])
    entry = {"path": folder, "benchmark": "kitti"}
    (result,) = known(config_of([entry], tmp_path / "out", baseline={"dataset": folder}), Metres())
    assert result.images == 2 and result.baselines["mean-map"]["metric"]["abs_rel"] < 5e-3
    assert result.baselines["training-constant"]["metric"]["abs_rel"] > 0.1


def test_a_constant_that_is_aligned_becomes_the_image_s_own_mean_disparity(tmp_path: Path) -> None:
    """So `training-constant` is a floor of networks of metres; under an aligned protocol it has seen the truth."""
    folder = write_dataset(tmp_path / "d", [{"k": sample(3, 48, 64)}])
    other = write_dataset(tmp_path / "other", [{"k": sample(4, 28, 28)}])
    (result,) = known(config_of([folder], tmp_path / "out", baseline={"dataset": other}))
    depth_K = (depth(3, 48, 64) / 1000)[depth(3, 48, 64) > 0]
    mean = np.mean(1 / depth_K)
    found = result.baselines["training-constant"]
    assert found["disparity"]["abs_rel"] == pytest.approx(np.mean(np.abs(mean - 1 / depth_K) * depth_K), rel=1e-5)
    assert found["depth"]["abs_rel"] == pytest.approx(np.mean(np.abs(1 / mean - depth_K) / depth_K), rel=1e-5)
    for name, value in result.means["constant"].items():
        best = value >= found["depth"][name] if name.startswith("delta") else value <= found["depth"][name] + 1e-12
        assert best, name


def test_flips_make_the_mirror_image_score_the_same(tmp_path: Path, weights: str) -> None:
    image, depth_HW = smooth(0, 28, 42), 1 + smooth(50, 28, 42)[..., 0] * 0.03
    folders = []
    for name, step in (("plain", 1), ("mirrored", -1)):
        members = {"png": png(image[:, ::step]), "depth.png": depth_png(depth_HW[:, ::step])}
        folders.append(write_dataset(tmp_path / name, [{"k": members}]))
    plain, mirrored = evaluate(config_of(folders, tmp_path / "out", weights=weights))
    assert plain.means["disparity"]["abs_rel"] != pytest.approx(mirrored.means["disparity"]["abs_rel"], rel=1e-4)
    plain, mirrored = evaluate(config_of(folders, tmp_path / "out", weights=weights, flip=True))
    assert plain.means["disparity"]["abs_rel"] == pytest.approx(mirrored.means["disparity"]["abs_rel"], rel=1e-4)


def test_protocols_by_dataset(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "d", [samples()])
    entries = [folder, {"path": folder, "protocols": ["moge", "midas"]}]
    first, second = known(config_of(entries, tmp_path / "out", protocols=["marigold-disparity"], max_depth=9))
    assert first.means.keys() == {"marigold-disparity", "constant"}
    assert second.means.keys() == {"moge", "midas", "constant"} and "bad_pixel" in second.means["midas"]
    with pytest.raises(ConfigError, match=r"datasets\.1: protocol: found 'midas'; .* needs a cap"):
        known(config_of(entries, tmp_path / "out"))
    with pytest.raises(ConfigError, match="compares depths, this network predicts disparity"):
        known(config_of([folder], tmp_path / "out", protocols=["metric"]))


def test_the_crop_counts_and_the_split_is_left_out(tmp_path: Path) -> None:
    good = sample(0, 480, 640)
    folder = write_dataset(tmp_path / "nyu", [{"k": good, "small": sample(1, 48, 64)}])
    (result,) = known(config_of([{"path": folder, "benchmark": "nyu"}], tmp_path / "out"))
    assert (result.images, result.skipped, result.benchmark) == (1, {"not_the_benchmarks_size": ["small"]}, "nyu")
    lines = [json.loads(line) for line in (tmp_path / "out" / "images.jsonl").read_text().splitlines()]
    assert lines[0]["pixels"] == (471 - 45) * (601 - 41)
    diode = write_dataset(
        tmp_path / "diode", [{"val/indoors/a": sample(2, 28, 28), "val/outdoor/b": sample(3, 28, 28)}]
    )
    (result,) = known(config_of([{"path": diode, "benchmark": "diode-outdoor"}], tmp_path / "out"))
    assert (result.images, result.outside, result.skipped) == (1, 1, {})


def test_a_request_to_stop_leaves_nothing(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "d", shards())
    stop = StopFlag()
    seen: list[int] = []

    def on_progress(done: int, total: int) -> None:
        seen.append(done)
        stop.set("SIGINT")

    with pytest.raises(Stopped, match="SIGINT"):
        evaluate(config_of([folder], tmp_path / "out"), predictor=Known(), on_progress=on_progress, stop=stop)  # type: ignore[arg-type]
    assert seen == [1] and not list((tmp_path / "out").iterdir())
