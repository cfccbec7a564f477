"""Local copies of shards that lie behind a URL: whole, checked, and no more than so many bytes of them.

A folder of a node's disk, shared by its ranks and by runs one after the other. What was used longest ago makes room. A
reader that has a copy open keeps it even when it is removed meanwhile.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cluster import storage
from cluster.storage import StorageError

_COPY_BYTES = 8 << 20
_ATTEMPTS = 3  # of a copy whose checksum is wrong


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

    `limit_bytes` bounds the finished copies together (those being made, one a reader, come on top); a shard that is
    larger is streamed. Raises StorageError when the folder cannot be used.
    """

    def __init__(self, folder: str, limit_bytes: int) -> None:
        if limit_bytes < 1:
            raise StorageError(f"{folder}: a cache of {limit_bytes} bytes holds nothing: raise data.cache_bytes")
        storage.make_folder(folder)
        self._folder, self._limit = Path(folder), limit_bytes
        self.hits = self.misses = 0
        self._told = False

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
        """Make the copy, unless another process does meanwhile. False: it is too large, or cannot be written."""
        size = storage.size(path)
        if size > self._limit:
            return False
        with self._locked(copy.name[:2]):
            if self._touch(copy):
                return True
            for attempt in range(_ATTEMPTS):
                with self._locked("room"):
                    self._make_room(size)
                try:
                    found = self._copy(path, size, copy)
                except (storage.Unreachable, FileNotFoundError):
                    raise
                except StorageError as error:  # the cache's own disk: no reason to end a run
                    self._give_up(error)
                    return False
                if sha256 is None or found == sha256:
                    return True
                copy.unlink(missing_ok=True)
                if attempt == _ATTEMPTS - 1:
                    raise StorageError(
                        f"{path}: its SHA-256 is {found}, SHA256SUMS says {sha256}: the object or the list is damaged; "
                        "restore it, or pack the dataset again"
                    )
        return True

    def _give_up(self, error: StorageError) -> None:
        if not self._told:
            print(f"warning: {error}; shards are streamed instead of copied", file=sys.stderr)
        self._told = True

    def _copy(self, path: str, size: int, copy: Path) -> str:
        digest = hashlib.sha256()
        with storage.open_range(path, 0, size) as source, storage.atomic_writer(str(copy)) as target:
            while block := source.read(_COPY_BYTES):
                digest.update(block)
                target.write(block)
        return digest.hexdigest()

    def _make_room(self, size: int) -> None:
        copies = []
        for file in self._folder.iterdir():
            with suppress(FileNotFoundError):
                if file.suffix != ".lock" and not file.name.startswith("."):
                    found = file.stat()
                    copies.append((found.st_mtime, found.st_size, file))
        used = sum(held for _, held, _ in copies)
        for _, held, file in sorted(copies):
            if used + size <= self._limit:
                break
            file.unlink(missing_ok=True)
            used -= held

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        """One process at a time; the lock ends with its process."""
        with (self._folder / f"{name}.lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
