"""The script for plain machines among programs that stand for `ssh` and `ray`."""

from __future__ import annotations

import re
import signal
import stat
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil
import pytest

from tests.cluster.stage import WAIT_S, Stage, options_of, staged


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    with staged(tmp_path / "stage") as made:
        yield made


@pytest.fixture
def hosts(stage: Stage) -> Path:
    """A host file: three machines, the first the head."""
    stage.env |= {"FAKE_HOSTS": str(stage.folder / "hosts"), "FATHOM_START_S": "60", "FATHOM_STOP_S": "10"}
    file = stage.folder / "machines"
    file.write_text("# ours\nme@alpha 10.0.0.1\n\nbeta   10.0.0.2  # the second\ngamma")
    return file


def ended(stage: Stage) -> bool:
    """Nothing runs, and nothing is left on the machines but what was there."""
    files = [path for path in (stage.folder / "hosts").rglob("*") if path.is_file() or "fathom-" in path.name]
    return not stage.processes() and not files


def said_of(name: str, out: str) -> str:
    return next(line.split(None, 1)[1] for line in out.splitlines() if line.split()[0].endswith(name))


@pytest.mark.parametrize("shared", ["", "all"])
def test_machines_are_started_looked_at_and_stopped(stage: Stage, hosts: Path, shared: str) -> None:
    env = {"FAKE_SHARED_HOME": shared}
    done = stage.run("ssh-hosts.sh", "start", hosts, **env)
    assert done.returncode == 0, done.stderr
    assert "ssh -N -L 8265:localhost:8265 me@alpha" in done.stdout
    assert "fathom submit --address http://localhost:8265 " in done.stdout
    starts = [line for line in stage.lines("ray ") if " start " in line]
    assert starts[0].startswith("ray alpha:") and {line.split()[1] for line in starts[1:]} == {"beta:", "gamma:"}
    head, *others = map(options_of, starts)
    assert head["head"] and head["port"] == 6379 and head["dashboard_port"] == 8265 and head["include_dashboard"]
    assert head["dashboard_host"] == "127.0.0.1" and head["node_ip_address"] == "10.0.0.1"
    assert [options["address"] for options in others] == ["10.0.0.1:4321"] * 2
    assert {line.split()[1]: options_of(line)["node_ip_address"] for line in starts[1:]} == {
        "beta:": "10.0.0.2", "gamma:": None,
    }  # fmt: skip
    assert sorted(stage.lines("token")) == [f"token {host}: token 0o600" for host in ("alpha", "beta", "gamma")]

    done = stage.run("ssh-hosts.sh", "status", hosts, **env)
    assert done.returncode == 0
    assert all(said_of(host, done.stdout).startswith("runs (process ") for host in ("alpha", "beta", "gamma"))

    done = stage.run("ssh-hosts.sh", "stop", hosts, **env)
    assert done.returncode == 0 and ended(stage)
    assert [said_of(host, done.stdout) for host in ("alpha", "beta", "gamma")] == ["stopped"] * 3
    assert [line for line in stage.lines("ray ") if "ends" in line][-1] == "ray alpha: ends by SIGTERM"  # the head last

    done = stage.run("ssh-hosts.sh", "status", hosts, **env)
    assert done.returncode == 1 and said_of("gamma", done.stdout) == "does not run"
    assert stage.run("ssh-hosts.sh", "stop", hosts, **env).returncode == 0


def test_ssh_gets_no_secret_and_asks_for_none(stage: Stage, hosts: Path) -> None:
    stage.run("ssh-hosts.sh", "start", hosts)
    token = stage.folder / "home" / ".ray" / "auth_token"
    assert stat.S_IMODE(token.stat().st_mode) == 0o600 and re.fullmatch("[0-9a-f]{64}", token.read_text())
    copies = list((stage.folder / "hosts").rglob("token"))
    assert [copy.read_text() for copy in copies] == [token.read_text()] * 3
    assert token.read_text() not in stage.log.read_text()
    calls = stage.lines("ssh")
    assert len(calls) == 3 and all("-o BatchMode=yes" in call and call.endswith(" bash -s") for call in calls)
    stage.run("ssh-hosts.sh", "stop", hosts)


def test_a_token_that_is_there_is_used(stage: Stage, hosts: Path) -> None:
    token = stage.folder / "own"
    token.write_text("mine, with 'quotes' and $dollars")
    token.chmod(0o644)
    stage.run("ssh-hosts.sh", "start", hosts, FATHOM_TOKEN=str(token))
    copies = list((stage.folder / "hosts").rglob("token"))
    assert [copy.read_text() for copy in copies] == [token.read_text()] * 3
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    stage.run("ssh-hosts.sh", "stop", hosts)


@pytest.mark.parametrize(
    ("env", "host", "said"),
    [
        ({"FAKE_UNREACHABLE": "gamma"}, "gamma", "Connection refused"),
        ({"FAKE_UNREACHABLE": "alpha"}, "me@alpha", "Connection refused"),
        ({"FAKE_RAY_FAILS": "beta"}, "beta", "no memory left"),
        ({"FAKE_RAY_FAILS": "alpha"}, "me@alpha", "no memory left"),
        ({"FAKE_RAY_SLEEPS": "alpha", "FATHOM_START_S": "1"}, "me@alpha", "not up after 1 s"),
    ],
)
def test_a_machine_that_fails_is_named_and_the_others_are_stopped(
    stage: Stage, hosts: Path, env: Mapping[str, str], host: str, said: str
) -> None:
    done = stage.run("ssh-hosts.sh", "start", hosts, **env)
    assert done.returncode == 1 and done.stdout == "" and ended(stage)
    [line] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: {host}: ") and said in line


