"""Ranks killed by SIGKILL at random moments: after every resume each sample is consumed exactly once per pass.

The trainer here consumes batches and does what a checkpoint does: after each one the cursor, and the keys consumed so
far, as weights would hold them, replace what was saved before, in one atomic file. Moments are drawn from a seed: a
number of further batches seen on disk, then a delay up to the length of some batches, so that it dies while starting,
reading, decoding, handing out, or writing the file.
"""

from __future__ import annotations

import json
import multiprocessing
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from signal import SIGKILL
from typing import Any

import pytest
import torch

from cluster import storage
from dataio.loader import Loader
from dataio.quarantine import Quarantine
from dataio.spec import DataSpec, Perturbation, RoleNeeds, RoleSpec

from .fakes import labelled, shards_of, write_dataset

SEED, PASSES = 7, 3
BATCH, LANES = 3, 3
SIZES = (21, 1, 14, 25)  # 61 samples: 21 batches to a pass, the last with one sample
STEP_S = 0.01  # a training step
BAD = "s2_004"  # does not decode: consumed like any other, with weight 0
NEEDS = {"r": RoleNeeds()}
SPAWN = multiprocessing.get_context("spawn")
STARTING_S = 5.0  # about what a process takes before its first batch: imports, and the building of a pipeline


def spec(folder: str) -> DataSpec:
    role = RoleSpec(datasets=(folder,), batch=BATCH, lanes=LANES, perturbation=Perturbation(jitter_p=0.5))
    return DataSpec(roles={"r": role}, input_size=28, shuffle_window=8, prefetch=4, max_bad_fraction=1.0)


@pytest.fixture
def dataset(tmp_path: Path) -> str:
    shards = shards_of(SIZES, lambda seed: labelled(seed, 30, 40))
    shards[2][BAD] = {**shards[2][BAD], "jpg": b"no picture"}
    return write_dataset(tmp_path / "d", shards)


def every_key() -> set[str]:
    return {key for shard in shards_of(SIZES, lambda seed: {}) for key in shard}


@dataclass(frozen=True)
class Saved:
    """What a rank's file holds: the cursor behind each of its batches, and what was consumed in it (key, weight)."""

    cursors: list[dict[str, int]]
    consumed: list[list[tuple[str, float]]]

    @classmethod
    def read(cls, path: Path) -> Saved:
        content = json.loads(path.read_text()) if path.exists() else {"cursors": [], "consumed": []}
        return cls(content["cursors"], [[(key, weight) for key, weight in batch] for batch in content["consumed"]])

    def keys(self) -> Counter[str]:
        return Counter(key for batch in self.consumed for key, _ in batch)

    def first(self, batches: int) -> Saved:
        return Saved(self.cursors[:batches], self.consumed[:batches])


def train(folder: str, out: str, rank: int, world_size: int) -> None:
    """The tiny trainer of one rank: goes on from its file until the passes are over; then waits for its end."""
    train_all(folder, out, world_size, range(rank, rank + 1))
    time.sleep(3600)  # a machine that stalls may let it come so far before it is killed


def train_all(folder: str, out: str, world_size: int, ranks: Iterable[int]) -> None:
    """The trainers of `ranks`, one after the other: no rank waits for another."""
    for rank in ranks:
        _train(folder, out, rank, world_size)


def _train(folder: str, out: str, rank: int, world_size: int) -> None:
    torch.set_num_threads(1)
    tempfile.tempdir = out  # who is killed cannot remove what DALI has there
    path = Path(out) / f"rank-{rank}.json"
    saved = Saved.read(path)
    cursor = saved.cursors[-1] if saved.cursors else {"r": 0}
    quarantine = Quarantine(f"{out}/quarantine-{rank}.jsonl", 1.0)
    with Loader(
        spec(folder), NEEDS, views=("student",), seed=SEED, rank=rank, world_size=world_size, cursor=cursor,
        quarantine=quarantine,
    ) as loader:  # fmt: skip
        while cursor["r"] < PASSES * loader.samples("r"):
            batch = next(loader)
            time.sleep(STEP_S)
            cursor = dict(batch.cursor)
            saved.cursors.append(cursor)
            keys_and_weights = zip(batch.keys, batch.weight_B.tolist(), strict=True)
            saved.consumed.append([(key, weight) for key, weight in keys_and_weights if key])
            storage.atomic_write(str(path), json.dumps({"cursors": saved.cursors, "consumed": saved.consumed}))


@pytest.fixture
def started() -> Iterator[list[BaseProcess]]:
    """Processes of the test, none of which outlives it."""
    processes: list[BaseProcess] = []
    yield processes
    for process in processes:
        process.kill()
        process.join()


