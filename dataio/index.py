"""Where every sample of a tar lies: DALI's webdataset index, format v1.2, the text that `wds2idx` writes.

    v1.2 2
    depth.png 512 880 room_0.depth.png jpg 2048 2127 room_0.jpg
    ...

One line per sample, for each member its extension, the offset of its data, its size (bytes) and its name. A sample's
bytes begin where the data of the sample before it end, padded to 512: a GNU or PAX header that carries a long name
stands before the member's own header and so is inside. Skipped as DALI and webdataset do: folders, links, hidden files.
"""

from __future__ import annotations

import hashlib
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from cluster import storage
from dataio.spec import DataError

_BLOCK = 512
_VERSION = "v1.2"
_USTAR_NAME = 100  # bytes; longer names need a header of their own, or ustar's prefix field
# two zero blocks, then zeros up to a record: more than that behind the last sample is something unlisted
_TAIL = 2 * _BLOCK + tarfile.RECORDSIZE
_CUT_REMEDY = "it was cut in half while copied or written: copy it again, or delete the folder and pack again"

Member = tuple[str, int, int]  # name, offset of the data, size


@dataclass(frozen=True)
class SampleEntry:
    """One sample of a tar. `start` is the offset of its first header, `end` that of the next sample's.

    `members` maps an extension ("jpg", "depth.png") to (offset of the data, size), in the tar's order; all in bytes.
    """

    key: str
    members: Mapping[str, tuple[int, int]]
    start: int
    end: int

    @property
    def data_end(self) -> int:
        """The offset behind the last member's data, without their padding."""
        return max(offset + size for offset, size in self.members.values())


@dataclass(frozen=True)
class ShardIndex:
    """The samples of one tar, in the tar's order. `text` is the index file; `lost` samples were cut off since."""

    text: str
    lost: int = field(default=0, compare=False)

    @cached_property
    def samples(self) -> tuple[SampleEntry, ...]:
        """Raises ValueError when the text is no v1.2 index."""
        entries, start = [], 0
        for line in _lines(self.text):
            members = _parse(line)
            entry = _entry(members, start)
            entries.append(entry)
            start = entry.end
        return tuple(entries)

    @cached_property
    def bad_keys(self) -> Mapping[str, str]:
        """Keys that no sample may have, and why (of `dataio.quarantine.REASONS`): met twice, or leading out."""
        counts = Counter(entry.key for entry in self.samples)
        repeated = {key: "duplicate_key" for key, count in counts.items() if count > 1}
        return repeated | {key: "unsafe_name" for key in counts if key.startswith("/") or ".." in key.split("/")}

    def __len__(self) -> int:
        return int(self.text.split("\n", 1)[0].split(" ")[1])

    @property
    def end(self) -> int:
        """The offset behind the last sample's data and their padding: where the end-of-archive blocks begin."""
        lines = _lines(self.text)
        if not lines:  # a shard without samples
            return 0
        _, offset, size = _parse(lines[-1])[-1]
        return _padded(offset + size)

    @property
    def digest(self) -> str:
        """sha256 of the index's text, in hexadecimal: it changes when a sample, its place or its size does."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    @classmethod
    def build(cls, tar: str) -> ShardIndex:
        """Scan the headers of `tar` (path or URL). DataError when it is cut or unfit for an index."""
        return cls.of(tar, _scan(tar))

    @classmethod
    def of(cls, tar: str, members: Iterable[Member]) -> ShardIndex:
        """The index of members (name, offset of the data, size) in the tar's order. DataError when they are unfit."""
        return cls(_render(tar, _group(tar, members)))

    @classmethod
    def open(cls, tar: str, *, write: bool = True) -> ShardIndex:
        """The index beside `tar`, rebuilt when absent, unreadable or stale: older than the tar, or not covering it.

        A rebuilt index is written back when the folder can be written and `write` is set. Of a tar that was cut, an
        index made before tells what it should hold: it is kept, and reading finds the samples behind the cut bad.
        Raises DataError when the tar is missing, cut and without such an index, or unfit for an index.
        """
        if not storage.exists(tar):
            raise DataError(f"{tar}: missing: restore it, or pack the dataset again")
        size = storage.size(tar)
        index = _read(tar)
        cut = index is not None and index.is_cut(size)
        if index is not None and not cut and not _older(index_path(tar), tar):
            with suppress(ValueError):  # a damaged line
                if index._covers(tar, size):
                    return index
        try:
            index = cls.build(tar)
        except DataError:
            if index is not None and cut:
                return replace(index, lost=sum(entry.data_end > size for entry in index.samples))
            raise
        if write:
            with suppress(storage.StorageError):  # a read-only dataset is read all the same, and scanned again
                index.write(index_path(tar))
        return index

    def is_cut(self, size: int) -> bool:
        """Whether a tar of `size` bytes has lost its end."""
        # the end-of-archive block counts: a cut exactly between two samples shows by nothing else
        return self.end + _BLOCK > size

    def write(self, path: str) -> None:
        """Write the index file atomically. Raises StorageError."""
        storage.atomic_write(path, self.text)

    def _covers(self, tar: str, size: int) -> bool:
        if size - self.end > _TAIL or any(_block(tar, self.end)):
            return False
        longest = max(map(len, self.text.encode().split()), default=0)  # a search by pattern takes twice as long
        return longest <= _USTAR_NAME or self._points_at_data(tar)

    def _points_at_data(self, tar: str) -> bool:
        # `tar --block-num`, which wds2idx reads, reports GNU's long-name header in place of the member's own: such
        # an index points at the name. One look at the first member that may be concerned tells.
        at = 0
        for entry in self.samples:
            for extension, (offset, size) in entry.members.items():
                long = len(f"{entry.key}.{extension}".encode()) > _USTAR_NAME
                if long and offset - at == _BLOCK:
                    return _block(tar, at)[156:157] != tarfile.GNUTYPE_LONGNAME
                at = _padded(offset + size)
        return True


