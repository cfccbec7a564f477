from __future__ import annotations

import errno
import hashlib
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster import drafts, storage
from cluster.storage import FileMissing, StorageError, Unreachable


@pytest.fixture(params=["local", "file", "memory"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return {"local": str(tmp_path), "file": f"file://{tmp_path}", "memory": f"memory://{tmp_path.name}"}[request.param]


def test_what_is_written_is_read(base: str) -> None:
    path = storage.join(base, "new/folder", "a.bin")
    assert not storage.exists(path)
    storage.atomic_write(path, b"0123456789")
    assert storage.exists(path)
    assert storage.size(path) == 10
    assert storage.read_bytes(path) == b"0123456789"
    assert storage.listdir(storage.join(base, "new/folder")) == ["a.bin"]
    assert storage.listdir(storage.join(base, "new")) == ["folder"]
    assert storage.sha256_file(path) == hashlib.sha256(b"0123456789").hexdigest()
    storage.atomic_write(path, "é")
    assert storage.read_bytes(path) == "é".encode()


def test_a_range_is_exactly_its_bytes(base: str) -> None:
    path = storage.join(base, "a.bin")
    storage.atomic_write(path, bytes(range(100)))
    with storage.open_range(path, 10, 20) as file:
        assert file.read(3) == bytes([10, 11, 12])
        assert file.read() == bytes(range(13, 20))
        assert file.read() == b""
        file.seek(1)
        assert file.read(1) == bytes([11])
    with storage.open_range(path, 90) as file:
        assert file.read() == bytes(range(90, 100))
    with storage.open_range(path, 7, 7) as file:
        assert file.read() == b""
    with storage.open_range(path, 90, 101) as file, pytest.raises(StorageError, match="byte 100, expected 101"):
        file.read()
    with pytest.raises(ValueError, match="range"):
        storage.open_range(path, 5, 4)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENOMEM, errno.EACCES, errno.ETIMEDOUT])
