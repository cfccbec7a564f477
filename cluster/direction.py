"""The driver's side of a group that runs: orders to the ranks, news from them, and its end when nobody else ends it.

All goes through one actor (cluster/control.py). Ray Train does not notice a rank that sleeps, nor does a collective
through shared memory ever time out; and a controller of Ray Train's that has lost its machines waits for ever.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from cluster.attempts import reason_of
from cluster.control import About, View
from cluster.ending import kill, nodes_alive, release_room, state_of
from cluster.failures import MachineLost, WorkerDied, WorkerHung
from cluster.runtime import own_node
from cluster.stop import StopFlag
from cluster.surroundings import Surroundings
from cluster.watchdog import Stuck
from cluster.worker import Orders

LOOK_EVERY_S = 0.2
_JOIN_S = 600.0  # for all ranks to be placed and to have found each other
_NO_ROOM_S = 15.0  # machines may be on their way: whoever decides about the next attempt waits for them
_STACKS_S = 5.0
_ABORT_WAIT_S = 20.0

Progress = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, kw_only=True)
class Watch:
    """How long a rank may be silent or in one phase: cluster/watchdog.py.

    `stacks`: a folder for those of a stuck group, which all machines see; it is emptied. `learned`: what an earlier
    attempt's phases took at most; it is added to. `on_slow` gets each straggler once: rank, host, and how many times as
    long as the median rank it needs for its own work (cluster/stragglers.py). `on_event` gets "running", once the ranks
    are at work, and "stopping" with the reason they were given.
    """

    stacks: str
    silence_s: float = 30.0
    factor: float = 10.0
    shortest_s: float = 60.0
    learned: dict[str, float] = field(default_factory=dict)
    on_slow: Callable[[int, str, float], None] | None = None
    on_event: Callable[[str, Mapping[str, Any]], None] | None = None


@dataclass
class Fit:
    """What the thread with Ray Train's `fit` leaves for the main thread."""

    value: Any = None
    error: BaseException | None = None
    done: threading.Event = field(default_factory=threading.Event)


class Given:
    """Gives the ranks the first reason there is to stop: the user's, a machine about to go, room for more of them."""

    def __init__(
        self, control: Any, stop: StopFlag, around: Surroundings, grow: Callable[[int], bool] | None
    ) -> None:
        self.reason: str | None = None
        self.deadline: float | None = None  # of a machine that goes, seconds since the epoch
        self._control, self._stop, self._around, self._grow = control, stop, around, grow
        self._here = own_node()

    def look(self, nodes: frozenset[str]) -> None:
        """To be called often. `nodes`: where the ranks are."""
        if self.reason is not None:
            return
        if self._stop.reason is not None:
            self._give(self._stop.reason, self._stop.deadline)
            return
        seen = self._around.seen
        if seen is None or not nodes:
            return
        leaving = [seen.leaving[node] for node in (nodes | {self._here}) & seen.leaving.keys()]
        if leaving:
            self._give("PREEMPTED", min((when for when in leaving if when is not None), default=None))
        elif self._grow is not None and self._grow(seen.room):
            self._give("RESIZED", None)

    def room(self) -> int | None:
        """How many workers there is room for; None until somebody has answered."""
        return self._around.seen.room if self._around.seen else None

    def _give(self, reason: str, deadline: float | None) -> None:
        self.reason, self.deadline = reason, deadline
        self._control.order.remote(Orders(reason=reason, deadline=deadline))


