"""Several machines: verbs submitted from outside, ranks on different machines, a machine that is lost."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest

from tests.bed import Bed, wait_for
from tests.end_to_end.cli import TIMEOUT_S, events, json_lines, steps_done, write_config
from tests.end_to_end.conftest import World
from tests.end_to_end.nodes import STEPS, fathom, losses, run_values, same_weights, told, with_ranks

pytestmark = pytest.mark.timeout(1800)


def test_a_submitted_run_trains_on_two_machines_and_loses_one(
    tmp_path: Path, machines: Bed, data_world: World, undisturbed: Path
) -> None:
    write_config(tmp_path / "teacher.yaml", run_values(data_world))
    run = tmp_path / "runs" / "teacher"
    begun = time.monotonic()
    done = fathom(machines, "submit", "--json", "train", "teacher.yaml", cwd=tmp_path)
    assert done.status == 0 and done.err == "", done.err
    assert json.loads(done.out)["id"] == "teacher"
    wait_for(lambda: steps_done(run) >= 25, "step 25", TIMEOUT_S)
    on = with_ranks(machines)
    assert len(on) == 2, f"ranks on {on} after {time.monotonic() - begun:.0f} s"
    status = json.loads(fathom(machines, "jobs", "status", "teacher", "--json", cwd=tmp_path).out)
    assert status["state"] == "RUNNING" and status["attempt"] == 1 and status["answer"] == 101
    lost = on[-1]
    machines.machines[lost].kill()
    waited = fathom(machines, "jobs", "wait", "teacher", "--timeout", "400", cwd=tmp_path)
    log = fathom(machines, "jobs", "logs", "teacher", cwd=tmp_path).out
    machines.replace(lost)
    assert waited.status == 0, log
    lines = told(run)
    assert [line["event"] for line in lines] == ["submitted", "started", "failed", "recovering", "started", "finished"]
    assert lines[2]["error"].startswith("MachineLost"), lines[2]
    assert 20 <= int(lines[4]["resume"][-8:]) < STEPS
    assert same_weights(run, undisturbed)
    assert losses(run) == losses(undisturbed)
    assert events(run)[-1] == "finished"


def test_a_stopped_job_saves_and_is_resumed(
    tmp_path: Path, machines: Bed, data_world: World, undisturbed: Path
) -> None:
    write_config(tmp_path / "teacher.yaml", run_values(data_world) | {"name": "stopped", "checkpoint": {"every": 1000}})
    run = tmp_path / "runs" / "stopped"
    job = ("submit", "--grace", "10", "train", "teacher.yaml")  # then it would be killed
    assert fathom(machines, *job, cwd=tmp_path).out == "stopped\n"
    wait_for(lambda: steps_done(run) >= 5, "step 5", TIMEOUT_S)
    again = fathom(machines, "submit", "train", "teacher.yaml", cwd=tmp_path)
    assert again.status == 2 and "has a job of this name" in again.err
    assert fathom(machines, "jobs", "resume", "stopped", cwd=tmp_path).status == 2
    stopped = fathom(machines, "jobs", "stop", "stopped", cwd=tmp_path)
    assert stopped.status == 0 and "stopped: CANCELLED" in stopped.err
    assert fathom(machines, "jobs", "status", "stopped", "--exit-code", cwd=tmp_path).status == 103
    saved = [line["step"] for line in json_lines(run / "journal.jsonl") if line["event"] == "checkpoint"]
    assert len(saved) == 1 and 5 <= saved[0] < STEPS
    (tmp_path / "teacher.yaml").unlink()  # the job knows its configuration
    resumed = fathom(machines, "jobs", "resume", "--wait", "stopped", cwd=tmp_path)
    assert resumed.status == 0 and resumed.out.startswith("stopped.2\n"), resumed.err
    assert same_weights(run, undisturbed)
    assert fathom(machines, "jobs", "status", "stopped", "--exit-code", cwd=tmp_path).status == 0
    listed = json.loads(fathom(machines, "jobs", "list", "--json", cwd=tmp_path).out)
    assert {job["id"]: job["state"] for job in listed if job["run"] == "stopped"} == {
        "stopped": "CANCELLED", "stopped.2": "SUCCEEDED",
    }  # fmt: skip
    assert fathom(machines, "jobs", "delete", "stopped", cwd=tmp_path).out == "stopped.2: forgotten\n"


def test_a_monitor_outside_of_the_cluster_sees_all_machines(tmp_path: Path, machines: Bed, data_world: World) -> None:
    if shutil.which("prometheus") is None:
        pytest.skip("prometheus is not installed")
    values = run_values(data_world) | {"name": "watched", "steps": 1_000_000}
    write_config(tmp_path / "watched.yaml", values | {"cluster": {"workers": 2, "metrics_host": "0.0.0.0"}})

    def scraped() -> dict[str, int]:
        done = fathom(machines, "monitor", "status", "--json", cwd=tmp_path)
        found: dict[str, int] = json.loads(done.out)["standing"]["up"]
        return found

    assert fathom(machines, "monitor", "up", "--interval", "1", cwd=tmp_path).status == 0
    try:
        assert fathom(machines, "submit", "train", "watched.yaml", cwd=tmp_path).out == "watched\n"
        wait_for(lambda: scraped() == {"driver": 1, "ray": 3, "train": 2}, "all processes of three machines", TIMEOUT_S)
        entries = json.loads((tmp_path / "runs" / ".monitor" / "targets.json").read_text())
        hosts = {entry["targets"][0].rpartition(":")[0] for entry in entries if entry["labels"]["role"] == "train"}
        assert len(hosts) == 2 and not any(host.startswith("127.") for host in hosts)
        assert fathom(machines, "jobs", "stop", "watched", cwd=tmp_path).status == 0
        wait_for(lambda: scraped() == {}, "end of all that was scraped", 60.0)
    finally:
        assert fathom(machines, "monitor", "down", cwd=tmp_path).out == "ended\n"


def test_what_cannot_be_is_one_line(tmp_path: Path, machines: Bed) -> None:
    for status, words, command in (
        (1, "no Ray job server answers", ("jobs", "list", "--address", "http://10.77.0.1:1")),
        (102, "no job 'nobody'", ("jobs", "status", "nobody")),
        (102, "no job 'nobody'", ("jobs", "wait", "nobody")),
        (2, "no such configuration file", ("submit", "train", "nothing.yaml")),
        (2, "is none that can be used here", ("submit", "jobs", "list")),
        (2, "looks like a secret", ("submit", "--env", "WANDB_API_KEY", "data", "layouts")),
    ):
        done = fathom(machines, *command, cwd=tmp_path)
        assert (done.status, len(done.errors)) == (status, 1) and words in done.err, (command, done)
    refused = fathom(machines, "jobs", "list", cwd=tmp_path, env={"HOME": str(tmp_path), "RAY_AUTH_MODE": "disabled"})
    assert refused.status == 1 and len(refused.errors) == 1 and "token" in refused.err, refused


def test_a_job_that_fails_says_so(tmp_path: Path, machines: Bed, data_world: World) -> None:
    write_config(tmp_path / "teacher.yaml", run_values(data_world) | {"name": "failing"})
    job = ("submit", "--wait", "--name", "failing-1", "train", "teacher.yaml", "--set", "model.weights=nothing.pth")
    done = fathom(machines, *job, cwd=tmp_path)
    assert done.status == 100 and "failing-1: FAILED (" in done.err and "nothing.pth" in done.err, done
    done = fathom(machines, "submit", "--wait", "data", "layouts", cwd=tmp_path)
    assert done.status == 0 and "nyu" in done.out
