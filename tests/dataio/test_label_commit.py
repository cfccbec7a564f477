"""One label shard: committed once or not at all, by one writer or several, joined by key."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster import drafts, storage
from dataio import label_tar
from dataio.codec import decode_png16, label_code
from dataio.index import ShardIndex, index_path, read_member
from dataio.labels import FAILURE, IMAGE, Commit, LabelSample, LabelStore
from dataio.spec import DataError
from tests.dataio.label_shards import (
    PLACES,
    STEM,
    TAG,
    TEACHER,
    files,
    label,
    labels,
    leave_a_tar,
    store_in,
    write,
)


@pytest.fixture
def store(request: pytest.FixtureRequest, tmp_path: Path) -> LabelStore:
    return store_in("local", request, tmp_path)


@pytest.fixture(params=PLACES)
def any_store(request: pytest.FixtureRequest, tmp_path: Path) -> LabelStore:
    return store_in(request.param, request, tmp_path)


# --- samples


def test_a_sample_is_encoded_or_says_why_not() -> None:
    disparity_HW = np.random.default_rng(0).uniform(0, 5, (14, 28)).astype(np.float32)
    sample = LabelSample.encoded("a", disparity_HW, {"quality": 0.5})
    assert list(sample.members) == [IMAGE, "json"] and sample.failure is None
    meta = json.loads(sample.members["json"])
    assert meta["quality"] == 0.5
    assert np.abs(decode_png16(sample.members[IMAGE], label_code(meta)) - disparity_HW).max() <= 5 / 8188 * 1.01
    hollow = LabelSample.encoded("b", np.full((2, 2), np.nan, np.float32), {"quality": 0.5})
    assert hollow == LabelSample.failed("b", "no_valid_disparity", {"quality": 0.5})
    assert json.loads(hollow.members["json"]) == {"quality": 0.5, FAILURE: "no_valid_disparity"}
    assert list(LabelSample.encoded("c", disparity_HW, {}, "npy").members) == ["disparity.npy", "json"]
    with pytest.raises(ValueError, match="JSON"):
        LabelSample.encoded("d", disparity_HW, {"quality": float("nan")})
    with pytest.raises(ValueError, match="reason"):
        LabelSample.failed("d", "")


# --- one writer


def test_a_shard_reads_back_in_order(any_store: LabelStore) -> None:
    store = any_store
    hollow = LabelSample.encoded("hollow", np.full((2, 2), np.nan, np.float32), {})
    samples = [label("b", 1), LabelSample.failed("bad", "truncated_image"), hollow, label("a", 2, quality=None)]
    entry = write(store, samples, seconds=12.5, by={"node": "n1", "token": 7}, tag=TAG)
    assert (entry.stem, entry.samples, entry.failed) == (STEM, 4, 2)
    assert entry.failures == {"truncated_image": ["bad"], "no_valid_disparity": ["hollow"]}
    assert (entry.seconds, entry.bytes) == (12.5, storage.size(store.tar(STEM)))
    assert entry.by == {"node": "n1", "token": 7, "tag": TAG}
    assert entry.quality == [1 if bin == 10 else 0 for bin in range(20)]
    assert entry.sha256 == storage.sha256_file(store.tar(STEM))
    assert store.entry(STEM) == entry
    assert store.done(STEM) and store.done_stems() == {STEM}
    index = store.index(STEM)
    assert [found.key for found in index.samples] == ["b", "bad", "hollow", "a"]
    assert storage.read_bytes(index_path(store.tar(STEM))).decode() == ShardIndex.build(store.tar(STEM)).text
    for found, sample in zip(index.samples, samples, strict=True):
        assert {name: read_member(store.tar(STEM), found, name) for name in found.members} == sample.members
    assert [(s.key, dict(s.members), s.failure) for s in store.read(STEM)] == [
        (s.key, dict(s.members), s.failure) for s in samples
    ]
    assert set(storage.sizes(store.path)) == {"labels.json", "shards", "ledger"}
    assert set(storage.sizes(storage.join(store.path, "shards"))) == {"000000.tar", "000000.idx"}
    assert set(storage.sizes(storage.join(store.path, "ledger"))) == {"000000.json"}


def test_two_runs_differ_in_seconds_and_by_alone(store: LabelStore, tmp_path: Path) -> None:
    other = LabelStore.create(str(tmp_path / "other"), TEACHER)
    first = write(store, labels("a", "b"), seconds=1.0, by={"node": "x"})
    second = write(other, labels("a", "b"), seconds=2.0)
    assert first != second
    assert first.content() == second.content()
    assert first.content().keys() == {"stem", "plan", "samples", "failures", "sha256", "bytes", "quality"}
    assert Path(store.tar(STEM)).read_bytes() == Path(other.tar(STEM)).read_bytes()


def test_the_ledger_comes_last(store: LabelStore, monkeypatch: pytest.MonkeyPatch) -> None:
    placed = []
    place = drafts._LocalDraft.place

    def spy(self: Any, *, over: bool = False) -> bool:
        if self._path.endswith(".json"):
            assert Path(store.tar(STEM)).exists() and not store.done(STEM)
        placed.append((os.path.basename(self._path), over))
        return place(self, over=over)

    monkeypatch.setattr(drafts._LocalDraft, "place", spy)
    write(store, labels("a"))
    assert placed == [("000000.tar", False), ("000000.idx", True), ("000000.json", False)]


def test_an_exception_in_the_middle_leaves_nothing(any_store: LabelStore) -> None:
    def half() -> Iterator[LabelSample]:
        yield from labels("a", "b")
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        any_store.commit(STEM, half(), keys=["a", "b", "c"])
    assert not any_store.done(STEM) and any_store.committed() == []
    assert storage.sizes(any_store.path).keys() <= {"labels.json", "shards"}
    if not storage.is_url(any_store.path):
        assert list(files(any_store.path)) == ["labels.json"]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["a", "c", "b"], "sample 1 is 'c', that of the source shard 'b'"),
        (["a", "b"], "2 samples, the source shard has 3"),
        (["a", "b", "c", "d"], "sample 3 is 'd', the source shard has 3 only"),
        ([], "0 samples, the source shard has 3"),
    ],
)
def test_a_short_or_reordered_shard_gets_no_name(store: LabelStore, given: list[str], says: str) -> None:
    with pytest.raises(DataError, match=says):
        store.commit(STEM, labels(*given), keys=["a", "b", "c"])
    assert list(files(store.path)) == ["labels.json"]


def test_samples_are_not_computed_behind_one_that_is_out_of_place(store: LabelStore) -> None:
    def computing() -> Iterator[LabelSample]:
        yield label("b")
        raise AssertionError("computed for nothing")

    with pytest.raises(DataError, match="sample 0 is 'b'"):
        store.commit(STEM, computing(), keys=["a", "b"])


def test_a_shard_of_no_samples_has_labels_for_none(any_store: LabelStore) -> None:
    entry = write(any_store, [])
    assert (entry.samples, entry.failed, entry.quality) == (0, 0, None)
    assert any_store.done(STEM)
    assert any_store.commit(STEM, [], keys=[]) == Commit("duplicate", entry)


def test_a_key_that_comes_twice_is_kept_twice(store: LabelStore) -> None:
    """As labelling writes samples whose key another one of the shard has."""
    samples = [LabelSample.failed("a", "duplicate_key"), LabelSample.failed("a", "duplicate_key"), label("b")]
    entry = write(store, samples)
    assert entry.failures == {"duplicate_key": ["a", "a"]} and entry.samples == 3


@pytest.mark.parametrize("key", ["a.b", ".hidden", "white space"])
def test_keys_that_a_tar_does_not_hold(store: LabelStore, key: str) -> None:
    with pytest.raises(DataError, match=r"000000\.tar: "):
        store.commit(STEM, labels(key), keys=[key])
    assert list(files(store.path)) == ["labels.json"]


def test_bytes_that_the_disk_changes_are_noticed(any_store: LabelStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def flip(self: Any, data: bytes) -> int:
        self.sha256.update(data)
        return int(self.file.write(data.replace(b"\x89PNG", b"\x88PNG")))

    monkeypatch.setattr(label_tar._Hashing, "write", flip)
    with pytest.raises(DataError, match="the bytes read back differ from those written: check the disk"):
        any_store.commit(STEM, labels("a"), keys=["a"])
    assert not storage.exists(any_store.tar(STEM)) and any_store.committed() == []


def test_bytes_that_a_store_changes_are_noticed(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """After it said that it has them: the object is read again, and removed."""
    import s3fs

    store = LabelStore.create(f"{s3}/labels", TEACHER)
    original = s3fs.S3FileSystem._pipe_file

    async def cut(self: Any, path: str, data: bytes, **options: Any) -> Any:
        return await original(self, path, data[:-9000] if path.endswith(".tar") else data, **options)

    monkeypatch.setattr(s3fs.S3FileSystem, "_pipe_file", cut)
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(DataError, match=r"000000\.tar: the bytes read back differ from those sent: run again"):
        store.commit(STEM, labels("a"), keys=["a"])
    assert not storage.exists(store.tar(STEM)) and store.committed() == []


def test_seconds_are_measured_when_not_given(store: LabelStore) -> None:
    def slow() -> Iterator[LabelSample]:
        time.sleep(0.02)
        yield label("a")

    seconds = store.commit(STEM, slow(), keys=["a"]).entry.seconds  # type: ignore[union-attr]
    assert seconds is not None and 0.02 <= seconds < 60


def test_quality_is_a_histogram(store: LabelStore) -> None:
    values = [0.0, 0.049, 0.05, 0.999, 1.0, 1.5, -0.5]
    entry = write(store, [label(f"k{i}", quality=value) for i, value in enumerate(values)])
    assert entry.quality == [3, 1, *[0] * 17, 3]
    assert write(store, [label("a", quality=None)], "000001").quality is None


# --- late ones, and those that died


def test_a_late_duplicate_drops_its_work(any_store: LabelStore) -> None:
    store = any_store
    entry = write(store, labels("a"), seconds=1.0)
    before = {path: storage.stamp(path) for path in (store.tar(STEM), store.ledger(STEM), index_path(store.tar(STEM)))}

    def computing() -> Iterator[LabelSample]:
        raise AssertionError("computed for nothing")
        yield

    assert store.commit(STEM, computing(), keys=["a"], seconds=2.0) == Commit("duplicate", entry)
    assert {path: storage.stamp(path) for path in before} == before


@pytest.mark.parametrize("same", [True, False])
def test_the_second_of_two_at_once_is_told(any_store: LabelStore, same: bool) -> None:
    """Both have done the work; it differs where their machines do."""
    store = any_store
    theirs: list[Commit] = []

    def meanwhile() -> bool:
        theirs.append(store.commit(STEM, labels("a", "b"), keys=["a", "b"], by={"node": "other"}))
        return True

    mine = store.commit(STEM, labels("a", "b", seed=0 if same else 1), keys=["a", "b"], still_mine=meanwhile)
    assert theirs[0].outcome == "written"
    assert mine == Commit("duplicate", theirs[0].entry, differs=not same)
    assert store.entry(STEM) == theirs[0].entry
    assert storage.sha256_file(store.tar(STEM)) == theirs[0].entry.sha256  # type: ignore[union-attr]
    assert set(storage.sizes(storage.join(store.path, "shards"))) == {"000000.tar", "000000.idx"}


def test_a_writer_whose_lease_is_over_drops_its_work(any_store: LabelStore) -> None:
    commit = any_store.commit(STEM, labels("a"), keys=["a"], still_mine=lambda: False)
    assert commit == Commit("fenced", None)
    assert not storage.exists(any_store.tar(STEM)) and any_store.committed() == []
    write(any_store, labels("a"), still_mine=lambda: True)


@pytest.mark.parametrize("foreign", ["stem", "plan"])
def test_a_shard_that_was_copied_from_elsewhere_is_made_again(any_store: LabelStore, foreign: str) -> None:
    """Its entry fits its tar, so that sizes and checksums say nothing."""
    store = any_store
    write(store, labels("a", seed=1))
    entry = json.loads(storage.read_bytes(store.ledger(STEM)))
    storage.atomic_write(store.ledger(STEM), json.dumps(entry | {foreign: "0123456789abcdef"}))
    assert not store.done(STEM)
    with pytest.raises(DataError, match=f"{foreign} is .* it was copied there; delete it and its shard"):
        store.entry(STEM)
    assert write(store, labels("a")).sha256 != entry["sha256"]
    assert store.done(STEM)


def test_what_the_samples_raise_is_not_said_of_the_disk(any_store: LabelStore) -> None:
    """The network runs while they are asked for: what it lacks is no fault of the file."""
    for error in (OSError(12, "Cannot allocate memory"), TimeoutError(), NotImplementedError("aten::x")):

        def computing(error: Exception = error) -> Iterator[LabelSample]:
            yield label("a")
            raise error

        with pytest.raises(type(error)) as caught:
            any_store.commit(STEM, computing(), keys=["a", "b"])
        assert caught.value is error
    assert any_store.committed() == [] and not any_store.clean()


def test_a_tar_without_an_entry_is_adopted(any_store: LabelStore) -> None:
    store = any_store
    leave_a_tar(store, [label("a"), LabelSample.failed("b", "bad_image")])
    sha256 = storage.sha256_file(store.tar(STEM))
    commit = store.commit(STEM, iter(()), keys=["a", "b"], by={"node": "n2"})
    assert commit.outcome == "adopted" and commit.entry is not None
    entry = commit.entry
    assert (entry.sha256, entry.samples, entry.failures) == (sha256, 2, {"bad_image": ["b"]})
    assert (entry.seconds, entry.by["node"]) == (None, "n2")  # who did the work took the time along
    assert store.done(STEM) and store.index(STEM).text == ShardIndex.build(store.tar(STEM)).text
    assert storage.exists(index_path(store.tar(STEM)))


def test_a_failing_disk_is_no_damaged_tar(store: LabelStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is removed that could not be read."""
    leave_a_tar(store, labels("a"))
    before = files(store.path)

    def fail(*_: object) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(storage.StorageError, match="input/output error"):
        store.commit(STEM, labels("a"), keys=["a"])
    monkeypatch.undo()
    assert files(store.path) == before


