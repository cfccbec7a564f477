"""`label verify`: all that can be wrong with a sidecar is found, and named for what it is."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster import storage
from dataio.dataset import Dataset
from dataio.label_check import KINDS, VerifyReport, verify
from dataio.labels import LabelSample, LabelStore
from dataio.spec import DataError
from tests.dataio.fakes import shards_of, unlabelled, write_dataset

TAG = "0123abcd"
KEYS = [["s0_000", "s0_001", "s0_002"], ["s1_000", "s1_001"]]
FAILED = "s0_001"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    shards = shards_of([3, 2], lambda seed: unlabelled(seed, 14, 14))
    return Dataset.open(write_dataset(tmp_path_factory.mktemp("data") / "d", shards, with_depth=False))


def sample(key: str, seed: int = 0) -> LabelSample:
    if key == FAILED:
        return LabelSample.failed(key, "bad_image")
    disparity_HW = np.random.default_rng(seed).uniform(0, 5, (14, 28)).astype(np.float32)
    return LabelSample.encoded(key, disparity_HW, {"quality": 0.5})


def made(path: str, dataset: Dataset) -> LabelStore:
    store = LabelStore.create(path, {"teacher": "t", "dataset": {"fingerprint": dataset.fingerprint}})
    for number, keys in enumerate(KEYS):
        store.commit(f"{number:06d}", [sample(key) for key in keys], keys=keys, seconds=1.0)
    return store


@pytest.fixture
def store(tmp_path: Path, dataset: Dataset) -> LabelStore:
    return made(str(tmp_path / "labels"), dataset)


@pytest.fixture(params=["local", "memory", "s3"])
def any_store(request: pytest.FixtureRequest, tmp_path: Path, dataset: Dataset) -> LabelStore:
    if request.param == "s3":
        return made(f"{request.getfixturevalue('s3')}/labels", dataset)
    base = {"local": str(tmp_path), "memory": f"memory://{tmp_path.name}"}[request.param]
    return made(storage.join(base, "labels"), dataset)


def found(report: VerifyReport, store: LabelStore) -> list[tuple[str, str]]:
    return sorted((each.kind, each.path.removeprefix(store.path + "/")) for each in report.findings)


def test_a_sound_sidecar_is_proved(any_store: LabelStore, dataset: Dataset) -> None:
    seen: list[tuple[int, int]] = []
    report = verify(any_store, dataset, progress=lambda done, total: seen.append((done, total)))
    assert report.ok and report.findings == () == report.notes
    assert (report.shards, report.samples, report.failures) == (2, 5, {"bad_image": 1})
    assert report.bytes == any_store.status().bytes
    assert report.quality == [0] * 10 + [4] + [0] * 9
    assert seen == [(1, 2), (2, 2)]
    assert str(report).endswith(f"proved: every key of {dataset.path} is labelled once or listed as failed")
    assert "5 samples in 2 shards" in str(report) and "4 labelled, 1 failed" in str(report)
    assert json.loads(report.to_json())["ok"] is True
    assert "not decoded" in str(verify(any_store, dataset, decode=False))


def test_several_processes_find_the_same(store: LabelStore, dataset: Dataset) -> None:
    Path(store.tar("000001")).write_bytes(b"")
    assert verify(store, dataset, 2) == verify(store, dataset)
    assert not verify(store, dataset).ok


def rewrite(store: LabelStore, keys: list[str], **changes: LabelSample) -> None:
    """Another shard 0, as no writer of ours makes it."""
    samples = [changes.get(key, sample(key)) for key in keys]
    (Path(store.path) / "ledger/000000.json").unlink()
    Path(store.tar("000000")).unlink()
    store.commit("000000", samples, keys=keys, seconds=1.0)


def edit(store: LabelStore, **changes: Any) -> None:
    path = Path(store.ledger("000000"))
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def poke(path: str, content: bytes, in_place_of: bytes | None = None) -> None:
    if in_place_of is not None:
        whole = Path(path).read_bytes()
        assert in_place_of in whole
        content = whole.replace(in_place_of, content, 1)
    Path(path).write_bytes(content)


def relabel(store: LabelStore) -> None:
    info = Path(store.path) / "labels.json"
    info.write_text(info.read_text().replace('"t"', '"u"'))


S = "shards/000000"
L = "ledger/000000.json"
DAMAGES: dict[str, tuple[Callable[[LabelStore], object], list[tuple[str, str]]]] = {
    "one bit of a label": (
        lambda s: poke(s.tar("000000"), b"IDAT\x79", b"IDAT\x78"),
        [("damaged", f"{S}.tar"), ("undecodable", f"{S}.tar")],
    ),
    "one bit of a name": (
        lambda s: poke(s.tar("000000"), b"s0_00!", b"s0_000"),
        [("damaged", f"{S}.tar")],
    ),
    "cut": (lambda s: poke(s.tar("000000"), Path(s.tar("000000")).read_bytes()[:700]), [("damaged", f"{S}.tar")]),
    "empty": (lambda s: poke(s.tar("000000"), b""), [("damaged", f"{S}.tar")]),
    "no tar": (lambda s: Path(s.tar("000000")).unlink(), [("missing", f"{S}.tar")]),
    "no entry": (lambda s: Path(s.ledger("000000")).unlink(), [("entry", L)]),
    "damaged entry": (lambda s: poke(s.ledger("000000"), b"{"), [("entry", L)]),
    "unknown field": (lambda s: edit(s, more=1), [("entry", L)]),
    "entry of another": (lambda s: edit(s, stem="000001"), [("entry", L)]),
    "entry of another teacher's": (lambda s: edit(s, plan="0123456789abcdef"), [("entry", L)]),
    "neither": (
        lambda s: (Path(s.tar("000000")).unlink(), Path(s.ledger("000000")).unlink()),
        [("missing", f"{S}.tar")],
    ),
    "other checksum": (lambda s: edit(s, sha256="0" * 64), [("damaged", f"{S}.tar")]),
    "other size": (lambda s: edit(s, bytes=1), [("damaged", f"{S}.tar")]),
    "failure forgotten": (lambda s: edit(s, failures={}), [("ledger", L)]),
    "failure of another": (lambda s: edit(s, failures={"bad_image": ["s0_002"]}), [("ledger", L)]),
    "other counts": (lambda s: edit(s, samples=2, quality=None), [("ledger", L), ("ledger", L)]),
    "no index": (lambda s: (Path(s.path) / f"{S}.idx").unlink(), [("index", f"{S}.idx")]),
    "other index": (lambda s: poke(f"{s.path}/{S}.idx", b"v1.2 0\n"), [("index", f"{S}.idx")]),
    "a key less": (lambda s: rewrite(s, KEYS[0][:2]), [("missing_key", f"{S}.tar")]),
    "a key more": (lambda s: rewrite(s, [*KEYS[0], "more"]), [("extra_key", f"{S}.tar")]),
    "a key twice": (
        lambda s: rewrite(s, [KEYS[0][0], KEYS[0][0], *KEYS[0][1:]]),
        [("extra_key", f"{S}.tar")],
    ),
    "another key": (
        lambda s: rewrite(s, [*KEYS[0][:2], "other"]),
        [("extra_key", f"{S}.tar"), ("missing_key", f"{S}.tar")],
    ),
    "another order": (lambda s: rewrite(s, KEYS[0][::-1]), [("order", f"{S}.tar")]),
    "a label that is none": (
        lambda s: rewrite(s, KEYS[0], s0_000=LabelSample("s0_000", {"disparity.png": b"x", "json": b'{"scale": 1}'})),
        [("undecodable", f"{S}.tar")],
    ),
    "a format nobody knows": (
        lambda s: rewrite(s, KEYS[0], s0_000=LabelSample("s0_000", {"disparity.xyz": b"x", "json": b"{}"})),
        [("undecodable", f"{S}.tar")],
    ),
    "temporaries": (
        lambda s: [
            poke(f"{s.path}/{name}", b"")
            for name in (f".labels.json.{TAG}.tmp", f"shards/.000000.tar.{TAG}.tmp", f"ledger/.000000.json.{TAG}.tmp")
        ],
        [
            ("temporary", f".labels.json.{TAG}.tmp"),
            ("temporary", f"ledger/.000000.json.{TAG}.tmp"),
            ("temporary", f"shards/.000000.tar.{TAG}.tmp"),
        ],
    ),
    "strangers": (
        lambda s: [poke(f"{s.path}/{name}", b"") for name in ("notes.txt", "shards/000000.zip", "ledger/x")],
        [("foreign", "ledger/x"), ("foreign", "notes.txt"), ("foreign", "shards/000000.zip")],
    ),
    "links that lead nowhere": (
        lambda s: [Path(f"{s.path}/{name}").symlink_to("nowhere") for name in ("notes", "shards/x", "ledger/x")],
        [("foreign", "ledger/x"), ("foreign", "notes"), ("foreign", "shards/x")],
    ),
    "strangers among runs": (
        lambda s: [
            (Path(s.path) / "leases" / "more").mkdir(parents=True), poke(f"{s.path}/leases/holiday.mov", b""),
        ],
        [("foreign", "leases/holiday.mov"), ("foreign", "leases/more")],
    ),
    "folders": (
        lambda s: [Path(f"{s.path}/{name}").mkdir() for name in ("more", "shards/more.tar", "ledger/x.json")],
        [("foreign", "ledger/x.json"), ("foreign", "more"), ("foreign", "shards/more.tar")],
    ),
    "shards of another": (
        lambda s: [poke(f"{s.path}/{name}", b"") for name in ("shards/000002.tar", "shards/x.idx", "ledger/7.json")],
        [("unknown_shard", "ledger/7.json"), ("unknown_shard", "shards/000002.tar"), ("unknown_shard", "shards/x.idx")],
    ),
    "edited description": (relabel, [("info", "labels.json")]),
    "no description": (lambda s: (Path(s.path) / "labels.json").unlink(), [("info", "labels.json")]),
    "a file where a folder belongs": (lambda s: poke(f"{s.path}/leases", b""), [("foreign", "leases")]),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_what_is_wrong_is_found(store: LabelStore, dataset: Dataset, what: str) -> None:
    damage, expected = DAMAGES[what]
    damage(store)
    report = verify(store, dataset)
    assert found(report, store) == sorted(expected), report
    assert not report.ok and f"not proved: {len(expected)} findings" in str(report)
    assert all(each.kind in KINDS and each.text for each in report.findings)


def test_everything_is_told_not_just_the_first(store: LabelStore, dataset: Dataset) -> None:
    for damage in ("strangers", "temporaries", "no index", "failure forgotten"):
        DAMAGES[damage][0](store)
    Path(store.tar("000001")).unlink()
    report = verify(store, dataset)
    assert len(report.findings) == 9
    assert len(json.loads(report.to_json())["findings"]) == 9
    assert "1 index (" in str(report) and "3 foreign (" in str(report) and "and" not in str(report).splitlines()[-1]


def test_many_of_a_kind_are_counted(store: LabelStore, dataset: Dataset) -> None:
    for i in range(5):
        (Path(store.path) / f"stray{i}").touch()
    assert "5 foreign (does not belong there: move it away):" in str(verify(store, dataset))
    assert "  and 2 more" in str(verify(store, dataset)).splitlines()


def test_labels_of_another_dataset(store: LabelStore, dataset: Dataset, tmp_path: Path) -> None:
    other = replace(dataset, fingerprint="0" * 64)
    assert found(verify(store, other), store) == [("other_dataset", "labels.json")]
    unknown = LabelStore.create(str(tmp_path / "other"), {"teacher": "t"})
    kinds = [kind for kind, _ in found(verify(unknown, dataset), unknown)]
    assert kinds == ["missing", "missing", "other_dataset"]


def test_runs_at_work_are_noted(store: LabelStore, dataset: Dataset) -> None:
    for name in ("leases", "telemetry"):
        (Path(store.path) / name).mkdir()
    assert verify(store, dataset).ok and verify(store, dataset).notes == ()
    (Path(store.path) / "leases" / "0badcafe.json").touch()
    (Path(store.path) / "telemetry" / "label-0.json").touch()
    report = verify(store, dataset)
    assert report.ok
    assert [(note.kind, note.path.removeprefix(store.path)) for note in report.notes] == [
        ("working", "/leases/0badcafe.json"),
        ("working", "/telemetry/label-0.json"),
    ]
    assert "2 working (a run is at work here, or died here):" in str(report)


def test_decoding_may_be_left_out(store: LabelStore, dataset: Dataset) -> None:
    DAMAGES["a label that is none"][0](store)
    assert verify(store, dataset, decode=False).ok
    assert not verify(store, dataset).ok


def test_a_missing_package_is_no_damage(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To delete the shards would be the wrong advice."""
    monkeypatch.setitem(sys.modules, "imagecodecs", None)
    content = {"teacher": "t", "dataset": {"fingerprint": dataset.fingerprint}, "encoding": "jxl"}
    store = LabelStore.create(str(tmp_path / "jxl"), content)
    with pytest.raises(DataError, match="JPEG XL labels need imagecodecs"):
        verify(store, dataset)
    assert not verify(store, dataset, decode=False).ok


def test_findings_in_a_store(s3: str, dataset: Dataset) -> None:
    store = made(f"{s3}/labels", dataset)
    whole = storage.read_bytes(store.tar("000000"))
    storage.atomic_write(store.tar("000000"), whole[:-512] + b"!" * 512)
    storage.atomic_write(f"{store.path}/stray", b"")
    storage.atomic_write(f"{store.path}/leases/x.json", b"")
    storage.atomic_write(f"{store.path}/more/y", b"")
    seen = storage.stamp(store.ledger("000001"))
    assert seen is not None and storage.remove_if(store.ledger("000001"), seen)
    report = verify(store, dataset)
    assert found(report, store) == [
        ("damaged", "shards/000000.tar"),
        ("entry", "ledger/000001.json"),
        ("foreign", "more"),
        ("foreign", "stray"),
    ]
    assert [note.path for note in report.notes] == [f"{store.path}/leases/x.json"]
