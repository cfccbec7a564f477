"""`fathom doctor --cluster`: what the nodes of a Ray cluster have in common, and whether they reach each other.

cluster/survey.py brings the facts; every function here makes findings of some of them. `ok` findings are one line for
all nodes; whatever else is found names its nodes.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.doctor import GIB, Finding, fail, ok, warn

if TYPE_CHECKING:
    from cluster.crew import Node, Trouble
    from cluster.probe import FolderFacts, NodeFacts
    from cluster.survey import Pair, Survey, Transfer

# A group of ranks works only where these are equal; of the others the results may differ a little.
MUST_AGREE = ("python", "torch", "deepspeed", "ray")
MAY_DIFFER = ("timm", "webdataset", "nvidia-dali-cuda120", "nvidia-dali-cuda130", "pillow-simd", "pillow")

SKEW_WARN_S, SKEW_FAIL_S = 1.0, 60.0
SLOW_MIB_PER_S = 10.0  # a 100 Mbit/s network
SLOW_SHARE = 0.25  # of the median of all pairs
FREE_MEMORY_BYTES = 2 * GIB
NAMED = 4  # nodes, files or pairs that a line names


def judge(found: Survey, folder: Path) -> list[Finding]:
    """All findings, in order."""
    return [
        *judge_nodes(found.nodes, found.lost, found.troubles),
        *judge_versions({name: facts.versions for name, facts in found.facts.items()}),
        *judge_code(found.facts),
        *judge_checks(found.checks),
        *judge_gpus(found.nodes, found.facts),
        *judge_memory({name: facts.free_memory_bytes for name, facts in found.facts.items()}),
        *judge_network(found.nodes, found.facts),
        *judge_clocks(found.clocks),
        *judge_folder(folder, found.folders),
        *judge_transfers(found.transfers),
        *judge_ports(found.pairs),
        *judge_pairs(found.pairs, found.nodes, found.facts),
        *judge_rounds(found.rounds_tried, found.rounds_possible),
    ]


def judge_nodes(nodes: Sequence[Node], lost: Mapping[str, str], troubles: Sequence[Trouble]) -> Iterator[Finding]:
    """Who is there, who is gone, and who did not answer what."""
    yield ok("nodes", f"{len(nodes)}: {_some([f'{node.name} at {node.address}' for node in nodes])}")
    for name, reason in lost.items():
        yield warn(f"node {name}", f"was lost: {reason or 'Ray does not say why'}",
                   "start Ray there again, or leave it out")  # fmt: skip
    for trouble in troubles:
        found = f"{trouble.question}: {trouble.text}"
        if "No module named" in trouble.text:
            remedy = (
                "nodes import the code by the path that it has here: put the same checkout there, at "
                f"{Path(__file__).parents[1]} (a shared file system), and the same environment"
            )
        elif trouble.gone:
            remedy = (
                "nothing else was asked of it. See that the machine is up and can be reached (ping, its network), and "
                "Ray on it (ray status; raylet.out in /tmp/ray/session_latest/logs); ray stop and ray start there; or "
                "give it longer with --timeout"
            )
        else:
            remedy = f"look at it on {trouble.node}: fathom doctor there; or give it longer with --timeout"
        yield fail(f"node {trouble.node}", found, remedy)


def judge_versions(versions: Mapping[str, Mapping[str, str | None]]) -> Iterator[Finding]:
    """Equal versions on all nodes. A build (`+cu130`) may differ: a head without a GPU has another."""
    equal = []
    for name in (*MUST_AGREE, *MAY_DIFFER):
        by_version = _invert({node: found.get(name) or "not installed" for node, found in versions.items()})
        if len(by_version) == 1:
            equal += [f"{name} {version}" for version in by_version if version != "not installed"]
        elif by_version:
            public = {version.partition("+")[0] for version in by_version}
            level = fail if name in MUST_AGREE and len(public) > 1 else warn
            remedy = f"install the same on all nodes: make install, or pip install -c constraints.txt {name}"
            if name == "python":
                remedy = "use the same interpreter on all nodes"
            yield level(f"{name} differs", _by_node(by_version), remedy)
    if equal:
        yield ok("versions", f"{', '.join(equal)} ({_everyone(len(versions))})")


def judge_code(facts: Mapping[str, NodeFacts]) -> Iterator[Finding]:
    """The same code on all nodes; most nodes are right."""
    by_code = _invert({node: tuple(sorted(found.code.items())) for node, found in facts.items()})
    if not by_code:
        return
    usual = max(by_code, key=lambda code: len(by_code[code]))
    roots = " or ".join(sorted({found.root for found in facts.values()}))
    if len(by_code) == 1:
        yield ok("code", f"{len(usual)} files equal, in {roots} ({_everyone(len(facts))})")
    for code, nodes in by_code.items():
        if code != usual:
            differing = sorted({file for file, _ in set(code) ^ set(usual)})
            yield fail(
                f"code on {_some(nodes)}",
                f"{len(differing)} of {len(usual)} files differ from {by_code[usual][0]}: {_some(differing)}",
                f"bring the checkout {facts[nodes[0]].root} to the same commit there (git status, git pull)",
            )


def judge_checks(checks: Mapping[str, Sequence[Finding]]) -> Iterator[Finding]:
    """The nodes' own findings, equal ones once; those that are well, one a subject."""
    bad: dict[Finding, list[str]] = {}
    well: dict[str, dict[str, list[str]]] = {}
    for node, findings in checks.items():
        for finding in findings:
            if finding.level == "ok":
                well.setdefault(finding.subject, {}).setdefault(finding.found, []).append(node)
            else:
                bad.setdefault(finding, []).append(node)
    for subject, by_text in well.items():
        text, names = next(iter(by_text.items()))
        if len(by_text) == 1 and len(names) == len(checks):
            yield ok(subject, f"{text} ({_everyone(len(names))})")
        else:
            yield ok(subject, _by_node(by_text))
    for finding, nodes in bad.items():
        yield Finding(
            level=finding.level, subject=f"{finding.subject} on {_some(nodes)}", found=finding.found,
            remedy=finding.remedy,
        )  # fmt: skip


