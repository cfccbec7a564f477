"""The label sidecar: committed once or not at all, never mixed, joined by key."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster import drafts, storage
from dataio import label_tar
from dataio.codec import decode_png16, label_code
from dataio.dataset import Dataset, DatasetInfo
from dataio.index import ShardIndex, index_path, read_member
from dataio.label_ledger import NodeStatus
from dataio.labels import FAILURE, IMAGE, Commit, LabelSample, LabelStore, LedgerEntry, plan_digest
from dataio.shards import ShardWriter
from dataio.spec import DataError

TEACHER = {"teacher": "0123abcd", "preprocessing": {"size": 518, "flip": True}, "precision": "fp32"}
STEM = "000000"
TAG = "0123abcd"


@pytest.fixture
def store(tmp_path: Path) -> LabelStore:
    return LabelStore.create(str(tmp_path / "labels"), TEACHER)


@pytest.fixture(params=["local", "memory", "s3"])
def any_store(request: pytest.FixtureRequest, tmp_path: Path) -> LabelStore:
    if request.param == "s3":
        return LabelStore.create(f"{request.getfixturevalue('s3')}/labels", TEACHER)
    base = {"local": str(tmp_path), "memory": f"memory://{tmp_path.name}"}[request.param]
    return LabelStore.create(storage.join(base, "labels"), TEACHER)


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    with ShardWriter(str(tmp_path / "d" / "shards"), shard_samples=3) as writer:
        for i in range(6):
            writer.write(f"k{i}", {"jpg": b"j"})
    DatasetInfo(name="d", role="unlabelled", quantity=None, code=None, samples=6).write(str(tmp_path / "d"))
    return Dataset.open(str(tmp_path / "d"))


def label(key: str, seed: int = 0, quality: float | None = 0.5) -> LabelSample:
    disparity_HW = np.random.default_rng(seed).uniform(0, 5, (14, 28)).astype(np.float32)
    return LabelSample.encoded(key, disparity_HW, {} if quality is None else {"quality": quality})


def labels(*keys: str, seed: int = 0) -> list[LabelSample]:
    return [label(key, seed) for key in keys]


def write(store: LabelStore, samples: list[LabelSample], stem: str = STEM, **options: Any) -> LedgerEntry:
    commit = store.commit(stem, samples, keys=[sample.key for sample in samples], **options)
    assert commit.outcome == "written" and not commit.differs and commit.entry is not None
    return commit.entry


def files(folder: str) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


def ledger(store: LabelStore, stem: str = STEM) -> Path:
    return Path(store.ledger(stem))


def test_digest_is_canonical() -> None:
    assert re.fullmatch("[0-9a-f]{16}", plan_digest(TEACHER))
    assert plan_digest(TEACHER) == plan_digest(dict(reversed(TEACHER.items())))
    assert plan_digest(TEACHER) != plan_digest({**TEACHER, "precision": "bf16"})
    assert plan_digest({"a": "ü", "b": [1, 2.5]}) == "75151e181452ee19"  # names folders: must never change
    with pytest.raises(ValueError, match="JSON"):
        plan_digest({"a": float("nan")})


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
    assert first.content().keys() == {"stem", "samples", "failures", "sha256", "bytes", "quality"}
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


def leave_a_tar(store: LabelStore, samples: list[LabelSample]) -> None:
    """As a writer that died before its index."""
    write(store, samples)
    for path in (store.ledger(STEM), index_path(store.tar(STEM))):
        seen = storage.stamp(path)
        assert seen is not None and storage.remove_if(path, seen)


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


def damaged(kind: str, whole: bytes) -> bytes:
    if kind == "header":
        return bytes(512) + whole[512:]
    if kind == "json":
        place = whole.index(b'{"quality"')
        return whole[:place] + b"[" + whole[place + 1 :]
    if kind == "behind":
        return whole[:-1] + b"!"
    if kind == "longer":
        return whole + bytes(10240)
    return whole[: {"empty": 0, "cut": 700, "cut between samples": len(whole) // 2 // 512 * 512, "end": -512}[kind]]


@pytest.mark.parametrize(
    "kind", ["empty", "cut", "cut between samples", "end", "header", "json", "behind", "longer", "other keys"]
)
def test_a_damaged_tar_without_an_entry_is_done_again(store: LabelStore, kind: str) -> None:
    expected = write(store, labels("a", "b", "c", "d"))
    whole = Path(store.tar(STEM)).read_bytes()
    ledger(store).unlink()
    if kind == "other keys":
        Path(store.tar(STEM)).unlink()
        leave_a_tar(store, labels("a", "b", "d", "c"))
    else:
        Path(store.tar(STEM)).write_bytes(damaged(kind, whole))
        assert Path(store.tar(STEM)).read_bytes() != whole
    assert write(store, labels("a", "b", "c", "d")).content() == expected.content()
    assert Path(store.tar(STEM)).read_bytes() == whole
    assert len(files(store.path)) == 4


@pytest.mark.parametrize("damage", ["cut", "gone", "longer"])
def test_a_tar_that_is_not_as_its_entry_says_is_done_again(any_store: LabelStore, damage: str) -> None:
    store = any_store
    expected = write(store, labels("a", "b"))
    whole = storage.read_bytes(store.tar(STEM))
    if damage == "gone":
        seen = storage.stamp(store.tar(STEM))
        assert seen is not None and storage.remove_if(store.tar(STEM), seen)
    else:
        storage.atomic_write(store.tar(STEM), whole[:600] if damage == "cut" else whole + whole)
    assert not store.done(STEM)
    if damage == "gone" or not storage.is_url(store.path):  # listings of stores are taken at their word
        assert store.done_stems() == set()
    assert write(store, labels("a", "b")).content() == expected.content()
    assert storage.read_bytes(store.tar(STEM)) == whole
    assert store.done_stems() == {STEM}


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"{}", b'{"stem": "000000"}', b"\xff\xfe", b'{"samples": NaN}', b"null"]
)
def test_a_damaged_entry_is_made_again_from_its_tar(store: LabelStore, content: bytes) -> None:
    expected = write(store, labels("a"))
    ledger(store).write_bytes(content)
    assert not store.done(STEM) and store.done_stems() == set() and list(store.entries()) == []
    with pytest.raises(DataError, match=r"ledger/000000\.json: "):
        store.entry(STEM)
    commit = store.commit(STEM, iter(()), keys=["a"])
    assert commit.outcome == "adopted" and commit.entry is not None and commit.entry.content() == expected.content()


@pytest.mark.parametrize(
    "change",
    [
        {"stem": 0},
        {"stem": "000001"},
        {"samples": -1},
        {"samples": True},
        {"failures": {"bad": "a"}},
        {"failures": {"bad": []}},
        {"sha256": "0" * 63},
        {"bytes": 1.5},
        {"quality": [0] * 19},
        {"quality": [-1, *[0] * 19]},
        {"seconds": "1"},
        {"by": None},
        {"more": 1},
    ],
)
def test_an_entry_is_looked_at_closely(store: LabelStore, change: dict[str, Any]) -> None:
    write(store, labels("a"))
    ledger(store).write_text(json.dumps({**json.loads(ledger(store).read_text()), **change}))
    with pytest.raises(DataError, match=r"ledger/000000\.json: ") as caught:
        store.entry(STEM)
    assert re.search(r"samples|failures|sha256|bytes|quality|seconds|by|more|stem|entry", str(caught.value))
    assert not store.done(STEM)


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


# --- the folder as a whole


def test_another_description_is_refused(store: LabelStore) -> None:
    assert LabelStore.create(store.path, dict(reversed(TEACHER.items()))).digest == store.digest
    with pytest.raises(DataError, match='precision is "fp32", now "bf16"') as caught:
        LabelStore.create(store.path, {**TEACHER, "precision": "bf16"})
    assert "labels.json" in str(caught.value)
    with pytest.raises(DataError, match='taps is null, now "4"'):
        LabelStore.create(store.path, {**TEACHER, "taps": "4"})


def test_two_that_start_at_once(store: LabelStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second one sees no labels.json yet, and finds it when it writes its own."""
    exists, before = storage.exists, files(store.path)
    looked: list[str] = []

    def late(path: str) -> bool:
        looked.append(path)
        return exists(path) and len(looked) > 1

    monkeypatch.setattr(storage, "exists", late)
    assert LabelStore.create(store.path, TEACHER) == store
    looked.clear()
    with pytest.raises(DataError, match="precision"):
        LabelStore.create(store.path, {**TEACHER, "precision": "bf16"})
    assert files(store.path) == before


