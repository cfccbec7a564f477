"""What happened to a run, one fsynced JSON line each: attempts, states, reasons. Survives whatever ends the process."""

from __future__ import annotations

import json
import math
import time
from typing import Any

from cluster import storage

RESUMED = "resumed"


class Journal:
    """Appends to runs/NAME/journal.jsonl."""

    def __init__(self, folder: str) -> None:
        self.path = storage.join(folder, "journal.jsonl")

    def write(self, event: str, **facts: Any) -> None:
        """Record `event` (started, checkpoint, stopped, failed, finished ...) with the time in Unix seconds."""
        storage.append_line(self.path, json.dumps({"time": round(time.time(), 3), "event": event, **facts}), sync=True)

    def read(self) -> list[dict[str, Any]]:
        """All whole lines, oldest first."""
        return read_json_lines(self.path)


def logged_lines(folder: str) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl that stand, in order: those of its last history.

    A run that goes on from a checkpoint logs its steps again, or, where it passes over samples, other ones. A line
    `{"step": N, "event": "resumed"}` makes those behind step N void; without one, as where a run began again, a step
    that is no larger than the one before does, from itself on. The marks themselves are left out.
    """
    standing: list[dict[str, Any]] = []
    last: float = -1
    for line in read_json_lines(storage.join(folder, "metrics.jsonl")):
        step = line.get("step")
        if not isinstance(step, int | float) or isinstance(step, bool) or not math.isfinite(step):
            continue
        if line.get("event") == RESUMED:
            standing, last = [one for one in standing if one["step"] <= step], step
            continue
        if "event" not in line:
            if step <= last:
                standing = [one for one in standing if one["step"] < step]
            last = step
        standing.append(line)
    return standing


def read_json_lines(path: str) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file; a line torn by a crash is left out. An absent file has none."""
    if not storage.exists(path):
        return []
    objects = []
    for line in storage.read_bytes(path).decode(errors="replace").splitlines():
        try:
            value = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(value, dict):
            objects.append(value)
    return objects
