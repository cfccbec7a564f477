"""What the quickstart plans and claims, without running it (tests/end_to_end runs it)."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from launcher import recipes
from trainer.quickstart import LADDER, Request, Results, Sizes, stage_config, table, verdict
from trainer.tasks.base import make_task

NAMES = ("encoder", "teacher", "student")


@pytest.fixture
def request_(tmp_path: Path) -> Request:
    plain = {name: yaml.safe_load(recipes.read(f"quickstart-{name}")) for name in NAMES}
    return Request(out=str(tmp_path), recipes=plain, seed=5)


@pytest.mark.parametrize("name", [*NAMES, *LADDER])
def test_every_stage_is_a_valid_configuration_inside_the_folder(request_: Request, name: str, tmp_path: Path) -> None:
    config = stage_config(request_, name, str(tmp_path / "labels"))
    make_task(config)
    assert (config.name, config.seed, config.cluster.workers) == (name, 5, 2)
    paths = [path for spec in config.data.roles.values() for path in (*spec.datasets, *spec.labels)]
    assert all(path.startswith(str(tmp_path)) for path in (config.folder, *paths))


def test_the_controls_see_as_many_images_as_the_student(request_: Request) -> None:
    student = stage_config(request_, "student", "labels")
    assert [spec.batch for spec in student.data.roles.values()] == [8, 16]
    for name in LADDER:
        config = stage_config(request_, name, "labels")
        assert config.steps * config.global_batch == student.steps * student.global_batch, name
    jitter = stage_config(request_, "labelled-only-jitter", "labels").data.roles["labelled"].perturbation
    strong = student.data.roles["unlabelled"].perturbation
    assert (jitter.jitter_p, jitter.blur_p, jitter.grayscale_p, jitter.blur_sigma) == (
        strong.jitter_p,
        strong.blur_p,
        strong.grayscale_p,
        strong.blur_sigma,
    )
    assert jitter.cutmix_p == 0 < strong.cutmix_p


def test_teacher_student_and_alignment_share_one_encoder_file(request_: Request) -> None:
    files = {stage_config(request_, name, "labels").model.encoder_weights for name in ("teacher", "student", *LADDER)}
    assert len(files) == 1
    given = Request(out=request_.out, recipes=request_.recipes, encoder_weights="dinov2.pth", preset="v1-vits")
    config = stage_config(given, "student", "labels")
    assert (config.model.preset, config.model.encoder_weights) == ("v1-vits", str(Path("dinov2.pth").absolute()))


def test_smaller_sizes_shrink_steps_and_warm_up(request_: Request) -> None:
    small = Request(out=request_.out, recipes=request_.recipes, sizes=Sizes(steps=0.01))
    assert stage_config(small, "encoder").steps == 5
    assert stage_config(small, "encoder").optim.warmup_samples < 5 * 24


def results(teacher: float, student: float) -> Results:
    def row(delta1: float) -> dict[str, dict[str, float]]:
        metrics = {"abs_rel": 0.25, "delta1": delta1}
        domains = ("wide", "wide, disparity space", "wide, best constant", "labelled domain")
        return dict.fromkeys(domains, metrics)

    rows = {"teacher": row(teacher), "student": row(student), "labelled-only-jitter": row(0.65)}
    return Results(rows=rows, images=300)


def test_the_verdict_says_what_the_rows_show_and_names_the_control() -> None:
    better, worse = verdict(results(0.5, 0.531), ladder=False), verdict(results(0.5, 0.49), ladder=False)
    assert "3.1 points above" in better and "1.0 points below" in worse
    assert all("no evidence that unlabelled images help" in text and "300 scenes" in text for text in (better, worse))
    assert "reaches 0.6500 against the student's 0.5310" in verdict(results(0.5, 0.531), ladder=True)


def test_the_table_has_the_floor_and_every_row() -> None:
    header, rows = table(results(0.5, 0.53))
    assert [row[0] for row in rows] == ["best constant", "teacher", "student", "labelled-only-jitter"]
    assert all(len(row) == len(header) for row in rows)
    assert rows[2][header.index("delta1")] == "0.5300"