def start(started: list[BaseProcess], target: Callable[..., None], *args: Any) -> BaseProcess:
    process = SPAWN.Process(target=target, args=args)
    process.start()
    started.append(process)
    return process


def wait_for_batches(process: BaseProcess, path: Path, count: int, patience_s: float = 120) -> None:
    ends = time.monotonic() + patience_s
    while len(Saved.read(path).cursors) < count:
        assert process.is_alive(), f"ended by itself with {process.exitcode}"
        assert time.monotonic() < ends, f"no {count} batches in {patience_s} s"
        time.sleep(0.002)


def kill(process: BaseProcess) -> None:
    assert process.is_alive()
    process.kill()
    process.join()
    assert process.exitcode == -SIGKILL


def assert_exact(consumed: Counter[str], weights: dict[str, set[float]], folder: Path) -> None:
    assert consumed == dict.fromkeys(every_key(), PASSES)
    assert weights == {key: {0.0 if key == BAD else 1.0} for key in every_key()}
    lines = [json.loads(line) for path in folder.glob("quarantine-*.jsonl") for line in path.read_text().splitlines()]
    assert {(line["key"], line["reason"]) for line in lines} == {(BAD, "bad_image")}


def weights_of(*saved: Saved) -> dict[str, set[float]]:
    found: dict[str, set[float]] = {}
    for batch in (batch for one in saved for batch in one.consumed):
        for key, weight in batch:
            found.setdefault(key, set()).add(weight)
    return found


@pytest.mark.parametrize(
    ("kills", "seed"),
    [(2, 0), pytest.param(20, 1, marks=[pytest.mark.slow, pytest.mark.timeout(1500)])],
)
def test_a_killed_rank_goes_on_without_losing_or_repeating(
    tmp_path: Path, dataset: str, started: list[BaseProcess], kills: int, seed: int
) -> None:
    draw = random.Random(seed)
    path = tmp_path / "rank-0.json"
    total = PASSES * -(-sum(SIZES) // BATCH)
    while_starting = set(draw.sample(range(kills), kills // 5))
    batches = [0]
    for number in range(kills):
        process = start(started, train, dataset, str(tmp_path), 0, 1)
        if number in while_starting:
            time.sleep(draw.uniform(0, STARTING_S))
        else:  # one in each of as many stretches of the run
            moment = max(batches[-1] + 1, int(total * (number + draw.random()) / kills))
            wait_for_batches(process, path, min(moment, total))
            time.sleep(draw.uniform(0, 3 * STEP_S))
        kill(process)
        batches.append(len(Saved.read(path).cursors))
    assert len(set(batches)) > kills / 2, f"killed at the same place: {batches}"
    process = start(started, train_all, dataset, str(tmp_path), 1, [0])
    process.join(120)
    assert process.exitcode == 0
    saved = Saved.read(path)
    assert len(saved.cursors) == total
    assert_exact(saved.keys(), weights_of(saved), tmp_path)
    assert len((tmp_path / "quarantine-0.jsonl").read_text().splitlines()) == 1, "named once over all lives"


def test_two_killed_ranks_go_on_as_three(tmp_path: Path, dataset: str, started: list[BaseProcess]) -> None:
    """Killed together, they have come to different batches: what both have saved counts, as with one checkpoint."""
    draw = random.Random(3)
    first, second = tmp_path / "two", tmp_path / "three"
    first.mkdir()
    second.mkdir()
    pair = [start(started, train, dataset, str(first), rank, 2) for rank in range(2)]
    wait_for_batches(pair[0], first / "rank-0.json", 10 + draw.randrange(8))
    wait_for_batches(pair[1], first / "rank-1.json", 8)
    time.sleep(draw.uniform(0, 3 * STEP_S))
    for process in pair:
        kill(process)
    before = [Saved.read(first / f"rank-{rank}.json") for rank in range(2)]
    both = min(len(saved.cursors) for saved in before)
    assert both >= 8
    before = [saved.first(both) for saved in before]
    assert before[0].cursors == before[1].cursors
    for rank in range(3):  # no keys: each of the three has its own share, from here on
        state = {"cursors": before[0].cursors[-1:], "consumed": []}
        storage.atomic_write(str(second / f"rank-{rank}.json"), json.dumps(state))
    three = start(started, train_all, dataset, str(second), 3, range(3))
    three.join(120)
    assert three.exitcode == 0
    behind = [Saved.read(second / f"rank-{rank}.json") for rank in range(3)]
    assert all(saved.keys() for saved in behind), "each of the three has served"
    consumed: Counter[str] = sum((saved.keys() for saved in [*before, *behind]), Counter())
    assert_exact(consumed, weights_of(*before, *behind), second)
