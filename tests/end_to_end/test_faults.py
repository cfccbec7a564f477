"""Every fault that clusters have, on real machines' likenesses: the run ends SUCCEEDED, and as one left alone.

Each leaves a row in $FATHOM_FAULTS, where that is set: fault, seconds to the next checkpoint, what the journal says.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.bed import Bed, wait_for
from tests.end_to_end.cli import REPOSITORY, TIMEOUT_S, steps_done, write_config
from tests.end_to_end.conftest import World
from tests.end_to_end.nodes import (
    STEPS,
    WITH_RAY,
    fathom,
    losses,
    run_values,
    same_weights,
    seconds_to_progress,
    told,
    with_ranks,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

# Runs in every Python process of the machines: raises in the training thread of rank 1 when a file appears.
SABOTEUR = """
import ctypes, os, threading, time
def watch(order={order!r}):
    while not (os.path.exists(order) and os.environ.get("RANK") == "1"):
        time.sleep(0.05)
    os.unlink(order)  # once
    (thread,) = [thread for thread in threading.enumerate() if thread.name.startswith("TrainingThread")]
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(RuntimeError))
threading.Thread(target=watch, daemon=True).start()
"""


def worker(machines: Bed) -> str:
    """A machine with a rank that is not the head."""
    return [name for name in with_ranks(machines) if name != "head"][-1]


def rank_on(machines: Bed, name: str) -> psutil.Process:
    (process,) = machines.machines[name].processes("RayTrainWorker")
    return process


def kill_a_rank(machines: Bed, folder: Path) -> None:
    rank_on(machines, worker(machines)).kill()


def stop_a_rank(machines: Bed, folder: Path) -> None:
    rank_on(machines, worker(machines)).send_signal(signal.SIGSTOP)


def stop_the_rank_beside_the_driver(machines: Bed, folder: Path) -> None:
    name = "head" if "head" in with_ranks(machines) else worker(machines)
    rank_on(machines, name).send_signal(signal.SIGSTOP)


def raise_in_a_rank(machines: Bed, folder: Path) -> None:
    (machines.folder / "raise").touch()


def kill_a_raylet(machines: Bed, folder: Path) -> None:
    (raylet,) = (p for p in machines.machines[worker(machines)].processes("raylet/raylet") if "raylet" in p.name())
    raylet.kill()


def kill_the_driver(machines: Bed, folder: Path) -> None:
    (driver,) = (p for p in machines.head.processes("launcher.cli train") if "supervisor" not in " ".join(p.cmdline()))
    driver.kill()


def lose_a_machine(machines: Bed, folder: Path) -> None:
    machines.machines[worker(machines)].kill()


def cut_the_network(machines: Bed, folder: Path) -> None:
    machines.cut(worker(machines))


def cut_the_network_for_30_s(machines: Bed, folder: Path) -> None:
    name = worker(machines)
    machines.cut(name)
    time.sleep(30)
    machines.mend(name)


def preempt_a_machine(machines: Bed, folder: Path) -> None:
    """A notice that it goes away in 30 s, as a cloud gives; and then it does."""
    machine = machines.machines[worker(machines)]
    done = machine.run(
        "ray", "drain-node", "--address", machines.address, "--node-id", node_id(machines, machine.address),
        "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot", "--deadline-remaining-seconds", "30",
        cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    time.sleep(30)
    machine.kill()


def node_id(machines: Bed, address: str) -> str:
    script = (
        f"import ray; ray.init('{machines.address}', logging_level='ERROR', log_to_driver=False)\n"
        f"print(next(n['NodeID'] for n in ray.nodes() if n['NodeManagerAddress'] == '{address}' and n['Alive']))"
    )
    done = machines.head.run(sys.executable, "-c", script, cwd=machines.folder)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


FAULTS: dict[Callable[[Bed, Path], None], str] = {  # what the journal says of it
    kill_a_rank: "WorkerDied",
    stop_a_rank: "WorkerHung",
    stop_the_rank_beside_the_driver: "WorkerHung",
    raise_in_a_rank: "RuntimeError",
    kill_a_raylet: "MachineLost",
    lose_a_machine: "MachineLost",
    cut_the_network: "MachineLost",
    cut_the_network_for_30_s: "MachineLost",
    kill_the_driver: "started",
    preempt_a_machine: "preempted",
}
FATAL = ("raylet", "machine", "network")  # to the machine: it is replaced afterwards


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_costs_time_and_nothing_else(
    tmp_path: Path, machines: Bed, data_world: World, undisturbed: Path, fault: Callable[[Bed, Path], None]
) -> None:
    name = fault.__name__.replace("_", "-")
    write_config(tmp_path / "teacher.yaml", run_values(data_world, name=name))
    run = tmp_path / "runs" / name
    if fault is raise_in_a_rank:
        (machines.site / "sitecustomize.py").write_text(SABOTEUR.format(order=f"{machines.folder}/raise"))
    assert fathom(machines, "submit", "train", "teacher.yaml", cwd=tmp_path).status == 0
    wait_for(lambda: steps_done(run) >= 25, "step 25", TIMEOUT_S)
    at = time.time()
    try:
        fault(machines, tmp_path)
        waited = fathom(machines, "jobs", "wait", name, "--timeout", "400", cwd=tmp_path)
        log = fathom(machines, "jobs", "logs", name, cwd=tmp_path).out
    finally:
        (machines.site / "sitecustomize.py").unlink(missing_ok=True)
        if any(word in name for word in FATAL):
            for lost in ("node1", "node2"):
                machines.replace(lost)
    assert waited.status == 0, log
    lines = told(run)
    expected = FAULTS[fault]
    if fault is kill_the_driver:
        assert [line["event"] for line in lines] == ["submitted", "started", "started", "finished"]
        assert "supervisor: killed by SIGKILL; going on in 1 s" in log
    elif fault is preempt_a_machine:
        assert [line["event"] for line in lines][1:5] == ["started", "stopping", "preempted", "recovering"]
        assert lines[2]["reason"] == "PREEMPTED" and lines[2]["deadline"] > at + 10
    else:
        failed = [line["error"] for line in lines if line["event"] == "failed"]
        assert len(failed) == 1 and failed[0].startswith(expected), failed
    assert lines[-1]["event"] == "finished" and lines[-1]["step"] == STEPS
    assert same_weights(run, undisturbed)
    assert losses(run) == losses(undisturbed)
    write_row(name, expected, run, at)


def test_without_a_spare_machine_it_waits_for_a_new_one(tmp_path: Path, machines: Bed, data_world: World) -> None:
    """Three ranks on three machines. Ray notices the loss later than the watchdog, so an attempt starts in vain."""
    values = run_values(data_world, name="alone", cluster={"workers": 3})
    values["data"]["roles"]["labelled"]["lanes"] = 4
    write_config(tmp_path / "teacher.yaml", values)
    assert fathom(machines, "submit", "--wait", "train", "teacher.yaml", cwd=tmp_path).status == 0
    write_config(tmp_path / "teacher.yaml", values | {"name": "waiting"})
    run = tmp_path / "runs" / "waiting"
    assert fathom(machines, "submit", "train", "teacher.yaml", cwd=tmp_path).status == 0
    wait_for(lambda: steps_done(run) >= 25, "step 25", TIMEOUT_S)
    at = time.time()
    machines.machines["node2"].kill()
    wait_for(lambda: any(line["event"] == "failed" for line in told(run)), "the loss", TIMEOUT_S)
    time.sleep(40)
    machines.replace("node2")
    waited = fathom(machines, "jobs", "wait", "waiting", "--timeout", "400", cwd=tmp_path)
    assert waited.status == 0, fathom(machines, "jobs", "logs", "waiting", cwd=tmp_path).out
    failed = [line["error"] for line in told(run) if line["event"] == "failed"]
    assert all(error.startswith("MachineLost") for error in failed), failed
    assert all(line["workers"] == 3 for line in told(run) if line["event"] == "started")
    assert same_weights(run, tmp_path / "runs" / "alone") and losses(run) == losses(tmp_path / "runs" / "alone")
    write_row("lose-a-machine-without-a-spare", "MachineLost; waits for a new one, here 50 s", run, at)


def test_a_run_goes_on_with_fewer_machines_and_grows_again(
    tmp_path: Path, machines: Bed, data_world: World
) -> None:
    """Three ranks, two, three: the same samples at every step, and the same curve but for the order of sums."""
    recovery = {"min_workers": 2, "capacity_wait_s": 60.0, "grow_patience_s": 3.0}
    values = run_values(data_world, steps=600, name="whole", cluster={"workers": 3}, checkpoint={"every": 50})
    values["recovery"] = values["recovery"] | recovery
    values["data"]["roles"]["labelled"]["lanes"] = 4
    write_config(tmp_path / "teacher.yaml", values)
    assert fathom(machines, "submit", "--wait", "train", "teacher.yaml", cwd=tmp_path).status == 0
    write_config(tmp_path / "teacher.yaml", values | {"name": "resized"})
    run, whole = tmp_path / "runs" / "resized", tmp_path / "runs" / "whole"
    assert fathom(machines, "submit", "train", "teacher.yaml", cwd=tmp_path).status == 0
    wait_for(lambda: steps_done(run) >= 60, "step 60", TIMEOUT_S)
    at = time.time()
    machines.machines["node2"].kill()
    wait_for(lambda: started(run)[-1] == 2 and steps_done(run) >= 110, "two ranks at work", TIMEOUT_S)
    machines.replace("node2")
    waited = fathom(machines, "jobs", "wait", "resized", "--timeout", "500", cwd=tmp_path)
    assert waited.status == 0, fathom(machines, "jobs", "logs", "resized", cwd=tmp_path).out
    assert started(run)[0] == 3 and started(run)[-1] == 3 and 2 in started(run)
    lines = told(run)
    assert [line["reason"] for line in lines if line["event"] == "stopping"] == ["RESIZED"]
    found, expected = losses(run), losses(whole)
    assert [step for step, _ in found] == [step for step, _ in expected] == list(range(1, 601))
    fewer = next(int(line["resume"][-8:]) for line in lines if line["event"] == "started" and line["workers"] == 2)
    assert found[:fewer] == expected[:fewer]  # bit for bit, while there were three
    first = zip(found[fewer : fewer + 10], expected[fewer : fewer + 10], strict=True)
    assert all(loss == pytest.approx(as_whole, rel=1e-3) for (_, loss), (_, as_whole) in first)
    assert found[-1][1] == pytest.approx(expected[-1][1], rel=0.2)
    write_row("lose-a-machine-go-on-with-fewer", "MachineLost; two of three ranks", run, at)


def started(run: Path) -> list[int]:
    """On how many workers the attempts so far were."""
    return [line["workers"] for line in told(run) if line["event"] == "started"]


def test_a_lost_head_costs_the_cluster_and_not_the_run(
    tmp_path: Path, machines: Bed, data_world: World, undisturbed: Path
) -> None:
    """Jobs, their logs and the driver are the head's; the run is on the shared disk. A new cluster goes on with it."""
    write_config(tmp_path / "teacher.yaml", run_values(data_world, name="headless"))
    run = tmp_path / "runs" / "headless"
    assert fathom(machines, "submit", "train", "teacher.yaml", cwd=tmp_path).status == 0
    wait_for(lambda: steps_done(run) >= 25, "step 25", TIMEOUT_S)
    at = time.time()
    machines.head.kill()
    gone = fathom(machines, "jobs", "status", "headless", cwd=tmp_path)
    assert gone.status == 1 and "no Ray job server answers" in gone.err
    for name in WITH_RAY:
        machines.replace(name)
    assert fathom(machines, "jobs", "status", "headless", cwd=tmp_path).status == 102
    done = fathom(machines, "submit", "--wait", "train", "teacher.yaml", "--resume", cwd=tmp_path)
    assert done.status == 0, done.out
    assert same_weights(run, undisturbed) and losses(run) == losses(undisturbed)
    write_row("lose-the-head", "nothing; `fathom submit train ... --resume` on a new cluster", run, at)


