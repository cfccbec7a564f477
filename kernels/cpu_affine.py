"""The affine-invariant loss on a CPU: NumPy per sample, so that a sample's arrays stay in the cache; samples run in
threads.

Selection is `np.partition`, about twelve times as fast as `torch.median` (docs/log.md), or a sort where many values are
equal, which makes partitioning slow. What is computed is `kernels.reference`'s; codes and terms are those of
`kernels.codes`.

Shape suffixes: B batch, P pixels of one sample, K pixels of one region, G regions.
"""

from __future__ import annotations

import math
import threading
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kernels.codes import CODES, SIGNS, STATES
from kernels.cpu_common import Array, as_array, in_threads, quiet
from kernels.reference import check_labels, compute_dtype, is_degenerate, trimmed_count

TIES = 0.4  # above this share of equal values np.partition takes longer than np.sort


def forward(
    pred_BP: Tensor,
    target_BP: Tensor,
    label_BP: Tensor | None,
    num_regions: int,
    trim: float,
    target_stats: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss_BG, code_BP, terms_BG4) of the affine-invariant loss; float32, or float64 if an input is.

    Raises ValueError for a label above `num_regions`.
    """
    dtype = compute_dtype(pred_BP, target_BP)
    check_labels(label_BP, num_regions)
    pred, target = as_array(pred_BP, dtype), as_array(target_BP, dtype)
    label = None if label_BP is None else label_BP.numpy()
    given = None if target_stats is None else [as_array(t, dtype) for t in target_stats]
    loss_BG = np.zeros((len(pred), num_regions), pred.dtype)
    terms_BG4 = np.zeros((len(pred), num_regions, 4), pred.dtype)
    code_BP = np.zeros(pred.shape, np.uint8)

    @quiet
    def sample(b: int) -> None:
        scratch = _Scratch.of_thread(pred)
        for g in range(num_regions):
            pixels_K = _pixels(None if label is None else label[b], g)
            x_K, y_K = scratch.take(0, pred[b], pixels_K), scratch.take(1, target[b], pixels_K)
            if x_K.size == 0:
                continue
            stats = None if given is None else (float(given[0][b, g]), float(given[1][b, g]))
            loss_BG[b, g], code_K, terms_BG4[b, g] = _region(x_K, y_K, trim, stats, scratch)
            code_K += np.uint8(1 + STATES * g)
            code_BP[b, slice(None) if pixels_K is None else pixels_K] = code_K

    in_threads(sample, len(pred))
    return torch.from_numpy(loss_BG), torch.from_numpy(code_BP), torch.from_numpy(terms_BG4)


def _region(
    x_K: Array, y_K: Array, trim: float, target_stats: tuple[float, float] | None, scratch: _Scratch
) -> tuple[float, Array, tuple[float, float, float, float]]:
    """Loss, code of each pixel (as if of the first region, less the 1), terms of a region. Overwrites x_K and y_K."""
    count = x_K.size
    median, mad = _centre(x_K, scratch)
    sides_K = _sides(x_K, scratch, 0)
    if target_stats is None:
        target_stats = _centre(y_K, scratch)
    else:
        y_K -= y_K.dtype.type(target_stats[0])
    flat, flat_target = is_degenerate(median, mad), is_degenerate(*target_stats)
    if not flat:
        x_K /= x_K.dtype.type(mad)
    if not flat_target:
        y_K /= y_K.dtype.type(target_stats[1])
    e_K, size_K, sign_K = np.subtract(x_K, y_K, out=y_K), scratch.floats[2][:count], scratch.floats[3][:count]
    np.abs(e_K, out=size_K)
    loss = float(size_K.mean())
    code_K = _sides(e_K, scratch, 1)
    if not math.isfinite(loss) or flat or flat_target:
        code_K *= np.uint8(3)
        code_K += sides_K
        return (0.0, code_K, (0.0,) * 4) if math.isfinite(loss) else (loss, code_K, (math.nan,) * 4)
    np.copyto(sign_K, code_K)
    sign_K -= 1
    share, kept = 1.0, count
    if trim > 0:
        kept = count - trimmed_count(count, trim)
        loss, share = _trim(size_K, sign_K, code_K, kept, scratch)
    else:
        code_K *= np.uint8(3)
    code_K += sides_K
    a = 1.0 / (kept * mad)
    g_t = -a * float(sign_K.sum())
    sign_K *= x_K
    g_s = -a * float(sign_K.sum())
    equal, skew = _balance(sides_K)
    return loss, code_K, (a, g_s / count, (g_t + g_s * skew / count) / equal, share)


def _trim(size_K: Array, sign_K: Array, code_K: Array, kept: int, scratch: _Scratch) -> tuple[float, float]:
    """Leave out the largest residuals, in signs and code; (the mean of the rest, the share of a tied pixel)."""
    threshold = _kth(size_K, kept - 1, scratch)
    below_K, tied_K = (flags[: size_K.size] for flags in scratch.flags)
    np.less(size_K, threshold, out=below_K)
    np.equal(size_K, threshold, out=tied_K)
    share = (kept - np.count_nonzero(below_K)) / np.count_nonzero(tied_K)
    weight_K = scratch.floats[4][: size_K.size]
    np.copyto(weight_K, below_K)
    np.copyto(weight_K, share, where=tied_K)
    size_K *= weight_K
    sign_K *= weight_K
    below_K |= tied_K
    np.copyto(code_K, 1, where=np.logical_not(below_K, out=below_K))
    code_K *= np.uint8(3)
    np.add(code_K, np.uint8(SIGNS), out=code_K, where=tied_K)
    return float(size_K.sum()) / kept, share


def _centre(x_K: Array, scratch: _Scratch) -> tuple[float, float]:
    """(median, mean absolute deviation); x loses its median, in place."""
    median = _kth(x_K, (x_K.size - 1) // 2, scratch)
    x_K -= x_K.dtype.type(median)
    return median, float(np.abs(x_K, out=scratch.floats[2][: x_K.size]).mean())


def _sides(x_K: Array, scratch: _Scratch, place: int) -> Array:
    """sgn x + 1 as bytes; of NaN 0."""
    above_K, not_below_K = (flags[: x_K.size] for flags in scratch.flags)
    np.greater(x_K, 0, out=above_K)
    np.greater_equal(x_K, 0, out=not_below_K)
    return np.add(above_K.view(np.uint8), not_below_K.view(np.uint8), out=scratch.codes[place][: x_K.size])


def _balance(sides_K: Array) -> tuple[int, int]:
    """(pixels at the median, pixels below less pixels above)."""
    lower, equal = int(np.count_nonzero(sides_K == 0)), int(np.count_nonzero(sides_K == 1))
    return equal, 2 * lower + equal - sides_K.size


def _kth(x_K: Array, k: int, scratch: _Scratch) -> float:
    """The k-th smallest, from 0; NaN if one is."""
    least = x_K.min()
    if math.isnan(least):
        return math.nan
    work_K = scratch.floats[4][: x_K.size]
    np.copyto(work_K, x_K)
    if is_crowded(x_K, least):
        work_K.sort()
    else:
        work_K.partition(k)
    return float(work_K[k]) + 0.0  # -0 and +0 are one value


def is_crowded(x_K: Array, least: float) -> bool:
    """Whether a good part of the pixels share one value, the middle one or the least: then a sort is faster."""
    probe = np.sort(x_K[:: max(1, x_K.size // 512)])
    middle = np.count_nonzero(probe == probe[probe.size // 2])
    return bool(middle > TIES * probe.size or np.count_nonzero(x_K == least) > TIES * x_K.size)


class _Scratch:
    """One thread's arrays for one sample. Allocated anew every time, their page faults take twice the arithmetic."""

    _own = threading.local()

    def __init__(self, pixels: int, dtype: np.dtype[Any]) -> None:
        self.floats = np.empty((5, pixels), dtype)
        self.codes = np.empty((2, pixels), np.uint8)
        self.flags = np.empty((2, pixels), bool)

    @classmethod
    def of_thread(cls, maps_BP: Array) -> _Scratch:
        """This thread's, large enough for a row of these maps."""
        own: _Scratch | None = getattr(cls._own, "scratch", None)
        if own is None or own.floats.shape[1] < maps_BP.shape[1] or own.floats.dtype != maps_BP.dtype:
            own = cls._own.scratch = cls(maps_BP.shape[1], maps_BP.dtype)
        return own

    def take(self, place: int, x_P: Array, pixels_K: Array | None) -> Array:
        """A copy of some pixels, or of all."""
        if pixels_K is None:
            copy_P = self.floats[place][: x_P.size]
            np.copyto(copy_P, x_P)
            return copy_P
        return x_P.take(pixels_K, out=self.floats[place][: pixels_K.size], mode="clip")


