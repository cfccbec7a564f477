"""Codes -> disparity or metres, and regions, and CutMix, on whole batches in torch; no step waits for the device.

Shape suffixes: B batch, C channel, H W pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor

from dataio.draws import Box
from dataio.types import AffineCode, Quantity

_SKY_FROM = 128  # of 255


@dataclass(frozen=True, kw_only=True, slots=True)
class TargetRule:
    """How one row's codes become the quantity `wanted`.

    `min_max`: disparity is stretched to 0..1 over the crop's valid pixels (arXiv 2401.10891, section 3.1).
    """

    code: AffineCode = field(default_factory=lambda: AffineCode(scale=1.0))
    quantity: Quantity = "disparity"  # of the codes
    wanted: Quantity = "disparity"
    min_max: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Paste:
    """CutMix of one row: the `box` shows another row of the same batch, `source`."""

    row: int
    source: int
    box: Box


def target_values(code_BHW: Tensor, sky_BHW: Tensor | None, rules: Sequence[TargetRule]) -> tuple[Tensor, Tensor]:
    """Values float32 [B, H, W] (0 where invalid) and valid bool [B, H, W] of uint16 codes, on their device.

    Invalid where the code is 0 and where a depth t or, when metres are wanted, a disparity is <= 0. Disparity wanted
    from depth is 1 / t, and the sky has disparity 0 and is valid; a flat stretched map becomes 0. Metres wanted from
    disparity, which must be 1 / m, are its inverse, and the sky has none.
    """
    value_BHW = torch.empty(code_BHW.shape, dtype=torch.float32, device=code_BHW.device)
    valid_BHW = torch.empty(code_BHW.shape, dtype=torch.bool, device=code_BHW.device)
    codes = torch.tensor([[rule.code.zero, rule.code.scale, rule.code.shift] for rule in rules], dtype=torch.float32)
    codes_3B11 = codes.to(code_BHW.device).T[:, :, None, None]
    for rows in _together(rules, code_BHW.is_cuda):
        value, valid = value_BHW[rows], valid_BHW[rows]
        zero, scale, shift = codes_3B11[:, rows]
        torch.gt(value.copy_(code_BHW[rows]), 0, out=valid)
        value.sub_(zero).mul_(scale).add_(shift)
        _finish(value, valid, None if sky_BHW is None else sky_BHW[rows] >= _SKY_FROM, rules[rows.start])
    return value_BHW, valid_BHW


def _together(rules: Sequence[TargetRule], gpu: bool) -> Iterator[slice]:
    """On a GPU neighbours with one rule, usually a role's rows; on a CPU each row alone, which its cache holds."""
    start = 0
    for _, group in groupby((rule.quantity, rule.wanted, rule.min_max) for rule in rules):
        stop = start + len(list(group))
        step = stop - start if gpu else 1
        yield from (slice(first, first + step) for first in range(start, stop, step))
        start = stop


def _finish(value_BHW: Tensor, valid_BHW: Tensor, is_sky_BHW: Tensor | None, rule: TargetRule) -> None:
    """From the quantity of the codes to the one wanted, in place."""
    if "depth_m" in (rule.quantity, rule.wanted):
        valid_BHW &= value_BHW > 0
    if rule.quantity != rule.wanted:
        value_BHW.reciprocal_()
    if rule.wanted == "depth_m":
        valid_BHW &= value_BHW.isfinite()
    if is_sky_BHW is not None and rule.wanted == "disparity":
        valid_BHW |= is_sky_BHW
        value_BHW.masked_fill_(is_sky_BHW, 0.0)
    elif is_sky_BHW is not None:
        valid_BHW &= ~is_sky_BHW
    if rule.min_max:
        low_B11 = torch.where(valid_BHW, value_BHW, torch.inf).amin((1, 2), keepdim=True)
        high_B11 = torch.where(valid_BHW, value_BHW, -torch.inf).amax((1, 2), keepdim=True)
        span_B11 = torch.where(high_B11 > low_B11, high_B11 - low_B11, 1.0)  # flat, or nothing valid
        value_BHW.sub_(low_B11).div_(span_B11)
    value_BHW.masked_fill_(~valid_BHW, 0.0)


def cutmix(pastes: Sequence[Paste], views: Iterable[Tensor], value_BHW: Tensor | None, region_BHW: Tensor) -> None:
    """Paste, in place, every `source`'s box into its `row`: views, target, and region (2 where valid, 0 where not).

    Sources are the rows before any paste. Each tensor must be given once.
    """
    images = [*views, *([] if value_BHW is None else [value_BHW])]
    boxes = [
        (paste, slice(paste.box.top, paste.box.bottom), slice(paste.box.left, paste.box.right)) for paste in pastes
    ]
    # copies first: a source may be pasted into as well
    cut = [[image[paste.source, ..., ys, xs].clone() for image in images] for paste, ys, xs in boxes]
    regions = [(region_BHW[paste.source, ys, xs] > 0) * 2 for paste, ys, xs in boxes]
    for (paste, ys, xs), pieces, region in zip(boxes, cut, regions, strict=True):
        for image, piece in zip(images, pieces, strict=True):
            image[paste.row, ..., ys, xs] = piece
        region_BHW[paste.row, ys, xs] = region
