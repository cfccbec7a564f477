"""The stop flag: SIGINT and SIGTERM become a reason that the work reads between steps; a second SIGINT is immediate."""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any

_EXIT_STATUS = {"SIGINT": 130, "SIGTERM": 75, "PREEMPTED": 75, "RESIZED": 75}
REASONS = tuple(_EXIT_STATUS)  # why work is stopped; where several are given at once, the first counts


def exit_status(reason: str) -> int:
    """The process's exit status after work that stopped for `reason` and saved: 130 for Ctrl-C, 75 (try again) else.

    KeyError for a reason nobody declared.
    """
    return _EXIT_STATUS[reason]


class Stopped(Exception):
    """Work was stopped for `reason` before its end; what is done stays, and the same call goes on."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"stopped by {reason}")
        self.reason = reason


class StopFlag:
    """A context manager for the main thread: while it is entered, the first SIGINT or SIGTERM only sets `reason`.

    `deadline` is when the machine goes away (seconds since the epoch): `grace_s` after a SIGTERM, else None. A SIGINT
    after any first signal raises KeyboardInterrupt; more SIGTERMs change nothing. ValueError outside the main thread.
    Not entered, it is a plain flag for `set`. `notice` is a line for stderr at the first signal.
    """

    def __init__(self, grace_s: float | None = None, notice: str = "") -> None:
        self.reason: str | None = None
        self.deadline: float | None = None
        self._grace_s = grace_s
        self._notice = notice
        self._previous: dict[signal.Signals, Any] = {}
        self._event = threading.Event()

    def __enter__(self) -> StopFlag:
        if threading.current_thread() is not threading.main_thread():
            raise ValueError("StopFlag is entered in the main thread: signals arrive there")
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._previous:
            number, handler = self._previous.popitem()
            # a handler that was not set from Python reads as None and cannot be set again
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def set(self, reason: str, deadline: float | None = None) -> None:
        """Ask for the stop; the first reason stays. `deadline`: seconds since the epoch."""
        exit_status(reason)
        if self.reason is None:
            self.deadline = deadline
            self.reason = reason
            self._event.set()

    def check(self) -> None:
        """Raises Stopped once a stop is asked for."""
        if self.reason is not None:
            raise Stopped(self.reason)

    def wait(self, timeout_s: float) -> bool:
        """Sleep up to `timeout_s` seconds, less when a stop is asked for; whether it is."""
        return self._event.wait(timeout_s)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.reason is not None and name == "SIGINT":
            raise KeyboardInterrupt
        if self.reason is None and self._notice:
            with suppress(OSError):
                os.write(2, f"{name}: {self._notice}\n".encode())  # print may be what the signal interrupted
        terminated = name == "SIGTERM" and self._grace_s is not None
        self.set(name, time.time() + (self._grace_s or 0.0) if terminated else None)
