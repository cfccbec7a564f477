"""Local copies of shards that lie behind a URL: whole, checked, and no more than so many bytes of them.

A folder of a node's disk, shared by its ranks and by runs one after the other. What was used longest ago makes room. A
reader that has a copy open keeps it even when it is removed meanwhile.

A copy is made under a temporary name, at its full size from the start and locked by its maker, so that others count it
and know whether the maker lives: what a killed one left is removed by whoever makes room or opens the cache next.
Other files in the folder are neither counted nor removed.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from cluster import storage
from cluster.storage import StorageError

_FINISHED = re.compile(r"[0-9a-f]{32}")
_UNFINISHED = re.compile(r"\.[0-9a-f]{32}\.[0-9a-f]{8}\.tmp")  # as cluster.storage.atomic_writer calls it
_COPY_BYTES = 8 << 20
_ATTEMPTS = 3  # of a copy whose checksum is wrong


class _Dropped(Exception):
    """Ends a copy that must not get its name."""


class _Damaged(StorageError):
    """A copy never had the checksum that it must have."""


class Opener:
    """How one loader reads shards: where they lie, or from a cache's copies. Counts what it read."""

    def __init__(self, cache: ShardCache | None = None) -> None:
        self._cache = cache
        self._bytes = 0

    def __call__(self, path: str, start: int, stop: int, sha256: str | None = None) -> io.BufferedReader:
        """As `cluster.storage.open_range`; `sha256` is what a copy of the whole file must have."""
        self._bytes += stop - start
        if self._cache is None:
            return storage.open_range(path, start, stop)
        return self._cache.open_range(path, start, stop, sha256)

    def counts(self) -> dict[str, int]:
        """Bytes asked for so far, and how often a copy was there (cache_hits) or had to be made (cache_misses)."""
        hits, misses = (self._cache.hits, self._cache.misses) if self._cache else (0, 0)
        return {"bytes": self._bytes, "cache_hits": hits, "cache_misses": misses}


