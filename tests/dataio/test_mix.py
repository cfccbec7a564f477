"""Weighted mixing: stated shares, every sample once in each pass over its dataset, the same from any counter on."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataio.loader import Loader
from dataio.mix import BLOCK, MixedPlan, quotas
from dataio.plan import RolePlan
from dataio.spec import DataError, DataSpec, RoleNeeds, RoleSpec
from tests.dataio.fakes import labelled, shards_of, write_dataset

Drawn = list[tuple[int, int, int, int]]  # (dataset, pass, shard, place)


def mixed(sizes: list[list[int]], weights: list[float], *, batch: int = 8, lanes: int = 4, seed: int = 1) -> MixedPlan:
    parts, before = [], 0
    for shards in sizes:
        parts.append(RolePlan("r", shards, batch=batch, lanes=lanes, window=8, seed=seed, first_shard=before))
        before += len(shards)
    return MixedPlan(parts, weights)


def run(plan: MixedPlan, batches: int, consumed: int = 0) -> list[Drawn]:
    """What each of so many global batches holds, empty slots left out."""
    found = []
    for _ in range(batches):
        batch = [
            (part, slot.epoch, slot.shard, slot.index)
            for lane in range(plan.lanes)
            for part, slot in plan.drawn(consumed, lane)
            if slot is not None
        ]
        found.append(batch)
        consumed = plan.advance(consumed)
    return found


def test_quotas_share_out_a_block() -> None:
    assert quotas("r", [1, 1, 2], 3) == [BLOCK // 4, BLOCK // 4, BLOCK // 2]
    thirds = quotas("r", [1, 1, 1], 3)
    assert sum(thirds) == BLOCK and max(thirds) - min(thirds) == 1
    assert quotas("r", [0.3], 1) == [BLOCK]
    assert sum(quotas("r", [0.1, 0.7, 3.3, 1e-2], 4)) == BLOCK


@pytest.mark.parametrize(
    ("weights", "count", "words"),
    [
        ([1.0], 2, "1 weights for 2 datasets"),
        ([1.0, 0.0], 2, "numbers above 0"),
        ([1.0, float("inf")], 2, "numbers above 0"),
        ([1.0, float("nan")], 2, "numbers above 0"),
        ([1.0, 1e-5], 2, "weight 1e-05 of dataset 1 is below"),
    ],
)
def test_weights_that_cannot_be(weights: list[float], count: int, words: str) -> None:
    with pytest.raises(DataError, match=words):
        quotas("r", weights, count)


def test_shares_are_exact_over_a_block_and_mixed_within_a_batch() -> None:
    plan = mixed([[50, 40], [300]], [1, 3], batch=64, lanes=4)
    batches = run(plan, BLOCK // plan.share)
    counts = Counter(part for batch in batches for part, *_ in batch)
    empty = 64 * len(batches) - counts.total()
    assert counts[0] + counts[1] + empty == 4 * BLOCK
    assert abs(counts[1] - 3 * BLOCK) <= empty and abs(counts[0] - BLOCK) <= empty
    inside = [sum(part == 0 for part, *_ in batch) for batch in batches]
    assert 10 < sum(inside) / len(inside) < 20 and len(set(inside)) > 8  # about 16, and not always the same


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=4), min_size=1, max_size=3),
    lanes=st.sampled_from([1, 2, 3]),
    share=st.integers(1, 3),
    seed=st.integers(0, 5),
)
def test_every_pass_over_a_dataset_shows_every_sample_once(sizes, lanes, share, seed) -> None:
    weights = [1.0 + 2 * i for i in range(len(sizes))]
    if any(sum(shards) < lanes for shards in sizes):
        with pytest.raises(DataError, match=r"fewer than|no samples"):
            mixed(sizes, weights, batch=share * lanes, lanes=lanes)
        return
    plan = mixed(sizes, weights, batch=share * lanes, lanes=lanes, seed=seed)
    drawn = [sample for batch in run(plan, 200 // share) for sample in batch]
    assert len(set(drawn)) == len(drawn)  # never twice in a pass
    first = 0
    for part, shards in enumerate(sizes):
        every = {(shard, place) for shard, count in enumerate(shards, start=first) for place in range(count)}
        first += len(shards)
        passes: dict[int, set[tuple[int, int]]] = {}
        for number, epoch, shard, place in drawn:
            if number == part:
                passes.setdefault(epoch, set()).add((shard, place))
        behind = [plan.draws(200 // share * share, lane) for lane in range(lanes)]
        rows = [sum(plan.draws(row, lane)[0] == part for row in range(200 // share * share)) for lane in range(lanes)]
        assert all(before == rows[lane] for lane, (number, before) in enumerate(behind) if number == part)
        whole = min(rows) // -(-sum(shards) // lanes)  # passes that every lane has behind it
        for epoch in range(whole):
            assert passes[epoch] == every


@pytest.mark.parametrize("start", [1, 7, BLOCK // 2 - 1, BLOCK])
def test_any_counter_goes_on_as_from_the_start(start: int) -> None:
    sizes, weights = [[5, 4], [20]], [1.0, 2.0]
    straight = run(mixed(sizes, weights), start + 4)[start:]
    again = mixed(sizes, weights)
    assert run(again, 4, consumed=start * again.batch) == straight
    assert again.number(again.after(start)) == start


def test_lanes_and_seeds_differ() -> None:
    plan, other = mixed([[40], [40]], [1, 1]), mixed([[40], [40]], [1, 1], seed=2)
    order = [[plan.draws(row, lane)[0] for row in range(64)] for lane in range(4)]
    assert len({tuple(lane) for lane in order}) == 4
    assert order[0] != [other.draws(row, 0)[0] for row in range(64)]
    with pytest.raises(DataError, match="no state of a plan with 4 lanes"):
        plan.drawn(6, 0)
    with pytest.raises(DataError, match="no state"):
        plan.advance(-4)


# --- in the loader


def spec(folders: tuple[str, ...], **role: object) -> DataSpec:
    options = {"batch": 6, "lanes": 3, "weights": (1.0, 2.0), **role}
    return DataSpec(roles={"r": RoleSpec(datasets=folders, **options)}, input_size=28, shuffle_window=4)  # type: ignore[arg-type]


def keys(data: DataSpec, batches: int, *, world: int = 1, cursor: dict[str, int] | None = None) -> list[list[str]]:
    """Sorted keys of each global batch."""
    found: list[list[str]] = [[] for _ in range(batches)]
    for rank in range(world):
        needs = {"r": RoleNeeds()}
        with Loader(data, needs, views=("clean",), seed=3, rank=rank, world_size=world, cursor=cursor) as loader:
            for number in range(batches):
                batch = next(loader)
                found[number] += [key for key, weight in zip(batch.keys, batch.weight_B, strict=True) if weight]
                last = dict(batch.cursor)
    assert last == {"r": (cursor or {"r": 0})["r"] + 6 * batches}
    return [sorted(batch) for batch in found]


def test_the_loader_mixes_resumes_and_does_not_depend_on_ranks(tmp_path: Path) -> None:
    folders = tuple(
        write_dataset(tmp_path / name, shards_of(sizes, labelled, prefix=name))
        for name, sizes in (("a", [3, 4]), ("b", [6, 2, 5]))
    )
    data = spec(folders)
    straight = keys(data, 30)
    counts = Counter(key[0] for batch in straight for key in batch)
    assert 0.2 < counts["a"] / counts.total() < 0.47  # a third, in so short a run
    for world in (2, 3):
        assert keys(data, 5, world=world) == straight[:5]
        assert keys(data, 5, world=world, cursor={"r": 6 * 11}) == straight[11:16]
    with pytest.raises(DataError, match=r"dataset 0 has 7 samples, fewer than the 8 lanes: set lanes to at most 7"):
        keys(spec(folders, lanes=8, batch=8), 1)
    other = Loader(spec(folders, weights=(1.0, 1.0)), {"r": RoleNeeds()}, views=("clean",), seed=3)
    assert other.describe() != Loader(data, {"r": RoleNeeds()}, views=("clean",), seed=3).describe()


# --- stretches that are passed over


@pytest.mark.parametrize("weights", [(), (1.0, 1.0)])
def test_skipped_samples_are_passed_over_on_every_way_through(tmp_path: Path, weights: tuple[float, ...]) -> None:
    folders = tuple(write_dataset(tmp_path / name, shards_of([7, 6], labelled, prefix=name)) for name in ("a", "b"))
    data = spec(folders, weights=weights)
    straight = take(data, 14)
    skipping = DataSpec(roles=data.roles, input_size=28, shuffle_window=4, skip_samples=((61, 66), (20, 31)))
    # batches of 6: 20..31 lies in batches 3 to 5, 61..66 in batch 10
    found = take(skipping, 10)
    wanted = [batch for number, batch in enumerate(straight) if number not in (3, 4, 5, 10)]
    assert found == wanted[:10]
    # from a checkpoint before a stretch, at its edges, and inside of it
    for number, behind in ((2, 2), (3, 6), (4, 6), (6, 6), (10, 11)):
        rest = [batch for n, batch in enumerate(straight) if n >= behind and n not in (3, 4, 5, 10)]
        assert take(skipping, 2, cursor=straight[number - 1][1]) == rest[:2]


def take(data: DataSpec, batches: int, cursor: dict[str, int] | None = None) -> list[tuple[list[str], dict[str, int]]]:
    with Loader(data, {"r": RoleNeeds()}, views=("clean",), seed=3, cursor=cursor) as loader:
        return [(sorted(batch.keys), dict(batch.cursor)) for batch in (next(loader) for _ in range(batches))]


def test_number_and_after_undo_each_other_over_partial_batches() -> None:
    for samples in range(1, 40):
        for lanes, share in ((1, 3), (2, 2), (3, 1), (4, 3)):
            plan = RolePlan("r", [samples], batch=lanes * share, lanes=lanes, window=8, seed=0)
            consumed = 0
            for number in range(30):
                assert (plan.number(consumed), plan.after(number)) == (number, consumed)
                consumed = plan.advance(consumed)


@pytest.mark.parametrize("stretch", [(5, 5), (7, 3), (-1, 4)])
def test_a_stretch_that_is_none(tmp_path: Path, stretch: tuple[int, int]) -> None:
    folder = write_dataset(tmp_path / "d", shards_of([8], labelled))
    data = spec((folder,), weights=())
    with pytest.raises(DataError, match="is no stretch of samples"):
        Loader(
            DataSpec(roles=data.roles, input_size=28, skip_samples=(stretch,)), {"r": RoleNeeds()}, views=("clean",),
            seed=0,
        )  # fmt: skip
