"""Work for several processes, its results in order."""

from __future__ import annotations

import signal
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import islice
from multiprocessing import get_context
from typing import TypeVar

A = TypeVar("A")
R = TypeVar("R")


def in_processes(work: Callable[[A], R], todo: Sequence[A], workers: int, chunk: int) -> Iterator[R]:
    """work(x) for every x of `todo`, in order, computed `chunk` at a time in `workers` processes.

    At most 2 * workers chunks of results wait. `work` and everything else is pickled; more than one worker needs a
    caller whose main module can be imported.
    """
    if workers <= 1 or len(todo) <= chunk:
        yield from map(work, todo)
        return
    # spawn: a forked child of a process that has threads (torch's, Ray's) may hang
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        chunks = (todo[i : i + chunk] for i in range(0, len(todo), chunk))
        # the pool computes all that it is given: this bounds what waits in memory
        with _deaf_children():
            waiting = deque(pool.submit(partial(_of_chunk, work), part) for part in islice(chunks, 2 * workers))
        try:
            while waiting:
                yield from waiting.popleft().result()
                waiting.extend(pool.submit(partial(_of_chunk, work), part) for part in islice(chunks, 1))
        finally:
            for future in waiting:
                future.cancel()


@contextmanager
def _deaf_children() -> Iterator[None]:
    """Processes started in the block never see SIGINT and SIGTERM, which a terminal and `timeout` send to a whole
    process group: the parent decides. They end with it."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _of_chunk(work: Callable[[A], R], chunk: Sequence[A]) -> list[R]:
    return [work(x) for x in chunk]
