"""fathom doctor --cluster: what facts about nodes mean. Every fault has its finding, and every finding a remedy."""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import cluster.crew
import cluster.runtime
import cluster.survey
from cluster.crew import Node, Trouble
from cluster.probe import FolderFacts, Gpu, Network, NodeFacts
from cluster.runtime import ClusterAddressError
from cluster.survey import Pair, Survey, Transfer
from launcher import doctor, doctor_cluster, doctor_survey
from launcher.cli import build_app
from launcher.doctor import GIB, Finding, fail, ok, warn

NAMES = ("a", "b", "c")
NODES = [Node(name=name, id=name * 8, address=f"10.0.0.{number}") for number, name in enumerate(NAMES, start=1)]
VERSIONS = {"python": "3.11.7", "torch": "2.14.1+cu130", "ray": "2.60.0", "timm": "1.0", "pillow-simd": None}
INTERFACES = {"lo": ("127.0.0.1",), "eth0": ("10.0.0.1", "10.0.0.2", "10.0.0.3")}


def network(**other: Any) -> Network:
    values = {
        "hostname": "h", "wanted": "", "interfaces": INTERFACES, "interface": "eth0", "address": "10.0.0.1",
    }  # fmt: skip
    return Network(**(values | other))


def facts(**other: Any) -> NodeFacts:
    values = {
        "root": "/opt/fathom", "versions": VERSIONS, "code": {"trainer/loop.py": "1", "cluster/group.py": "2"},
        "gpus": (), "gpu_problem": "", "free_memory_bytes": 30 * GIB, "network": network(),
    }  # fmt: skip
    return NodeFacts(**(values | other))


def everywhere(**odd: NodeFacts) -> dict[str, NodeFacts]:
    return {name: odd.get(name, facts()) for name in NAMES}


def judged(findings: Iterable[Finding]) -> tuple[list[Finding], list[Finding]]:
    """Those that are well, and the others, each with a remedy."""
    listed = list(findings)
    bad = [finding for finding in listed if finding.level != "ok"]
    assert all(finding.remedy for finding in bad), bad
    return [finding for finding in listed if finding.level == "ok"], bad


def only(findings: Iterable[Finding], level: str) -> Finding:
    """The one finding that is not well."""
    _, bad = judged(findings)
    assert [finding.level for finding in bad] == [level], bad
    return bad[0]


def pairs(**failures: str) -> list[Pair]:
    """Three nodes' pairs, "a-b", ...; `a_b="text"` is one whose all-reduce failed."""
    made = []
    for left, right in (("a", "b"), ("a", "c"), ("b", "c")):
        text = failures.get(f"{left}_{right}")
        made.append(
            Pair(left=left, right=right, failures={"gloo": text})
            if text
            else Pair(left=left, right=right, mib_per_s={"gloo": 400.0})
        )
    return made


def test_a_cluster_without_a_fault_has_none() -> None:
    found = Survey(
        nodes=NODES,
        facts=everywhere(),
        checks={name: [ok("DALI", "2.4")] for name in NAMES},
        clocks=dict.fromkeys(NAMES, (0.001, 0.002)),
        folders={name: FolderFacts(free_bytes=99 * GIB, write_mib_per_s=100, read_mib_per_s=200) for name in NAMES},
        transfers=[Transfer(source="a", target="b", mib_per_s=50)],
        pairs=pairs(),
        rounds_tried=3,
        rounds_possible=3,
    )
    well, bad = judged(doctor_cluster.judge(found, Path("/runs")))
    assert bad == []
    told = {finding.subject: finding.found for finding in well}
    assert told["versions"] == "python 3.11.7, torch 2.14.1+cu130, ray 2.60.0, timm 1.0 (all 3 nodes)"
    assert told["code"] == "2 files equal, in /opt/fathom (all 3 nodes)"
    assert told["DALI"] == "2.4 (all 3 nodes)"
    assert told["ports"] == "TCP both ways between 3 pairs of nodes"
    assert told["gloo"] == "all-reduce of 3 pairs of nodes, 400 MiB/s"
    assert told["clocks"] == "at most 0.003 s from this machine's (all 3 nodes)"


def test_a_node_that_does_not_answer_is_named() -> None:
    gone = Trouble(node="b", question="start of a worker", text="no answer within 60 s", gone=True)
    found = only(doctor_cluster.judge_nodes(NODES, {}, [gone]), "fail")
    assert found.subject == "node b"
    assert found.found == "start of a worker: no answer within 60 s"
    assert "ray start there" in found.remedy
    slow = Trouble(node="b", question="the folder", text="no answer within 60 s")
    assert "--timeout" in only(doctor_cluster.judge_nodes(NODES, {}, [slow]), "fail").remedy


