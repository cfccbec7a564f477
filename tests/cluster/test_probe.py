"""What nodes are asked, in this process; and the asking, on one embedded Ray session."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster import crew, probe, station
from cluster.crew import CallFailed, Crew, Trouble, list_nodes, require_member, short_names
from cluster.probe import choose_interface, one_line, try_folder
from cluster.runtime import ClusterAddressError, ray_session
from cluster.station import Listener, Meeting, reach
from cluster.survey import Survey, rounds, survey

pytestmark = pytest.mark.timeout(900)
PATIENCE_S = 200.0  # a worker starts in a second on a quiet machine


@pytest.fixture(scope="module")
def session() -> Iterator[None]:
    with ray_session(cpus=2):
        yield


@pytest.fixture
def store() -> Any:
    import torch.distributed as dist

    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


@pytest.fixture
def listener() -> Iterator[Listener]:
    made = Listener("127.0.0.1")
    yield made
    made.close()


# ---------------------------------------------------------------------------------------------------- facts of a node


def test_versions_of_what_is_and_is_not_installed() -> None:
    found = probe.versions(["ray", "no-such-distribution"])
    assert found["python"] and found["ray"]
    assert found["no-such-distribution"] is None


def test_every_file_of_a_room_has_a_digest_of_its_text(tmp_path: Path) -> None:
    (tmp_path / "room" / "deep").mkdir(parents=True)
    for name, text in (("room/a.py", "a = 1\n"), ("room/deep/b.py", "a = 1\n"), ("room/c.txt", ""), ("d.py", "")):
        (tmp_path / name).write_text(text)
    found = probe.code_digests(["room", "no_such_room"], tmp_path)
    assert found.keys() == {"room/a.py", "room/deep/b.py"}
    assert found["room/a.py"] == found["room/deep/b.py"]
    (tmp_path / "room/a.py").write_text("a = 2\n")
    assert probe.code_digests(["room"], tmp_path)["room/a.py"] != found["room/a.py"]
    assert "cluster/probe.py" in probe.code_digests(["cluster"])


def smi(folder: Path, script: str) -> None:
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)


def test_gpus_are_those_that_nvidia_smi_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/usr/bin{os.pathsep}/bin")
    smi(tmp_path, "echo 'GPU-1, NVIDIA H200, 570.1, 143771, 143000'; echo 'GPU-2, NVIDIA H200, 570.1, 143771, 12'")
    gpus, problem = probe.list_gpus()
    assert problem == ""
    assert [(gpu.uuid, gpu.driver, gpu.free_mib) for gpu in gpus] == [
        ("GPU-1", "570.1", 143000),
        ("GPU-2", "570.1", 12),
    ]
    smi(tmp_path, "echo 'NVIDIA-SMI has failed: no driver'; exit 9")
    assert probe.list_gpus() == ([], "NVIDIA-SMI has failed: no driver")
    smi(tmp_path, "echo hello")
    assert "not understood: hello" in probe.list_gpus()[1]
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    assert probe.list_gpus() == ([], "")


INTERFACES = {"lo": ("127.0.0.1", "::1"), "eth0": ("10.0.0.5",), "ib0": ("10.1.0.5",), "down0": ()}


def test_gloo_takes_the_interface_that_is_named() -> None:
    assert choose_interface("h", "ib0", INTERFACES).address == "10.1.0.5"
    assert choose_interface("h", "eth0,ib0", INTERFACES).interface == "eth0"
    for wanted in ("eth9", "down0", "eth0,eth9"):
        found = choose_interface("h", wanted, INTERFACES)
        assert f"GLOO_SOCKET_IFNAME={wanted}, but no" in found.problem


def test_without_a_name_gloo_takes_the_host_s_own_address() -> None:
    here = choose_interface("localhost", "", {"lo": ("127.0.0.1", "::1")})
    assert (here.interface, here.problem) == ("lo", "")
    unknown = choose_interface("no-such-host.invalid", "", INTERFACES)
    assert unknown.address == "127.0.0.1" and "does not resolve" in unknown.problem
    elsewhere = choose_interface("192.0.2.1", "", INTERFACES)  # a documentation address: nobody's
    assert elsewhere.address == "127.0.0.1" and "resolves to no address of this node" in elsewhere.problem


def test_a_folder_is_shared_when_the_token_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "_VISIBLE_S", 0.2)
    mark = tmp_path / "runs" / ".mark"
    assert try_folder(str(mark), "token", "n", 1).problem == "there is no such folder"
    mark.parent.mkdir()
    assert "not the same" in try_folder(str(mark), "token", "n", 1).problem
    mark.mkdir()
    (mark / "token").write_text("token")
    found = try_folder(str(mark), "token", "n", 1)
    assert found.problem == "" and found.free_bytes > 0
    assert found.write_mib_per_s > 0 and found.read_mib_per_s > 0
    assert (mark / "n").stat().st_size == 1 << 20
    assert "not what is read" in try_folder(str(mark), "another", "n", 1).problem
    (mark / "d").mkdir()
    assert "directory" in try_folder(str(mark), "token", "d", 1).problem


def test_one_line_is_one_line() -> None:
    assert one_line("[enforce fail at /a/b.cc:84] x\n y") == "x y"
    assert one_line(ValueError()) == "ValueError"
    assert one_line("a timeout Exception raised from f at x.cpp:1 frame 0") == "a timeout"


# -------------------------------------------------------------------------------------------------- between two nodes


def test_a_port_is_reached_when_its_own_word_comes_back(listener: Listener) -> None:
    assert reach("127.0.0.1", listener.port, listener.word) == ""
    assert reach("127.0.0.1", listener.port, "another") == "something else answers there"
    listener.close()
    assert "refused" in reach("127.0.0.1", listener.port, listener.word)


def test_two_meet_and_sum_up(store: Any) -> None:
    took: dict[int, float] = {}

    def come(rank: int) -> None:
        took[rank] = station.meet(meeting(store, rank, "both", 60.0), store if rank == 0 else None)

    threads = [threading.Thread(target=come, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert took.keys() == {0, 1} and min(took.values()) > 0


def meeting(store: Any, rank: int, key: str, timeout_s: float) -> Meeting:
    return Meeting(backend="gloo", rank=rank, host="127.0.0.1", port=store.port, key=key, mib=1, timeout_s=timeout_s)


def test_one_who_waits_alone_gives_up_in_time(store: Any) -> None:
    begun = time.monotonic()
    with pytest.raises(RuntimeError, match="timeout"):
        station.meet(meeting(store, 0, "alone", 1.0), store)
    assert time.monotonic() - begun < 30


def test_an_interface_that_is_not_there_is_named(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth9")
    with pytest.raises(RuntimeError) as caught:
        station.meet(meeting(store, 0, "wrong", 5.0), store)
    assert "Unable to find address for: eth9" in one_line(caught.value)


@pytest.mark.parametrize("count", [*range(9), 17])
def test_in_a_tournament_everybody_meets_everybody_once_and_one_at_a_time(count: int) -> None:
    played = rounds(count)
    pairs = [pair for one in played for pair in one]
    assert sorted(pairs) == [(a, b) for a in range(count) for b in range(a + 1, count)]
    for one in played:
        members = [member for pair in one for member in pair]
        assert len(members) == len(set(members)) >= count - 1
    assert len(played) == (0 if count < 2 else count - 1 + count % 2)


def test_names_are_as_short_as_tells_nodes_apart() -> None:
    def node(host: str, address: str, port: int, number: str) -> dict[str, Any]:
        return {
            "NodeManagerHostname": host, "NodeManagerAddress": address, "NodeManagerPort": port, "NodeID": number * 9,
        }  # fmt: skip

    first = node("a", "10.0.0.1", 1, "1")
    assert short_names([first, node("b", "10.0.0.2", 1, "2")]) == ["a", "b"]
    assert short_names([first, node("a", "10.0.0.2", 1, "2")]) == ["a (10.0.0.1)", "a (10.0.0.2)"]
    assert short_names([first, node("a", "10.0.0.1", 2, "2")]) == ["a (10.0.0.1:1)", "a (10.0.0.1:2)"]
    assert short_names([first, node("a", "10.0.0.1", 1, "2")]) == ["a (11111111)", "a (22222222)"]


# ------------------------------------------------------------------------------------------------------------- on Ray


def fine() -> str:
    return "checked"


def broken() -> None:
    raise ValueError("libnothing.so:\ncannot open")


def hang() -> None:
    time.sleep(600)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_survey_of_one_node(session: None, tmp_path: Path) -> None:
    stages: list[str] = []
    found = survey(
        folder=str(tmp_path), distributions=["ray"], rooms=["cluster"], check=fine, timeout_s=PATIENCE_S,
        on_stage=stages.append,
    )  # fmt: skip
    assert found.troubles == [] and found.lost == {}
    (name,) = (node.name for node in found.nodes)
    assert found.checks == {name: "checked"}
    assert found.facts[name].versions["ray"]
    assert found.facts[name].code == probe.code_digests(["cluster"])
    assert found.facts[name].free_memory_bytes > 0
    assert found.folders[name].problem == ""
    ahead_s, error_s = found.clocks[name]
    assert abs(ahead_s) <= error_s + 0.1
    assert [(made.source, made.target, made.problem) for made in found.transfers] == [(name, name, "")]
    assert (found.pairs, found.rounds_possible) == ([], 0)
    assert list(tmp_path.iterdir()) == []
    assert stages


def test_a_check_that_raises_and_a_folder_that_is_gone_are_facts(session: None, tmp_path: Path) -> None:
    found: Survey = survey(
        folder=str(tmp_path / "nowhere"), distributions=[], rooms=[], check=broken, timeout_s=PATIENCE_S
    )
    (name,) = (node.name for node in found.nodes)
    assert found.troubles == [
        Trouble(node=name, question="checks of the installation", text="ValueError: libnothing.so: cannot open")
    ]
    assert "No such file" in found.folders[name].problem
    assert name in found.clocks


def test_what_hangs_or_dies_is_told_and_replaced(session: None) -> None:
    nodes, _ = list_nodes()
    (name,) = (node.name for node in nodes)
    troubles: list[Trouble] = []
    with Crew(nodes, PATIENCE_S, troubles) as made:
        assert troubles == []
        begun = time.monotonic()
        assert made.ask("a nap", {name: made.stations[name].call.remote(hang)}, patience_s=1.0) == {}
        assert time.monotonic() - begun < 60
        assert made.call("its end", die) == {}
        assert [(trouble.question, trouble.gone) for trouble in troubles] == [("a nap", False), ("its end", False)]
        assert troubles[0].text == "no answer within 1 s"
        assert "\n" not in troubles[1].text
        assert made.call("well again", fine) == {name: "checked"}
        answers = made.ask("an error", {name: made.stations[name].call.remote(broken)})
        assert answers == {name: CallFailed("ValueError: libnothing.so: cannot open")}
        assert len(troubles) == 2


def test_a_node_on_which_nothing_starts_is_given_up(session: None) -> None:
    nodes, _ = list_nodes()
    ghost = crew.Node(name="ghost", id="0" * 56, address="192.0.2.1")
    troubles: list[Trouble] = []
    with Crew([*nodes, ghost], PATIENCE_S, troubles) as made:
        assert list(made.stations) == [nodes[0].name]
    assert [(trouble.node, trouble.gone) for trouble in troubles] == [("ghost", True)]


def test_a_port_that_does_not_answer_as_ray_is_told_in_time() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        begun = time.monotonic()
        with pytest.raises(ClusterAddressError, match="does not answer as Ray's head node within 2 s"):
            require_member(f"127.0.0.1:{silent.getsockname()[1]}", patience_s=2.0)
        assert time.monotonic() - begun < 30
    require_member("127.0.0.1:1", patience_s=2.0)  # nothing listens: joining tells it
