"""The actor between a driver and its ranks: it keeps the last word of either side, and watches that they move."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from cluster.stragglers import Stragglers
from cluster.watchdog import Stuck, Watchdog
from cluster.worker import Orders, Word


@dataclass(frozen=True, kw_only=True)
class About:
    """Where a rank's process is."""

    pid: int
    born: float  # when the process began, by its machine's clock: a number may be another's later
    host: str
    node: str  # Ray's id
    actor: Any
    shared_memory: str  # prefix of the segments that it would leave behind


@dataclass(frozen=True, kw_only=True)
class View:
    """What the driver sees at a look. `joined`: ranks that have entered the function so far, on `nodes`.
    `begun`: whether rank 0 is at its first step, or has been. `slow`: stragglers, and how many times the median's their
    own work takes."""

    progress: dict[str, Any] | None
    joined: int
    nodes: frozenset[str]
    begun: bool
    stuck: Stuck | None
    slow: Mapping[int, float]


class Control:
    """One per attempt. `watch`: the Watchdog's settings."""

    def __init__(self, watch: Mapping[str, Any]) -> None:
        self._dog = Watchdog(**watch)
        self._stragglers = Stragglers()
        self._progress: dict[str, Any] | None = None
        self._orders = Orders()
        self._controller: Any = None
        self._ranks: dict[int, About] = {}
        self._left: set[int] = set()
        self._begun = False

    def lead(self, controller: Any) -> None:
        """Ray Train's controller, which starts and ends the ranks, says where it is."""
        self._controller = controller

    def controller(self) -> Any:
        """The actor, or None before it has said so."""
        return self._controller

    def join(self, rank: int, about: About) -> None:
        """A rank enters the function."""
        self._ranks[rank] = about

    def leave(self, rank: int) -> None:
        """A rank has left the function, one way or the other."""
        self._left.add(rank)
        self._dog.forget(rank)

    def exchange(self, rank: int, word: Word) -> Orders:
        """A rank's word for its orders."""
        if rank not in self._left:
            self._dog.hear(rank, word.beat, time.monotonic(), word.took_s)
            if word.own_s is not None:
                self._stragglers.hear(rank, word.own_s)
        if rank == 0:
            self._begun = self._begun or word.beat.count > 0
            self._progress = word.progress or self._progress
        return replace(self._orders, slowdown=self._stragglers.slowdown(rank))

    def order(self, orders: Orders) -> None:
        """What every rank is told from now on."""
        self._orders = orders

    def look(self) -> View:
        """To be called every second or so."""
        nodes = frozenset(about.node for about in self._ranks.values())
        now = time.monotonic()
        return View(
            progress=self._progress,
            joined=len(self._ranks),
            nodes=nodes,
            begun=self._begun,
            stuck=self._dog.stuck(now),
            slow=self._stragglers.named(now),
        )

    def ranks(self) -> dict[int, About]:
        """Where the ranks are that have joined."""
        return self._ranks

    def learned(self) -> dict[str, float]:
        """The longest that each phase took: for the next attempt's watchdog."""
        return dict(self._dog.longest_s)
