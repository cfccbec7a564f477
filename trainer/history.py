"""What a run's journal tells the next driver about the attempts before it. Pure.

A driver that was killed leaves a row of attempts in the middle: its successor goes on counting. One that ended by
itself has given up, was stopped, or is done: somebody decided to go on, and all budgets are new.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

from cluster.attempts import Ending, Kind, first_line

_OVER = frozenset({"finished", "stopped", "gave_up"})  # the driver ended by itself


@dataclass(frozen=True, kw_only=True)
class History:
    """`attempt`: the number of the last one, 0: none yet. `endings`: of the row that is under way. `rollbacks`: the
    steps after which it was gone back, of that row. `ran`: the ranks were at work in it: what they need is there."""

    attempt: int = 0
    endings: list[Ending] = field(default_factory=list)
    rollbacks: list[int] = field(default_factory=list)
    ran: bool = False


def history_of(journal: Iterable[Mapping[str, Any]]) -> History:
    """Read it off the journal's entries, oldest first."""
    attempt, over, ran = 0, False, False
    endings: list[Ending] = []
    rollbacks: list[int] = []
    for line in journal:
        event = line.get("event")
        if event == "started":
            if over:
                endings, rollbacks, ran = [], [], False
            attempt, over = max(attempt, int(line.get("attempt", 0))), False
        elif event == "running":
            ran = True
        elif event == "failed" and line.get("kind") in get_args(Kind):
            endings.append(Ending(kind=line["kind"], step=int(line["step"]), reason=_reason(str(line["error"]))))
        elif event == "preempted":
            endings.append(Ending(kind="preempted", step=int(line["step"]), reason=str(line.get("reason"))))
        elif event == "rolled_back":
            rollbacks.append(int(line["noticed"]))
            endings = []
        elif event in _OVER:
            over = True
    return History(attempt=attempt) if over else History(attempt=attempt, endings=endings, rollbacks=rollbacks, ran=ran)


def _reason(error: str) -> str:
    """The first line of an error, without its type; the type, where it says nothing else."""
    kind, _, text = error.partition(": ")
    return first_line(text) or kind
