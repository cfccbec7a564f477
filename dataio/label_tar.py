"""One label shard as a file: written from samples, and read back to say what is in it.

What the ledger states of a label tar comes from `read_tar`, never from the memory of who wrote it.

Shape suffixes: H W pixels.
"""

from __future__ import annotations

import hashlib
import json
import math
import tarfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO, cast

import numpy as np
import numpy.typing as npt

from cluster.storage import Stamp
from dataio import label_codec
from dataio.index import ShardIndex, split_name
from dataio.label_codec import LabelEncoding
from dataio.shards import tar_writer
from dataio.spec import DataError

IMAGE = "disparity.png"
FAILURE = "failure"  # in KEY.json: why there is no disparity
NO_VALID_DISPARITY = "no_valid_disparity"
OUT_OF_RANGE = "disparity_out_of_range"
QUALITY_BINS = 20  # equal ones over [0, 1]

_READ_BYTES = 1 << 20
_BLOCK = 512
_TAIL_BYTES = 2 * _BLOCK + tarfile.RECORDSIZE  # what may follow the last sample: two blocks, up to a whole record

Row = tuple[str, dict[str, int], str | None]  # key, extension -> bytes, why it failed


def decode_label(members: Mapping[str, bytes]) -> npt.NDArray[np.float32]:
    """The disparity of a sample that has one, [H, W], NaN at holes. DataError when any of it is damaged."""
    extension = label_codec.member_of(members)
    if extension is None:
        raise DataError(f"no label among {', '.join(members)}")
    return label_codec.decode(extension, members[extension], json.loads(members["json"]))


@dataclass(frozen=True)
class LabelSample:
    """One encoded sample of a label shard: what stands behind `KEY.`; of a failed one KEY.json {failure} alone."""

    key: str
    members: Mapping[str, bytes]
    failure: str | None = None

    @classmethod
    def encoded(
        cls, key: str, disparity_HW: npt.NDArray[np.float32], meta: Mapping[str, Any], encoding: LabelEncoding = "png"
    ) -> LabelSample:
        """A disparity map, NaN where invalid; `meta` goes into KEY.json beside what reads the map.

        Without any finite value it is a failed sample, NO_VALID_DISPARITY; of a range that float32 does not hold in
        steps, OUT_OF_RANGE. DataError when the encoding's package is not installed, ValueError when `meta` is no JSON,
        or holds NaN.
        """
        label_codec.check_available(label_codec.EXTENSIONS[encoding])  # of that the sample is not to blame
        if not np.isfinite(disparity_HW).any():
            return cls.failed(key, NO_VALID_DISPARITY, meta)
        try:
            label = label_codec.encode(disparity_HW, encoding)
        except DataError:
            return cls.failed(key, OUT_OF_RANGE, meta)
        return cls(key, {label.extension: label.data, "json": _json({**meta, **label.meta})})

    @classmethod
    def failed(cls, key: str, reason: str, meta: Mapping[str, Any] | None = None) -> LabelSample:
        """A sample without a label, and why. ValueError when `meta` is no JSON, or the reason is empty."""
        if not reason:
            raise ValueError(f"{key}: a failed sample needs a reason")
        return cls(key, {"json": _json({**(meta or {}), FAILURE: reason})}, reason)


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What a label tar holds, as read. `quality` counts samples by bins over [0, 1]; None when no sample states one.

    `stamp` is that of the file that was read, for who read one; `bytes` and `sha256` are of the whole tar.
    """

    sha256: str
    bytes: int
    rows: tuple[Row, ...]
    quality: tuple[int, ...] | None
    index: ShardIndex
    stamp: Stamp | None = None

    @property
    def keys(self) -> list[str]:
        """In the tar's order."""
        return [key for key, _, _ in self.rows]

    @property
    def failures(self) -> dict[str, list[str]]:
        """Reason -> keys, in the order of the tar."""
        found: dict[str, list[str]] = {}
        for key, _, failure in self.rows:
            if failure is not None:
                found.setdefault(failure, []).append(key)
        return found


@dataclass(frozen=True)
class Written:
    """What a writer believes to have written, to be compared with `Contents`."""

    sha256: str
    rows: tuple[Row, ...]


def write_tar(file: BinaryIO, samples: Iterable[LabelSample], keys: Sequence[str], name: str) -> Written:
    """Write samples, which must be those of `keys`, in that order. The same samples make the same bytes.

    DataError, at the first sample that is out of place; what `samples` raises passes through. `name` is for people.
    """
    hashed, rows = _Hashing(file), []
    with tar_writer(cast("BinaryIO", hashed)) as tar:
        for place, sample in enumerate(samples):
            if place >= len(keys) or sample.key != keys[place]:
                raise DataError(f"{name}: {_wrong_key(place, sample.key, keys)}: nothing was written")
            rows.append((sample.key, {part: len(data) for part, data in sample.members.items()}, sample.failure))
            tar.write({"__key__": sample.key, **sample.members})
    if len(rows) != len(keys):
        raise DataError(f"{name}: {len(rows)} samples, the source shard has {len(keys)}: nothing was written")
    return Written(hashed.sha256.hexdigest(), tuple(rows))


