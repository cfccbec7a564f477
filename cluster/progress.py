"""Progress for people: a bar with rate and time left on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Any, TextIO

_LINE_EVERY_S = 10.0
_RATE_OVER_S = 300.0  # long enough to take in a checkpoint, short enough to follow a change
_RATE_EVERY_S = 1.0


class Progress:
    """Shows `done` of `total` units of work (`total` None: unknown). Nothing it does raises: the work matters more.

    `update` may be called as often as wanted. The rate is that of the last minutes and counts from the first update, so
    that a resumed run's earlier work does not inflate it.
    """

    def __init__(
        self,
        title: str,
        total: float | None,
        unit: str,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._title, self._total, self._unit, self._clock = title, total, unit, clock
        self._stream = stream if stream is not None else sys.stderr
        self._marks: deque[tuple[float, float]] = deque()  # (time, done), the newest last
        self._last_line_at = clock()
        self._done = 0.0
        self._values: dict[str, Any] = {}
        self._printed: str | None = None
        self._bar: Any = None
        self._task: Any = None
        with suppress(Exception):
            if self._stream.isatty():
                self._open_bar()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def set_total(self, total: float) -> None:
        """Say how much there is, where that was not known before."""
        with suppress(Exception):
            self._total = total
            if self._bar is not None:
                self._bar.update(self._task, total=int(total))

    def update(self, done: float, **values: Any) -> None:
        """`done` units are complete; `values` are shown beside it (floats with four digits)."""
        with suppress(Exception):
            now = self._clock()
            self._done, self._values = done, values
            self._mark(now, done)
            if self._bar is not None:
                self._bar.update(self._task, completed=done, state=self._state())
            elif now - self._last_line_at >= _LINE_EVERY_S:
                self._last_line_at = now
                self._print()

    def note(self, text: str) -> None:
        """A line of text that stays, above the bar."""
        with suppress(Exception):
            if self._bar is not None:
                self._bar.console.print(text, markup=False, highlight=False)
            else:
                print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Stop drawing, leaving the last state on the terminal or as a last line."""
        with suppress(Exception):
            if self._bar is not None:
                bar, self._bar = self._bar, None
                bar.stop()
            elif self._marks:
                self._print()

    def _open_bar(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as Bar

        # One text of ours, for Rich forgets the rate when updates are over 30 s apart. On a narrow terminal the bar
        # goes first, then the end of the text.
        self._bar = Bar(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[state]}", markup=False),
            console=Console(file=self._stream),
            redirect_stdout=False,
            redirect_stderr=False,
        )
        total = None if self._total is None else int(self._total)
        self._task = self._bar.add_task(self._title, total=total, state="")
        self._bar.start()

    def _state(self) -> str:
        of = f"{self._done:.10g}" if self._total is None else f"{self._done:.10g}/{self._total:.10g}"
        parts = [f"{of} {self._unit}", self._rate_text(), self._left_text(), self._values_text()]
        return "  ".join(part for part in parts if part)

    def _print(self) -> None:
        line = f"{self._title}: {self._state()}"
        if line != self._printed:
            self._printed = line
            print(line, file=self._stream, flush=True)

    def _mark(self, now: float, done: float) -> None:
        """Keep the newest mark and one for each second of the last minutes."""
        marks = self._marks
        if len(marks) >= 2 and now - marks[-2][0] < _RATE_EVERY_S:
            marks.pop()
        marks.append((now, done))
        while len(marks) > 2 and marks[1][0] <= now - _RATE_OVER_S:
            marks.popleft()

    def _rate(self) -> float:
        if not self._marks:
            return 0.0
        (start, before), (now, done) = self._marks[0], self._marks[-1]
        return (done - before) / (now - start) if now > start else 0.0

    def _rate_text(self) -> str:
        rate = self._rate()
        return f"{rate:.3g} {self._unit}/s" if rate > 0 else ""

    def _left_text(self) -> str:
        rate = self._rate()
        if rate <= 0 or self._total is None or self._done >= self._total:
            return ""
        return f"{duration_text((self._total - self._done) / rate)} left"

    def _values_text(self) -> str:
        shown = (
            f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
            for name, value in self._values.items()
        )
        return "  ".join(shown)


def duration_text(duration_s: float) -> str:
    """`1 d 2:03:04`."""
    minutes, seconds = divmod(int(duration_s), 60)
    days, hours = divmod(minutes // 60, 24)
    return f"{f'{days} d ' if days else ''}{hours}:{minutes % 60:02d}:{seconds:02d}"
