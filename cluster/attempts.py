"""What follows the end of an attempt: go on, on how many workers, after how long; or give up, and why. Pure functions.

A run is a row of attempts. Each starts a worker group from the newest whole checkpoint and ends in one way. What ended
it decides what comes next; the machines' faults are forgiven as often as the run gets on, the work's own are not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

# finished    the work is done
# stopped     somebody asked for it
# preempted   a machine was about to go away, and the work was saved in time
# lost        a machine went away without that
# died        a worker's process ended without an exception: killed, out of memory, crashed
# hung        nothing moved for too long, and the group was killed
# failed      a worker raised an exception
# away        files that were there before cannot be read or written: a store that does not answer, a full disk
Kind = Literal["finished", "stopped", "preempted", "lost", "died", "hung", "failed", "away"]
MACHINES: frozenset[Kind] = frozenset({"preempted", "lost"})

AWAY_MOST = 30  # in a row; with the waits between them, half an hour at least

FIRST_WAIT_S = 1.0
LONGEST_WAIT_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How one attempt ended. `step`: of the newest whole checkpoint then. `reason`: one line for people."""

    kind: Kind
    step: int
    reason: str
    hopeless: bool = False  # a wrong input: the same again would end in the same way


@dataclass(frozen=True, kw_only=True)
class Policy:
    """How much is forgiven, and how few workers are enough.

    Both budgets are of ends in a row between which no new checkpoint was made: a long run meets many faults, and each
    that it gets past is over. None: any number.
    """

    workers: int
    min_workers: int
    max_failures: int | None = 3
    max_preemptions: int | None = None
    why_so_many: str = "recovery.min_workers"
    capacity_wait_s: float = 600.0  # for machines to come back, when there are too few


@dataclass(frozen=True, kw_only=True)
class Next:
    """The next attempt: after `wait_s` seconds, on `workers` ranks."""

    workers: int
    wait_s: float
    because: str


@dataclass(frozen=True, kw_only=True)
class GiveUp:
    """No further attempt; `because` says which rule."""

    because: str


def decide(endings: Sequence[Ending], policy: Policy, capacity: int) -> Next | GiveUp:
    """What follows the last of `endings`, which nobody wanted. `capacity`: workers that fit now."""
    last = endings[-1]
    if last.kind in ("finished", "stopped"):
        raise ValueError(f"nothing follows an attempt that {last.kind}")
    if last.hopeless:
        return GiveUp(because=last.reason)
    row = without_progress(endings)
    if last.kind == "failed" and [ending.reason for ending in row[-2:] if ending.kind == "failed"] == [last.reason] * 2:
        return GiveUp(because=f"{last.reason} (twice in a row, with nothing done in between)")
    own = [ending for ending in row if ending.kind not in MACHINES and ending.kind != "away"]
    gone = [ending for ending in row if ending.kind in MACHINES]
    away = [ending for ending in row if ending.kind == "away"]
    for found, most, field in (
        (own, policy.max_failures, "recovery.max_failures"),
        (gone, policy.max_preemptions, "recovery.max_preemptions"),
        (away, AWAY_MOST, "the most"),
    ):
        if most is not None and len(found) > most:
            count = f"{len(found)} in a row without a new checkpoint"
            return GiveUp(because=f"{last.reason} ({count}; {field} is {most})")
    workers = fitting(policy, capacity)
    if workers is None:
        return GiveUp(
            because=f"{last.reason}; after {policy.capacity_wait_s:g} s the cluster has room for {capacity} workers, "
            f"and {policy.min_workers} are needed ({policy.why_so_many})"
        )
    pause = pause_s(len(own) + len(away) + max(0, len(gone) - 1))  # a machine's first end is no reason to wait
    return Next(workers=workers, wait_s=pause, because=last.reason)


def without_progress(endings: Sequence[Ending]) -> list[Ending]:
    """The last endings between which no new checkpoint was made."""
    row: list[Ending] = []
    for ending in reversed(endings):
        if row and ending.step < row[-1].step:  # the attempt after it got on
            break
        row.append(ending)
    return row[::-1]


def fitting(policy: Policy, capacity: int) -> int | None:
    """How many workers to start, as many as fit and are wanted; None when those are too few."""
    workers = min(policy.workers, capacity)
    return workers if workers >= policy.min_workers else None


def pause_s(failures: int) -> float:
    """Seconds to wait before the next attempt: twice as long for each end in a row."""
    return min(LONGEST_WAIT_S, FIRST_WAIT_S * 2 ** (failures - 1)) if failures else 0.0


def worth_growing(workers: int, policy: Policy, capacity: int, stable_s: float, patience_s: float) -> bool:
    """Whether a group that runs on fewer workers than wanted should be started anew on more.

    `stable_s`: how long at least that many have fitted; a machine that comes and goes costs more than it gives.
    """
    return workers < policy.workers and capacity > workers and stable_s >= patience_s


def first_line(text: str) -> str:
    """"" where there is none."""
    return next(iter(text.splitlines()), "").strip()


def reason_of(error: BaseException) -> str:
    """What an error says, in one line for people; its type, where it says nothing."""
    return first_line(str(error)) or type(error).__name__
