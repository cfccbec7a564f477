"""A run on disk: what lies where in its folder, and how its journal says that it stands."""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from cluster import storage
from trainer.journal import read_json_lines

ENDS = ("finished", "stopped", "failed")  # events of the journal that end an attempt; "started" begins one


@dataclass(frozen=True)
class RunFolder:
    """runs/NAME and the paths in it. Nothing needs to exist."""

    path: str

    @property
    def config(self) -> str:
        """The resolved configuration."""
        return storage.join(self.path, "config.yaml")

    @property
    def environment(self) -> str:
        """Versions, commit, ranks and their devices."""
        return storage.join(self.path, "environment.json")

    @property
    def journal(self) -> str:
        """What happened to the run."""
        return storage.join(self.path, "journal.jsonl")

    @property
    def metrics(self) -> str:
        """What was logged, a line each time."""
        return storage.join(self.path, "metrics.jsonl")

    @property
    def checkpoints(self) -> str:
        """Folder of the checkpoints."""
        return storage.join(self.path, "checkpoints")

    @property
    def weights(self) -> str:
        """Folder of the exported network."""
        return storage.join(self.path, "weights")

    @property
    def previews(self) -> str:
        """Folder of the pictures made while training."""
        return storage.join(self.path, "previews")

    @property
    def telemetry(self) -> str:
        """Folder that says, while it runs, where its ranks can be scraped."""
        return storage.join(self.path, "telemetry")

    def quarantine(self, rank: int) -> str:
        """The bad samples that a rank has met."""
        return storage.join(self.path, f"quarantine.{rank}.jsonl")

    def quarantined(self) -> Counter[str]:
        """Bad samples by reason; one that several ranks or attempts met counts once."""
        names = [name for name in storage.listdir(self.path) if name.startswith("quarantine.")]
        lines = (line for name in names for line in read_json_lines(storage.join(self.path, name)))
        seen = {(str(line.get("key")), str(line.get("shard")), str(line.get("reason"))) for line in lines}
        return Counter(reason for _, _, reason in seen)

    def forget_ranks(self) -> None:
        """With no rank at work: what killed ones have announced of their metrics must not be scraped for ever."""
        for path in glob.glob(os.path.join(glob.escape(self.telemetry), "train-*.json")):
            with suppress(OSError):
                os.unlink(path)

    def finished_step(self) -> int | None:
        """The step at which the last attempt finished, weights and all; None when it did not."""
        last = last_end(read_json_lines(self.journal))
        return int(last["step"]) if last and last["event"] == "finished" else None


# What an entry of the journal says of the run's state. The states are read off what happened, and written nowhere else.
STATES = {
    "submitted": "SUBMITTED",
    "pending": "PENDING",
    "started": "STARTING",
    "running": "RUNNING",
    "recovering": "RECOVERING",
    "preempted": "RECOVERING",
    "resizing": "RESIZING",
    "stopping": "STOPPING",
    "finished": "SUCCEEDED",
    "failed": "FAILED",
    "gave_up": "FAILED",
    "rolled_back": "RECOVERING",
    "stopped": "CANCELLED",
}
FINAL = frozenset({"SUCCEEDED", "FAILED", "CANCELLED"})


@dataclass(frozen=True, kw_only=True)
class RunState:
    """How a run stands: one of STATES' values, why, and in which of its attempts (0: none yet)."""

    state: str
    reason: str | None = None
    attempt: int = 0
    time: float | None = None  # of the entry, seconds since the epoch


def state_of(journal: Iterable[Mapping[str, Any]]) -> RunState | None:
    """What the journal's last word on it says; None when it says nothing.

    A run that a machine's end stopped (SIGTERM, PREEMPTED) is PENDING: with `--resume` it goes on.
    """
    found: RunState | None = None
    for line in journal:
        state = STATES.get(str(line.get("event")))
        if state is None:
            continue
        reason = line.get("reason") or line.get("because") or line.get("error")
        if state == "CANCELLED" and reason != "SIGINT":
            state = "PENDING"
        attempt = line.get("attempt", found.attempt if found else 0)
        found = RunState(state=state, reason=reason, attempt=attempt, time=line.get("time"))
    return found


def last_end(journal: Iterable[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The entry with which the last attempt ended; None while one runs, or when it ended without a word."""
    for line in reversed(list(journal)):
        if line.get("event") in ENDS:
            return line
        if line.get("event") == "started":
            break
    return None
