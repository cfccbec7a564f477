"""Progress for people: a bar with rate and time left on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Any, TextIO

_LINE_EVERY_S = 10.0


class Progress:
    """Shows `done` of `total` units of work (`total` None: unknown). Nothing it does raises: the work matters more.

    `update` may be called as often as wanted. The rate counts from the first update, so that a resumed run's earlier
    work does not inflate it.
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
        self._first: tuple[float, float] | None = None  # time, done
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

    def update(self, done: float, **values: Any) -> None:
        """`done` units are complete; `values` are shown beside it (floats with four digits)."""
        with suppress(Exception):
            now = self._clock()
            self._done, self._values = done, values
            if self._first is None:
                self._first = (now, done)
            if self._bar is not None:
                self._bar.update(self._task, completed=done, rate=self._rate_text(), values=self._values_text())
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
            elif self._first is not None:
                self._print()

    def _open_bar(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(f"{self._unit}  {{task.fields[rate]}}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[values]}"),
            console=Console(file=self._stream),
            redirect_stdout=False,
            redirect_stderr=False,
        )
        total = None if self._total is None else int(self._total)
        self._task = self._bar.add_task(self._title, total=total, rate="", values="")
        self._bar.start()

    def _print(self) -> None:
        of = f"{self._done:g}" if self._total is None else f"{self._done:g}/{self._total:g}"
        parts = [f"{self._title}: {of} {self._unit}", self._rate_text(), self._left_text(), self._values_text()]
        line = "  ".join(part for part in parts if part)
        if line != self._printed:
            self._printed = line
            print(line, file=self._stream, flush=True)

    def _rate(self) -> float:
        if self._first is None:
            return 0.0
        at, done = self._first
        return (self._done - done) / max(self._clock() - at, 1e-9)

    def _rate_text(self) -> str:
        rate = self._rate()
        return f"{rate:.3g} {self._unit}/s" if rate > 0 else ""

    def _left_text(self) -> str:
        rate = self._rate()
        if rate <= 0 or self._total is None or self._done >= self._total:
            return ""
        minutes, seconds = divmod(int((self._total - self._done) / rate), 60)
        return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d} left"

    def _values_text(self) -> str:
        shown = (
            f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
            for name, value in self._values.items()
        )
        return "  ".join(shown)
