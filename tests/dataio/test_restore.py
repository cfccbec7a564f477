"""A run that was saved and goes on in a new process, on any number of ranks, gives the bytes of one never interrupted.

The matrix is {middle of a shard, end of a shard, end of a pass} x {1, 2, 3, 4 ranks -> 1, 2, 3, 4 ranks} x {samples
shuffled or not} x {with or without pseudo-labels}. Shuffling is "off" with `shuffle_window` 1: a shard's samples then
come in the order of the file. The order of the shards is drawn anew for every pass even then; that has no switch.

One process serves the ranks one after the other; the process that restores never is the one that saved.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dataio.loader import Loader
from dataio.plan import RolePlan
from dataio.quarantine import Quarantine
from dataio.spec import DataSpec, Perturbation, RoleNeeds, RoleSpec
from dataio.stream import RoleStream

from .fakes import labelled, shards_of, unlabelled, write_dataset, write_labels

STRONG = Perturbation(jitter_p=0.8, grayscale_p=0.2, blur_p=0.5, cutmix_p=0.7)
SEED = 5
SIZES = (20, 9, 1, 17)  # of the unlabelled shards: 47 samples, whose passes of 4 batches end with a partial one
LANES, BATCH = 4, {"labelled": 4, "unlabelled": 12}  # three of a lane, so that CutMix has a choice
GLOBAL_BATCH = sum(BATCH.values())
AFTER = 5  # batches compared behind the restart
RANKS = (1, 2, 3, 4)
PLACES = ("middle of a shard", "end of a shard", "end of a pass")

Row = tuple[str, dict[str, str]]  # key, SHA-256 of each part


@dataclass(frozen=True)
class Setup:
    """One way of feeding the run: a corner of the matrix, or one of the cases besides."""

    window: int
    sidecar: bool
    weights: tuple[float, ...] = ()
    skip: tuple[tuple[int, int], ...] = ()

    def data(self, root: str) -> DataSpec:
        folders = ("u", "v") if self.weights else ("u",)
        roles = {
            "labelled": RoleSpec(datasets=(f"{root}/l",), batch=BATCH["labelled"], lanes=LANES),
            "unlabelled": RoleSpec(
                datasets=tuple(f"{root}/{name}" for name in folders),
                labels=tuple(f"{root}/labels_{name}" for name in folders) if self.sidecar else (),
                weights=self.weights,
                batch=BATCH["unlabelled"],
                lanes=LANES,
                perturbation=STRONG,
            ),
        }
        return DataSpec(roles=roles, input_size=28, shuffle_window=self.window, skip_samples=self.skip)

    def needs(self) -> dict[str, RoleNeeds]:
        pseudo = RoleNeeds(sidecar=True) if self.sidecar else RoleNeeds(target="none")
        return {"labelled": RoleNeeds(), "unlabelled": pseudo}


SETUPS = {
    f"{'shuffled' if window > 1 else 'in order'}, {'with' if sidecar else 'without'} labels": Setup(window, sidecar)
    for window in (16, 1)
    for sidecar in (True, False)
}
MIXED = Setup(window=16, sidecar=True, weights=(1.0, 3.0))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Datasets with a sample that does not decode and a label that failed."""
    folder = tmp_path_factory.mktemp("restore")

    def small(make: Callable[[int, int, int], dict[str, bytes]]) -> Callable[[int], dict[str, bytes]]:
        return lambda seed: make(seed, 30, 40)

    write_dataset(folder / "l", shards_of([6, 5], small(labelled), "l"))
    for name, sizes in (("u", SIZES), ("v", (7, 6))):
        shards = shards_of(sizes, small(unlabelled), name)
        shards[0][f"{name}0_002"] = {"jpg": shards[0][f"{name}0_002"]["jpg"][:300]}
        write_dataset(folder / name, shards, with_depth=False)
        write_labels(folder / f"labels_{name}", shards, fail=[f"{name}1_003"])
    return str(folder)


@dataclass(frozen=True)
class Ran:
    """What a number of ranks handed out: the rows of every global batch in order, and the state behind it."""

    batches: list[list[Row]]
    cursors: list[dict[str, int]]
    description: dict[str, Any]
    process: int


