"""Files, local or behind a URL (`s3://...`, whatever fsspec knows): written whole or not at all, errors in one line.

Paths are `str`. Parent folders are made on writing, as object stores have none to make. A file written locally gets a
temporary name beside its target, is synced, renamed, and its folder synced; behind a URL it is collected in a local
temporary file and put in one piece, which object stores show whole or not at all. Sizes and offsets are bytes.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, BinaryIO, cast

from cluster import remote

_URL = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]*://")
_TEMPORARY = re.compile(r"^\..*\.[0-9a-f]{8}\.tmp$")
_SPOOL_BYTES = 64 << 20  # a file for a URL stays in memory up to here
_REMOTE_READ_BYTES = 8 << 20  # one range request
_REMEDIES = {
    errno.ENOSPC: "the disk is full: free space there or choose another folder",
    errno.EDQUOT: "the disk quota is used up: free space there or choose another folder",
    errno.EACCES: "permission denied: make the folder writable or choose another one",
    errno.EPERM: "operation not permitted: make the folder writable or choose another one",
    errno.EROFS: "the file system is read-only: choose another folder",
    errno.ENOTDIR: "a part of the path is a file: choose another folder",
    errno.EISDIR: "it is a folder: choose another name",
    errno.EIO: "the disk reports an input/output error: choose another disk",
    errno.EFBIG: "the file is larger than the file system or `ulimit -f` allows",
    errno.ENAMETOOLONG: "the name is too long: choose a shorter one",
    errno.EMFILE: "too many open files: raise `ulimit -n`",
}
_MISSING = {
    "read": "no such file or folder: check the path",
    # parent folders are made, buckets are not
    "write": "the bucket or folder does not exist: create it, or check the name",
}


class StorageError(OSError):
    """A file or folder cannot be used: which one, why, and what to do, in one line."""

    exit_status = 2

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class Unreachable(StorageError):
    """A store behind a URL failed or refused, after the last attempt: no fault of the file."""


class FileMissing(StorageError, FileNotFoundError):
    """The file or folder to read does not exist."""


def is_url(path: str) -> bool:
    """Whether `path` goes through fsspec; `file://` is a local path like any other."""
    return bool(_URL.match(path)) and not path.lower().startswith("file://")


def join(base: str, *parts: str) -> str:
    """`base/part/...` for local paths and URLs. StorageError when a part is absolute, a URL or empty."""
    for part in parts:
        if not part or part.startswith("/") or _URL.match(part):
            raise StorageError(f"{base}: cannot append {part!r}: it must be a relative name")
    if is_url(base):
        return "/".join([base.rstrip("/") if not base.endswith("://") else base[:-1], *parts])
    return os.path.join(base, *parts)


@contextmanager
def atomic_writer(path: str) -> Iterator[BinaryIO]:
    """A binary, seekable file that becomes `path` when the block ends well; else `path` stays as it was.

    Raises StorageError when the place cannot be written or is full; what the block itself raises passes through.
    """
    writer = _remote_writer(path) if is_url(path) else _local_writer(_local(path))
    with writer as file:
        yield file


def atomic_write(path: str, data: bytes | str) -> None:
    """Write all of `data` (text as UTF-8) to `path`, whole or not at all. Raises StorageError."""
    with atomic_writer(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


def append_line(path: str, text: str, sync: bool = False) -> None:
    """Append one line in one write; `sync` waits for the disk. A line torn by an earlier crash is closed first.

    Two machines may append to one file: without the lock, a network file system would let them write over each other.

    Local only: StorageError for a URL (object stores cannot append) and when the file cannot be written; ValueError
    when `text` holds a line break.
    """
    if is_url(path):
        raise StorageError(f"{path}: object stores cannot append; keep the run's folder on a local disk")
    if "\n" in text:
        raise ValueError("text must be one line")
    path = _local(path)
    with _told(path, "write"):
        _make_folder(os.path.dirname(path) or ".")
        handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            with suppress(OSError):  # a file system without locks
                fcntl.lockf(handle, fcntl.LOCK_EX)  # until the file is closed
            size = os.fstat(handle).st_size
            torn = size > 0 and os.pread(handle, 1, size - 1) != b"\n"
            rest = memoryview((("\n" if torn else "") + text + "\n").encode())
            while rest:
                rest = rest[os.write(handle, rest) :]
            if sync:
                os.fsync(handle)
                if size == 0:
                    _sync_folder(os.path.dirname(path) or ".")
        finally:
            os.close(handle)


def open_range(path: str, start: int, stop: int | None = None) -> io.BufferedReader:
    """A file-like of exactly the bytes [start, stop); None is the end of the file. Behind a URL: range requests.

    Raises FileMissing, and StorageError, also while reading: when the file ends before `stop`, or is refused.
    """
    if stop is None:
        stop = size(path)
    if not 0 <= start <= stop:
        raise ValueError(f"not a range: [{start}, {stop})")
    if is_url(path):
        fs, name = _remote(path)

        def fetch(begin: int, end: int) -> bytes:
            return bytes(remote.persistently(lambda: fs.cat_file(name, start=begin, end=end), path))

        # a missing object shows at the first read: no request just to ask
        return io.BufferedReader(_Range(path, start, stop, fetch), min(_REMOTE_READ_BYTES, max(1, stop - start)))
    with _told(path, "read"):
        handle = os.open(_local(path), os.O_RDONLY | os.O_CLOEXEC)
    raw = _Range(path, start, stop, lambda begin, end: os.pread(handle, end - begin, begin), lambda: os.close(handle))
    return io.BufferedReader(raw, 256 << 10)


def read_bytes(path: str) -> bytes:
    """The whole file. Raises FileMissing, StorageError."""
    with _told(path, "read"):
        if is_url(path):
            fs, name = _remote(path)
            return bytes(remote.persistently(lambda: fs.cat_file(name), path))
        with open(_local(path), "rb") as file:
            return file.read()


def exists(path: str) -> bool:
    """Whether a file or folder is there. Raises StorageError when the store does not answer."""
    with _told(path, "read"):
        if is_url(path):
            fs, name = _remote(path)
            fs.invalidate_cache()
            return remote.persistently(lambda: remote.exists(fs, name), path)
        return os.path.exists(_local(path))


def size(path: str) -> int:
    """The file's size in bytes. Raises FileMissing, StorageError."""
    with _told(path, "read"):
        if is_url(path):
            fs, name = _remote(path)
            fs.invalidate_cache()
            return int(remote.persistently(lambda: fs.size(name), path))
        return os.stat(_local(path)).st_size