def backward(grad_BG: Tensor, code_BP: Tensor, terms_BG4: Tensor, dtype: torch.dtype) -> Tensor:
    """Gradient of the loss to the prediction, looked up by code: [B, P] of `dtype`."""
    batch, regions = terms_BG4.shape[:2]
    a_BG, s_BG, t_BG, share_BG = terms_BG4.unbind(-1)
    grad_BG = grad_BG.to(terms_BG4.dtype)
    weights = torch.stack([torch.ones_like(share_BG), share_BG], -1)  # not tied, tied
    signs = torch.tensor([-1.0, 0.0, 1.0], dtype=terms_BG4.dtype)
    by_e = a_BG[..., None, None] * weights[..., None] * signs  # [B, G, tied, sgn e]
    by_side = torch.stack([-s_BG, t_BG, s_BG], -1)  # [B, G, sgn(x - t)]
    states = (by_e[..., None] + by_side[:, :, None, None, :]) * grad_BG[..., None, None, None]
    table_BC = torch.zeros(batch, CODES, dtype=terms_BG4.dtype)
    table_BC[:, 1 : 1 + STATES * regions] = states.reshape(batch, STATES * regions)
    out = np.empty(tuple(code_BP.shape), table_BC.numpy().dtype)
    code, table = code_BP.numpy(), table_BC.numpy()
    in_threads(lambda b: table[b].take(code[b], out=out[b], mode="clip"), batch)
    return torch.from_numpy(out).to(dtype)


