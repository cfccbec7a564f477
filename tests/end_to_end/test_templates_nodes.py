"""The scripts of cluster/templates/ with the real Ray, on several machines: only Slurm and ssh are stood for."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.bed import Bed, Machine, bed, wait_for
from tests.end_to_end.cli import REPOSITORY, TIMEOUT_S, steps_done, write_config
from tests.end_to_end.conftest import World
from tests.end_to_end.nodes import STEPS, losses, run_values, same_weights, told, with_ranks

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

TEMPLATES = REPOSITORY / "cluster" / "templates"

# `srun`, `scontrol` and `ssh` on a machine: they ask the test, which reaches the other machines, and wait.
ASK = """#!{python} -S
import json, os, signal, sys, time

desk = {desk!r}
name = os.path.join(desk, f"{{os.path.basename(sys.argv[0])}}-{{time.time_ns()}}")
signal.signal(signal.SIGTERM, lambda number, frame: open(name + ".term", "w").close())
request = dict(program=os.path.basename(sys.argv[0]), words=sys.argv[1:], env=dict(os.environ), cwd=os.getcwd())
request["input"] = "" if sys.stdin.isatty() else sys.stdin.read()
with open(name, "w") as file:
    json.dump(request, file)
os.rename(name, name + ".request")
while not os.path.exists(name + ".answer"):
    time.sleep(0.05)
with open(name + ".answer") as file:
    answer = json.load(file)
sys.stdout.write(answer["out"])
sys.stderr.write(answer["err"])
sys.exit(answer["status"])
"""


class Desk:
    """A context manager that answers the programs of `tools`. `asked`: every request so far, as its words."""

    def __init__(self, folder: Path, machines: Bed) -> None:
        self.tools, self.asked = folder / "tools", list[list[str]]()
        self._desk, self._machines = folder / "desk", machines
        self._closed = threading.Event()
        self._clerks = ThreadPoolExecutor()
        self._thread = threading.Thread(target=self._serve)
        for made in (self.tools, self._desk):
            made.mkdir(parents=True)
        for name in ("srun", "scontrol", "ssh"):
            (self.tools / name).write_text(ASK.format(python=sys.executable, desk=str(self._desk)))
            (self.tools / name).chmod(0o755)

    def __enter__(self) -> Desk:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._thread.join()
        self._clerks.shutdown()

    def _serve(self) -> None:
        while not self._closed.wait(0.05):
            for path in self._desk.glob("*.request"):
                request = json.loads(path.read_text())
                path.unlink()
                self.asked.append([request["program"], *request["words"]])
                self._clerks.submit(self._answer, path.with_suffix(""), request)

    def _answer(self, name: Path, request: dict[str, Any]) -> None:
        running = {"out": "   JobState=RUNNING Reason=None\n", "err": "", "status": 0}
        answers = {"srun": self._srun, "ssh": self._ssh, "scontrol": lambda *_: running}
        try:
            answer = answers[request["program"]](name, request)
        except Exception as error:  # noqa: BLE001  the program must not wait for ever
            answer = {"out": "", "err": f"{error!r}\n", "status": 99}
        made = name.with_suffix(".made")
        made.write_text(json.dumps(answer))
        made.rename(name.with_suffix(".answer"))

    def _srun(self, name: Path, request: dict[str, Any]) -> dict[str, Any]:
        """The command as a task on each of the other nodes; SIGTERM to srun is SIGKILL for the tasks."""
        words: Sequence[str] = request["words"]
        first = next(place for place, word in enumerate(words) if not word.startswith("-"))
        count = int(next(word for word in words if word.startswith("--ntasks=")).partition("=")[2])
        nodes = [machine for machine in self._machines.machines.values() if machine.name.startswith("node")][:count]
        tasks = [node.start(*words[first:], cwd=request["cwd"], env=request["env"]) for node in nodes]
        while any(task.poll() is None for task in tasks):
            if name.with_suffix(".term").exists() or self._closed.is_set():
                for task in tasks:
                    kill_below(task.pid)
            time.sleep(0.05)
        said = [task.communicate() for task in tasks]
        status = max((abs(task.returncode) for task in tasks), default=0)
        return {"out": "".join(out for out, _ in said), "err": "".join(err for _, err in said), "status": status}

    def _ssh(self, name: Path, request: dict[str, Any]) -> dict[str, Any]:
        """The command on the machine, its input from here, in a login's environment."""
        words: list[str] = request["words"]
        while words[0].startswith("-"):
            words = words[2:] if words[0] == "-o" else words[1:]
        machine, text = self._machines.machines[words[0]], name.with_suffix(".input")
        text.write_text(request["input"])
        env = {"PYTHONPATH": str(REPOSITORY), "FATHOM_SCRATCH": str(self._machines.temporary)}
        done = machine.run("bash", "-c", 'exec "$@" <"$0"', text, *words[1:], cwd=self._machines.home, env=env)
        return {"out": done.stdout, "err": done.stderr, "status": done.returncode}


def kill_below(pid: int) -> None:
    """A process, and all that it has started."""
    try:
        family = [*psutil.Process(pid).children(recursive=True), psutil.Process(pid)]
    except psutil.Error:
        return
    for process in family:
        if process.is_running():
            process.kill()


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Bed]:
    with bed(tmp_path / "bed", cpus=[1, 1], bare=True) as made:
        yield made


