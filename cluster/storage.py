"""Files, local or behind a URL (`s3://...`, whatever fsspec knows): written whole or not at all, errors in one line.

Paths are `str`. Parent folders are made on writing, as object stores have none to make. A file written locally gets a
temporary name beside its target, is synced, renamed or linked, and its folder synced; behind a URL it is collected in
a local temporary file and put in one piece, which object stores show whole or not at all. Sizes and offsets are bytes.

This is all that other rooms import; the writing itself is in `cluster.drafts`, paths and errors in `cluster.places`.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from typing import Any, cast

from cluster import remote
from cluster.drafts import (
    Draft,
    Stamp,
    atomic_write,
    atomic_writer,
    draft,
    heeds_condition,
    is_temporary,
    new_tag,
    remove_if,
    remove_temporaries,
    stamp,
    write_if_absent,
)
from cluster.places import (
    FileMissing,
    StorageError,
    Swept,
    Unreachable,
    ensure_folder,
    is_url,
    join,
    local_path,
    remote_store,
    sync_folder,
    told,
)

__all__ = [
    "Draft",
    "FileMissing",
    "Stamp",
    "StorageError",
    "Swept",
    "Unreachable",
    "append_line",
    "atomic_write",
    "atomic_writer",
    "draft",
    "exists",
    "heeds_condition",
    "human_bytes",
    "is_temporary",
    "is_url",
    "join",
    "listdir",
    "make_folder",
    "new_tag",
    "open_range",
    "read_bytes",
    "remove",
    "remove_if",
    "remove_temporaries",
    "require_free",
    "sha256_file",
    "size",
    "sizes",
    "stamp",
    "write_if_absent",
]

_REMOTE_READ_BYTES = 8 << 20  # one range request


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
    path = local_path(path)
    with told(path, "write"):
        ensure_folder(os.path.dirname(path) or ".")
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
                    sync_folder(os.path.dirname(path) or ".")
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
        fs, name = remote_store(path)

        def fetch(begin: int, end: int) -> bytes:
            return bytes(remote.persistently(lambda: fs.cat_file(name, start=begin, end=end), path))

        # a missing object shows at the first read: no request just to ask
        return io.BufferedReader(_Range(path, start, stop, fetch), min(_REMOTE_READ_BYTES, max(1, stop - start)))
    with told(path, "read"):
        handle = os.open(local_path(path), os.O_RDONLY | os.O_CLOEXEC)
    raw = _Range(path, start, stop, lambda begin, end: os.pread(handle, end - begin, begin), lambda: os.close(handle))
    return io.BufferedReader(raw, 256 << 10)


def read_bytes(path: str) -> bytes:
    """The whole file. Raises FileMissing, StorageError."""
    with told(path, "read"):
        if is_url(path):
            fs, name = remote_store(path)
            return bytes(remote.persistently(lambda: fs.cat_file(name), path))
        with open(local_path(path), "rb") as file:
            return file.read()


def exists(path: str) -> bool:
    """Whether a file or folder is there. Raises StorageError when the store does not answer."""
    with told(path, "read"):
        if is_url(path):
            fs, name = remote_store(path)
            fs.invalidate_cache()
            return remote.persistently(lambda: remote.exists(fs, name), path)
        return os.path.exists(local_path(path))


def size(path: str) -> int:
    """The file's size in bytes. Raises FileMissing, StorageError."""
    with told(path, "read"):
        if is_url(path):
            fs, name = remote_store(path)
            fs.invalidate_cache()
            return int(remote.persistently(lambda: fs.size(name), path))
        return os.stat(local_path(path)).st_size


def listdir(path: str) -> list[str]:
    """The sorted names in a folder, without files still being written. Raises FileMissing, StorageError."""
    return sorted(name for name in _names(path, False) if not is_temporary(name))


def sizes(path: str, ending: str = "") -> dict[str, int | None]:
    """Name -> bytes, None for a folder, of all that is in a folder, files still being written included.

    `ending`: of the names that end so only. One walk through the folder, or one listing of the store, which comes in
    pages: no request for each file. Raises FileMissing, StorageError.
    """
    return _names(path, True, ending)


def _names(path: str, detail: bool, ending: str = "") -> dict[str, int | None]:
    with told(path, "read"):
        if not is_url(path):
            found: dict[str, int | None] = {}
            with os.scandir(local_path(path)) as entries:
                for each in entries:
                    if each.name.endswith(ending):
                        with suppress(FileNotFoundError):  # renamed or removed since
                            found[each.name] = _size_of(each) if detail and not each.is_dir() else None
            return found
        fs, name = remote_store(path)
        fs.invalidate_cache()
        listed = remote.persistently(lambda: fs.ls(name, detail=True), path)
    return {
        str(entry["name"]).rstrip("/").rsplit("/", 1)[-1]: None
        if entry["type"] == "directory"
        else int(entry["size"] or 0)
        for entry in listed
        if str(entry["name"]).strip("/") != name.strip("/") and str(entry["name"]).rstrip("/").endswith(ending)
    }


def _size_of(entry: os.DirEntry[str]) -> int:
    try:
        return entry.stat().st_size
    except FileNotFoundError:
        return entry.stat(follow_symlinks=False).st_size  # a link that leads nowhere is there, too


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
    with told(path, "write"):
        ensure_folder(local_path(path))
        if not os.access(local_path(path), os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def remove(path: str) -> None:
    """Remove a file; nothing when there is none. Raises StorageError."""
    with told(path, "write"), suppress(FileNotFoundError):
        if is_url(path):
            fs, name = remote_store(path)
            remote.persistently(lambda: fs.rm_file(name), path)
        else:
            os.unlink(local_path(path))


def require_free(path: str, bytes: int, what: str) -> None:
    """Refuse to start what cannot end: StorageError unless `bytes` are free where `path` is, or is going to be.

    Asks the nearest existing parent. Behind a URL nothing is checked: object stores do not tell.
    """
    if is_url(path):
        return
    parent = os.path.abspath(local_path(path))
    while not os.path.exists(parent):
        parent = os.path.dirname(parent)
    with told(parent, "read"):
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
        with told(self._path, "read"):
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