def median_mad(x_BP: Tensor, label_BP: Tensor | None, num_regions: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(median_BG, mad_BG, code_BP, shares_BG3), shares = (1 / n_eq, 1 / n, (n_lt - n_gt) / (n * n_eq)); sgn e is 0.

    Raises ValueError for a label above `num_regions`.
    """
    check_labels(label_BP, num_regions)
    x = as_array(x_BP, compute_dtype(x_BP))
    label = None if label_BP is None else label_BP.numpy()
    stats_BG5 = np.zeros((len(x), num_regions, 5), x.dtype)
    code_BP = np.zeros(x.shape, np.uint8)

    @quiet
    def sample(b: int) -> None:
        scratch = _Scratch.of_thread(x)
        for g in range(num_regions):
            pixels_K = _pixels(None if label is None else label[b], g)
            x_K = scratch.take(0, x[b], pixels_K)
            if x_K.size == 0:
                continue
            median, mad = _centre(x_K, scratch)
            sides_K = _sides(x_K, scratch, 0)
            equal, skew = _balance(sides_K)
            shares = (math.nan,) * 3
            if not math.isnan(mad):
                shares = (1 / equal, 1 / x_K.size, skew / (x_K.size * equal))
            stats_BG5[b, g] = (median, mad, *shares)
            code_BP[b, slice(None) if pixels_K is None else pixels_K] = sides_K + np.uint8(4 + STATES * g)

    in_threads(sample, len(x))
    stats = torch.from_numpy(stats_BG5)
    return stats[..., 0], stats[..., 1], torch.from_numpy(code_BP), stats[..., 2:]


def _pixels(label_P: Array | None, g: int) -> Array | None:
    """Indices of the pixels of region g (from 0); None for all."""
    if label_P is None:  # without labels every pixel is in the first region
        return None if g == 0 else np.zeros(0, np.intp)
    return np.flatnonzero(label_P == g + 1)  # four times as fast as indexing by a mask
