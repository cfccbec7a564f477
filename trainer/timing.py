"""Seconds by phase of a step, without waiting for the device: events on a GPU, read a step later; clocks on a CPU.

Phases nest: what an inner phase takes is not counted in the outer one. So `loss` around a task's sums, with `forward`
inside it, leaves the loss alone.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch


class PhaseTimer:
    """`with timer("forward"): ...` any number of times a step; `take` ends the step and gives seconds by phase.

    On a GPU they are those of the step before: its events have passed by the time this step's gradient norm is read.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._stack: list[str] = []
        self._marks: list[tuple[str | None, Any]] = []  # from this mark on, that phase runs
        self._before: list[tuple[str | None, Any]] = []

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        self._stack.append(phase)
        self._mark()
        try:
            yield
        finally:
            self._stack.pop()
            self._mark()

    def timed(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, its calls counted as `phase`."""

        def call(*args: Any, **kwargs: Any) -> Any:
            with self(phase):
                return function(*args, **kwargs)

        return call

    def take(self) -> dict[str, float]:
        """Seconds by phase of the step that ends here; on a GPU of the one before, {} at the first."""
        marks, self._marks = self._marks, []
        if self._cuda:
            marks, self._before = self._before, marks
        return _seconds(marks, self._cuda)

    def _mark(self) -> None:
        now: Any
        if self._cuda:
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            now = time.perf_counter()
        self._marks.append((self._stack[-1] if self._stack else None, now))


def _seconds(marks: list[tuple[str | None, Any]], cuda: bool) -> dict[str, float]:
    spent: dict[str, float] = {}
    for (phase, start), (_, stop) in itertools.pairwise(marks):
        if phase is not None:
            seconds = start.elapsed_time(stop) / 1000 if cuda else stop - start
            spent[phase] = spent.get(phase, 0.0) + seconds
    return spent
