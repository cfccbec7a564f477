"""Real input: photographs of odd sizes, 16-bit depth maps with holes and of two scales, through the whole chain."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.end_to_end.cli import json_lines, run_values, succeed, write_config

pytestmark = pytest.mark.timeout(1800)  # the commands have a limit of their own

SIZE = 112


@pytest.fixture(scope="module")
def chain(shared_real: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of: data, a teacher, its labels, a student, an evaluation, predictions and contact sheets."""
    folder = tmp_path_factory.mktemp("real")
    arguments = ("--role", "labelled", "--depth-scale", "0.001", "--depth-scale-of", "tum_*=0.0002")
    succeed("data", "pack", shared_real / "rgbd", "data/rgbd", *arguments, cwd=folder)
    succeed("data", "pack", shared_real / "photos", "data/photos", "--shard-mib", "1", cwd=folder)
    labelled = {"labelled": {"datasets": ["data/rgbd"], "batch": 2, "lanes": 2}}
    train(folder, "teacher", labelled, 40)
    teacher = folder / "runs" / "teacher" / "weights"
    done = succeed("label", "run", "data/photos", "--weights", teacher, "--input-size", SIZE, cwd=folder)
    labels = done.out.strip()
    jitter = {"jitter_p": 0.8, "blur_p": 0.5, "cutmix_p": 0.5}
    unlabelled = {"datasets": ["data/photos"], "labels": [labels], "batch": 4, "lanes": 2, "perturbation": jitter}
    train(folder, "student", {**labelled, "unlabelled": unlabelled}, 10)
    student = folder / "runs" / "student" / "weights"
    values = {"weights": str(student), "datasets": ["data/rgbd"], "input_size": SIZE, "out": "evaluation"}
    succeed("evaluate", write_config(folder / "evaluate.yaml", values), cwd=folder)
    arguments = ("--weights", teacher, "--out", "predictions", "--input-size", SIZE)
    succeed("predict", shared_real / "photos", *arguments, cwd=folder)
    succeed("data", "show", "data/rgbd", "--out", "rgbd.png", "--count", "4", cwd=folder)
    succeed("data", "show", "data/photos", "--out", "labels.png", "--count", "4", "--labels", labels, cwd=folder)
    return folder


def train(folder: Path, name: str, roles: dict[str, object], steps: int) -> None:
    values = run_values(name, name, roles, steps=steps, optim={"encoder_lr": 1e-3, "decoder_lr": 3e-3})
    values["data"]["input_size"] = SIZE
    values["task"] |= {"feature_weight": 0} if name == "student" else {}
    succeed("train", write_config(folder / f"{name}.yaml", values), cwd=folder)


def test_nothing_is_skipped(chain: Path) -> None:
    for name, samples in (("rgbd", 4), ("photos", 12)):
        assert json.loads((chain / "data" / name / "pack_report.json").read_text()) == {
            "packed": samples,
            "skipped": {},
        }
    assert not list((chain / "runs").glob("*/quarantine*"))


def test_both_trainings_take_finite_steps(chain: Path) -> None:
    for name, steps in (("teacher", 40), ("student", 10)):
        lines = json_lines(chain / "runs" / name / "metrics.jsonl")
        assert len(lines) == steps and not any(line["skipped"] for line in lines)
        assert all(np.isfinite(line["loss"]) for line in lines)


def test_labels_cover_every_photograph_at_its_aspect(chain: Path, shared_real: Path) -> None:
    (store,) = (chain / "data" / "photos" / "labels").iterdir()
    done = succeed("label", "status", store, "--dataset", "data/photos", cwd=chain)
    assert "images: 12, of which 0 without a label" in done.out
    assert ", 0 to do; " in done.out and "failed" not in done.out and "not done" not in done.out


def test_evaluation_reads_both_depth_scales(chain: Path) -> None:
    """Depth in metres is right for both: the best constant, which knows nothing of pictures, is off by as much."""
    (result,) = json.loads((chain / "evaluation" / "evaluation.json").read_text())["datasets"]
    assert result["images"] == 4 and result["skipped"] == {}
    assert result["means"].keys() == {"depth", "disparity", "constant"}
    assert 0 < result["means"]["constant"]["abs_rel"] < 1
    with Image.open(chain / "evaluation" / "sheet.png") as sheet:
        assert sheet.width == 3 * 320  # 640 x 480 at a height of 240, three times


def test_predictions_have_the_photographs_sizes(chain: Path, shared_real: Path) -> None:
    photos = sorted((shared_real / "photos").glob("*.jpg"))
    assert len(photos) == 12
    for photo in photos:
        with Image.open(photo) as source, Image.open(chain / "predictions" / f"{photo.stem}.png") as picture:
            assert picture.size == (2 * source.width, source.height)
        with Image.open(chain / "predictions" / f"{photo.stem}.depth.png") as depth:
            code_HW = np.asarray(depth)
            assert depth.size == source.size and code_HW.dtype.kind in "iu" and len(np.unique(code_HW)) > 50
