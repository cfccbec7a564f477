"""Two writers of one label shard, step by step: whoever is slow, the ledger speaks of the tar that is there."""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import fsspec
import numpy as np
import pytest

from cluster import storage
from dataio.dataset import Dataset
from dataio.index import ShardIndex, index_path
from dataio.label_check import verify
from dataio.label_commit import Commit
from dataio.labels import LabelSample, LabelStore
from tests.dataio.fakes import shards_of, unlabelled, write_dataset
from tests.dataio.steps import Turns, killed_after, watched

STEM, KEYS = "000000", ["s0_000", "s0_001", "s0_002"]


def encoded(seed: int) -> list[LabelSample]:
    """The labels as one machine makes them; another seed is another machine, whose bytes differ in length, too."""
    rng = np.random.default_rng(seed)
    return [
        LabelSample.encoded(key, rng.uniform(0, 5, (42, 56 + 14 * seed)).astype(np.float32), {"quality": 0.5})
        for key in KEYS
    ]


SAMPLES = [encoded(0), encoded(1)]
OLD = [*SAMPLES[0][:2], LabelSample.failed(KEYS[2], "bad_image")]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    shards = shards_of([3], lambda seed: unlabelled(seed, 14, 14))
    return Dataset.open(write_dataset(tmp_path_factory.mktemp("data") / "d", shards, with_depth=False))


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def write(verb: str, store: LabelStore, machine: int, node: str) -> Commit:
    action = store.commit if verb == "commit" else store.replace
    return action(STEM, SAMPLES[machine], keys=KEYS, by={"node": node})


# --- where they begin


def nothing(store: LabelStore) -> None:
    pass


def whole(store: LabelStore) -> None:
    store.commit(STEM, OLD, keys=KEYS)


def remove(path: str) -> None:
    seen = storage.stamp(path)
    assert seen is not None and storage.remove_if(path, seen)


def only_a_tar(store: LabelStore) -> None:
    whole(store)
    remove(store.ledger(STEM))


def a_cut_tar(store: LabelStore) -> None:
    whole(store)
    storage.atomic_write(store.tar(STEM), storage.read_bytes(store.tar(STEM))[:9000])


def only_a_cut_tar(store: LabelStore) -> None:
    a_cut_tar(store)
    remove(store.ledger(STEM))


def only_an_entry(store: LabelStore) -> None:
    whole(store)
    remove(store.tar(STEM))


BEGINS = [nothing, whole, only_a_tar, a_cut_tar, only_a_cut_tar, only_an_entry]
VERBS = [("commit", "commit"), ("commit", "replace"), ("replace", "commit"), ("replace", "replace")]


# --- how they end


def entry_is_of(store: LabelStore) -> bool:
    entry = store.entry(STEM)
    return entry is None or (
        storage.exists(store.tar(STEM)) and entry.sha256 == storage.sha256_file(store.tar(STEM))
    )


def check_end(store: LabelStore, dataset: Dataset, turns: Turns, machines: tuple[int, int]) -> None:
    turns.close()
    first, second = turns.results
    entry = store.entry(STEM)
    assert entry is not None and entry_is_of(store)
    report = verify(store, dataset)
    assert report.ok, report  # its index, too, and nothing is left over
    assert entry in (first.entry, second.entry)
    possible = [storage_of(samples) for samples in (SAMPLES[machines[0]], SAMPLES[machines[1]], OLD)]
    assert entry.sha256 in possible
    for found in (first, second):
        assert found.outcome != "fenced" and found.entry is not None
        assert found.entry.sha256 in possible


_SHA256: dict[int, str] = {}


def storage_of(samples: list[LabelSample]) -> str:
    """The checksum of the tar that these samples make."""
    if id(samples) not in _SHA256:
        store = LabelStore.create(f"memory://turns-{id(samples)}", {})
        entry = store.commit(STEM, samples, keys=KEYS).entry
        assert entry is not None
        _SHA256[id(samples)] = entry.sha256
        fsspec.filesystem("memory").rm(f"/turns-{id(samples)}", recursive=True)
    return _SHA256[id(samples)]


@contextmanager
def requests_watched(after: Callable[[str], None]) -> Iterator[None]:
    """As `steps.watched`, of the store in memory."""
    kind = type(fsspec.filesystem("memory"))

    def wrapped(name: str) -> Callable[..., Any]:
        original = getattr(kind, name)

        def call(self: Any, path: str, *args: Any, **kwargs: Any) -> Any:
            try:
                return original(self, path, *args, **kwargs)
            finally:
                after(f"{name} {path}")

        return call

    names = ("pipe_file", "put_file", "cat_file", "info", "rm_file")
    with mock.patch.multiple(kind, **{name: wrapped(name) for name in names}):
        yield


@contextmanager
def together(
    store: LabelStore, verbs: tuple[str, ...], machines: tuple[int, int], watch: Callable[[Callable[[str], None]], Any]
) -> Iterator[Turns]:
    turns: list[Turns] = []
    with watch(lambda name: turns[0].step(name) if turns else None):
        actions = [partial(write, verb, store, machines[i], f"n{i}") for i, verb in enumerate(verbs)]
        turns.append(Turns(*actions))
        try:
            yield turns[0]
        finally:
            turns[0].close()


