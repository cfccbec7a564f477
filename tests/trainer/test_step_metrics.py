"""Where a worker's time goes, counted once."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from prometheus_client import CollectorRegistry, Counter

from trainer.step_metrics import Spent


def test_a_phase_inside_another_is_not_counted_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("trainer.step_metrics.time", SimpleNamespace(perf_counter=lambda: now[0]))
    registry = CollectorRegistry()
    spent = Spent(Counter("x_total", "x", ("phase",), registry=registry))

    def slow() -> Iterator[None]:
        for _ in range(3):
            now[0] += 2.0
            yield

    with spent("write"):
        now[0] += 1.0
        for _ in spent.each("read_wait", slow()):
            with spent("forward"):
                now[0] += 5.0
            now[0] += 0.5
    phases = ("write", "read_wait", "forward")
    found = {phase: registry.get_sample_value("x_total", {"phase": phase}) for phase in phases}
    assert found == {"write": 2.5, "read_wait": 6.0, "forward": 15.0}
    with pytest.raises(KeyError), spent("forward"):
        raise KeyError
