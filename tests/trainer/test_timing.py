"""Seconds by phase: nested ones are not counted twice, and a step ends where it is taken."""

from __future__ import annotations

import time

import pytest
import torch

from trainer.timing import PhaseTimer


def test_an_inner_phase_is_not_counted_in_the_outer_one(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([0.0, 1.0, 3.0, 10.0, 20.0, 21.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks))
    timer = PhaseTimer(torch.device("cpu"))
    with timer("loss"):  # 0
        assert timer.timed("forward", lambda x: x + 1)(1) == 2  # 1 to 3
    # 10; between phases nothing is counted
    with timer("backward"):  # 20 to 21
        pass
    assert timer.take() == {"loss": 1.0 + 7.0, "forward": 2.0, "backward": 1.0}
    assert timer.take() == {}


def test_a_phase_that_fails_ends_too() -> None:
    timer = PhaseTimer(torch.device("cpu"))
    with pytest.raises(ValueError, match="no"), timer("loss"):
        raise ValueError("no")
    with timer("backward"):
        time.sleep(0.01)
    assert timer.take()["backward"] >= 0.01


@pytest.mark.gpu
def test_events_of_a_gpu_are_read_a_step_later() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU")
    timer = PhaseTimer(torch.device("cuda"))
    a = torch.randn(2048, 2048, device="cuda")
    with timer("forward"):
        for _ in range(20):
            a = a @ a / 2048
    assert timer.take() == {}
    torch.cuda.synchronize()
    assert timer.take()["forward"] > 0