def write_row(name: str, says: str, run: Path, at: float) -> None:
    """For the table of docs/reliability.md."""
    if "FATHOM_FAULTS" in os.environ:
        with open(os.environ["FATHOM_FAULTS"], "a") as file:
            file.write(f"| {name} | {says} | {seconds_to_progress(run, at):.0f} |\n")


def test_a_killed_driver_is_started_again_by_hand(
    tmp_path: Path, machines: Bed, data_world: World, undisturbed: Path
) -> None:
    write_config(tmp_path / "teacher.yaml", run_values(data_world, name="hand"))
    run = tmp_path / "runs" / "hand"
    where = ("--set", f"cluster.address={machines.address}")
    words = (sys.executable, "-m", "launcher.cli", "train", "teacher.yaml", *where)
    driver = machines.head.start(*words, cwd=tmp_path, env={"PYTHONPATH": str(REPOSITORY)})
    try:
        wait_for(lambda: steps_done(run) >= 25, "step 25", TIMEOUT_S)
        second = machines.head.run(*words, "--resume", cwd=tmp_path, env={"PYTHONPATH": str(REPOSITORY)})
        assert second.returncode == 2 and "another process is working on this run" in second.stderr, second.stderr
    finally:
        for process in machines.head.processes("launcher.cli train"):
            process.kill()
        driver.communicate(timeout=60)
    done = machines.head.run(
        *words, "--resume", cwd=tmp_path, env={"PYTHONPATH": str(REPOSITORY)}, timeout_s=TIMEOUT_S
    )
    assert done.returncode == 0, done.stderr
    assert same_weights(run, undisturbed) and losses(run) == losses(undisturbed)
