"""What the training function gets of the cluster: who it is, and two one-way streets, progress out and stop in."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

Exchange = Callable[[dict[str, Any] | None], tuple[str | None, float | None]]


@dataclass
class WorkerContext:
    """One rank. Built alone, without a group, it is a rank of one that nobody stops: enough for tests.

    `report` and `stop_requested` never block: a `Link` carries them.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    device: str = "cpu"  # "cpu" | "cuda:<i>"
    _progress: dict[str, Any] | None = field(default=None, repr=False)
    _stop: tuple[str | None, float | None] = field(default=(None, None), repr=False)

    def report(self, progress: dict[str, Any]) -> None:
        """Tell the driver (plain picklable values; the latest wins; it shows rank 0's)."""
        self._progress = dict(progress)

    def stop_requested(self) -> str | None:
        """The reason to stop, as this rank knows it now: ranks learn it at different steps and have to agree."""
        return self._stop[0]

    @property
    def deadline(self) -> float | None:
        """When the machine goes away (seconds since the epoch), once a stop is requested and if anybody knows."""
        return self._stop[1]


class Link:
    """A thread that exchanges a context's last report for the stop request, every `interval_s` seconds.

    It ends with its block, after one last exchange; it ends early when the other side is gone.
    """

    def __init__(self, context: WorkerContext, exchange: Exchange, interval_s: float) -> None:
        self._context, self._exchange, self._interval_s = context, exchange, interval_s
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fathom-link", daemon=True)

    def __enter__(self) -> Link:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()
        self._thread.join(timeout=max(5.0, 10 * self._interval_s))

    def _run(self) -> None:
        last, sent = False, None
        while not last:
            last = self._closed.wait(self._interval_s)
            progress = self._context._progress
            try:
                self._context._stop = self._exchange(progress if progress is not sent else None)
                sent = progress
            except Exception:  # noqa: BLE001  the driver or its actor is gone: Ray ends this process soon
                return
