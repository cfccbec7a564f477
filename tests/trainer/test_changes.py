"""What a resume may change of a run's configuration, and how differences are said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.trainer.test_run import teacher
from trainer.changes import differences, listing, refuse_changes
from trainer.config import ConfigError


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"optim__optimizer": "adam"}, "optim.optimizer: is 'adam', but the run to resume has 'adamw';"),
        ({"seed": 7}, "seed: is 7, but the run to resume has 0;"),
        ({"task__kind": "pretext"}, "task.kind: is 'pretext', but the run to resume has 'teacher';"),
        ({"model__preset": "v2-vits"}, "model.preset: is 'v2-vits', but the run to resume has 'tiny';"),
        ({"model__position_mode": "exact"}, "model.position_mode: is 'exact', but the run to resume has None;"),
        ({"data__input_size": 56}, "data.input_size: is 56, but the run to resume has 28;"),
        ({"data__shuffle_window": 9}, "data.shuffle_window: is 9, but the run to resume has 512;"),
        ({"data__roles__labelled__lanes": 2}, "data.roles.labelled.lanes: is 2, but the run to resume has 4;"),
        (
            {"data__roles__labelled__datasets": ["/e"]},
            "data.roles.labelled.datasets: is ['/e'], but the run to resume has ['/d'];",
        ),
        (
            {"data__roles__labelled__perturbation": {"jitter_p": 0.8}},
            "data.roles.labelled.perturbation.jitter_p: is 0.8, but the run to resume has 0.0;",
        ),
        (
            {"data__roles__labelled__min_quality": 0.5},
            "data.roles.labelled.min_quality: is 0.5, but the run to resume has None;",
        ),
    ],
)
def test_what_decides_the_order_and_the_lesson_is_fixed(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        refuse_changes(teacher(tmp_path), teacher(tmp_path, **change))
    assert str(caught.value) == f"{says} use what it has, or start under another name (from its weights: model.weights)"


FREE: dict[str, Any] = {
    "steps": 9,
    "optim__encoder_lr": 1e-4,
    "engine__micro_batch": 2,
    "cluster__workers": 2,
    "checkpoint__keep": 1,
    "model__activation_checkpointing": True,
    "data__threads": 3,
    "data__prefetch": 1,
    "data__max_bad_fraction": 0.5,
}


@pytest.mark.parametrize("name", FREE)
def test_what_does_not_may_change(tmp_path: Path, name: str) -> None:
    refuse_changes(teacher(tmp_path), teacher(tmp_path, **{name: FREE[name]}))


def test_differences_are_found_however_deep() -> None:
    old, new = {"a": 1, "b": {"c": 2, "d": [1]}, "e": {"z": 1}}, {"a": 2, "b": {"c": 3, "d": [1]}, "e": None}
    assert differences("data", old, new) == [("data.a", 1, 2), ("data.b.c", 2, 3), ("data.e", {"z": 1}, None)]
    assert differences("task", {}, {"alpha": 0.5}) == [("task.alpha", None, 0.5)]
    assert differences("task", {"alpha": 0.5}, {}) == [("task.alpha", 0.5, None)]
    assert differences("x", {"y": [1, 2]}, {"y": [1, 3]}) == [("x.y", [1, 2], [1, 3])]
    assert differences("seed", 0, 1) == [("seed", 0, 1)]
    assert differences("seed", 1, 1) == []


def test_many_differences_are_listed_in_a_line() -> None:
    found = [(f"data.{name}", 1, None) for name in "abc"]
    assert listing(found[:1], "was") == "data.a: is None, but was 1"
    assert listing(found, "the run has", shown=2) == (
        "data.a: is None, but the run has 1; data.b: is None, but the run has 1; and 1 more"
    )
