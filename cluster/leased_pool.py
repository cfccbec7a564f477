"""Items processed exactly once by as many workers as there is room for, while machines come and go.

The driver's part: it keeps the workers up, tells the lease actor (cluster/lease_actor.py) which have died, and passes
results on. Workers ask the lease actor for items themselves. Several runs may work on the same items, and share them
through files (cluster/claims.py).
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from cluster.announce import announced_nodes
from cluster.failures import WorkerDied
from cluster.lease_actor import LeaseActor, Settings, View
from cluster.leased_worker import LeasedProcessor, LeasedWorker
from cluster.machine import whole_cpus
from cluster.runtime import ClusterAddressError, ClusterError, own_node, ray_session
from cluster.stop import StopFlag

_LOOK_EVERY_S = 0.5
_ROOM_EVERY_S = 2.0
_WAIT_S = 0.2
# workers in a row, and twice as many as there are, for a machine that is lost takes all of its own along:
_UNBORN = 5  # that die before they can work
_FRUITLESS = 6  # that fail without any item done
_CLOSE_S = 10.0
_PART_S = 3.0


@dataclass(frozen=True, kw_only=True)
class Need:
    """What one worker takes of a machine."""

    cpus: int = 1
    gpus: int = 0
    memory_bytes: int = 0

    def fits(self, have: Mapping[str, float]) -> int:
        """How many workers a machine with these resources (Ray's names) holds."""
        rooms = [
            int(have.get(name, 0) // each)
            for name, each in (("CPU", self.cpus), ("GPU", self.gpus), ("memory", self.memory_bytes))
            if each
        ]
        return min(rooms)


@dataclass(frozen=True, kw_only=True)
class LeasedResult:
    """`view`: the last look. `complete`: every item is done or given up."""

    view: View
    complete: bool


@dataclass
class _Member:
    owner: str
    actor: Any
    building: bool = True


def run_leased(
    make: Callable[[str], LeasedProcessor],
    items: Collection[str],
    *,
    listed: Callable[[], Collection[str]],
    claims: str,
    need: Need,
    workers: int | None,
    on_look: Callable[[View], None],
    stop: StopFlag,
    address: str | None = None,
    ttl_s: float = 60.0,
    telemetry: str | None = None,
) -> LeasedResult:
    """Process every item that `listed()` does not name, on up to `workers` workers (None: as many as there is room
    for) built by `make(owner)`; call it from the main thread.

    On the Ray cluster at `address`, or an embedded one, or that of the `ray_session` around. `on_look` gets a View
    twice a second, in this thread. After a stop request no item is begun; those in hand are finished, but not beyond
    the stop's deadline. Items that cannot be done do not end the others' work: they are in `view.given_up`. In the
    folder `telemetry` Ray's nodes are announced to Prometheus.

    Raises what `make` raised; a worker's exception when workers fail one after the other; WorkerDied likewise;
    StorageError for a store that cannot be written; ClusterAddressError when no machine has room for a worker;
    KeyboardInterrupt at the second SIGINT. The workers are gone when it returns.
    """
    run = secrets.token_hex(4)
    settings = Settings(run=run, items=items, listed=listed, claims=claims, ttl_s=ttl_s)
    with ray_session(address, cpus=(workers or 1) * need.cpus), announced_nodes(telemetry):
        _require_room(need)
        crew = _Crew(make, settings, need, workers)
        try:
            return crew.run(on_look, stop)
        finally:
            crew.close()


class _Crew:
    def __init__(
        self, make: Callable[[str], LeasedProcessor], settings: Settings, need: Need, limit: int | None
    ) -> None:
        import ray

        self._make, self._settings, self._need, self._limit = make, settings, need, limit
        # beside the driver, whose end is its end; Ray puts an actor that takes no resources anywhere if `soft`
        place = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(own_node(), soft=False)
        self._leases = (
            ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1, scheduling_strategy=place)(LeaseActor)
            .options(max_concurrency=1)
            .remote(settings)
        )
        ray.get(self._leases.ready.remote())
        self._members: dict[Any, _Member] = {}  # by what is waited for
        self._unborn = self._fruitless = 0
        self._looked = self._measured = float("-inf")
        self._wanted = 0
        self._stopping = False

    def run(self, on_look: Callable[[View], None], stop: StopFlag) -> LeasedResult:
        while True:
            if stop.reason is not None and not self._stopping:
                self._stopping = True
                self._leases.stop.remote()
            now = time.monotonic()
            if now - self._looked >= _LOOK_EVERY_S:
                self._looked = now
                view = self._view()
                if view.results:
                    self._fruitless = 0
                on_look(view)
                if view.fatal is not None:
                    raise view.fatal
                self._end_stuck(view)
                working = any(not member.building for member in self._members.values())
                late = stop.deadline is not None and time.time() >= stop.deadline
                if view.finished or (self._stopping and (not working or late)):
                    self._part(0.0 if late else _PART_S)
                    return LeasedResult(view=view, complete=view.finished)
            if not self._stopping:
                self._fill(now)
            self._wait()

    def _view(self) -> View:
        import ray

        owners = [member.owner for member in self._members.values() if not member.building]
        try:
            view: View = ray.get(self._leases.look.remote(owners, self._stopping))
        except ray.exceptions.RayActorError as error:
            reason = " ".join(str(error).split())[:300]
            raise ClusterError(f"the actor that leases the work cannot be started again: {reason}") from None
        return view

    def _part(self, patience_s: float) -> None:
        """Let workers that have nothing to do any more go by themselves: what they close is closed."""
        import ray

        working = [reference for reference, member in self._members.items() if not member.building]
        if working:
            ray.wait(working, num_returns=len(working), timeout=patience_s)

    def close(self) -> None:
        import ray

        for member in self._members.values():
            ray.kill(member.actor)
        with suppress(ray.exceptions.RayError):  # the claims run out by themselves
            ray.get(self._leases.close.remote(), timeout=_CLOSE_S)
        ray.kill(self._leases)

    def _fill(self, now: float) -> None:
        """As many workers as there is room for, or as were asked for: those that find no room yet wait for it."""
        if now - self._measured >= _ROOM_EVERY_S:
            self._measured = now
            self._wanted = self._limit or max(1, room(self._need))
        while len(self._members) < self._wanted:
            self._hire()

    def _hire(self) -> None:
        import ray

        owner = secrets.token_hex(4)
        options: dict[str, Any] = {"num_cpus": self._need.cpus, "max_restarts": 0, "max_task_retries": 0}
        options |= {"num_gpus": self._need.gpus} if self._need.gpus else {}
        options |= {"memory": self._need.memory_bytes} if self._need.memory_bytes else {}
        variables = {"OMP_NUM_THREADS": str(self._need.cpus)}
        actor = ray.remote(**options, runtime_env={"env_vars": variables})(LeasedWorker).remote(
            self._make, owner, self._leases, self._settings.ttl_s
        )
        self._members[actor.build.remote()] = _Member(owner, actor)

    def _wait(self) -> None:
        import ray

        if not self._members:
            time.sleep(_WAIT_S)
            return
        ready, _ = ray.wait(list(self._members), timeout=_WAIT_S)
        for reference in ready:
            member = self._members.pop(reference)
            try:
                ray.get(reference)
            except ray.exceptions.RayTaskError as error:
                if member.building:
                    raise error.cause from None
                self._lost(member, error.cause)
            except ray.exceptions.RayActorError as error:
                reason = " ".join(str(error).split())[:300]
                self._lost(member, WorkerDied(f"a worker died: killed, out of memory or crashed: {reason}"))
            else:
                if member.building:
                    self._unborn = 0
                    member.building = False
                    self._members[member.actor.work.remote()] = member
                else:
                    ray.kill(member.actor)  # it was told that there is nothing left
                    self._looked = float("-inf")  # so look, before another is hired

    def _lost(self, member: _Member, error: BaseException) -> None:
        import ray

        ray.kill(member.actor)
        self._leases.bury.remote(member.owner)
        if member.building:
            self._unborn += 1
            if self._unborn >= max(_UNBORN, 2 * self._wanted):
                raise WorkerDied(f"{self._unborn} workers in a row died while starting; the last: {error}")
            return
        self._fruitless += 1
        if self._fruitless >= max(_FRUITLESS, 2 * self._wanted):
            raise error

    def _end_stuck(self, view: View) -> None:
        import ray

        for member in self._members.values():
            if member.owner in view.stuck:
                ray.kill(member.actor)  # its work ends as that of one who died


def room(need: Need) -> int:
    """How many workers the cluster has room for, whether anybody else uses it or not."""
    import ray

    return sum(need.fits(node["Resources"]) for node in ray.nodes() if node["Alive"])


def _require_room(need: Need) -> None:
    """Refuse what would wait for ever: ClusterAddressError when no machine is large enough."""
    import ray

    if room(need):
        return
    most = {
        name: max((node["Resources"].get(name, 0) for node in ray.nodes() if node["Alive"]), default=0)
        for name in ("CPU", "GPU", "memory")
    }
    remedies = {
        "GPU": "work on CPUs, or name a cluster whose machines have GPUs",
        "CPU": "use fewer threads, or a larger machine",
        "memory": "use smaller batches or images, or a larger machine",
    }
    asked = {"GPU": need.gpus, "CPU": need.cpus, "memory": need.memory_bytes}
    lacks = next((name for name in remedies if asked[name] > most[name]), "CPU")
    raise ClusterAddressError(
        f"a worker needs {need.cpus} CPUs, {need.gpus} GPUs and {need.memory_bytes / 2**30:.1f} GiB, and the largest "
        f"machine of the cluster has {most['CPU']:g}, {most['GPU']:g} and {most['memory'] / 2**30:.1f} GiB: "
        f"{remedies[lacks]}"
    )


def room_here(need: Need, free_bytes: int) -> int:
    """How many workers this machine has room for, without Ray: at least 1."""
    by_memory = free_bytes // need.memory_bytes if need.memory_bytes else whole_cpus()
    return max(1, min(whole_cpus() // max(1, need.cpus), by_memory))
