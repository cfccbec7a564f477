"""What several runs on one folder tell each other, through files."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from cluster import claims as module
from cluster.claims import Claims, alone, read_claims


class Clocks:
    """Of the files and of the process, moved by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def time(self) -> float:
        return self.now

    def monotonic(self) -> float:
        return self.now + 77

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clocks(monkeypatch: pytest.MonkeyPatch) -> Clocks:
    made = Clocks()
    monkeypatch.setattr(module, "time", made)
    return made


def three(folder: str) -> list[Claims]:
    return [Claims(folder, owner, 10.0) for owner in ("aaaaaaaa", "bbbbbbbb", "cccccccc")]


def test_who_claims_first_has_it(tmp_path: Path, clocks: Clocks) -> None:
    a, b, _ = three(str(tmp_path / "leases"))
    assert not b.claim(["s0", "s1"]).claimed
    clocks.now += 1
    found = a.claim(["s1", "s2"])
    assert found.claimed == {"s0": 1000.0, "s1": 1000.0}
    assert set(a.items) == {"s2"} and set(b.items) == {"s0", "s1"}
    assert b.claim(["s0", "s1"]).claimed == {"s2": 1001.0}
    assert (a.others, b.others) == (1, 1)


def test_of_two_at_once_the_smaller_name_has_it(tmp_path: Path, clocks: Clocks) -> None:
    """Each writes before it reads, so that both see both: here the second reads first."""
    a, b, _ = three(str(tmp_path))
    b.claim(["s0"])
    assert not a.claim(["s0"]).claimed and set(a.items) == {"s0"}
    assert b.claim(["s0"]).claimed == {"s0": 1000.0} and not set(b.items)


def test_what_is_not_claimed_again_is_free(tmp_path: Path, clocks: Clocks) -> None:
    a, b, _ = three(str(tmp_path))
    a.claim(["s0", "s1"])
    a.claim(["s1"], done=["s0"])
    found = b.claim([])
    assert found.claimed == {"s1": 1000.0} and found.done == {"s0"}
    clocks.now += 9
    a.claim([], done=["s1"])
    clocks.now += 2
    a.claim([])
    assert b.claim([]).done == {"s1"}  # told for as long as a lease lasts


def test_a_run_that_says_nothing_is_gone_and_its_items_are_free(tmp_path: Path, clocks: Clocks) -> None:
    a, b, c = three(str(tmp_path))
    a.claim(["s0"])
    for _ in range(4):
        clocks.now += 4
        b.claim(["s1"])
        found = c.claim(["s0", "s2"])
    assert found.claimed == {"s1": 1004.0}
    assert set(c.items) == {"s0", "s2"} and c.others == 1
    assert (tmp_path / "aaaaaaaa.json").exists()
    clocks.now += 100
    c.claim([])
    assert not (tmp_path / "aaaaaaaa.json").exists()


def test_leaving_is_told_once(tmp_path: Path, clocks: Clocks) -> None:
    a, b, _ = three(str(tmp_path))
    a.claim(["s0"])
    assert not b.claim([]).left
    a.withdraw()
    assert b.claim([]).left
    assert not b.claim([]).left
    assert b.others == 0 and [claim.owner for claim in read_claims(str(tmp_path))] == ["bbbbbbbb"]


def test_clocks_of_machines_may_differ(tmp_path: Path, clocks: Clocks) -> None:
    """Whether a run is there is told from its file changing, not from the time in it."""
    a, b, _ = three(str(tmp_path))
    clocks.now -= 500
    a.claim(["s0"])
    clocks.now += 500
    assert b.claim(["s0"]).claimed == {"s0": 500.0}


def test_a_dead_process_of_this_machine_is_gone_at_once(tmp_path: Path) -> None:
    a, b, _ = three(str(tmp_path))
    a.claim(["s0"])
    path = tmp_path / "aaaaaaaa.json"
    content = json.loads(path.read_text())
    assert content["pid"] == os.getpid()
    assert b.claim(["s0"]).claimed
    path.write_text(json.dumps(content | {"born": content["born"] - 100}))  # its number is another's by now
    assert not b.claim(["s0"]).claimed
    assert not path.exists()


