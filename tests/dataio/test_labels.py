"""The label sidecar: committed once or not at all, never mixed, joined by key."""

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cluster import storage
from dataio.codec import decode_png16, label_code
from dataio.dataset import Dataset, DatasetInfo
from dataio.index import read_member
from dataio.labels import FAILURE, IMAGE, LabelSample, LabelStore, plan_digest
from dataio.shards import ShardWriter
from dataio.spec import DataError

TEACHER = {"teacher": "0123abcd", "preprocessing": {"size": 518, "flip": True}, "precision": "fp32"}


@pytest.fixture
def store(tmp_path):
    return LabelStore.create(str(tmp_path / "labels"), TEACHER)


@pytest.fixture
def dataset(tmp_path):
    with ShardWriter(str(tmp_path / "d" / "shards"), shard_samples=3) as writer:
        for i in range(6):
            writer.write(f"k{i}", {"jpg": b"j"})
    DatasetInfo(name="d", role="unlabelled", quantity=None, code=None, samples=6).write(str(tmp_path / "d"))
    return Dataset.open(str(tmp_path / "d"))


def labels(*keys: str) -> list[LabelSample]:
    rng = np.random.default_rng(0)
    return [(key, rng.uniform(0, 5, (14, 28)).astype(np.float32), {"quality": 0.5}, None) for key in keys]


def files(folder: str) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


def test_digest_is_canonical():
    assert re.fullmatch("[0-9a-f]{16}", plan_digest(TEACHER))
    assert plan_digest(TEACHER) == plan_digest(dict(reversed(TEACHER.items())))
    assert plan_digest(TEACHER) != plan_digest({**TEACHER, "precision": "bf16"})
    assert plan_digest({"a": "ü", "b": [1, 2.5]}) == "75151e181452ee19"  # names folders: must never change
    with pytest.raises(ValueError, match="JSON"):
        plan_digest({"a": float("nan")})


def test_a_shard_reads_back_in_order(store):
    given = labels("b", "a")
    hollow = np.full((2, 2), np.nan, np.float32)
    samples = [given[0], ("bad", None, {}, "truncated_image"), ("hollow", hollow, {}, None), given[1]]
    entry = store.write_shard("000000", samples, 12.5)
    assert entry.samples == 4
    assert entry.failures == {"truncated_image": ["bad"], "no_valid_disparity": ["hollow"]}
    assert entry.failed == 2
    assert (entry.seconds, entry.bytes) == (12.5, os.path.getsize(store.tar("000000")))
    assert entry.sha256 == storage.sha256_file(store.tar("000000"))
    assert store.entry("000000") == entry
    assert store.done("000000")
    index = store.index("000000")
    assert [found.key for found in index.samples] == ["b", "bad", "hollow", "a"]
    for found, sample in zip(index.samples, samples, strict=True):
        meta = json.loads(read_member(store.tar("000000"), found, "json"))
        png = read_member(store.tar("000000"), found, IMAGE)
        if png is None:
            assert meta[FAILURE] in entry.failures
            continue
        assert meta["quality"] == 0.5
        again_HW = decode_png16(png, label_code(meta))
        assert np.abs(again_HW - sample[1]).max() <= 5 / 8188 * 1.01


def test_the_ledger_comes_last(store, monkeypatch):
    names = []
    write = storage.atomic_write

    def spy(path: str, data: bytes | str) -> None:
        names.append(Path(path).name)
        if path.endswith("000000.json"):
            assert Path(store.tar("000000")).exists()
            assert not store.done("000000")
        write(path, data)

    monkeypatch.setattr(storage, "atomic_write", spy)
    store.write_shard("000000", labels("a"))
    assert names == ["000000.idx", "000000.json"]


def test_an_exception_in_the_middle_leaves_nothing(store):
    before = files(store.path)

    def half():
        yield from labels("a", "b")
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        store.write_shard("000000", half())
    assert files(store.path) == before
    assert not store.done("000000")


def test_a_shard_of_no_samples_has_labels_for_none(store):
    entry = store.write_shard("000000", [])
    assert (entry.samples, entry.failed) == (0, 0)
    assert store.done("000000")
    assert store.write_shard("000000", []) == entry


def test_bytes_that_the_disk_changes_are_noticed(store, monkeypatch):
    from dataio import labels as module

    write = module._HashingFile.write

    def flip(self: object, data: bytes) -> int:
        self._file.write(b"!")
        return write(self, data)

    monkeypatch.setattr(module._HashingFile, "write", flip)
    with pytest.raises(DataError, match="differ"):
        store.write_shard("000000", labels("a"))
    assert list(files(store.path)) == ["labels.json"]


