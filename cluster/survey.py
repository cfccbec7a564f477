"""A look over the cluster that this process has joined: every node and pairs of nodes are asked, each with a deadline.

A node that does not answer, or a call that hangs, is one more thing that is reported. Facts only: whoever asked judges.
"""

from __future__ import annotations

import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.crew import CallFailed, Crew, Node, Trouble, list_nodes
from cluster.probe import MIB, FolderFacts, NodeFacts, node_facts, one_line, try_folder
from cluster.runtime import own_node
from cluster.station import Door, Meeting, reach

SAMPLE_MIB = 8
PAIR_S = 8.0  # for two nodes to find each other
MAX_ROUNDS = 16  # partners that each node of a large cluster is tried with
_TRIPS = 7
_TRIP_S = 5.0
_MARGIN_S = 5.0


@dataclass(kw_only=True)
class Pair:
    """Two nodes. `ports`: why one could not open a TCP connection to the other, "A -> B: reason" each; then no more is
    tried. Else the rate of an all-reduce by backend, or in `failures` why there was none."""

    left: str
    right: str
    ports: Sequence[str] = ()
    mib_per_s: dict[str, float] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """Some MiB from one node's object store to another's. `problem` is empty when they came."""

    source: str
    target: str
    mib_per_s: float = 0.0
    problem: str = ""


@dataclass(kw_only=True)
class Survey:
    """What was found. By name of the node where not said otherwise; a node that did not answer is absent there.

    `checks`: what the caller's function returned. `clocks`: seconds that a node's clock is ahead of this process's,
    and by how much that may be wrong. `lost`: nodes that died, and why. Each node meets one other in a round; in as
    many as are possible it has met all.
    """

    nodes: Sequence[Node] = ()
    lost: Mapping[str, str] = field(default_factory=dict)
    troubles: list[Trouble] = field(default_factory=list)
    facts: Mapping[str, NodeFacts] = field(default_factory=dict)
    checks: Mapping[str, Any] = field(default_factory=dict)
    folders: Mapping[str, FolderFacts] = field(default_factory=dict)
    clocks: dict[str, tuple[float, float]] = field(default_factory=dict)
    transfers: Sequence[Transfer] = ()
    pairs: list[Pair] = field(default_factory=list)
    rounds_tried: int = 0
    rounds_possible: int = 0


def survey(
    *,
    folder: str,
    distributions: Sequence[str],
    rooms: Sequence[str],
    check: Callable[[], Any],
    timeout_s: float = 60.0,
    every_pair: bool = False,
    on_stage: Callable[[str], None] | None = None,
) -> Survey:
    """Look over the cluster that this process has joined (`ray_session`); takes a bounded time whatever the nodes do.

    `folder` is absolute; each node writes into it. `distributions`, `rooms`: whose versions and code are
    compared. `check` runs on every node, found by its module's name. A node has `timeout_s` for each question.
    Without `every_pair` each node of a large cluster is tried with MAX_ROUNDS others.
    """
    say = on_stage or (lambda stage: None)
    nodes, lost = list_nodes()
    found = Survey(nodes=nodes, lost=lost)
    say(f"starting on {len(nodes)} nodes")
    with Crew(nodes, timeout_s, found.troubles) as crew:
        say("versions, code, devices")
        found.facts = crew.call("versions and devices", node_facts, distributions, rooms)
        say("installation")
        found.checks = crew.call("checks of the installation", check)
        say("clocks")
        found.clocks = _clocks(crew)
        say("the shared folder")
        found.folders = _folders(crew, folder)
        say("the object store")
        found.transfers = _transfers(crew)
        _meet_all(crew, found, say, None if every_pair else MAX_ROUNDS)
    return found


def rounds(count: int) -> list[list[tuple[int, int]]]:
    """A round-robin tournament of 0 .. count - 1: everybody meets everybody once, and one at a time."""
    if count < 2:
        return []
    seats: list[int | None] = [*range(count), *([None] if count % 2 else [])]
    played: list[list[tuple[int, int]]] = []
    for _ in range(len(seats) - 1):
        half = len(seats) // 2
        facing = zip(seats[:half], reversed(seats[half:]), strict=True)
        played.append([(min(a, b), max(a, b)) for a, b in facing if a is not None and b is not None])
        seats = [seats[0], seats[-1], *seats[1:-1]]  # all but the first move on by one
    return played


def _clocks(crew: Crew) -> dict[str, tuple[float, float]]:
    """How far each clock is ahead, by the quickest of some round trips, and half that trip: the most it can err."""
    import ray

    found: dict[str, tuple[float, float]] = {}
    for name, station in list(crew.stations.items()):
        for _ in range(_TRIPS):
            sent, clock = time.time(), time.perf_counter()
            call = station.clock.remote()
            try:
                there = ray.get(call, timeout=_TRIP_S)
            except ray.exceptions.RayError:
                crew.ask("its clock", {name: call}, patience_s=0.1)
                break
            half = (time.perf_counter() - clock) / 2
            if name not in found or half < found[name][1]:
                found[name] = (there - sent - half, half)
    return found


def _folders(crew: Crew, folder: str) -> dict[str, FolderFacts]:
    try:
        with _marked(folder) as (mark, token):
            return _try_folders(crew, mark, token)
    except OSError as error:
        here = [node.name for node in crew.nodes.values() if node.id == own_node()]
        return {name: FolderFacts(problem=one_line(error)) for name in here}


