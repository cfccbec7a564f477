"""What the driver of a run serves: how the run stands and what its time went into, by its journal and its log, so that
neither a restart nor another driver loses count."""

from __future__ import annotations

import bisect
import json
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

from cluster.exporter import Exporter
from cluster.telemetry import RUN_STATES
from trainer.folder import RunFolder, state_of
from trainer.goodput import Goodput, goodput_of

_TOGETHER = 100  # lines of the log that are kept as one: a long run has more than could be gone through at each scrape


class RunAccount:
    """Looks at a run's files whenever somebody scrapes `exporter`, and reads what is new in them."""

    def __init__(self, exporter: Exporter, folder: RunFolder) -> None:
        self._exporter = exporter
        self._journal, self._log = Tail(folder.journal), Tail(folder.metrics)
        self._events: list[dict[str, Any]] = []
        self._lines = Folded()
        self._counted: dict[tuple[str, str], float] = {}
        exporter.before_scrape(self.look)

    def look(self) -> None:
        """Raises OSError when a file cannot be read."""
        self._events += self._journal.new()
        began = [line["time"] for line in self._events if line.get("event") == "started"]
        for line in self._log.new():
            self._lines.add(line, began)
        self._serve(goodput_of(self._events, self._lines.lines, time.time()))
        now = state_of(self._events)
        for state in RUN_STATES:
            self._exporter.metric("fathom_run_state").labels(state=state).set(now is not None and now.state == state)

    def _serve(self, found: Goodput) -> None:
        metric = self._exporter.metric
        metric("fathom_run_attempts").set(found.attempts)
        metric("fathom_run_elapsed_seconds").set(found.elapsed_s)
        if found.ratio is not None:
            metric("fathom_goodput_ratio").set(found.ratio)
        for cause, seconds in found.badput_s.items():
            self._reach("fathom_badput_seconds_total", seconds, cause=cause)
        for reason, count in found.restarts.items():
            self._reach("fathom_restarts_total", count, reason=reason)
        self._reach("fathom_device_oom_total", found.out_of_memory)

    def _reach(self, name: str, value: float, **label: str) -> None:
        """Raise a counter to what the files say: it never falls."""
        key = (name, "".join(label.values()))
        metric = self._exporter.metric(name)
        (metric.labels(**label) if label else metric).inc(max(0.0, value - self._counted.get(key, 0.0)))
        self._counted[key] = max(value, self._counted.get(key, 0.0))


class Folded:
    """The log's lines of steps, up to `_TOGETHER` of an attempt as one. Where a part of one is lost work, each of its
    steps counts alike, however long it took."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []
        self._count = 0  # in the last one
        self._attempt = -1

    def add(self, line: Mapping[str, Any], began: Sequence[float]) -> None:
        """The next line. `began`: when the attempts did, as far as they have."""
        at, step, spent = line.get("time"), line.get("step"), line.get("spent")
        if "event" in line or not isinstance(spent, dict):
            return
        if not isinstance(at, int | float) or not isinstance(step, int):
            return
        attempt = bisect.bisect_right(began, at)
        if attempt != self._attempt or self._count == _TOGETHER:
            self.lines.append({"time": at, "step": step, "spent": dict(spent)})
            self._attempt, self._count = attempt, 1
            return
        last = self.lines[-1]
        last["time"], last["step"] = at, step
        for name, seconds in spent.items():
            last["spent"][name] = last["spent"].get(name, 0.0) + seconds
        self._count += 1


class Tail:
    """The whole lines that have come to a file of JSON lines since the last look; those that are no objects are left
    out."""

    def __init__(self, path: str) -> None:
        self._path, self._at = path, 0

    def new(self) -> list[dict[str, Any]]:
        """Raises OSError; a file that is not there yet has none."""
        try:
            with open(self._path, "rb") as file:
                if os.fstat(file.fileno()).st_size < self._at:
                    self._at = 0
                file.seek(self._at)
                content = file.read()
        except FileNotFoundError:
            return []
        whole = content[: content.rfind(b"\n") + 1]
        self._at += len(whole)
        found = []
        for line in whole.splitlines():
            try:
                value = json.loads(line)
            except ValueError:
                continue
            if isinstance(value, dict):
                found.append(value)
        return found
