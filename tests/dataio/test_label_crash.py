"""A writer of labels killed after each of its system steps, and what the next run does."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from dataio.dataset import Dataset
from dataio.index import ShardIndex
from dataio.label_check import verify
from dataio.labels import Commit, LabelSample, LabelStore
from tests.dataio.fakes import shards_of, unlabelled, write_dataset
from tests.dataio.steps import killed_after, steps_of

STEM, KEYS = "000000", ["s0_000", "s0_001", "s0_002"]
TAR, TMP = f"shards/{STEM}.tar", f"shards/.{STEM}.tar.tmp"
IDX, IDX_TMP = f"shards/{STEM}.idx", f"shards/.{STEM}.idx.tmp"
LEDGER, LEDGER_TMP = f"ledger/{STEM}.json", f"ledger/.{STEM}.json.tmp"


def samples(failed: bool = False) -> list[LabelSample]:
    rng = np.random.default_rng(0)
    made = [LabelSample.encoded(k, rng.uniform(0, 5, (42, 56)).astype(np.float32), {"quality": 0.5}) for k in KEYS]
    return [*made[:2], LabelSample.failed(KEYS[2], "bad_image")] if failed else made


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # a killed process loses nothing that it has written


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    shards = shards_of([3], lambda seed: unlabelled(seed, 14, 14))
    return Dataset.open(write_dataset(tmp_path_factory.mktemp("data") / "d", shards, with_depth=False))


# --- where a run may begin


def nothing(store: LabelStore) -> None:
    pass


def whole(store: LabelStore) -> None:
    commit(store)


def only_a_tar(store: LabelStore) -> None:
    commit(store)
    (Path(store.path) / LEDGER).unlink()
    (Path(store.path) / IDX).unlink()


def a_cut_tar(store: LabelStore) -> None:
    commit(store)
    os.truncate(store.tar(STEM), 9000)


def a_failed_sample(store: LabelStore) -> None:
    store.commit(STEM, samples(failed=True), keys=KEYS, seconds=1.0)


def commit(store: LabelStore) -> Commit:
    return store.commit(STEM, samples(), keys=KEYS, seconds=1.0)


def replace(store: LabelStore) -> Commit:
    return store.replace(STEM, samples(), keys=KEYS, seconds=1.0)


@dataclass(frozen=True)
class Scenario:
    """From `begin` the action takes `steps`; beside each what the next run finds when the action dies right after it:
    what becomes of the shard, and how many temporary files lie there. `before`: when it dies before the first one."""

    begin: Callable[[LabelStore], None]
    action: Callable[[LabelStore], Commit]
    before: str
    steps: list[tuple[str, str, int]]


def write_tar(then: str) -> list[tuple[str, str, int]]:
    return [
        (f"open {TMP}", then, 1),
        (f"write {TMP}", then, 1),
        (f"write {TMP}", then, 1),
        (f"fsync {TMP}", then, 1),
    ]


def index_and_ledger(then: str, kept: int, new: bool = False) -> list[tuple[str, str, int]]:
    """`kept`: temporary files that stay until the end."""
    return [
        (f"open {IDX_TMP}", then, kept + 1),
        (f"write {IDX_TMP}", then, kept + 1),
        (f"fsync {IDX_TMP}", then, kept + 1),
        (f"replace {IDX}", then, kept),
        ("fsync shards", then, kept),
        *([("mkdir ledger", then, kept), ("fsync .", then, kept)] if new else []),
        (f"open {LEDGER_TMP}", then, kept + 1),
        (f"write {LEDGER_TMP}", then, kept + 1),
        (f"fsync {LEDGER_TMP}", then, kept + 1),
        (f"link {LEDGER}", "nothing to do", kept + 1),
        ("fsync ledger", "nothing to do", kept + 1),
        (f"unlink {LEDGER_TMP}", "nothing to do", kept),
        *([(f"unlink {TMP}", "nothing to do", 0)] if kept else []),
    ]


def remove(path: str, folder: str, then: str) -> list[tuple[str, str, int]]:
    aside = f"{folder}/.{os.path.basename(path)}.old.tmp"
    return [(f"rename {aside}", then, 1), (f"unlink {aside}", then, 0), (f"fsync {folder}", then, 0)]


SCENARIOS = {
    "commit": Scenario(
        nothing,
        commit,
        "done",
        [
            ("mkdir shards", "done", 0),
            ("fsync .", "done", 0),
            *write_tar("done"),
            (f"link {TAR}", "adopted", 1),
            ("fsync shards", "adopted", 1),
            *index_and_ledger("adopted", kept=1, new=True),
        ],
    ),
    "adopt": Scenario(only_a_tar, commit, "adopted", index_and_ledger("adopted", kept=0)),
    "redo": Scenario(
        a_cut_tar,
        commit,
        "done",
        [
            *remove(LEDGER, "ledger", "done"),
            *remove(TAR, "shards", "done"),
            *write_tar("done"),
            (f"link {TAR}", "adopted", 1),
            ("fsync shards", "adopted", 1),
            *index_and_ledger("adopted", kept=1),
        ],
    ),
    "replace": Scenario(
        a_failed_sample,
        replace,
        "nothing to do, old",
        [
            *write_tar("nothing to do, old"),
            (f"rename ledger/.{STEM}.json.old.tmp", "adopted, old", 2),
            (f"unlink ledger/.{STEM}.json.old.tmp", "adopted, old", 1),
            ("fsync ledger", "adopted, old", 1),
            (f"replace {TAR}", "adopted", 0),
            ("fsync shards", "adopted", 0),
            *index_and_ledger("adopted", kept=0),
        ],
    ),
}
OUTCOMES = {"done": "written", "adopted": "adopted", "nothing to do": "duplicate"}


def make(path: Path, dataset: Dataset, begin: Callable[[LabelStore], None]) -> LabelStore:
    store = LabelStore.create(str(path), {"dataset": {"fingerprint": dataset.fingerprint}})
    begin(store)
    return store


def contents(store: LabelStore) -> dict[str, object]:
    """All files; of the ledger what two runs agree in."""
    files: dict[str, object] = {
        str(path.relative_to(store.path)): path.read_bytes()
        for path in Path(store.path).rglob("*")
        if path.is_file() and path.suffix != ".json"
    }
    entry = store.entry(STEM)
    return {**files, LEDGER: entry.content() if entry else None}


def temporaries(store: LabelStore) -> list[Path]:
    return [path for path in Path(store.path).rglob(".*.tmp") if path.is_file()]


def no_wrong_entry(store: LabelStore) -> bool:
    """Whether an entry that is there speaks of the tar that is there."""
    entry, tar = store.entry(STEM), Path(store.tar(STEM))
    return entry is None or (tar.exists() and tar.stat().st_size == entry.bytes and store.done(STEM))


def check_next_run(store: LabelStore, dataset: Dataset, then: str, undisturbed: dict[str, dict[str, object]]) -> None:
    outcome, _, old = then.partition(", ")
    assert (store.done_stems() == {STEM}) == (outcome == "nothing to do")
    store.clean()
    assert temporaries(store) == []
    found = commit(store)
    assert found.outcome == OUTCOMES[outcome] and not found.differs
    assert contents(store) == undisturbed[old or "new"]
    report = verify(store, dataset)
    assert report.ok, report
    assert commit(store) == Commit("duplicate", found.entry)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, dataset: Dataset) -> dict[str, dict[str, object]]:
    folder = tmp_path_factory.mktemp("undisturbed")
    return {
        "new": contents(make(folder / "new", dataset, whole)),
        "old": contents(make(folder / "old", dataset, a_failed_sample)),
    }


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_writer_may_die_after_any_step(
    name: str, dataset: Dataset, undisturbed: dict[str, dict[str, object]], tmp_path: Path
) -> None:
    scenario = SCENARIOS[name]
    begun = make(tmp_path / "begun", dataset, scenario.begin)

    def copy(to: str) -> LabelStore:
        return LabelStore.open(str(shutil.copytree(begun.path, tmp_path / to)))

    spared = copy("spared")
    assert steps_of(spared.path, lambda: scenario.action(spared)) == [step for step, _, _ in scenario.steps]
    assert contents(spared) == undisturbed["new"] and temporaries(spared) == []
    check_next_run(copy("before"), dataset, scenario.before, undisturbed)
    for number, (step, then, left) in enumerate(scenario.steps, 1):
        store = copy(str(number))
        assert killed_after(store.path, lambda store=store: scenario.action(store), number), step  # type: ignore[misc]
        assert len(temporaries(store)) == left, step
        assert no_wrong_entry(store), step
        check_next_run(store, dataset, then, undisturbed)
        shutil.rmtree(store.path)
    assert not killed_after(spared.path, lambda: scenario.action(spared), len(scenario.steps) + 1)


@pytest.mark.parametrize("begin", [nothing, only_a_tar, a_cut_tar], ids=lambda begin: begin.__name__)
def test_a_writer_may_die_again_and_again(
    begin: Callable[[LabelStore], None], dataset: Dataset, undisturbed: dict[str, dict[str, object]], tmp_path: Path
) -> None:
    """At steps drawn from a seed, each run beginning where the last one died; nobody cleans up meanwhile."""
    for seed in range(8):
        rng = random.Random(seed)
        store = make(tmp_path / str(seed), dataset, begin)
        for _ in range(6):
            killed_after(store.path, lambda store=store: commit(store), rng.randint(1, 15))  # type: ignore[misc]
        commit(store)
        store.clean()
        assert contents(store) == undisturbed["new"]
        assert verify(store, dataset).ok


def test_an_index_that_is_missing_is_no_harm(dataset: Dataset, tmp_path: Path) -> None:
    """It is synced before the ledger, but readers do not rely on it."""
    store = make(tmp_path / "labels", dataset, whole)
    (Path(store.path) / IDX).unlink()
    assert store.index(STEM).text == ShardIndex.build(store.tar(STEM)).text
