"""What the next driver reads off the journal of the one before."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.attempts import Ending
from trainer.history import History, history_of


def line(event: str, **facts: Any) -> dict[str, Any]:
    return {"time": 0.0, "event": event, **facts}


DIED = line("failed", attempt=1, error="WorkerDied: rank 1 died", kind="died", step=10)
ENDING = Ending(kind="died", step=10, reason="rank 1 died")


def test_nothing_has_happened() -> None:
    assert history_of([]) == history_of([line("submitted", job="a")]) == History()


def test_a_row_that_was_cut_off_goes_on() -> None:
    lines = [
        line("started", attempt=1),
        DIED,
        line("recovering", attempt=1),
        line("started", attempt=2),
    ]
    assert history_of(lines) == History(attempt=2, endings=[ENDING])
    lines.append(line("running"))
    assert history_of(lines) == History(attempt=2, endings=[ENDING], ran=True)
    preempted = [*lines, line("stopping"), line("preempted", attempt=2, step=20, reason="a machine goes")]
    assert history_of(preempted).endings == [ENDING, Ending(kind="preempted", step=20, reason="a machine goes")]


@pytest.mark.parametrize("waiting", [[], [line("pending", attempt=1)], [line("recovering", attempt=1)]])
def test_so_does_one_that_was_waiting(waiting: list[dict[str, Any]]) -> None:
    assert history_of([line("started", attempt=1), DIED, *waiting]).endings == [ENDING]


@pytest.mark.parametrize("end", [line("gave_up"), line("stopped", reason="SIGTERM"), line("finished")])
def test_one_that_ended_by_itself_is_over_but_attempts_are_counted_on(end: dict[str, Any]) -> None:
    lines = [line("started", attempt=1), DIED, line("recovering"), line("started", attempt=2), end]
    assert history_of(lines) == History(attempt=2)
    assert history_of([*lines, line("started", attempt=3)]) == History(attempt=3)


def test_roll_backs_count_and_forget_what_was_before() -> None:
    diverged = line("failed", attempt=2, error="TrainingDiverged: step 25: so", kind="failed", step=30)
    lines = [DIED, line("recovering"), diverged, line("rolled_back", noticed=30, step=20), line("started", attempt=3)]
    assert history_of(lines) == History(attempt=3, rollbacks=[30])


def test_an_error_without_a_kind_is_of_another_time() -> None:
    assert history_of([line("failed", error="x"), line("recovering"), line("started", attempt=1)]).endings == []


@pytest.mark.parametrize(("error", "reason"), [("MemoryError: ", "MemoryError"), ("A: b\nc", "b"), ("bare", "bare")])
def test_an_error_without_a_word_has_its_type(error: str, reason: str) -> None:
    (ending,) = history_of([line("failed", error=error, kind="failed", step=0)]).endings
    assert ending.reason == reason
