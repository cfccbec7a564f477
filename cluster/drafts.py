"""Files that get their name once they are whole, over what is there or only if the name is free; and what is left of
writers that died.

A local draft is `.NAME.TAG.tmp` beside its target, TAG being eight hexadecimal digits of its writer's; behind a URL it
is a local spool. Only if the name is free:

* local: a hard link, which fails when the name is taken, on network file systems too. File systems without hard links
  (exFAT, some FUSE ones): look, then rename.
* URL: fsspec's `mode="create"`; an S3 store gets `If-None-Match: *` with the request that makes the object. A store
  that says it knows no such condition, or was found to pay no heed to it (`heeds_condition`): look, then put.

Looking first leaves a gap in which two writers may both see a free name; the later one then stands. Who relies on more
compares what is there afterwards (`Stamp`), or writes the same bytes.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import re
import secrets
import tempfile
import time
from collections.abc import Callable, Container, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

from cluster import puts, remote
from cluster.places import (
    Swept,
    ensure_folder,
    is_url,
    local_path,
    remote_store,
    sync_folder,
    told,
)

_TEMPORARY = re.compile(r"^\..*\.([0-9a-f]{8})\.tmp$")
_SPOOL_BYTES = 64 << 20  # a file for a URL stays in memory up to here
# link() where there are no hard links: EPERM from Linux' own file systems, the rest from FUSE and network ones
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV)
_NAME_BYTES = 200  # of a target's name in that of its draft


def new_tag() -> str:
    """A tag that no other writer has."""
    return secrets.token_hex(4)


@dataclass(frozen=True)
class Stamp:
    """Tells one content of a path from another without reading it. `size`: bytes."""

    size: int
    mark: str  # local: inode and time of the last change; URL: entity tag, or else when it was made


class Draft:
    """An unfinished file: write to `file` (binary, seekable), then look at it with `reread`, then `place` it."""

    file: BinaryIO
    stamp: Stamp | None = None  # of what `reread` and `place` speak of; behind a URL unknown: ask the store

    def reread(self) -> AbstractContextManager[BinaryIO]:
        """What was written, from its start; nothing may be written from here on.

        A local file is on the disk by then, and is read from there where the system lets go of its copy in memory.
        Behind a URL it is what is about to be sent: read the object itself again after `place`.
        """
        raise NotImplementedError

    def place(self, *, over: bool = False) -> bool:
        """Give the file its name; False when the name is taken, unless `over` replaces what has it.

        It may be called again, after False and also when somebody has removed the file since; a local draft keeps its
        temporary name for that, beside the other one, until the block ends. Raises StorageError; Swept when
        `remove_temporaries` has taken the file away.
        """
        raise NotImplementedError


@contextmanager
def draft(path: str, tag: str | None = None) -> Iterator[Draft]:
    """A file for `path` that nobody sees before `Draft.place`; what was not placed is gone after the block.

    `tag`: eight hexadecimal digits that name the writer, so that `remove_temporaries` can spare it; one writer has one
    draft of a path at a time. Raises StorageError when the place cannot be written or is full; what the block itself
    raises passes through.
    """
    tag = _checked(tag)
    if is_url(path):
        fs, name = remote_store(path)
        with _Spool(max_size=_SPOOL_BYTES) as spool:
            yield _RemoteDraft(path, fs, name, spool)
        return
    path = local_path(path)
    unfinished = _LocalDraft(path, _beside(path, tag))
    try:
        yield unfinished
    finally:
        unfinished.discard()


@contextmanager
def atomic_writer(path: str, tag: str | None = None) -> Iterator[BinaryIO]:
    """A binary, seekable file that becomes `path` when the block ends well; else `path` stays as it was.

    `tag` as in `draft`. Raises StorageError when the place cannot be written or is full; what the block itself raises
    passes through.
    """
    with draft(path, tag) as unfinished:
        yield unfinished.file
        unfinished.place(over=True)


def atomic_write(path: str, data: bytes | str, tag: str | None = None) -> None:
    """Write all of `data` (text as UTF-8) to `path`, whole or not at all. Raises StorageError."""
    with atomic_writer(path, tag) as file:
        file.write(data.encode() if isinstance(data, str) else data)


def write_if_absent(path: str, data: bytes | str, tag: str | None = None) -> bool:
    """Write all of `data` to `path` if nothing is there; False if something is. Raises StorageError.

    Behind a URL False may also mean that an attempt of this very call arrived whose answer got lost.
    """
    with draft(path, tag) as unfinished:
        unfinished.file.write(data.encode() if isinstance(data, str) else data)
        return unfinished.place()


def heeds_condition(path: str, data: bytes) -> bool:
    """Whether the store behind a URL refuses to make what is there: asked with `path`, which must hold `data` by now.

    Where it does not, this process looks first from now on. True for a local path. Raises StorageError.
    """
    if not is_url(path) or not write_if_absent(path, data):
        return True
    fs, name = remote_store(path)
    puts.look_first(fs, name)
    return False


def stamp(path: str) -> Stamp | None:
    """The stamp of a file, None when there is none. Raises StorageError."""
    with told(path, "read"):
        if is_url(path):
            fs, name = remote_store(path)
            fs.invalidate_cache()
            try:
                info = remote.persistently(lambda: fs.info(name), path)
            except FileNotFoundError:
                return None
            mark = next((info[key] for key in ("ETag", "etag", "LastModified", "created") if info.get(key)), "")
            return Stamp(int(info.get("size") or 0), str(mark))
        return _local_stamp(local_path(path))


def remove_if(path: str, seen: Stamp, tag: str | None = None) -> bool:
    """Remove the file if it is still the one of that stamp; False when it is another by now, or none.

    Local: it is moved aside, looked at again, and put back if it is another; so what somebody else has placed since is
    missing for a moment at most, never lost. Behind a URL there is a gap between looking and removing. StorageError.
    """
    tag = _checked(tag)
    if stamp(path) != seen:
        return False
    if is_url(path):
        fs, name = remote_store(path)
        with told(path, "write"), suppress(FileNotFoundError):
            remote.persistently(lambda: fs.rm_file(name), path)
        return True
    path = local_path(path)
    folder = os.path.dirname(path) or "."
    aside = _beside(path, tag, ".old")
    with told(path, "write", aliases=(aside, folder)):
        try:
            os.rename(path, aside)
        except FileNotFoundError:
            return False
        is_it = _local_stamp(aside) == seen
        if not is_it:
            _link(aside, path)
        with suppress(FileNotFoundError):
            os.unlink(aside)
        sync_folder(folder)
    return is_it


def is_temporary(name: str) -> bool:
    """Whether a file is called as drafts are."""
    return bool(_TEMPORARY.match(name))


def remove_temporaries(folder: str, *, keep: Container[str] = (), older_than_s: float = 0.0) -> list[str]:
    """Remove the drafts in `folder` whose writer's tag is not in `keep` and that nobody has written to for so long.

    Returns their names, sorted. Behind a URL there are none, and a folder that does not exist holds none. A store may
    keep the parts of uploads that were cut off, which no listing shows: let a rule of the bucket expire them. Times
    are those of the file system's clock against this machine's. Raises StorageError.
    """
    if is_url(folder):
        return []
    folder = local_path(folder)
    removed = []
    with told(folder, "write"):
        try:
            names = sorted(os.listdir(folder))
        except FileNotFoundError:
            return []
        for name in names:
            found = _TEMPORARY.match(name)
            if found is None or found[1] in keep:
                continue
            path = os.path.join(folder, name)
            with suppress(FileNotFoundError):  # its writer, or another cleaner, was faster
                if time.time() - os.stat(path).st_mtime >= older_than_s:
                    os.unlink(path)
                    removed.append(name)
    return removed


def _checked(tag: str | None) -> str:
    if tag is not None and not re.fullmatch("[0-9a-f]{8}", tag):
        raise ValueError(f"a tag is eight hexadecimal digits, not {tag!r}")
    return tag or new_tag()


def _beside(path: str, tag: str, kind: str = "") -> str:
    folder, name = os.path.split(path)
    if len(os.fsencode(name)) > _NAME_BYTES:  # 255 are allowed
        digest = hashlib.sha256(os.fsencode(name)).hexdigest()[:32]
        name = os.fsdecode(os.fsencode(name)[: _NAME_BYTES - len(digest)]) + digest
    return os.path.join(folder or ".", f".{name}{kind}.{tag}.tmp")


def _local_stamp(path: str) -> Stamp | None:
    try:
        return _stamp_of(os.stat(path))
    except FileNotFoundError:
        return None


def _stamp_of(found: os.stat_result) -> Stamp:
    return Stamp(found.st_size, f"{found.st_ino}-{found.st_mtime_ns}")


class _ToldFile(io.FileIO):
    """A draft's bytes; what the system says of them is told in one line. Of what else happens meanwhile it is not."""

    def __init__(self, handle: int, mode: str, say: Callable[[], AbstractContextManager[None]]) -> None:
        super().__init__(handle, mode)
        self._say = say

    def write(self, data: Any, /) -> int:
        with self._say():
            return super().write(data)

    def readinto(self, buffer: Any, /) -> int:
        with self._say():
            return super().readinto(buffer)


