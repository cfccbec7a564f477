"""Object stores: what a network fails is tried again. Against fsspec's store in memory and an S3 server on loopback."""

from __future__ import annotations

import http.server
import itertools
import socket
import sys
import threading
from collections.abc import Callable, Iterator

import fsspec
import pytest

from cluster import drafts, remote, storage
from cluster.remote import RemoteFailure, persistently
from cluster.storage import FileMissing, StorageError, Unreachable


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that were waited, instead of waiting."""
    waited: list[float] = []
    monkeypatch.setattr(remote.time, "sleep", waited.append)
    return waited


def failing(times: int, error: Exception) -> Callable[[], str]:
    """Fails so many times, then works."""
    left = itertools.count()

    def action() -> str:
        if next(left) < times:
            raise error
        return "done"

    return action


class StoreError(Exception):
    """As the libraries of stores raise: no OSError."""


class NoCredentialsError(Exception):
    """As botocore calls it."""


@pytest.mark.parametrize("error", [OSError("reset"), TimeoutError(), ConnectionResetError(), StoreError("503")])
def test_what_may_pass_is_tried_again_with_growing_waits(error: Exception, waits: list[float]) -> None:
    assert persistently(failing(4, error), "s3://b/k") == "done"
    assert len(waits) == 4
    for attempt, wait in enumerate(waits):
        assert 0.5 <= wait / (remote.FIRST_WAIT_S * 2**attempt) <= 1.5


def test_it_ends_after_the_last_attempt(waits: list[float]) -> None:
    with pytest.raises(RemoteFailure, match=r"could not be reached in 5 attempts \(ConnectionResetError\)$"):
        persistently(failing(5, ConnectionResetError()), "s3://b/k")
    with pytest.raises(RemoteFailure, match=r"^5 attempts failed \(StoreError: 503\)$"):
        persistently(failing(9, StoreError("503")), "s3://b/k")
    assert len(waits) == 2 * (remote.ATTEMPTS - 1)


@pytest.mark.parametrize("error", [FileNotFoundError(), PermissionError(), NotImplementedError(), TypeError()])
def test_what_will_not_pass_is_not(error: Exception, waits: list[float]) -> None:
    with pytest.raises(type(error)):
        persistently(failing(1, error), "s3://b/k")
    assert waits == []


def test_credentials_that_are_not_there(waits: list[float]) -> None:
    with pytest.raises(RemoteFailure, match=r"^1 attempt failed \(NoCredentialsError: Unable"):
        persistently(failing(1, NoCredentialsError("Unable to locate credentials")), "s3://b/k")
    assert waits == []


def test_what_is_tried_again_is_told(waits: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RemoteFailure):
        persistently(failing(9, StoreError("slow\ndown")), "s3://b/k")
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        f"warning: s3://b/k: attempt {i + 1} of 5 failed (StoreError: slow down); the next one in {wait:.1f} s"
        for i, wait in enumerate(waits)
    ]
    assert len(lines) == 4
    assert persistently(lambda: 1, "s3://b/k") == 1 and capsys.readouterr().err == ""


def test_nobody_to_tell_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    class Closed:
        def write(self, text: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stderr", Closed())
    assert persistently(failing(2, StoreError("503")), "s3://b/k") == "done"


# --- through cluster.storage


@pytest.fixture
def shaky(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """A store in memory whose next requests fail."""
    fs = fsspec.filesystem("memory")
    left = [0]

    def wrapped(name: str) -> Callable[..., object]:
        original = getattr(type(fs), name)

        def call(self: object, *args: object, **kwargs: object) -> object:
            if left[0] > 0:
                left[0] -= 1
                raise StoreError("slow down")
            return original(self, *args, **kwargs)

        return call

    for name in ("cat_file", "pipe_file", "exists", "size", "ls", "put_file"):
        monkeypatch.setattr(type(fs), name, wrapped(name))

    def fail_next(times: int) -> None:
        left[0] = times

    yield fail_next
    left[0] = 0
    fs.rm("/shaky", recursive=True)


ACTIONS: dict[str, Callable[[str], object]] = {
    "write": lambda base: storage.atomic_write(f"{base}/new", b"abc"),
    "read": lambda base: storage.read_bytes(f"{base}/a"),
    "range": lambda base: storage.open_range(f"{base}/a", 1, 3).read(),
    "exists": lambda base: storage.exists(f"{base}/a"),
    "size": lambda base: storage.size(f"{base}/a"),
    "list": lambda base: storage.listdir(base),
}


@pytest.mark.parametrize("what", ACTIONS)
def test_every_kind_of_request_survives_some_failures(
    what: str, shaky: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = "memory://shaky/" + what
    storage.atomic_write(f"{base}/a", b"abc")
    wanted = ACTIONS[what](base)
    shaky(3)
    assert ACTIONS[what](base) == wanted
    shaky(100)
    with pytest.raises(StorageError, match=r"memory://shaky/.*slow down.*check the address") as caught:
        ACTIONS[what](base)
    assert "\n" not in str(caught.value)


def test_files_from_disk_too(shaky: Callable[[int], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drafts, "_SPOOL_BYTES", 10)
    shaky(2)
    storage.atomic_write("memory://shaky/large", b"x" * 1000)
    assert storage.read_bytes("memory://shaky/large") == b"x" * 1000


# --- S3, as a server speaks it


def test_s3(s3: str) -> None:
    base = f"{s3}/folder"
    storage.atomic_write(f"{base}/a.txt", b"0123456789")
    storage.atomic_write(f"{base}/b.txt", b"b")
    assert storage.listdir(base) == ["a.txt", "b.txt"]
    assert storage.open_range(f"{base}/a.txt", 2, 5).read() == b"234"
    assert (storage.size(f"{base}/a.txt"), storage.exists(f"{base}/c.txt")) == (10, False)
    with pytest.raises(FileMissing):
        storage.read_bytes(f"{base}/c.txt")
    storage.atomic_write(f"{base}/a.txt", b"other")
    assert storage.read_bytes(f"{base}/a.txt") == b"other"


def test_a_server_that_is_not_there(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)  # its own, inside of ours
    monkeypatch.setattr(remote, "ATTEMPTS", 2)
    with pytest.raises(Unreachable, match=r"s3://.*cannot read: the server could not be reached in 2 att") as caught:
        storage.read_bytes(f"{s3}/a")
    assert "\n" not in str(caught.value)


def test_a_bucket_that_is_not_there(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for spool in (drafts._SPOOL_BYTES, 2):
        monkeypatch.setattr(drafts, "_SPOOL_BYTES", spool)
        with pytest.raises(FileMissing, match=r"s3://no-such-bucket/plan\.json: cannot write: .*: create it, or check"):
            storage.atomic_write("s3://no-such-bucket/plan.json", b"abc")
    with pytest.raises(FileMissing, match=r"cannot read: no such file or folder: check the path"):
        storage.read_bytes("s3://no-such-bucket/plan.json")


# --- HTTP


HTTP_READS = (storage.exists, storage.size, storage.read_bytes, storage.listdir)


@pytest.mark.parametrize("read", HTTP_READS)
def test_an_http_server_that_is_not_there(read: Callable[[str], object], waits: list[float]) -> None:
    with socket.socket() as bound:  # and never listening: connections are refused
        bound.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{bound.getsockname()[1]}/x"
        with pytest.raises(
            Unreachable, match=rf"^{url}: cannot read: the server could not be reached in 5 attempts .*127\.0\.0\.1"
        ):
            read(url)
    assert len(waits) == remote.ATTEMPTS - 1


class Answers(http.server.BaseHTTPRequestHandler):
    """The status that the path names; 200 with three bytes."""

    def do_GET(self) -> None:
        status = int(self.path.strip("/"))
        body = b"abc" if status == 200 else b""
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def http_server() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_what_an_http_server_says(http_server: str, waits: list[float]) -> None:
    assert storage.exists(f"{http_server}/200") and storage.size(f"{http_server}/200") == 3
    for status in (404, 403):  # object stores say 403 for what is missing, to who may not list
        assert not storage.exists(f"{http_server}/{status}")
        with pytest.raises(FileMissing, match="no such file or folder"):
            storage.size(f"{http_server}/{status}")
    assert waits == []
    with pytest.raises(Unreachable, match=r"/503: cannot read: 5 attempts failed \(.*503"):
        storage.exists(f"{http_server}/503")
