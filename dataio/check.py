"""Read a dataset once, all of it, and say what is in it: what cannot be used and why, sizes, values, duplicates.

The judgement of a sample is the stream's own (`dataio.reader`, `dataio.header`), and every image and map is decoded.
Sky masks of unlabelled photographs count too: streams with pseudo-labels read them.

Shape suffixes: H W pixels, C channel.
"""

from __future__ import annotations

import io
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from cluster import storage
from dataio import codec
from dataio.dataset import SHARDS_NAME, SUMS_NAME, Dataset, Shard
from dataio.header import FORMATS, decodes, in_colours, is_png, look, mask_decodes
from dataio.png16 import decode_codes
from dataio.processes import in_processes
from dataio.quarantine import QUARANTINE_NAME, REASONS, BadSample
from dataio.reader import ShardSource, read_members, read_samples
from dataio.spec import DataError, RoleNeeds
from dataio.types import AffineCode, Quantity, Sample

HASH_BITS = 128
MAX_DISTANCE = 16  # beyond it most pictures are relatives of some other
_SHOWN = 3  # names, or sizes, on a line
_CHUNK = 64  # samples a process reads at a time
_CELLS = 8  # differences in a row, and in a column, of the grey thumbnails behind a hash
_THUMBNAIL = 16  # pixels of a side, in colours
_LEVELS = 4  # of 255, on average: the same picture at another size and quality differs by one or two


@dataclass(frozen=True, slots=True)
class Likeness:
    """What pictures are compared by: `difference_hash`, and 16 x 16 pixels in colours, uint8 RGB, row by row."""

    hash: int
    thumbnail: bytes

    @classmethod
    def of(cls, picture: Image.Image) -> Likeness:
        """Of a picture of any mode and size."""
        colours = in_colours(picture)
        small = colours.resize((_THUMBNAIL, _THUMBNAIL), Image.Resampling.BOX)
        return cls(difference_hash(colours), small.tobytes())

    def levels(self, other: Likeness) -> float:
        """The mean absolute difference of the thumbnails, 0 to 255."""
        own, others = (np.frombuffer(data, np.uint8).astype(np.int16) for data in (self.thumbnail, other.thumbnail))
        return float(np.abs(own - others).mean())


@dataclass(frozen=True)
class Fact:
    """What was found of one sample. `value` is (least, median, greatest) of the map, in the dataset's quantity."""

    key: str
    shard: str
    bytes: int
    reason: str | None = None
    size_hw: tuple[int, int] | None = None
    value: tuple[float, float, float] | None = None
    valid: float | None = None  # fraction of pixels with a value
    likeness: Likeness | None = None


@dataclass(frozen=True, kw_only=True)
class CheckReport:
    """What `fathom data check` prints, and writes as JSON."""

    path: str
    fingerprint: str
    samples: int
    shards: int
    bytes: int
    bad: dict[str, list[BadSample]]
    sizes: dict[str, int]  # "HxW" -> samples
    value: tuple[float, float, float] | None = None  # least, median of medians, greatest
    valid: tuple[float, float] | None = None  # least and mean fraction of valid pixels
    changed: list[str] = field(default_factory=list)  # shards whose SHA-256 is not that of SHA256SUMS
    duplicates: list[list[BadSample]] = field(default_factory=list)  # groups; the first of each is the one to keep

    def quarantine(self) -> list[BadSample]:
        """What the stream should pass over: everything bad, and of every group of duplicates all but the first."""
        bad = [sample for samples in self.bad.values() for sample in samples]
        return [*bad, *(sample for group in self.duplicates for sample in group[1:])]

    def __str__(self) -> str:
        lines = [f"{self.path}: {self.samples} samples in {self.shards} shards, {storage.human_bytes(self.bytes)}"]
        sizes = [f"{size} ({count})" for size, count in list(self.sizes.items())[:_SHOWN]]
        more = f" and {len(self.sizes) - _SHOWN} more" if len(self.sizes) > _SHOWN else ""
        if sizes:
            lines.append(f"sizes: {', '.join(sizes)}{more}")
        if self.value is not None and self.valid is not None:
            low, middle, high = self.value
            lines.append(
                f"values: {low:.6g} to {high:.6g}, median {middle:.6g}; valid pixels: {self.valid[1]:.1%} "
                f"on average, {self.valid[0]:.1%} at least"
            )
        lines += [_line(reason, REASONS[reason], samples) for reason, samples in sorted(self.bad.items())]
        repeated = [sample for group in self.duplicates for sample in group[1:]]
        if repeated:
            lines.append(_line("duplicate", REASONS["duplicate"], repeated))
        if self.changed:
            names = ", ".join(self.changed[:_SHOWN])
            lines.append(f"{len(self.changed)} shards changed since they were packed: {names}")
        good = self.samples - sum(map(len, self.bad.values()))
        return "\n".join([*lines, f"usable: {good} of {self.samples}"])

    def to_json(self) -> str:
        """All of it."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"


def check_dataset(
    path: str,
    *,
    workers: int = 1,
    distance: int | None = None,
    checksums: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> CheckReport:
    """Read every sample of a dataset (folder or URL) in `workers` processes.

    `distance` looks for duplicates: images whose 128-bit difference hashes differ in at most so many bits, and whose
    thumbnails look alike: the same picture at other sizes and qualities, with more bits also slight edits, and, rarely,
    unlike pictures.
    `checksums` reads every shard once more and compares it with SHA256SUMS.
    Raises DataError when the dataset cannot be opened at all, or has no such list.
    """
    if distance is not None and not 0 <= distance <= MAX_DISTANCE:
        raise DataError(f"distance is {distance}: it must be between 0 and {MAX_DISTANCE} bits")
    dataset = Dataset.open(path)
    if checksums and any(shard.sha256 is None for shard in dataset.shards):
        raise DataError(f"{path}: no {SUMS_NAME} that lists all shards: pack again, or do without --checksums")
    todo = [
        (number, start, min(start + _CHUNK, shard.samples))
        for number, shard in enumerate(dataset.shards)
        for start in range(0, shard.samples, _CHUNK)
    ]
    facts: list[Fact] = []
    for part in in_processes(partial(_facts, dataset, distance is not None), todo, workers, 1):
        facts += part
        if progress is not None:
            progress(len(facts), dataset.info.samples)
    changed: list[str] = []
    if checksums:
        sums = in_processes(storage.sha256_file, [shard.tar for shard in dataset.shards], workers, 1)
        for shard, found in zip(dataset.shards, sums, strict=True):
            if found != shard.sha256:
                changed.append(f"{SHARDS_NAME}/{shard.stem}.tar")
    return replace(_report(dataset, facts, distance), changed=changed)


def _line(reason: str, means: str, samples: list[BadSample]) -> str:
    names = ", ".join(sample.key for sample in samples[:_SHOWN])
    return f"{len(samples)} {reason} ({means}): {names}{', ...' if len(samples) > _SHOWN else ''}"


def write_quarantine(report: CheckReport) -> str:
    """Write the list that streams honour into the dataset's folder, in place of an earlier one; returns its path."""
    path = storage.join(report.path, QUARANTINE_NAME)
    lines = [json.dumps(asdict(sample), ensure_ascii=False) + "\n" for sample in report.quarantine()]
    storage.atomic_write(path, "".join(lines))
    return path


