"""What a run's time went into: journals and logs made by hand, whose answer can be added up on paper."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.telemetry import BADPUT, RESTARTS
from trainer.goodput import Goodput, goodput_of


def event(when: float, name: str, /, **facts: Any) -> dict[str, Any]:
    return {"time": when, "event": name, **facts}


def line(at: float, number: int, /, **spent: float) -> dict[str, Any]:
    return {"time": at, "step": number, "spent": spent}


def badput(found: Goodput) -> dict[str, float]:
    return {cause: round(seconds, 6) for cause, seconds in found.badput_s.items() if seconds}


CRASH = [
    event(100, "started", attempt=1, resume=None),
    event(110, "running"),
    event(160, "checkpoint", step=20),
    event(200, "failed", kind="died", error="WorkerDied: rank 1", step=20),
    event(202, "recovering", step=20),
    event(205, "started", attempt=2, resume="/runs/a/checkpoints/step_00000020"),
    event(212, "running"),
    event(300, "finished", step=50),
]
CRASH_LINES = [
    line(140, 10, step=20, data_wait=4, other=1),  # began at 115
    line(170, 20, step=20, data_wait=2, checkpoint=8),
    line(190, 30, step=18, data_wait=2),
    {"step": 20, "event": "resumed"},
    line(250, 30, step=25, data_wait=5),  # began at 220
    line(295, 50, step=40, evaluation=5),
]


def test_a_crash_costs_what_is_done_again_and_the_way_back() -> None:
    found = goodput_of(CRASH, CRASH_LINES, now=1000)
    assert found.productive_s == 20 + 20 + 25 + 40
    assert badput(found) == {
        "startup": 15 + 15,
        "data_wait": 4 + 2 + 2 + 5,
        "checkpoint": 8,
        "evaluation": 5,
        "lost_work": 18,
        "recovery": 10 + 5,  # until it was noticed, and until the next start
        "other": 1 + 5,  # the export
    }
    assert found.elapsed_s == 200 and found.ratio == 105 / 200
    assert found.restarts == {"died": 1} and found.attempts == 2
    ordered = sorted(found.stretches, key=lambda stretch: stretch.begin)
    assert (ordered[0].begin, max(stretch.end for stretch in ordered)) == (100, 300)


def test_a_line_that_is_kept_in_part_counts_in_part() -> None:
    journal = [event(0, "started", resume=None), event(50, "failed", kind="hung", error="x", step=15),
               event(60, "started", resume="step_00000015/")]  # fmt: skip
    found = goodput_of(journal, [line(20, 10, step=20), line(40, 20, step=20)], now=70)
    assert found.productive_s == 20 + 10 and badput(found)["lost_work"] == 10


def test_counters_never_fall_while_a_run_goes_on() -> None:
    """Prometheus would take a fall for a restart of the process and count everything again."""
    before = dict.fromkeys(BADPUT, 0.0)
    for now in range(90, 310):
        seen = goodput_of(
            [entry for entry in CRASH if entry["time"] <= now],
            [entry for entry in CRASH_LINES if entry.get("time", 205) <= now],
            now,
        )
        assert all(seen.badput_s[cause] >= before[cause] - 1e-9 for cause in BADPUT), now
        before = seen.badput_s


def test_a_driver_that_ended_without_a_word_is_a_restart_and_a_pause_is_none() -> None:
    journal = [
        event(0, "started", resume=None),
        event(5, "running"),  # then the driver is killed, after its last line at 20
        event(30, "started", resume=None),
        event(60, "stopped", reason="SIGINT", step=20),
        event(5000, "started", resume="step_00000020"),
        event(5040, "finished", step=40),
    ]
    lines = [line(20, 10, step=10), line(50, 10, step=10), line(55, 20, step=5), line(5030, 40, step=20)]
    found = goodput_of(journal, lines, now=9000)
    assert found.restarts == {"driver": 1}
    assert found.productive_s == 10 + 5 + 20
    assert badput(found) == {"startup": 10 + 10 + 10, "lost_work": 10, "recovery": 10, "other": 5 + 10}
    assert found.elapsed_s == 20 + 10 + 30 + 40


def test_waiting_for_machines_is_told_from_recovering() -> None:
    journal = [
        event(12, "submitted", at=10),
        event(20, "pending", reason="waits for room"),
        event(40, "started", resume=None),
        event(50, "failed", kind="lost", error="MachineLost: node", step=0),
        event(55, "pending"),
        event(75, "started", resume=None),
        event(85, "preempted", step=0),
        event(95, "started", resume=None),
        event(99, "resizing", step=0, workers=2),
        event(100, "started", resume=None),
    ]
    found = goodput_of(journal, [], now=110)
    assert badput(found) == {"waiting": 30 + 20 + 10, "startup": 10 + 10 + 4 + 10, "recovery": 5 + 1}
    assert found.restarts == {"lost": 1, "preempted": 1, "resized": 1}
    assert found.ratio is None  # nothing is known of any step


def test_a_run_that_waits_still_and_one_that_starts() -> None:
    assert badput(goodput_of([event(1, "submitted", at=5)], [], now=25)) == {"waiting": 20}
    assert badput(goodput_of([event(5, "started", resume=None)], [], now=25)) == {"startup": 20}
    assert goodput_of([], [], now=25).elapsed_s == 0


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ([event(5, "failed", kind="away", error="StorageError: gone", step=0)], "away"),
        ([event(5, "failed", error="KeyError: x", step=0)], "failed"),
        ([event(5, "failed", kind="failed", error="OutOfMemory: rank 0", step=0)], "failed"),
        ([event(5, "failed", kind="failed", error="TrainingDiverged: x", step=9), event(6, "rolled_back", step=3)],
         "rolled_back"),
        ([event(5, "stopped", reason="PREEMPTED", step=3)], "preempted"),
    ],
)  # fmt: skip
def test_reasons(entries: list[dict[str, Any]], reason: str) -> None:
    journal = [event(0, "started", resume=None), *entries, event(9, "started", resume=None)]
    found = goodput_of(journal, [], now=10)
    assert found.restarts == {reason: 1} and reason in RESTARTS
    assert found.out_of_memory == ("OutOfMemory" in str(entries))


def test_what_makes_no_sense_is_left_out() -> None:
    journal = [{"event": "started"}, event(0, "started", resume=7), {"time": "x", "event": "failed"}, {"time": 3}]
    lines = [{"step": 3, "time": 4}, {"step": 4, "time": None, "spent": {"step": 1}}, line(5, 5, step="x", odd=2)]  # type: ignore[arg-type]
    found = goodput_of(journal, lines, now=9)
    assert found.productive_s == 0 and badput(found) == {"startup": 3, "other": 2}
