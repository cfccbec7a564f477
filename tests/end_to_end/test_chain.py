"""The main job by the command line: encoder, teacher, labels, student, evaluation, pictures; and what lies on disk."""

from __future__ import annotations

import json
import shutil
import subprocess
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from tests.end_to_end.cli import (
    SIZE,
    Running,
    events,
    json_lines,
    run_values,
    succeed,
    teacher_values,
    write_config,
)
from tests.end_to_end.conftest import World
from trainer.checkpoint import verify_checkpoint
from trainer.config import read_config
from trainer.config_train import TrainConfig

pytestmark = pytest.mark.timeout(1800)  # the commands have a limit of their own


def label_arguments(world: World) -> tuple[str, ...]:
    return ("label", "run", "data/wide", "--weights", str(world.teacher), "--input-size", str(SIZE), "--workers", "2")


@pytest.fixture(scope="module")
def labels(world: World) -> Path:
    """The sidecar's folder, as `label run` prints it: on the last line, and nothing else on stdout."""
    done = succeed(*label_arguments(world), cwd=world.folder)
    assert len(done.out.splitlines()) == 1
    return Path(done.out.strip())


@pytest.fixture(scope="module")
def student(encoder_world: World, labels: Path) -> tuple[Path, list[str]]:
    """A student's folder, and what its ranks served over HTTP while it trained."""
    world = encoder_world
    jitter = {"jitter_p": 0.8, "blur_p": 0.5, "blur_sigma": [0.1, 0.5], "cutmix_p": 0.5}
    roles = {
        "labelled": {"datasets": [str(world.data / "labelled")], "batch": 4, "lanes": 2},
        "unlabelled": {
            "datasets": [str(world.data / "wide")], "labels": [str(labels)], "batch": 8, "lanes": 2,
            "perturbation": jitter,
        },
    }  # fmt: skip
    values = run_values("student", "student", roles, steps=40)
    values["model"]["encoder_weights"] = str(world.encoder)
    write_config(world.folder / "student.yaml", values)
    running = Running("train", "student.yaml", cwd=world.folder)
    run = world.runs / "student"
    pages: list[str] = []

    def scraped_twice() -> bool:
        page = scrape(run / "telemetry")
        if counter(page, "fathom_steps_total") > (counter(pages[-1], "fathom_steps_total") if pages else 0):
            pages.append(page)
        return len(pages) >= 2

    running.until(scraped_twice, "two scrapes between which fathom_steps_total moved")
    done = running.wait()
    assert done.status == 0, done.err
    return run, pages


def scrape(discovery: Path) -> str:
    """The metrics page of rank 0, or nothing while there is none."""
    for entry in sorted(discovery.glob("train-*.json")) if discovery.is_dir() else []:
        try:
            content = json.loads(entry.read_text())[0]
            if content["labels"]["rank"] != "0":
                continue
            with urllib.request.urlopen(f"http://{content['targets'][0]}/metrics", timeout=5) as answer:
                return str(answer.read().decode())
        except OSError:  # it left between the two
            continue
    return ""


def counter(page: str, name: str) -> float:
    families = {family.name: family for family in text_string_to_metric_families(page)}
    family = families.get(name.removesuffix("_total"))
    return sum(sample.value for sample in family.samples if sample.name == name) if family else 0.0


