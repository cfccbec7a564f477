"""A Station on every node, asked with a deadline: what does not answer is told, replaced, and given up at last."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from cluster.probe import one_line, own_interfaces
from cluster.runtime import ClusterAddressError
from cluster.station import Station

_HEAD = "node:__internal_head__"
_UNEXPECTED = 2  # Ray's reason of a death that is not an autoscaler's doing
_LOOK_S = 20.0
_CONNECT_S = 5.0
# For a process of its own: where the control store has stopped, Ray's client waits for minutes, whatever it is told.
_LOOK = """
import json, sys
from ray._raylet import GcsClient
try:
    nodes = GcsClient(address=sys.argv[1]).get_all_node_info(timeout=10)
    print(json.dumps([node.node_manager_address for node in nodes.values() if node.state == 0]))
except Exception as error:
    print(json.dumps(f"{type(error).__name__}: {error}"))
"""


@dataclass(frozen=True, kw_only=True)
class Node:
    """`name`: the host's, with the address where hosts share one. `id`: Ray's. `gpus`: that Ray gives out."""

    name: str
    id: str
    address: str
    gpus: int = 0


@dataclass(frozen=True, kw_only=True)
class Trouble:
    """A question that a node did not answer, and how that showed. `gone`: nothing more was asked of it."""

    node: str
    question: str
    text: str
    gone: bool = False


@dataclass(frozen=True)
class CallFailed:
    """In place of an answer: the exception that the call raised, as a line."""

    text: str


def require_member(address: str, patience_s: float = _LOOK_S) -> None:
    """To be asked before the cluster at `address` (HOST:PORT) is joined: joining may wait for minutes.

    ClusterAddressError when something listens there that does not answer within `patience_s`, and when this machine is
    none of the cluster's. An address where nothing listens is left to `ray_session`.
    """
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S).close()
    except OSError:
        return
    try:
        done = subprocess.run(
            [sys.executable, "-c", _LOOK, address], capture_output=True, text=True, timeout=patience_s,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise ClusterAddressError(
            f"{address}: something listens there, but does not answer as Ray's head node within {patience_s:.0f} s: is "
            "it Ray's own port (6379 unless ray start was told another), and does gcs_server run there?"
        ) from None
    try:
        found = json.loads(done.stdout)
    except ValueError:  # another version of Ray, perhaps: joining will show
        return
    if isinstance(found, str):
        raise ClusterAddressError(f"cannot ask the Ray cluster at {address} for its nodes: {one_line(found)}")
    own = {address for addresses in own_interfaces().values() for address in addresses}
    if not any(member in own or member.startswith("127.") for member in found):
        raise ClusterAddressError(
            f"{address}: this machine is no node of that cluster ({len(found)} nodes, {', '.join(found[:4])}): run it "
            "on one of them, or start Ray here (ray start --address)"
        )


def list_nodes() -> tuple[list[Node], dict[str, str]]:
    """The cluster's nodes that are alive, its head first; and why others died whose place nobody has taken."""
    import ray

    listed = ray.nodes()
    alive = sorted(
        (node for node in listed if node["Alive"]),
        key=lambda node: (_HEAD not in node["Resources"], node["NodeManagerHostname"], node["NodeManagerAddress"]),
    )
    addresses = {node["NodeManagerAddress"] for node in alive}
    lost = {
        f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})": one_line(node.get("DeathReasonMessage") or "")
        for node in listed
        if not node["Alive"] and node.get("DeathReason") == _UNEXPECTED and node["NodeManagerAddress"] not in addresses
    }
    return [
        Node(
            name=name,
            id=node["NodeID"],
            address=node["NodeManagerAddress"],
            gpus=int(node["Resources"].get("GPU", 0)),
        )
        for name, node in zip(short_names(alive), alive, strict=True)
    ], lost


