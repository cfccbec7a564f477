"""The cosine-margin loss as Triton kernels: one pass over the features in forward, one in backward, nothing else kept
than two numbers per token.

Semantics are those of `kernels.reference.cosine_margin_loss`. float32, bfloat16 or float16 in, float32 inside. There is
no synchronisation with the host and no shape that depends on data, so the kernels can be captured in a CUDA graph;
sums are taken in a fixed order, so results are the same bits in every run.

A program handles TILE tokens, which belong to one sample, in steps of CHUNK channels. For every token forward keeps

    coef = (cos / |s|^2, 1 / (|s| |f|)),    so that    d cos / d s = coef[1] * f - coef[0] * s,

and (0, 0) for a token that has no gradient, whose features backward then does not read.

Shape suffixes: B batch, N tokens, D width, T tiles of a sample, 2 the two numbers of coef; inside a kernel K the TILE
tokens and C the CHUNK channels of a step.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import reference

# 8 tokens x 128 channels by 4 warps: each thread loads 16 bytes at once, and a token stays within one warp.
TILE, CHUNK, WARPS = 8, 128, 4
TOTAL_BLOCK = 256
_NORM_FLOOR = tl.constexpr(reference.NORM_FLOOR)


def forward(
    student_BND: Tensor, frozen_BND: Tensor, alpha: float, token_mask_BN: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Per sample the sum of 1 - cos over the kept tokens and their number, and what backward needs.

    Returns:
        (sum_B, count_B, coef_BN2), all float32.
    """
    B, N, D = student_BND.shape
    tiles = triton.cdiv(N, TILE)
    new = student_BND.new_empty
    sum_B, count_B = new(B, dtype=torch.float32), new(B, dtype=torch.float32)
    coef_BN2, partial_2BT = new(B, N, 2, dtype=torch.float32), new(2, B, tiles, dtype=torch.float32)
    if student_BND.numel() == 0:
        return sum_B.zero_(), count_B.zero_(), coef_BN2
    student_BND, frozen_BND = _with_dense_rows(student_BND), _with_dense_rows(frozen_BND)
    # The launch is on the current device, which need not be that of the tensors.
    with torch.cuda.device_of(student_BND):
        _forward_kernel[(B * tiles,)](
            student_BND,
            frozen_BND,
            None if token_mask_BN is None else token_mask_BN.contiguous().view(torch.uint8),
            coef_BN2,
            partial_2BT,
            N,
            *student_BND.stride()[:2],
            *frozen_BND.stride()[:2],
            alpha,
            D,
            TILE,
            CHUNK,
            num_warps=WARPS,
        )
        _total_kernel[(B,)](partial_2BT, sum_B, count_B, tiles, TOTAL_BLOCK, num_warps=WARPS)
    return sum_B, count_B, coef_BN2


def backward(
    grad_sum_B: Tensor, student_BND: Tensor, frozen_BND: Tensor, coef_BN2: Tensor, dtype: torch.dtype
) -> Tensor:
    """Gradient of the student, of this dtype, from the gradient of sum_B and what `forward` returned as coef_BN2."""
    B, N, D = student_BND.shape
    grad_student_BND = torch.empty(B, N, D, dtype=dtype, device=student_BND.device)
    if student_BND.numel() == 0:
        return grad_student_BND
    student_BND, frozen_BND = _with_dense_rows(student_BND), _with_dense_rows(frozen_BND)
    with torch.cuda.device_of(student_BND):
        _backward_kernel[(B * triton.cdiv(N, TILE),)](
            grad_sum_B.to(torch.float32).contiguous(),
            student_BND,
            frozen_BND,
            coef_BN2.contiguous(),
            grad_student_BND,
            N,
            *student_BND.stride()[:2],
            *frozen_BND.stride()[:2],
            D,
            TILE,
            CHUNK,
            num_warps=WARPS,
        )
    return grad_student_BND


def _with_dense_rows(x_BND: Tensor) -> Tensor:
    """x itself where the channels of a token lie side by side, as in x[:, 1:]; else a copy."""
    return x_BND if x_BND.stride(-1) == 1 else x_BND.contiguous()