class ShardCache:
    """`open_range` reads from the local copy, made at first use; files that are local anyway are read where they are.

    `limit_bytes` bounds the finished copies and those being made together, at every moment and over all processes: a
    shard that is larger, or finds no room beside what others are making, is streamed. On top come a copy that was
    removed while a reader had it open, until that closes it, and empty lock files. Processes with different limits on
    one folder each keep to their own whenever they open the cache or make a copy. Raises StorageError when the folder
    cannot be made or written.
    """

    def __init__(self, folder: str, limit_bytes: int) -> None:
        if limit_bytes < 1:
            raise StorageError(f"{folder}: a cache of {limit_bytes} bytes holds nothing: raise data.cache_bytes")
        storage.make_folder(folder)
        self._folder, self._limit = Path(folder), limit_bytes
        self.hits = self.misses = 0
        self._told = False
        try:
            with self._locked("room"):
                self._make_room(0)  # what was killed, or kept under a higher limit
        except OSError as error:  # a full disk has no room for the lock file either
            self._give_up(error)

    def open_range(self, path: str, start: int, stop: int, sha256: str | None = None) -> io.BufferedReader:
        """As `cluster.storage.open_range`; `sha256` is what the whole file must have (hexadecimal)."""
        if not storage.is_url(path):
            return storage.open_range(path, start, stop)
        size = storage.size(path) if sha256 is None else None
        # a changed object has another size or checksum, and so another copy
        name = hashlib.sha256(f"{path}\n{sha256 or size}".encode()).hexdigest()[:32]
        copy = self._folder / name
        for _ in range(2):  # a copy may be removed between finding and opening it
            if self._touch(copy):
                self.hits += 1
            elif self._fetch(path, copy, sha256):
                self.misses += 1
            else:
                break
            with suppress(FileNotFoundError):
                return storage.open_range(str(copy), start, stop)
        return storage.open_range(path, start, stop)

    def _touch(self, copy: Path) -> bool:
        try:
            os.utime(copy, (time.time(),) * 2)
        except FileNotFoundError:
            return False
        return True

    def _fetch(self, path: str, copy: Path, sha256: str | None) -> bool:
        """Make the copy, unless another process does meanwhile. False: there is no room, or it cannot be written."""
        size = storage.size(path)
        if size > self._limit:
            return False
        try:
            with self._locked(copy.name[:2]):
                return self._touch(copy) or self._make(path, size, copy, sha256)
        except (storage.Unreachable, storage.FileMissing, _Damaged):
            raise
        except OSError as error:  # the cache's own disk: no reason to end a run
            self._give_up(error)
            return False

    def _make(self, path: str, size: int, copy: Path, sha256: str | None) -> bool:
        """False: no room. Raises _Damaged after so many copies with a wrong checksum."""
        for _ in range(_ATTEMPTS):
            found = self._copy(path, size, copy, sha256)
            if found is None or sha256 in (None, found):
                return found is not None
        raise _Damaged(
            f"{path}: its SHA-256 is {found}, SHA256SUMS says {sha256}: the object or the list is damaged; "
            "restore it, or pack the dataset again"
        )

    def _give_up(self, error: OSError) -> None:
        if not self._told:
            text = f"{self._folder}: {error}: make it writable, free space there, or choose another data.cache"
            text = str(error) if isinstance(error, StorageError) else text
            print(f"warning: {text}; shards are streamed instead of copied", file=sys.stderr)
        self._told = True

    def _copy(self, path: str, size: int, copy: Path, sha256: str | None) -> str | None:
        """The SHA-256 of what was copied; what is not as `sha256` wants it is dropped. None: there was no room."""
        digest = hashlib.sha256()
        with suppress(_Dropped), ExitStack() as unfinished:
            target = self._reserve(size, copy, unfinished)
            if target is None:
                return None
            with storage.open_range(path, 0, size) as source:
                while block := source.read(_COPY_BYTES):
                    digest.update(block)
                    target.write(block)
            if sha256 not in (None, digest.hexdigest()):
                raise _Dropped
            target.flush()
            os.fsync(target.fileno())  # the slow part of finishing, before others have to wait for it
            with self._locked("room"):  # while others count, a copy has one name: its first or its last
                unfinished.close()
        return digest.hexdigest()

    def _reserve(self, size: int, copy: Path, unfinished: ExitStack) -> BinaryIO | None:
        """A file of `size` bytes that becomes `copy` when `unfinished` ends well. None: there is no room."""
        with self._locked("room"):
            if not self._make_room(size):
                return None
            target = unfinished.enter_context(storage.atomic_writer(str(copy)))
            fcntl.flock(target, fcntl.LOCK_EX)
            target.truncate(size)
            return target

    def _make_room(self, size: int) -> bool:
        """Remove dead temporaries, then copies until `size` more bytes fit. False: they cannot, all copies stay.

        The caller holds the lock "room".
        """
        copies, making = [], 0
        for file in self._folder.iterdir():
            with suppress(FileNotFoundError):
                if _UNFINISHED.fullmatch(file.name):
                    making += _living_bytes(file)
                elif _FINISHED.fullmatch(file.name):
                    found = file.stat()
                    copies.append((found.st_mtime, found.st_size, file))
        if making + size > self._limit:
            return False
        used = making + sum(held for _, held, _ in copies)
        for _, held, file in sorted(copies):
            if used + size <= self._limit:
                break
            file.unlink(missing_ok=True)
            used -= held
        return True

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        """One process at a time; the lock ends with its process."""
        with (self._folder / f"{name}.lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _living_bytes(temporary: Path) -> int:
    """The size of a copy that a living process makes; 0 for what a dead one left, which is removed.

    The caller holds the lock "room", under which makers lock their files. Raises FileNotFoundError when it just ended.
    """
    with temporary.open("r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return os.fstat(file.fileno()).st_size
        temporary.unlink(missing_ok=True)
    return 0
