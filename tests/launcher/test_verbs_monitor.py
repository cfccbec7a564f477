"""`fathom monitor`: one monitor a folder, up until it is told to end, whoever asks and however it is asked."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from cluster.monitor.alerts import ALERTS
from cluster.monitor.control import PAGE_PORT, Order, State, find
from cluster.monitor.prometheus import MonitorError
from tests.launcher.conftest import Run

GROUP = "monitor"
REPOSITORY = Path(__file__).resolve().parent.parent.parent
needs_prometheus = pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not installed")


@pytest.fixture(autouse=True)
def _nothing_left(tmp_path: Path) -> Iterator[None]:
    """No monitor outlives its test."""
    yield
    state = None
    with contextlib.suppress(MonitorError):  # one of another machine
        state = find(str(tmp_path / "runs"))
    if state is not None:
        own = [psutil.Process(state.pid), *psutil.Process(state.pid).children(recursive=True)]
        for process in own:
            process.kill()
        psutil.wait_procs(own, timeout=10)


def state_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / ".monitor" / "monitor.json").read_text()))


def get(address: str) -> int:
    with urllib.request.urlopen(f"http://{address}", timeout=10) as answer:
        return int(answer.status)


def listens(port: int) -> bool:
    with socket.socket() as asking:
        return asking.connect_ex(("127.0.0.1", port)) == 0


def until(condition: Callable[[], Any], patience_s: float = 60.0) -> Any:
    ends = time.monotonic() + patience_s
    while not (value := condition()):
        assert time.monotonic() < ends
        time.sleep(0.05)
    return value


def ended(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


@needs_prometheus
def test_up_status_and_down(fathom: Run, tmp_path: Path) -> None:
    assert fathom("status") == (1, "no monitor is up for runs: fathom monitor up runs\n", "")
    status, out, err = fathom("up", "--keep", "7d")
    assert (status, err) == (0, "")
    state = state_of(tmp_path / "runs")
    assert out.splitlines() == [
        f"is up as process {state['pid']}",
        f"page         http://{state['page']}/",
        f"Prometheus   http://{state['prometheus']}/",
        f"watches      {tmp_path / 'runs'}",
    ]
    assert get(f"{state['page']}/") == get(f"{state['prometheus']}/-/ready") == 200
    (server,) = psutil.Process(state["pid"]).children()
    assert "--storage.tsdb.retention.time=7d" in server.cmdline()
    assert fathom("up", "--keep", "7d")[1] == out.replace(f"is up as process {state['pid']}", "is up already")
    status, _, err = fathom("up", "--keep", "8d")
    assert status == 2 and "other settings" in err and "fathom monitor down" in err and len(err.splitlines()) == 1
    status, out, _ = fathom("status")
    assert status == 0
    assert "scraped      nothing now" in out and "alerts       none fires" in out and "data " in out
    found = json.loads(fathom("status", "--json")[1])
    assert found["up"] and found["state"]["pid"] == state["pid"] and found["standing"]["up"] == {}
    assert fathom("down") == (0, "ended\n", "")
    assert ended(state["pid"]) and ended(server.pid)
    assert not any(listens(int(state[name].rpartition(":")[2])) for name in ("page", "prometheus"))
    assert fathom("down") == (0, "no monitor is up for runs\n", "")


@needs_prometheus
def test_what_was_collected_is_there_for_the_next(fathom: Run, tmp_path: Path) -> None:
    """And a monitor that was killed takes its Prometheus along, and is no obstacle."""
    fathom("up", "--interval", "0.5")
    first = state_of(tmp_path / "runs")
    (server,) = psutil.Process(first["pid"]).children()
    os.kill(first["pid"], signal.SIGKILL)
    until(lambda: ended(first["pid"]) and ended(server.pid))
    assert fathom("status")[0] == 1
    assert fathom("up", "--interval", "0.5")[0] == 0
    assert state_of(tmp_path / "runs")["pid"] != first["pid"]
    log = (tmp_path / "runs" / ".monitor" / "prometheus.log").read_text()
    assert "WAL" in log  # of before


@needs_prometheus
def test_a_prometheus_that_ends_is_started_again(fathom: Run, tmp_path: Path) -> None:
    fathom("up")
    state = state_of(tmp_path / "runs")
    (server,) = psutil.Process(state["pid"]).children()
    server.kill()
    until(lambda: ended(server.pid))
    until(lambda: any(child.pid != server.pid for child in psutil.Process(state["pid"]).children()))
    until(lambda: listens(int(state["prometheus"].rpartition(":")[2])))
    assert "started again" in (tmp_path / "runs" / ".monitor" / "monitor.log").read_text()


@needs_prometheus
def test_ports(fathom: Run, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for option in ("--port", "--prometheus-port"):
            status, _, err = fathom("up", option, port)
            assert status == 2 and port in err and len(err.splitlines()) == 1, err
        assert fathom("status")[0] == 1
    with socket.socket() as usual:
        usual.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            usual.bind(("127.0.0.1", PAGE_PORT))
            usual.listen()
        except OSError:  # somebody has it already, which is as good
            pass
        assert fathom("up")[0] == 0
        assert state_of(tmp_path / "runs")["page"] != f"127.0.0.1:{PAGE_PORT}"


@needs_prometheus
def test_in_the_foreground(tmp_path: Path) -> None:
    """As a container or systemd has it."""
    process = subprocess.Popen(
        [sys.executable, "-m", "launcher.cli", "monitor", "up", "--foreground"], cwd=tmp_path, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    state = until(lambda: find(str(tmp_path / "runs")))
    assert state.pid == process.pid and get(f"{state.page}/") == 200
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert f"page         http://{state.page}/" in out
    assert find(str(tmp_path / "runs")) is None


def test_only_the_targets(fathom: Run, tmp_path: Path) -> None:
    """For a site that has its own Prometheus, with none on this machine."""
    assert fathom("up", "--targets-only")[0] == 0
    state = state_of(tmp_path / "runs")
    assert state["page"] is state["prometheus"] is None
    assert psutil.Process(state["pid"]).children() == []
    assert json.loads((tmp_path / "runs" / ".monitor" / "targets.json").read_text()) == []
    status, out, _ = fathom("status")
    assert status == 0 and "scraped      nothing now" in out
    assert fathom("down")[1] == "ended\n"


def test_without_prometheus_the_remedy_is_said(
    fathom: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    status, out, err = fathom("up")
    assert (status, out) == (2, "") and "apt install prometheus" in err and "fathom monitor config" in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("up", "s3://bucket/runs"), ("s3://bucket/runs", "--telemetry")),
        (("up", "file"), ("file", "no folder")),
        (("config", "file"), ("file", "no folder")),
        (("up", "--interval", "0"), ("--interval", "0")),
        (("up", "--port", "70000"), ("--port", "65535")),
        (("up", "--keep", "for ever"), ("--keep", "for ever", "30d")),
    ],
)
def test_what_is_wrong_is_named(
    fathom: Run, tmp_path: Path, arguments: tuple[str, ...], words: tuple[str, ...]
) -> None:
    (tmp_path / "file").touch()
    status, _, err = fathom(*arguments)
    assert status == 2 and len(err.splitlines()) == 1
    for word in words:
        assert word in err


def test_another_machine_s_monitor_is_not_touched(fathom: Run, tmp_path: Path) -> None:
    order = Order(folders=(str(tmp_path / "runs"),))
    (tmp_path / "runs" / ".monitor").mkdir(parents=True)
    State(pid=os.getpid(), began=0.0, machine="elsewhere", since=0.0, order=order, page=None, prometheus=None).write()
    for verb in ("up", "down", "status"):
        status, _, err = fathom(verb)
        assert status == 2 and "elsewhere" in err


def test_a_reused_process_id_is_no_monitor(fathom: Run, tmp_path: Path) -> None:
    order = Order(folders=(str(tmp_path / "runs"),))
    (tmp_path / "runs" / ".monitor").mkdir(parents=True)
    own = {"pid": os.getpid(), "machine": socket.gethostname()}
    State(**own, began=0.0, since=0.0, order=order, page=None, prometheus=None).write()
    assert fathom("status")[0] == 1
    assert fathom("down") == (0, "no monitor is up for runs\n", "")
    (tmp_path / "runs" / ".monitor" / "monitor.json").write_text("{")
    assert fathom("status")[0] == 1


def test_config_is_what_prometheus_takes(fathom: Run, tmp_path: Path) -> None:
    status, out, _ = fathom("config", "shared/runs", "--alertmanager", "alerts:9093", "--interval", "15")
    assert status == 0
    scrape, rules = (yaml.safe_load(part) for part in out.split("# rules.yml\n"))
    assert scrape["scrape_configs"][0]["file_sd_configs"][0]["files"] == [
        str(tmp_path / "shared" / "runs" / ".monitor" / "targets.json")
    ]
    jobs = {job["job_name"]: job for job in scrape["scrape_configs"]}
    assert {name: [rule["action"] for rule in job["relabel_configs"]] for name, job in jobs.items()} == {
        "fathom": ["drop"], "ray": ["keep"],
    }  # fmt: skip
    assert {rule["regex"] for job in jobs.values() for rule in job["relabel_configs"]} == {"ray"}
    assert scrape["alerting"]["alertmanagers"] == [{"static_configs": [{"targets": ["alerts:9093"]}]}]
    assert len(rules["groups"][0]["rules"]) == len(ALERTS)
    status, out, _ = fathom("config", "shared/runs", "--out", "site")
    assert status == 0 and sorted(path.name for path in (tmp_path / "site").iterdir()) == [
        "grafana", "prometheus.yml", "rules.yml",
    ]  # fmt: skip
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed")
    done = subprocess.run([promtool, "check", "config", tmp_path / "site" / "prometheus.yml"], capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
