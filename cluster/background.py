"""A thread beside the main one for as long as a block runs."""

from __future__ import annotations

import contextlib
import threading
from types import TracebackType
from typing import Self


class Background(contextlib.AbstractContextManager["Background"]):
    """A context manager: `_run` goes on in a daemon thread until it sees `_closed`, set at the end of the block, which
    waits `join_s` seconds for it at most."""

    def __init__(self, name: str, join_s: float) -> None:
        self._closed, self._join_s = threading.Event(), join_s
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()
        self._thread.join(timeout=self._join_s)

    def _run(self) -> None:
        raise NotImplementedError
