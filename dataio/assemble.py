"""Samples -> one rank's `Batch`: header checks, decoding, targets, CutMix, and the accounting of what was bad.

Shape suffixes: B batch, C channel, H W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from dataio import header
from dataio.compose import Paste, TargetRule, cutmix, target_values
from dataio.dali_batch import DaliBatch, Decoded, Row
from dataio.draws import Geometry, Photometric, cutmix_box, cutmix_partner
from dataio.plan import Slot
from dataio.quarantine import BadSample, Quarantine
from dataio.spec import DataError, DataSpec
from dataio.stream import Pick, RoleStream
from dataio.types import Batch, Sample, Target


@dataclass(frozen=True, slots=True)
class _Row:
    """One row on its way: `reason` says why it is bad; an absent slot has neither sample nor reason."""

    pick: Pick
    stream: RoleStream
    decode: Row | None = None
    reason: str | None = None

    @property
    def alive(self) -> bool:
        return self.decode is not None and self.reason is None


@dataclass(frozen=True, slots=True)
class Prepared:
    """A batch read and drawn but not decoded; `cursor` is where the next one begins."""

    rows: Sequence[_Row]
    cursor: Mapping[str, int]


class BatchBuilder:
    """Makes batches in three steps, `read`, `start` and `finish`; several may be under way.

    It keeps open readers and pipelines, but no state of the order. DataError for a dataset that has no metres where a
    role needs them.
    """

    def __init__(
        self,
        streams: Sequence[RoleStream],
        data: DataSpec,
        *,
        views: Sequence[str],
        seed: int,
        device: torch.device,
        quarantine: Quarantine,
    ) -> None:
        self._streams, self._size, self._seed, self._device = streams, data.input_size, seed, device
        self._names, self._quarantine = tuple(views), quarantine
        for stream in streams:
            _check_metres(stream)
        self._quantities = sorted({stream.needs.target for stream in streams if stream.needs.target != "none"})
        perturbations = [stream.spec.perturbation for stream in streams]
        self._perturbs = any(p.jitter_p > 0 or p.grayscale_p > 0 or p.blur_p > 0 for p in perturbations)
        # without colour or blur the views are the same pixels: decode and normalise them once
        self._dali = DaliBatch(
            sum(stream.rows for stream in streams),
            data.input_size,
            views=self._names if self._perturbs else ("clean",),
            targets=bool(self._quantities),
            device=device,
            threads=data.threads,
            pinned=data.pin_memory,
        )

    def read(self, cursor: Mapping[str, int]) -> Prepared:
        """The samples behind `cursor`, with their draws. DataError when a shard is missing."""
        rows = [self._look(stream, pick) for stream in self._streams for pick in stream.read(cursor[stream.role])]
        return Prepared(rows, {stream.role: stream.plan.advance(cursor[stream.role]) for stream in self._streams})

    def start(self, prepared: Prepared) -> None:
        """Begin to decode, on DALI's threads."""
        self._dali.start([row.decode if row.alive else None for row in prepared.rows])

    def finish(self, prepared: Prepared) -> Batch:
        """The batch that was started first. DataError when too many samples are bad."""
        decoded = self._dali.finish()
        rows = [replace(row, reason=row.reason or decoded.bad.get(i)) for i, row in enumerate(prepared.rows)]
        rows = _without_valid_pixels(rows, decoded)
        after = prepared.cursor
        self._account(rows, any(stream.plan.ends_pass(after[stream.role]) for stream in self._streams))
        return self._compose(rows, decoded, after)

    def close(self) -> None:
        """Let go of pipelines and threads, which hold much memory."""
        self._dali.close()

    def _look(self, stream: RoleStream, pick: Pick) -> _Row:
        sample, slot = pick.sample, pick.slot
        if sample is None or slot is None:
            return _Row(pick, stream)
        if sample.problem is not None:
            return _Row(pick, stream, reason=sample.problem)
        found = header.look(sample, sidecar=stream.needs.sidecar)
        if isinstance(found, str):
            return _Row(pick, stream, reason=found)
        identity, perturbation = self._identity(slot, sample), stream.spec.perturbation
        decode = Row(
            image=sample.image,
            target=sample.target,
            sky=sample.sky,
            geometry=Geometry.draw(perturbation, self._size, found.height, found.width, identity),
            photometric=Photometric.draw(perturbation, identity),
        )
        return _Row(pick, stream, decode)

    def _identity(self, slot: Slot, sample: Sample) -> tuple[int | str, ...]:
        return (self._seed, slot.epoch, sample.key)

    def _account(self, rows: Sequence[_Row], end_of_pass: bool) -> None:
        bad = [
            BadSample(row.pick.sample.key, row.stream.shard(row.pick.slot), row.reason)
            for row in rows
            if row.reason is not None and row.pick.sample is not None and row.pick.slot is not None
        ]
        self._quarantine.record(sum(row.pick.sample is not None for row in rows), bad, end_of_pass)

    def _compose(self, rows: Sequence[_Row], decoded: Decoded, after: Mapping[str, int]) -> Batch:
        dead = [i for i, row in enumerate(rows) if not row.alive]
        views = {name: _blanked(view, dead) for name, view in decoded.views.items()}
        value_BHW, region_BHW = self._regions(rows, decoded, dead)
        cutmix(self._pastes(rows), views.values(), value_BHW, region_BHW)
        if not self._perturbs:
            views = dict.fromkeys(self._names, views["clean"])
        return Batch(
            views=views,
            targets={} if value_BHW is None else {q: Target(value_BHW=value_BHW, quantity=q) for q in self._quantities},
            region_BHW=region_BHW,
            # the host has seen the codes, not every rule that makes a pixel invalid: ask the device too
            weight_B=region_BHW.flatten(1).any(1).to(torch.float32),
            roles=tuple((stream.role, stream.rows) for stream in self._streams),
            keys=tuple(row.pick.sample.key if row.pick.sample else "" for row in rows),
            cursor=after,
        )

    def _regions(self, rows: Sequence[_Row], decoded: Decoded, dead: Sequence[int]) -> tuple[Tensor | None, Tensor]:
        if decoded.code_BHW is None:
            shape = (len(rows), self._size, self._size)
            return None, _blanked(torch.ones(shape, dtype=torch.uint8, device=self._device), dead)
        sky_BHW = None if decoded.sky_BHW is None else decoded.sky_BHW.to(self._device, non_blocking=True)
        code_BHW = decoded.code_BHW.to(self._device, non_blocking=True)
        value_BHW, valid_BHW = target_values(code_BHW, sky_BHW, [_rule(row) for row in rows])
        region_BHW = valid_BHW.view(torch.uint8)
        for i, row in enumerate(rows):
            if row.stream.needs.target == "none":
                region_BHW[i].fill_(1)
        return _blanked(value_BHW, dead), _blanked(region_BHW, dead)

    def _pastes(self, rows: Sequence[_Row]) -> list[Paste]:
        pastes = []
        for i, row in enumerate(rows):
            slot, sample, perturbation = row.pick.slot, row.pick.sample, row.stream.spec.perturbation
            if slot is None or sample is None or not row.alive or perturbation.cutmix_p <= 0:
                continue
            box = cutmix_box(perturbation, self._size, self._identity(slot, sample))
            if box is None:
                continue
            where = (self._seed, row.stream.role, slot.epoch, slot.position)
            source = i - row.pick.own + cutmix_partner(row.pick.own, row.pick.share, *where)
            if rows[source].alive:
                pastes.append(Paste(row=i, source=source, box=box))
        return pastes


