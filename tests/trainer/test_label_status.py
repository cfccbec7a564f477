"""How a job stands, from a folder made by hand: rates, time left, what is in hand, runs that are gone."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from cluster.claims import FOLDER, _space
from dataio.dataset import Dataset
from dataio.labels import LabelSample, LabelStore
from dataio.spec import DataError
from tests.dataio.fakes import shards_of, unlabelled, write_dataset
from trainer.label_status import RATE_OVER_S, JobState, NodeState, job_state

NOW = 2_000_000_000.0
SHARDS, EACH = 8, 4
STEMS = [f"{number:06d}" for number in range(SHARDS)]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("data") / "photos"
    return Dataset.open(write_dataset(folder, shards_of([EACH] * SHARDS, unlabelled), with_depth=False))


@pytest.fixture
def store(dataset: Dataset, tmp_path: Path) -> LabelStore:
    description = {"dataset": {"name": "photos", "fingerprint": dataset.fingerprint}}
    return LabelStore.create(str(tmp_path / "labels"), description)


def commit(store: LabelStore, dataset: Dataset, stem: str, seconds: float | None = 10.0, **by: Any) -> None:
    """One shard, its first sample without a label."""
    (shard,) = [shard for shard in dataset.shards if shard.stem == stem]
    keys = [sample.key for sample in shard.index.samples]
    map_HW = np.linspace(1, 2, 48, dtype=np.float32).reshape(6, 8)
    samples = [LabelSample.failed(keys[0], "bad_image")]
    samples += [LabelSample.encoded(key, map_HW, {"quality": 0.9}) for key in keys[1:]]
    store.commit(stem, samples, keys=keys, seconds=seconds, by=by)


def claim(store: LabelStore, owner: str = "0badcafe", leased: Iterable[tuple[str, str]] = (), **changes: Any) -> None:
    """The file of a run that has these (stem, node) in hand."""
    content = {
        "owner": owner, "host": "elsewhere", "space": "elsewhere", "pid": 1, "born": 1.0, "beat": 3,
        "written": NOW - 5, "ends": NOW + 55,
        "items": dict.fromkeys([stem for stem, _ in leased], NOW - 20),
        "leased": {
            stem: {"worker": "0badf00d", "node": node, "token": 7, "progress": 0.25} for stem, node in leased
        },
        "done": {},
    }  # fmt: skip
    folder = Path(store.path) / FOLDER
    folder.mkdir(exist_ok=True)
    (folder / f"{owner}.json").write_text(json.dumps(content | changes))


def nodes(state: JobState) -> Mapping[str, tuple[int, int, int]]:
    return {name: (node.done, node.leased, node.images) for name, node in state.nodes.items()}


def test_before_anything_is_done(store: LabelStore, dataset: Dataset) -> None:
    state = job_state(store, dataset, NOW)
    assert (state.todo, state.runs, state.leased, state.nodes) == (SHARDS, 0, {}, {})
    assert state.images_per_second is None and state.left_s is None
    assert state.status.missing == tuple(STEMS)
    state = job_state(store, None, NOW)
    assert state.todo is None and state.status.missing == ()


def test_shards_by_state_and_machine(store: LabelStore, dataset: Dataset) -> None:
    commit(store, dataset, "000000", node="a", finished=NOW - 100)
    commit(store, dataset, "000001", node="b", finished=NOW - 90)
    commit(store, dataset, "000002", node="a", finished=NOW - 80)
    commit(store, dataset, "000003", seconds=None)  # its writer died, and who adopted it said nothing
    claim(store, leased=[("000004", "b"), ("000005", "c")])
    claim(store, owner="0badc0de", leased=[("000006", "c")])
    state = job_state(store, dataset, NOW)
    assert (state.status.shards, len(state.leased), state.todo, state.runs) == (4, 3, 1, 2)
    assert state.status.failures == {"bad_image": 4} and state.status.samples == 16
    assert nodes(state) == {"a": (2, 0, 8), "b": (1, 1, 4), "c": (0, 2, 0), "unknown": (1, 0, 4)}
    assert state.leased["000004"]["progress"] == 0.25
    assert state.images_per_second is None and state.left_s is None, "too few to tell"


def test_a_file_that_lags_behind_the_ledger_makes_no_shard_out_of_nothing(store: LabelStore, dataset: Dataset) -> None:
    for stem in STEMS[:3]:
        commit(store, dataset, stem, node="a", finished=NOW - 1)
    claim(store, leased=[("000002", "a")])
    state = job_state(store, dataset, NOW)
    assert state.status.shards + len(state.leased) + (state.todo or 0) == SHARDS
    for stem in STEMS[3:]:
        commit(store, dataset, stem, node="a", finished=NOW - 1)
    assert job_state(store, dataset, NOW).todo == 0


def test_the_rate_is_of_the_last_shards_of_machines_at_work(store: LabelStore, dataset: Dataset) -> None:
    """From the begin of the first of them until now, so that a machine that stands still is seen to."""
    for stem, ago in (("000000", 60), ("000001", 50), ("000002", 40)):
        commit(store, dataset, stem, node="a", finished=NOW - ago)  # begun 70 s ago
    for stem in ("000003", "000004", "000005"):
        commit(store, dataset, stem, node="idle", finished=NOW - 1)
    claim(store, leased=[("000006", "a")])
    state = job_state(store, dataset, NOW)
    assert state.nodes["a"].images_per_second == pytest.approx(12 / 70)
    assert state.nodes["idle"].images_per_second is None
    assert state.images_per_second == pytest.approx(12 / 70)
    assert state.left_s == pytest.approx((32 - 24) / (12 / 70))
    later = job_state(store, dataset, NOW + 30)
    assert later.images_per_second == pytest.approx(12 / 100)
    assert job_state(store, None, NOW).left_s is None


def test_machines_add_up(store: LabelStore, dataset: Dataset) -> None:
    for number, stem in enumerate(STEMS[:6]):
        commit(store, dataset, stem, node="ab"[number % 2], finished=NOW - 30)
    claim(store, leased=[("000006", "a"), ("000007", "b")])
    state = job_state(store, dataset, NOW)
    assert state.nodes["a"] == NodeState(done=3, leased=1, images=12, images_per_second=pytest.approx(12 / 40))
    assert state.images_per_second == pytest.approx(24 / 40)
    assert state.todo == 0 and state.left_s == pytest.approx(8 / (24 / 40))


def test_what_was_done_long_ago_tells_nothing_of_now(store: LabelStore, dataset: Dataset) -> None:
    for number, stem in enumerate(STEMS[:5]):
        commit(store, dataset, stem, node="a", finished=NOW - RATE_OVER_S - 1 if number < 3 else NOW - 10)
    claim(store, leased=[("000006", "a")])
    assert job_state(store, dataset, NOW).images_per_second is None  # two are left of five
    commit(store, dataset, "000005", seconds=10 * RATE_OVER_S, node="a", finished=NOW)
    state = job_state(store, dataset, NOW)
    assert state.images_per_second == pytest.approx(12 / RATE_OVER_S), "no longer than what is looked at"


def test_long_shards_have_a_rate_too(store: LabelStore, dataset: Dataset) -> None:
    """Of a thousand photographs on a CPU: three of them do not end within a quarter of an hour."""
    for number, stem in enumerate(STEMS[:5]):
        commit(store, dataset, stem, seconds=2400.0, node="a", finished=NOW - 2400 * (4 - number) - 60)
    claim(store, leased=[("000006", "a")])
    state = job_state(store, dataset, NOW)
    assert state.images_per_second == pytest.approx(12 / 7200, rel=0.02)
    assert state.left_s == pytest.approx(12 * 7200 / 12, rel=0.02)


def test_labels_of_another_dataset_are_refused(store: LabelStore, dataset: Dataset) -> None:
    with pytest.raises(DataError, match=r"labels of a dataset with fingerprint .*: name their own with --dataset"):
        job_state(store, replace(dataset, fingerprint="0123"), NOW)


def test_without_a_dataset_machines_add_up_too(store: LabelStore, dataset: Dataset) -> None:
    for stem in STEMS[:3]:
        commit(store, dataset, stem, node="a", finished=NOW - 10)
    os.truncate(store.tar("000001"), 512)
    state = job_state(store, None, NOW)
    assert (state.status.shards, nodes(state)) == (2, {"a": (2, 0, 8)})


def test_runs_that_are_gone_hold_nothing(store: LabelStore, dataset: Dataset) -> None:
    me = psutil.Process()
    here = {"space": _space(), "pid": os.getpid(), "born": me.create_time()}
    claim(store, "00000001", [("000000", "silent")], ends=NOW - 1)
    claim(store, "00000002", [("000001", "dead")], **here | {"born": me.create_time() - 1000})  # its number is reused
    claim(store, "00000003", [("000002", "lives")], **here)
    (Path(store.path) / FOLDER / "readme.txt").write_text("not ours")
    (Path(store.path) / FOLDER / "torn.json").write_text('{"owner": ')
    state = job_state(store, dataset, NOW)
    assert (state.runs, list(state.leased), list(state.nodes)) == (1, ["000002"], ["lives"])
    assert state.todo == SHARDS - 1


def test_a_shard_whose_tar_is_damaged_is_to_be_done(store: LabelStore, dataset: Dataset) -> None:
    commit(store, dataset, "000000", node="a", finished=NOW - 10)
    commit(store, dataset, "000001", node="a", finished=NOW - 10)
    os.truncate(store.tar("000001"), 512)
    state = job_state(store, dataset, NOW)
    assert state.status.shards == 1 and state.todo == SHARDS - 1
    assert nodes(state) == {"a": (1, 0, 4)}


def test_a_clock_that_is_ahead_makes_no_machine_fast(store: LabelStore, dataset: Dataset) -> None:
    for stem in STEMS[:3]:
        commit(store, dataset, stem, node="a", finished=NOW + 300)
    claim(store, leased=[("000006", "a")])
    assert job_state(store, dataset, NOW).images_per_second == pytest.approx(12 / 10)


@pytest.mark.parametrize("by", [{"node": 3}, {"node": "a", "finished": "soon"}, {"finished": None}, {"finished": True}])
def test_what_others_wrote_into_the_ledger_does_not_stop_it(
    store: LabelStore, dataset: Dataset, by: dict[str, Any]
) -> None:
    """`by` is free: whoever commits says in it what they want."""
    for stem in STEMS[:3]:
        commit(store, dataset, stem, **by)
    name = str(by.get("node", "unknown"))
    claim(store, leased=[("000006", name)])
    state = job_state(store, dataset, NOW)
    assert nodes(state) == {name: (3, 1, 12)} and state.images_per_second is None
