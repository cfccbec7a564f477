"""A dataset on disk: `dataset.json`, `shards/NNNNNN.tar`, `shards/NNNNNN.idx`, local or behind a URL.

`dataset.json` is written last: a folder without it is no dataset.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property, lru_cache
from typing import Any, Literal, cast, get_args

from cluster import storage
from dataio.codec import MIN_SCALE
from dataio.index import SampleEntry, ShardIndex, read_member
from dataio.quarantine import read_quarantine
from dataio.spec import DataError
from dataio.types import AffineCode, Quantity

Role = Literal["labelled", "unlabelled"]
FORMAT_VERSION = 1
INFO_NAME = "dataset.json"
SHARDS_NAME = "shards"
SUMS_NAME = "SHA256SUMS"
_OPENERS = 16  # threads
_OPEN_INDEXES = 64  # parsed; a lane reads one or two shards at a time, and a parsed index takes about 2 MB


@dataclass(frozen=True, kw_only=True)
class DatasetInfo:
    """The content of `dataset.json`. `quantity` and `code` are None when unlabelled; `samples` counts all shards'."""

    name: str
    role: Role
    quantity: Quantity | None
    code: AffineCode | None
    samples: int
    format_version: int = FORMAT_VERSION

    def write(self, folder: str) -> None:
        """Write `dataset.json` atomically: the last act of making a dataset. Raises DataError, StorageError."""
        path = storage.join(folder, INFO_NAME)
        _check(path, asdict(self))
        storage.atomic_write(path, json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n")

    @classmethod
    def read(cls, folder: str) -> DatasetInfo:
        """Read and check `dataset.json`. DataError: missing, not JSON, a key or value unknown, no samples."""
        path = storage.join(folder, INFO_NAME)
        if not storage.exists(path):
            if not storage.exists(folder):
                raise DataError(f"{folder}: no such folder: check the path; `fathom data pack` makes a dataset")
            raise DataError(f"{folder}: no {INFO_NAME} in it, so it is no dataset: `fathom data pack` makes one")
        content = read_json(path)
        _check(path, content)
        code = AffineCode(**content["code"]) if content["code"] is not None else None
        return cls(**{**content, "code": code})


@dataclass(frozen=True)
class Shard:
    """One tar of a dataset: its stem ("000000"), path or URL, number of samples, its index's digest and its SHA-256."""

    stem: str
    tar: str
    samples: int
    digest: str
    sha256: str | None = None  # as SHA256SUMS states it; None for a dataset without one
    lost: int = 0  # samples behind the cut of a tar that has lost its end

    @property
    def index(self) -> ShardIndex:
        """The parsed index; the most recently used ones stay in memory. DataError when the tar was changed since."""
        return _parsed(self.tar, self.digest)

    def read(self, entry: SampleEntry, extension: str) -> bytes | None:
        """The bytes of one member, None when the sample has none of that extension. Raises StorageError."""
        return read_member(self.tar, entry, extension)


@dataclass(frozen=True)
class Dataset:
    """An opened dataset: every shard was found whole and counted."""

    path: str
    info: DatasetInfo
    shards: list[Shard]
    fingerprint: str  # sha256 over shard stems, index contents, quantity and code: what reading depends on
    # Shard's stem -> key -> reason: what streams pass over. No part of the fingerprint, as every sample keeps its
    # place: a run can go on after the list has grown.
    quarantined: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    @classmethod
    def open(cls, path: str) -> Dataset:
        """Open a folder or URL; reads every index file once, and rebuilds the stale ones.

        DataError, in one line with the remedy: no folder, no or wrong `dataset.json`, no shards, a shard cut,
        or another number of samples than stated.
        """
        info = DatasetInfo.read(path)
        folder = storage.join(path, SHARDS_NAME)
        names = storage.listdir(folder) if storage.exists(folder) else []
        stems = sorted(name.removesuffix(".tar") for name in names if name.endswith(".tar") and name[0] != ".")
        if not stems:
            raise DataError(f"{folder}: no shards (*.tar): restore them, or pack the dataset again")
        code = asdict(info.code) if info.code else None
        digest = hashlib.sha256(json.dumps([info.quantity, code], sort_keys=True).encode())
        shards, sums = [], _read_sums(path)
        tars = [storage.join(folder, f"{stem}.tar") for stem in stems]
        with ThreadPoolExecutor(_OPENERS) as pool:  # a store takes its time over each, and a dataset has thousands
            indexes = pool.map(ShardIndex.open, tars)
            for stem, tar, index in zip(stems, tars, indexes, strict=True):
                sha256 = sums.get(f"{SHARDS_NAME}/{stem}.tar")
                shards.append(Shard(stem, tar, len(index), index.digest, sha256, index.lost))
                digest.update(f"\n{stem}\n{index.text}".encode())
        found = sum(shard.samples for shard in shards)
        if found != info.samples:
            raise DataError(
                f"{storage.join(path, INFO_NAME)}: states {info.samples} samples, {len(shards)} shards hold {found}: "
                "a shard is missing or does not belong; restore the folder, or pack the dataset again"
            )
        return cls(path, info, shards, digest.hexdigest(), read_quarantine(path))

    @cached_property
    def starts(self) -> list[int]:
        """The number of samples before each shard, and, last, of all."""
        starts = [0]
        for shard in self.shards:
            starts.append(starts[-1] + shard.samples)
        return starts


def _read_sums(path: str) -> dict[str, str]:
    """File -> SHA-256, as `sha256sum` writes it; empty when there is no list. DataError for a damaged one."""
    name = storage.join(path, SUMS_NAME)
    if not storage.exists(name):
        return {}
    sums = {}
    for line in storage.read_bytes(name).decode(errors="replace").splitlines():
        found = re.fullmatch(r"([0-9a-f]{64}) [ *](.+)", line)
        if found is None:
            raise DataError(f"{name}: {line[:80]!r} is no line of sha256sum: make the list again, or delete it")
        sums[found[2]] = found[1]
    return sums


def read_json(path: str) -> dict[str, Any]:
    """A JSON object. DataError when the file holds none; StorageError when it cannot be read."""
    try:
        content = json.loads(storage.read_bytes(path))
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON ({error}): restore it, or make it again") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: holds {type(content).__name__}, a JSON object is needed: restore it")
    return content


