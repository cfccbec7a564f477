"""How a group that does not move is ended, on every machine it is on: a stopped process obeys nothing but SIGKILL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cluster.control import About
from cluster.runtime import own_node, remove_shared_memory

PATIENCE_S = 10.0  # with machines that may be gone


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
    clean(_pids(here), _segments(here))
    if not calls:
        return frozenset()
    ready, silent = ray.wait(list(calls), num_returns=len(calls), timeout=PATIENCE_S)
    return frozenset(calls[call] for call in silent) | frozenset(calls[call] for call in ready if _failed(call))


def release_room() -> None:
    """Give back what this job holds reserved for ranks.

    Ray removes a reservation once its creator and the whole job are dead: that of a controller which was killed would
    stay, or be made when machines come back, and keep them from the next attempt.
    """
    import ray
    from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group

    job = ray.get_runtime_context().get_job_id()
    for name, entry in placement_group_table().items():
        if name.endswith(job) and entry["state"] != "REMOVED":  # an id ends with that of its job
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(name))))


def clean(pids: Sequence[int], segments: Sequence[str]) -> None:
    """Kill processes of this machine, and remove shared memory of theirs."""
    for pid in pids:
        kill_process(pid)
    for prefix in set(segments):
        remove_shared_memory(prefix)


def kill_process(pid: int) -> None:
    """SIGKILL to one of Ray's workers on this machine, and to no process that has its number by now."""
    import psutil

    try:
        process = psutil.Process(pid)
        if "ray::" in " ".join(process.cmdline()):
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
    return remote.remote(_pids(group), _segments(group))


def _failed(call: object) -> bool:
    import ray

    try:
        ray.get(call)
    except ray.exceptions.RayError:
        return True
    return False


def _pids(group: Sequence[About]) -> list[int]:
    return [about.pid for about in group]


def _segments(group: Sequence[About]) -> list[str]:
    return sorted({about.shared_memory for about in group})
