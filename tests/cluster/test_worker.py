"""A rank's context and its link to the driver. No cluster."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

from cluster.watchdog import Beat
from cluster.worker import Link, Orders, Word, WorkerContext


def until(true: Callable[[], object]) -> None:
    ends = time.monotonic() + 60
    while not true():
        assert time.monotonic() < ends
        time.sleep(0.005)


def test_alone_it_is_a_rank_of_one() -> None:
    context = WorkerContext()
    context.report({"step": 1})
    context.beat(1, "data")
    assert (context.rank, context.world_size, context.device) == (0, 1, "cpu")
    assert context.stop_requested() is None
    assert context.deadline is None


def test_a_link_carries_the_latest_report_the_place_and_the_stop() -> None:
    seen: list[Word] = []

    def exchange(word: Word) -> Orders:
        seen.append(word)
        told = any(word.progress == {"step": 1} for word in seen)
        return Orders(reason="SIGTERM", deadline=12.5) if told else Orders()

    context = WorkerContext()
    with Link(context, exchange, interval_s=0.02):
        context.report({"step": 1})
        until(context.stop_requested)
        assert context.stop_requested() == "SIGTERM"
        assert context.deadline == 12.5
        context.beat(2, "data")
        context.beat(2, "step")
        context.report({"step": 2})
        context.report({"step": 3})
    told = [word.progress["step"] for word in seen if word.progress]
    assert told in ([1, 3], [1, 2, 3])  # an exchange may fall between the last two reports
    assert seen[0].beat == Beat(step=0, phase="start", count=0)
    assert seen[-1].beat == Beat(step=2, phase="step", count=2)
    took = [name for word in seen for name in word.took_s]
    assert took[:1] == ["start"] and set(took) == {"start", "data"}


def test_reports_and_questions_cost_nothing_and_never_wait() -> None:
    asked, answer = threading.Event(), threading.Event()

    def exchange(word: Word) -> Orders:
        asked.set()
        answer.wait(60)
        return Orders()

    context = WorkerContext()
    with Link(context, exchange, interval_s=0.01):
        assert asked.wait(60)
        for step in range(1000):  # while an exchange hangs
            context.report({"step": step})
            context.beat(step, "step")
            assert context.stop_requested() is None
        answer.set()


def test_a_link_outlives_a_driver_that_cannot_be_reached_for_a_while() -> None:
    """What was ordered before stands, what was reported meanwhile arrives afterwards."""
    heard: list[Word] = []
    down = threading.Event()

    def exchange(word: Word) -> Orders:
        if down.is_set():
            raise ConnectionError
        heard.append(word)
        return Orders(reason="SIGTERM")

    context = WorkerContext()
    with Link(context, exchange, interval_s=0.01) as link:
        until(context.stop_requested)
        down.set()
        context.report({"step": 7})
        time.sleep(0.1)
        assert context.stop_requested() == "SIGTERM" and link._thread.is_alive()
        down.clear()
        until(lambda: heard[-1].progress == {"step": 7} or any(word.progress for word in heard))
    assert any(word.progress == {"step": 7} for word in heard)


def test_stacks_are_written_once_for_each_folder(tmp_path: Path) -> None:
    """They show every thread: the one that waits, too."""
    folders = iter([tmp_path / "a", tmp_path / "a", tmp_path / "b"])
    orders = Orders()

    def exchange(word: Word) -> Orders:
        return orders

    blocked, release = threading.Event(), threading.Event()

    def wait_in_a_function_with_a_name() -> None:
        blocked.set()
        release.wait(60)

    thread = threading.Thread(target=wait_in_a_function_with_a_name)
    thread.start()
    assert blocked.wait(60)
    context = WorkerContext(rank=3)
    context.beat(5, "data")
    with Link(context, exchange, interval_s=0.01):
        for folder in folders:
            orders = Orders(stacks=str(folder))
            file = folder / "rank-3.txt"
            until(lambda file=file: file.exists() and "wait_in_a_function_with_a_name" in file.read_text())
            before = file.stat().st_mtime_ns
            time.sleep(0.05)
            assert file.stat().st_mtime_ns == before
    release.set()
    thread.join()
    text = (tmp_path / "b" / "rank-3.txt").read_text()
    assert text.startswith("rank 3, process ") and "step 5, phase data\n" in text
