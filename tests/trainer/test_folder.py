"""How a run's folder says that the run stands, and what it counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trainer.folder import RunFolder, RunState, last_end, state_of
from trainer.journal import Journal

STARTED, FINISHED = {"event": "started"}, {"event": "finished", "step": 4}


@pytest.mark.parametrize(
    ("journal", "step"),
    [
        ([], None),
        ([STARTED], None),
        ([STARTED, FINISHED], 4),
        ([STARTED, FINISHED, {"event": "checkpoint_passed_over"}], 4),  # a later look at it changes nothing
        ([STARTED, FINISHED, STARTED], None),  # longer now, and that is not done
        ([STARTED, FINISHED, STARTED, {"event": "failed"}], None),
        ([STARTED, {"event": "stopped", "step": 2}], None),
    ],
)
def test_whether_the_last_attempt_finished(tmp_path: Path, journal: list[dict[str, Any]], step: int | None) -> None:
    for line in journal:
        Journal(str(tmp_path)).write(**line)
    assert RunFolder(str(tmp_path)).finished_step() == step


def test_an_attempt_that_ended_without_a_word_has_no_end() -> None:
    assert last_end([STARTED, {"event": "failed", "error": "x"}]) == {"event": "failed", "error": "x"}
    assert last_end([FINISHED, STARTED, {"event": "checkpoint"}]) is None


@pytest.mark.parametrize(
    ("events", "state", "reason"),
    [
        ([], None, None),
        ([{"event": "submitted"}], "SUBMITTED", None),
        ([{"event": "started", "attempt": 1}], "STARTING", None),
        ([{"event": "started"}, {"event": "running", "attempt": 1}, {"event": "checkpoint"}], "RUNNING", None),
        ([{"event": "failed", "error": "x"}], "FAILED", "x"),
        ([{"event": "failed", "error": "x"}, {"event": "recovering", "because": "y"}], "RECOVERING", "y"),
        ([{"event": "stopping", "reason": "SIGTERM"}], "STOPPING", "SIGTERM"),
        ([{"event": "stopped", "reason": "SIGINT"}], "CANCELLED", "SIGINT"),
        ([{"event": "stopped", "reason": "PREEMPTED"}], "PENDING", "PREEMPTED"),
        ([{"event": "finished", "reason": None}], "SUCCEEDED", None),
    ],
)
def test_the_state_is_read_off_what_happened(
    events: list[dict[str, Any]], state: str | None, reason: str | None
) -> None:
    found = state_of(events)
    assert (found.state, found.reason) == (state, reason) if found else state is None


def test_the_attempt_is_the_last_one_named() -> None:
    events = [{"event": "started", "attempt": 2, "time": 5.0}, {"event": "stopping", "reason": "SIGINT", "time": 7.0}]
    assert state_of(events) == RunState(state="STOPPING", reason="SIGINT", attempt=2, time=7.0)


def test_a_bad_sample_counts_once_however_many_met_it(tmp_path: Path) -> None:
    found = (("a", "bad_image"), ("b", "bad_target"))
    bad = [{"key": key, "shard": "0.tar", "reason": reason} for key, reason in found]
    folder = RunFolder(str(tmp_path))
    for rank, lines in enumerate((bad, [*bad, {"key": "a", "shard": "1.tar", "reason": "bad_image"}])):
        Path(folder.quarantine(rank)).write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert folder.quarantined() == {"bad_image": 2, "bad_target": 1}