def test_cleaning(store: LabelStore) -> None:
    write(store, labels("a"))
    for folder in ("", "shards", "ledger"):
        (Path(store.path) / folder / f".x.{TAG}.tmp").touch()
    assert store.clean(keep={TAG}) == [] == store.clean(older_than_s=60)
    assert [os.path.relpath(path, store.path) for path in store.clean()] == [
        f".x.{TAG}.tmp", f"shards/.x.{TAG}.tmp", f"ledger/.x.{TAG}.tmp",
    ]  # fmt: skip
    assert len(files(store.path)) == 4


# --- failed samples, tried again


def test_a_shard_is_replaced(any_store: LabelStore) -> None:
    store = any_store
    before = write(store, [label("a"), LabelSample.failed("b", "bad_image")], by={"node": "n1"})
    samples = [sample if sample.failure is None else label("b", 1) for sample in store.read(STEM)]
    commit = store.replace(STEM, samples, keys=["a", "b"], by={"node": "n2"})
    assert commit.outcome == "written" and commit.entry is not None and commit.entry.failures == {}
    assert store.entry(STEM) == commit.entry != before
    assert store.done(STEM) and commit.entry.sha256 == storage.sha256_file(store.tar(STEM))
    assert [(s.key, s.members) for s in store.read(STEM)] == [(s.key, s.members) for s in samples]
    assert store.index(STEM).text == storage.read_bytes(index_path(store.tar(STEM))).decode()
    assert store.replace(STEM, samples, keys=["a", "b"], by={"node": "n3"}) == Commit("duplicate", commit.entry)
    assert store.replace(STEM, labels("a", "b"), keys=["a", "b"], still_mine=lambda: False) == Commit("fenced", None)
    assert store.entry(STEM) == commit.entry and store.done(STEM)
    with pytest.raises(DataError, match="1 samples, the source shard has 2"):
        store.replace(STEM, labels("a"), keys=["a", "b"])
    assert store.entry(STEM) == commit.entry and store.done(STEM)


def test_a_run_that_meets_a_retry(any_store: LabelStore) -> None:
    """The run adopts the old tar after the retry has removed its entry."""
    store = any_store
    write(store, [label("a"), LabelSample.failed("b", "bad_image")])
    remove, theirs = storage.remove_if, []

    def then_the_run(path: str, seen: storage.Stamp, tag: str | None = None) -> bool:
        done = remove(path, seen, tag)
        if path == store.ledger(STEM) and not theirs:
            theirs.append(store.commit(STEM, iter(()), keys=["a", "b"]))
        return done

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "remove_if", then_the_run)
        commit = store.replace(STEM, labels("a", "b"), keys=["a", "b"])
    assert theirs[0].outcome == "adopted"
    assert commit.outcome == "written" and store.entry(STEM) == commit.entry
    assert commit.entry is not None and commit.entry.sha256 == storage.sha256_file(store.tar(STEM))


