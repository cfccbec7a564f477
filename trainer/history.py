"""What a run's journal tells the next driver about the attempts before it. Pure.

A driver that was killed leaves a row of attempts in the middle: its successor goes on counting. One that ended by
itself has given up, was stopped, or is done: somebody decided to go on, and all budgets are new.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

from cluster.attempts import Ending, Kind

# After these the driver goes on by itself; after any other end it has ended too.
_GOES_ON = frozenset({"recovering", "pending", "preempted", "resizing", "rolled_back", "running", "stopping"})
_ENDS = frozenset({"finished", "stopped", "failed"})


@dataclass(frozen=True, kw_only=True)
class History:
    """`attempt`: the number of the last one, 0: none yet. `endings`: of the row that is under way. `rollbacks`: the
    steps after which it was gone back, of that row."""

    attempt: int = 0
    endings: list[Ending] = field(default_factory=list)
    rollbacks: list[int] = field(default_factory=list)


def history_of(journal: Iterable[Mapping[str, Any]]) -> History:
    """Read it off the journal's entries, oldest first."""
    attempt, over = 0, False
    endings: list[Ending] = []
    rollbacks: list[int] = []
    for line in journal:
        event = line.get("event")
        if event == "started":
            if over:
                endings, rollbacks = [], []
            attempt, over = max(attempt, int(line.get("attempt", 0))), False
        elif event == "failed" and line.get("kind") in get_args(Kind):
            endings.append(Ending(kind=line["kind"], step=int(line["step"]), reason=_reason(str(line["error"]))))
            over = True
        elif event == "preempted":
            endings.append(Ending(kind="preempted", step=int(line["step"]), reason=str(line.get("reason"))))
            over = False
        elif event == "rolled_back":
            rollbacks.append(int(line["noticed"]))
            endings, over = [], False
        elif event in _ENDS:
            over = True
        elif event in _GOES_ON:
            over = False
    return History(attempt=attempt, endings=[] if over else endings, rollbacks=[] if over else rollbacks)


def _reason(error: str) -> str:
    """The first line of an error, without its type."""
    return error.partition(": ")[2].splitlines()[0] if ": " in error else error
