"""Writing shards and resuming: what every maker of a dataset shares.

A dataset under construction keeps `packing/plan.json` (the arguments) and one `packing/NNNNNN.json` per finished shard
(where the source stood behind it). `dataset.json` comes last, so half a dataset is none.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, cast

from cluster import storage
from dataio.dataset import INFO_NAME, SHARDS_NAME, SUMS_NAME, DatasetInfo, read_json
from dataio.index import ShardIndex, index_path
from dataio.spec import DataError

STATE_NAME = "packing"
REPORT_NAME = "pack_report.json"
SHARD_BYTES = 256 << 20
_HEADERS = 2 * 512  # a member's header and, on average, half a block of padding, rounded up

Progress = Callable[[int, int], None]  # (source items looked at, of how many)


@dataclass(frozen=True, kw_only=True)
class Item:
    """One item of a source: a sample (`key`, encoded `members` by extension), or the `problem` that it has."""

    name: str  # for people: the file
    key: str = ""
    members: Mapping[str, bytes] = field(default_factory=dict)
    problem: str | None = None


@dataclass(frozen=True)
class PackReport:
    """What was packed and what was left out, by reason; also in `pack_report.json`."""

    packed: int
    skipped: dict[str, list[str]] = field(default_factory=dict)

    def __str__(self) -> str:
        left_out = "; ".join(
            f"{len(names)} {reason} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
            for reason, names in sorted(self.skipped.items())
        )
        return f"packed {self.packed} samples, skipped {left_out or 'none'}"


class ShardWriter:
    """Writes `NNNNNN.tar` and `.idx` into a folder, starting another shard by size or number of samples.

    A context manager: leaving it by an exception discards the open shard; finished ones stay. The bytes of a tar are a
    function of its samples alone. `on_shard(stem, samples, bytes, sha256)` is called once a shard and its index are in
    place.
    """

    def __init__(
        self,
        folder: str,
        *,
        shard_bytes: int = SHARD_BYTES,
        shard_samples: int | None = None,
        first: int = 0,
        on_shard: Callable[[str, int, int, str], None] | None = None,
    ) -> None:
        self._folder, self._number = folder, first
        self._shard_bytes, self._shard_samples = shard_bytes, shard_samples
        self._on_shard = on_shard or (lambda stem, samples, size, sha256: None)
        self._digest = hashlib.sha256()
        self._open: ExitStack | None = None  # the tar inside its file
        self._tar: Any = None
        self._samples = self._bytes = 0

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        elif self._open is not None:
            shard, self._open = self._open, None
            shard.__exit__(kind, error, trace)

    def write(self, key: str, members: Mapping[str, bytes]) -> None:
        """Append one sample; its members' bytes are taken as they are. Raises StorageError, e.g. when disk is full."""
        size = sum(len(data) + _HEADERS for data in members.values())
        full = self._samples == self._shard_samples or self._bytes + size > self._shard_bytes
        if self._open is not None and full:
            self.close()
        if self._open is None:
            self._open = ExitStack()
            file = self._open.enter_context(storage.atomic_writer(self._path()))
            self._digest = hashlib.sha256()
            self._tar = self._open.enter_context(tar_writer(cast("BinaryIO", _Hashed(file, self._digest))))
        self._tar.write({"__key__": key, **members})
        self._samples += 1
        self._bytes += size

    def close(self) -> None:
        """Finish the open shard, if any: tar, then index, then `on_shard`."""
        if self._open is None:
            return
        shard, self._open = self._open, None
        shard.close()
        path = self._path()
        ShardIndex.build(path).write(index_path(path))
        self._on_shard(f"{self._number:06d}", self._samples, storage.size(path), self._digest.hexdigest())
        self._number += 1
        self._samples = self._bytes = 0

    def _path(self) -> str:
        return storage.join(self._folder, f"{self._number:06d}.tar")


class _Hashed:
    """A file that is only written forward, and hashed on the way."""

    def __init__(self, file: BinaryIO, digest: Any) -> None:
        self._file, self._digest = file, digest

    def write(self, data: bytes) -> int:
        self._digest.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()


@contextmanager
def tar_writer(file: BinaryIO) -> Iterator[Any]:
    """webdataset's TarWriter for samples of bytes, without times: the same samples make the same tar."""
    import webdataset  # pulls in torch: slow, and not needed to look at a dataset

    tar = webdataset.TarWriter(file, encoder=False, mtime=0)
    try:
        yield tar
    except BaseException:
        with suppress(OSError, ValueError):  # left open it would write to the closed file when collected
            tar.close()
        raise
    tar.close()


