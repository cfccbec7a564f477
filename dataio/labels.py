"""Pseudo-labels: a sidecar beside a dataset, one label shard per source shard, never a copy of the photographs.

    labels.json                what made them; `label_format`, `digest` and the `description` that the digest is of
    shards/NNNNNN.tar .idx     same keys, same order as the source: KEY.disparity.png and KEY.json {scale, shift,
                               quality, ...}, or KEY.json {failure} alone
    ledger/NNNNNN.json         written last: samples, failures by reason, sha256, bytes, quality, seconds, by

disparity = scale * (code - 16) + shift, code 0 is invalid. A shard without a ledger entry does not exist. The tar is
a function of its samples, so a late duplicate of a worker that was given up for dead changes nothing; how writers stay
out of each other's way is in `dataio.label_commit`. While a run works, `leases/` and `telemetry/` are there as well.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

from cluster import storage
from dataio.dataset import SHARDS_NAME, Dataset, check_keys, read_json
from dataio.index import SampleEntry, ShardIndex
from dataio.label_commit import By, Commit, LabelSlot
from dataio.label_ledger import LabelStatus, LedgerEntry, parse_entry, sum_up
from dataio.label_tar import FAILURE, IMAGE, LabelSample
from dataio.spec import DataError

__all__ = [
    "FAILURE",
    "IMAGE",
    "INFO_NAME",
    "LABEL_FORMAT",
    "LEDGER_NAME",
    "WORKING",
    "Commit",
    "LabelSample",
    "LabelStatus",
    "LabelStore",
    "LedgerEntry",
    "plan_digest",
]

LABEL_FORMAT = 3
INFO_NAME = "labels.json"
LEDGER_NAME = "ledger"
WORKING = ("leases", "telemetry")  # folders of runs at work
_READERS, _REMOTE_READERS = 8, 16  # threads; a disk across a network takes its time over each entry, and a store more
_CHUNK = 64  # entries a thread reads at a time


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
        content = {"label_format": LABEL_FORMAT, "digest": plan_digest(description), "description": description}
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        if not storage.exists(path) and storage.write_if_absent(path, text):
            return cls(folder, description)
        store = cls.open(folder)
        for key in sorted(store.description.keys() | description.keys()):
            before, now = store.description.get(key), description.get(key)
            if before != now:
                raise DataError(
                    f"{path}: these labels were made otherwise: {key} is {json.dumps(before)}, now "
                    f"{json.dumps(now)}: use another folder, so that labels of two kinds never mix"
                )
        return store

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

    @cached_property
    def digest(self) -> str:
        """The plan digest of the description."""
        return plan_digest(self.description)

    def heeds_condition(self) -> bool:
        """Whether the store refuses to make what is there: else two writers that are late may both have their way, and
        this process looks first from now on. Every process that writes asks once."""
        path = storage.join(self.path, INFO_NAME)
        return storage.heeds_condition(path, storage.read_bytes(path))

    def tar(self, stem: str) -> str:
        """The path of a label shard."""
        return storage.join(self.path, SHARDS_NAME, f"{stem}.tar")

    def ledger(self, stem: str) -> str:
        """The path of a ledger entry."""
        return storage.join(self.path, LEDGER_NAME, f"{stem}.json")

    def index(self, stem: str) -> ShardIndex:
        """The index of a committed label shard. DataError when it is not committed or damaged."""
        entry = self.entry(stem)
        if entry is None:
            raise DataError(f"{self.tar(stem)}: no ledger entry, so no labels: `fathom label run` finishes them")
        return _index(self.tar(stem), entry.sha256)

    def entry(self, stem: str) -> LedgerEntry | None:
        """The ledger entry of a shard, None when there is none. DataError when it is damaged."""
        path = self.ledger(stem)
        try:
            return parse_entry(path, storage.read_bytes(path), stem, self.digest)
        except storage.FileMissing:
            return None

    def read(self, stem: str) -> Iterator[LabelSample]:
        """The samples of a committed label shard, in order, failed ones included. DataError, StorageError."""
        index = self.index(stem)
        with storage.open_range(self.tar(stem), 0, index.end) as file:
            for sample in index.samples:
                file.seek(sample.start)
                yield _label_sample(sample, file.read(sample.data_end - sample.start))

    def done(self, stem: str) -> bool:
        """Whether the shard is committed: it has a ledger entry, and its tar the size written there."""
        entry, seen = self._usable(stem), storage.stamp(self.tar(stem))
        return entry is not None and seen is not None and seen.size == entry.bytes

    def done_stems(self) -> set[str]:
        """The stems of all committed shards, found by two listings.

        Locally each entry is read as well, and must state the size of its tar. Behind a URL, where a file is whole or
        not there, both names suffice. An entry that cannot be read is none. Raises StorageError.
        """
        stems, tar_bytes = self._named()
        if storage.is_url(self.path):
            return set(stems) & tar_bytes.keys()
        return {stem for stem, entry in self._entries(stems) if entry.bytes == tar_bytes.get(stem)}

    def commit(
        self,
        stem: str,
        samples: Iterable[LabelSample],
        *,
        keys: Sequence[str],
        seconds: float | None = None,
        by: By | None = None,
        still_mine: Callable[[], bool] | None = None,
        tag: str | None = None,
    ) -> Commit:
        """Write and commit one label shard, unless that was done; `keys` are those of the source shard, in order.

        `samples` stand in that order, failed ones included; they are asked for only if there is work to do. `seconds`
        is how long the work took; None measures this call, which is right when `samples` computes as it is read. `by`
        says who did it (see `LedgerEntry`), at once or when asked at the end. `still_mine` is asked before the shard
        gets its name: False drops the work. `tag` (eight hexadecimal digits) names this writer's temporary files, for
        `clean`.

        When this raises, nothing of this writer is left under a name that counts: DataError (samples out of place, or
        not read back as written), StorageError, whatever `samples` and `still_mine` raise.
        """
        return self._slot(stem, keys, by, tag).commit(samples, seconds, still_mine)

    def replace(
        self,
        stem: str,
        samples: Iterable[LabelSample],
        *,
        keys: Sequence[str],
        seconds: float | None = None,
        by: By | None = None,
        still_mine: Callable[[], bool] | None = None,
        tag: str | None = None,
    ) -> Commit:
        """Commit a label shard in place of the one that is there, for failed samples that were tried again.

        As `commit`; a shard of the same bytes is left alone ("duplicate"). A crash leaves the old one, or a shard
        without an entry, which the next `commit` adopts. Nobody else should read the shard meanwhile: for a moment it
        is not there.
        """
        return self._slot(stem, keys, by, tag).replace(samples, seconds, still_mine)

    def clean(self, *, keep: Container[str] = (), older_than_s: float = 0.0) -> list[str]:
        """Remove what writers left that died: temporary files whose tag is not in `keep` and that nobody has written
        to for so long. Returns their paths."""
        folders = (self.path, storage.join(self.path, SHARDS_NAME), storage.join(self.path, LEDGER_NAME))
        return [
            storage.join(folder, name)
            for folder in folders
            for name in storage.remove_temporaries(folder, keep=keep, older_than_s=older_than_s)
        ]

    def committed(self) -> list[str]:
        """The stems that have a ledger entry, sorted."""
        folder = storage.join(self.path, LEDGER_NAME)
        try:
            return [name.removesuffix(".json") for name in storage.listdir(folder) if name.endswith(".json")]
        except storage.FileMissing:
            return []

    def entries(self) -> Iterator[LedgerEntry]:
        """The ledger entries that can be read, by rising stem, whatever is there of their tars. StorageError."""
        for _, entry in self._entries(self.committed()):
            yield entry

    def done_entries(self) -> list[LedgerEntry]:
        """The ledger entries of committed shards, by rising stem. Raises StorageError."""
        stems, tar_bytes = self._named()
        return [entry for stem, entry in self._entries(stems) if entry.bytes == tar_bytes.get(stem)]

    def status(self, dataset: Dataset | None = None) -> LabelStatus:
        """Sum up the ledger entries of committed shards; with a dataset also what is missing. Raises StorageError."""
        entries = self.done_entries()
        return sum_up(entries, missing_of(dataset, entries) if dataset else ())

    def require_made_of(self, dataset: Dataset) -> None:
        """DataError when labels.json names another dataset."""
        made_of = self._fingerprint()
        if made_of is not None and made_of != dataset.fingerprint:
            raise DataError(
                f"{self.path}: these are labels of a dataset with fingerprint {made_of}, {dataset.path} has "
                f"{dataset.fingerprint}: name their own with --dataset"
            )

    def complete_for(self, dataset: Dataset) -> None:
        """DataError unless every shard of the dataset is labelled, sample for sample.

        Labels that say they are of this very dataset need no entry read behind a URL: a shard of other keys was never
        committed.
        """
        stems, tar_bytes = self._named()
        entries: dict[str, LedgerEntry] = {}
        if storage.is_url(self.path) and self._fingerprint() == dataset.fingerprint:
            done = set(stems) & tar_bytes.keys()
        else:
            entries = {stem: entry for stem, entry in self._entries(stems) if entry.bytes == tar_bytes.get(stem)}
            done = set(entries)
        missing = [shard.stem for shard in dataset.shards if shard.stem not in done]
        if missing:
            names = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
            raise DataError(
                f"{self.path}: {len(missing)} of {len(dataset.shards)} shards of {dataset.path} have no labels "
                f"({names}): `fathom label run` finishes them"
            )
        for shard in dataset.shards:
            entry = entries.get(shard.stem)
            if entry is not None and entry.samples != shard.samples:
                raise DataError(
                    f"{self.tar(shard.stem)}: labels {entry.samples} samples, {shard.tar} has {shard.samples}: "
                    "these labels belong to another dataset; name its own"
                )

    def _slot(self, stem: str, keys: Sequence[str], by: By | None, tag: str | None) -> LabelSlot:
        tag = tag if tag is not None else storage.new_tag()
        return LabelSlot(
            stem=stem,
            plan=self.digest,
            tar=self.tar(stem),
            ledger=self.ledger(stem),
            keys=list(keys),
            by=by or {},
            tag=tag,
        )

    def _fingerprint(self) -> object:
        made_of = self.description.get("dataset")
        return made_of.get("fingerprint") if isinstance(made_of, dict) else None

    def _named(self) -> tuple[list[str], dict[str, int]]:
        """The stems with an entry, and the bytes of each tar, by listing."""
        try:
            tars = storage.sizes(storage.join(self.path, SHARDS_NAME), ".tar")
        except storage.FileMissing:
            tars = {}
        return self.committed(), {name.removesuffix(".tar"): size for name, size in tars.items() if size is not None}

    def _usable(self, stem: str) -> LedgerEntry | None:
        try:
            return self.entry(stem)
        except DataError:
            return None

    def _entries(self, stems: Sequence[str]) -> Iterator[tuple[str, LedgerEntry]]:
        """The usable ones among the entries of `stems`, in that order."""

        def read(start: int) -> list[tuple[str, LedgerEntry | None]]:
            return [(stem, self._usable(stem)) for stem in stems[start : start + _CHUNK]]

        with ThreadPoolExecutor(_REMOTE_READERS if storage.is_url(self.path) else _READERS) as pool:
            for part in pool.map(read, range(0, len(stems), _CHUNK)):
                yield from ((stem, entry) for stem, entry in part if entry is not None)


def missing_of(dataset: Dataset, entries: Iterable[LedgerEntry]) -> list[str]:
    """The stems of a dataset's shards that none of the entries is of."""
    done = {entry.stem for entry in entries}
    return [shard.stem for shard in dataset.shards if shard.stem not in done]


def _label_sample(sample: SampleEntry, data: bytes) -> LabelSample:
    """From the bytes [sample.start, sample.data_end) of its tar. DataError when KEY.json is damaged."""
    members = {
        name: data[offset - sample.start : offset - sample.start + size]
        for name, (offset, size) in sample.members.items()
    }
    try:
        meta = json.loads(members.get("json", b""))
        return LabelSample(sample.key, members, meta.get(FAILURE))
    except (ValueError, AttributeError) as error:
        raise DataError(f"{sample.key}.json is no JSON object ({error}): label the shard again") from error


@lru_cache(maxsize=64)
def _index(tar: str, sha256: str) -> ShardIndex:
    # the checksum is part of the cache's key only: checking it here would read the whole shard
    index = ShardIndex.open(tar, write=False)
    index.samples  # noqa: B018  (parses, once)
    return index
