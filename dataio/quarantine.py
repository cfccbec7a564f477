"""Samples that cannot be used: counted by reason, named once in a file, and a limit to how many may be.

One rule everywhere: a bad sample keeps its slot in the batch with zeros, region 0 and weight 0.
"""

from __future__ import annotations

import json
import posixpath
from collections import Counter
from dataclasses import asdict, dataclass

from cluster import storage
from dataio.spec import DataError

REASONS = {
    "bad_image": "the image cannot be decoded",
    "bad_metadata": "KEY.json is no JSON object, or its code is wrong",
    "bad_target": "the depth or label cannot be decoded, or is no 16-bit grey PNG",
    "duplicate": "another sample shows the same picture",
    "duplicate_key": "another sample of the shard has the same key",
    "low_quality": "the label's quality is below the role's min_quality",
    "missing_image": "the sample has no jpg, png or webp",
    "missing_target": "the sample has no depth, or its label failed",
    "no_valid_pixels": "no pixel of the crop has a depth",
    "rotated_by_exif": "EXIF turns the image, and nobody turns its depth",
    "size_mismatch": "depth and image differ in size",
    "too_large": "the image has over 100 megapixels, or one side over 10,000 times the other (seen whole: 8 times)",
    "unsafe_name": "the member's name leads out of the shard",
    "unreadable_member": "the shard is cut or damaged where the sample lies; copy it again",
}
# Passed over because the user wants it so: counted, but neither bad nor listed. Of millions of labels a filter may take
# any part, and which ones KEY.json tells at any time.
FILTERED = frozenset({"low_quality"})
# What is wrong with the depth, the photograph being as good as any.
OF_THE_TARGET = FILTERED | {
    "bad_metadata", "bad_target", "missing_target", "no_valid_pixels", "rotated_by_exif", "size_mismatch",
}  # fmt: skip
QUARANTINE_NAME = "quarantine.jsonl"  # in a dataset's folder: what its streams pass over
_MINIMUM_SEEN = 200  # a fraction of fewer samples says little; the end of a pass counts too


@dataclass(frozen=True, slots=True)
class BadSample:
    """Which sample, in which shard (path or URL), why: a key of REASONS."""

    key: str
    shard: str
    reason: str


def read_quarantine(dataset: str) -> dict[str, dict[str, str]]:
    """A dataset's own list, as `fathom data check --quarantine` writes it: shard's stem -> key -> reason.

    Lines of a run's list do as well. DataError, naming the line, for one that is none; no file is an empty list.
    """
    path = storage.join(dataset, QUARANTINE_NAME)
    found: dict[str, dict[str, str]] = {}
    if not storage.exists(path):
        return found
    for number, line in enumerate(storage.read_bytes(path).decode(errors="replace").splitlines(), start=1):
        try:
            entry = json.loads(line)
            stem = posixpath.splitext(posixpath.basename(entry["shard"]))[0]
            if entry["reason"] not in REASONS:
                raise ValueError(f"unknown reason {entry['reason']!r}")
            found.setdefault(stem, {})[str(entry["key"])] = entry["reason"]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f'{path}: line {number} ({error}): a line is {{"key": ..., "shard": ..., "reason": ...}}; mend or '
                "remove it, or run `fathom data check --quarantine` again"
            ) from error
    return found


class Quarantine:
    """The count and the list of bad samples of one process.

    `path` is the local JSON-lines file (None writes nothing); lines of an earlier attempt are kept and not repeated.
    """

    def __init__(self, path: str | None, max_fraction: float, minimum_seen: int = _MINIMUM_SEEN) -> None:
        self.path, self.max_fraction, self.minimum_seen = path, max_fraction, minimum_seen
        self.seen = 0
        self.counts: Counter[str] = Counter()
        self._last: BadSample | None = None
        self._named: set[tuple[str, str, str]] = set()
        if path is not None and storage.exists(path):
            for line in storage.read_bytes(path).decode(errors="replace").splitlines():
                try:
                    entry = json.loads(line)
                    self._named.add((entry["key"], entry["shard"], entry["reason"]))
                except (ValueError, KeyError, TypeError):
                    continue  # torn by a crash

    @property
    def bad(self) -> int:
        """How many slots were bad; a sample met in two passes counts twice, as it does in `seen`."""
        return self.counts.total() - self.filtered

    @property
    def filtered(self) -> int:
        """How many slots a filter has passed over, good or bad: no part of `bad`, nor of what it is a fraction of."""
        return sum(self.counts[reason] for reason in FILTERED)

    def record(self, seen: int, bad: list[BadSample], end_of_pass: bool = False) -> None:
        """Count `seen` more samples, `bad` among them. DataError when more than the allowed fraction is bad."""
        self.seen += seen
        for sample in bad:
            if sample.reason not in REASONS:
                raise ValueError(f"unknown reason {sample.reason!r}")
            self.counts[sample.reason] += 1
            if sample.reason in FILTERED:
                continue
            self._last = sample
            name = (sample.key, sample.shard, sample.reason)
            if name not in self._named:
                self._named.add(name)
                if self.path is not None:
                    storage.append_line(self.path, json.dumps(asdict(sample), ensure_ascii=False))
        judged = self.seen - self.filtered
        if judged and (judged >= self.minimum_seen or end_of_pass):
            self._check(judged)

    def _check(self, judged: int) -> None:
        if self.bad <= self.max_fraction * judged:
            return
        counts = [(reason, count) for reason, count in self.counts.most_common() if reason not in FILTERED]
        reasons = ", ".join(f"{count} {reason} ({REASONS[reason]})" for reason, count in counts)
        example = f", for example {self._last.key} in {self._last.shard}" if self._last else ""
        listed = f"; they are listed in {self.path}" if self.path is not None else ""
        raise DataError(
            f"{self.bad} of {judged} samples are bad: {reasons}{example}{listed}. max_bad_fraction is "
            f"{self.max_fraction}: repair the data, or raise it"
        )
