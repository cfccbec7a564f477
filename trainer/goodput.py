"""What a run's time went into, read off its journal and its log: steps that count, and the rest by cause. Pure.

The causes are those of Google's ml-goodput-measurement, as far as a run can tell them apart: waiting for machines,
start-up, waiting for data, checkpoints, evaluation, work that was lost with a crash, recovery from one, and what is
none of these. A pause between a stop that somebody wanted and the resume is nobody's time and is left out.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeGuard

from cluster.telemetry import BADPUT, RESTARTS

# Events that end an attempt, and what its successor is then begun for; None: somebody wanted it to end.
_ENDS: Mapping[str, str | None] = {
    "failed": "failed", "preempted": "preempted", "resizing": "resized", "rolled_back": "rolled_back",
    "stopped": None, "finished": None, "gave_up": None,
}  # fmt: skip
_CUT_OFF = "PREEMPTED"  # the reason of a stop that nobody asked for


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """Seconds since the epoch, and what the time between them was: "steps", or one of BADPUT."""

    begin: float
    end: float
    what: str


@dataclass(kw_only=True)
class Goodput:
    """`productive_s`: in steps that count. `badput_s` by cause. `ratio`: None until a step is logged."""

    productive_s: float = 0.0
    badput_s: dict[str, float] = field(default_factory=lambda: dict.fromkeys(BADPUT, 0.0))
    attempts: int = 0
    restarts: Counter[str] = field(default_factory=Counter)
    out_of_memory: int = 0
    stretches: list[Stretch] = field(default_factory=list)
    logged: bool = False

    @property
    def elapsed_s(self) -> float:
        """All of the run's time."""
        return self.productive_s + sum(self.badput_s.values())

    @property
    def ratio(self) -> float | None:
        """The share that counts."""
        return self.productive_s / self.elapsed_s if self.logged and self.elapsed_s > 0 else None

    def _add(self, what: str, begin: float, end: float) -> None:
        if end > begin:
            self.badput_s[what] += end - begin
            self.stretches.append(Stretch(begin=begin, end=end, what=what))


@dataclass(kw_only=True)
class _Attempt:
    begin: float
    step: int  # from which it goes on
    end: float | None = None
    cause: str | None = None  # what its successor is begun for; None: it was wanted, or it runs
    wanted: bool = False
    last: float = 0.0  # sign of life
    running: float | None = None  # when the driver saw its ranks at work
    lines: list[Mapping[str, Any]] = field(default_factory=list)
    pending: float | None = None  # since when the run waited for machines before it


def goodput_of(journal: Iterable[Mapping[str, Any]], lines: Iterable[Mapping[str, Any]], now: float) -> Goodput:
    """Account for a run's time. `journal` and `lines`: the objects of journal.jsonl and metrics.jsonl, oldest first;
    void lines, which a resume has made so, included. `now`: seconds since the epoch."""
    found = Goodput()
    attempts, open_since = _attempts(journal, found)
    _place(attempts, lines)
    found.attempts = len(attempts)
    for number, attempt in enumerate(attempts):
        before = attempts[number - 1] if number else None
        after = attempts[number + 1] if number + 1 < len(attempts) else None
        _between(found, before, attempt)
        _within(found, attempt, after, now)
    if open_since is not None:  # nothing has been started since
        found._add("waiting", open_since, now)
    return found


def _attempts(journal: Iterable[Mapping[str, Any]], found: Goodput) -> tuple[list[_Attempt], float | None]:
    """The attempts by the journal; and since when the run waits for the next one, if it does."""
    attempts: list[_Attempt] = []
    waits: float | None = None
    for line in journal:
        event, at = line.get("event"), line.get("time")
        if not _is_number(at):
            continue
        if event == "submitted":
            waits = line["at"] if _is_number(line.get("at")) else at
        elif event == "pending" and waits is None:
            waits = at
        elif event == "started":
            _count_restart(attempts, found)
            attempts.append(_Attempt(begin=at, step=_step(line.get("resume")), last=at, pending=waits))
            waits = None
        elif attempts and event == "running":
            attempts[-1].running = at
        elif attempts and event in _ENDS:
            _end(attempts[-1], line, at)
            found.out_of_memory += event == "failed" and str(line.get("error")).startswith("OutOfMemory")
        if attempts and attempts[-1].end is None:
            attempts[-1].last = max(attempts[-1].last, at)
    return attempts, waits


