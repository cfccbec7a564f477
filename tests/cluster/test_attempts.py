"""What follows the end of an attempt. No cluster."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.attempts import (
    LONGEST_WAIT_S,
    Ending,
    GiveUp,
    Kind,
    Next,
    Policy,
    decide,
    fitting,
    pause_s,
    without_progress,
    worth_growing,
)


def ended(kind: Kind, step: int = 0, **other: Any) -> Ending:
    return Ending(**({"kind": kind, "step": step, "reason": f"it {kind}"} | other))


def policy(**changes: Any) -> Policy:
    return Policy(**({"workers": 4, "min_workers": 2, "max_failures": 2} | changes))


@pytest.mark.parametrize("kind", ["died", "hung"])
def test_the_work_s_own_ends_are_forgiven_so_often_in_a_row(kind: Kind) -> None:
    row = [ended(kind)]
    for wait_s in (1.0, 2.0):
        assert decide(row, policy(), 4) == Next(workers=4, wait_s=wait_s, because=f"it {kind}")
        row.append(ended(kind))
    found = decide(row, policy(), 4)
    assert isinstance(found, GiveUp)
    assert found.because == f"it {kind} (3 in a row without a new checkpoint; recovery.max_failures is 2)"


def test_progress_clears_the_count() -> None:
    row = [ended("died", 10), ended("died", 10), ended("died", 20), ended("died", 20)]
    assert decide(row, policy(), 4) == Next(workers=4, wait_s=2.0, because="it died")
    assert isinstance(decide([*row, ended("died", 20)], policy(), 4), GiveUp)
    assert isinstance(decide([*row, ended("died", 30)], policy(), 4), Next)


def test_machines_have_a_budget_of_their_own() -> None:
    away = [ended("lost"), ended("preempted")] * 50
    for count, wait_s in ((1, 0.0), (2, 1.0), (3, 2.0), (100, LONGEST_WAIT_S)):
        assert decide(away[:count], policy(), 4) == Next(workers=4, wait_s=wait_s, because=away[count - 1].reason)
    assert decide([ended("died"), ended("died"), away[0]], policy(), 4) == Next(
        workers=4, wait_s=2.0, because="it lost"
    )
    found = decide(away[:3], policy(max_preemptions=2), 4)
    assert isinstance(found, GiveUp) and "recovery.max_preemptions is 2" in found.because


def test_a_wrong_input_is_not_tried_again() -> None:
    assert decide([ended("failed", hopeless=True)], policy(max_failures=None), 4) == GiveUp(because="it failed")


def test_the_same_exception_with_nothing_done_in_between_would_come_again() -> None:
    one, other = ended("failed", reason="a"), ended("failed", reason="b")
    assert isinstance(decide([one], policy(), 4), Next)
    assert isinstance(decide([one, other], policy(), 4), Next)
    assert decide([one, one], policy(), 4) == GiveUp(because="a (twice in a row, with nothing done in between)")
    assert isinstance(decide([one, ended("failed", 5, reason="a")], policy(), 4), Next)


def test_no_limit_is_no_limit() -> None:
    assert decide([ended("hung")] * 1000, policy(max_failures=None), 4) == Next(
        workers=4, wait_s=LONGEST_WAIT_S, because="it hung"
    )


@pytest.mark.parametrize(("capacity", "workers"), [(9, 4), (4, 4), (3, 3), (2, 2), (1, None), (0, None)])
def test_as_many_workers_as_fit(capacity: int, workers: int | None) -> None:
    assert fitting(policy(), capacity) == workers
    found = decide([ended("lost")], policy(), capacity)
    if workers is None:
        assert isinstance(found, GiveUp)
        assert found.because.endswith(f"room for {capacity} workers, and 2 are needed (recovery.min_workers)")
    else:
        assert isinstance(found, Next) and found.workers == workers


@pytest.mark.parametrize("kind", ["finished", "stopped"])
def test_nothing_follows_an_end_that_was_wanted(kind: Kind) -> None:
    with pytest.raises(ValueError, match=f"nothing follows an attempt that {kind}"):
        decide([ended(kind)], policy(), 4)


def test_waits_grow_and_end() -> None:
    waits = [pause_s(failures) for failures in range(9)]
    assert waits == [0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0]


def test_the_row_without_progress_is_the_last_one() -> None:
    row = [ended("died", step) for step in (0, 5, 5, 5)]
    assert [ending.step for ending in without_progress(row)] == [5, 5, 5]
    assert without_progress(row[:1]) == row[:1]
    going_back = [ended("died", 9), ended("died", 3)]  # the newest was damaged: that is no progress
    assert without_progress(going_back) == going_back


@pytest.mark.parametrize(
    ("workers", "capacity", "stable_s", "grow"),
    [(2, 4, 60, True), (2, 3, 60, True), (2, 4, 59, False), (2, 2, 99, False), (4, 9, 99, False)],
)
def test_more_workers_are_worth_a_new_start_when_they_stay(
    workers: int, capacity: int, stable_s: float, grow: bool
) -> None:
    assert worth_growing(workers, policy(), capacity, stable_s, 60) == grow