class _LocalDraft(Draft):
    def __init__(self, path: str, temporary: str) -> None:
        self._path, self._temporary = path, temporary
        self._folder = os.path.dirname(path) or "."
        with self._told():
            ensure_folder(self._folder)
            handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            self.file = cast("BinaryIO", io.BufferedWriter(_ToldFile(handle, "wb", self._told)))
        self._renamed = False

    @contextmanager
    def reread(self) -> Iterator[BinaryIO]:
        with self._told():
            self._sync()
            with suppress(OSError):
                os.posix_fadvise(self.file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            try:
                handle = os.open(self._temporary, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError as error:
                raise self._gone() from error
        with io.BufferedReader(_ToldFile(handle, "rb", self._told)) as again:
            yield cast("BinaryIO", again)

    def place(self, *, over: bool = False) -> bool:
        with self._told():
            self._sync()
            self.file.close()
            won = True
            try:
                if over:
                    os.replace(self._temporary, self._path)
                    self._renamed = True
                else:
                    won = _link(self._temporary, self._path)
            except FileNotFoundError as error:
                raise self._gone() from error
            sync_folder(self._folder)
            return won

    def discard(self) -> None:
        """Leave nothing behind but what was placed."""
        with suppress(OSError):  # closing flushes, and fails again on a full disk
            self.file.close()
        if not self._renamed:
            with suppress(OSError):
                os.unlink(self._temporary)

    def _told(self) -> AbstractContextManager[None]:
        return told(self._path, "write", aliases=(self._temporary, self._folder))

    def _gone(self) -> Swept:
        return Swept(
            f"{self._path}: cannot write: its unfinished file {self._temporary} is gone: another run has cleaned up; "
            "run again"
        )

    def _sync(self) -> None:
        if self.stamp is None:
            self.file.flush()
            os.fsync(self.file.fileno())
            self.stamp = _stamp_of(os.fstat(self.file.fileno()))


def _link(source: str, target: str) -> bool:
    """Give a file a second name, or, without hard links, that name; False when the name is taken."""
    try:
        os.link(source, target)
    except FileExistsError:
        # the first answer of a network file system may have got lost, and the second one speaks of our own link
        with suppress(FileNotFoundError):
            return os.path.samestat(os.stat(source), os.stat(target))
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        if os.path.lexists(target):
            return False
        os.rename(source, target)
    return True


class _Spool(tempfile.SpooledTemporaryFile[bytes]):
    def write(self, data: Any) -> int:
        with told(tempfile.gettempdir(), "write"):
            return super().write(data)


class _RemoteDraft(Draft):
    # fsspec's own files publish what was written so far when the block fails: so nothing is sent before `place`

    def __init__(self, path: str, fs: Any, name: str, spool: Any) -> None:
        self._path, self._fs, self._name, self._spool = path, fs, name, spool
        self.file = cast("BinaryIO", spool)

    @contextmanager
    def reread(self) -> Iterator[BinaryIO]:
        self._spool.seek(0)
        yield self.file

    def place(self, *, over: bool = False) -> bool:
        with told(self._path, "write"):
            if over:
                remote.persistently(self._send, self._path)
                return True
            return puts.put_if_absent(self._fs, self._name, self._path, self._send)

    def _send(self, **options: str) -> None:
        if not getattr(self._spool, "_rolled", True):
            self._spool.seek(0)
            self._fs.pipe_file(self._name, self._spool.read(), **options)
        else:
            self._spool.flush()
            self._fs.put_file(f"/proc/self/fd/{self._spool.fileno()}", self._name, **options)