def test_open(store: LabelStore, tmp_path: Path) -> None:
    assert LabelStore.open(store.path).description == TEACHER
    with pytest.raises(DataError, match=r"no labels\.json.*fathom label run"):
        LabelStore.open(str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"label_format": 1}, "label_format is 1, this fathom reads 2"),
        ({"digst": 1}, "unknown key 'digst': did you mean 'digest'"),
        ({"description": {"teacher": "other"}}, "it was edited"),
        ({"description": 3}, "it was edited"),
    ],
)
def test_wrong_labels_json(store: LabelStore, change: dict[str, Any], says: str) -> None:
    path = Path(store.path) / "labels.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(DataError, match=re.escape(says)):
        LabelStore.open(store.path)
    path.write_text("{")
    with pytest.raises(DataError, match="not valid JSON"):
        LabelStore.open(store.path)


def test_index_of_an_uncommitted_shard(store: LabelStore) -> None:
    write(store, labels("a"))
    ledger(store).unlink()
    with pytest.raises(DataError, match=r"no ledger entry.*fathom label run"):
        store.index(STEM)


def test_status_and_completeness(any_store: LabelStore, dataset: Dataset) -> None:
    store = any_store
    with pytest.raises(DataError, match=r"2 of 2 shards .*\(000000, 000001\): `fathom label run` finishes"):
        store.complete_for(dataset)
    write(store, [*labels("k0", "k1"), LabelSample.failed("k2", "truncated_image")], seconds=3.0)
    status = store.status(dataset)
    assert (status.shards, status.samples, status.seconds, status.timed_samples) == (1, 3, 3.0, 3)
    assert status.failures == {"truncated_image": 1}
    assert status.missing == ("000001",)
    assert store.status().missing == ()
    with pytest.raises(DataError, match=r"1 of 2 shards .*\(000001\)"):
        store.complete_for(dataset)
    write(store, labels("k3", "k4", "k5"), "000001")
    store.complete_for(dataset)


