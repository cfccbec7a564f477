"""A labelling job on several machines: its data, drivers and folder, and what happened on the way."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from cluster.claims import read_claims
from dataio.labels import LabelStore
from tests.bed import Bed
from tests.dataio.fakes import unlabelled, write_dataset
from tests.end_to_end.cli import REPOSITORY, json_lines

LEASE_S = 5.0
INPUT = 28
SIZES = ((40, 44), (36, 52), (48, 40), (40, 44))
CPUS = (2, 1, 1)
WITH_RAY = ("head", "node1", "node2")
WORKER, AT_WORK, LEASES = "ray::LeasedWorker", "ray::LeasedWorker.work", "ray::LeaseActor"
DRIVER = "launcher.cli label run"


def make_data(folder: Path, shards: int) -> str:
    """Shards of three to five small photographs; every ninth image cannot be decoded or is none."""
    made, number = [], 0
    for shard in range(shards):
        samples = {}
        for place in range(3 + shard % 3):
            members = unlabelled(number, *SIZES[number % len(SIZES)])
            if number % 9 == 4:
                members = {"jpg": members["jpg"][:-300]}  # its header is whole: only decoding tells
            elif number % 27 == 8:
                members = {"jpg": b"no image"} if number % 2 else {"txt": b"no image either"}
            samples[f"s{shard:04d}_{place}"] = members
            number += 1
        made.append(samples)
    return write_dataset(folder, made, with_depth=False)


def make_weights(folder: Path) -> str:
    """A teacher of random weights."""
    import torch

    from model import DepthAnything

    torch.manual_seed(5)
    DepthAnything.from_preset("tiny").save_pretrained(str(folder))
    return str(folder)


def run_words(data: str, weights: str, out: Path) -> list[str]:
    """`fathom label run` and what decides its labels."""
    return ["label", "run", data, "--weights", weights, "--input-size", str(INPUT), "--batch", "2", "--out", str(out)]


def contents(folder: Path) -> dict[str, Any]:
    """All of a label folder that two runs over the same input agree in, by path; also what should not be there."""
    found: dict[str, Any] = {}
    store = LabelStore.open(str(folder))
    for path in sorted(each for each in folder.rglob("*") if not each.is_dir()):
        name = str(path.relative_to(folder))
        entry = store.entry(path.stem) if name.startswith("ledger/") and path.suffix == ".json" else None
        found[name] = entry.content() if entry else path.read_bytes()
    return found


def differences(folder: Path, other: Path) -> list[str]:
    """What of one label folder is not as in the other; empty when they are equal."""
    mine, theirs = contents(folder), contents(other)
    return [
        f"{name}: {'missing' if name not in mine else 'left over' if name not in theirs else 'other content'}"
        for name in sorted(mine.keys() | theirs.keys())
        if name not in mine or name not in theirs or mine[name] != theirs[name]
    ]


def sabotage(bed: Bed, events: Path, pace_s: float, step_s: float) -> None:
    """Put the saboteur into every Python process that starts on the bed's machines from now on."""
    script = Path(__file__).with_name("label_saboteur.py")
    (bed.site / "sitecustomize.py").write_text(
        f"import runpy\nrunpy.run_path({str(script)!r})['install']({str(events)!r}, {pace_s}, {step_s})\n"
    )


@dataclass
class Job:
    """One job on the bed, by any number of drivers. Their output goes to files in `folder`."""

    bed: Bed
    folder: Path
    words: Sequence[str]
    shards: int
    drivers: dict[str, subprocess.Popen[str]] = field(default_factory=dict)  # machine -> `nsenter` around it
    started: dict[str, float] = field(default_factory=dict)

    def start(self, name: str) -> None:
        """A driver on a machine of the cluster."""
        command = [sys.executable, "-m", "launcher.cli", *self.words, "--address", self.bed.address, "--lease"]
        script = 'exec "$@" >>"$0" 2>&1'
        self.started[name] = time.time()
        self.drivers[name] = self.bed.machines[name].start(
            "bash", "-c", script, str(self.log(name)), *command, str(LEASE_S), cwd=self.folder,
            env={"PYTHONPATH": f"{REPOSITORY}:{self.bed.site}"},
        )  # fmt: skip

    def log(self, name: str) -> Path:
        return self.folder / f"driver-{name}.log"

    def done(self) -> int:
        """Ledger entries so far."""
        return sum(1 for _ in self.folder.glob("labels/*/ledger/*.json"))

    def at_work(self) -> set[str]:
        """The machines whose drivers say that they are at work: one that has not got so far ends when it is cut off."""
        claims = [claim for each in self.folder.glob("labels/*/leases") for claim in read_claims(str(each))]
        return {claim.host for claim in claims if claim.born > self.started.get(claim.host, 0.0)}

    @property
    def labels(self) -> Path:
        """The sidecar's folder."""
        (found,) = (self.folder / "labels").iterdir()
        return found

    def end(self) -> None:
        """Kill what still runs of it."""
        for name, driver in self.drivers.items():
            for process in self.bed.machines[name].processes(DRIVER):
                with contextlib.suppress(psutil.Error):
                    process.kill()
            driver.kill()
            driver.communicate()


def heal(bed: Bed) -> None:
    """New machines for those that an earlier test has left without Ray."""
    for name in WITH_RAY:
        if not bed.machines[name].processes("raylet/raylet"):
            bed.replace(name)


def restore(bed: Bed, name: str, anew: bool) -> None:
    """Ray on a machine whose raylet is dead."""
    if anew:
        bed.replace(name)
        return
    for process in bed.machines[name].processes("ray"):
        with contextlib.suppress(psutil.Error):
            process.kill()
    bed.start_ray(name, CPUS[WITH_RAY.index(name)])


def provoked(events: Path, late: Mapping[tuple[str, int], float]) -> Counter[str]:
    """What the faults have led to, by the saboteur's notes. `late`: machine and process there of who was stopped beyond
    his lease -> when he went on."""
    found: Counter[str] = Counter()
    late = dict(late)
    for note in json_lines(events):
        kind = note["kind"]
        if kind == "commit":
            found[note["outcome"]] += 1
            found["differs"] += bool(note["differs"])
        elif kind == "raised":
            found[note["error"].split(":")[0].lower()] += 1
        elif kind == "expired":
            found["expired"] += note["number"]
        elif kind == "buried":
            found["died_at_work"] += bool(note["items"])
        elif kind == "lease":
            found["leases"] += 1
            found["speculative"] += bool(note["speculative"])
        else:
            found[kind] += 1
        who = (note["machine"], note["pid"])
        if kind in ("commit", "raised") and who in late and note["at"] >= late[who]:
            del late[who]
            found["late_writer"] += 1
            found[f"late_{note.get('outcome', 'raised')}"] += 1
    return found


def workers_left(bed: Bed) -> list[psutil.Process]:
    """Workers and lease actors that still run on any machine."""
    return [
        process
        for name in WITH_RAY
        for word in (WORKER, LEASES)
        for process in bed.machines[name].processes(word)
        if process.status() != psutil.STATUS_ZOMBIE
    ]


def show(found: Mapping[str, int]) -> str:
    return json.dumps(dict(sorted(found.items())))