def test_a_run_leaves_what_the_contract_lists(world: World) -> None:
    run = world.runs / "teacher"
    assert read_config(TrainConfig, run / "config.yaml") == read_config(
        TrainConfig, write_config(world.folder / "again.yaml", teacher_values(world.data) | {"runs": str(world.runs)})
    )
    environment = json.loads((run / "environment.json").read_text())
    assert environment["workers"] == 2 and {"torch", "deepspeed", "ray"} <= environment["packages"].keys()
    checkpoints = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert checkpoints == ["latest", "step_00000003", "step_00000006"]
    assert (run / "checkpoints" / "latest").read_text() == "step_00000006"
    assert verify_checkpoint(str(run / "checkpoints" / "step_00000006")) is None
    assert events(run) == ["started", "checkpoint", "checkpoint", "finished"]
    assert [line["step"] for line in json_lines(run / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    for name in ("step_00000003.png", "step_00000006.png"):
        with Image.open(run / "previews" / name) as picture:
            assert picture.size[0] == 4 * SIZE  # image, target, prediction, valid
    assert {path.name for path in (run / "weights").iterdir()} >= {"model.safetensors", "config.json"}
    assert sorted(path.name for path in run.iterdir()) == [
        ".lock", "checkpoints", "config.yaml", "environment.json", "journal.jsonl", "metrics.jsonl", "previews",
        "tensorboard", "weights",
    ]  # fmt: skip


def test_labels_are_committed_once(world: World, labels: Path) -> None:
    ledgers = sorted((labels / "ledger").iterdir())
    assert [path.name for path in ledgers] == [f"{number:06d}.json" for number in range(4)]
    before = {path: path.stat().st_mtime_ns for path in labels.rglob("*")}
    again = succeed(*label_arguments(world), cwd=world.folder)
    assert again.out.strip() == str(labels)
    assert {path: path.stat().st_mtime_ns for path in labels.rglob("*")} == before


def test_label_status_sums_up_the_ledger(world: World, labels: Path) -> None:
    done = succeed("label", "status", labels, "--dataset", "data/wide", cwd=world.folder)
    shards, images, *_ = done.out.splitlines()
    assert shards == "shards: 4 done, 0 in hand, 0 to do; runs at work: 0"
    assert images.startswith("images: 32, of which 0 without a label; ")
    assert "not done" not in done.out


def test_the_student_learns_from_all_three_terms(student: tuple[Path, list[str]]) -> None:
    run, _ = student
    last = json_lines(run / "metrics.jsonl")[-1]
    assert last["step"] == 40
    assert last["terms"].keys() == {"labelled", "unlabelled", "feature"}
    assert not last["skipped"] and last["loss"] < json_lines(run / "metrics.jsonl")[0]["loss"]
    assert yaml.safe_load((run / "config.yaml").read_text())["task"] == {"kind": "student"}


def test_metrics_are_served_while_it_runs_and_forgotten_after(student: tuple[Path, list[str]]) -> None:
    run, (first, second) = student
    assert 0 < counter(first, "fathom_steps_total") < counter(second, "fathom_steps_total") <= 40
    assert counter(second, "fathom_world_size") == 2
    assert 'fathom_loss{term="feature"}' in second
    assert not (run / "telemetry").exists()


def test_promtool_finds_nothing_wrong_with_the_metrics(student: tuple[Path, list[str]]) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed")
    page = student[1][-1]
    done = subprocess.run(
        [promtool, "check", "metrics"], input=page, text=True, capture_output=True, check=False, timeout=60
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_evaluate_and_predict_take_the_weights(world: World, student: tuple[Path, list[str]]) -> None:
    weights = student[0] / "weights"
    values = {"weights": str(weights), "datasets": ["data/labelled"], "input_size": SIZE, "out": "evaluation"}
    done = succeed("evaluate", write_config(world.folder / "evaluate.yaml", values), cwd=world.folder)
    assert "24 images" in done.out and "abs_rel" in done.out
    content = json.loads((world.folder / "evaluation" / "evaluation.json").read_text())
    means = content["datasets"][0]["means"]
    assert means.keys() == {"depth", "disparity", "constant"}
    assert all(np.isfinite(list(values.values())).all() for values in means.values())
    with Image.open(world.folder / "evaluation" / "sheet.png") as sheet:
        assert sheet.size == (3 * SIZE, 8 * (SIZE + 4))
    succeed(
        "predict", "evaluation/sheet.png", "--weights", weights, "--out", "pictures", "--input-size", SIZE,
        cwd=world.folder,
    )  # fmt: skip
    with (
        Image.open(world.folder / "pictures" / "sheet.depth.png") as depth,
        Image.open(world.folder / "evaluation" / "sheet.png") as source,
    ):
        assert depth.size == source.size and depth.mode.startswith("I")


def test_a_resumed_finished_run_changes_nothing(world: World) -> None:
    run = world.runs / "teacher"
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    done = succeed("train", "teacher.yaml", "--resume", cwd=world.folder)
    assert "6 steps done" in done.out
    assert {path: path.read_bytes() for path in before} == before