def judge_gpus(nodes: Sequence[Node], facts: Mapping[str, NodeFacts]) -> Iterator[Finding]:
    """The driver, and whether Ray gives out the GPUs that there are."""
    for node in nodes:
        found = facts.get(node.name)
        if found is None:
            continue
        if found.gpu_problem:
            remedy = "install or restart NVIDIA's driver there (nvidia-smi must list its GPUs), then restart Ray"
            yield fail(f"nvidia-smi on {node.name}", found.gpu_problem, remedy)
        elif node.gpus != len(found.gpus):
            yield warn(
                f"GPUs on {node.name}",
                f"Ray gives out {node.gpus}, nvidia-smi lists {len(found.gpus)}",
                f"ray stop there, and ray start with --num-gpus {len(found.gpus)}"
                + ("" if found.gpus else "; or, in a container, let it have the driver's tools (nvidia-smi)"),
            )
    drivers = _invert({name: found.gpus[0].driver for name, found in facts.items() if found.gpus})
    if len(drivers) > 1:
        yield warn("NVIDIA driver differs", _by_node(drivers), "install the same driver on all nodes")
    elif drivers:
        count = sum(len(found.gpus) for found in facts.values())
        yield ok("NVIDIA driver", f"{next(iter(drivers))}, {count} GPUs on {sum(map(len, drivers.values()))} nodes")


def judge_memory(free_bytes: Mapping[str, int]) -> Iterator[Finding]:
    """Main memory that can be had now."""
    yield from _range("free memory", {name: free / GIB for name, free in free_bytes.items()}, "GiB")
    for name, free in free_bytes.items():
        if free < FREE_MEMORY_BYTES:
            remedy = "a rank takes 1 to 2 GiB and more: end what else runs there, or raise the container's limit"
            yield warn(f"memory on {name}", f"{free / GIB:.1f} GiB free", remedy)


def judge_network(nodes: Sequence[Node], facts: Mapping[str, NodeFacts]) -> Iterator[Finding]:
    """The interface that gloo takes on each node: not loopback where there are several machines."""
    several = len({node.address for node in nodes}) > 1
    taken: dict[str, str] = {}
    for node in nodes:
        found = facts.get(node.name)
        if found is None:
            continue
        network = found.network
        loopback = network.address.startswith("127.") or network.address == "::1"
        if network.problem and network.wanted:
            yield fail(f"network on {node.name}", network.problem, remedy_interface(node, found))
        elif several and loopback:
            reason = network.problem or f"{network.wanted or network.hostname} is {network.address}"
            yield fail(f"network on {node.name}", f"gloo takes loopback: {reason}", remedy_interface(node, found))
        else:
            taken[node.name] = f"{network.address} ({network.interface})"
    if taken:
        yield ok("gloo's interface", _some([f"{name} {where}" for name, where in taken.items()]))