def listdir(path: str) -> list[str]:
    """The sorted names in a folder, without files still being written. Raises FileMissing, StorageError."""
    with _told(path, "read"):
        if is_url(path):
            fs, name = _remote(path)
            fs.invalidate_cache()
            listed = remote.persistently(lambda: fs.ls(name, detail=False), path)
            found = [str(entry).rstrip("/") for entry in listed]
            names = {entry.rsplit("/", 1)[-1] for entry in found if entry.strip("/") != name.strip("/")}
        else:
            names = set(os.listdir(_local(path)))
    return sorted(name for name in names if not _TEMPORARY.match(name))


def sha256_file(path: str) -> str:
    """The hexadecimal SHA-256 of the file's bytes. Raises FileMissing, StorageError."""
    with open_range(path, 0) as file:
        return hashlib.file_digest(cast("Any", file), "sha256").hexdigest()


def make_folder(path: str) -> None:
    """Make a local folder and its parents, so that a place that cannot be written is refused before the work.

    Behind a URL there is nothing to make. Raises StorageError.
    """
    if is_url(path):
        return
    with _told(path, "write"):
        _make_folder(_local(path))
        if not os.access(_local(path), os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def require_free(path: str, bytes: int, what: str) -> None:
    """Refuse to start what cannot end: StorageError unless `bytes` are free where `path` is, or is going to be.

    Asks the nearest existing parent. Behind a URL nothing is checked: object stores do not tell.
    """
    if is_url(path):
        return
    parent = os.path.abspath(_local(path))
    while not os.path.exists(parent):
        parent = os.path.dirname(parent)
    with _told(parent, "read"):
        free = shutil.disk_usage(parent).free
    if free < bytes:
        raise StorageError(
            f"{path}: {what} needs {human_bytes(bytes)}, {human_bytes(free)} are free at {parent}: "
            "free space there or choose another folder"
        )


def human_bytes(count: float) -> str:
    """A number of bytes for people: `1.5 GB` (powers of 1000)."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.0f} B" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.4g} TB"


class _Range(io.RawIOBase):
    """The raw side of open_range: `fetch(begin, end)` may return fewer bytes than asked, none only past the end."""

    def __init__(
        self,
        path: str,
        start: int,
        stop: int,
        fetch: Callable[[int, int], bytes],
        close: Callable[[], None] | None = None,
    ) -> None:
        self._path, self._start, self._stop, self._at = path, start, stop, start
        self._fetch, self._release = fetch, close

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        origin = {os.SEEK_SET: self._start, os.SEEK_CUR: self._at, os.SEEK_END: self._stop}[whence]
        if origin + offset < self._start:
            raise ValueError("seek before the start of the range")
        self._at = origin + offset
        return self._at - self._start

    def tell(self) -> int:
        return self._at - self._start

    def readinto(self, buffer: Any, /) -> int:
        wanted = min(len(buffer), self._stop - self._at)
        if wanted <= 0:
            return 0
        with _told(self._path, "read"):
            data = self._fetch(self._at, self._at + wanted)
        if not data:
            raise StorageError(f"{self._path}: ends at byte {self._at}, expected {self._stop}: the file is truncated")
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def close(self) -> None:
        if not self.closed and self._release is not None:
            self._release()
        super().close()


@contextmanager
def _local_writer(path: str) -> Iterator[BinaryIO]:
    folder, name = os.path.split(path)
    folder = folder or "."
    # a name near the limit of 255 bytes leaves no room for the suffix; what counts is that it cannot collide
    temporary = os.path.join(folder, f".{name[:100]}.{secrets.token_hex(4)}.tmp")
    with _told(path, "write", aliases=(temporary, folder)):
        _make_folder(folder)
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        file = os.fdopen(handle, "wb")
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            file.close()
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):  # closing flushes, and fails again on a full disk
                file.close()
            with suppress(OSError):
                os.unlink(temporary)
            raise
        _sync_folder(folder)


@contextmanager
def _remote_writer(path: str) -> Iterator[BinaryIO]:
    # fsspec's own files publish what was written so far when the block fails: so nothing is sent before the end
    fs, name = _remote(path)
    with tempfile.SpooledTemporaryFile(max_size=_SPOOL_BYTES) as spool:
        yield cast("BinaryIO", spool)
        with _told(path, "write"):
            if not getattr(spool, "_rolled", True):
                spool.seek(0)
                content = spool.read()
                remote.persistently(lambda: fs.pipe_file(name, content), path)
            else:
                spool.flush()
                local = f"/proc/self/fd/{spool.fileno()}"
                remote.persistently(lambda: fs.put_file(local, name), path)


def _local(path: str) -> str:
    if path.startswith("pipe:"):
        raise StorageError(f"{path}: `pipe:` would run a shell command; name a file or a URL")
    return path[len("file://") :] if path.lower().startswith("file://") else path


def _remote(path: str) -> tuple[Any, str]:
    try:
        return remote.open_store(path)
    except (ImportError, ValueError) as error:
        raise StorageError(f"{path}: {error}; install fsspec's package for this kind of URL (s3://: s3fs)") from error


@contextmanager
def _told(path: str, verb: str, aliases: tuple[str, ...] = ()) -> Iterator[None]:
    """Turn the system's errors about `path` into one line. Errors about other files pass through."""
    try:
        yield
    except StorageError:
        raise
    except FileNotFoundError as error:
        if error.filename not in (None, path, _local(path), *aliases) and not is_url(path):
            raise
        raise FileMissing(f"{path}: cannot {verb}: {_MISSING[verb]}") from error
    except OSError as error:
        if error.filename not in (None, path, _local(path), *aliases) and not is_url(path):
            raise
        reason = _REMEDIES.get(error.errno or 0, error.strerror or str(error) or type(error).__name__)
        if isinstance(error, remote.RemoteFailure):
            reason = f"{error}: check the address, the credentials and the network"
        kind = Unreachable if is_url(path) else StorageError
        raise kind(f"{path}: cannot {verb}: {reason}") from error
    except NotImplementedError as error:
        raise StorageError(f"{path}: cannot {verb}: this kind of URL does not support it") from error


def _make_folder(folder: str) -> None:
    if not os.path.isdir(folder):
        parent = os.path.dirname(folder.rstrip("/")) or "."
        _make_folder(parent)
        with suppress(FileExistsError):
            os.mkdir(folder)
            _sync_folder(parent)
        if not os.path.isdir(folder):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))


def _sync_folder(folder: str) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot sync a folder
            raise
    finally:
        os.close(handle)
