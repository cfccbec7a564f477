"""The cosine-margin loss on a CPU: NumPy on chunks of tokens, which run in threads.

What is computed is `kernels.reference`'s.

Shape suffixes: B batch, N tokens, D width.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from kernels.cpu_common import Array, as_array, in_threads, quiet
from kernels.reference import NORM_FLOOR, compute_dtype

VALUES = 2**20  # of a feature at a time, about: handing over smaller chunks costs threads more than the cache saves
CACHED_VALUES = 2**17
DENSE = 0.3  # of the tokens kept: from here on picking rows costs more than it saves


def forward(
    student_BND: Tensor, frozen_BND: Tensor, alpha: float, token_mask_BN: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(sum_B, count_B, coef_BN2) of the cosine-margin loss.

    coef is (cos / |s|^2, 1 / (|s| |f|)) of a kept token and (0, 0) of a dropped one: the gradient of 1 - cos is
    s * coef_0 - f * coef_1.
    """
    dtype = compute_dtype(student_BND, frozen_BND)
    batch, tokens = student_BND.shape[:2]
    loss_BN = np.zeros((batch, tokens), as_array(torch.empty(0, dtype=dtype), dtype).dtype)
    keep_BN = np.zeros((batch, tokens), bool)
    coef_BN2 = np.zeros((batch, tokens, 2), loss_BN.dtype)

    @quiet
    def chunk(b: int, rows: slice) -> None:
        s_ND, f_ND = as_array(student_BND[b, rows], dtype), as_array(frozen_BND[b, rows], dtype)
        dot_N, ss_N, ff_N = np.empty((3, len(s_ND)), s_ND.dtype)
        for block in _blocks(s_ND):
            for x_ND, y_ND, out_N in ((s_ND, f_ND, dot_N), (s_ND, s_ND, ss_N), (f_ND, f_ND, ff_N)):
                np.einsum("nd,nd->n", x_ND[block], y_ND[block], out=out_N[block])
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


def backward(grad_B: Tensor, student_BND: Tensor, frozen_BND: Tensor, coef_BN2: Tensor, dtype: torch.dtype) -> Tensor:
    """Gradient of sum_B to the student: [B, N, D] of `dtype`. Where most tokens are dropped they are not computed."""
    compute = coef_BN2.dtype
    coef = (coef_BN2 * grad_B.to(compute)[:, None, None]).numpy()
    kept_BN = (coef_BN2 != 0).any(-1).numpy()
    out_BND = torch.empty(student_BND.shape, dtype=dtype)

    @quiet
    def chunk(b: int, rows: slice) -> None:
        s_ND, f_ND = (as_array(x[b, rows], compute) for x in (student_BND, frozen_BND))
        kept_N, coef_N2 = kept_BN[b, rows], coef[b, rows]
        gradient_ND = out_BND[b, rows].numpy() if dtype == compute else np.empty_like(s_ND)
        for block in _blocks(s_ND):
            _gradient(gradient_ND[block], s_ND[block], f_ND[block], coef_N2[block], kept_N[block])
        if dtype != compute:
            out_BND[b, rows] = torch.from_numpy(gradient_ND)

    _in_chunks(chunk, *student_BND.shape)
    return out_BND


def _gradient(gradient_ND: Array, s_ND: Array, f_ND: Array, coef_N2: Array, kept_N: Array) -> None:
    """s * coef_0 - f * coef_1 of the kept tokens, 0 of the others, whatever they hold."""
    some = np.flatnonzero(kept_N)
    if len(some) > DENSE * len(kept_N):
        np.multiply(s_ND, coef_N2[:, :1], out=gradient_ND)
        gradient_ND -= np.multiply(f_ND, coef_N2[:, 1:], out=_scratch(f_ND))
        if len(some) < len(kept_N):
            gradient_ND[~kept_N] = 0
        return
    gradient_ND[:] = 0
    if len(some):
        kept_ND = s_ND[some] * coef_N2[some, :1]
        kept_ND -= f_ND[some] * coef_N2[some, 1:]
        gradient_ND[some] = kept_ND


def _in_chunks(work: Callable[[int, slice], None], batch: int, tokens: int, width: int) -> None:
    step = max(1, -(-tokens // max(1, round(tokens * width / VALUES))))
    pieces = [(b, slice(i, min(i + step, tokens))) for b in range(batch) for i in range(0, tokens, step)]
    in_threads(lambda i: work(*pieces[i]), len(pieces))


def _blocks(x_ND: Array) -> Iterator[slice]:
    """Tokens that fit into a processor's own cache together with others."""
    step = max(1, CACHED_VALUES // max(1, x_ND.shape[1]))
    for i in range(0, len(x_ND), step):
        yield slice(i, i + step)


_own = threading.local()


def _scratch(like_ND: Array) -> Array:
    """This thread's array, of this shape and type."""
    held: Array | None = getattr(_own, "scratch", None)
    if held is None or held.size < like_ND.size or held.dtype != like_ND.dtype:
        held = _own.scratch = np.empty(like_ND.size, like_ND.dtype)
    return held[: like_ND.size].reshape(like_ND.shape)
