"""`fathom doctor --cluster` on two machines: all well, and then one fault after the other, each named with its node."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.bed import Bed, Machine, bed, wait_for
from tests.end_to_end.cli import REPOSITORY, Done

pytestmark = pytest.mark.timeout(900)

PATIENCE_S = 300.0
ROOMS = ("launcher", "trainer", "model", "dataio", "kernels", "cluster")
HIGH_PORTS = "61000-65000"
ALIVE = """
import json, sys
from ray._raylet import GcsClient
nodes = GcsClient(address=sys.argv[1]).get_all_node_info(timeout=30).values()
print(json.dumps(sorted(node.node_manager_address for node in nodes if node.state == 0)))
"""


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bed]:
    with bed(tmp_path_factory.mktemp("bed") / "bed", cpus=[1, 1]) as made:
        yield made


def doctor(machine: Machine, *words: str, cwd: Path, code: Path = REPOSITORY, timeout_s: float = PATIENCE_S) -> Done:
    """Run the verb on a machine; it never shows a traceback."""
    command = (sys.executable, "-m", "launcher.cli", "doctor", "--cluster", *words)
    done = machine.run(*command, cwd=cwd, env={"PYTHONPATH": str(code)}, timeout_s=timeout_s)
    assert "Traceback" not in done.stdout + done.stderr, done
    return Done(done.returncode, done.stdout, done.stderr)


def findings(machines: Bed, *words: str, cwd: Path, status: int, code: Path = REPOSITORY) -> dict[str, dict[str, str]]:
    """What the verb finds from the head, by subject."""
    done = doctor(machines.head, "--json", "--address", machines.address, *words, cwd=cwd, code=code)
    assert done.status == status and done.err == "", done
    listed = json.loads(done.out)
    assert all(line["remedy"] for line in listed if line["level"] != "ok")
    return {line["subject"]: line for line in listed}


def failed(found: dict[str, dict[str, str]]) -> set[str]:
    return {subject for subject, line in found.items() if line["level"] == "fail"}


def alive(machines: Bed) -> list[str]:
    done = machines.head.run(sys.executable, "-c", ALIVE, machines.address, cwd=machines.folder)
    return list(json.loads(done.stdout)) if done.returncode == 0 else []


def inside(machine: Machine, command: str, cwd: Path) -> str:
    done = machine.run("sh", "-c", command, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


@contextmanager
def copied(machines: Bed, *names: str) -> Iterator[list[Path]]:
    """Checkouts that only these machines have, in their temporary folders; where they lie as seen from here."""
    targets = [machines.folder / f"ray-{name}" / "checkout" for name in names]
    try:
        for target in targets:
            for room in ROOMS:
                shutil.copytree(REPOSITORY / room, target / room, ignore=shutil.ignore_patterns("__pycache__"))
        yield targets
    finally:
        for target in targets:
            shutil.rmtree(target, ignore_errors=True)


def test_two_machines_that_are_well(tmp_path: Path, machines: Bed) -> None:
    (tmp_path / "runs").mkdir()
    found = findings(machines, cwd=tmp_path, status=0)
    assert failed(found) == set()
    assert found["nodes"]["found"] == "2: head at 10.77.0.1, node1 at 10.77.0.2"
    assert found["gloo's interface"]["found"] == "head 10.77.0.1 (eth0), node1 10.77.0.2 (eth0)"
    assert found["gloo"]["found"].startswith("all-reduce of 1 pair of nodes")
    for subject in ("versions", "code", "DALI", "ninja", "clocks", "folder, written", "folder, read", "object store"):
        assert "all 2 nodes" in found[subject]["found"], found[subject]
    assert "TCP both ways" in found["ports"]["found"]
    assert list((tmp_path / "runs").iterdir()) == []


@contextmanager
def firewall(machines: Bed, cwd: Path) -> Iterator[None]:
    """Nothing goes between ports that programs choose themselves from now on; Ray has its own already."""
    kernel = "/proc/sys/net/ipv4/ip_local_port_range"
    rule = f"ip rule {{}} ipproto tcp sport {HIGH_PORTS} dport {HIGH_PORTS} blackhole"
    pair = (machines.head, machines.machines["node1"])
    before = inside(pair[0], f"cat {kernel}", cwd).strip()
    try:
        for machine in pair:
            inside(machine, f"echo {HIGH_PORTS.replace('-', ' ')} > {kernel}", cwd)
        inside(pair[1], rule.format("add"), cwd)
        yield
    finally:
        inside(pair[1], f"{rule.format('del')}; true", cwd)
        for machine in pair:
            inside(machine, f"echo {before} > {kernel}", cwd)


def test_shut_ports_other_code_and_a_folder_of_its_own(tmp_path: Path, machines: Bed) -> None:
    with copied(machines, "head", "node1") as (_, other), firewall(machines, tmp_path):
        add_a_line(other / "trainer" / "loop.py")
        own = machines.temporary  # every machine has another folder there
        found = findings(machines, "--folder", str(own), cwd=tmp_path, code=own / "checkout", status=1)
    assert failed(found) == {"code on node1", "folder on node1", "port head - node1"}
    assert found["code on node1"]["found"].endswith("files differ from head: trainer/loop.py")
    assert "not the same one" in found["folder on node1"]["found"]
    assert "head -> node1: timed out" in found["port head - node1"]["found"]
    assert "firewall" in found["port head - node1"]["remedy"]
    assert "gloo" not in found


def test_a_node_whose_interface_is_wrong_is_named_once(tmp_path: Path, machines: Bed) -> None:
    astray = machines.add("astray")
    astray.env["GLOO_SOCKET_IFNAME"] = "eth9"
    try:
        machines.start_ray("astray", 1)
        found = findings(machines, cwd=tmp_path, status=1)
        inside(astray, "ray stop", tmp_path)
    finally:
        machines.machines.pop("astray").kill()
    wait_for(lambda: alive(machines) == ["10.77.0.1", "10.77.0.2"], "end of the third node", PATIENCE_S)
    assert failed(found) == {"network on astray", "gloo astray"}, found
    assert "GLOO_SOCKET_IFNAME=eth9, but no eth9" in found["network on astray"]["found"]
    assert "failed with all of 2 other nodes" in found["gloo astray"]["found"]
    for subject in failed(found):
        assert "on astray: ray stop, export GLOO_SOCKET_IFNAME=eth0, ray start" in found[subject]["remedy"]
    assert found["gloo"]["found"].startswith("all-reduce of 1 pair of nodes")
    assert found["ports"]["found"] == "TCP both ways between 3 pairs of nodes"


def test_a_node_that_does_not_answer_is_named_in_time(tmp_path: Path, machines: Bed) -> None:
    node = machines.machines["node1"]
    raylets = [process for process in node.processes("raylet") if process.name() == "raylet"]
    assert len(raylets) == 1
    begun = time.monotonic()
    with stopped(raylets[0]):
        found = findings(machines, "--timeout", "15", cwd=tmp_path, status=1)
        took = time.monotonic() - begun
    if "10.77.0.2" not in alive(machines):  # so slow a machine that Ray has given the node up
        machines.replace("node1")
        wait_for(lambda: alive(machines) == ["10.77.0.1", "10.77.0.2"], "node", PATIENCE_S)
    assert "node node1" in failed(found)
    assert "no answer within 15 s" in found["node node1"]["found"]
    assert "ray start there" in found["node node1"]["remedy"]
    assert took < 12 * 15  # every question once, at worst
    assert "1 node" in found["clocks"]["found"]


@contextmanager
def stopped(process: psutil.Process) -> Iterator[None]:
    process.suspend()
    try:
        yield
    finally:
        process.resume()


def test_a_node_without_the_checkout_is_told_so(tmp_path: Path, machines: Bed) -> None:
    with copied(machines, "head") as (here,):
        add_a_line(here / "trainer" / "loop.py")
        found = findings(machines, "--timeout", "120", cwd=tmp_path, code=machines.temporary / "checkout", status=1)
    if "code on node1" in found:  # this environment has an installed fathom, which the node falls back on
        assert failed(found) == {"code on node1"}
        assert "trainer/loop.py" in found["code on node1"]["found"]
    else:
        assert failed(found) == {"node node1"}
        assert "No module named 'cluster" in found["node node1"]["found"]
        assert str(machines.temporary / "checkout") in found["node node1"]["remedy"]


def add_a_line(path: Path) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write("# another line\n")


def test_a_wrong_address_is_one_line(tmp_path: Path, machines: Bed) -> None:
    for machine, words, expected in (
        (machines.head, (), "which one"),
        (machines.head, ("--address", "http://10.77.0.1:8265"), "expected HOST:PORT"),
        (machines.head, ("--address", "10.77.0.1:1"), "no Ray cluster answers at 10.77.0.1:1"),
        (machines.outside, ("--address", machines.address), "this machine is no node of that cluster"),
        (machines.head, ("--address", machines.address, "--folder", "nowhere"), "--folder nowhere"),
    ):
        done = doctor(machine, *words, cwd=tmp_path)
        assert (done.status, len(done.errors), done.out) == (2, 1, ""), done
        assert expected in done.errors[0], done.err
    with stopped(machines.head.processes("gcs_server")[0]):
        begun = time.monotonic()
        done = doctor(machines.head, "--address", machines.address, cwd=tmp_path, timeout_s=120.0)
    assert done.status == 2 and "does not answer as Ray's head node" in done.errors[0], done
    assert time.monotonic() - begun < 100
