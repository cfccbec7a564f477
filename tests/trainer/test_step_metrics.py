"""Where a worker's time goes, counted once."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from prometheus_client import CollectorRegistry, Counter

from cluster.exporter import Exporter
from trainer.step_metrics import Since, Spent, StepMetrics, spent


def test_a_phase_inside_another_is_not_counted_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("trainer.step_metrics.time", SimpleNamespace(perf_counter=lambda: now[0]))
    registry = CollectorRegistry()
    timer = Spent(Counter("x_total", "x", ("phase",), registry=registry))

    def slow() -> Iterator[None]:
        for _ in range(3):
            now[0] += 2.0
            yield

    with timer("write"):
        now[0] += 1.0
        for _ in timer.each("read_wait", slow()):
            with timer("forward"):
                now[0] += 5.0
            now[0] += 0.5
    phases = ("write", "read_wait", "forward")
    found = {phase: registry.get_sample_value("x_total", {"phase": phase}) for phase in phases}
    assert found == {"write": 2.5, "read_wait": 6.0, "forward": 15.0}
    with pytest.raises(KeyError), timer("forward"):
        raise KeyError


def test_a_step_adds_what_it_took() -> None:
    exporter = Exporter("r", "train")
    metrics, value = StepMetrics(exporter), exporter.registry.get_sample_value
    metrics.step(0.5, 8, {"forward": 0.2, "backward": 0.25})
    metrics.step(1.5, 4, {"forward": 0.3, "backward": 0.75, "data_wait": 0.25})
    metrics.phase("checkpoint", 2.0)
    assert value("fathom_steps_total") == 2 and value("fathom_images_total") == 12
    assert value("fathom_step_duration_seconds_sum") == 2.0 and value("fathom_step_duration_seconds_count") == 2
    found = {phase: value("fathom_phase_seconds_total", {"phase": phase}) for phase in ("forward", "loss", "data_wait")}
    assert found == {"forward": 0.5, "loss": 0, "data_wait": 0.25}
    assert value("fathom_phase_seconds_total", {"phase": "checkpoint"}) == 2.0


def test_what_a_loader_counts_is_added_once() -> None:
    exporter = Exporter("r", "train")
    metrics, value = StepMetrics(exporter), exporter.registry.get_sample_value
    loader = SimpleNamespace(
        quarantine=SimpleNamespace(counts={"bad_image": 1}),
        read_counts=lambda: {"bytes": 100, "cache_hits": 3, "cache_misses": 1},
        stage_seconds=lambda: {"read": 1.5},
    )
    for bad in (1, 1, 3):
        loader.quarantine.counts["bad_image"] = bad
        metrics.loader(loader)  # type: ignore[arg-type]
    assert value("fathom_samples_skipped_total", {"reason": "bad_image"}) == 3
    assert value("fathom_data_read_bytes_total") == 100 and value("fathom_data_cache_hits_total") == 3
    assert value("fathom_data_cache_misses_total") == 1
    assert value("fathom_loader_seconds_total", {"stage": "read"}) == 1.5


def test_the_parts_of_a_line_are_the_time_that_has_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.step_metrics.time", SimpleNamespace(perf_counter=lambda: 130.0))
    since = Since(began=100.0, steps=3, images=24, seconds=20.0, apart={"checkpoint": 4.0, "evaluation": 3.0})
    parts = spent(since, waited=5.0)
    assert parts == {"step": 15.0, "data_wait": 5.0, "checkpoint": 4.0, "evaluation": 3.0, "other": 3.0}
    assert spent(since, waited=25.0)["step"] == 0.0  # another rank waited longer than this one's steps took
