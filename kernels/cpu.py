"""The loss operators on a CPU: NumPy per sample, so that a sample's arrays stay in the cache; samples run in threads.

Selection is `np.partition`, about twelve times as fast as `torch.median` (docs/log.md), or a sort where many values are
equal, which makes partitioning slow. What they compute is `kernels.reference`'s; codes and terms are those of
`kernels.codes`.

Shape suffixes: B batch, P pixels of one sample, K pixels of one region, G regions, N tokens, D width.
"""

from __future__ import annotations

import math
import os
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kernels.codes import CODES, SIGNS, STATES
from kernels.reference import NORM_FLOOR, is_degenerate, trimmed_count

Array = np.ndarray[Any, Any]

TIES = 0.4  # above this share of equal values np.partition takes longer than np.sort
VALUES = 2**20  # of a feature at a time, about: handing over smaller chunks costs threads more than the cache saves


def affine_forward(
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
    dtype = torch.promote_types(torch.promote_types(pred_BP.dtype, target_BP.dtype), torch.float32)
    _check_labels(label_BP, num_regions)
    pred, target = _array(pred_BP, dtype), _array(target_BP, dtype)
    label = None if label_BP is None else label_BP.numpy()
    given = None if target_stats is None else [_array(t, dtype) for t in target_stats]
    loss_BG = np.zeros((len(pred), num_regions), pred.dtype)
    terms_BG4 = np.zeros((len(pred), num_regions, 4), pred.dtype)
    code_BP = np.zeros(pred.shape, np.uint8)

    @_quiet
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

    _in_threads(sample, len(pred))
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
    # A probe is enough: what makes partitioning slow is a value that a good part of the pixels share.
    probe = np.sort(x_K[:: max(1, x_K.size // 512)])
    crowded = np.count_nonzero(probe == probe[probe.size // 2]) > TIES * probe.size
    work_K = scratch.floats[4][: x_K.size]
    np.copyto(work_K, x_K)
    if crowded or np.count_nonzero(x_K == least) > TIES * x_K.size:
        work_K.sort()
    else:
        work_K.partition(k)
    return float(work_K[k]) + 0.0  # -0 and +0 are one value


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


def affine_backward(grad_BG: Tensor, code_BP: Tensor, terms_BG4: Tensor, dtype: torch.dtype) -> Tensor:
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
    _in_threads(lambda b: table[b].take(code[b], out=out[b], mode="clip"), batch)
    return torch.from_numpy(out).to(dtype)


def stats_forward(x_BP: Tensor, label_BP: Tensor | None, num_regions: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(median_BG, mad_BG, code_BP, shares_BG3), shares = (1 / n_eq, 1 / n, (n_lt - n_gt) / (n * n_eq)); sgn e is 0.

    Raises ValueError for a label above `num_regions`.
    """
    _check_labels(label_BP, num_regions)
    x = _array(x_BP, torch.promote_types(x_BP.dtype, torch.float32))
    label = None if label_BP is None else label_BP.numpy()
    stats_BG5 = np.zeros((len(x), num_regions, 5), x.dtype)
    code_BP = np.zeros(x.shape, np.uint8)

    @_quiet
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

    _in_threads(sample, len(x))
    stats = torch.from_numpy(stats_BG5)
    return stats[..., 0], stats[..., 1], torch.from_numpy(code_BP), stats[..., 2:]


def cosine_forward(
    student_BND: Tensor, frozen_BND: Tensor, alpha: float, token_mask_BN: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(sum_B, count_B, coef_BN2) of the cosine-margin loss.

    coef is (cos / |s|^2, 1 / (|s| |f|)) of a kept token and (0, 0) of a dropped one: the gradient of 1 - cos is
    s * coef_0 - f * coef_1.
    """
    dtype = torch.promote_types(torch.promote_types(student_BND.dtype, frozen_BND.dtype), torch.float32)
    batch, tokens = student_BND.shape[:2]
    loss_BN = np.zeros((batch, tokens), _array(torch.empty(0, dtype=dtype), dtype).dtype)
    keep_BN = np.zeros((batch, tokens), bool)
    coef_BN2 = np.zeros((batch, tokens, 2), loss_BN.dtype)

    @_quiet
    def chunk(b: int, rows: slice) -> None:
        s_ND, f_ND = _array(student_BND[b, rows], dtype), _array(frozen_BND[b, rows], dtype)
        dot_N, ss_N, ff_N = (_dot(*pair) for pair in ((s_ND, f_ND), (s_ND, s_ND), (f_ND, f_ND)))
        student_N, frozen_N = np.sqrt(ss_N), np.sqrt(ff_N)
        usable_N = ~((student_N < NORM_FLOOR) | (frozen_N < NORM_FLOOR))
        if token_mask_BN is not None:
            usable_N &= token_mask_BN[b, rows].numpy()
        inverse_N = 1 / (student_N * frozen_N)
        raw_N = dot_N * inverse_N
        cos_N = np.minimum(raw_N, 1)
        keep_N = usable_N & ~(cos_N > alpha)
        keep_BN[b, rows] = keep_N
        loss_BN[b, rows][keep_N] = (1 - cos_N)[keep_N]
        sloped_N = keep_N & ~(raw_N > 1)  # the clamp has no slope above 1
        coef_BN2[b, rows, 0][sloped_N] = (cos_N / ss_N)[sloped_N]
        coef_BN2[b, rows, 1][sloped_N] = inverse_N[sloped_N]

    _in_chunks(chunk, *student_BND.shape)
    sum_B, count_B = loss_BN.sum(1), keep_BN.sum(1).astype(loss_BN.dtype)
    return torch.from_numpy(sum_B), torch.from_numpy(count_B), torch.from_numpy(coef_BN2)


def cosine_backward(
    grad_B: Tensor, student_BND: Tensor, frozen_BND: Tensor, coef_BN2: Tensor, dtype: torch.dtype
) -> Tensor:
    """Gradient of sum_B to the student: [B, N, D] of `dtype`; dropped tokens are not computed."""
    compute = coef_BN2.dtype
    coef = (coef_BN2 * grad_B.to(compute)[:, None, None]).numpy()
    kept_BN = (coef_BN2 != 0).any(-1).numpy()
    out_BND = torch.empty(student_BND.shape, dtype=dtype)

    @_quiet
    def chunk(b: int, rows: slice) -> None:
        kept_N, coef_N2 = kept_BN[b, rows], coef[b, rows]
        some = kept_N.nonzero()[0]
        if 2 * len(some) > len(kept_N):  # picking rows would cost more than it saves
            s_ND, f_ND = (_array(x[b, rows], compute) for x in (student_BND, frozen_BND))
            gradient_ND = out_BND[b, rows].numpy() if dtype == compute else np.empty_like(s_ND)
            np.multiply(s_ND, coef_N2[:, :1], out=gradient_ND)
            gradient_ND -= f_ND * coef_N2[:, 1:]
            gradient_ND[~kept_N] = 0
            if dtype != compute:
                out_BND[b, rows] = torch.from_numpy(gradient_ND)
            return
        out_BND[b, rows] = 0
        if len(some):
            picked = torch.from_numpy(some)
            s_ND, f_ND = (_array(x[b, rows][picked], compute) for x in (student_BND, frozen_BND))
            s_ND *= coef_N2[some, :1]
            s_ND -= f_ND * coef_N2[some, 1:]
            out_BND[b, rows][picked] = torch.from_numpy(s_ND).to(dtype)

    _in_chunks(chunk, *student_BND.shape)
    return out_BND


def _dot(x_ND: Array, y_ND: Array) -> Array:
    return np.einsum("nd,nd->n", x_ND, y_ND)


# --- arrays and threads -------------------------------------------------------------------------------------------


def _array(x: Tensor, dtype: torch.dtype) -> Array:
    array: Array = x.detach().to(dtype).contiguous().numpy()
    return array


def _pixels(label_P: Array | None, g: int) -> Array | None:
    """Indices of the pixels of region g (from 0); None for all."""
    if label_P is None:  # without labels every pixel is in the first region
        return None if g == 0 else np.zeros(0, np.intp)
    return np.flatnonzero(label_P == g + 1)  # four times as fast as indexing by a mask


def _check_labels(label_BP: Tensor | None, num_regions: int) -> None:
    if label_BP is not None and label_BP.numel() and int(label_BP.max()) > num_regions:
        raise ValueError(f"region_BHW holds label {int(label_BP.max())}, but num_regions is {num_regions}")


# NaN, infinities and masked tokens are part of the job. As a decorator, because the setting is each thread's own.
_quiet = np.errstate(invalid="ignore", divide="ignore", over="ignore")


class _Pool:
    """Threads that stay, and with them their scratch arrays."""

    _lock = threading.Lock()
    _threads: ThreadPoolExecutor | None = None
    _size = 0

    @classmethod
    def of(cls, size: int) -> ThreadPoolExecutor:
        """At least so many threads."""
        with cls._lock:
            if cls._threads is None or cls._size < size:
                cls._threads, cls._size = ThreadPoolExecutor(size, thread_name_prefix="fathom-kernels"), size
            return cls._threads

    @classmethod
    def forget(cls) -> None:
        """After a fork: the threads stayed with the parent."""
        cls._lock, cls._threads, cls._size = threading.Lock(), None, 0


os.register_at_fork(after_in_child=_Pool.forget)


def _in_threads(work: Callable[[int], None], count: int) -> None:
    """work(0 .. count - 1) on torch's number of threads, this one among them. NumPy's loops let the others run."""
    workers = min(torch.get_num_threads(), count)
    todo = deque(range(count))

    def work_off() -> None:
        while True:
            try:
                i = todo.popleft()
            except IndexError:
                return
            work(i)

    helpers = [_Pool.of(workers - 1).submit(work_off) for _ in range(workers - 1)]
    try:
        work_off()
    finally:
        wait(helpers)
    for helper in helpers:
        helper.result()


def _in_chunks(work: Callable[[int, slice], None], batch: int, tokens: int, width: int) -> None:
    step = max(1, -(-tokens // max(1, round(tokens * width / VALUES))))
    pieces = [(b, slice(i, min(i + step, tokens))) for b in range(batch) for i in range(0, tokens, step)]
    _in_threads(lambda i: work(*pieces[i]), len(pieces))
