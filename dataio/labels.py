"""Pseudo-labels: a sidecar beside a dataset, one label shard per source shard, never a copy of the photographs.

    labels.json                what made them; `label_format`, `digest` and the `description` that the digest is of
    shards/NNNNNN.tar .idx     same keys, same order as the source: KEY.disparity.png and KEY.json {scale, shift,
                               quality, ...}, or KEY.json {failure} alone
    ledger/NNNNNN.json         written last: samples, failures by reason, sha256, bytes, seconds

disparity = scale * (code - 16) + shift, code 0 is invalid. A shard without a ledger entry does not exist. The tar is
a function of its samples, so a late duplicate of a worker that was given up for dead changes nothing.

Shape suffixes: H W pixels.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Any, BinaryIO, cast

import numpy as np
import numpy.typing as npt

from cluster import storage
from dataio.codec import encode_label
from dataio.dataset import SHARDS_NAME, Dataset, check_keys, read_json
from dataio.index import ShardIndex, index_path
from dataio.shards import tar_writer
from dataio.spec import DataError

LABEL_FORMAT = 1
INFO_NAME = "labels.json"
LEDGER_NAME = "ledger"
IMAGE = "disparity.png"
FAILURE = "failure"  # in KEY.json: why there is no disparity

# key, disparity [H, W] (NaN invalid) or None, what KEY.json shall hold, why it failed or None
LabelSample = tuple[str, npt.NDArray[np.float32] | None, Mapping[str, Any], str | None]


@dataclass(frozen=True, kw_only=True)
class LedgerEntry:
    """One committed label shard; `bytes` and `sha256` are of its tar, `failures` maps a reason to keys."""

    stem: str
    samples: int
    failures: dict[str, list[str]]
    sha256: str
    bytes: int
    seconds: float

    @property
    def failed(self) -> int:
        """The number of samples without a label."""
        return sum(len(keys) for keys in self.failures.values())


@dataclass(frozen=True, kw_only=True)
class LabelStatus:
    """What is committed: `failures` counts by reason, `seconds` is the work of all shards together.

    `missing` are the stems that the dataset has and the labels have not: empty when no dataset was given.
    """

    shards: int
    samples: int
    bytes: int
    seconds: float
    failures: dict[str, int] = field(default_factory=dict)
    missing: tuple[str, ...] = ()


def plan_digest(description: Mapping[str, Any]) -> str:
    """16 hexadecimal digits that name a way of labelling: sha256 of its canonical JSON. ValueError if it is none."""
    text = json.dumps(description, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class LabelStore:
    """A folder or URL of labels, usually `labels/<plan digest>`; made by `create` or `open`."""

    path: str
    description: Mapping[str, Any]

    @classmethod
    def create(cls, folder: str, description: Mapping[str, Any]) -> LabelStore:
        """Start labels, or go on with them. DataError when the folder holds labels of another description."""
        path = storage.join(folder, INFO_NAME)
        description = json.loads(json.dumps(description, allow_nan=False))
        if storage.exists(path):
            store = cls.open(folder)
            for key in sorted(store.description.keys() | description.keys()):
                before, now = store.description.get(key), description.get(key)
                if before != now:
                    raise DataError(
                        f"{path}: these labels were made otherwise: {key} is {json.dumps(before)}, now "
                        f"{json.dumps(now)}: use another folder, so that labels of two kinds never mix"
                    )
            return store
        content = {"label_format": LABEL_FORMAT, "digest": plan_digest(description), "description": description}
        storage.atomic_write(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
        return cls(folder, description)

    @classmethod
    def open(cls, folder: str) -> LabelStore:
        """Open labels. DataError when there are none, their format is unknown, or `labels.json` was edited."""
        path = storage.join(folder, INFO_NAME)
        if not storage.exists(path):
            raise DataError(f"{folder}: no {INFO_NAME} in it, so it holds no labels: `fathom label run` makes them")
        content = read_json(path)
        if content.get("label_format") != LABEL_FORMAT:
            raise DataError(
                f"{path}: label_format is {content.get('label_format')!r}, this fathom reads {LABEL_FORMAT}: "
                "label again, or update fathom"
            )
        check_keys(path, "", content, ["label_format", "digest", "description"])
        if not isinstance(content["description"], dict) or plan_digest(content["description"]) != content["digest"]:
            raise DataError(f"{path}: digest and description disagree, it was edited: restore it, or label again")
        return cls(folder, content["description"])

    @property
    def digest(self) -> str:
        """The plan digest of the description."""
        return plan_digest(self.description)

    def tar(self, stem: str) -> str:
        """The path of a label shard."""
        return storage.join(self.path, SHARDS_NAME, f"{stem}.tar")

    def index(self, stem: str) -> ShardIndex:
        """The index of a committed label shard. DataError when it is not committed or damaged."""
        entry = self.entry(stem)
        if entry is None:
            raise DataError(f"{self.tar(stem)}: no ledger entry, so no labels: `fathom label run` finishes them")
        return _index(self.tar(stem), entry.sha256)

    def entry(self, stem: str) -> LedgerEntry | None:
        """The ledger entry of a shard, None when there is none. DataError when it is damaged."""
        path = self._ledger(stem)
        if not storage.exists(path):
            return None
        content = read_json(path)
        check_keys(path, "", content, LedgerEntry.__dataclass_fields__)
        return LedgerEntry(**content)

    def done(self, stem: str) -> bool:
        """Whether the shard is committed: it has a ledger entry, and its tar the size written there."""
        entry = self.entry(stem)
        return entry is not None and storage.exists(self.tar(stem)) and storage.size(self.tar(stem)) == entry.bytes

    def write_shard(
        self, stem: str, samples: Iterable[LabelSample], seconds: float | None = None, *, replace: bool = False
    ) -> LedgerEntry:
        """Write and commit one label shard; samples stand in the source's order, failed ones included.

        `seconds` is how long the work took; None measures this call, which is right when `samples` computes as it is
        read. A disparity without a finite value fails with the reason "no_valid_disparity". A shard already committed
        is left alone and its entry returned, unless `replace`. Nothing is left behind when this raises: DataError (no
        samples, or not read back as written), StorageError, whatever `samples` raises.
        """
        began = time.monotonic()
        if not replace and self.done(stem):
            return cast("LedgerEntry", self.entry(stem))
        keys: list[str] = []
        failures: dict[str, list[str]] = {}
        with storage.atomic_writer(self.tar(stem)) as file:
            hashed = _HashingFile(file)
            with tar_writer(cast("BinaryIO", hashed)) as tar:
                for key, members, failure in map(_encode, samples):
                    keys.append(key)
                    if failure is not None:
                        failures.setdefault(failure, []).append(key)
                    tar.write({"__key__": key, **members})
            file.flush()
            _verify(self.tar(stem), file, hashed.digest())
        index = ShardIndex.build(self.tar(stem))
        if [entry.key for entry in index.samples] != keys:
            raise DataError(f"{self.tar(stem)}: the keys read back are not those written: use other keys")
        index.write(index_path(self.tar(stem)))
        entry = LedgerEntry(
            stem=stem,
            samples=len(keys),
            failures=failures,
            sha256=hashed.digest(),
            bytes=hashed.size,
            seconds=round(time.monotonic() - began if seconds is None else seconds, 3),
        )
        storage.atomic_write(self._ledger(stem), json.dumps(asdict(entry), ensure_ascii=False) + "\n")
        return entry

    def committed(self) -> list[str]:
        """The stems that have a ledger entry, sorted."""
        folder = storage.join(self.path, LEDGER_NAME)
        names = storage.listdir(folder) if storage.exists(folder) else []
        return [name.removesuffix(".json") for name in names if name.endswith(".json")]

    def status(self, dataset: Dataset | None = None) -> LabelStatus:
        """Sum up the ledger; with a dataset also what is missing."""
        entries = [entry for stem in self.committed() if (entry := self.entry(stem)) is not None]
        failures: dict[str, int] = {}
        for entry in entries:
            for reason, keys in entry.failures.items():
                failures[reason] = failures.get(reason, 0) + len(keys)
        return LabelStatus(
            shards=len(entries),
            samples=sum(entry.samples for entry in entries),
            bytes=sum(entry.bytes for entry in entries),
            seconds=sum(entry.seconds for entry in entries),
            failures=failures,
            missing=tuple(shard.stem for shard in dataset.shards if not self.done(shard.stem)) if dataset else (),
        )

    def complete_for(self, dataset: Dataset) -> None:
        """DataError unless every shard of the dataset is labelled, sample for sample."""
        missing = [shard.stem for shard in dataset.shards if not self.done(shard.stem)]
        if missing:
            names = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
            raise DataError(
                f"{self.path}: {len(missing)} of {len(dataset.shards)} shards of {dataset.path} have no labels "
                f"({names}): `fathom label run` finishes them"
            )
        for shard in dataset.shards:
            entry = self.entry(shard.stem)
            if entry is not None and entry.samples != shard.samples:
                raise DataError(
                    f"{self.tar(shard.stem)}: labels {entry.samples} samples, {shard.tar} has {shard.samples}: "
                    "these labels belong to another dataset; name its own"
                )

    def _ledger(self, stem: str) -> str:
        return storage.join(self.path, LEDGER_NAME, f"{stem}.json")


class _HashingFile:
    """Hashes what passes through to `file`."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._hash, self.size = file, hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        self._hash.update(data)
        self.size += len(data)
        return self._file.write(data)

    def digest(self) -> str:
        return self._hash.hexdigest()