def test_who_interrupts_a_start_leaves_nothing(stage: Stage, hosts: Path) -> None:
    process = stage.start("ssh-hosts.sh", "start", hosts, FAKE_RAY_SLEEPS="beta")
    stage.wait_for(lambda: stage.lines("ray beta"), "second machine")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=WAIT_S)
    assert process.returncode == 130 and ended(stage)


def test_a_cluster_that_runs_is_not_started_again_nor_stopped_by_trying(stage: Stage, hosts: Path) -> None:
    stage.run("ssh-hosts.sh", "start", hosts)
    done = stage.run("ssh-hosts.sh", "start", hosts)
    assert done.returncode == 1 and "error: me@alpha: runs already (process " in done.stderr
    hosts.write_text("delta\nbeta\n")
    done = stage.run("ssh-hosts.sh", "start", hosts)
    assert done.returncode == 1 and "error: beta: runs already (process " in done.stderr
    assert "ray delta: ends by SIGTERM" in stage.lines()
    hosts.write_text("alpha\nbeta\ngamma\n")
    assert stage.run("ssh-hosts.sh", "status", hosts).returncode == 0
    assert stage.run("ssh-hosts.sh", "stop", hosts).returncode == 0 and ended(stage)


def test_stop_ends_only_what_it_has_started(stage: Stage, hosts: Path) -> None:
    other = subprocess.Popen(
        [str(stage.folder / "bin" / "ray"), "start", "--block", "--head", f"--temp-dir={stage.folder}"],
        env={**stage.env, "FAKE_NODE": "of-somebody"},
    )
    try:
        stage.wait_for(lambda: stage.lines("ray of-somebody"), "ray")
        stale = stage.folder / "hosts" / "beta" / "home" / ".fathom" / "clusters" / "fathom" / "beta"
        stale.mkdir(parents=True)
        (stale / "pid").write_text(f"{other.pid}\n")  # its number, given to another process since
        done = stage.run("ssh-hosts.sh", "stop", hosts)
        assert done.returncode == 0 and said_of("beta", done.stdout) == "did not run"
        stage.run("ssh-hosts.sh", "start", hosts)
        stage.run("ssh-hosts.sh", "stop", hosts)
        assert other.poll() is None and stage.processes() == [psutil.Process(other.pid)]
    finally:
        other.kill()
        other.wait()


def test_two_clusters_on_the_same_machines_have_names(stage: Stage, hosts: Path) -> None:
    stage.run("ssh-hosts.sh", "start", hosts)
    second = {"FATHOM_CLUSTER": "second", "FATHOM_PORT": "7000", "FATHOM_DASHBOARD": "8300"}
    done = stage.run("ssh-hosts.sh", "start", hosts, **second)
    assert done.returncode == 0 and "--address http://localhost:8300" in done.stdout
    heads = [options_of(line) for line in stage.lines("ray alpha") if "--head" in line]
    assert [options["port"] for options in heads] == [6379, 7000]
    assert len({options["ray_client_server_port"] for options in heads}) == 2
    assert stage.run("ssh-hosts.sh", "stop", hosts).returncode == 0
    assert stage.run("ssh-hosts.sh", "status", hosts, **second).returncode == 0
    assert stage.run("ssh-hosts.sh", "stop", hosts, **second).returncode == 0 and ended(stage)


def test_a_machine_that_cannot_be_reached_is_named(stage: Stage, hosts: Path) -> None:
    stage.run("ssh-hosts.sh", "start", hosts)
    for task in ("status", "stop"):
        done = stage.run("ssh-hosts.sh", task, hosts, FAKE_UNREACHABLE="beta")
        assert done.returncode == 1 and "Connection refused" in said_of("beta", done.stdout)
    assert said_of("gamma", done.stdout) == "stopped"
    assert stage.run("ssh-hosts.sh", "stop", hosts).returncode == 0 and ended(stage)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("-oProxyCommand=reboot\n", "is no machine's name"),
        ("gpu1;reboot\n", "is no machine's name"),
        ("gpu1 ib0\n", "is no address"),
        ("gpu1 10.0.0.1 10.0.0.2\n", "is no address"),
        ("# nobody\n", "names no machine"),
    ],
)
def test_a_host_file_that_is_wrong_is_refused(stage: Stage, hosts: Path, text: str, said: str) -> None:
    hosts.write_text(text)
    done = stage.run("ssh-hosts.sh", "start", hosts)
    assert done.returncode == 2 and said in done.stderr and stage.lines() == []


@pytest.mark.parametrize("words", [[], ["start"], ["restart", "machines"], ["start", "nowhere"]])
def test_ssh_hosts_says_how_it_is_used(stage: Stage, hosts: Path, words: list[str]) -> None:
    done = stage.run("ssh-hosts.sh", *words)
    assert done.returncode == 2 and ("usage:" in done.stderr or "cannot be read" in done.stderr)
    assert stage.lines() == []