class Direction:
    """Of one group. `poll_s`: how often a rank speaks. `others`: reservations of this job that are not the group's."""

    def __init__(
        self, control: Any, fit: Fit, workers: int, watch: Watch | None, poll_s: float, others: Collection[str]
    ) -> None:
        self._control, self._fit, self._workers, self._watch = control, fit, workers, watch
        self._poll_s, self._others = poll_s, frozenset(others)
        self._ranks: dict[int, About] = {}  # as last heard: the actor may be gone when they are needed
        self._controller: Any = None
        self._slow: set[int] = set()
        self._told: set[str] = set()

    def wait(self, given: Given, on_progress: Progress | None) -> Stuck | None:
        """Until the group has ended, or is stuck. Raises MachineLost without room, WorkerHung when the ranks do not
        find each other, WorkerDied without the actor."""
        shown, nodes, joined = None, frozenset[str](), 0
        began = room_since = time.monotonic()  # when there was last room for all
        while not self._fit.done.wait(LOOK_EVERY_S):
            given.look(nodes)
            view = self._look()
            if view is None:
                continue
            nodes = view.nodes
            if view.joined != joined or self._controller is None:
                joined = view.joined
                self.refresh()
            self._tell(view, given)
            if on_progress is not None and view.progress is not None and view.progress != shown:
                shown = view.progress
                on_progress(shown)
            if self._watch and view.stuck:
                return view.stuck
            room = given.room()
            if joined >= self._workers or room is None or room >= self._workers:
                room_since = time.monotonic()
            elif time.monotonic() - room_since > _NO_ROOM_S:  # Ray Train would wait for ever
                raise MachineLost(f"the ranks cannot start: there is room for {room} of {self._workers} workers")
            if self._watch and joined < self._workers and time.monotonic() - began > _JOIN_S:
                raise WorkerHung(
                    f"only {joined} of {self._workers} workers have started in {_JOIN_S:.0f} s: can the machines reach "
                    "each other? `fathom doctor --cluster` tries every pair"
                )
        view = self._look() if on_progress is not None and self._fit.error is None else None
        if on_progress is not None and view is not None and view.progress is not None and view.progress != shown:
            on_progress(view.progress)
        return None

    def refresh(self) -> dict[int, About]:
        """Where the ranks are, as far as anybody has said."""
        self._ranks = ask(self._control.ranks.remote()) or self._ranks
        self._controller = self._controller or ask(self._control.controller.remote())
        if self._watch:
            self._watch.learned.update(ask(self._control.learned.remote()) or {})
        return self._ranks

    def end(self) -> frozenset[str]:
        """Kill the ranks, and what starts them; returns the nodes that did not answer."""
        lost = kill(self.refresh())
        if not self._fit.done.wait(_ABORT_WAIT_S / 2) and self._controller is not None:
            import ray

            ray.kill(self._controller)
            release_room(self._others)
        self._fit.done.wait(_ABORT_WAIT_S / 2)
        return lost

    def end_stuck(self, stuck: Stuck, watch: Watch) -> WorkerHung | MachineLost:
        """Have all ranks that can write down where they are, and end them. Returns what to raise."""
        ranks = self.refresh()
        shutil.rmtree(watch.stacks, ignore_errors=True)
        self._control.order.remote(Orders(stacks=watch.stacks))
        missing = {f"rank-{rank}.txt" for rank in ranks if not (stuck.silent and rank in stuck.ranks)}
        ends = time.monotonic() + max(_STACKS_S, 2 * self._poll_s)
        while missing and time.monotonic() < ends and not self._fit.done.is_set():
            time.sleep(LOOK_EVERY_S)
            missing -= set(os.listdir(watch.stacks)) if os.path.isdir(watch.stacks) else set()
        culprits = [ranks[rank] for rank in stuck.ranks if rank in ranks]
        where = ", ".join(f"process {about.pid} on {about.host}{state_of(about)}" for about in culprits[:4])
        lost = self.end()
        there = nodes_alive()
        lost |= {about.node for about in ranks.values() if there and about.node not in there}
        if stuck.silent and any(about.node in lost for about in culprits):
            return MachineLost(f"{stuck} ({where}): its machine does not answer")
        return WorkerHung(f"{stuck} ({where}); stacks in {watch.stacks}")

    def _look(self) -> View | None:
        import ray

        try:
            view: View = ray.get(self._control.look.remote(), timeout=1.0)
        except ray.exceptions.RayActorError as error:
            if self._fit.done.wait(LOOK_EVERY_S):  # the ranks' end is the news
                return None
            raise WorkerDied(f"the actor between the driver and the ranks has died: {reason_of(error)}") from None
        except ray.exceptions.RayError:  # it is late: it may be busy, or the control store away
            return None
        return view

    def _tell(self, view: View, given: Given) -> None:
        watch = self._watch
        if watch is None:
            return
        if watch.on_slow and (new := view.slow.keys() - self._slow):
            self._slow |= new
            for rank in sorted(new):
                watch.on_slow(rank, self._ranks[rank].host if rank in self._ranks else "?", view.slow[rank])
        if view.begun:
            self._event("running", {})
        if given.reason is not None:
            left = {} if given.deadline is None else {"deadline": round(given.deadline, 3)}
            self._event("stopping", {"reason": given.reason, **left})

    def _event(self, what: str, facts: Mapping[str, Any]) -> None:
        if self._watch and self._watch.on_event and what not in self._told:
            self._told.add(what)
            self._watch.on_event(what, facts)


def ask(reference: Any, timeout_s: float = 5.0) -> Any:
    """An actor's answer; None when there is none."""
    import ray

    try:
        return ray.get(reference, timeout=timeout_s)
    except ray.exceptions.RayError:
        return None
