"""Read a label sidecar again, all of it, and prove it: every key of the dataset is labelled once, or listed as failed.

Nothing is repaired, and nothing stops it: what is wrong is found and told, all of it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Literal

import numpy as np

from cluster import storage
from dataio.dataset import SHARDS_NAME, Dataset, Shard
from dataio.index import index_path
from dataio.label_codec import check_available
from dataio.label_ledger import LedgerEntry
from dataio.label_tar import Contents, LabelSample, decode_label, read_tar
from dataio.labels import INFO_NAME, LEDGER_NAME, WORKING, LabelStore
from dataio.processes import in_processes
from dataio.spec import DataError

Kind = Literal[
    "damaged", "entry", "extra_key", "foreign", "index", "info", "ledger", "missing", "missing_key", "order",
    "other_dataset", "temporary", "undecodable", "unknown_shard", "working",
]  # fmt: skip
KINDS: Mapping[str, str] = {
    "damaged": "the label shard is not whole, or not what its ledger entry has the checksum of: delete the .tar, and "
    "`fathom label run` makes it again",
    "entry": "the ledger entry is missing or damaged: `fathom label run` makes it again",
    "extra_key": "labelled, but not in the dataset, or more often than there: delete the .tar, and label again",
    "foreign": "does not belong there: move it away",
    "index": "the index is not that of its shard: delete the ledger entry, and `fathom label run` makes both again",
    "info": "labels.json is damaged: restore it",
    "ledger": "the ledger entry and its shard disagree: delete the .json, and `fathom label run` makes it again",
    "missing": "not labelled: `fathom label run` goes on",
    "missing_key": "in the dataset, and neither labelled nor listed as failed: delete the .tar, and label again",
    "order": "not in the dataset's order: delete the .tar, and label again",
    "other_dataset": "these are not the labels of this dataset: name its own",
    "temporary": "left by a writer that died, or one is at work: `fathom label run` cleans up",
    "undecodable": "the label cannot be decoded: delete the .tar, and label again",
    "unknown_shard": "the dataset has no such shard: move it away",
    "working": "a run is at work here, or died here",
}
_SHOWN = 3  # of each kind, in words


@dataclass(frozen=True)
class Finding:
    """One thing that is not as it must be. `kind`: a key of `KINDS`."""

    kind: Kind
    path: str
    text: str


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """What `fathom label verify` prints, and writes as JSON. Sums are of the label shards as they were read.

    `findings` are faults, `notes` are none: what runs at work keep in the folder.
    """

    path: str
    dataset: str
    fingerprint: str
    shards: int
    samples: int
    bytes: int
    failures: dict[str, int] = field(default_factory=dict)
    quality: list[int] | None = None
    decoded: bool = True
    findings: tuple[Finding, ...] = ()
    notes: tuple[Finding, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether all is proved."""
        return not self.findings

    def __str__(self) -> str:
        failed = sum(self.failures.values())
        lines = [
            f"{self.path}: {self.samples} samples in {self.shards} shards, {storage.human_bytes(self.bytes)}, "
            f"{self.samples - failed} labelled, {failed} failed"
        ]
        lines += [f"failed {count}: {reason}" for reason, count in sorted(self.failures.items())]
        for found in (self.notes, self.findings):
            kinds = Counter(each.kind for each in found)
            for kind, count in sorted(kinds.items()):
                lines.append(f"{count} {kind} ({KINDS[kind]}):")
                shown = [each for each in found if each.kind == kind][:_SHOWN]
                lines += [f"  {each.path}: {each.text}" for each in shown]
                lines += [f"  and {count - _SHOWN} more"] if count > _SHOWN else []
        if self.ok:
            without = "" if self.decoded else ", not decoded"
            lines.append(f"proved: every key of {self.dataset} is labelled once or listed as failed{without}")
        else:
            lines.append(f"not proved: {len(self.findings)} findings")
        return "\n".join(lines)

    def to_json(self) -> str:
        """All of it."""
        return json.dumps({"ok": self.ok, **asdict(self)}, indent=2, ensure_ascii=False) + "\n"


@dataclass(frozen=True)
class _Facts:
    """Of one label shard."""

    findings: list[Finding]
    samples: int = 0
    bytes: int = 0
    failures: dict[str, int] = field(default_factory=dict)
    quality: list[int] | None = None