class Packing:
    """One making of a dataset in `out`: resumes what the same `plan` (JSON-able) began, refuses another one's.

    Call `run` once, with the items from `next` on. `restart` first deletes what an earlier packing left in `out`.
    """

    def __init__(self, out: str, plan: Mapping[str, Any], *, restart: bool = False) -> None:
        self._out = out
        self._state = storage.join(out, STATE_NAME)
        self._shards = storage.join(out, SHARDS_NAME)
        self._skipped: dict[str, list[str]] = {}
        self._packed = self._finished = self._next = self._at = 0
        self._pending: dict[str, list[str]] = {}  # skipped since the last finished shard
        if restart:
            self._delete()
        self._begin(json.loads(json.dumps(plan)))

    @property
    def next(self) -> int:
        """The position in the source behind the last finished shard."""
        return self._next

    def run(
        self, items: Iterator[Item], total: int, info: DatasetInfo, writer: Mapping[str, Any], progress: Progress | None
    ) -> PackReport:
        """Pack `items`, which start at `next`, write the report, and last `dataset.json` (`info` with the true count).

        `writer` holds ShardWriter's limits. DataError when no sample was usable; StorageError.
        """
        first = self._finished
        with ShardWriter(self._shards, first=first, on_shard=self._record, **writer) as shards:
            for at, item in enumerate(items, self._next):
                self._at = at
                if item.problem:
                    self._pending.setdefault(item.problem, []).append(item.name)
                else:
                    shards.write(item.key, item.members)
                if progress is not None:
                    progress(at + 1, total)
            self._at = total
        self._take_pending()
        report = PackReport(self._packed, self._skipped)
        storage.atomic_write(storage.join(self._out, REPORT_NAME), json.dumps(asdict(report), indent=2) + "\n")
        if not report.packed:
            raise DataError(f"{self._out}: no usable sample in the source: {report}; nothing was made")
        self._write_sums()
        replace(info, samples=report.packed).write(self._out)
        return report

    def _begin(self, plan: dict[str, Any]) -> None:
        path = storage.join(self._state, "plan.json")
        if not storage.exists(path):
            shards = storage.listdir(self._shards) if storage.exists(self._shards) else []
            if shards or storage.exists(storage.join(self._out, INFO_NAME)):
                raise DataError(f"{self._out}: holds a dataset that was not packed here: choose another folder")
            storage.atomic_write(path, json.dumps(plan, indent=2, sort_keys=True) + "\n")
            return
        before = read_json(path)
        if before != plan:
            changed = sorted(k for k in before.keys() | plan.keys() if before.get(k) != plan.get(k))
            first = changed[0]
            raise DataError(
                f"{self._out}: was packed with other arguments ({first} was {_short(before.get(first))}, now "
                f"{_short(plan.get(first))}): use the same ones, choose another folder, or start anew with --restart"
            )
        while self._resume_shard():
            pass

    def _resume_shard(self) -> bool:
        stem = f"{self._finished:06d}"
        record, tar = storage.join(self._state, f"{stem}.json"), storage.join(self._shards, f"{stem}.tar")
        if not storage.exists(record) or not storage.exists(tar):
            return False
        state = read_json(record)
        if storage.size(tar) != state["bytes"]:
            return False
        self._finished += 1
        self._packed += state["samples"]
        self._next = state["next"]
        self._pending = state["skipped"]
        self._take_pending()
        return True

    def _write_sums(self) -> None:
        """`SHA256SUMS`, as `sha256sum --check` reads it in the dataset's folder."""
        lines = []
        for number in range(self._finished):
            stem = f"{number:06d}"
            state = read_json(storage.join(self._state, f"{stem}.json"))
            name = f"{SHARDS_NAME}/{stem}.tar"
            sha256 = state.get("sha256") or storage.sha256_file(storage.join(self._out, name))
            lines.append(f"{sha256}  {name}\n")
        storage.atomic_write(storage.join(self._out, SUMS_NAME), "".join(lines))

    def _record(self, stem: str, samples: int, size: int, sha256: str) -> None:
        # the item at hand opens the next shard; those skipped before it belong to this one
        state = {"samples": samples, "bytes": size, "sha256": sha256, "next": self._at, "skipped": self._pending}
        storage.atomic_write(storage.join(self._state, f"{stem}.json"), json.dumps(state) + "\n")
        self._finished += 1
        self._packed += samples
        self._take_pending()

    def _take_pending(self) -> None:
        for reason, names in self._pending.items():
            self._skipped.setdefault(reason, []).extend(names)
        self._pending = {}

    def _delete(self) -> None:
        if storage.is_url(self._out):
            raise DataError(f"{self._out}: cannot start anew behind a URL: delete it there, or choose another folder")
        if not storage.exists(storage.join(self._state, "plan.json")):
            return  # what is there is not ours to delete
        _remove(storage.join(self._out, INFO_NAME))  # first: from here on it is no dataset
        for folder, endings in ((self._shards, (".tar", ".idx")), (self._state, (".json",))):
            for name in storage.listdir(folder) if storage.exists(folder) else []:  # sorted: plan.json goes last
                if name.endswith(endings):
                    _remove(storage.join(folder, name))


def _remove(path: str) -> None:
    Path(path).unlink(missing_ok=True)


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) < 60 else text[:57] + "..."