def test_status_sums_up_by_node(store: LabelStore) -> None:
    write(store, labels("a", "b"), "000000", seconds=2.0, by={"node": "n1", "finished": 1000.0})
    write(store, labels("c"), "000001", seconds=4.0, by={"node": "n1", "finished": 1010.0})
    write(store, [label("d", quality=1.0), label("e", quality=None)], "000002", seconds=1.5, by={"node": "n0"})
    write(store, labels("f"), "000003", seconds=1.0)
    leave_a_tar_of = store.tar("000003")
    ledger(store, "000003").unlink()
    store.commit("000003", iter(()), keys=["f"], by={"node": "n0", "finished": "later"})
    assert os.path.exists(leave_a_tar_of)
    status = store.status()
    assert list(status.nodes) == ["n0", "n1"]
    assert status.nodes["n1"] == NodeStatus(shards=2, samples=3, seconds=6.0, begun=998.0, finished=1010.0)
    assert status.nodes["n0"] == NodeStatus(shards=2, samples=3, seconds=1.5, begun=None, finished=None)
    assert (status.shards, status.samples, status.timed_samples, status.seconds) == (4, 6, 5, 7.5)
    assert status.quality == [0] * 10 + [4] + [0] * 8 + [1]


def test_status_counts_what_is_there(store: LabelStore) -> None:
    write(store, labels("a"), "000000")
    write(store, labels("b"), "000001")
    os.truncate(store.tar("000001"), 600)
    assert (store.status().shards, store.status().samples) == (1, 1)
    assert store.committed() == ["000000", "000001"]


def test_labels_of_another_dataset(any_store: LabelStore, dataset: Dataset) -> None:
    store = any_store
    write(store, labels("k0", "k1", "k2"))
    write(store, labels("k3"), "000001")
    with pytest.raises(DataError, match=r"labels 1 samples, .* has 3: .*another dataset"):
        store.complete_for(dataset)
    shards = [replace(shard, samples=1) for shard in dataset.shards[1:]]
    store.complete_for(replace(dataset, shards=shards))


def requests(caplog: pytest.LogCaptureFixture) -> list[str]:
    found = [record.getMessage() for record in caplog.records if record.name == "werkzeug"]
    caplog.clear()
    return found


def test_resuming_from_a_store_takes_two_listings(s3: str, dataset: Dataset, caplog: pytest.LogCaptureFixture) -> None:
    made_of = {**TEACHER, "dataset": {"fingerprint": dataset.fingerprint}}
    store = LabelStore.create(f"{s3}/labels", made_of)
    write(store, labels("k0", "k1", "k2"))
    write(store, labels("k3", "k4", "k5"), "000001")
    caplog.clear()
    assert store.done_stems() == {"000000", "000001"}
    assert len(requests(caplog)) == 2
    store.complete_for(dataset)
    assert len(requests(caplog)) == 2
    other = LabelStore.create(f"{s3}/other", {**TEACHER, "dataset": {"fingerprint": "another"}})
    write(other, labels("k0", "k1", "k2"))
    write(other, labels("k3"), "000001")
    caplog.clear()
    with pytest.raises(DataError, match="another dataset"):
        other.complete_for(dataset)
    assert len(requests(caplog)) == 4


def test_what_names_files_but_is_no_shard(store: LabelStore) -> None:
    write(store, labels("a"))
    for name in ("notes.txt", f".000001.json.{TAG}.tmp", "000002.json"):
        (Path(store.path) / "ledger" / name).write_text("{}")
    (Path(store.path) / "shards" / "000002.idx").touch()
    assert store.done_stems() == {STEM}
    assert store.committed() == ["000000", "000002"]