def run(root: str, setup: Setup, ranks: int, count: int, saved: Mapping[str, Any] | None = None) -> Ran:
    """The next `count` global batches behind the `saved` state, from `ranks` ranks one after the other."""
    torch.set_num_threads(1)
    data, parts, cursors, description = setup.data(root), [], [], {}
    for rank in range(ranks):
        with Loader(
            data,
            setup.needs(),
            views=("student", "clean"),
            seed=SEED,
            rank=rank,
            world_size=ranks,
            cursor=saved["cursor"] if saved else None,
            quarantine=Quarantine(None, 1.0),
        ) as loader:
            description = json.loads(json.dumps(loader.describe()))
            assert saved is None or description == saved["description"]
            batches = [next(loader) for _ in range(count)]
        parts.append([{role: _rows(batch, batch.rows(role)) for role, _ in batch.roles} for batch in batches])
        cursors.append([dict(batch.cursor) for batch in batches])
    assert all(other == cursors[0] for other in cursors), "the state is the same on every rank"
    together = [_together([part[number] for part in parts]) for number in range(count)]
    return Ran(together, cursors[0], description, os.getpid())


def _rows(batch: Any, rows: slice) -> list[Row]:
    tensors = {
        **{f"view {name}": view for name, view in batch.views.items()},
        **{f"target {name}": target.value_BHW for name, target in batch.targets.items()},
        "region": batch.region_BHW,
        "weight": batch.weight_B,
    }
    return [
        (batch.keys[i], {name: hashlib.sha256(t[i].numpy().tobytes()).hexdigest() for name, t in tensors.items()})
        for i in range(*rows.indices(len(batch)))
    ]


def _together(parts: list[dict[str, list[Row]]]) -> list[Row]:
    """One global batch: lane l is the (l // ranks)-th of rank l mod ranks."""
    rows: list[Row] = []
    for role in sorted(BATCH):
        share = BATCH[role] // LANES
        for lane in range(LANES):
            start = lane // len(parts) * share
            rows += parts[lane % len(parts)][role][start : start + share]
    return rows


def batches_before(place: str, epoch: int = 0) -> int:
    """How many global batches lie before the first such place of a pass over the photographs."""
    # with a window of 1 a position says which shard is read there; any other window has the same shards there
    plan = RolePlan("unlabelled", SIZES, batch=BATCH["unlabelled"], lanes=LANES, window=1, seed=SEED)
    share, per_pass = BATCH["unlabelled"] // LANES, plan.number(plan.samples)
    for number in range(1, per_pass - 1):
        at_end = []
        for lane in range(LANES):
            at = plan.lane_span(lane)[0] + number * share
            before, behind = plan.order(epoch, at - 1, at + 1)
            at_end.append(before.shard != behind.shard)
        if any(at_end) if place == "end of a shard" else place == "middle of a shard" and not any(at_end):
            return epoch * per_pass + number
    assert place == "end of a pass"
    return (epoch + 1) * per_pass


def test_the_places_are_what_they_are_called() -> None:
    numbers = [batches_before(place) for place in PLACES]
    assert sorted(set(numbers)) == sorted(numbers) and numbers[2] == 4
    assert [batches_before(place, 1) - 4 for place in PLACES] != numbers, "each pass has its own order of shards"


def one_process(root: str) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_temporary_files_in, initargs=(root,))


def _temporary_files_in(folder: str) -> None:
    tempfile.tempdir = folder  # DALI removes its own at the interpreter's exit, which a child process does not have


class Straight:
    """Runs without an interruption, each made once, in a process of its own; and what they save on the way."""

    def __init__(self, root: str, pool: ProcessPoolExecutor) -> None:
        self._root, self._pool = root, pool
        self._ran: dict[tuple[Setup, int], Ran] = {}

    def run(self, setup: Setup, ranks: int) -> Ran:
        if (setup, ranks) not in self._ran:
            count = batches_before("end of a pass", 1) + AFTER
            self._ran[setup, ranks] = self._pool.submit(run, self._root, setup, ranks, count).result()
        return self._ran[setup, ranks]

    def saved(self, setup: Setup, ranks: int, number: int) -> Mapping[str, Any]:
        """What a checkpoint holds behind the first `number` batches, after a way through a file."""
        ran = self.run(setup, ranks)
        state: Mapping[str, Any] = json.loads(
            json.dumps({"cursor": ran.cursors[number - 1], "description": ran.description})
        )
        return state


@pytest.fixture(scope="module")
def straight(root: str) -> Iterator[Straight]:
    with one_process(root) as pool:
        yield Straight(root, pool)


@pytest.fixture(scope="module")
def restoring(root: str) -> Iterator[ProcessPoolExecutor]:
    with one_process(root) as pool:
        yield pool


@pytest.fixture(scope="module")
def restoring_again(root: str) -> Iterator[ProcessPoolExecutor]:
    with one_process(root) as pool:
        yield pool