def test_a_process_number_of_another_container_says_nothing(tmp_path: Path) -> None:
    """Two containers may have their machine's name."""
    a, b, _ = three(str(tmp_path))
    a.claim(["s0"])
    path = tmp_path / "aaaaaaaa.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"born": content["born"] - 100, "space": "another"}))
    assert b.claim(["s0"]).claimed and path.exists()


def test_a_run_of_longer_leases_is_there_for_longer(tmp_path: Path, clocks: Clocks) -> None:
    Claims(str(tmp_path), "dddddddd", 600.0).claim(["s0"])
    clocks.now += 1
    _, b, _ = three(str(tmp_path))
    assert b.claim(["s0"]).claimed
    for _ in range(5):
        clocks.now += 100
        assert b.claim(["s0"]).claimed
    clocks.now += 101
    assert not b.claim(["s0"]).claimed and set(b.items) == {"s0"}


def test_a_folder_that_goes_with_its_last_file(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an object store, between a question and the next."""
    a, _, _ = three(f"{s3}/leases")
    a.claim([])
    listdir = module.storage.listdir

    def late(folder: str) -> list[str]:
        a.withdraw()
        return listdir(folder)

    monkeypatch.setattr(module.storage, "listdir", late)
    assert read_claims(f"{s3}/leases") == []
    assert alone(f"{s3}/leases", 10.0)


def test_files_that_are_none_of_ours_are_passed_over(tmp_path: Path) -> None:
    a, _, _ = three(str(tmp_path))
    a.claim([])
    whole = json.loads((tmp_path / "aaaaaaaa.json").read_text())
    for name, text in (
        ("x.json", "{"), ("y.json", "[]"), ("z.txt", "{}"), ("w.json", '{"owner": "w"}'),
        ("u.json", json.dumps(whole | {"owner": "u", "items": ["s0"]})),
        ("v.json", json.dumps(whole | {"owner": "v", "ends": "soon"})),
        ("s.json", json.dumps(whole | {"owner": "s", "pid": -1})),
        ("t.json", json.dumps(whole | {"owner": "t", "leased": {"s0": "me"}})),
        ("r.json", json.dumps(whole | {"owner": "../ledger/000000", "born": 0.0})),  # its file would be removed
    ):  # fmt: skip
        (tmp_path / name).write_text(text)
    assert not a.claim(["s0"]).claimed
    assert [claim.owner for claim in read_claims(str(tmp_path))] == ["aaaaaaaa"]
    assert read_claims(str(tmp_path / "nowhere")) == []


def test_in_an_object_store(s3: str) -> None:
    a, b, _ = three(f"{s3}/leases")
    a.claim(["s0"], {"s0": {"node": "n", "worker": "w", "progress": 0.5}})
    found: Any = b.claim(["s0", "s1"])
    assert set(found.claimed) == {"s0"} and set(b.items) == {"s1"}
    [claim] = [claim for claim in read_claims(f"{s3}/leases") if claim.owner == "aaaaaaaa"]
    assert claim.leased["s0"]["progress"] == 0.5
    a.withdraw()
    a.withdraw()
    assert b.claim(["s0"]).left and set(b.items) == {"s0"}


def test_who_is_alone_and_who_is_not(tmp_path: Path, clocks: Clocks, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that was killed elsewhere is silent; one that works writes again; two that end at once see nobody."""
    folder = str(tmp_path)
    assert alone(folder, 10.0) and clocks.now == 1000.0
    a, b, _ = three(folder)
    a.claim(["s0"])
    assert alone(folder, 10.0) and 1010 < clocks.now < 1012
    assert not alone(folder, 10.0, lambda: True)
    clocks.now += 10
    assert alone(folder, 10.0) and clocks.now < 1022  # its time was over before

    def sleep(seconds: float) -> None:
        clocks.now += seconds
        b.claim([])

    b.claim([])
    monkeypatch.setattr(clocks, "sleep", sleep)
    assert not alone(folder, 10.0) and clocks.now < 1023
    b.withdraw()
    assert alone(folder, 10.0) and clocks.now < 1023
    Claims(folder, "dddddddd", 100.0).claim([])  # of longer leases
    monkeypatch.setattr(clocks, "sleep", Clocks.sleep.__get__(clocks))
    before = clocks.now
    assert alone(folder, 10.0) and clocks.now - before > 100