def read_tar(file: BinaryIO, name: str, on_sample: Callable[[LabelSample], None] | None = None) -> Contents:
    """Read a label tar from front to back, once; `on_sample` gets every sample as it comes.

    DataError unless it is whole, holds label samples only, and ends as `write_tar` ends one. `name` is for people.
    """
    through = _Reading(file)
    places: list[tuple[str, int, int]] = []
    rows: list[Row] = []
    values: list[float] = []

    def take(key: str, members: dict[str, bytes]) -> None:
        sample, quality = _sample(name, key, members)
        rows.append((key, {part: len(data) for part, data in members.items()}, sample.failure))
        values.extend([] if quality is None else [quality])
        if on_sample is not None:
            on_sample(sample)

    key = ""
    members: dict[str, bytes] = {}  # of the sample at hand
    try:
        with tarfile.open(fileobj=cast("Any", through), mode="r|", bufsize=_READ_BYTES) as archive:
            for member in archive:
                cast("Any", archive).members = []  # tarfile keeps every header
                parts = split_name(member.name)
                content = archive.extractfile(member) if member.isreg() else None
                if parts is None or content is None:
                    raise DataError(f"{name}: holds {member.name!r}, which is no member of a sample")
                data = content.read()
                places.append((member.name, member.offset_data, member.size))
                if members and (parts[0] != key or parts[1] in members):
                    take(key, members)
                    members = {}
                key = parts[0]
                members[parts[1]] = data
    except tarfile.TarError as error:
        raise DataError(f"{name}: not a whole tar ({error})") from error
    if members:
        take(key, members)
    through.drain()
    index = ShardIndex.of(name, places)
    _check_end(name, index.end, through)
    if [(entry.key, {part: size for part, (_, size) in entry.members.items()}) for entry in index.samples] != [
        (row[0], row[1]) for row in rows
    ]:
        raise DataError(f"{name}: its index would show other samples")
    return Contents(
        sha256=through.sha256.hexdigest(),
        bytes=through.count,
        rows=tuple(rows),
        quality=histogram(values) if values else None,
        index=index,
    )


def check_written(name: str, written: Written, found: Contents) -> None:
    """DataError unless what was read back is what was written."""
    if found.sha256 != written.sha256:
        raise DataError(f"{name}: the bytes read back differ from those written: check the disk, then run again")
    if found.rows != written.rows:
        raise DataError(f"{name}: the samples read back are not those written: use other keys")


def check_keys_of(name: str, found: Contents, keys: Sequence[str]) -> None:
    """DataError unless a tar holds the samples of the source shard, in its order."""
    for place, key in enumerate(found.keys):
        if place >= len(keys) or key != keys[place]:
            raise DataError(f"{name}: {_wrong_key(place, key, keys)}")
    if len(found.rows) != len(keys):
        raise DataError(f"{name}: {len(found.rows)} samples, the source shard has {len(keys)}")


def histogram(values: Iterable[float]) -> tuple[int, ...]:
    """Counts in `QUALITY_BINS` equal bins over [0, 1]; 1 belongs to the last one, what lies outside to the ends."""
    counts = [0] * QUALITY_BINS
    for value in values:
        counts[min(max(int(value * QUALITY_BINS), 0), QUALITY_BINS - 1)] += 1
    return tuple(counts)


@dataclass
class _Hashing:
    """Hashes what passes through to `file`."""

    file: BinaryIO
    sha256: Any = field(default_factory=hashlib.sha256)

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        return self.file.write(data)


@dataclass
class _Reading:
    """Hashes and counts what is read from `file`, and keeps its end."""

    file: BinaryIO
    sha256: Any = field(default_factory=hashlib.sha256)
    count: int = 0
    tail: bytes = b""

    def read(self, size: int) -> bytes:
        data = self.file.read(size)
        self.sha256.update(data)
        self.count += len(data)
        self.tail = (self.tail + data)[-_TAIL_BYTES:] if len(data) < _TAIL_BYTES else data[-_TAIL_BYTES:]
        return data

    def drain(self) -> None:
        while self.read(_READ_BYTES):
            pass


def _check_end(name: str, end: int, through: _Reading) -> None:
    # whole records, as tarfile fills them up: a tar that lost or gained zeros has another checksum
    expected = -(-(end + 2 * _BLOCK) // tarfile.RECORDSIZE) * tarfile.RECORDSIZE
    if through.count != expected:
        raise DataError(f"{name}: {through.count} bytes found, {expected} expected behind its last sample")
    if any(through.tail[len(through.tail) - (through.count - end) :]):
        raise DataError(f"{name}: byte {end} is no tar header: the file is damaged")


def _sample(name: str, key: str, members: dict[str, bytes]) -> tuple[LabelSample, float | None]:
    """The sample, and its quality. DataError when it is not what a label sample is."""
    try:
        meta = json.loads(members.get("json", b""))
    except ValueError as error:
        raise DataError(f"{name}: {key}.json is no JSON ({error})") from error
    if not isinstance(meta, dict):
        raise DataError(f"{name}: {key}.json is no JSON object")
    failure = meta.get(FAILURE)
    if failure is not None and (not isinstance(failure, str) or not failure or len(members) > 1):
        raise DataError(f"{name}: {key} failed ({failure!r}) and holds {', '.join(members)}: KEY.json alone is needed")
    if failure is None and len(members) == 1:
        raise DataError(f"{name}: {key} has neither a label nor a failure")
    quality = meta.get("quality")
    if quality is None:
        return LabelSample(key, members, failure), None
    if isinstance(quality, bool) or not isinstance(quality, int | float) or not math.isfinite(quality):
        raise DataError(f"{name}: {key} has the quality {quality!r}, a number is needed")
    return LabelSample(key, members, failure), float(quality)


def _wrong_key(place: int, key: str, keys: Sequence[str]) -> str:
    if place >= len(keys):
        return f"sample {place} is {key!r}, the source shard has {len(keys)} only"
    return f"sample {place} is {key!r}, that of the source shard {keys[place]!r}"


def _json(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, ensure_ascii=False, allow_nan=False).encode()