def verify(
    store: LabelStore,
    dataset: Dataset,
    workers: int = 1,
    *,
    decode: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> VerifyReport:
    """Read every label shard of a sidecar (folder or URL) in `workers` processes, and compare with all that is known.

    `decode` decodes every label as well. `progress(done, total)` counts shards. Raises StorageError when a disk or a
    store fails, DataError when the dataset itself cannot be read, or when a package that decodes is not installed.
    """
    if decode:
        check_available(f"disparity.{store.description.get('encoding')}")
    findings, notes = _folder(store, dataset)
    facts: list[_Facts] = []
    for each in in_processes(partial(_facts, store, decode), dataset.shards, workers, 1):
        facts.append(each)
        findings += each.findings
        if progress is not None:
            progress(len(facts), len(dataset.shards))
    rated = [each.quality for each in facts if each.quality is not None]
    failures: Counter[str] = Counter()
    for each in facts:
        failures.update(each.failures)
    return VerifyReport(
        path=store.path,
        dataset=dataset.path,
        fingerprint=dataset.fingerprint,
        shards=sum(1 for each in facts if each.bytes),
        samples=sum(each.samples for each in facts),
        bytes=sum(each.bytes for each in facts),
        failures=dict(sorted(failures.items())),
        quality=[sum(counts) for counts in zip(*rated, strict=True)] if rated else None,
        decoded=decode,
        findings=tuple(findings),
        notes=tuple(notes),
    )


def _folder(store: LabelStore, dataset: Dataset) -> tuple[list[Finding], list[Finding]]:
    """What is wrong with `labels.json` and with the names in the folder; and what runs at work keep there."""
    findings: list[Finding] = []
    notes: list[Finding] = []
    stems = {shard.stem for shard in dataset.shards}
    info = storage.join(store.path, INFO_NAME)
    try:
        if LabelStore.open(store.path) != store:
            findings.append(Finding("info", info, "was changed since it was opened"))
    except DataError as error:
        findings.append(Finding("info", info, str(error)))
    made_of = store.description.get("dataset")
    fingerprint = made_of.get("fingerprint") if isinstance(made_of, dict) else None
    if fingerprint != dataset.fingerprint:
        findings.append(
            Finding("other_dataset", info, f"states dataset {fingerprint}, {dataset.path} is {dataset.fingerprint}")
        )
    for name, size in _listed(store.path):
        path = storage.join(store.path, name)
        if size is None and name in WORKING:
            for inside, bytes in _listed(path):
                held = storage.join(path, inside)
                if bytes is not None and (inside.endswith(".json") or storage.is_temporary(inside)):
                    notes.append(Finding("working", held, f"in {name}/"))
                else:
                    findings.append(_stray(held, inside))
        elif name != INFO_NAME and not (size is None and name in (SHARDS_NAME, LEDGER_NAME)):
            findings.append(_stray(path, name))
    for folder, endings in ((SHARDS_NAME, (".tar", ".idx")), (LEDGER_NAME, (".json",))):
        for name, size in _listed(storage.join(store.path, folder)):
            path = storage.join(store.path, folder, name)
            stem, ending = next(((name.removesuffix(end), end) for end in endings if name.endswith(end)), (name, ""))
            if size is None or not ending or storage.is_temporary(name):
                findings.append(_stray(path, name))
            elif stem not in stems:
                findings.append(Finding("unknown_shard", path, f"{dataset.path} has no shard {stem!r}"))
    return findings, notes


def _listed(folder: str) -> Iterable[tuple[str, int | None]]:
    try:
        return sorted(storage.sizes(folder).items())
    except storage.FileMissing:
        return ()


def _stray(path: str, name: str) -> Finding:
    if storage.is_temporary(name):
        return Finding("temporary", path, "a file that was never finished")
    return Finding("foreign", path, "no part of the labels")


def _facts(store: LabelStore, decode: bool, shard: Shard) -> _Facts:
    """Of the label shard of one source shard."""
    tar, ledger = store.tar(shard.stem), store.ledger(shard.stem)
    findings: list[Finding] = []
    entry = None
    try:
        entry = store.entry(shard.stem)
    except DataError as error:
        findings.append(Finding("entry", ledger, str(error)))
    seen = storage.stamp(tar)
    if seen is None:
        if not findings:
            text = f"no labels for the {shard.samples} samples of {shard.tar}"
            findings.append(Finding("missing", tar, text + (", though the ledger has an entry" if entry else "")))
        return _Facts(findings)
    if entry is None and not findings:
        findings.append(Finding("entry", ledger, "a label shard without a ledger entry"))

    def look(sample: LabelSample) -> None:
        if not decode or sample.failure is not None:
            return
        try:
            if not np.isfinite(decode_label(sample.members)).any():
                findings.append(Finding("undecodable", tar, f"{sample.key} has no valid pixel"))
        except DataError as error:
            findings.append(Finding("undecodable", tar, f"{sample.key}: {error}"))

    try:
        with storage.open_range(tar, 0, seen.size) as file:
            found = read_tar(file, tar, look)
    except DataError as error:
        return _Facts([*findings, Finding("damaged", tar, str(error))], bytes=seen.size)
    findings += _keys(tar, found.keys, [sample.key for sample in shard.index.samples])
    findings += _entry(tar, ledger, entry, found) if entry is not None else []
    findings += _index(tar, found)
    return _Facts(
        findings,
        samples=len(found.rows),
        bytes=found.bytes,
        failures={reason: len(keys) for reason, keys in found.failures.items()},
        quality=list(found.quality) if found.quality is not None else None,
    )


def _keys(tar: str, found: list[str], expected: list[str]) -> list[Finding]:
    if found == expected:
        return []
    counts, wanted = Counter(found), Counter(expected)
    findings = [Finding("missing_key", tar, repr(key)) for key in (wanted - counts).elements()]
    findings += [Finding("extra_key", tar, repr(key)) for key in (counts - wanted).elements()]
    if not findings:
        place = next(i for i, key in enumerate(expected) if key != found[i])
        findings.append(Finding("order", tar, f"sample {place} is {found[place]!r}, the dataset's {expected[place]!r}"))
    return findings


def _entry(tar: str, ledger: str, entry: LedgerEntry, found: Contents) -> list[Finding]:
    """What the entry states otherwise than the tar that was read."""
    if (entry.bytes, entry.sha256) != (found.bytes, found.sha256):
        text = f"{found.bytes} bytes with SHA-256 {found.sha256}, its entry says {entry.bytes} with {entry.sha256}"
        return [Finding("damaged", tar, text)]
    other = LedgerEntry.of(entry.stem, entry.plan, found, entry.seconds, entry.by).content()
    return [
        Finding("ledger", ledger, f"{name} is {_short(value)}, the shard has {_short(other[name])}")
        for name, value in entry.content().items()
        if value != other[name]
    ]


def _index(tar: str, found: Contents) -> list[Finding]:
    path = index_path(tar)
    try:
        text = storage.read_bytes(path)
    except storage.FileMissing:
        return [Finding("index", path, "missing")]
    return [] if text == found.index.text.encode() else [Finding("index", path, "does not show where the samples lie")]


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) < 80 else text[:77] + "..."
