"""Label shards and ledger entries that are not as they were written: done again, or made again from what is there."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from cluster import storage
from dataio.labels import LabelStore
from dataio.spec import DataError
from tests.dataio.label_shards import (
    PLACES,
    STEM,
    files,
    labels,
    leave_a_tar,
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