def _try_folders(crew: Crew, mark: str, token: str) -> dict[str, FolderFacts]:
    files = {name: f"node-{number}" for number, name in enumerate(crew.stations)}
    calls = {
        name: station.call.remote(try_folder, mark, token, files[name], SAMPLE_MIB)
        for name, station in crew.stations.items()
    }
    found: dict[str, FolderFacts] = crew.answers("the folder", calls)
    for name, facts in found.items():
        path = Path(mark, files[name])
        if not facts.problem and not (path.is_file() and path.stat().st_size == SAMPLE_MIB * MIB):
            found[name] = FolderFacts(problem="what it writes does not arrive here")
    return found


@contextmanager
def _marked(folder: str) -> Iterator[tuple[str, str]]:
    """A folder inside, with a token in it, for the time of the block."""
    mark, token = os.path.join(folder, f".fathom-doctor-{secrets.token_hex(4)}"), secrets.token_hex(16)
    os.mkdir(mark)
    try:
        Path(mark, "token").write_text(token, encoding="utf-8")
        yield mark, token
    finally:
        shutil.rmtree(mark, ignore_errors=True)


def _transfers(crew: Crew) -> list[Transfer]:
    """Every node gets what the one before it has put."""
    calls = {name: station.put.remote(SAMPLE_MIB) for name, station in crew.stations.items()}
    put = crew.answers("its object store", calls)
    names = [name for name in crew.stations if name in put]
    source = dict(zip(names, names[-1:] + names[:-1], strict=True))
    patience_s = max(crew.timeout_s - _MARGIN_S, 1.0)
    calls = {name: crew.stations[name].fetch.remote(put[source[name]], patience_s) for name in names}
    return [
        Transfer(source=source[name], target=name, problem=answer.text)
        if isinstance(answer, CallFailed)
        else Transfer(source=source[name], target=name, mib_per_s=SAMPLE_MIB / answer)
        for name, answer in crew.ask("another node's object store", calls).items()
    ]


def _meet_all(crew: Crew, found: Survey, say: Callable[[str], None], most: int | None) -> None:
    """Pairs of nodes, as many at a time as there are; each node with `most` others, None: with all."""
    names = [node.name for node in found.nodes]
    gpus = {
        name: max(facts.gpus, key=lambda gpu: gpu.free_mib).uuid for name, facts in found.facts.items() if facts.gpus
    }
    schedule = rounds(len(names))
    found.rounds_possible = len(schedule)
    found.rounds_tried = len(schedule[:most])
    for number, played in enumerate(schedule[:most], start=1):
        say(f"pairs of nodes, round {number} of {found.rounds_tried}")
        doors = crew.answers("opening a port", {name: station.open.remote() for name, station in crew.stations.items()})
        ready = doors.keys() & crew.stations.keys()
        pairs = [Pair(left=names[a], right=names[b]) for a, b in played if {names[a], names[b]} <= ready]
        pairs = _try_ports(crew, pairs, doors)
        found.pairs += pairs
        _meet(crew, [pair for pair in pairs if not pair.ports], "gloo", doors, gpus)
        both = [pair for pair in pairs if "gloo" in pair.mib_per_s and {pair.left, pair.right} <= gpus.keys()]
        _meet(crew, both, "nccl", doors, gpus)


def _try_ports(crew: Crew, pairs: Sequence[Pair], doors: Mapping[str, Door]) -> list[Pair]:
    """Whether each node's port can be reached from the other. Returns the pairs of which both answered."""
    other = {a: b for pair in pairs for a, b in ((pair.left, pair.right), (pair.right, pair.left))}
    calls = {
        name: crew.stations[name].call.remote(reach, crew.nodes[peer].address, doors[peer].port, doors[peer].word)
        for name, peer in other.items()
    }
    shut = crew.answers("a port of another node", calls)
    for pair in pairs:
        pair.ports = [f"{name} -> {other[name]}: {shut[name]}" for name in (pair.left, pair.right) if shut.get(name)]
    return [pair for pair in pairs if {pair.left, pair.right} <= shut.keys()]


def _meet(crew: Crew, pairs: Sequence[Pair], backend: str, doors: Mapping[str, Door], gpus: Mapping[str, str]) -> None:
    """An all-reduce of each pair; what came of it is noted in the pair."""
    calls = {}
    for pair in pairs:
        key = secrets.token_hex(8)
        for rank, name in enumerate((pair.left, pair.right)):
            meeting = Meeting(
                backend=backend, rank=rank, host=crew.nodes[pair.left].address, port=doors[pair.left].store, key=key,
                mib=SAMPLE_MIB, timeout_s=PAIR_S, gpu=gpus[name] if backend == "nccl" else "",
            )  # fmt: skip
            calls[name] = crew.stations[name].meet.remote(meeting)
    answers = crew.ask(f"an all-reduce with {backend}", calls, patience_s=3 * PAIR_S + _MARGIN_S)
    for pair in pairs:
        said = {name: answers.get(name, CallFailed("no answer")) for name in (pair.left, pair.right)}
        failed = [f"{name}: {answer.text}" for name, answer in said.items() if isinstance(answer, CallFailed)]
        if failed:
            pair.failures[backend] = "; ".join(failed)
        else:
            pair.mib_per_s[backend] = SAMPLE_MIB / max(said.values())