def test_a_node_without_the_checkout_is_told_from_one_that_is_down() -> None:
    bare = Trouble(node="b", question="start", text="ModuleNotFoundError: No module named 'cluster'", gone=True)
    found = only(doctor_cluster.judge_nodes(NODES, {}, [bare]), "fail")
    assert str(Path(doctor_cluster.__file__).parents[1]) in found.remedy


def test_a_lost_node_is_named() -> None:
    found = only(doctor_cluster.judge_nodes(NODES, {"d (10.0.0.4)": "health check failed"}, []), "warn")
    assert found.subject == "node d (10.0.0.4)" and "health check failed" in found.found


@pytest.mark.parametrize(
    ("name", "version", "level"),
    [
        ("python", "3.12.1", "fail"),
        ("torch", "2.13.0+cu130", "fail"),
        ("torch", "2.14.1+cpu", "warn"),  # a head without a GPU
        ("ray", "2.59.0", "fail"),
        ("timm", "0.9", "warn"),
        ("timm", None, "warn"),
        ("torch", None, "fail"),
    ],
)
def test_a_version_that_differs_is_named_with_its_node(name: str, version: str | None, level: str) -> None:
    versions = dict.fromkeys(NAMES, VERSIONS) | {"c": VERSIONS | {name: version}}
    found = only(doctor_cluster.judge_versions(versions), level)
    assert found.subject == f"{name} differs"
    assert f"{version or 'not installed'} (c)" in found.found
    assert f"{VERSIONS[name]} (a, b)" in found.found


def test_code_that_differs_is_named_by_file_and_node() -> None:
    odd = facts(code={"trainer/loop.py": "9", "cluster/group.py": "2", "cluster/extra.py": "3"})
    found = only(doctor_cluster.judge_code(everywhere(b=odd)), "fail")
    assert found.subject == "code on b"
    assert "2 of 2 files differ from a: cluster/extra.py, trainer/loop.py" in found.found


def test_a_node_s_own_findings_come_with_its_name_and_equal_ones_once() -> None:
    bad = fail("ninja", "not found", "pip install ninja")
    checks = {
        "a": [ok("c++", "/usr/bin/c++")],
        "b": [ok("c++", "/usr/bin/c++"), bad],
        "c": [ok("c++", "/opt/c++"), bad],
    }
    well, wrong = judged(doctor_cluster.judge_checks(checks))
    assert [finding.found for finding in well] == ["/usr/bin/c++ (a, b); /opt/c++ (c)"]
    assert wrong == [fail("ninja on b, c", "not found", "pip install ninja")]


def gpu(driver: str = "570.1") -> Gpu:
    return Gpu("GPU-1", "NVIDIA H200", driver, 143771, 143000)


def test_gpus_that_ray_does_not_give_out_are_named() -> None:
    nodes = [Node(name="a", id="1", address="10.0.0.1", gpus=0), Node(name="b", id="2", address="10.0.0.2", gpus=2)]
    with_gpus = {"a": facts(gpus=(gpu(), gpu())), "b": facts(gpus=(gpu(), gpu()))}
    found = only(doctor_cluster.judge_gpus(nodes, with_gpus), "warn")
    assert found.subject == "GPUs on a" and "--num-gpus 2" in found.remedy
    with_gpus = {"a": facts(), "b": facts()}
    found = only(doctor_cluster.judge_gpus(nodes, with_gpus), "warn")
    assert found.subject == "GPUs on b" and "nvidia-smi" in found.remedy


def test_drivers_that_differ_or_fail_are_named() -> None:
    nodes = [Node(name=name, id=name, address=name, gpus=1) for name in ("a", "b")]
    two = {"a": facts(gpus=(gpu(),)), "b": facts(gpus=(gpu("535.2"),))}
    assert only(doctor_cluster.judge_gpus(nodes, two), "warn").found == "570.1 (a); 535.2 (b)"
    two["b"] = facts(gpu_problem="NVIDIA-SMI has failed")
    assert only(doctor_cluster.judge_gpus(nodes, two), "fail").subject == "nvidia-smi on b"


def test_little_memory_is_named() -> None:
    found = only(doctor_cluster.judge_memory({"a": 30 * GIB, "b": GIB}), "warn")
    assert found.subject == "memory on b" and found.found == "1.0 GiB free"


@pytest.mark.parametrize(
    ("odd", "words"),
    [
        (network(wanted="eth9", problem="GLOO_SOCKET_IFNAME=eth9, but no eth9"), "no eth9"),
        (network(wanted="lo", interface="lo", address="127.0.0.1"), "loopback: lo is 127.0.0.1"),
        (network(address="127.0.0.1", interface="lo", problem="the name h does not resolve"), "does not resolve"),
        (network(address="127.0.1.1", interface="lo"), "loopback: h is 127.0.1.1"),
    ],
)
def test_a_wrong_interface_is_named_with_the_right_one(odd: Network, words: str) -> None:
    found = only(doctor_cluster.judge_network(NODES, everywhere(b=facts(network=odd))), "fail")
    assert found.subject == "network on b" and words in found.found
    assert "on b:" in found.remedy and "export GLOO_SOCKET_IFNAME=eth0," in found.remedy


