"""The ledger of a label sidecar: what an entry states, and what the entries sum up to."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from dataio.dataset import check_keys
from dataio.label_tar import QUALITY_BINS, Contents
from dataio.spec import DataError


class ForeignEntry(DataError):
    """A ledger entry of another shard, or of other labels: a file that somebody has copied."""


@dataclass(frozen=True, kw_only=True)
class LedgerEntry:
    """One committed label shard; `bytes` and `sha256` are of its tar, `failures` maps a reason to keys.

    `plan` is the digest that names the labels' folder: a shard that was copied there from another is none of it.

    `quality` counts samples in 20 equal bins over [0, 1], None when no sample has a quality. `seconds` is how long the
    work took, None when nobody knows: its writer died. `by` says who, freely; `tag` is the writer's own, as in the
    names of its temporary files, and `fathom label status` understands `node` (text) and `finished` (seconds since
    1970). Two runs over the same input may differ in `seconds` and `by` alone.
    """

    stem: str
    plan: str
    samples: int
    failures: dict[str, list[str]]
    sha256: str
    bytes: int
    quality: list[int] | None
    seconds: float | None
    by: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls, stem: str, plan: str, found: Contents, seconds: float | None, by: Mapping[str, Any]
    ) -> LedgerEntry:
        """What a tar's entry must be. ValueError when `by` is no JSON."""
        return cls(
            stem=stem,
            plan=plan,
            samples=len(found.rows),
            failures=found.failures,
            sha256=found.sha256,
            bytes=found.bytes,
            quality=list(found.quality) if found.quality is not None else None,
            seconds=None if seconds is None else round(seconds, 3),
            by=json.loads(json.dumps(dict(by), allow_nan=False)),
        )

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self), ensure_ascii=False, allow_nan=False) + "\n"

    @property
    def failed(self) -> int:
        """The number of samples without a label."""
        return sum(len(keys) for keys in self.failures.values())

    def content(self) -> dict[str, Any]:
        """All that any two runs over the same input agree in."""
        return {name: value for name, value in asdict(self).items() if name not in ("seconds", "by")}


@dataclass(frozen=True, kw_only=True)
class LabelStatus:
    """What is committed: `failures` counts by reason, `quality` by bins as in `LedgerEntry`.

    `seconds` is the work of all shards together whose time is known, `timed_samples` what they hold. `missing` are the
    stems that the dataset has and the labels have not: empty when no dataset was given.
    """

    shards: int
    samples: int
    bytes: int
    seconds: float
    timed_samples: int
    failures: dict[str, int] = field(default_factory=dict)
    quality: list[int] | None = None
    missing: tuple[str, ...] = ()


def parse_entry(path: str, data: bytes, stem: str, plan: str) -> LedgerEntry:
    """The entry in a ledger file. DataError when it is damaged, ForeignEntry when it is not that of shard `stem` in the
    labels `plan`."""
    try:
        content = json.loads(data)
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON ({error}): {_REMEDY}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: holds {type(content).__name__}, a JSON object is needed: {_REMEDY}")
    if content.keys() != _NAMES.keys():
        check_keys(path, "", content, _NAMES)
    for name, good in _GOOD.items():
        if not good(content[name]):
            raise DataError(f"{path}: {name} is {_short(content[name])}: {_REMEDY}")
    for name, expected in (("stem", stem), ("plan", plan)):
        if content[name] != expected:
            raise ForeignEntry(
                f"{path}: {name} is {_short(content[name])}, {expected!r} is needed: it was copied there; delete it "
                "and its shard, and `fathom label run` makes them again"
            )
    return LedgerEntry(**content)


def sum_up(entries: Iterable[LedgerEntry], missing: Iterable[str] = ()) -> LabelStatus:
    """Entries of one ledger."""
    entries = list(entries)
    failures: dict[str, int] = {}
    for entry in entries:
        for reason, keys in entry.failures.items():
            failures[reason] = failures.get(reason, 0) + len(keys)
    rated = [entry.quality for entry in entries if entry.quality is not None]
    return LabelStatus(
        shards=len(entries),
        samples=sum(entry.samples for entry in entries),
        bytes=sum(entry.bytes for entry in entries),
        seconds=sum(entry.seconds or 0.0 for entry in entries),
        timed_samples=sum(entry.samples for entry in entries if entry.seconds is not None),
        failures=failures,
        quality=[sum(counts) for counts in zip(*rated, strict=True)] if rated else None,
        missing=tuple(missing),
    )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _are_bins(value: object) -> bool:
    if not isinstance(value, list) or len(value) != QUALITY_BINS or {type(each) for each in value} != {int}:
        return False
    return min(value) >= 0


def _are_failures(value: object) -> bool:
    return isinstance(value, dict) and all(
        isinstance(keys, list) and keys and all(isinstance(key, str) for key in keys) for keys in value.values()
    )


_NAMES = dict.fromkeys(each.name for each in fields(LedgerEntry))
_SHA256 = re.compile("[0-9a-f]{64}")
_REMEDY = "it is damaged; delete it, and `fathom label run` makes it again from its shard"
_GOOD = {
    "stem": lambda value: isinstance(value, str),
    "plan": lambda value: isinstance(value, str),
    "samples": _is_count,
    "failures": _are_failures,
    "sha256": lambda value: isinstance(value, str) and _SHA256.fullmatch(value) is not None,
    "bytes": _is_count,
    "quality": lambda value: value is None or _are_bins(value),
    "seconds": lambda value: value is None or (_is_number(value) and value >= 0),
    "by": lambda value: isinstance(value, dict),
}


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) < 60 else text[:57] + "..."