def difference_hash(image: Image.Image) -> int:
    """128 bits: whether each of 8 x 8 cells of the grey image is darker than its right neighbour, and than its lower.

    One direction alone is 0 for all that is uniform along it: plain colours, gradients, stripes.
    """
    grey = image.convert("L")
    across_HW = np.asarray(grey.resize((_CELLS + 1, _CELLS), Image.Resampling.BOX), np.int16)
    down_HW = np.asarray(grey.resize((_CELLS, _CELLS + 1), Image.Resampling.BOX), np.int16)
    bits = np.concatenate([(across_HW[:, :-1] < across_HW[:, 1:]).ravel(), (down_HW[:-1] < down_HW[1:]).ravel()])
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def group_duplicates(pictures: Sequence[Likeness], distance: int) -> list[list[int]]:
    """Places of pictures that are like the first of their group: groups of two or more, in order.

    Alike are those whose hashes differ in at most `distance` bits and whose thumbnails differ by a few levels. What is
    like the firsts of several groups is in the earliest. Chains of likes, whose ends may have nothing in common, do not
    count. Two hashes that differ in d bits agree in at least one of d + 1 pieces: only those are compared.
    """
    edges = [HASH_BITS * i // (distance + 1) for i in range(distance + 2)]
    pieces = list(pairwise(edges))
    firsts: list[dict[int, list[int]]] = [defaultdict(list) for _ in pieces]
    groups: dict[int, list[int]] = {}
    for i, picture in enumerate(pictures):
        values = [picture.hash >> low & (1 << high - low) - 1 for low, high in pieces]
        near = {j for known, value in zip(firsts, values, strict=True) for j in known.get(value, ())}
        first = next((j for j in sorted(near) if _alike(pictures[j], picture, distance)), i)
        groups.setdefault(first, []).append(i)
        if first == i:
            for known, value in zip(firsts, values, strict=True):
                known[value].append(i)
    return [group for group in groups.values() if len(group) > 1]


def _alike(first: Likeness, other: Likeness, distance: int) -> bool:
    return (first.hash ^ other.hash).bit_count() <= distance and first.levels(other) <= _LEVELS


def _facts(dataset: Dataset, hashed: bool, part: tuple[int, int, int]) -> list[Fact]:
    """Of the samples start .. stop - 1 of a shard."""
    number, start, stop = part
    shard, info = dataset.shards[number], dataset.info
    source = ShardSource(tar=shard.tar, quantity=info.quantity, code=info.code, shard=shard)
    needs = RoleNeeds(target="none" if info.quantity is None else "disparity")
    samples = read_samples(source, range(start, stop), needs, exact=True)
    if info.quantity is None:
        samples = _with_sky(samples, shard, start)
    sizes = [sum(size for _, size in entry.members.values()) for entry in shard.index.samples[start:stop]]
    name = f"{SHARDS_NAME}/{shard.stem}.tar"
    return [_fact(sample, name, size, info.quantity, hashed) for sample, size in zip(samples, sizes, strict=True)]


def _with_sky(samples: Sequence[Sample], shard: Shard, start: int) -> list[Sample]:
    """Unlabelled samples, the first being the shard's `start`-th, with the sky masks that reading left out."""
    entries = shard.index.samples[start : start + len(samples)]
    masked = [
        entry
        for entry, sample in zip(entries, samples, strict=True)
        if not sample.problem and any(name.lower() == "sky.png" for name in entry.members)
    ]
    found = read_members(shard.tar, masked, {"sky.png"})
    for entry in masked:
        found.setdefault(entry.key, {})
    return [
        sample
        if sample.key not in found
        else replace(sample, sky=found[sample.key]["sky.png"])
        if found[sample.key]
        else replace(sample, problem="unreadable_member")
        for sample in samples
    ]


def _fact(sample: Sample, shard: str, size: int, quantity: Quantity | None, hashed: bool) -> Fact:
    bad = partial(Fact, sample.key, shard, size)
    if sample.problem:
        return bad(sample.problem)
    header = look(sample, sidecar=False)
    if isinstance(header, str):
        return bad(header)
    size_hw = (header.height, header.width)
    likeness = _likeness(sample.image) if hashed else None
    if (likeness is None or is_png(sample.image)) and not decodes(sample.image):
        return bad("bad_image", size_hw=size_hw)
    if sample.sky is not None and not mask_decodes(sample.sky):
        return bad("bad_target", size_hw=size_hw)
    if sample.target is None:
        return Fact(sample.key, shard, size, size_hw=size_hw, likeness=likeness)
    assert quantity is not None
    try:
        value_HW = _map(sample.target, sample.code, quantity)
    except DataError:
        return bad("bad_target", size_hw=size_hw)
    if value_HW.shape != size_hw:
        return bad("size_mismatch", size_hw=size_hw)
    value, valid = _values(value_HW)
    if value is None and sample.sky is None:
        return bad("no_valid_pixels", size_hw=size_hw)
    return Fact(sample.key, shard, size, size_hw=size_hw, value=value, valid=valid, likeness=likeness)


def _likeness(image: bytes) -> Likeness | None:
    """None when Pillow cannot decode all of it."""
    try:
        with Image.open(io.BytesIO(image), formats=FORMATS) as picture:
            picture.draft("RGB", (4 * _THUMBNAIL, 4 * _THUMBNAIL))  # of a JPEG less: every byte is read still
            picture.load()
            return Likeness.of(picture)
    except Exception:  # noqa: BLE001  Pillow's plug-ins raise whatever they like on damaged files
        return None


def _map(target: bytes, code: AffineCode | None, quantity: Quantity) -> npt.NDArray[np.float32]:
    """A target as it was packed, [H, W] in `quantity`. DataError when the stream could not decode it."""
    if code is None:
        return codec.decode_npy(target, quantity)
    try:
        decode_codes(target)  # which a PNG without its end fails and Pillow passes
    except Exception as error:  # besides its own, it raises what Pillow and two libraries of zlib do
        raise DataError(f"unreadable PNG ({error})") from error
    return codec.decode_png16(target, code)


def _values(value_HW: npt.NDArray[np.float32]) -> tuple[tuple[float, float, float] | None, float]:
    valid = value_HW[np.isfinite(value_HW)]
    if not valid.size:
        return None, 0.0
    return (float(valid.min()), float(np.median(valid)), float(valid.max())), valid.size / value_HW.size


def _report(dataset: Dataset, facts: list[Fact], distance: int | None) -> CheckReport:
    bad: dict[str, list[BadSample]] = {}
    for fact in facts:
        if fact.reason:
            bad.setdefault(fact.reason, []).append(BadSample(fact.key, fact.shard, fact.reason))
    good = [fact for fact in facts if not fact.reason]
    values = [fact.value for fact in good if fact.value]
    valid = [fact.valid for fact in good if fact.valid is not None]
    sizes = Counter(f"{fact.size_hw[0]}x{fact.size_hw[1]}" for fact in good if fact.size_hw)
    facts_of: dict[str, Any] = {}
    if values:
        low, middle, high = zip(*values, strict=True)
        facts_of["value"] = (min(low), float(np.median(middle)), max(high))
    if valid:
        facts_of["valid"] = (min(valid), float(np.mean(valid)))
    return CheckReport(
        path=dataset.path,
        fingerprint=dataset.fingerprint,
        samples=len(facts),
        shards=len(dataset.shards),
        bytes=sum(fact.bytes for fact in facts),
        bad=bad,
        sizes=dict(sizes.most_common()),
        duplicates=_duplicates(good, distance) if distance is not None else [],
        **facts_of,
    )


def _duplicates(good: list[Fact], distance: int) -> list[list[BadSample]]:
    seen = [(fact, fact.likeness) for fact in good if fact.likeness is not None]
    groups = group_duplicates([likeness for _, likeness in seen], distance)
    return [[BadSample(seen[i][0].key, seen[i][0].shard, "duplicate") for i in group] for group in groups]
