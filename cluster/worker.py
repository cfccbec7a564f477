"""What the training function gets of the cluster: who it is, where it is, progress out and orders in."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from cluster.background import Background
from cluster.watchdog import Beat

_START = Beat(step=0, phase="start", count=0)
_LONGEST_WAIT_S = 5.0  # between two attempts to reach the driver


@dataclass(frozen=True, kw_only=True)
class Word:
    """What a rank says: its last report, if it is a new one, where it is, the longest that it was in each phase and the
    mean of its own work for a sample since its last word, seconds."""

    progress: dict[str, Any] | None
    beat: Beat
    took_s: Mapping[str, float] = field(default_factory=dict)
    own_s: float | None = None


@dataclass(frozen=True, kw_only=True)
class Orders:
    """What a rank is told. `stacks`: a folder to write all threads' stacks to, once. `slowdown`: its own work's time
    over the median rank's."""

    reason: str | None = None
    deadline: float | None = None
    stacks: str | None = None
    slowdown: float | None = None


Exchange = Callable[[Word], Orders]


@dataclass
class WorkerContext:
    """One rank. Built alone, without a group, it is a rank of one that nobody stops: enough for tests.

    `report`, `beat` and `stop_requested` never block: a `Link` carries them.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    device: str = "cpu"  # "cpu" | "cuda:<i>"
    _progress: dict[str, Any] | None = field(default=None, repr=False)
    _beat: Beat = field(default=_START, repr=False)
    _entered: float = field(default_factory=time.monotonic, repr=False)
    _took_s: dict[str, float] = field(default_factory=dict, repr=False)
    _own_s: tuple[float, int] = field(default=(0.0, 0), repr=False)  # sum, samples
    _orders: Orders = field(default=Orders(), repr=False)

    def report(self, progress: dict[str, Any]) -> None:
        """Tell the driver (plain picklable values; the latest wins; it shows rank 0's)."""
        self._progress = dict(progress)

    def beat(self, step: int, phase: str) -> None:
        """Say that the rank enters a phase of a step: who does not for too long is taken for stuck."""
        now, last = time.monotonic(), self._beat.phase
        self._took_s[last] = max(self._took_s.get(last, 0.0), now - self._entered)
        self._beat, self._entered = Beat(step=step, phase=phase, count=self._beat.count + 1), now

    def own_work(self, seconds: float, samples: int) -> None:
        """Say how long the own work on so many samples took: what no other rank can hold up."""
        total, before = self._own_s
        self._own_s = total + seconds, before + samples

    @property
    def phase(self) -> str:
        """What the rank said last that it is doing."""
        return self._beat.phase

    @property
    def slowdown(self) -> float | None:
        """How many times as long as the median rank this one needs for its own work, as far as the driver knows."""
        return self._orders.slowdown

    def stop_requested(self) -> str | None:
        """The reason to stop, as this rank knows it now: ranks learn it at different steps and have to agree."""
        return self._orders.reason

    @property
    def deadline(self) -> float | None:
        """When the machine goes away (seconds since the epoch), once a stop is requested and if anybody knows."""
        return self._orders.deadline


class Link(Background):
    """A thread that exchanges a rank's word for its orders, every `interval_s` seconds.

    It ends with its block, after one last exchange. While the other side cannot be reached it tries on, and the last
    orders stand.
    """

    def __init__(self, context: WorkerContext, exchange: Exchange, interval_s: float) -> None:
        self._context, self._exchange, self._interval_s = context, exchange, interval_s
        self._written: str | None = None  # the folder of the last stacks
        super().__init__("fathom-link", join_s=max(5.0, 10 * interval_s))

    def _run(self) -> None:
        last, sent, wait_s = False, None, self._interval_s
        while not last:
            last = self._closed.wait(wait_s)
            progress = self._context._progress
            took_s, self._context._took_s = self._context._took_s, {}
            (total, samples), self._context._own_s = self._context._own_s, (0.0, 0)
            word = Word(
                progress=progress if progress is not sent else None,
                beat=self._context._beat,
                took_s=took_s,
                own_s=total / samples if samples else None,
            )
            try:
                orders = self._exchange(word)
            except Exception:  # noqa: BLE001  whatever keeps it from the driver; Ray ends this process if that is gone
                wait_s = min(_LONGEST_WAIT_S, 2 * wait_s)
                continue
            sent, wait_s = progress, self._interval_s
            self._context._orders = orders
            if orders.stacks and orders.stacks != self._written:
                self._written = orders.stacks
                with contextlib.suppress(OSError):  # a full disk must not end the link
                    write_stacks(orders.stacks, self._context)


def write_stacks(folder: str, context: WorkerContext) -> None:
    """Write FOLDER/rank-R.txt: where every thread of this process is, newest call first. Raises OSError."""
    os.makedirs(folder, exist_ok=True)
    beat = context._beat
    with open(os.path.join(folder, f"rank-{context.rank}.txt"), "w", encoding="utf-8") as file:
        file.write(
            f"rank {context.rank}, process {os.getpid()} on {socket.gethostname()}, "
            f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')}: step {beat.step}, phase {beat.phase}\n"
        )
        file.flush()
        faulthandler.dump_traceback(file, all_threads=True)