def check_keys(path: str, where: str, content: Mapping[str, Any], known: Iterable[str]) -> None:
    """DataError for an unknown key (naming the nearest right one) or a missing one. `where` prefixes key names."""
    known = list(known)
    for key in content:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"allowed are {', '.join(known)}"
            raise DataError(f"{path}: unknown key {where + str(key)!r}: {hint}")
    for key in known:
        if key not in content:
            raise DataError(f"{path}: {where + key!r} is missing: add it, or pack the dataset again")


def _check(path: str, content: Mapping[str, Any]) -> None:
    version = content.get("format_version", FORMAT_VERSION)
    if version != FORMAT_VERSION:  # first: another version may have other keys
        raise DataError(
            f"{path}: format_version is {version!r}, this fathom reads {FORMAT_VERSION}: pack again, or update fathom"
        )
    check_keys(path, "", {"format_version": version, **content}, [field.name for field in fields(DatasetInfo)])
    _one_of(path, "role", content["role"], get_args(Role))
    _one_of(path, "quantity", content["quantity"], (*get_args(Quantity), None))
    labelled = content["role"] == "labelled"
    if labelled != (content["quantity"] is not None):
        needed = "a quantity" if labelled else "quantity null"
        raise DataError(f"{path}: role {content['role']!r} with quantity {content['quantity']!r}: it needs {needed}")
    if not isinstance(content["name"], str) or not content["name"]:
        raise DataError(f"{path}: name is {content['name']!r}: a non-empty text is needed")
    samples = content["samples"]
    if isinstance(samples, bool) or not isinstance(samples, int):
        raise DataError(f"{path}: samples is {samples!r}: a whole number is needed")
    if samples < 1:
        raise DataError(f"{path}: states {samples} samples: a dataset needs at least one; pack it again")
    _check_code(path, content["code"], needed=labelled)


def _check_code(path: str, code: object, needed: bool) -> None:
    if code is None and not needed:
        return
    if not isinstance(code, dict) or not needed:
        wanted = "an object {scale, shift, zero}" if needed else "null, as the role is unlabelled,"
        raise DataError(f"{path}: code is {code!r}: {wanted} is needed")
    check_keys(path, "code.", {"shift": 0.0, "zero": 0, **code}, [field.name for field in fields(AffineCode)])
    for key, value in code.items():
        kind = int if key == "zero" else int | float
        if isinstance(value, bool) or not isinstance(value, kind) or not math.isfinite(cast("float", value)):
            raise DataError(f"{path}: code.{key} is {value!r}: a number is needed")
    if not code["scale"] >= MIN_SCALE:
        raise DataError(f"{path}: code.scale is {code['scale']!r}: a number above 0, at least {MIN_SCALE}, is needed")


def _one_of(path: str, key: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        names = ", ".join("null" if choice is None else str(choice) for choice in allowed)
        raise DataError(f"{path}: {key} is {value!r}: allowed are {names}")


@lru_cache(maxsize=_OPEN_INDEXES)
def _parsed(tar: str, digest: str) -> ShardIndex:
    index = ShardIndex.open(tar, write=False)
    if index.digest != digest:
        raise DataError(f"{tar}: changed since the dataset was opened: start again")
    try:
        index.samples  # noqa: B018  (parses, once)
    except ValueError:  # a damaged line in the middle, which opening does not look at
        index = ShardIndex.build(tar)
    return index
