"""The label sidecar as a folder: never mixed, resumed by listing, summed up, complete or not."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster import storage
from dataio.dataset import Dataset, DatasetInfo
from dataio.labels import LabelSample, LabelStore, plan_digest
from dataio.shards import ShardWriter
from dataio.spec import DataError
from tests.dataio.label_shards import (
    PLACES,
    STEM,
    TAG,
    TEACHER,
    files,
    label,
    labels,
    ledger,
    store_in,
    write,
)


@pytest.fixture
def store(request: pytest.FixtureRequest, tmp_path: Path) -> LabelStore:
    return store_in("local", request, tmp_path)


@pytest.fixture(params=PLACES)
def any_store(request: pytest.FixtureRequest, tmp_path: Path) -> LabelStore:
    return store_in(request.param, request, tmp_path)


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    with ShardWriter(str(tmp_path / "d" / "shards"), shard_samples=3) as writer:
        for i in range(6):
            writer.write(f"k{i}", {"jpg": b"j"})
    DatasetInfo(name="d", role="unlabelled", quantity=None, code=None, samples=6).write(str(tmp_path / "d"))
    return Dataset.open(str(tmp_path / "d"))


def test_digest_is_canonical() -> None:
    assert re.fullmatch("[0-9a-f]{16}", plan_digest(TEACHER))
    assert plan_digest(TEACHER) == plan_digest(dict(reversed(TEACHER.items())))
    assert plan_digest(TEACHER) != plan_digest({**TEACHER, "precision": "bf16"})
    assert plan_digest({"a": "ü", "b": [1, 2.5]}) == "75151e181452ee19"  # names folders: must never change
    with pytest.raises(ValueError, match="JSON"):
        plan_digest({"a": float("nan")})


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
        ({"label_format": 1}, "label_format is 1, this fathom reads 3"),
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


def test_status_sums_up(store: LabelStore) -> None:
    write(store, labels("a", "b"), "000000", seconds=2.0, by={"node": "n1", "finished": 1000.0})
    write(store, labels("c"), "000001", seconds=4.0, by={"node": "n1", "finished": 1010.0})
    write(store, [label("d", quality=1.0), label("e", quality=None)], "000002", seconds=1.5, by={"node": "n0"})
    write(store, labels("f"), "000003", seconds=1.0)
    leave_a_tar_of = store.tar("000003")
    ledger(store, "000003").unlink()
    store.commit("000003", iter(()), keys=["f"], by={"node": "n0", "finished": "later"})
    assert os.path.exists(leave_a_tar_of)
    status = store.status()
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