def index_path(tar: str) -> str:
    """The index's place: `000000.idx` beside `000000.tar`."""
    return tar.removesuffix(".tar") + ".idx"


def read_member(tar: str, entry: SampleEntry, extension: str) -> bytes | None:
    """The bytes of one member, None when the sample has none of that extension. Raises StorageError."""
    if extension not in entry.members:
        return None
    offset, size = entry.members[extension]
    with storage.open_range(tar, offset, offset + size) as file:
        return file.read()


def split_name(name: str) -> tuple[str, str] | None:
    """("a/b", "depth.png") for "a/b.depth.png"; None for a hidden file or one without extension."""
    folder, slash, file = name.rpartition("/")
    stem, dot, extension = file.partition(".")
    if not stem or not dot:
        return None
    return f"{folder}{slash}{stem}", extension


def _scan(tar: str) -> Iterator[Member]:
    """Regular files of the tar. DataError when it ends before its end-of-archive block."""
    size = storage.size(tar)
    with storage.open_range(tar, 0, size) as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as archive:
                for member in archive:
                    end = _padded(member.offset_data + member.size)
                    if end > size:
                        raise DataError(f"{tar}: {size} bytes found, at least {end} expected: {_CUT_REMEDY}")
                    cast("Any", archive).members = []  # tarfile keeps every header; a shard may have tens of thousands
                    if member.type in (tarfile.REGTYPE, tarfile.AREGTYPE):
                        yield member.name, member.offset_data, member.size
                end = archive.offset
        except tarfile.TarError as error:
            if size < _BLOCK:
                raise DataError(f"{tar}: {size} bytes found, at least {_BLOCK} expected: {_CUT_REMEDY}") from error
            raise DataError(f"{tar}: not a tar file ({error}): restore it, or pack the dataset again") from error
    # tarfile takes a missing end for an end
    if end + _BLOCK > size:
        raise DataError(f"{tar}: {size} bytes found, at least {end + _BLOCK} expected: {_CUT_REMEDY}")
    if any(_block(tar, end)):
        raise DataError(f"{tar}: byte {end} is no tar header: the file is damaged; restore it, or pack again")


def _group(tar: str, members: Iterable[Member]) -> list[list[Member]]:
    """Consecutive members of one key; a key or a member met again begins a group anew (see `bad_keys`).

    DataError for what the index cannot hold.
    """
    groups: list[list[Member]] = []
    extensions: set[str] = set()
    last = other = None
    for name, offset, size in members:
        other = name
        parts = split_name(name)
        if parts is None:
            continue
        key, extension = parts
        if any(c.isspace() for c in name):
            raise DataError(f"{tar}: member {name!r} has white space in its name: an index cannot hold it; pack again")
        if key != last or extension in extensions:
            extensions, last = set(), key
            groups.append([])
        extensions.add(extension)
        groups[-1].append((name, offset, size))
    if other is not None and not groups:
        raise DataError(f"{tar}: holds no samples, but {other!r}: delete it, or pack the dataset again")
    return groups


def _render(tar: str, groups: list[list[Member]]) -> str:
    lines = [f"{_VERSION} {len(groups)}"]
    for members in groups:
        fields = []
        for name, offset, size in members:
            parts = split_name(name)
            assert parts is not None
            fields.append(f"{parts[1]} {offset} {size} {name}")
        lines.append(" ".join(fields))
    text = "\n".join(lines) + "\n"
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{tar}: a member's name is not UTF-8: rename it, or pack the dataset again") from error
    return text


def _read(tar: str) -> ShardIndex | None:
    """The index file, if there is a sound one. Only its head and last line are looked at: a dataset has thousands."""
    try:
        index = ShardIndex(storage.read_bytes(index_path(tar)).decode())
        lines = _lines(index.text)
        sound = index.text.startswith(f"{_VERSION} ") and index.text.endswith("\n") and len(lines) == len(index) > 0
        return index if sound and index.end > 0 else None
    except (FileNotFoundError, ValueError, IndexError):
        return None


def _older(path: str, tar: str) -> bool:
    if storage.is_url(tar):  # object stores tell when a copy was made, not when its content changed
        return False
    made, changed = (Path(name.removeprefix("file://")).stat().st_mtime_ns for name in (path, tar))
    return made < changed


def _lines(text: str) -> list[str]:
    return text.split("\n")[1:-1]


def _parse(line: str) -> list[Member]:
    """Members of an index line. ValueError when it is none."""
    fields = line.split(" ")
    if not line or len(fields) % 4:
        raise ValueError(f"not a line of a webdataset index: {line[:80]!r}")
    return [(fields[i + 3], int(fields[i + 1]), int(fields[i + 2])) for i in range(0, len(fields), 4)]


def _entry(members: list[Member], start: int) -> SampleEntry:
    parts = [split_name(name) for name, _, _ in members]
    if None in parts:
        raise ValueError(f"not a member of a sample: {members}")
    places = {part[1]: (offset, size) for part, (_, offset, size) in zip(parts, members, strict=True) if part}
    _, offset, size = members[-1]
    first = parts[0]
    assert first is not None
    return SampleEntry(key=first[0], members=places, start=start, end=_padded(offset + size))


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def _block(tar: str, offset: int) -> bytes:
    """The 512 bytes at `offset`, fewer at the file's end."""
    stop = min(offset + _BLOCK, storage.size(tar))
    if stop <= offset:
        return b""
    with storage.open_range(tar, offset, stop) as file:
        return file.read()
