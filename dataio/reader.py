"""Slots of the plan -> Samples: range reads through webdataset's tar iterators, joined by key with the label shards.

A lane reads its part of a shuffle window shard by shard, each from the first needed sample's header to the last one's
end, in one direction, and hands the samples out in the plan's order. So a resume re-reads at most a window. What is
wrong with one sample becomes `Sample.problem`; only a missing file is an error.
"""

from __future__ import annotations

import json
import tarfile
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, BinaryIO

import numpy as np
from webdataset.tariterators import base_plus_ext, group_by_keys, tar_file_expander

from cluster import storage
from dataio import codec, label_codec, label_quality
from dataio.cache import Opener
from dataio.header import EXTENSIONS
from dataio.index import SampleEntry, ShardIndex
from dataio.plan import RolePlan, Slot
from dataio.spec import DataError, RoleNeeds
from dataio.types import AffineCode, Quantity, Sample

_TARGET_EXTENSIONS = ("depth.png", "depth.npy")
_DAMAGE = (tarfile.TarError, OSError, EOFError, ValueError, zlib.error)

OpenRange = Callable[[str, int, int], BinaryIO]
Members = Mapping[str, bytes]  # extension, in lower case -> content


@dataclass(frozen=True, kw_only=True)
class ShardSource:
    """One shard of a role: its tar, its label tar (None without a sidecar), and what the dataset's codes mean."""

    tar: str
    label_tar: str | None = None
    quantity: Quantity | None = None
    code: AffineCode | None = None
    shard: Any  # has `.index`: a ShardIndex, parsed when first asked for
    sha256: str | None = None  # of the tar
    opener: Opener = field(default_factory=Opener)
    quarantined: Mapping[str, str] = field(default_factory=dict)  # key -> reason: not read
    label_index: Any = None  # a function that returns the label shard's ShardIndex
    min_quality: float | None = None  # of a label; below it a sample is passed over

    def open_tar(self, tar: str, start: int, stop: int) -> BinaryIO:
        """Bytes [start, stop) of the tar; a copy of it is checked."""
        return self.opener(tar, start, stop, self.sha256)


