"""DA-2K: a small set of our own, judged by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dataio.spec import DataError
from tests.trainer.test_evaluate import Known, Metres, config_of
from trainer.evaluate import evaluate
from trainer.evaluate_pairs import Pair, PairSet, judge


def pair(first: list[int], second: list[int], closer: str = "point1") -> dict[str, Any]:
    return {"point1": first, "point2": second, "closer_point": closer}


def write_pairs(folder: Path, content: Any) -> str:
    """Two images: one darkens from left to right, the other lightens from top to bottom."""
    (folder / "images" / "indoor").mkdir(parents=True)
    fall_W = np.linspace(250, 5, 56)
    fall_HW, rise_HW = np.broadcast_to(fall_W, (28, 56)), np.broadcast_to(fall_W[::-1][:28, None], (28, 42))
    for name, grey_HW in (("a b.png", fall_HW), ("c.png", rise_HW)):
        Image.fromarray(np.repeat(grey_HW.astype(np.uint8)[..., None], 3, -1)).save(folder / "images" / "indoor" / name)
    (folder / "annotations.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return str(folder)


FALL, RISE = "images/indoor/a b.png", "images/indoor/c.png"
ANNOTATIONS = {
    RISE: [pair([27, 3], [0, 40]), pair([0, 0], [27, 0]), pair([20, 1], [3, 1])],  # right, wrong, right
    FALL: [pair([5, 50], [5, 3], "point2")],  # right: the left is lighter, so nearer
}


def test_the_accuracy_is_of_pairs_not_of_images(tmp_path: Path) -> None:
    folder = write_pairs(tmp_path / "DA 2K", ANNOTATIONS)
    (result,) = evaluate(
        config_of([{"path": folder, "benchmark": "da-2k"}], tmp_path / "out"),
        predictor=Known(),  # type: ignore[arg-type]
    )
    assert result.images == 2 and result.skipped == {}
    assert result.means == {"pairs": {"accuracy": 3 / 4}}
    text = (tmp_path / "out" / "evaluation.md").read_text()
    assert (
        "| Depth Anything V2-L | 0.971 | arXiv 2406.09414, Table 2 |" in text and "| **these weights** | 0.75 |" in text
    )
    assert not (tmp_path / "out" / "sheet.png").exists()


def test_metres_are_smaller_where_it_is_nearer(tmp_path: Path) -> None:
    class Darker(Metres):
        def value(self, grey_BHW: torch.Tensor) -> torch.Tensor:
            return 5 - grey_BHW

    folder = write_pairs(tmp_path / "pairs", ANNOTATIONS)
    config = config_of([{"path": folder, "benchmark": "da-2k"}], tmp_path / "out")
    (result,) = evaluate(config, predictor=Darker())  # type: ignore[arg-type]
    assert result.means["pairs"]["accuracy"] == 3 / 4


def test_points_are_rows_and_columns() -> None:
    prediction = np.arange(6.0).reshape(2, 3)  # larger is nearer
    assert judge(prediction, [Pair((1, 0), (0, 2), True)], metric=False) == {"accuracy": 1.0, "pixels": 1.0}
    assert judge(prediction, [Pair((1, 0), (0, 2), True)], metric=True) == {"accuracy": 0.0, "pixels": 1.0}
    assert judge(prediction, [Pair((1, 0), (0, 2), False)], metric=False) == {"accuracy": 0.0, "pixels": 1.0}
    equal = [Pair((0, 0), (0, 0), first) for first in (True, False)]
    assert judge(prediction, equal, metric=False) == {"accuracy": 0.0, "pixels": 2.0}
    assert judge(prediction, [Pair((2, 0), (0, 0), True)], metric=False) == "point_outside_the_image"
    assert judge(prediction, [Pair((0, 0), (0, 3), True)], metric=False) == "point_outside_the_image"
    assert judge(prediction, [Pair((0, -1), (0, 0), True)], metric=False) == "point_outside_the_image"
    assert judge(prediction, [Pair((0, 0), (-1, 0), True)], metric=False) == "point_outside_the_image"
    assert judge(prediction, [], metric=False) == "no_pairs"
    broken = judge(prediction * np.nan, [Pair((0, 0), (1, 0), True)], metric=False)
    assert isinstance(broken, dict) and np.isnan(broken["accuracy"])


def test_what_cannot_be_judged_is_named(tmp_path: Path) -> None:
    folder = write_pairs(
        tmp_path / "pairs", {**ANNOTATIONS, "images/gone.png": [pair([0, 0], [1, 1])], FALL: [pair([28, 0], [0, 0])]}
    )
    config = config_of([{"path": folder, "benchmark": "da-2k"}], tmp_path / "out")
    (result,) = evaluate(config, predictor=Known())  # type: ignore[arg-type]
    assert result.images == 1 and result.means["pairs"]["accuracy"] == 2 / 3
    assert result.skipped == {"missing_image": ["images/gone.png"], "point_outside_the_image": [FALL]}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[]", "holds list, a JSON object"),
        ("{", "not valid JSON"),
        ({}, "holds no pairs; unpack the benchmark again"),
        ({"a.png": {"point1": 1}}, "a.png: found .*; a list of pairs is needed"),
        ({"a.png": [{"point1": [1, 2], "point2": [3], "closer_point": "point1"}]}, "a.png: found .*; a pair is"),
        ({"a.png": [pair([1, 2], [3, 4], "point3")]}, "a.png: found .*; a pair is"),
        ({"a.png": [{"point1": [1, 2], "point2": [3, 4]}]}, "a.png: found .*; a pair is"),
    ],
)
def test_damaged_annotations_are_refused(tmp_path: Path, content: Any, words: str) -> None:
    folder = write_pairs(tmp_path / "pairs", content)
    with pytest.raises(DataError, match=rf"annotations\.json: .*{words}") as caught:
        PairSet.open(folder)
    assert "\n" not in str(caught.value)


def test_a_folder_without_annotations(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"annotations\.json: no such file; name the unpacked folder of DA-2K"):
        PairSet.open(str(tmp_path))
