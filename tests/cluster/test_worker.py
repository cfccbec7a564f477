from __future__ import annotations

import threading
import time
from typing import Any

from cluster.worker import Link, WorkerContext


def test_alone_it_is_a_rank_of_one() -> None:
    context = WorkerContext()
    context.report({"step": 1})
    assert (context.rank, context.world_size, context.device) == (0, 1, "cpu")
    assert context.stop_requested() is None
    assert context.deadline is None


def test_a_link_carries_the_latest_report_and_the_stop() -> None:
    seen: list[dict[str, Any] | None] = []

    def exchange(progress: dict[str, Any] | None) -> tuple[str | None, float | None]:
        seen.append(progress)
        return ("SIGTERM", 12.5) if {"step": 1} in seen else (None, None)

    context = WorkerContext()
    with Link(context, exchange, interval_s=0.02):
        context.report({"step": 1})
        ends = time.monotonic() + 60
        while context.stop_requested() is None and time.monotonic() < ends:
            time.sleep(0.01)
        assert context.stop_requested() == "SIGTERM"
        assert context.deadline == 12.5
        context.report({"step": 2})
        context.report({"step": 3})
    told = [progress["step"] for progress in seen if progress]
    assert told in ([1, 3], [1, 2, 3])  # an exchange may fall between the last two reports


def test_reports_and_questions_cost_nothing_and_never_wait() -> None:
    asked, answer = threading.Event(), threading.Event()

    def exchange(progress: dict[str, Any] | None) -> tuple[str | None, float | None]:
        asked.set()
        answer.wait(60)
        return None, None

    context = WorkerContext()
    with Link(context, exchange, interval_s=0.01):
        assert asked.wait(60)
        for step in range(1000):  # while an exchange hangs
            context.report({"step": step})
            assert context.stop_requested() is None
        answer.set()


def test_a_link_ends_when_the_other_side_is_gone() -> None:
    def exchange(progress: dict[str, Any] | None) -> tuple[str | None, float | None]:
        raise ConnectionError

    with Link(WorkerContext(), exchange, interval_s=0.01) as link:
        link._thread.join(timeout=5)
        assert not link._thread.is_alive()