def short_names(nodes: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of Ray's nodes, as short as tells them apart."""
    for form in (
        "{NodeManagerHostname}",
        "{NodeManagerHostname} ({NodeManagerAddress})",
        "{NodeManagerHostname} ({NodeManagerAddress}:{NodeManagerPort})",
    ):
        names = [form.format_map(node) for node in nodes]
        if len(set(names)) == len(names):
            return names
    return [f"{node['NodeManagerHostname']} ({node['NodeID'][:8]})" for node in nodes]


class Crew:
    """A context manager: stations on all nodes. Whatever they do, `ask` comes back; `troubles` is added to.

    `stations`: by the node's name, those that still answer.
    """

    def __init__(self, nodes: Sequence[Node], timeout_s: float, troubles: list[Trouble]) -> None:
        self.stations: dict[str, Any] = {}
        self.timeout_s = timeout_s
        self.nodes = {node.name: node for node in nodes}
        self._troubles = troubles

    def __enter__(self) -> Crew:
        for name in self.nodes:
            self.stations[name] = self._station(name)
        self._greet(list(self.stations), "start of a worker", self.timeout_s)
        return self

    def __exit__(self, *_: object) -> None:
        for station in self.stations.values():
            _kill(station)

    def call(self, question: str, function: Callable[..., Any], *args: Any) -> dict[str, Any]:
        """A function's results by node; where there is none, that is a trouble."""
        return self.answers(
            question, {name: station.call.remote(function, *args) for name, station in self.stations.items()}
        )

    def answers(self, question: str, calls: Mapping[str, Any]) -> dict[str, Any]:
        """`ask`, but a call that raises is a trouble too."""
        answers = self.ask(question, calls)
        for name, answer in answers.items():
            if isinstance(answer, CallFailed):
                self._troubles.append(Trouble(node=name, question=question, text=answer.text))
        return {name: answer for name, answer in answers.items() if not isinstance(answer, CallFailed)}

    def ask(self, question: str, calls: Mapping[str, Any], patience_s: float | None = None) -> dict[str, Any]:
        """Results of calls that are under way, by node, or CallFailed; `patience_s` is `timeout_s` where None.

        A station that is late or has died is a trouble, is replaced, and has no result.
        """
        import ray

        patience_s = self.timeout_s if patience_s is None else patience_s
        answers, broken = _results(calls, patience_s)
        for name, text in broken.items():
            self._troubles.append(Trouble(node=name, question=question, text=text))
            _kill(self.stations[name])
            self.stations[name] = self._station(name)
        if broken:
            self._greet(list(broken), "start of another worker", self.timeout_s)
        return {
            name: CallFailed(one_line(f"{type(_cause(answer)).__name__}: {_cause(answer)}"))
            if isinstance(answer, ray.exceptions.RayTaskError)
            else answer
            for name, answer in answers.items()
        }

    def _greet(self, names: Sequence[str], question: str, patience_s: float) -> None:
        """Give up the nodes on which no station starts."""
        _, broken = _results({name: self.stations[name].hello.remote() for name in names}, patience_s)
        for name, text in broken.items():
            self._troubles.append(Trouble(node=name, question=question, text=text, gone=True))
            _kill(self.stations.pop(name))

    def _station(self, name: str) -> Any:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        place = NodeAffinitySchedulingStrategy(self.nodes[name].id, soft=False)
        return ray.remote(num_cpus=0, max_restarts=0, scheduling_strategy=place)(Station).remote()


def _results(calls: Mapping[str, Any], patience_s: float) -> tuple[dict[str, Any], dict[str, str]]:
    """Values (or Ray's RayTaskError) of the calls that came back in time, and what is wrong with the others."""
    import ray

    if calls:
        ray.wait(list(calls.values()), num_returns=len(calls), timeout=patience_s)
    answers: dict[str, Any] = {}
    broken: dict[str, str] = {}
    for name, call in calls.items():
        try:
            answers[name] = ray.get(call, timeout=0.05)
        except ray.exceptions.RayTaskError as error:  # before the timeout: it is of its cause's type as well
            answers[name] = error
        except ray.exceptions.GetTimeoutError:
            broken[name] = f"no answer within {patience_s:.0f} s"
        except ray.exceptions.RayError as error:
            broken[name] = _death(error)
    return answers, broken


def _cause(error: Any) -> Any:
    return getattr(error, "cause", None) or error


def _death(error: BaseException) -> str:
    """Why an actor died: of Ray's many lines the last that tells."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "Error: " in line]
    return one_line((telling or lines or [type(error).__name__])[-1])


def _kill(station: Any) -> None:
    import ray

    with suppress(Exception):  # it may be dead, or its node gone
        ray.kill(station)