def test_loopback_is_no_fault_on_one_machine() -> None:
    alone = facts(network=network(address="127.0.0.1", interface="lo", problem="the name h does not resolve"))
    assert judged(doctor_cluster.judge_network(NODES[:1], {"a": alone}))[1] == []


@pytest.mark.parametrize(
    ("ahead_s", "error_s", "level"), [(1.5, 0.1, "warn"), (-3.0, 0.1, "warn"), (61.0, 0.5, "fail"), (-3600, 1, "fail")]
)
def test_a_clock_that_is_off_is_named(ahead_s: float, error_s: float, level: str) -> None:
    found = only(doctor_cluster.judge_clocks({"a": (0.0, 0.001), "b": (ahead_s, error_s)}), level)
    assert found.subject == "clock on b"
    assert ("ahead" if ahead_s > 0 else "behind") in found.found


def test_a_slow_answer_is_no_wrong_clock() -> None:
    assert judged(doctor_cluster.judge_clocks({"a": (1.5, 0.6), "b": (-0.9, 0.0)}))[1] == []


def test_a_folder_that_is_not_shared_is_named() -> None:
    good = FolderFacts(free_bytes=99 * GIB, write_mib_per_s=100, read_mib_per_s=200)
    own = FolderFacts(problem="a folder of this name, but not the same one")
    found = only(doctor_cluster.judge_folder(Path("/runs"), {"a": good, "b": own, "c": own}), "fail")
    assert found.subject == "folder on b, c" and found.found.startswith("/runs: a folder of this name")


@pytest.mark.parametrize(
    ("free", "rate", "level", "words"),
    [
        (99 * GIB, 2.0, "warn", "2.0 MiB/s"),
        (5 * GIB, 100.0, "warn", "5.0 GiB free"),
        (0, 100.0, "fail", "0.0 GiB free"),
    ],
)
def test_a_folder_that_is_slow_or_full_is_told(free: int, rate: float, level: str, words: str) -> None:
    odd = FolderFacts(free_bytes=free, write_mib_per_s=rate, read_mib_per_s=200)
    assert words in only(doctor_cluster.judge_folder(Path("/runs"), {"a": odd}), level).found


def test_an_object_that_does_not_arrive_is_named() -> None:
    late = Transfer(source="a", target="b", problem="not here within 55 s")
    found = only(doctor_cluster.judge_transfers([late, Transfer(source="b", target="a", mib_per_s=9)]), "fail")
    assert found.subject == "object store a -> b"


def test_a_shut_port_is_named_with_its_direction() -> None:
    shut = Pair(left="a", right="b", ports=["a -> b: timed out"])
    found = only(doctor_cluster.judge_ports([shut, *pairs()[1:]]), "fail")
    assert found.subject == "port a - b" and found.found == "a -> b: timed out"
    assert "firewall" in found.remedy


def test_a_pair_that_does_not_sum_up_is_named_with_both_interfaces() -> None:
    found = only(doctor_cluster.judge_pairs(pairs(a_b="a: timeout"), NODES, everywhere()), "fail")
    assert found.subject == "gloo a - b" and found.found == "a: timeout"
    assert "on a:" in found.remedy and "on b:" in found.remedy and "GLOO_SOCKET_IFNAME=eth0" in found.remedy


def test_a_node_that_fails_with_every_other_is_named_once() -> None:
    well, bad = judged(doctor_cluster.judge_pairs(pairs(a_c="c: no eth9", b_c="c: no eth9"), NODES, everywhere()))
    assert [finding.subject for finding in bad] == ["gloo c"]
    assert bad[0].found == "failed with all of 2 other nodes: c: no eth9"
    assert "on c:" in bad[0].remedy and "on a:" not in bad[0].remedy
    assert [finding.subject for finding in well] == ["gloo"]


def test_when_nobody_sums_up_with_anybody_no_node_is_blamed() -> None:
    all_bad = pairs(a_b="x", a_c="x", b_c="x")
    _, bad = judged(doctor_cluster.judge_pairs(all_bad, NODES, everywhere()))
    assert [finding.subject for finding in bad] == ["gloo a - b", "gloo a - c", "gloo b - c"]


def test_nccl_is_judged_where_it_was_tried() -> None:
    made = pairs()
    made[0].mib_per_s["nccl"] = 9000.0
    made[1].failures["nccl"] = "c: unhandled system error"
    well, bad = judged(doctor_cluster.judge_pairs(made, NODES, everywhere()))
    assert [finding.subject for finding in bad] == ["nccl a - c"] and "NCCL_DEBUG=INFO" in bad[0].remedy
    assert [finding.subject for finding in well] == ["gloo", "nccl"]


