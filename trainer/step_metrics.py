"""What steps and checkpoints add to a rank's metrics: counters looked up once, since a step can be short."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

from cluster import storage
from cluster.exporter import Exporter
from dataio.loader import Loader
from trainer.saver import Saved

T = TypeVar("T")

READ_METRICS = {
    "bytes": "fathom_data_read_bytes_total",
    "cache_hits": "fathom_data_cache_hits_total",
    "cache_misses": "fathom_data_cache_misses_total",
}


@dataclass
class Since:
    """What was since the last line: `seconds` of steps, `waited` of them for data, `apart` by phase between steps."""

    began: float = field(default_factory=lambda: time.perf_counter())
    steps: int = 0
    images: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    apart: dict[str, float] = field(default_factory=dict)


class StepMetrics:
    """What every step feeds: looked up once, since a step is short."""

    def __init__(self, exporter: Exporter) -> None:
        self._exporter = exporter
        metric = exporter.metric
        self._steps, self._images = metric("fathom_steps_total"), metric("fathom_images_total")
        self._seconds, self._at = metric("fathom_step_duration_seconds"), metric("fathom_last_step_timestamp_seconds")
        self._phases: dict[str, Any] = {}
        self._before: dict[tuple[str, ...], float] = {}

    def step(self, seconds: float, images: int, phases: Mapping[str, float]) -> None:
        self._steps.inc()
        self._images.inc(images)
        self._seconds.observe(seconds)
        self._at.set(time.time())
        for phase, spent in phases.items():
            self.phase(phase, spent)

    def phase(self, phase: str, seconds: float) -> None:
        counter = self._phases.get(phase)
        if counter is None:
            counter = self._phases[phase] = self._exporter.metric("fathom_phase_seconds_total").labels(phase=phase)
        counter.inc(seconds)

    def loader(self, loader: Loader) -> None:
        """What a loader counts itself, from its thread."""
        for reason, count in dict(loader.quarantine.counts).items():
            self._follow("fathom_samples_skipped_total", count, reason=reason)
        for what, count in loader.read_counts().items():
            self._follow(READ_METRICS[what], count)
        for stage, seconds in loader.stage_seconds().items():
            self._follow("fathom_loader_seconds_total", seconds, stage=stage)

    def _follow(self, name: str, value: float, **label: str) -> None:
        key = (name, *label.values())
        before = self._before.get(key)
        if value == before:
            return
        metric = self._exporter.metric(name)
        (metric.labels(**label) if label else metric).inc(value - (before or 0.0))
        self._before[key] = value


def spent(since: Since, waited: float) -> dict[str, float]:
    """Seconds since the last line by what they went into; together they are the time that has passed."""
    parts = {"step": max(0.0, since.seconds - waited), "data_wait": waited, **since.apart}
    parts["other"] = max(0.0, time.perf_counter() - since.began - sum(parts.values()))
    return {name: round(value, 6) for name, value in parts.items()}


class Spent:
    """Adds to a counter what blocks of one thread take, by phase; a phase inside another is not counted in that."""

    def __init__(self, counter: Any) -> None:
        self._counter = counter
        self._inside: list[float] = []  # seconds of phases inside those that are open

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        began = time.perf_counter()
        self._inside.append(0.0)
        try:
            yield
        finally:
            took = time.perf_counter() - began
            self._counter.labels(phase=phase).inc(max(0.0, took - self._inside.pop()))
            if self._inside:
                self._inside[-1] += took

    def each(self, phase: str, items: Iterable[T]) -> Iterator[T]:
        """The items; what is waited for each of them is the phase."""
        iterator = iter(items)
        while True:
            with self(phase):
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item


def count_save(exporter: Exporter, saved: Saved, rank: int, path: str) -> None:
    """A save has ended, well or not. A checkpoint is one, however many ranks write it: rank 0 counts it."""
    metric = exporter.metric
    metric("fathom_checkpoint_duration_seconds").labels(op="save").observe(saved.seconds)
    metric("fathom_checkpoint_stall_seconds_total").inc(saved.stall_s)
    if rank:
        return
    if saved.error is not None:
        metric("fathom_checkpoint_failures_total").inc()
        return
    metric("fathom_checkpoint_last_success_timestamp_seconds").set_to_current_time()
    with suppress(storage.StorageError):  # another disk's fault is no reason to end
        metric("fathom_checkpoint_bytes").set(sum(size or 0 for size in storage.sizes(path).values()))