@pytest.fixture
def desk(tmp_path: Path, machines: Bed) -> Iterator[Desk]:
    with Desk(tmp_path, machines) as made:
        yield made


def start(
    machine: Machine, desk: Desk, script: str, *words: str | Path, cwd: Path, **env: str
) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(desk.tools), machine.env["PATH"]])
    return machine.start("bash", TEMPLATES / script, *words, cwd=cwd, env={"PATH": path, **env})


def rays(machines: Bed) -> list[str]:
    """What is left of Ray, on any machine."""
    return [
        f"{machine.name}: {' '.join(process.cmdline())}"
        for machine in machines.machines.values()
        for process in machine.processes()
        if any(word in " ".join(process.cmdline()) for word in ("raylet", "gcs_server", "ray::", "dashboard"))
    ]


def test_a_slurm_job_is_ended_by_its_time_limit_and_goes_on_when_it_is_queued_again(
    tmp_path: Path, machines: Bed, desk: Desk, data_world: World, undisturbed: Path
) -> None:
    work, state = tmp_path / "work", tmp_path / "state"
    work.mkdir()
    state.mkdir()
    write_config(work / "teacher.yaml", run_values(data_world) | {"checkpoint": {"every": 1000}})
    run = work / "runs" / "teacher"
    env = {
        "SLURM_JOB_ID": "4711", "SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_PER_TASK": "1",
        "FATHOM_VENV": str(Path(sys.executable).parent.parent), "FATHOM_INTERFACE": "eth0",
        "FATHOM_SCRATCH": str(machines.temporary), "FATHOM_STATE": str(state),
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(machines.site)]),
    }  # fmt: skip

    first = start(machines.head, desk, "slurm.sbatch", "train", "teacher.yaml", cwd=work, **env)
    wait_for(lambda: steps_done(run) >= 5 or first.poll() is not None, "step 5", TIMEOUT_S)
    on = with_ranks(machines, ["head", "node1"])
    for process in machines.head.processes("slurm.sbatch"):
        process.send_signal(signal.SIGTERM)  # B: to the script alone
    out, err = first.communicate(timeout=TIMEOUT_S)
    assert first.returncode == 75, out + err
    assert on == ["head", "node1"]
    assert desk.asked[-1] == ["scontrol", "requeue", "4711"]
    wait_for(lambda: rays(machines) == [], "end of Ray's helpers", 30.0)
    assert list(state.iterdir()) == []

    again = start(
        machines.head, desk, "slurm.sbatch", "train", "teacher.yaml", cwd=work, SLURM_RESTART_COUNT="1", **env
    )
    out, err = again.communicate(timeout=TIMEOUT_S)
    assert again.returncode == 0, out + err
    lines = [line for line in told(run) if line["event"] != "configuration_changed"]  # the cluster's address
    assert [line["event"] for line in lines] == ["started", "stopping", "stopped", "started", "finished"], lines
    assert [line["attempt"] for line in lines if line["event"] == "started"] == [1, 2]
    assert 5 <= int(lines[3]["resume"][-8:]) < STEPS
    assert same_weights(run, undisturbed) and losses(run) == losses(undisturbed)
    wait_for(lambda: rays(machines) == [], "end of Ray's helpers", 30.0)
    assert list(state.iterdir()) == []


def test_machines_by_ssh_are_started_take_a_job_and_are_stopped(
    tmp_path: Path, machines: Bed, desk: Desk, data_world: World, undisturbed: Path
) -> None:
    work = tmp_path / "work"  # not above the machines' home
    work.mkdir()
    write_config(work / "teacher.yaml", run_values(data_world))
    hosts = tmp_path / "machines"
    hosts.write_text("".join(f"{name} {machines.machines[name].address}\n" for name in ("head", "node1")))
    env = {"FATHOM_VENV": str(Path(sys.executable).parent.parent), "FATHOM_INTERFACE": "eth0"}

    def script(task: str) -> tuple[int, str]:
        process = start(machines.outside, desk, "ssh-hosts.sh", task, hosts, cwd=tmp_path, **env)
        out, err = process.communicate(timeout=TIMEOUT_S)
        return process.returncode, out + err

    status, said = script("start")
    assert status == 0 and "on 2 machines" in said, said
    assert script("status")[0] == 0
    submit = (sys.executable, "-m", "launcher.cli", "submit", "--wait", "train", "teacher.yaml")
    there = {"PYTHONPATH": str(REPOSITORY), "RAY_API_SERVER_ADDRESS": "http://localhost:8265"}  # the tunnel's end
    done = machines.head.run(*submit, cwd=work, env=there, timeout_s=TIMEOUT_S)
    assert done.returncode == 0, done.stdout + done.stderr
    assert same_weights(work / "runs" / "teacher", undisturbed)
    status, said = script("stop")
    assert status == 0 and said.count("stopped") == 2, said
    wait_for(lambda: rays(machines) == [], "end of Ray's helpers", 30.0)  # which see that their parent is gone
    status, said = script("status")
    assert status == 1 and said.count("does not run") == 2, said