def test_a_pair_much_slower_than_the_others_is_named() -> None:
    made = pairs()
    made[2].mib_per_s["gloo"] = 50.0
    found = only(doctor_cluster.judge_pairs(made, NODES, everywhere()), "warn")
    assert found.subject == "gloo b - c" and "50 MiB/s; the median of all pairs is 400" in found.found


def test_what_was_left_out_is_told() -> None:
    found = only(doctor_cluster.judge_rounds(16, 99), "warn")
    assert "16 of 99 others" in found.found and "--every-pair" in found.remedy
    assert list(doctor_cluster.judge_rounds(3, 3)) == []


# ------------------------------------------------------------------------------------------------------------ the verb


def test_the_address_is_the_one_given_or_that_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert doctor_survey.resolve_address("10.0.0.1:6379") == "10.0.0.1:6379"
    assert doctor_survey.resolve_address("[fd00::1]:6379") == "[fd00::1]:6379"
    with pytest.raises(ClusterAddressError, match="which one"):
        doctor_survey.resolve_address(None)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.2:6379")
    assert doctor_survey.resolve_address(None) == "10.0.0.2:6379"
    for wrong in ("http://10.0.0.1:8265", "ray://10.0.0.1:10001", "head", "local"):
        with pytest.raises(ClusterAddressError, match="expected HOST:PORT"):
            doctor_survey.resolve_address(wrong)


def test_the_folder_is_runs_where_there_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert doctor_survey.resolve_folder(None) == tmp_path
    (tmp_path / "runs").mkdir()
    assert doctor_survey.resolve_folder(None) == tmp_path / "runs"
    assert doctor_survey.resolve_folder(Path("..")) == tmp_path.parent
    for wrong in ("nowhere", "s3://bucket/runs"):
        with pytest.raises(doctor_survey.FolderError, match="--folder"):
            doctor_survey.resolve_folder(Path(wrong))


@pytest.mark.parametrize("trouble", [None, Trouble(node="b", question="start", text="no answer", gone=True)])
def test_the_verb_prints_and_answers(
    trouble: Trouble | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: dict[str, Any] = {}

    def look(**options: Any) -> Survey:
        asked.update(options)
        return Survey(nodes=NODES, troubles=[trouble] if trouble else [])

    monkeypatch.setattr(cluster.crew, "require_member", lambda address: None)
    monkeypatch.setattr(cluster.runtime, "ray_session", lambda address: nullcontext())
    monkeypatch.setattr(cluster.survey, "survey", look)
    for as_json in (False, True):
        status = doctor_survey.cluster_command("10.0.0.1:6379", tmp_path, 5.0, False, as_json)
        assert status == (1 if trouble else 0)
        out = capsys.readouterr().out
        if as_json:
            assert [(line["level"], line["subject"]) for line in json.loads(out)] == [
                ("ok", "nodes"), *([("fail", "node b")] if trouble else []),
            ]  # fmt: skip
        else:
            assert f"1 ok, 0 warn, {1 if trouble else 0} fail" in out
    assert asked["folder"] == str(tmp_path) and asked["timeout_s"] == 5.0
    assert {"trainer", "cluster"} <= set(asked["rooms"]) and "torch" in asked["distributions"]


def test_a_node_checks_itself_with_doctor_s_own_checks() -> None:
    assert {check.__name__ for check in doctor_survey.NODE_CHECKS} >= {
        "check_dali", "check_compiler", "check_kernels_name", "check_shared_memory",
    }  # fmt: skip


def test_json_of_this_machine_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "run_checks", lambda: [ok("x", "1"), warn("y", "2", "do this")])
    done = CliRunner().invoke(build_app(), ["doctor", "--json"])
    assert json.loads(done.output) == [
        {"level": "ok", "subject": "x", "found": "1", "remedy": ""},
        {"level": "warn", "subject": "y", "found": "2", "remedy": "do this"},
    ]


@pytest.mark.parametrize(
    "option", [["--address", "10.0.0.1:6379"], ["--folder", "."], ["--timeout", "60"], ["--every-pair"]]
)
def test_options_of_a_cluster_want_the_cluster(monkeypatch: pytest.MonkeyPatch, option: list[str]) -> None:
    done = CliRunner().invoke(build_app(), ["doctor", *option])
    assert done.exit_code == 2 and "--cluster" in done.output and option[0] in done.output
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(doctor_survey, "cluster_command", lambda *given: asked.append(given))
    assert CliRunner().invoke(build_app(), ["doctor", "--cluster", *option]).exit_code == 0
    assert asked[0][2] == 60.0  # the default, too