def assert_same(found: Sequence[list[Row]], expected: Sequence[list[Row]]) -> None:
    """Row by row and part by part, so that a difference names itself."""
    assert len(found) == len(expected)
    for number, (batch, other) in enumerate(zip(found, expected, strict=True)):
        assert [key for key, _ in batch] == [key for key, _ in other], f"batch {number} behind the restart"
        for (key, parts), (_, others) in zip(batch, other, strict=True):
            assert parts.keys() == others.keys()
            different = [name for name, digest in parts.items() if digest != others[name]]
            assert not different, f"batch {number} behind the restart, {key}: {different}"


def check(
    straight: Straight, root: str, pool: ProcessPoolExecutor, setup: Setup, number: int, before: int, after: int
) -> None:
    """Saved on `before` ranks behind `number` batches, restored on `after`: the next batches are those of one rank."""
    saved = straight.saved(setup, before, number)
    restored = pool.submit(run, root, setup, after, AFTER, saved).result()
    whole = straight.run(setup, 1)
    assert len({restored.process, whole.process, os.getpid()}) == 3
    assert_same(restored.batches, whole.batches[number : number + AFTER])
    assert restored.cursors == whole.cursors[number : number + AFTER]


PAIRS = list(itertools.product(RANKS, RANKS))
CORNERS = list(itertools.product(SETUPS, PLACES))
# three pairs of ranks for each of the twelve corners; every one of the sixteen pairs is met, at different corners
FEW = [(*corner, *PAIRS[(3 * i + j) % len(PAIRS)]) for i, corner in enumerate(CORNERS) for j in range(3)]


def test_the_few_hold_every_pair_of_ranks() -> None:
    assert {case[2:] for case in FEW} == set(PAIRS)


@pytest.mark.parametrize(("setup", "place", "before", "after"), FEW)
def test_goes_on_byte_for_byte(
    straight: Straight, restoring: ProcessPoolExecutor, root: str, setup: str, place: str, before: int, after: int
) -> None:
    check(straight, root, restoring, SETUPS[setup], batches_before(place), before, after)


@pytest.mark.slow
@pytest.mark.parametrize("before", RANKS)
@pytest.mark.parametrize("setup", SETUPS)
def test_goes_on_byte_for_byte_everywhere(root: str, setup: str, before: int) -> None:
    """The whole matrix, at the places of two passes: 24 restarts here."""
    with one_process(root) as saving, one_process(root) as pool:
        straight = Straight(root, saving)
        for place, epoch, after in itertools.product(PLACES, (0, 1), RANKS):
            check(straight, root, pool, SETUPS[setup], batches_before(place, epoch), before, after)


def test_what_is_compared_is_worth_comparing(straight: Straight) -> None:
    """Views differ, rows are mixed, bad ones are blank, a pass ends with absent slots, and order is as it is called."""
    for name, setup in SETUPS.items():
        whole = straight.run(setup, 1)
        rows = [row for batch in whole.batches for row in batch]
        blank = {parts["view clean"] for key, parts in rows if not key}
        assert len(blank) == 1 and {key for key, parts in rows if parts["view clean"] in blank} == {
            "", "u0_002", *(["u1_003"] if setup.sidecar else []),
        }  # fmt: skip
        assert len({parts["view student"] for _, parts in rows}) > 0.9 * len([key for key, _ in rows if key])
        assert sum(parts["view student"] != parts["view clean"] for _, parts in rows) > len(rows) / 3
        first_lane = [batch[i][0] for batch in whole.batches[:4] for i in (4, 5, 6) if batch[i][0]]
        by_shard = [list(group) for _, group in itertools.groupby(first_lane, key=lambda key: key[:2])]
        assert all(keys == sorted(keys) for keys in by_shard) == ("in order" in name), first_lane


@pytest.mark.parametrize(("before", "after", "number"), [(1, 3, 4), (3, 2, 8), (2, 4, 6), (4, 1, 7)])
def test_weighted_mixing_goes_on_byte_for_byte(
    straight: Straight, restoring: ProcessPoolExecutor, root: str, before: int, after: int, number: int
) -> None:
    photographs = [key for batch in straight.run(MIXED, 1).batches for key, _ in batch[BATCH["labelled"] :]]
    counts = Counter(key[0] for key in photographs if key)
    assert 2 < counts["v"] / counts["u"] < 4.5  # three to one, in a short run
    check(straight, root, restoring, MIXED, number, before, after)