class LaneReader:
    """Reads one lane of a role, forward. `read` raises DataError when a shard or label shard is not there."""

    def __init__(self, plan: RolePlan, lane: int, shards: Sequence[ShardSource], needs: RoleNeeds) -> None:
        self._plan, self._shards, self._needs = plan, shards, needs
        self._stop = plan.lane_span(lane)[1]
        self._held: dict[Slot, Sample] = {}

    def read(self, slots: Sequence[Slot | None]) -> list[Sample | None]:
        """The samples of one batch's slots of this lane, in order."""
        samples: list[Sample | None] = []
        for slot in slots:
            if slot is not None and slot not in self._held:
                self._fill(slot)
            samples.append(None if slot is None else self._held.pop(slot))
        return samples

    def _fill(self, slot: Slot) -> None:
        """Read what is left of the lane's part of the slot's window."""
        window_stop = (slot.position // self._plan.window + 1) * self._plan.window
        by_shard: dict[int, list[Slot]] = {}
        for other in self._plan.order(slot.epoch, slot.position, min(window_stop, self._stop)):
            by_shard.setdefault(other.shard, []).append(other)
        self._held = {}
        for shard, slots in by_shard.items():
            slots.sort(key=lambda other: other.index)
            samples = read_samples(self._shards[shard], [other.index for other in slots], self._needs)
            self._held.update(zip(slots, samples, strict=True))


def read_samples(source: ShardSource, indices: Sequence[int], needs: RoleNeeds, *, exact: bool = False) -> list[Sample]:
    """The samples of `indices` (ascending) of one shard. DataError when the shard or its labels are missing.

    `exact` leaves a float map (`KEY.depth.npy`) as it is, in `target` with no code; else it is coded for the decoder.
    """
    index: ShardIndex = source.shard.index
    problems = {**index.bad_keys, **source.quarantined}
    every = [index.samples[i] for i in indices]
    entries = [entry for entry in every if entry.key not in problems]
    wanted = {*EXTENSIONS}
    if needs.target != "none":
        wanted |= {"sky.png"} if needs.sidecar else {"sky.png", "json", *_TARGET_EXTENSIONS}
    found = read_members(source.tar, entries, wanted, source.open_tar)
    labels: Mapping[str, Members] = {}
    if needs.target != "none" and needs.sidecar:
        if source.label_tar is None or source.label_index is None:
            raise ValueError(f"{source.tar}: a target from a sidecar is needed, and no sidecar given")
        keys = {entry.key for entry in entries}
        label_entries = [entry for entry in source.label_index().samples if entry.key in keys]
        wanted = {*label_codec.EXTENSIONS.values(), "json"}
        labels = read_members(source.label_tar, label_entries, wanted, source.opener)
    return [
        Sample(key=e.key, problem=problems[e.key])
        if e.key in problems
        else _sample(e.key, found.get(e.key), labels.get(e.key), source, needs, exact)
        for e in every
    ]


def read_members(
    tar: str, entries: Sequence[SampleEntry], extensions: Collection[str], open_range: OpenRange = storage.open_range
) -> dict[str, Members]:
    """key -> its members of these extensions, for `entries` in the tar's order; a key that cannot be read is left out.

    Raises DataError when there is no such tar.
    """
    found: dict[str, Members] = {}
    pending = list(entries)
    while pending:
        found.update(_read_range(tar, pending, extensions, open_range))
        lost = next((i for i, entry in enumerate(pending) if entry.key not in found), None)
        if lost is None:
            break
        # the damage may lie behind it, in the same block: once more on its own, then go on behind it
        if len(pending) > 1:
            found.update(_read_range(tar, pending[lost : lost + 1], extensions, open_range))
        pending = pending[lost + 1 :]
    return found


def _read_range(
    tar: str, entries: Sequence[SampleEntry], extensions: Collection[str], open_range: OpenRange
) -> dict[str, Members]:
    wanted = {entry.key: entry for entry in entries}
    found: dict[str, Members] = {}
    try:
        with open_range(tar, entries[0].start, entries[-1].end) as stream:
            for group in group_by_keys(_files(tar, stream, wanted.keys(), extensions)):
                members = {name: data for name, data in group.items() if not name.startswith("__")}
                entry = wanted[group["__key__"]]
                if all(
                    len(members.get(name.lower(), b"")) == size
                    for name, (_, size) in entry.members.items()
                    if name.lower() in extensions
                ):
                    found[entry.key] = members
    except storage.Unreachable:
        raise  # of a network that is down no sample is to blame
    except FileNotFoundError as error:
        raise DataError(f"{tar}: missing: restore it, or pack the dataset again") from error
    except _DAMAGE:
        pass
    for entry in entries:  # a sample with none of these extensions yields no group, but it was not lost
        if not any(name.lower() in extensions for name in entry.members):
            found.setdefault(entry.key, {})
    return found


def _files(tar: str, stream: BinaryIO, keys: Collection[str], extensions: Collection[str]) -> Iterator[dict[str, Any]]:
    def select(name: str) -> bool:
        key, extension = base_plus_ext(name)
        return key in keys and extension is not None and extension.lower() in extensions

    try:
        yield from tar_file_expander([{"url": tar, "stream": stream}], select_files=select)
    except (FileNotFoundError, storage.Unreachable):
        raise
    except _DAMAGE:
        return  # the iterator must end, not fail: group_by_keys still holds the last whole sample


def _sample(
    key: str, members: Members | None, label: Members | None, source: ShardSource, needs: RoleNeeds, exact: bool
) -> Sample:
    if members is None:
        return Sample(key=key, problem="unreadable_member")
    image = next((members[name] for name in EXTENSIONS if name in members), None)
    if image is None:
        return Sample(key=key, problem="missing_image")
    if needs.target == "none":
        return Sample(key=key, image=image)
    sky = members.get("sky.png")
    if needs.sidecar:
        return _pseudo_labelled(Sample(key=key, image=image, sky=sky), label or {}, source.min_quality)
    try:
        meta = _metadata(members)
        code = codec.code_of(meta, source.code)
    except DataError:
        return Sample(key=key, problem="bad_metadata")
    if "depth.png" in members and code is not None:
        target = members["depth.png"]
        return Sample(key=key, image=image, target=target, code=code, quantity=source.quantity, sky=sky, meta=meta)
    if "depth.npy" in members and source.quantity is not None:
        if exact:
            target = members["depth.npy"]
            return Sample(key=key, image=image, target=target, quantity=source.quantity, sky=sky, meta=meta)
        try:
            keeps: Quantity = "depth_m" if needs.target == source.quantity == "depth_m" else "disparity"
            target, code = _recode(members["depth.npy"], source.quantity, keeps)
        except DataError:
            return Sample(key=key, problem="bad_target")
        return Sample(key=key, image=image, target=target, code=code, quantity=keeps, sky=sky, meta=meta)
    return Sample(key=key, problem="missing_target")


def _pseudo_labelled(sample: Sample, label: Members, min_quality: float | None) -> Sample:
    """The sample with its label, or with what is wrong with that. DataError when a package is missing."""
    extension = label_codec.member_of(label)
    if extension is None or "json" not in label:
        return Sample(key=sample.key, problem="missing_target")
    label_codec.check_available(extension)  # of what is not installed no sample is to blame
    try:
        meta = _metadata(label)
        codec.label_code(meta)
        if min_quality is not None and label_quality.of(meta) < min_quality:
            return Sample(key=sample.key, problem="low_quality")
    except DataError:
        return Sample(key=sample.key, problem="bad_metadata")
    try:
        target, code = label_codec.as_png16(extension, label[extension], meta)
    except DataError:
        return Sample(key=sample.key, problem="bad_target")
    return replace(sample, target=target, code=code, quantity="disparity", meta=meta)


def _metadata(members: Members) -> dict[str, Any]:
    try:
        meta = json.loads(members.get("json", b"{}"))
    except (ValueError, RecursionError) as error:  # the second: nested thousands deep
        raise DataError(f"KEY.json: {error}") from error
    if not isinstance(meta, dict):
        raise DataError("KEY.json: not an object")
    return meta


def _recode(npy: bytes, quantity: Quantity, keeps: Quantity) -> tuple[bytes, AffineCode]:
    """A float map as a 16-bit PNG of the quantity that is learned, so that one decoder serves all.

    The error is the map's range / 131068: of disparity, or, for a task that learns metres, of metres (0.6 mm of 80 m).
    """
    value_HW = codec.decode_npy(npy, quantity).astype(np.float64)
    if quantity != keeps:
        value_HW = 1 / value_HW
    value_HW[value_HW > np.finfo(np.float32).max] = np.nan  # of a subnormal depth: no measurement
    if not np.isfinite(value_HW).any():
        low, high = 0.0, 1.0  # every code is 0: no valid pixel
    else:
        low, high = float(np.nanmin(value_HW)), float(np.nanmax(value_HW))
    code = AffineCode(scale=(high - low) / 65534 or 1.0, shift=low, zero=1)
    return codec.encode_png16(value_HW, code, level=0)[0], code
