"""How a group that does not move is ended, on every machine it is on: a stopped process obeys nothing but SIGKILL."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress

from cluster.control import About
from cluster.runtime import own_node, remove_shared_memory
from cluster.surroundings import reservations

PATIENCE_S = 10.0  # with machines that may be gone
_SAME_S = 0.5  # between two readings of when a process began

Process = tuple[int, float]  # number, and when it began


def kill(ranks: Mapping[int, About]) -> frozenset[str]:
    """Kill the ranks and remove the shared memory that they leave; returns the nodes (Ray's ids) that did not answer.

    Ray Train, which sees its workers die, then ends by itself.
    """
    import ray

    by_node: dict[str, list[About]] = {}
    for about in ranks.values():
        ray.kill(about.actor)
        by_node.setdefault(about.node, []).append(about)
    here = by_node.pop(own_node(), [])
    calls = {_send(node, group): node for node, group in by_node.items()}
    clean(_processes(here), _segments(here))
    if not calls:
        return frozenset()
    ready, silent = ray.wait(list(calls), num_returns=len(calls), timeout=PATIENCE_S)
    for call in silent:  # not hours later, when the machine is back
        with suppress(Exception):
            ray.cancel(call, force=True)
    return frozenset(calls[call] for call in silent) | frozenset(calls[call] for call in ready if _failed(call))


def release_room(others: Collection[str] = ()) -> None:
    """Give back what this job holds reserved, but for `others`, by id.

    Ray removes a reservation once its creator and the whole job are dead: that of a controller which was killed would
    stay, or be made when machines come back, and keep them from the next attempt.
    """
    import ray
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    for name in reservations().keys() - set(others):
        remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(name))))


def clean(processes: Sequence[Process], segments: Sequence[str]) -> None:
    """Kill processes of this machine, and remove shared memory of theirs."""
    for pid, born in processes:
        kill_process(pid, born)
    for prefix in set(segments):
        remove_shared_memory(prefix)


def kill_process(pid: int, born: float) -> None:
    """SIGKILL to one of Ray's workers on this machine, and to no process that has its number by now."""
    import psutil

    try:
        process = psutil.Process(pid)
        if abs(process.create_time() - born) < _SAME_S and "ray::" in " ".join(process.cmdline()):
            process.kill()
            process.wait(timeout=PATIENCE_S / 2)
    except psutil.Error:
        return


def state_of(about: About) -> str:
    """What the kernel says of a process of this machine, for people: ", stopped", or nothing."""
    names = {"T": "stopped", "t": "traced", "D": "waiting for a disk", "Z": "dead"}
    if about.node != own_node():
        return ""
    try:
        with open(f"/proc/{about.pid}/stat", encoding="utf-8", errors="replace") as file:
            letter = file.read().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""
    return f", {names[letter]}" if letter in names else ""


def nodes_alive() -> frozenset[str]:
    """Ray's ids of the nodes that are there; empty when nobody answers."""
    import ray

    try:
        return frozenset(node["NodeID"] for node in ray.nodes() if node["Alive"])
    except Exception:  # noqa: BLE001  the head is gone, perhaps
        return frozenset()


def _send(node: str, group: Sequence[About]) -> object:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    place = NodeAffinitySchedulingStrategy(node, soft=False)
    remote = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=place)(clean)
    return remote.remote(_processes(group), _segments(group))


def _failed(call: object) -> bool:
    import ray

    try:
        ray.get(call)
    except ray.exceptions.RayError:
        return True
    return False


def _processes(group: Sequence[About]) -> list[Process]:
    return [(about.pid, about.born) for about in group]


def _segments(group: Sequence[About]) -> list[str]:
    return sorted({about.shared_memory for about in group})
