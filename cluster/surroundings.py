"""What goes on around a worker group: machines that come, go, and are about to go.

A thread asks, the driver reads: the control store may not answer for a while, and the driver has signals to obey.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field

from cluster.background import Background

_EVERY_S = 2.0


@dataclass(frozen=True, kw_only=True)
class Seen:
    """`room`: workers that the machines which stay have room for now, this job's own included. `most`: if nobody else
    used them. `leaving`: nodes (Ray's ids) that are about to go, and when, in seconds since the epoch (None: nobody
    knows)."""

    room: int = 0
    most: int = 0
    leaving: Mapping[str, float | None] = field(default_factory=dict)


class Surroundings(Background):
    """A context manager: while it is entered, `seen` is at most a few seconds old, unless nobody answers."""

    def __init__(self, threads: int, use_gpu: bool, every_s: float = _EVERY_S) -> None:
        self.seen: Seen | None = None  # until the first answer
        self._threads, self._use_gpu, self._every_s = threads, use_gpu, every_s
        super().__init__("fathom-surroundings", join_s=1.0)  # a control store that is gone may hold it for longer

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
    whole = {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}
    stay = {name: resources for name, resources in whole.items() if name not in leaving}
    free: Mapping[str, Mapping[str, float]] = ray._private.state.available_resources_per_node()
    own = Counter[tuple[str, str]]()
    for group in reservations().values():
        for node, bundle in group:
            own.update({(node, kind): amount for kind, amount in bundle.items()})
    room = {
        node: {kind: free.get(node, {}).get(kind, 0.0) + own[node, kind] for kind in ("CPU", "GPU")} for node in stay
    }
    return Seen(
        room=sum(workers_on(resources, threads, use_gpu) for resources in room.values()),
        most=sum(workers_on(resources, threads, use_gpu) for resources in stay.values()),
        leaving=leaving,
    )


def workers_on(resources: Mapping[str, float], threads: int, use_gpu: bool) -> int:
    """How many workers of so many processors (and a GPU) one machine's resources are enough for."""
    by_cpu = int(resources.get("CPU", 0) // threads)
    return min(by_cpu, int(resources.get("GPU", 0))) if use_gpu else by_cpu


def reservations() -> dict[str, list[tuple[str, Mapping[str, float]]]]:
    """What this job has reserved or asked for, by id: node and resources of each part, none before it is given."""
    import ray
    from ray.util.placement_group import placement_group_table

    job = ray.get_runtime_context().get_job_id()
    return {
        name: [(node, entry["bundles"][index]) for index, node in entry["bundles_to_node_id"].items() if node]
        for name, entry in placement_group_table().items()
        if name.endswith(job) and entry["state"] != "REMOVED"  # an id ends with that of its job
    }


def leaving_nodes() -> dict[str, float | None]:
    """Nodes that Ray drains: a preemption notice, or SIGTERM to `ray start --block`."""
    import ray._private.state

    drained: Mapping[str, int] = ray._private.state.state.get_draining_nodes() or {}
    return {node: ms / 1000 if ms else None for node, ms in drained.items()}
