"""Datasets behind URLs: packed there, streamed from there, from local copies that are checked and bounded."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import subprocess
import threading
from collections.abc import Mapping
from pathlib import Path

import fsspec
import pytest

from cluster import storage
from cluster.storage import StorageError
from dataio.cache import ShardCache
from dataio.check import check_dataset
from dataio.dataset import Dataset
from dataio.loader import Loader
from dataio.pack_synth import pack_synth
from dataio.spec import DataError, DataSpec, RoleNeeds, RoleSpec


def pack(out: str, count: int = 12) -> Dataset:
    pack_synth("labelled", out, seed=1, count=count, size=56, samples_per_shard=4)
    return Dataset.open(out)


def batches(folder: str, count: int, cursor: Mapping[str, int] | None = None, **data: object) -> list[tuple]:
    """(keys, first view's sum, cursor) of each batch."""
    role = RoleSpec(datasets=(folder,), batch=4, lanes=2)
    spec = DataSpec(roles={"r": role}, input_size=28, shuffle_window=4, **data)  # type: ignore[arg-type]
    with Loader(spec, {"r": RoleNeeds()}, views=("clean",), seed=1, cursor=cursor) as loader:
        taken = [next(loader) for _ in range(count)]
    return [(b.keys, b.views["clean"].double().sum().item(), b.weight_B.tolist(), dict(b.cursor)) for b in taken]


def test_from_s3_as_from_a_folder(s3: str, tmp_path: Path) -> None:
    local, far = str(tmp_path / "d"), f"{s3}/data/d"
    pack(local)
    assert pack(far).fingerprint == Dataset.open(local).fingerprint
    wanted = batches(local, 8)
    assert batches(far, 8) == wanted
    cache = tmp_path / "a cache"
    assert batches(far, 8, cache=str(cache)) == wanted
    copies = [path for path in cache.iterdir() if path.suffix != ".lock"]
    assert sorted(path.stat().st_size for path in copies) == sorted(
        storage.size(s.tar) for s in Dataset.open(far).shards
    )
    # another run, from another counter, out of the same copies
    times = {path: path.stat().st_ino for path in copies}
    assert batches(far, 2, cursor=wanted[5][3], cache=str(cache)) == wanted[6:8]
    assert {path: path.stat().st_ino for path in copies} == times
    assert check_dataset(far).bad == {}


def test_sums_are_those_of_sha256sum(tmp_path: Path) -> None:
    dataset = pack(str(tmp_path / "d"))
    done = subprocess.run(["sha256sum", "--check", "SHA256SUMS"], cwd=tmp_path / "d", capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count(": OK") == 3
    assert [shard.sha256 for shard in dataset.shards] == [storage.sha256_file(shard.tar) for shard in dataset.shards]
    (tmp_path / "d" / "SHA256SUMS").write_text("rubbish\n")
    with pytest.raises(DataError, match=r"SHA256SUMS: 'rubbish' is no line of sha256sum"):
        Dataset.open(str(tmp_path / "d"))


@pytest.mark.parametrize("cached", [False, True])
def test_a_store_that_fails_ends_the_run_and_blames_no_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cached: bool
) -> None:
    far = f"memory://failing-{cached}/d"
    pack(far)
    spec = DataSpec(
        roles={"r": RoleSpec(datasets=(far,), batch=4, lanes=2)},
        input_size=28,
        max_bad_fraction=1.0,
        cache=str(tmp_path / "cache") if cached else None,
    )
    with Loader(spec, {"r": RoleNeeds()}, views=("clean",), seed=1) as loader:
        for shard in Dataset.open(far).shards:
            assert len(shard.index.samples) == 4  # parsed now, and remembered: only the samples are still to be read

        def down(*_: object, **__: object) -> bytes:
            raise ConnectionResetError("the network is down")

        monkeypatch.setattr("cluster.remote.time.sleep", lambda seconds: None)
        monkeypatch.setattr(type(fsspec.filesystem("memory")), "cat_file", down)
        with pytest.raises(StorageError, match="the network is down"):
            next(loader)
        assert loader.quarantine.bad == 0


@pytest.fixture
def far() -> str:
    """A store in memory with three objects of 1000, 2000 and 3000 bytes."""
    for size in (1, 2, 3):
        storage.atomic_write(f"memory://cache-test/{size}.tar", bytes([size]) * 1000 * size)
    return "memory://cache-test"


def test_what_is_read_is_counted(s3: str, tmp_path: Path) -> None:
    far = f"{s3}/d"
    size = sum(shard.index.end for shard in pack(far).shards)
    role = RoleSpec(datasets=(far,), batch=4, lanes=2)
    spec = DataSpec(roles={"r": role}, input_size=28, shuffle_window=12, cache=str(tmp_path / "cache"))
    with Loader(spec, {"r": RoleNeeds()}, views=("clean",), seed=1) as loader:
        assert loader.read_counts() == {"bytes": 0, "cache_hits": 0, "cache_misses": 0}
        for _ in range(6):  # two passes of three batches
            next(loader)
        counts = loader.read_counts()
    assert counts["bytes"] >= size and counts["cache_misses"] == 3 and counts["cache_hits"] > 3


def held(folder: Path) -> list[int]:
    return sorted(path.stat().st_size for path in folder.iterdir() if path.suffix != ".lock")


def test_what_was_used_longest_ago_makes_room(tmp_path: Path, far: str) -> None:
    cache = ShardCache(str(tmp_path), 4000)

    def read(size: int) -> bytes:
        return cache.open_range(f"{far}/{size}.tar", 10, 13).read()

    assert read(1) == b"\1\1\1" and held(tmp_path) == [1000]
    assert read(3) == b"\3\3\3" and held(tmp_path) == [1000, 3000]
    assert read(1) == b"\1\1\1" and (cache.hits, cache.misses) == (1, 2)
    assert read(2) == b"\2\2\2" and held(tmp_path) == [1000, 2000]  # the 3000 were used before the 1000
    assert (read(3) == b"\3\3\3" and held(tmp_path) == [1000, 3000]) or held(tmp_path) == [3000]
    assert sum(held(tmp_path)) <= 4000


def test_what_is_larger_than_the_cache_is_streamed(tmp_path: Path, far: str) -> None:
    cache = ShardCache(str(tmp_path), 2500)
    assert cache.open_range(f"{far}/3.tar", 0, 2).read() == b"\3\3" and held(tmp_path) == []
    assert cache.open_range(f"{far}/2.tar", 0, 2).read() == b"\2\2" and held(tmp_path) == [2000]


def test_a_cache_whose_disk_is_full_is_told_once_and_done_without(
    tmp_path: Path, far: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = ShardCache(str(tmp_path), 10_000)

    def full(path: str) -> object:
        raise StorageError(f"{path}: cannot write: the disk is full")

    monkeypatch.setattr(storage, "atomic_writer", full)
    for size in (1, 2, 1):
        assert cache.open_range(f"{far}/{size}.tar", 0, 2).read() == bytes([size]) * 2
    assert capsys.readouterr().err.count("the disk is full; shards are streamed") == 1
    assert held(tmp_path) == []


def test_an_open_copy_outlives_its_removal(tmp_path: Path, far: str) -> None:
    cache = ShardCache(str(tmp_path), 3000)
    file = cache.open_range(f"{far}/2.tar", 0, 2000)
    assert file.read(1) == b"\2"
    cache.open_range(f"{far}/3.tar", 0, 1).read()
    assert held(tmp_path) == [3000]
    assert file.read() == b"\2" * 1999


def test_a_checksum_that_differs_is_tried_again_and_told(
    tmp_path: Path, far: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, right = f"{far}/1.tar", storage.sha256_file(f"{far}/1.tar")
    cache = ShardCache(str(tmp_path), 10_000)
    with pytest.raises(StorageError, match=r"1\.tar: its SHA-256 is [0-9a-f]{64}, SHA256SUMS says 0000"):
        cache.open_range(path, 0, 5, "0" * 64)
    assert held(tmp_path) == []
    fs = fsspec.filesystem("memory")
    whole, calls = type(fs).cat_file, []

    def torn(self: object, name: str, start: int | None = None, end: int | None = None) -> bytes:
        data = whole(self, name, start=start, end=end)
        calls.append(name)
        return b"x" + data[1:] if len(calls) == 1 else data

    monkeypatch.setattr(type(fs), "cat_file", torn)
    assert cache.open_range(path, 0, 5, right).read() == b"\1" * 5
    assert held(tmp_path) == [1000]


def test_a_changed_object_is_copied_again(tmp_path: Path, far: str) -> None:
    cache = ShardCache(str(tmp_path), 10_000)
    assert cache.open_range(f"{far}/1.tar", 0, 1).read() == b"\1"
    storage.atomic_write(f"{far}/1.tar", b"\7" * 1001)
    assert cache.open_range(f"{far}/1.tar", 0, 1).read() == b"\7"


def test_local_files_are_not_copied(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"abc")
    cache = ShardCache(str(tmp_path / "cache"), 100)
    assert cache.open_range(str(tmp_path / "a.tar"), 1, 3).read() == b"bc"
    assert held(tmp_path / "cache") == []
    with pytest.raises(StorageError, match="holds nothing"):
        ShardCache(str(tmp_path), 0)


def test_threads_make_one_copy(tmp_path: Path, far: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    copy = ShardCache._copy
    monkeypatch.setattr(ShardCache, "_copy", lambda self, *args: made.append(1) or copy(self, *args))
    caches = [ShardCache(str(tmp_path), 10_000) for _ in range(6)]
    found: list[bytes] = []
    threads = [
        threading.Thread(target=lambda c=cache: found.append(c.open_range(f"{far}/3.tar", 5, 8).read()))
        for cache in caches
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [b"\3\3\3"] * 6 and len(made) == 1


def test_what_is_being_copied_counts(tmp_path: Path, far: str, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = type(fsspec.filesystem("memory"))
    whole, started, go = memory.cat_file, threading.Event(), threading.Event()

    def slow(self: object, name: str, start: int | None = None, end: int | None = None) -> bytes:
        if name.endswith("3.tar"):
            started.set()
            assert go.wait(60)
        return whole(self, name, start=start, end=end)

    monkeypatch.setattr(memory, "cat_file", slow)
    maker, other = (ShardCache(str(tmp_path), 4000) for _ in range(2))
    thread = threading.Thread(target=lambda: maker.open_range(f"{far}/3.tar", 0, 1).read())
    thread.start()
    try:
        assert started.wait(60)
        assert held(tmp_path) == [3000]  # its whole size, before it has a byte
        assert other.open_range(f"{far}/1.tar", 0, 1).read() == b"\1" and held(tmp_path) == [1000, 3000]
        # no room, whatever would be removed: so nothing is
        assert other.open_range(f"{far}/2.tar", 0, 1).read() == b"\2" and held(tmp_path) == [1000, 3000]
    finally:
        go.set()
        thread.join()
    assert held(tmp_path) == [1000, 3000] and unfinished(tmp_path) == []
    assert (maker.misses, other.misses) == (1, 1)


def unfinished(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def test_a_lower_limit_holds_from_the_opening_on_and_other_files_stay(tmp_path: Path, far: str) -> None:
    (tmp_path / "notes.txt").write_bytes(b"x" * 5000)
    cache = ShardCache(str(tmp_path), 10_000)
    for size in (1, 2, 3):
        cache.open_range(f"{far}/{size}.tar", 0, 1).read()
    assert held(tmp_path) == [1000, 2000, 3000, 5000]
    ShardCache(str(tmp_path), 3500)
    assert held(tmp_path) == [3000, 5000]


def test_a_copy_with_a_wrong_checksum_never_has_its_name(
    tmp_path: Path, far: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    named: list[object] = []
    monkeypatch.setattr(os, "replace", lambda source, target: named.append(target))
    with pytest.raises(StorageError, match="its SHA-256 is"):
        ShardCache(str(tmp_path), 10_000).open_range(f"{far}/1.tar", 0, 5, "0" * 64)
    assert named == [] and held(tmp_path) == []


def test_a_copy_gets_its_name_while_nobody_counts(tmp_path: Path, far: str, monkeypatch: pytest.MonkeyPatch) -> None:
    replace, named = os.replace, []

    def counted_by_none(source: str, target: str) -> None:
        with (tmp_path / "room.lock").open() as lock, pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        named.append(target)
        replace(source, target)

    monkeypatch.setattr(os, "replace", counted_by_none)
    assert ShardCache(str(tmp_path), 10_000).open_range(f"{far}/1.tar", 0, 1).read() == b"\1"
    assert len(named) == 1


def test_a_folder_that_cannot_be_locked_is_told_once_and_done_without(
    tmp_path: Path, far: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "room.lock").mkdir()
    cache = ShardCache(str(tmp_path), 10_000)
    for size in (1, 2):
        assert cache.open_range(f"{far}/{size}.tar", 0, 2).read() == bytes([size]) * 2
    err = capsys.readouterr().err
    assert err.count("warning: ") == 1 and f"{tmp_path}: " in err and "choose another data.cache" in err


class _Stuck:
    """A source that ends neither well nor badly."""

    def __init__(self, ready: object) -> None:
        self._ready, self._blocks = ready, [b"abc"]

    def __enter__(self) -> _Stuck:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def read(self, _: int) -> bytes:
        if not self._blocks:
            self._ready.set()  # type: ignore[attr-defined]
            threading.Event().wait()
        return self._blocks.pop()


def _hold(folder: str, ready: object, path: str) -> None:
    """In a process of its own: starts a copy that never ends."""
    storage.open_range = lambda *_: _Stuck(ready)  # type: ignore[assignment,return-value]
    ShardCache(folder, 10).open_range(path, 0, 1, "0" * 64)


def test_a_killed_reader_leaves_no_lock_and_no_file(tmp_path: Path) -> None:
    for name in ("source", "other"):
        (tmp_path / f"{name}.tar").write_bytes(b"abcdef")
    source, other = (f"local://{tmp_path}/{name}.tar" for name in ("source", "other"))  # fsspec's name: URLs to us
    sha256 = storage.sha256_file(other)
    folder = tmp_path / "cache"
    spawn = multiprocessing.get_context("spawn")
    ready = spawn.Event()
    child = spawn.Process(target=_hold, args=(str(folder), ready, source))
    child.start()
    try:
        assert ready.wait(60)
        # alive: its file stays, and counts, whoever opens the cache and wants room
        cache = ShardCache(str(folder), 10)
        assert cache.open_range(other, 1, 3, sha256).read() == b"bc"
        assert held(folder) == [6] and len(unfinished(folder)) == 1
    finally:
        child.kill()
        child.join()
    assert cache.open_range(other, 1, 3, sha256).read() == b"bc"  # the same cache makes room
    assert held(folder) == [6] and unfinished(folder) == []
    assert cache.open_range(source, 1, 3, sha256).read() == b"bc"
    assert held(folder) == [6]


def test_what_a_killed_reader_left_goes_when_the_cache_is_opened(tmp_path: Path) -> None:
    dead = tmp_path / f".{'0' * 32}.01234567.tmp"
    dead.write_bytes(b"half")
    ShardCache(str(tmp_path), 10)
    assert unfinished(tmp_path) == []
