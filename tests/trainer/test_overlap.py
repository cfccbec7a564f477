"""Stages beside each other: order, how far ahead, and that neither an error nor an early end leaves a thread."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, cast

import pytest

from trainer.overlap import ahead, mapped

pytestmark = pytest.mark.timeout(60)  # a hang is a failure

PATIENCE_S = 30.0


class Source:
    """Numbers, and what became of them. `error`: raised after the last."""

    def __init__(self, count: int, error: BaseException | None = None) -> None:
        self.count, self.error = count, error
        self.made, self.closed = 0, False
        self.thread: threading.Thread | None = None
        self.reached = threading.Condition()

    def __iter__(self) -> Iterator[int]:
        try:
            for number in range(self.count):
                with self.reached:
                    self.thread = threading.current_thread()
                    self.made = number + 1
                    self.reached.notify_all()
                yield number
            if self.error is not None:
                raise self.error
        finally:
            self.closed = True

    def until(self, made: int) -> None:
        with self.reached:
            assert self.reached.wait_for(lambda: self.made >= made, PATIENCE_S), self.made


def ended(source: Source) -> bool:
    return source.closed and source.thread is not None and not source.thread.is_alive()


def test_items_come_in_order_and_the_thread_ends() -> None:
    source = Source(50)
    with ahead(source, 3, "numbers") as items:
        assert list(items) == list(range(50))
        assert source.thread is not threading.current_thread()
        assert source.thread is not None and source.thread.name == "numbers"
    assert ended(source)


def test_it_works_ahead_and_only_so_far() -> None:
    """Three lie ready, and one is in hand."""
    source = Source(50)
    with ahead(source, 3, "numbers") as items:
        for taken in range(50):
            source.until(min(50, taken + 4))
            assert source.made <= taken + 4
            assert next(items) == taken


def test_an_error_comes_after_what_was_made_before_it() -> None:
    source = Source(3, ValueError("no such file"))
    got: list[int] = []
    with ahead(source, 8, "numbers") as items, pytest.raises(ValueError, match="no such file"):
        got.extend(items)
    assert got == [0, 1, 2] and ended(source)
    with ahead(Source(0), 1, "nothing") as items:
        assert list(items) == []


def test_who_leaves_early_ends_the_thread_and_closes_its_source() -> None:
    source = Source(1000)
    with ahead(source, 2, "numbers") as items:
        assert next(items) == 0
    assert ended(source) and source.made < 10
    source = Source(1000)

    def consume() -> None:
        with ahead(source, 2, "numbers"):
            source.until(3)
            raise RuntimeError("of the consumer")

    with pytest.raises(RuntimeError, match="of the consumer"):
        consume()
    assert ended(source)


class AtOnce:
    """A pool whose work is done when it is handed in."""

    def submit(self, function: Callable[[Any], Any], item: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(function(item))
        return future


def test_results_come_in_the_order_of_the_items() -> None:
    second = threading.Event()

    def work(number: int) -> int:
        if number == 0:
            assert second.wait(PATIENCE_S)  # the first is done last
        else:
            second.set()
        return 10 * number

    with ThreadPoolExecutor(2) as pool:
        assert list(mapped(work, range(9), pool, 4)) == [10 * number for number in range(9)]


@pytest.mark.parametrize("depth", [1, 4])
def test_no_more_are_under_way_than_was_said(depth: int) -> None:
    free = threading.Event()
    asked = 0

    def items() -> Iterator[int]:
        nonlocal asked
        for number in range(10):
            asked = number + 1
            assert asked - len(got) <= depth + 1  # this one is not handed in yet
            if asked == depth + 1:
                free.set()  # so many do wait beside each other
            yield number

    def work(number: int) -> int:
        assert free.wait(PATIENCE_S)
        return number

    got: list[int] = []
    with ThreadPoolExecutor(8) as pool:
        for result in mapped(work, items(), pool, depth):
            got.append(result)
    assert got == list(range(10))


def test_what_is_done_is_not_held_back() -> None:
    """A consumer that writes gets each as soon as it is there, not when as many as allowed are under way."""
    asked: list[int] = []

    def items() -> Iterator[int]:
        for number in range(5):
            asked.append(number)
            yield number

    results = mapped(lambda number: number, items(), cast(ThreadPoolExecutor, AtOnce()), 100)
    assert next(results) == 0 and asked == [0]
    assert list(results) == [1, 2, 3, 4]


def test_a_failed_one_is_told_in_its_place_and_the_rest_is_not_begun() -> None:
    told, begun = threading.Event(), []

    def work(number: int) -> int:
        begun.append(number)
        if number == 1:
            raise ValueError("cannot be encoded")
        assert number == 0 or told.wait(PATIENCE_S)
        return number

    got: list[int] = []
    with ThreadPoolExecutor(1) as pool:
        with pytest.raises(ValueError, match="cannot be encoded"):
            got.extend(mapped(work, range(50), pool, 10))
        told.set()
    assert got == [0] and len(begun) <= 3  # the pool had one in hand when it was told


def test_who_does_not_want_the_rest_has_it_cancelled() -> None:
    gate, begun = threading.Event(), []

    def work(number: int) -> int:
        begun.append(number)
        assert number == 0 or gate.wait(PATIENCE_S)
        return number

    with ThreadPoolExecutor(1) as pool:
        results = mapped(work, range(50), pool, 10)
        assert next(results) == 0
        results.close()  # type: ignore[attr-defined]
        gate.set()
    assert len(begun) <= 2