def begun(path: str, dataset: Dataset, begin: Callable[[LabelStore], None]) -> LabelStore:
    store = LabelStore.create(path, {"dataset": {"fingerprint": dataset.fingerprint}})
    begin(store)
    return store


@pytest.mark.parametrize("machines", [(0, 0), (0, 1)], ids=["same bytes", "other bytes"])
@pytest.mark.parametrize("verbs", VERBS, ids="-".join)
@pytest.mark.parametrize("begin", BEGINS, ids=lambda begin: begin.__name__)
def test_one_writer_stops_and_another_runs_to_its_end(
    begin: Callable[[LabelStore], None],
    verbs: tuple[str, str],
    machines: tuple[int, int],
    dataset: Dataset,
    tmp_path: Path,
) -> None:
    """After each step of the first one, looks included."""
    for stop in itertools.count():
        store = begun(str(tmp_path / str(stop)), dataset, begin)
        with together(store, verbs, machines, partial(watched, store.path, looks=True)) as turns:
            for _ in range(stop):
                turns.advance(0)
            ended = turns.is_over(0)
            turns.finish(1)
            turns.finish(0)
        check_end(store, dataset, turns, machines)
        if verbs == ("commit", "commit"):
            check_exactly_one(begin, turns, same=machines[0] == machines[1])
        if ended:
            break
    assert stop > 2


def check_exactly_one(begin: Callable[[LabelStore], None], turns: Turns, same: bool) -> None:
    """Of two that only commit, one makes the entry, and the other is told; also whether it came to other bytes."""
    first, second = turns.results
    assert sum(found.outcome == "duplicate" for found in (first, second)) == (2 if begin is whole else 1)
    assert first.entry == second.entry
    if same:
        assert not first.differs and not second.differs


@pytest.mark.parametrize("kind", ["disk", "store"])
@pytest.mark.parametrize("machines", [(0, 0), (0, 1)], ids=["same bytes", "other bytes"])
@pytest.mark.parametrize("begin", BEGINS, ids=lambda begin: begin.__name__)
def test_writers_take_turns_at_random(
    begin: Callable[[LabelStore], None], machines: tuple[int, int], kind: str, dataset: Dataset, tmp_path: Path
) -> None:
    """With the turns drawn from a seed. From an empty place or a whole tar an entry is right at every moment."""
    for seed in range(12):
        rng = random.Random(seed)
        verbs = VERBS[seed % 4]
        base = str(tmp_path / str(seed)) if kind == "disk" else f"memory://{tmp_path.name}-{seed}"
        store = begun(base, dataset, begin)
        watch = partial(watched, store.path, looks=True) if kind == "disk" else requests_watched
        always = verbs == ("commit", "commit") and begin in (nothing, whole, only_a_tar)
        with together(store, verbs, machines, watch) as turns:
            while not (turns.is_over(0) and turns.is_over(1)):
                turns.advance(rng.randrange(2))
                if always:
                    assert entry_is_of(store)
        check_end(store, dataset, turns, machines)
        # what is damaged is removed from a store in two requests, between which somebody may put what is whole
        if verbs == ("commit", "commit") and begin in (BEGINS if kind == "disk" else [nothing, only_a_tar]):
            check_exactly_one(begin, turns, same=machines[0] == machines[1])
        if kind == "store":
            fsspec.filesystem("memory").rm(base.removeprefix("memory:/"), recursive=True)


@pytest.mark.parametrize(
    ("begin", "verbs"),
    [(only_a_tar, ("commit", "replace")), (a_cut_tar, ("commit", "commit")), (whole, ("replace", "replace"))],
    ids=lambda value: value.__name__ if callable(value) else "-".join(value),
)
def test_one_writer_dies_in_the_middle_of_another_s_work(
    begin: Callable[[LabelStore], None], verbs: tuple[str, str], dataset: Dataset, tmp_path: Path
) -> None:
    """Killed after a step drawn from a seed, while the other one stands after one of its own, which goes on then: no
    entry speaks of another tar, and the next run puts right what is left."""
    for seed in range(40):
        rng = random.Random(seed)
        store = begun(str(tmp_path / str(seed)), dataset, begin)
        with together(store, verbs[:1], (0, 1), partial(watched, store.path, looks=True)) as turns:
            for _ in range(rng.randrange(25)):
                turns.advance(0)
            killed_after(store.path, partial(write, verbs[1], store, 1, "n1"), rng.randrange(1, 20))
            turns.finish(0)
        assert entry_is_of(store)
        store.clean()
        store.commit(STEM, SAMPLES[0], keys=KEYS)
        report = verify(store, dataset)
        assert report.ok, report


def test_the_index_is_that_of_the_winner(dataset: Dataset, tmp_path: Path) -> None:
    """The loser has adopted a tar that was replaced meanwhile, and writes its index late."""
    store = begun(str(tmp_path / "labels"), dataset, only_a_tar)
    with together(store, ("commit", "replace"), (0, 1), partial(watched, store.path)) as turns:
        turns.advance(0)  # up to its first step: the unfinished index of the old tar
        turns.finish(1)
    assert storage.read_bytes(index_path(store.tar(STEM))).decode() == ShardIndex.build(store.tar(STEM)).text
