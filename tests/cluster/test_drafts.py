"""Files that appear only if their name is free, by several writers, on disks and in stores; what writers leave."""

from __future__ import annotations

import errno
import os
import re
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import fsspec
import pytest

from cluster import drafts, puts, remote, storage
from cluster.storage import StorageError

TAG, OTHER = "0123abcd", "deadbeef"


@pytest.fixture(params=["local", "file", "memory", "s3"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "s3":
        return str(request.getfixturevalue("s3")) + "/folder"
    return {"local": str(tmp_path), "file": f"file://{tmp_path}", "memory": f"memory://{tmp_path.name}"}[request.param]


@pytest.fixture(params=[64 << 20, 4], ids=["in memory", "from disk"])
def spool(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drafts, "_SPOOL_BYTES", request.param)


@pytest.mark.usefixtures("spool")
def test_the_first_one_wins_and_the_second_is_told(base: str) -> None:
    path = storage.join(base, "new/a.bin")
    with storage.draft(path) as first, storage.draft(path) as second:
        first.file.write(b"first")
        second.file.write(b"the second")
        assert not storage.exists(path)
        assert second.place()
        assert not first.place()
        assert not first.place()
        assert storage.read_bytes(path) == b"the second"
    assert storage.read_bytes(path) == b"the second"
    assert list(storage.sizes(storage.join(base, "new"))) == ["a.bin"]
    assert not storage.write_if_absent(path, b"third")
    assert storage.write_if_absent(storage.join(base, "new/b.bin"), "é")
    assert storage.read_bytes(storage.join(base, "new/b.bin")) == "é".encode()


def test_who_lost_may_try_again_or_replace(base: str) -> None:
    path = storage.join(base, "a.bin")
    storage.atomic_write(path, b"old")
    seen = storage.stamp(path)
    assert seen is not None
    with storage.draft(path) as mine:
        mine.file.write(b"new")
        assert not mine.place()
        assert storage.remove_if(path, seen)
        assert mine.place()
    assert storage.read_bytes(path) == b"new"
    with storage.draft(path) as mine:
        mine.file.write(b"newer")
        assert mine.place(over=True)
    assert storage.read_bytes(path) == b"newer"


def test_who_won_may_place_it_again(base: str) -> None:
    path = storage.join(base, "a.bin")
    with storage.draft(path) as mine:
        mine.file.write(b"mine")
        assert mine.place()
        seen = storage.stamp(path)
        assert seen is not None and mine.stamp in (None, seen)
        assert mine.place() == (not storage.is_url(path))  # a store does not say whose it is
        assert storage.remove_if(path, seen)
        assert mine.place()
    assert storage.read_bytes(path) == b"mine"
    assert list(storage.sizes(base)) == ["a.bin"]


@pytest.mark.usefixtures("spool")
def test_a_draft_is_read_again_before_anybody_sees_it(base: str) -> None:
    path = storage.join(base, "a.bin")
    with storage.draft(path) as mine:
        mine.file.write(b"0123456789")
        with mine.reread() as again:
            assert again.read(4) == b"0123"
            assert again.read() == b"456789"
        assert not storage.exists(path)
        assert mine.place()
    assert storage.read_bytes(path) == b"0123456789"


def test_what_was_not_placed_is_gone(base: str) -> None:
    path = storage.join(base, "a.bin")
    storage.atomic_write(storage.join(base, "b"), b"")
    with storage.draft(path) as mine:
        mine.file.write(b"half")

    def fail() -> None:
        with storage.draft(path) as mine:
            mine.file.write(b"half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert list(storage.sizes(base)) == ["b"]


def test_a_draft_that_was_swept_away_is_told_from_a_disk_that_fails(tmp_path: Path) -> None:
    def reread() -> None:
        with storage.draft(str(tmp_path / "a")) as mine:
            storage.remove_temporaries(str(tmp_path))
            with mine.reread():
                pass

    def place(over: bool) -> None:
        with storage.draft(str(tmp_path / "a")) as mine:
            storage.remove_temporaries(str(tmp_path))
            mine.place(over=over)

    for each in (reread, lambda: place(over=False), lambda: place(over=True)):
        with pytest.raises(storage.Swept, match=r"a: cannot write: its unfinished file .* is gone"):
            each()
    assert list(tmp_path.iterdir()) == []


def test_the_order_of_syncs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Content before name, and the folder after it; the temporary name goes last."""
    events: list[str] = []
    fsync, link, unlink = os.fsync, os.link, os.unlink

    def recorded_fsync(handle: int) -> None:
        name = os.path.relpath(os.readlink(f"/proc/self/fd/{handle}"), tmp_path)
        events.append(f"sync {f'{os.fstat(handle).st_size} bytes' if name.endswith('.tmp') else name}")
        fsync(handle)

    def recorded_link(source: str, target: str) -> None:
        events.append(f"link {os.path.relpath(target, tmp_path)}")
        link(source, target)

    def recorded_unlink(path: str) -> None:
        events.append("unlink the temporary" if path.endswith(".tmp") else "unlink")
        unlink(path)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "link", recorded_link)
    monkeypatch.setattr(os, "unlink", recorded_unlink)
    storage.write_if_absent(str(tmp_path / "new" / "a.bin"), b"0123456789")
    assert events == ["sync .", "sync 10 bytes", "link new/a.bin", "sync new", "unlink the temporary"]


# --- where the usual way does not work


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK])
def test_a_file_system_without_hard_links(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: str, target: str) -> None:
        raise OSError(number, os.strerror(number), source, None, target)

    monkeypatch.setattr(os, "link", refuse)
    path = str(tmp_path / "a.bin")
    assert storage.write_if_absent(path, b"first")
    assert not storage.write_if_absent(path, b"second")
    assert Path(path).read_bytes() == b"first"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_a_refusal_is_no_lost_race(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: str, target: str) -> None:
        raise OSError(errno.EACCES, "Permission denied", source, None, target)

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(StorageError, match="a: cannot write: permission denied: make the folder writable"):
        storage.write_if_absent(str(tmp_path / "a"), b"")
    assert os.listdir(tmp_path) == []


def test_a_link_whose_answer_got_lost_is_our_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = os.link

    def lose(source: str, target: str) -> None:
        link(source, target)
        raise FileExistsError(errno.EEXIST, "File exists", source, None, target)

    monkeypatch.setattr(os, "link", lose)
    assert storage.write_if_absent(str(tmp_path / "a"), b"mine")
    assert os.listdir(tmp_path) == ["a"]


class ClientError(Exception):
    """As botocore raises it."""

    def __init__(self, code: str, status: int) -> None:
        super().__init__(code)
        self.response = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.fixture
def create(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Exception], list[str]]]:
    """Makes the store in memory answer with an error where it shall put only if absent."""
    fs = fsspec.filesystem("memory")
    original = type(fs).pipe_file
    monkeypatch.setattr(remote.time, "sleep", lambda _: None)
    modes: list[str] = []

    def answer(error: Exception) -> list[str]:
        def pipe_file(self: Any, path: str, value: bytes, mode: str = "overwrite", **options: object) -> None:
            modes.append(mode)
            if mode == "create":
                raise error
            original(self, path, value, **options)

        monkeypatch.setattr(type(fs), "pipe_file", pipe_file)
        return modes

    yield answer
    if fs.exists("/drafts"):
        fs.rm("/drafts", recursive=True)


@pytest.mark.parametrize(
    "error",
    [
        FileExistsError(),
        caused(OSError(errno.EINVAL, "At least one of the pre-conditions"), ClientError("PreconditionFailed", 412)),
        caused(OSError(errno.EINVAL, "said otherwise"), ClientError("412", 412)),
    ],
)
def test_a_store_may_say_taken_in_several_ways(create: Any, error: Exception) -> None:
    modes = create(error)
    assert not storage.write_if_absent("memory://drafts/a", b"x")
    assert modes == ["create"]


@pytest.mark.parametrize(
    "error",
    [
        NotImplementedError(),
        TypeError("pipe_file() got an unexpected keyword argument 'mode'"),
        OSError(errno.ENOSYS, "A header you provided implies functionality that is not implemented"),
        caused(OSError(errno.EIO, "said otherwise"), ClientError("Whatever", 501)),
    ],
)
def test_a_store_that_cannot_is_looked_at_first(create: Any, error: Exception) -> None:
    modes = create(error)
    assert storage.write_if_absent("memory://drafts/a", b"first")
    assert not storage.write_if_absent("memory://drafts/a", b"second")
    assert storage.read_bytes("memory://drafts/a") == b"first"
    assert modes == ["create", "overwrite", "create"]


def test_a_store_that_heeds_no_condition_is_found_out_and_looked_at_first(
    monkeypatch: pytest.MonkeyPatch, s3: str, tmp_path: Path
) -> None:
    for base in (str(tmp_path), s3):
        storage.atomic_write(f"{base}/info", b"x")
        assert storage.heeds_condition(f"{base}/info", b"x")
    fs = fsspec.filesystem("memory")
    original = type(fs).pipe_file
    monkeypatch.setattr(type(fs), "pipe_file", lambda self, path, value, mode="": original(self, path, value))
    monkeypatch.setattr(puts, "_heedless", set())
    storage.atomic_write("memory://heedless/info", b"x")
    assert storage.write_if_absent("memory://heedless/info", b"x"), "it makes what is there"
    assert not storage.heeds_condition("memory://heedless/info", b"x")
    assert not storage.write_if_absent("memory://heedless/info", b"y")
    assert storage.write_if_absent("memory://heedless/more", b"z")
    assert storage.read_bytes("memory://heedless/info") == b"x"
    assert storage.write_if_absent("memory://other/info", b"x") and storage.write_if_absent("memory://other/info", b"x")
    fs.rm("/heedless", recursive=True)
    fs.rm("/other", recursive=True)


def test_a_full_disk_for_what_is_about_to_be_sent_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drafts, "_SPOOL_BYTES", 4)

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(drafts.tempfile, "TemporaryFile", full)
    folder = re.escape(drafts.tempfile.gettempdir())
    with pytest.raises(StorageError, match=f"^{folder}: cannot write: the disk is full"):
        storage.atomic_write("memory://drafts/a", b"more than four bytes")


def test_a_full_disk_is_said_of_the_file_and_what_the_block_raises_is_not(tmp_path: Path) -> None:
    path = str(tmp_path / "a")

    def failing(error: Exception) -> None:
        with storage.draft(path) as draft:
            draft.file.write(b"x")
            raise error

    for error in (OSError(errno.ENOMEM, "Cannot allocate memory"), NotImplementedError("aten::x"), KeyError("k")):
        with pytest.raises(type(error)) as caught:
            failing(error)
        assert caught.value is error
    with storage.draft(path) as draft:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        try:
            with pytest.raises(StorageError, match=f"^{re.escape(path)}: cannot write: .*`ulimit -f`"):
                draft.file.write(bytes(100_000))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("stem", ["s" * 120, "s" * 250, "ü" * 120])
def test_long_names_do_not_get_in_each_other_s_way(tmp_path: Path, stem: str) -> None:
    """One writer has drafts of several names that begin alike."""
    names = [f"{stem}.tar", f"{stem}.idx", f"{stem}x.idx"]
    with ExitStack() as stack:
        opened = [stack.enter_context(storage.draft(str(tmp_path / name), TAG)) for name in names]
        for name, draft in zip(names, opened, strict=True):
            draft.file.write(name.encode())
            assert draft.place()
    assert storage.listdir(str(tmp_path)) == sorted(names)
    assert all((tmp_path / name).read_text() == name for name in names)


def test_a_store_that_fails_is_tried_again(create: Any) -> None:
    modes = create(OSError(errno.EIO, "a conflicting conditional operation is in progress"))
    with pytest.raises(StorageError, match="5 attempts failed"):
        storage.write_if_absent("memory://drafts/a", b"x")
    assert modes == ["create"] * 5


def test_the_header_travels_with_the_request(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the one that makes the object, in one piece and in several; nothing looks before."""
    import s3fs
    from botocore.awsrequest import AWSRequest

    sent: set[tuple[str, Any]] = set()
    prepare = AWSRequest.prepare

    def recorded(self: Any) -> Any:
        what = "complete" if self.method == "POST" and "uploadId" in self.url else self.method
        sent.add((what, self.headers.get("If-None-Match")))
        return prepare(self)

    monkeypatch.setattr(AWSRequest, "prepare", recorded)
    for spooled in (64 << 20, 4):
        monkeypatch.setattr(drafts, "_SPOOL_BYTES", spooled)
        sent.clear()
        assert storage.write_if_absent(f"{s3}/one{spooled}", b"content")
        assert sent == {("PUT", "*")}
    (tmp_path / "large").write_bytes(bytes(12 << 20))
    fs, name = s3fs.S3FileSystem(), f"{s3}/parts".removeprefix("s3://")
    storage.atomic_write(f"{s3}/parts", b"")
    for send in (
        lambda: fs.pipe_file(name, bytes(12 << 20), chunksize=5 << 20, mode="create"),
        lambda: fs.put_file(str(tmp_path / "large"), name, chunksize=5 << 20, mode="create"),
    ):
        sent.clear()
        with pytest.raises(FileExistsError):
            send()
        assert ("complete", "*") in sent and ("PUT", "*") not in sent
    assert storage.size(f"{s3}/parts") == 0


# --- removing


def test_only_what_was_seen_is_removed(base: str) -> None:
    path = storage.join(base, "a.bin")
    assert storage.stamp(path) is None
    storage.atomic_write(path, b"first")
    first = storage.stamp(path)
    assert first is not None and first.size == 5
    assert storage.stamp(path) == first
    time.sleep(0.01)  # the clock of a file system may tick in hundredths
    storage.atomic_write(path, b"other")
    assert storage.stamp(path) != first
    assert not storage.remove_if(path, first)
    assert storage.read_bytes(path) == b"other"
    other = storage.stamp(path)
    assert other is not None
    assert storage.remove_if(path, other)
    assert not storage.remove_if(path, other)
    assert not storage.exists(path)


def test_what_comes_between_look_and_removal_is_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(tmp_path / "a.bin")
    storage.atomic_write(path, b"damaged")
    seen = storage.stamp(path)
    assert seen is not None
    rename = os.rename

    def somebody_was_faster(source: str, target: str) -> None:
        if source == path:
            os.unlink(path)
            Path(path).write_bytes(b"whole now")
        rename(source, target)

    monkeypatch.setattr(os, "rename", somebody_was_faster)
    assert not storage.remove_if(path, seen)
    assert Path(path).read_bytes() == b"whole now"
    assert os.listdir(tmp_path) == ["a.bin"]


# --- what is left of writers that died


def test_temporaries_of_the_dead_are_removed_and_those_of_the_living_spared(tmp_path: Path) -> None:
    with storage.draft(str(tmp_path / "a.bin"), TAG) as mine, storage.draft(str(tmp_path / "b.bin"), OTHER) as other:
        mine.file.write(b"1")
        other.file.write(b"2")
        assert sorted(os.listdir(tmp_path)) == [f".a.bin.{TAG}.tmp", f".b.bin.{OTHER}.tmp"]
        for name in (".hidden", "c.tmp", ".c.xyz.tmp"):
            (tmp_path / name).touch()
        assert storage.remove_temporaries(str(tmp_path), keep={TAG, OTHER}) == []
        assert storage.remove_temporaries(str(tmp_path), older_than_s=60) == []
        os.utime(tmp_path / f".b.bin.{OTHER}.tmp", (time.time() - 61,) * 2)
        assert storage.remove_temporaries(f"file://{tmp_path}", keep={TAG}, older_than_s=60) == [f".b.bin.{OTHER}.tmp"]
        assert storage.remove_temporaries(str(tmp_path / "nowhere")) == []
        assert mine.place()
        with pytest.raises(StorageError, match=r"b\.bin: cannot write: its unfinished file .* is gone: .*; run again"):
            other.place()
    assert sorted(os.listdir(tmp_path)) == [".c.xyz.tmp", ".hidden", "a.bin", "c.tmp"]


def test_stores_have_no_temporaries(s3: str) -> None:
    storage.atomic_write(f"{s3}/a", b"")
    assert storage.remove_temporaries(s3) == []


def test_a_tag_is_eight_digits(tmp_path: Path) -> None:
    assert re.fullmatch("[0-9a-f]{8}", storage.new_tag())
    for tag in ("", "0123ABCD", "0123abc", "../../../x"):
        with pytest.raises(ValueError, match="eight hexadecimal digits"):
            storage.atomic_write(str(tmp_path / "a"), b"", tag)
    storage.atomic_write(str(tmp_path / ("n" * 250)), b"", TAG)
    assert os.listdir(tmp_path) == ["n" * 250]


# --- listings


def test_sizes_come_with_one_listing(base: str) -> None:
    with pytest.raises(storage.FileMissing):
        storage.sizes(storage.join(base, "nowhere"))
    storage.atomic_write(storage.join(base, "a.bin"), b"0123456789")
    storage.atomic_write(storage.join(base, "empty"), b"")
    storage.atomic_write(storage.join(base, "sub/b"), b"1")
    assert storage.sizes(base) == {"a.bin": 10, "empty": 0, "sub": None}
    assert storage.listdir(base) == ["a.bin", "empty", "sub"]


def test_a_long_listing_comes_in_pages(s3: str, caplog: pytest.LogCaptureFixture) -> None:
    import s3fs

    name = s3.removeprefix("s3://")
    s3fs.S3FileSystem().pipe({f"{name}/many/{i:04d}": b"x" * (i % 7) for i in range(1100)})
    caplog.clear()
    assert storage.sizes(f"{s3}/many") == {f"{i:04d}": i % 7 for i in range(1100)}
    requests = [record.getMessage() for record in caplog.records if record.name == "werkzeug"]
    assert len(requests) == 2, requests  # of a thousand each