@pytest.mark.parametrize(("before", "after", "again"), [(1, 3, 2), (2, 1, 4), (4, 3, 1)])
@pytest.mark.parametrize("setup", [SETUPS["shuffled, with labels"], MIXED], ids=["one dataset", "mixed"])
def test_skipped_samples_are_gone_round_after_a_restart(
    straight: Straight,
    restoring: ProcessPoolExecutor,
    restoring_again: ProcessPoolExecutor,
    root: str,
    setup: Setup,
    before: int,
    after: int,
    again: int,
) -> None:
    """Batches 3 and 5 to 7 (partial ends of a pass among them) are passed over: on restart, and on one behind it."""
    skipping = replace(setup, skip=((3 * GLOBAL_BATCH, 3 * GLOBAL_BATCH + 1), (5 * GLOBAL_BATCH + 3, 8 * GLOBAL_BATCH)))
    whole = straight.run(setup, 1)
    saved = straight.saved(setup, before, 3)  # the next one would be batch 3
    restored = restoring.submit(run, root, skipping, after, 4, saved).result()
    assert_same(restored.batches, [whole.batches[n] for n in (4, 8, 9, 10)])
    for taken, numbers in ((1, (8, 9)), (2, (9, 10))):  # saved right before a stretch, and behind it
        state = {"cursor": restored.cursors[taken - 1], "description": restored.description}
        other = restoring_again.submit(run, root, skipping, again, 2, state).result()
        assert other.process != restored.process
        assert_same(other.batches, [whole.batches[n] for n in numbers])


# --- every sample once per pass, through the files but without decoding


def _bare(folder: Path, datasets: Sequence[Sequence[int]]) -> tuple[tuple[str, ...], set[str]]:
    """Datasets of these shard sizes whose pictures are their own keys."""
    folders, keys = [], set()
    for number, sizes in enumerate(datasets):
        shards = [
            {f"{number}/{shard}_{i}": {"jpg": f"{number}/{shard}_{i}".encode()} for i in range(size)}
            for shard, size in enumerate(sizes)
        ]
        folders.append(write_dataset(folder / str(number), shards, with_depth=False))
        keys |= {key for samples in shards for key in samples}
    return tuple(folders), keys


# shards without a sample too, but for a dataset of nothing else
sizes_st = st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(any)


@settings(max_examples=60, deadline=None)
@given(
    datasets=st.lists(sizes_st, min_size=1, max_size=2),
    lanes=st.integers(1, 4),
    share=st.integers(1, 3),
    window=st.integers(1, 24),
    seed=st.integers(0, 9),
    lives=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 6)), min_size=1, max_size=6),
)
@example(datasets=[[1]], lanes=4, share=2, window=5, seed=0, lives=[(3, 1), (4, 1)])
@example(datasets=[[1, 1, 1, 1, 1, 1, 1]], lanes=3, share=1, window=1, seed=1, lives=[(3, 1), (1, 1), (2, 1)])
@example(datasets=[[0, 3, 0, 0, 2], [0, 1]], lanes=3, share=2, window=4, seed=3, lives=[(2, 1), (3, 2)])
@example(datasets=[[1, 9], [1]], lanes=4, share=3, window=24, seed=2, lives=[(4, 2), (3, 1)])
def test_every_key_exactly_once_per_pass_over_all_ranks_and_restarts(
    datasets: list[list[int]], lanes: int, share: int, window: int, seed: int, lives: list[tuple[int, int]]
) -> None:
    """`lives` are (ranks, batches until the next restart), over and over; ranks above the lanes are lowered to them."""
    with TemporaryDirectory() as folder:
        folders, keys = _bare(Path(folder), datasets)
        role = RoleSpec(datasets=folders, batch=lanes * share, lanes=lanes)
        data = DataSpec(roles={"r": role}, input_size=28, shuffle_window=window)
        consumed, passes, seen = 0, 0, Counter[str]()
        for ranks, batches in itertools.cycle(lives):
            ranks = min(ranks, lanes)
            streams = [
                RoleStream("r", data, RoleNeeds(target="none"), seed=seed, rank=rank, world_size=ranks)
                for rank in range(ranks)
            ]
            for _ in range(batches):
                picks = [pick for stream in streams for pick in stream.read(consumed)]
                assert len(picks) == lanes * share
                samples = [pick.sample for pick in picks if pick.sample is not None]
                assert all(sample.image.decode() == sample.key and not sample.problem for sample in samples)
                seen.update(sample.key for sample in samples)
                consumed = streams[0].plan.advance(consumed)
                if streams[0].plan.ends_pass(consumed):
                    assert seen == dict.fromkeys(keys, 1)
                    seen.clear()
                    passes += 1
                assert consumed == passes * len(keys) + seen.total()
            if passes >= 2:
                break