def _encode(sample: LabelSample) -> tuple[str, dict[str, bytes], str | None]:
    """Key, members, and why it failed."""
    key, disparity_HW, meta, failure = sample
    if failure is None and disparity_HW is not None and np.isfinite(disparity_HW).any():
        png, code = encode_label(disparity_HW)
        content = {**meta, "scale": code.scale, "shift": code.shift}
        return key, {IMAGE: png, "json": json.dumps(content, ensure_ascii=False).encode()}, None
    failure = failure or "no_valid_disparity"
    return key, {"json": json.dumps({**meta, FAILURE: failure}, ensure_ascii=False).encode()}, failure


def _verify(path: str, file: BinaryIO, expected: str) -> None:
    """Read the still unnamed file back. DataError when the disk gives other bytes than it was given."""
    with _reading(file) as again:
        found = hashlib.file_digest(cast("Any", again), "sha256").hexdigest()
    if found != expected:
        raise DataError(f"{path}: the bytes read back differ from those written: check the disk, then run again")


@contextmanager
def _reading(file: BinaryIO) -> Iterator[BinaryIO]:
    if file.readable():  # behind a URL: the spool that is about to be sent
        place = file.tell()
        file.seek(0)
        yield file
        file.seek(place)
    else:
        with open(f"/proc/self/fd/{file.fileno()}", "rb") as again:
            yield again


@lru_cache(maxsize=64)
def _index(tar: str, sha256: str) -> ShardIndex:
    # the checksum is part of the cache's key only: checking it here would read the whole shard
    index = ShardIndex.open(tar, write=False)
    index.samples  # noqa: B018  (parses, once)
    return index
