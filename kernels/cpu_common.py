"""What the CPU backend shares: tensors as NumPy arrays, and threads that work through samples.

NumPy lets go of the interpreter's lock in its loops, so threads do run side by side.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray[Any, Any]

# NaN, infinities and masked tokens are part of the job. As a decorator, because the setting is each thread's own.
quiet = np.errstate(invalid="ignore", divide="ignore", over="ignore")


def as_array(x: Tensor, dtype: torch.dtype) -> Array:
    array: Array = x.detach().to(dtype).contiguous().numpy()
    return array


class _Pool:
    """Threads that stay, and with them their scratch arrays."""

    _lock = threading.Lock()
    _threads: ThreadPoolExecutor | None = None
    _size = 0

    @classmethod
    def of(cls, size: int) -> ThreadPoolExecutor:
        """At least so many threads."""
        with cls._lock:
            if cls._threads is None or cls._size < size:
                cls._threads, cls._size = ThreadPoolExecutor(size, thread_name_prefix="fathom-kernels"), size
            return cls._threads

    @classmethod
    def forget(cls) -> None:
        """After a fork: the threads stayed with the parent."""
        cls._lock, cls._threads, cls._size = threading.Lock(), None, 0


os.register_at_fork(after_in_child=_Pool.forget)


def in_threads(work: Callable[[int], None], count: int) -> None:
    """work(0 .. count - 1) on torch's number of threads, this one among them."""
    workers = min(torch.get_num_threads(), count)
    todo = deque(range(count))

    def work_off() -> None:
        while True:
            try:
                i = todo.popleft()
            except IndexError:
                return
            work(i)

    helpers = [_Pool.of(workers - 1).submit(work_off) for _ in range(workers - 1)]
    try:
        work_off()
    finally:
        wait(helpers)
    for helper in helpers:
        helper.result()