def _end(attempt: _Attempt, line: Mapping[str, Any], at: float) -> None:
    event = str(line["event"])
    cause = _ENDS[event]
    if event == "failed" and line.get("kind") in RESTARTS:
        cause = str(line["kind"])
    if event == "stopped" and line.get("reason") == _CUT_OFF:
        cause = "preempted"
    attempt.end = attempt.end if attempt.end is not None else at  # a roll-back follows the failure
    attempt.cause = cause or attempt.cause
    if event in ("stopped", "finished", "gave_up"):
        attempt.wanted = cause is None


def _count_restart(attempts: Sequence[_Attempt], found: Goodput) -> None:
    """An attempt begins: why, if it is not the first."""
    if not attempts:
        return
    before = attempts[-1]
    if before.end is None:
        found.restarts["driver"] += 1  # it ended without a word
    elif not before.wanted:
        found.restarts[before.cause or "failed"] += 1


def _place(attempts: Sequence[_Attempt], lines: Iterable[Mapping[str, Any]]) -> None:
    """Give each attempt the lines of its steps."""
    if not attempts:
        return
    number = 0
    for line in lines:
        at = line.get("time")
        if "event" in line or not _is_number(at) or not isinstance(line.get("spent"), Mapping):
            continue
        while number + 1 < len(attempts) and at >= attempts[number + 1].begin:
            number += 1
        attempts[number].lines.append(line)
        if attempts[number].end is None:
            attempts[number].last = max(attempts[number].last, at)


def _between(found: Goodput, before: _Attempt | None, attempt: _Attempt) -> None:
    """The time from the end of an attempt, or from when the run was asked for, to the next one."""
    pending = attempt.pending
    if before is None or before.wanted:
        if pending is not None:
            found._add("waiting", pending, attempt.begin)
        return
    ended = before.end if before.end is not None else before.last
    if before.cause == "preempted":
        pending = ended
    middle = min(max(pending, ended), attempt.begin) if pending is not None else attempt.begin
    found._add("recovery", ended, middle)
    found._add("waiting", middle, attempt.begin)


def _within(found: Goodput, attempt: _Attempt, after: _Attempt | None, now: float) -> None:
    """An attempt's own time: start-up, its lines, and what came after the last one."""
    over = attempt.end if attempt.end is not None else attempt.last if after else None
    if not attempt.lines:
        # what goes on after the ranks have begun, the first line will tell
        found._add("startup", attempt.begin, over if over is not None else attempt.running or now)
        return
    found.logged = True
    at = max(attempt.begin, attempt.lines[0]["time"] - _sum(attempt.lines[0]["spent"]))
    found._add("startup", attempt.begin, at)
    kept = after.step if after is not None else None
    before = attempt.step
    for line in attempt.lines:
        at = _line(found, line, at, _share_kept(before, int(line["step"]), kept))
        before = int(line["step"])
    if over is not None:
        found._add("other" if attempt.wanted or attempt.cause == "resized" else "recovery", at, over)


def _share_kept(before: int, step: int, kept: int | None) -> float:
    """Of the steps behind `before` up to `step`, the share that the next attempt goes on from."""
    if kept is None or step <= kept:
        return 1.0
    return max(0, kept - before) / max(1, step - before)


def _line(found: Goodput, line: Mapping[str, Any], at: float, kept: float) -> float:
    """One line's time, from `at` on; returns its end."""
    spent = {str(name): float(value) for name, value in line["spent"].items() if _is_number(value)}
    steps = spent.pop("step", 0.0)
    found.productive_s += steps * kept
    for what, seconds in (("steps", steps * kept), ("lost_work", steps * (1 - kept)), *spent.items()):
        cause = what if what in BADPUT or what == "steps" else "other"
        if cause != "steps":
            found.badput_s[cause] += seconds
        if seconds > 0:
            found.stretches.append(Stretch(begin=at, end=at + seconds, what=cause))
        at += seconds
    return at


def _step(checkpoint: object) -> int:
    """Of a checkpoint's path; 0 for none."""
    found = re.search(r"step_(\d+)/?$", str(checkpoint or ""))
    return int(found[1]) if found else 0


def _sum(spent: Mapping[str, Any]) -> float:
    return sum(float(value) for value in spent.values() if _is_number(value))


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)

