"""What directing a large run costs: watchdog, journal and the plan of samples, driven with simulated ranks and shards.

    .venv/bin/python benchmarks/bench_control.py --ranks 1000 --shards 100000

Every rank says where it is as often as a real one would (a word every ranks / 200 seconds, at least two a second), and
the driver looks five times a second. A rank of the plan serves its own lane of a step a second; the journal gets an
entry a second. No cluster runs: the figures are the processor time of our own code, without Ray's. Exit status 1 when
all together take more than 5 % of a core.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import command_line
from cluster.watchdog import Beat, Watchdog
from dataio.plan import RolePlan
from trainer.folder import state_of
from trainer.journal import Journal

MOST = 0.05  # of a core


def watching(ranks: int, seconds: int) -> tuple[float, str]:
    """Processor seconds for each second that `ranks` ranks are watched."""
    dog = Watchdog()
    every_s = max(0.5, ranks / 200)
    heard = dict.fromkeys(range(ranks), -every_s)
    began, said = time.process_time(), 0
    for tick in range(seconds * 5):
        now = tick / 5
        step = int(now)
        for rank in range(ranks):
            if now - heard[rank] >= every_s:
                heard[rank] = now
                said += 1
                dog.hear(rank, Beat(step=step, phase="step", count=2 * step + 1), now, {"data": 0.1, "step": 0.9})
        if dog.stuck(now) is not None:
            raise AssertionError("a group that moves is not stuck")
    return (time.process_time() - began) / seconds, f"{said / seconds:.0f} words and 5 looks a second"


def journalling(entries: int) -> tuple[float, str]:
    """Processor seconds for an entry a second, and what reading a long journal takes."""
    with tempfile.TemporaryDirectory() as folder:
        journal = Journal(folder)
        began = time.process_time()
        for step in range(entries):
            journal.write("checkpoint", step=step, path=f"step_{step:08d}", stall_seconds=0.1, seconds=1.0)
        written = (time.process_time() - began) / entries
        began = time.process_time()
        state_of(journal.read())
        return written, f"an entry a second; all {entries} are read in {time.process_time() - began:.2f} s"


def planning(ranks: int, shards: int, steps: int) -> tuple[float, str]:
    """Processor seconds for what one rank asks its plan at a step, the first shuffle of all shards not counted."""
    sizes = [600 - shard % 7 for shard in range(shards)]
    batch = 8 * ranks
    began = time.process_time()
    plan = RolePlan("unlabelled", sizes, batch=batch, lanes=ranks, window=16384, seed=1)
    lane, consumed, shown = ranks // 2, 0, 0
    plan.slots(consumed, lane)
    first = time.process_time() - began
    began = time.process_time()
    for _ in range(steps):
        shown += sum(slot is not None for slot in plan.slots(consumed, lane))
        consumed = plan.advance(consumed)
    if shown != 8 * steps:
        raise AssertionError(f"{shown} samples of {8 * steps}")
    spent = (time.process_time() - began) / steps
    of = f"{plan.samples} samples in {shards} shards; the first step of a pass takes {first:.2f} s"
    return spent, f"a step a second; {of}"


def peak_mib() -> float:
    """The process's memory at its largest."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def parse() -> argparse.Namespace:
    """The command line."""
    parser = command_line(__doc__)
    parser.add_argument("--ranks", type=int, default=1000)
    parser.add_argument("--seconds", type=int, default=60, help="of the simulated run")
    parser.add_argument("--shards", type=int, default=100_000)
    parser.add_argument("--steps", type=int, default=500, help="of the plan of samples")
    parser.add_argument("--entries", type=int, default=10_000, help="of the journal")
    return parser.parse_args()


def main() -> int:
    """Print the table; the exit status."""
    arguments, imported = parse(), peak_mib()
    print("| what | share of a core | of |\n| --- | --- | --- |")
    found = {
        f"watching {arguments.ranks} ranks": watching(arguments.ranks, arguments.seconds),
        "the journal": journalling(arguments.entries),
        "a rank's plan": planning(arguments.ranks, arguments.shards, arguments.steps),
    }
    for what, (share, how) in found.items():
        print(f"| {what} | {100 * share:.3f} % | {how} |")
    share = sum(share for share, _ in found.values())
    print(f"| all together | {100 * share:.3f} % | {100 * MOST:g} % at most |")
    print(f"| memory of all that | {peak_mib() - imported:.0f} MiB | beside {imported:.0f} MiB of imports |")
    if share > MOST:
        print(f"error: {100 * share:.1f} % of a core is more than {100 * MOST:g} %", file=sys.stderr)
    return int(share > MOST)


if __name__ == "__main__":
    sys.exit(main())
