"""`make soak`: runs on several machines, one after another, with random faults, for half an hour.

A minute lies between two faults, and the start of the ranks after each.

Every run must end SUCCEEDED with the bits and the losses of one that was left alone. Prints a line for each fault and
each run, and a table at the end; exit status 1 when a run was not as it should be, or too few faults came to pass.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil

from launcher.jobs import CANCELLED, FAILED, SUCCEEDED, UNFINISHED
from tests.bed import Bed, available, wait_for
from tests.end_to_end.cli import TIMEOUT_S, steps_done, succeed, write_config
from tests.end_to_end.conftest import World, make_sets
from tests.end_to_end.nodes import WITH_RAY, fathom, losses, run_values, same_weights, told, with_ranks
from tests.end_to_end.test_faults import FATAL, FAULTS, SABOTEUR

STEPS = 500
ENDS = {SUCCEEDED: "SUCCEEDED", FAILED: "FAILED", CANCELLED: "CANCELLED"}  # exit status of `jobs wait`


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--every", type=float, default=60.0, metavar="SECONDS", help="between two faults")
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()


def soak(arguments: argparse.Namespace, folder: Path) -> bool:
    """Whether all was well."""
    world = World(folder / "world")
    make_sets(world)
    folder = folder / "work"  # what is shipped must not have the machines' home in it
    folder.mkdir()
    values = run_values(world, steps=STEPS, log_every=10)
    values["recovery"] = {**values["recovery"], "max_failures": 20}  # a busy machine may need longer than `--every`
    write_config(folder / "teacher.yaml", values)
    began = time.monotonic()
    succeed("train", "teacher.yaml", cwd=folder)
    alone_s = time.monotonic() - began
    draw, ends = random.Random(arguments.seed), time.monotonic() + 60 * arguments.minutes
    faults, runs, well = Counter[str](), list[float](), True
    with Bed(folder.parent / "bed", cpus=[1, 1, 1]) as machines:
        (machines.site / "sitecustomize.py").write_text(SABOTEUR.format(order=f"{machines.folder}/raise"))
        while time.monotonic() < ends:
            name = f"run{len(runs)}"
            began = time.monotonic()
            write_config(folder / "teacher.yaml", values | {"name": name})
            done = fathom(machines, "submit", "train", "teacher.yaml", cwd=folder)
            assert done.status == 0, done.err
            state = disturb(machines, folder, name, draw, arguments.every, faults)
            runs.append(time.monotonic() - began)
            same = state == "SUCCEEDED" and same_weights(folder / "runs" / name, folder / "runs" / "teacher")
            same = same and losses(folder / "runs" / name) == losses(folder / "runs" / "teacher")
            attempts = sum(line["event"] == "started" for line in told(folder / "runs" / name))
            verdict = "as one left alone" if same else "NOT as one left alone"
            print(f"{name}: {state}, {verdict}, {attempts} attempts, {runs[-1]:.0f} s", flush=True)
            if not same:
                well = False
                print(fathom(machines, "jobs", "logs", name, cwd=folder).out, flush=True)
    print(f"\nalone, on one machine: {alone_s:.0f} s; {len(runs)} runs: {', '.join(f'{s:.0f}' for s in runs)} s\n")
    print("| fault | times |\n|---|---|")
    for fault, count in sorted(faults.items()):
        print(f"| {fault} | {count} |")
    enough = faults.total() >= arguments.minutes * 60 / arguments.every / 4  # a start takes half a minute
    print(f"\n{faults.total()} faults{'' if enough else ': too few'}", flush=True)
    return well and enough


def disturb(
    machines: Bed, folder: Path, name: str, draw: random.Random, every_s: float, faults: Counter[str]
) -> str:
    """A fault every `every_s` seconds until the job has ended; returns its state."""
    run, broken, unanswered = folder / "runs" / name, False, 0
    wait_for(lambda: steps_done(run) >= 1, "the first step", TIMEOUT_S)
    wait_s = every_s
    while True:
        ends = time.monotonic() + wait_s
        while time.monotonic() < ends:
            done = fathom(machines, "jobs", "wait", name, "--timeout", "3", cwd=folder)
            if done.status in ENDS:
                return ENDS[done.status]
            unanswered = 0 if done.status == UNFINISHED else unanswered + 1
            if unanswered > 10:
                raise SystemExit(f"error: {name}: {done.err}")
        wait_s = every_s
        if broken:
            mend(machines)
            broken = False
        if len(with_ranks(machines)) < 2 or with_ranks(machines) == ["head"]:
            wait_s = 5.0  # it is starting again
            continue
        fault = draw.choice(list(FAULTS))
        try:
            fault(machines, folder)
        except (psutil.NoSuchProcess, ValueError, IndexError):  # whom it was meant for has just ended
            continue
        print(f"  {name}, step {steps_done(run)}: {fault.__name__}", flush=True)
        faults[fault.__name__] += 1
        broken = any(word in fault.__name__ for word in FATAL)


def mend(machines: Bed) -> None:
    """New machines in the place of those on which Ray no longer answers."""
    for name in WITH_RAY[1:]:
        machine = machines.machines[name]
        if not machine.first or not machine.processes("raylet/raylet") or name in machines.cuts:
            machines.replace(name)


def main() -> int:
    arguments = parse()
    if reason := available():
        print(f"error: {reason}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="fathom-soak-") as folder:
        return 0 if soak(arguments, Path(folder)) else 1


if __name__ == "__main__":
    sys.exit(main())