def remedy_interface(node: Node, facts: NodeFacts) -> str:
    """How to give gloo the interface by which Ray reaches the node."""
    named = [name for name, addresses in facts.network.interfaces.items() if node.address in addresses]
    interface = named[0] if named else "the interface that the other nodes reach"
    return f"on {node.name}: ray stop, export GLOO_SOCKET_IFNAME={interface}, ray start (NCCL: NCCL_SOCKET_IFNAME)"


def judge_clocks(clocks: Mapping[str, tuple[float, float]]) -> Iterator[Finding]:
    """Clocks against this machine's; what may be the round trip's doing does not count."""
    off = {}
    for name, (ahead_s, error_s) in clocks.items():
        at_least = abs(ahead_s) - error_s
        if at_least <= SKEW_WARN_S:
            continue
        off[name] = at_least
        level = fail if at_least > SKEW_FAIL_S else warn
        found = f"{abs(ahead_s):.1f} s {'ahead' if ahead_s > 0 else 'behind'} (+-{error_s:.1g} s)"
        yield level(f"clock on {name}", found, "set it by the network: timedatectl set-ntp true, or chronyc makestep")
    if clocks and not off:
        most = max(abs(ahead_s) + error_s for ahead_s, error_s in clocks.values())
        yield ok("clocks", f"at most {most:.2g} s from this machine's ({_everyone(len(clocks))})")


def judge_folder(folder: Path, folders: Mapping[str, FolderFacts]) -> Iterator[Finding]:
    """Is it the same folder everywhere, and how fast is it."""
    problems = _invert({name: facts.problem for name, facts in folders.items() if facts.problem})
    for problem, names in problems.items():
        yield fail(
            f"folder on {_some(names)}",
            f"{folder}: {problem}",
            "keep runs where all nodes see them by the same path and may write (NFS, Lustre); --folder tries another",
        )
    good = {name: facts for name, facts in folders.items() if not facts.problem}
    yield from _range("folder, written", {name: facts.write_mib_per_s for name, facts in good.items()}, "MiB/s")
    yield from _range("folder, read", {name: facts.read_mib_per_s for name, facts in good.items()}, "MiB/s")
    for name, facts in good.items():
        rate = min(facts.write_mib_per_s, facts.read_mib_per_s)
        if rate < SLOW_MIB_PER_S:
            remedy = "a checkpoint takes long at that rate: a faster disk or network, or fewer checkpoints"
            yield warn(f"folder on {name}", f"{folder}: {rate:.1f} MiB/s", remedy)
    free = min((facts.free_bytes for facts in good.values()), default=None)
    if free is not None and free < 10 * GIB:
        level = fail if free < GIB else warn
        yield level("folder", f"{folder}: {free / GIB:.1f} GiB free", "free some, or keep runs in another folder")


def judge_transfers(transfers: Sequence[Transfer]) -> Iterator[Finding]:
    """Ray's object store, from node to node."""
    good = {transfer.target: transfer.mib_per_s for transfer in transfers if not transfer.problem}
    yield from _range("object store", good, "MiB/s")
    for transfer in transfers:
        if transfer.problem:
            yield fail(
                f"object store {transfer.source} -> {transfer.target}",
                transfer.problem,
                "let the nodes reach each other's object manager: open the ports that ray start was given "
                "(--object-manager-port), or all above 1023; see raylet.out on both",
            )


def judge_ports(pairs: Sequence[Pair]) -> Iterator[Finding]:
    """TCP ports that one node opens and another cannot reach: one line for a node that none can."""
    remedy = (
        "gloo, NCCL and torch choose their ports themselves: let the nodes reach each other on all TCP ports above "
        "1023 (firewall, security group, network policy)"
    )
    yield from _culprits("port", {(pair.left, pair.right): "; ".join(pair.ports) for pair in pairs}, lambda _: remedy)
    open_pairs = sum(not pair.ports for pair in pairs)
    if open_pairs:
        yield ok("ports", f"TCP both ways between {_pairs(open_pairs)}")


