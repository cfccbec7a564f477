"""Where files lie: local paths and URLs, what they are called, and what goes wrong with them, in one line.

The inside of `cluster.storage`, which everybody else imports.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from cluster import remote

_URL = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]*://")
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
# What a path itself is to blame for. Else a file that cannot be read says nothing of the file: the mount, the rights or
# this process's limits may be others in a moment, or on another machine.
_OF_THE_PATH = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL)
_READ_REMEDIES = {
    errno.EACCES: "permission denied: make it readable",
    errno.EPERM: "operation not permitted: make it readable",
    errno.EIO: "input/output error: look at the disk, or at the connection to where it is mounted from",
    errno.ESTALE: "the file system it is on was taken away: mount it again",
    errno.ENOTDIR: "a part of the path is a file: check the path",
    errno.EISDIR: "it is a folder: name a file",
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
    """A store, a mount or this machine failed or refused to read, or a store failed to write: no fault of the file."""


class Swept(StorageError):
    """An unfinished file was taken away by somebody who took its writer for dead."""


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


def local_path(path: str) -> str:
    """The path without `file://`. StorageError for what would run a command."""
    if path.startswith("pipe:"):
        raise StorageError(f"{path}: `pipe:` would run a shell command; name a file or a URL")
    return path[len("file://") :] if path.lower().startswith("file://") else path


def remote_store(path: str) -> tuple[Any, str]:
    """fsspec's file system and the name inside it. StorageError when nothing installed serves such a URL."""
    try:
        return remote.open_store(path)
    except (ImportError, ValueError) as error:
        raise StorageError(f"{path}: {error}; install fsspec's package for this kind of URL (s3://: s3fs)") from error


@contextmanager
def told(path: str, verb: str, aliases: tuple[str, ...] = ()) -> Iterator[None]:
    """Turn the system's errors about `path` into one line. Errors about other files pass through."""
    try:
        yield
    except StorageError:
        raise
    except FileNotFoundError as error:
        if error.filename not in (None, path, local_path(path), *aliases) and not is_url(path):
            raise
        raise FileMissing(f"{path}: cannot {verb}: {_MISSING[verb]}") from error
    except OSError as error:
        if error.filename not in (None, path, local_path(path), *aliases) and not is_url(path):
            raise
        remedies = {**_REMEDIES, **_READ_REMEDIES} if verb == "read" else _REMEDIES
        reason = remedies.get(error.errno or 0, error.strerror or str(error) or type(error).__name__)
        if isinstance(error, remote.RemoteFailure):
            reason = f"{error}: check the address, the credentials and the network"
        if is_url(path):
            passing = verb == "read" or not isinstance(error, PermissionError)
        else:
            passing = verb == "read" and error.errno not in _OF_THE_PATH
        kind = Unreachable if passing else StorageError
        raise kind(f"{path}: cannot {verb}: {reason}") from error
    except NotImplementedError as error:
        raise StorageError(f"{path}: cannot {verb}: this kind of URL does not support it") from error


def ensure_folder(folder: str) -> None:
    """Make a local folder and its parents, each one's name synced. Raises OSError."""
    if not os.path.isdir(folder):
        parent = os.path.dirname(folder.rstrip("/")) or "."
        ensure_folder(parent)
        with suppress(FileExistsError):
            os.mkdir(folder)
            sync_folder(parent)
        if not os.path.isdir(folder):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))


def sync_folder(folder: str) -> None:
    """Wait until the names in a local folder are on the disk. Raises OSError."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot sync a folder
            raise
    finally:
        os.close(handle)