def _check_metres(stream: RoleStream) -> None:
    for dataset in stream.datasets if stream.needs.target == "depth_m" else ():
        if dataset.info.quantity != "depth_m":
            raise DataError(
                f"role {stream.role!r}: {dataset.path} holds {dataset.info.quantity or 'no depth'} and the task needs "
                "metres: name a dataset whose dataset.json says quantity depth_m"
            )


def _rule(row: _Row) -> TargetRule:
    sample, needs = row.pick.sample, row.stream.needs
    if not row.alive or sample is None or sample.code is None or sample.quantity is None or needs.target == "none":
        return TargetRule()
    stretched = needs.target == "disparity" and not needs.sidecar
    return TargetRule(code=sample.code, quantity=sample.quantity, wanted=needs.target, min_max=stretched)


def _without_valid_pixels(rows: Sequence[_Row], decoded: Decoded) -> list[_Row]:
    """Mark rows whose crop holds no measurement; the codes are in main memory, so no device has to answer."""
    if decoded.code_BHW is None:
        return list(rows)
    most_B = decoded.code_BHW.numpy().max(axis=(1, 2))
    some_B = np.array([_measures(row, int(most)) for row, most in zip(rows, most_B, strict=True)])
    if decoded.sky_BHW is not None:
        knows_sky_B = np.array([row.stream.needs.target == "disparity" for row in rows])
        some_B |= np.any(decoded.sky_BHW.numpy() > 127, axis=(1, 2)) & knows_sky_B
    return [
        replace(row, reason="no_valid_pixels")
        if row.alive and row.stream.needs.target != "none" and not some_B[i]
        else row
        for i, row in enumerate(rows)
    ]


def _measures(row: _Row, most: int) -> bool:
    """Whether the row's greatest code is a measurement: where it is none, no other is, as scales are above 0."""
    rule = _rule(row)
    any_sign = "depth_m" not in (rule.quantity, rule.wanted)
    return most > 0 and (any_sign or rule.code.scale * (most - rule.code.zero) + rule.code.shift > 0)


def _blanked(view: Tensor, rows: Sequence[int]) -> Tensor:
    for row in rows:
        view[row].zero_()
    return view