def judge_pairs(pairs: Sequence[Pair], nodes: Sequence[Node], facts: Mapping[str, NodeFacts]) -> Iterator[Finding]:
    """All-reduces of two nodes each: those that failed, and those that were slow."""
    by_name = {node.name: node for node in nodes}

    def remedy(backend: str) -> Callable[[Sequence[str]], str]:
        def advise(names: Sequence[str]) -> str:
            ways = [remedy_interface(by_name[name], facts[name]) for name in names if name in by_name and name in facts]
            more = (
                ""
                if backend == "gloo"
                else "; NCCL_DEBUG=INFO there says what NCCL tried (NCCL_IB_DISABLE=1: no InfiniBand)"
            )
            return f"{'; '.join(ways) or 'export GLOO_SOCKET_IFNAME before ray start'}{more}; a firewall may do it too"

        return advise

    for backend in ("gloo", "nccl"):
        tried = [pair for pair in pairs if backend in pair.mib_per_s or backend in pair.failures]
        failures = {(pair.left, pair.right): pair.failures.get(backend, "") for pair in tried}
        yield from _culprits(backend, failures, remedy(backend))
        rates = {f"{pair.left} - {pair.right}": pair.mib_per_s[backend] for pair in tried if backend in pair.mib_per_s}
        if rates:
            lowest, highest = min(rates.values()), max(rates.values())
            yield ok(backend, f"all-reduce of {_pairs(len(rates))}, {_between(lowest, highest)} MiB/s")
        floor = max(SLOW_MIB_PER_S, SLOW_SHARE * statistics.median(rates.values())) if rates else 0.0
        for name, rate in rates.items():
            if rate < floor:
                found = f"{rate:.0f} MiB/s; the median of all pairs is {statistics.median(rates.values()):.0f}"
                yield warn(
                    f"{backend} {name}", found, "look at the cable, switch and interface between the two (iperf3)"
                )


def judge_rounds(tried: int, possible: int) -> Iterator[Finding]:
    """What was left out."""
    if tried < possible:
        found = f"each node was tried with {tried} of {possible} others"
        yield warn("pairs", found, "--every-pair tries all; it takes some seconds for each of the others")


def _culprits(
    what: str, failures: Mapping[tuple[str, str], str], remedy: Callable[[Sequence[str]], str]
) -> Iterator[Finding]:
    """Failures of pairs (empty: none). A node that failed with all of several others is named once, alone."""
    partners: dict[str, list[str]] = {}
    for pair, text in failures.items():
        for name in pair:
            partners.setdefault(name, []).append(text)
    guilty = [name for name, texts in partners.items() if len(texts) > 1 and all(texts)]
    if len(guilty) > len(partners) // 2:  # then it is not theirs
        guilty = []
    for name in guilty:
        found = f"failed with all of {len(partners[name])} other nodes: {partners[name][0]}"
        yield fail(f"{what} {name}", found, remedy([name]))
    for pair, text in failures.items():
        if text and not set(pair) & set(guilty):
            yield fail(f"{what} {pair[0]} - {pair[1]}", text, remedy(pair))


def _invert(values: Mapping[str, Any]) -> dict[Any, list[str]]:
    found: dict[Any, list[str]] = {}
    for name, value in values.items():
        found.setdefault(value, []).append(name)
    return found


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:NAMED]) + (f" and {len(listed) - NAMED} more" if len(listed) > NAMED else "")


def _by_node(by_value: Mapping[str, Sequence[str]]) -> str:
    return "; ".join(f"{value} ({_some(names)})" for value, names in list(by_value.items())[:NAMED])


def _everyone(count: int) -> str:
    return f"all {count} nodes" if count > 1 else "1 node"


def _pairs(count: int) -> str:
    return f"{count} pairs of nodes" if count > 1 else "1 pair of nodes"


def _between(lowest: float, highest: float) -> str:
    low, high = (f"{value:.0f}" if value >= 100 else f"{value:.3g}" for value in (lowest, highest))
    return low if low == high else f"{low} to {high}"


def _range(subject: str, values: Mapping[str, float], unit: str) -> Iterator[Finding]:
    if values:
        span = _between(min(values.values()), max(values.values()))
        yield ok(subject, f"{span} {unit} ({_everyone(len(values))})")