@triton.jit
def _forward_kernel(
    student: tl.tensor,  # [B, N, D] by its strides
    frozen: tl.tensor,  # [B, N, D] by its strides
    token_mask: tl.tensor,  # [B, N] uint8, or None
    coef: tl.tensor,  # [B, N, 2]
    partial: tl.tensor,  # [2, B, T]
    tokens: tl.tensor,
    student_stride_b: tl.tensor,
    student_stride_n: tl.tensor,
    frozen_stride_b: tl.tensor,
    frozen_stride_n: tl.tensor,
    alpha: tl.tensor,
    D: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    tile = tl.program_id(0)
    tiles = tl.cdiv(tokens, TILE)
    b = (tile // tiles).to(tl.int64)
    n_K = (tile % tiles) * TILE + tl.arange(0, TILE)
    inside_K = n_K < tokens
    wanted_K = inside_K
    if token_mask is not None:
        wanted_K = tl.load(token_mask + b * tokens + n_K, mask=inside_K, other=0) != 0

    c_C = tl.arange(0, CHUNK)
    n_K1 = n_K[:, None].to(tl.int64)
    student_KC = student + b * student_stride_b + n_K1 * student_stride_n + c_C[None, :]
    frozen_KC = frozen + b * frozen_stride_b + n_K1 * frozen_stride_n + c_C[None, :]
    ss_KC = tl.zeros((TILE, CHUNK), tl.float32)
    ff_KC = tl.zeros((TILE, CHUNK), tl.float32)
    sf_KC = tl.zeros((TILE, CHUNK), tl.float32)
    for start in range(0, D, CHUNK):
        load_KC = wanted_K[:, None]
        if D % CHUNK != 0:
            load_KC = load_KC & (start + c_C < D)[None, :]
        s_KC = tl.load(student_KC + start, mask=load_KC, other=0.0).to(tl.float32)
        f_KC = tl.load(frozen_KC + start, mask=load_KC, other=0.0).to(tl.float32)
        ss_KC += s_KC * s_KC
        ff_KC += f_KC * f_KC
        sf_KC += s_KC * f_KC
    ss_K = tl.sum(ss_KC, 1)
    s_norm_K, f_norm_K = tl.sqrt_rn(ss_K), tl.sqrt_rn(tl.sum(ff_KC, 1))

    # Comparisons are written so that NaN is kept, as in the reference: a network that diverged must show.
    usable_K = wanted_K & ~(s_norm_K < _NORM_FLOOR) & ~(f_norm_K < _NORM_FLOOR)
    norms_K = s_norm_K * f_norm_K
    raw_cos_K = tl.div_rn(tl.sum(sf_KC, 1), norms_K)
    cos_K = tl.where(raw_cos_K > 1.0, 1.0, raw_cos_K)  # not tl.minimum, which drops NaN
    keep_K = usable_K & ~(cos_K > alpha)

    # As in the gradient of clamp(), a cosine that rounding put above 1 has none; one of exactly 1 has.
    slope_K = keep_K & ~(raw_cos_K > 1.0)
    coef_K = coef + (b * tokens + n_K) * 2
    tl.store(coef_K, tl.where(slope_K, tl.div_rn(cos_K, ss_K), 0.0), mask=inside_K)
    by_frozen_K = tl.where(cos_K == cos_K, tl.div_rn(1.0, norms_K), cos_K)  # NaN too if 1 / infinity would be 0
    tl.store(coef_K + 1, tl.where(slope_K, by_frozen_K, 0.0), mask=inside_K)
    tl.store(partial + tile, tl.sum(tl.where(keep_K, 1.0 - cos_K, 0.0), 0))
    tl.store(partial + tl.num_programs(0) + tile, tl.sum(keep_K.to(tl.float32), 0))


@triton.jit
def _total_kernel(
    partial: tl.tensor,  # [2, B, T]
    sum: tl.tensor,  # [B]
    count: tl.tensor,  # [B]
    tiles: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """Adds up the tiles of one sample, always in the same order."""
    b = tl.program_id(0)
    t = tl.arange(0, BLOCK)
    sums = tl.zeros((BLOCK,), tl.float32)
    counts = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, tiles, BLOCK):
        mine = partial + b * tiles + start + t
        sums += tl.load(mine, mask=start + t < tiles, other=0.0)
        counts += tl.load(mine + tl.num_programs(0) * tiles, mask=start + t < tiles, other=0.0)
    tl.store(sum + b, tl.sum(sums, 0))
    tl.store(count + b, tl.sum(counts, 0))


@triton.jit
def _backward_kernel(
    grad_sum: tl.tensor,  # [B]
    student: tl.tensor,  # [B, N, D] by its strides
    frozen: tl.tensor,  # [B, N, D] by its strides
    coef: tl.tensor,  # [B, N, 2]
    grad_student: tl.tensor,  # [B, N, D]
    tokens: tl.tensor,
    student_stride_b: tl.tensor,
    student_stride_n: tl.tensor,
    frozen_stride_b: tl.tensor,
    frozen_stride_n: tl.tensor,
    D: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    tile = tl.program_id(0)
    tiles = tl.cdiv(tokens, TILE)
    b = (tile // tiles).to(tl.int64)
    n_K = (tile % tiles) * TILE + tl.arange(0, TILE)
    inside_K = n_K < tokens
    coef_K = coef + (b * tokens + n_K) * 2
    by_student_K = tl.load(coef_K, mask=inside_K, other=0.0)
    by_frozen_K = tl.load(coef_K + 1, mask=inside_K, other=0.0)
    active_K = by_frozen_K != 0.0
    # Not a product: an upstream gradient that is not finite must not reach the tokens without gradient.
    grad = tl.load(grad_sum + b)
    by_student_K1 = tl.where(active_K, grad * by_student_K, 0.0)[:, None]
    by_frozen_K1 = tl.where(active_K, grad * by_frozen_K, 0.0)[:, None]

    c_C = tl.arange(0, CHUNK)
    n_K1 = n_K[:, None].to(tl.int64)
    student_KC = student + b * student_stride_b + n_K1 * student_stride_n + c_C[None, :]
    frozen_KC = frozen + b * frozen_stride_b + n_K1 * frozen_stride_n + c_C[None, :]
    grad_student_KC = grad_student + (b * tokens + n_K1) * D + c_C[None, :]
    for start in range(0, D, CHUNK):
        load_KC = active_K[:, None]
        store_KC = inside_K[:, None]
        if D % CHUNK != 0:
            load_KC = load_KC & (start + c_C < D)[None, :]
            store_KC = store_KC & (start + c_C < D)[None, :]
        s_KC = tl.load(student_KC + start, mask=load_KC, other=0.0).to(tl.float32)
        f_KC = tl.load(frozen_KC + start, mask=load_KC, other=0.0).to(tl.float32)
        grad_KC = by_student_K1 * s_KC - by_frozen_K1 * f_KC
        tl.store(grad_student_KC + start, grad_KC.to(grad_student.dtype.element_ty), mask=store_KC)
