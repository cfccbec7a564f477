"""What goes on around a worker group: machines that come, go, and are about to go.

A thread asks, the driver reads: the control store may not answer for a while, and the driver has signals to obey.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType

_EVERY_S = 2.0


@dataclass(frozen=True, kw_only=True)
class Seen:
    """`room`: workers that the machines hold which stay. `leaving`: nodes (Ray's ids) that are about to go, and when,
    in seconds since the epoch (None: nobody knows)."""

    room: int = 0
    leaving: Mapping[str, float | None] = field(default_factory=dict)


class Surroundings:
    """A context manager: while it is entered, `seen` is at most a few seconds old, unless nobody answers."""

    def __init__(self, threads: int, use_gpu: bool, every_s: float = _EVERY_S) -> None:
        self.seen: Seen | None = None  # until the first answer
        self._threads, self._use_gpu, self._every_s = threads, use_gpu, every_s
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fathom-surroundings", daemon=True)

    def __enter__(self) -> Surroundings:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()
        self._thread.join(timeout=1.0)  # a control store that is gone may hold it for longer

    def _run(self) -> None:
        while True:
            with suppress(Exception):  # nobody answers: what was seen last stands
                self.seen = look_around(self._threads, self._use_gpu)
            if self._closed.wait(self._every_s):
                return


def look_around(threads: int, use_gpu: bool) -> Seen:
    """One look at the cluster that this process has joined."""
    import ray

    leaving = leaving_nodes()
    stay = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["NodeID"] not in leaving]
    return Seen(room=sum(workers_on(node, threads, use_gpu) for node in stay), leaving=leaving)


def workers_on(resources: Mapping[str, float], threads: int, use_gpu: bool) -> int:
    """How many workers of so many processors (and a GPU) one machine holds, if nobody else uses it."""
    by_cpu = int(resources.get("CPU", 0) // threads)
    return min(by_cpu, int(resources.get("GPU", 0))) if use_gpu else by_cpu


def leaving_nodes() -> dict[str, float | None]:
    """Nodes that Ray drains: a preemption notice, or SIGTERM to `ray start --block`."""
    import ray._private.state

    drained: Mapping[str, int] = ray._private.state.state.get_draining_nodes() or {}
    return {node: ms / 1000 if ms else None for node, ms in drained.items()}
