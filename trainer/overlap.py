"""Stages that work beside each other: a producer some items ahead, and a function in threads with results in order."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")
U = TypeVar("U")

_LOOK_EVERY_S = 0.1


class _End:
    def __init__(self, error: BaseException | None) -> None:
        self.error = error


@contextmanager
def ahead(items: Iterable[T], depth: int, name: str) -> Iterator[Iterator[T]]:
    """`items`, made in a thread up to `depth` ahead of who takes them.

    What making them raises is raised to who takes the next. Leaving the block ends the thread and closes `items`.
    """
    made: queue.Queue[Any] = queue.Queue(maxsize=depth)
    closed = threading.Event()

    def put(value: Any) -> bool:
        while not closed.is_set():
            try:
                made.put(value, timeout=_LOOK_EVERY_S)
                return True
            except queue.Full:
                continue
        return False

    def make() -> None:
        iterator = iter(items)
        error: BaseException | None = None
        try:
            for item in iterator:
                if not put(item):
                    return
        except BaseException as caught:  # noqa: BLE001  it is raised again where the items are taken
            error = caught
        finally:
            close = getattr(iterator, "close", None)
            if close is not None:
                close()
        put(_End(error))

    def take() -> Iterator[T]:
        while True:
            item = made.get()
            if isinstance(item, _End):
                if item.error is not None:
                    raise item.error
                return
            yield item

    thread = threading.Thread(target=make, name=name, daemon=True)
    thread.start()
    try:
        yield take()
    finally:
        closed.set()
        thread.join()


def mapped(
    function: Callable[[T], U], items: Iterable[T], pool: ThreadPoolExecutor, depth: int
) -> Iterator[U]:
    """`function` of each item, in the order of the items; `depth` at most are under way while the next one is made."""
    under_way: deque[Future[U]] = deque()
    try:
        for item in items:
            under_way.append(pool.submit(function, item))
            while len(under_way) > depth or (under_way and under_way[0].done()):
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    finally:
        for future in under_way:
            future.cancel()