def test_what_hinders_reading_says_nothing_of_the_file(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mount, the rights or the limits of this process: another time, or elsewhere, the file is there and whole."""
    path = tmp_path / "a.bin"
    path.write_bytes(b"abc")

    def fail(*args: object) -> bytes:
        raise OSError(number, os.strerror(number))

    with storage.open_range(str(path), 0) as file:
        monkeypatch.setattr(os, "pread", fail)
        with pytest.raises(Unreachable, match=f"^{re.escape(str(path))}: cannot read: ") as caught:
            file.read()
    assert "make the folder writable" not in str(caught.value)
    monkeypatch.undo()
    for wrong in (tmp_path, path / "x", tmp_path / ("n" * 300)):  # of these the path itself is to blame
        with pytest.raises(StorageError) as told:
            storage.read_bytes(str(wrong))
        assert not isinstance(told.value, Unreachable)


def test_a_store_that_refuses_to_be_written_is_no_store_that_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError("Access Denied")

    fs = type(fsspec.filesystem("memory"))
    monkeypatch.setattr(fs, "pipe_file", refuse)
    monkeypatch.setattr(fs, "cat_file", refuse)
    with pytest.raises(StorageError) as caught:
        storage.atomic_write("memory://refused/a", b"")
    assert not isinstance(caught.value, Unreachable)
    with pytest.raises(Unreachable):
        storage.read_bytes("memory://refused/a")


def test_missing_files_say_so_in_one_line(base: str) -> None:
    path = storage.join(base, "nothing")
    for read in (storage.read_bytes, storage.listdir, storage.size, storage.sha256_file):
        with pytest.raises(FileMissing) as caught:
            read(path)
        assert str(caught.value) == f"{path}: cannot read: no such file or folder: check the path"
        assert isinstance(caught.value, FileNotFoundError)
        assert caught.value.exit_status == 2
        again = pickle.loads(pickle.dumps(caught.value))
        assert str(again) == str(caught.value)
    with pytest.raises(FileMissing), storage.open_range(path, 0, 4) as file:
        file.read()


def test_a_failing_block_leaves_the_target_and_nothing_else(base: str) -> None:
    path = storage.join(base, "a.bin")
    storage.atomic_write(path, b"old")

    def fail_half_way() -> None:
        with storage.atomic_writer(path) as file:
            file.write(b"half of the new")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_half_way()
    assert storage.read_bytes(path) == b"old"
    assert storage.listdir(base) == ["a.bin"]


def test_what_the_block_reads_keeps_its_own_error(base: str) -> None:
    with pytest.raises(FileNotFoundError) as caught, storage.atomic_writer(storage.join(base, "a.bin")):
        Path("/no/such/file").read_bytes()
    assert not isinstance(caught.value, StorageError)


def test_files_larger_than_the_spool_travel_from_disk(monkeypatch: pytest.MonkeyPatch, base: str) -> None:
    monkeypatch.setattr(drafts, "_SPOOL_BYTES", 10)
    storage.atomic_write(storage.join(base, "large"), b"x" * 1000)
    assert storage.read_bytes(storage.join(base, "large")) == b"x" * 1000


def test_unfinished_files_are_not_listed(tmp_path: Path) -> None:
    with storage.atomic_writer(str(tmp_path / "a.bin")) as file:
        file.write(b"x")
        assert len(os.listdir(tmp_path)) == 1
        assert storage.listdir(str(tmp_path)) == []
        assert file.seekable()
    assert storage.listdir(str(tmp_path)) == ["a.bin"]


def test_a_file_is_on_the_disk_before_it_has_its_name_and_the_name_follows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[tuple[str, ...]] = []
    fsync, replace = os.fsync, os.replace

    def recorded_fsync(handle: int) -> None:
        name = os.path.relpath(os.readlink(f"/proc/self/fd/{handle}"), tmp_path)
        if name.endswith(".tmp"):
            name = f"{os.fstat(handle).st_size} bytes"
        events.append(("sync", name))
        fsync(handle)

    def recorded_replace(source: str, target: str) -> None:
        events.append(("replace", os.path.relpath(target, tmp_path)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "replace", recorded_replace)
    with storage.atomic_writer(str(tmp_path / "new" / "a.bin")) as file:
        file.write(b"0123456789")
        assert events == [("sync", ".")]  # the new folder's own name
    assert events[1:] == [("sync", "10 bytes"), ("replace", "new/a.bin"), ("sync", "new")]


def test_new_files_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        storage.atomic_write(str(tmp_path / "a"), b"")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


KILLED = """
import sys, time
from cluster import drafts, storage
path = sys.argv[1]
while True:
    with storage.atomic_writer(path) as file:
        for _ in range(64):
            file.write(b"n" * 65536)
    print("written", flush=True)
"""


def test_a_writer_killed_in_the_middle_leaves_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    for delay_s in (0.0, 0.013, 0.029):
        process = subprocess.Popen([sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.readline() == b"written\n"
        time.sleep(delay_s)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        assert path.read_bytes() == b"n" * (64 * 65536)
        assert storage.listdir(str(tmp_path)) == ["a.bin"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip(f"mounting a small tmpfs needs root: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_named_and_the_target_stays(small_disk: Path) -> None:
    path = small_disk / "a.bin"
    storage.atomic_write(str(path), b"old")
    with pytest.raises(StorageError, match=r"a\.bin: cannot write: the disk is full: free space") as caught:
        storage.atomic_write(str(path), b"n" * (2 << 20))
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == b"old"
    assert os.listdir(small_disk) == ["a.bin"]
    with pytest.raises(StorageError, match=r"a checkpoint needs 5 MB, 1\.\d+ MB are free at .*disk: free space"):
        storage.require_free(str(small_disk / "not/yet/there"), 5_000_000, "a checkpoint")
    storage.require_free(str(small_disk / "not/yet/there"), 500_000, "a checkpoint")
    with pytest.raises(StorageError, match="disk is full"):
        storage.append_line(str(small_disk / "log"), "n" * (2 << 20))


def test_a_refused_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)  # root is refused nothing
    with pytest.raises(StorageError, match="a: cannot write: permission denied: make the folder writable"):
        storage.atomic_write(str(tmp_path / "a"), b"")


def test_a_file_in_the_way_and_a_folder_as_target(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="a part of the path is a file"):
        storage.atomic_write(str(tmp_path / "file" / "below"), b"")
    (tmp_path / "folder").mkdir()
    with pytest.raises(StorageError, match="it is a folder"):
        storage.atomic_write(str(tmp_path / "folder"), b"")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_lines_are_appended_and_a_torn_one_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "new" / "log.jsonl"
    storage.append_line(str(path), "one", sync=True)
    with path.open("ab") as file:
        file.write(b'{"torn')
    storage.append_line(str(path), "two")
    assert path.read_text() == 'one\n{"torn\ntwo\n'
    with pytest.raises(ValueError, match="one line"):
        storage.append_line(str(path), "a\nb")
    with pytest.raises(StorageError, match="cannot append"):
        storage.append_line("memory://log", "x")


@pytest.mark.parametrize(
    ("path", "said"),
    [("foo://x", "foo"), ("pipe:cat /etc/hostname", "shell"), ("file:///no/such", "no such file")],
)
def test_addresses_nobody_serves(path: str, said: str) -> None:
    with pytest.raises(StorageError, match=said) as caught:
        storage.read_bytes(path)
    assert "\n" not in str(caught.value)


def test_join_takes_relative_names() -> None:
    assert storage.join("s3://bucket/", "a", "b") == "s3://bucket/a/b"
    assert storage.join("memory://", "a") == "memory://a"
    assert storage.join("/data/", "a", "b") == "/data/a/b"
    for part in ("/etc", "s3://other", ""):
        with pytest.raises(StorageError, match="relative"):
            storage.join("s3://bucket", part)


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (999_600, "1 MB"), (7e13, "70 TB")]
)
def test_bytes_for_people(count: float, text: str) -> None:
    assert storage.human_bytes(count) == text