def test_a_late_duplicate_drops_its_work(store):
    store.write_shard("000000", labels("a"), 1.0)
    before = files(store.path)
    assert store.write_shard("000000", iter(()), 2.0).seconds == 1.0
    assert files(store.path) == before
    store.write_shard("000000", labels("a"), 1.0, replace=True)
    assert files(store.path) == before
    assert store.write_shard("000000", labels("a", "b"), 2.0, replace=True).samples == 2
    assert [entry.key for entry in store.index("000000").samples] == ["a", "b"]


def test_done_needs_ledger_and_tar(store):
    assert not store.done("000000")
    store.write_shard("000000", labels("a"))
    os.truncate(store.tar("000000"), 600)
    assert not store.done("000000")
    os.remove(store.tar("000000"))
    assert not store.done("000000")
    store.write_shard("000000", labels("a"))
    assert store.done("000000")


def test_index_of_an_uncommitted_shard(store):
    store.write_shard("000000", labels("a"))
    os.remove(Path(store.path) / "ledger" / "000000.json")
    with pytest.raises(DataError, match=r"no ledger entry.*fathom label run"):
        store.index("000000")


def test_seconds_are_measured_when_not_given(store):
    assert 0 < store.write_shard("000000", labels("a")).seconds < 60


def test_another_description_is_refused(store):
    assert LabelStore.create(store.path, dict(reversed(TEACHER.items()))).digest == store.digest
    with pytest.raises(DataError, match='precision is "fp32", now "bf16"') as caught:
        LabelStore.create(store.path, {**TEACHER, "precision": "bf16"})
    assert "labels.json" in str(caught.value)
    with pytest.raises(DataError, match='taps is null, now "4"'):
        LabelStore.create(store.path, {**TEACHER, "taps": "4"})


def test_open(store, tmp_path):
    assert LabelStore.open(store.path).description == TEACHER
    with pytest.raises(DataError, match=r"no labels\.json.*fathom label run"):
        LabelStore.open(str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"label_format": 2}, "label_format is 2, this fathom reads 1"),
        ({"digst": 1}, "unknown key 'digst': did you mean 'digest'"),
        ({"description": {"teacher": "other"}}, "it was edited"),
        ({"description": 3}, "it was edited"),
    ],
)
def test_wrong_labels_json(store, change, says):
    path = Path(store.path) / "labels.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(DataError, match=re.escape(says)):
        LabelStore.open(store.path)
    path.write_text("{")
    with pytest.raises(DataError, match="not valid JSON"):
        LabelStore.open(store.path)


def test_status_and_completeness(store, dataset):
    with pytest.raises(DataError, match=r"2 of 2 shards .*\(000000, 000001\): `fathom label run` finishes"):
        store.complete_for(dataset)
    store.write_shard("000000", [*labels("k0", "k1"), ("k2", None, {}, "truncated_image")], 3.0)
    status = store.status(dataset)
    assert (status.shards, status.samples, status.seconds) == (1, 3, 3.0)
    assert status.failures == {"truncated_image": 1}
    assert status.missing == ("000001",)
    assert store.status().missing == ()
    with pytest.raises(DataError, match=r"1 of 2 shards .*\(000001\)"):
        store.complete_for(dataset)
    store.write_shard("000001", labels("k3", "k4", "k5"))
    store.complete_for(dataset)


def test_labels_of_another_dataset(store, dataset):
    store.write_shard("000000", labels("k0", "k1", "k2"))
    store.write_shard("000001", labels("k3"))
    with pytest.raises(DataError, match=r"labels 1 samples, .* has 3: .*another dataset"):
        store.complete_for(dataset)
    shards = [replace(shard, samples=1) for shard in dataset.shards[1:]]
    store.complete_for(replace(dataset, shards=shards))


def test_damaged_ledger(store):
    store.write_shard("000000", labels("a"))
    (Path(store.path) / "ledger" / "000000.json").write_text("{")
    with pytest.raises(DataError, match=r"ledger/000000\.json: not valid JSON"):
        store.done("000000")


def test_over_a_url(store):
    remote = LabelStore.create("memory://labels-test", TEACHER)
    for each in (store, remote):
        each.write_shard("000000", labels("a", "b"), 1.0)
    assert remote.entry("000000") == store.entry("000000")
    assert remote.index("000000").text == store.index("000000").text
    assert LabelStore.open("memory://labels-test").committed() == ["000000"]
