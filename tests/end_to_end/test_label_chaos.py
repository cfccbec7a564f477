"""Labelling while everything breaks: the folder is byte for byte that of a run that nobody disturbed.

Each run leaves a row in $FATHOM_CHAOS, where that is set: seed, seconds, faults by kind, what they provoked.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.bed import Bed, bed, wait_for
from tests.end_to_end.cli import REPOSITORY, TIMEOUT_S, Done, json_lines, succeed
from tests.end_to_end.label_job import (
    CPUS,
    Job,
    differences,
    heal,
    make_data,
    make_weights,
    provoked,
    run_words,
    sabotage,
    show,
    workers_left,
)
from tests.end_to_end.label_monkey import Monkey

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bed]:
    with bed(tmp_path_factory.mktemp("bed") / "bed", cpus=CPUS) as made:
        yield made


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_weights(tmp_path_factory.mktemp("teacher") / "weights")


class Undisturbed:
    """A set, and the labels of one embedded run over it."""

    def __init__(self, folder: Path, shards: int, weights: str) -> None:
        self.shards, self.weights = shards, weights
        self.data = make_data(folder / "photos", shards)
        out = succeed(*run_words(self.data, weights, folder / "labels"), cwd=folder).out
        self.labels = Path(out.strip())


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory, weights: str) -> Undisturbed:
    return Undisturbed(tmp_path_factory.mktemp("few"), 20, weights)


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory, weights: str) -> Undisturbed:
    return Undisturbed(tmp_path_factory.mktemp("many"), 200, weights)


def label(machines: Bed, *words: str, cwd: Path) -> Done:
    """`fathom label status` or `verify`, as anybody runs them who sees the folder."""
    done = machines.outside.run(
        sys.executable, "-m", "launcher.cli", "label", *words, cwd=cwd, env={"PYTHONPATH": str(REPOSITORY)}
    )
    return Done(done.returncode, done.stdout, done.stderr)


def check(job: Job, known: Undisturbed) -> None:
    """All that must hold after a run."""
    labels = job.labels
    assert labels.name == known.labels.name
    assert differences(labels, known.labels) == []
    verified = label(job.bed, "verify", str(labels), "--dataset", known.data, cwd=job.folder)
    assert verified.status == 0, verified.out
    state = json.loads(label(job.bed, "status", str(labels), "--dataset", known.data, "--json", cwd=job.folder).out)
    assert state["status"]["shards"] == known.shards and not state["status"]["missing"]
    assert (state["leased"], state["runs"], state["todo"]) == ({}, 0, 0)


def chaos(monkey: Monkey, known: Undisturbed, events: Path) -> dict[str, int]:
    """One run with a monkey; what the faults have provoked."""
    job = monkey.job
    began = time.monotonic()
    print(f"seed {monkey.seed}", flush=True)
    try:
        monkey.run()
        seconds = time.monotonic() - began
        wait_for(lambda: not workers_left(job.bed), "end of the workers")
        check(job, known)
    except BaseException:
        for name in job.drivers:
            print(f"--- driver on {name}:\n{job.log(name).read_text()}")
        raise
    finally:
        job.end()
        found = provoked(events, monkey.late)
        for note in json_lines(events):
            if note["kind"] == "raised" and not note["error"].startswith("LeaseLost"):
                print(note)
        print(f"faults {show(monkey.done)}\nprovoked {show(found)}", flush=True)
    if "FATHOM_CHAOS" in os.environ:
        with open(os.environ["FATHOM_CHAOS"], "a") as file:
            file.write(f"| {monkey.seed} | {known.shards} | {seconds:.0f} | {show(monkey.done)} | {show(found)} |\n")
    return found


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 11))
def test_whatever_breaks_the_labels_are_those_of_a_run_left_alone(
    tmp_path: Path, machines: Bed, many: Undisturbed, seed: int
) -> None:
    events, draw = tmp_path / "events.jsonl", random.Random(1000 + seed)
    sabotage(machines, events, pace_s=0.12, step_s=0.6)
    job = Job(machines, tmp_path, run_words(many.data, many.weights, tmp_path / "labels"), many.shards)
    marks = [
        (draw.uniform(0.1, 0.35), "driver"), (draw.uniform(0.5, 0.8), "driver"), (draw.uniform(0.15, 0.4), "second"),
    ]  # fmt: skip
    deck = {
        "kill_worker": 4, "stop_worker": 3, "kill_leases": 2, "kill_raylet": 1, "cut": 1, "stop_leases": 1,
        "stop_driver": 1,
    }  # fmt: skip
    monkey = Monkey(job, seed, deck=deck, every=(3, 10), marks=marks)
    found = chaos(monkey, many, events)
    assert monkey.done["kill_driver"] == 2 and monkey.done["second_driver"] == 1
    assert all(monkey.done[kind] for kind in deck), monkey.done
    assert found["died_at_work"] >= 3 and found["expired"] and found["late_writer"], found


def test_a_small_job_survives_what_breaks_it(tmp_path: Path, machines: Bed, few: Undisturbed) -> None:
    events = tmp_path / "events.jsonl"
    sabotage(machines, events, pace_s=0.3, step_s=0.6)
    job = Job(machines, tmp_path, run_words(few.data, few.weights, tmp_path / "labels"), few.shards)
    marks = [(0.2, "second"), (0.5, "driver")]
    deck = {"kill_worker": 2, "stop_worker": 1, "kill_leases": 1, "kill_raylet": 1}
    monkey = Monkey(job, 0, deck=deck, every=(1, 3), marks=marks)
    found = chaos(monkey, few, events)
    assert monkey.done["kill_driver"] == 1 and monkey.done["second_driver"] == 1
    assert found["died_at_work"] and monkey.done["kill_leases"], found


@pytest.mark.slow
def test_machines_come_and_go(tmp_path: Path, machines: Bed, few: Undisturbed) -> None:
    """One that joins gets work; one that leaves in order and one that is lost take nothing with them."""
    heal(machines)
    events = tmp_path / "events.jsonl"
    sabotage(machines, events, pace_s=1.5, step_s=0.1)
    job = Job(machines, tmp_path, run_words(few.data, few.weights, tmp_path / "labels"), few.shards)
    stop_ray(machines, "node2")
    try:
        job.start("head")
        wait_for(lambda: job.done() >= 2, "two shards", TIMEOUT_S)
        assert at_work(events) <= {"head", "node1"}
        machines.start_ray("node2", CPUS[2])
        wait_for(lambda: "node2" in at_work(events), "work on node2", TIMEOUT_S)
        stop_ray(machines, "node1")
        done = job.done()
        wait_for(lambda: job.done() > done, "another shard", TIMEOUT_S)
        machines.machines["node2"].kill()
        assert job.done() < few.shards, "the job was over too soon"
        assert job.drivers["head"].wait(TIMEOUT_S) == 0
        wait_for(lambda: not workers_left(machines), "end of the workers")
        check(job, few)
    finally:
        print(job.log("head").read_text())
        job.end()
        heal(machines)


def at_work(events: Path) -> set[str]:
    """The machines whose workers have been ready."""
    return {note["machine"] for note in json_lines(events) if note["kind"] == "built"}


def stop_ray(machines: Bed, name: str) -> None:
    """As who takes a machine out of the cluster does."""
    done = machines.machines[name].run("ray", "stop", "--grace-period", "10", cwd=machines.folder)
    assert done.returncode == 0, done.stderr
