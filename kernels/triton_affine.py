"""The affine-invariant loss as Triton kernels: forward in four launches (seven with trimming), backward in one.

Semantics are those of `kernels.reference.affine_invariant_loss`; what forward keeps for backward, one byte per pixel
and four numbers per region, is described in `kernels.codes`. float32, bfloat16 or float16 in, float32 inside. Nothing
waits for the host or for another program, and no shape depends on data, so it can be captured in a CUDA graph; sums
are taken in a fixed order, so results are the same bits in every run. A label above num_regions, which only the host
could refuse, makes its sample's losses and statistics NaN.

Shape suffixes: B batch, M maps, P pixels of a sample, G regions, C programs of a sample, 4 the terms of
`kernels.codes`; in a kernel K the BLOCK pixels of a step, Q sums of FOLD, V the values of a code.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import codes, reference
from kernels import triton_common as common
from kernels import triton_radix as radix
from kernels import triton_select as select
from kernels import triton_trim as trimming
from kernels.triton_common import (
    add,
    encode,
    is_degenerate,
    is_last,
    load_label,
    load_map,
    load_norm,
    max_folds,
    normalised,
    pick,
    push,
    sign,
    zero_sums,
)
from kernels.triton_radix import BELOW, COUNT, EQUAL, FIELDS
from kernels.triton_stats import median_mad as median_mad

_STATES, _SIGNS = tl.constexpr(codes.STATES), tl.constexpr(codes.SIGNS)
_TABLE = tl.constexpr(triton.next_power_of_2(codes.CODES))


def forward(
    pred_BP: Tensor,
    target_BP: Tensor,
    label_BP: Tensor | None,
    num_regions: int,
    trim: float,
    target_stats: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `kernels.api.affine_invariant_loss`.

    Returns:
        (loss_BG float32, code_BP uint8, terms_BG4 float32).
    """
    batch, pixels = pred_BP.shape
    new = pred_BP.new_empty
    loss_BG, terms_BG4 = (new((batch, num_regions, *more), dtype=torch.float32) for more in ((), (4,)))
    code_BP = new((batch, pixels), dtype=torch.uint8)
    if pred_BP.numel() == 0:
        return loss_BG.zero_(), code_BP, terms_BG4.zero_()
    pred_BP, target_BP, label_BP = pred_BP.contiguous(), target_BP.contiguous(), common.dense(label_BP)
    stats = select.median_mad((pred_BP,) if target_stats else (pred_BP, target_BP), label_BP, num_regions)
    if target_stats is None:
        target_norm = stats.median_BMG[:, 1], stats.mad_BMG[:, 1]
    else:
        target_norm = target_stats[0].float().contiguous(), target_stats[1].float().contiguous()
    norms = (stats.median_BMG[:, 0], stats.mad_BMG[:, 0], *target_norm)
    units = reference.trim_units(trim)
    cut_BG3 = trimming.trim_cut(pred_BP, target_BP, label_BP, norms, units) if units else None
    work = common.launch(batch, pixels, common.pixel_block(num_regions), pred_BP, target_BP)
    with common.on_device(pred_BP):
        _loss_kernel[work.grid](
            pred_BP,
            target_BP,
            label_BP,
            *norms,
            norms[0].stride(0),
            norms[2].stride(0),
            stats.state_BMGF,
            stats.state_BMGF.stride(0),
            cut_BG3,
            new((batch, work.ctas, num_regions, 3), dtype=torch.float32),
            pred_BP.new_zeros(batch, dtype=torch.int32),
            loss_BG,
            code_BP,
            terms_BG4,
            **work.arguments,
            FOLD=common.fold(num_regions),
            G=num_regions,
            CTAS=triton.next_power_of_2(work.ctas),
            num_warps=8,
            **common.EXACT,
        )
    return loss_BG, code_BP, terms_BG4


def backward(grad_BG: Tensor, code_BP: Tensor, terms_BG4: Tensor, dtype: torch.dtype) -> Tensor:
    """Gradient of the prediction, of this dtype, from that of the losses and what `forward` returned."""
    batch, pixels = code_BP.shape
    grad_BP = torch.empty_like(code_BP, dtype=dtype, memory_format=torch.contiguous_format)
    if code_BP.numel() == 0:
        return grad_BP
    work = common.launch(batch, pixels, common.TUNING.backward_block, grad_BP)
    with common.on_device(code_BP):
        _backward_kernel[(batch * work.ctas * work.steps,)](
            grad_BG.to(torch.float32).contiguous(),
            code_BP.contiguous(),
            terms_BG4.contiguous(),
            grad_BP,
            work.ctas * work.steps,
            work.groups,
            VECTOR=work.vector,
            BLOCK=work.block,
            G=terms_BG4.shape[1],
            num_warps=8,
        )
    return grad_BP


@triton.jit(do_not_specialize=[*radix.INTEGERS, "pred_stride", "target_stride", "state_stride"])
def _loss_kernel(
    pred: tl.tensor,  # [B, P]
    target: tl.tensor,  # [B, P]
    label: tl.tensor,  # [B, P] uint8, or None
    pred_median: tl.tensor,  # [B, G], each sample by the stride
    pred_mad: tl.tensor,
    target_median: tl.tensor,
    target_mad: tl.tensor,
    pred_stride: tl.tensor,
    target_stride: tl.tensor,
    state: tl.tensor,  # [B, G, F] int32 of the prediction, each sample by the stride
    state_stride: tl.tensor,
    cut: tl.tensor,  # [B, G, 3] of `triton_trim.trim_cut`, or None
    partial: tl.tensor,  # [B, C, G, 3]
    ticket: tl.tensor,  # [B] int32, zeros
    loss: tl.tensor,  # [B, G]
    code: tl.tensor,  # [B, P] uint8
    terms: tl.tensor,  # [B, G, 4]
    ctas: tl.tensor,
    steps: tl.tensor,
    groups: tl.tensor,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
    FOLD: tl.constexpr,
    G: tl.constexpr,
    CTAS: tl.constexpr,
) -> None:
    pixels = groups * VECTOR
    sample, cta = tl.program_id(0) // ctas, tl.program_id(0) % ctas
    if cut is None:
        sample = tl.num_programs(0) // ctas - 1 - sample  # begin with what the pass before read last
    pred_median += sample * pred_stride
    pred_mad += sample * pred_stride
    target_median += sample * target_stride
    target_mad += sample * target_stride
    pred_norm = load_norm(pred_median, pred_mad, G)
    target_norm = load_norm(target_median, target_mad, G)
    cuts = ()
    if cut is not None:
        cuts = _load_cuts(cut + sample * (G * 3), G)

    top_Q = tl.zeros((BLOCK // FOLD,), tl.int32)
    # Of w * |e|, w * sgn e and w * sgn e * p, where w is the weight of a pixel, 1 without trimming.
    errors, signs, scaled = zero_sums(BLOCK, FOLD, G), zero_sums(BLOCK, FOLD, G), zero_sums(BLOCK, FOLD, G)
    for step in range(steps):
        k_K = (cta * steps + step) * BLOCK + tl.arange(0, BLOCK)
        label_K = load_label(label, sample, pixels, k_K)
        x_K = load_map(pred, sample, pixels, k_K)
        p_K = normalised(x_K, label_K, pred_norm, G)
        e_K = p_K - normalised(load_map(target, sample, pixels, k_K), label_K, target_norm, G)
        error_K, up_K, down_K = tl.abs(e_K), e_K > 0, e_K < 0
        sign_K = sign(up_K, down_K, 1.0)
        tied_K = tl.zeros((BLOCK,), tl.int32)
        if cut is not None:
            w_K, kept_K, tied_K = _weigh(error_K, label_K, cuts, G)
            # Products, so that a trimmed residual that is not finite still makes the sum NaN.
            error_K, sign_K = error_K * w_K, sign_K * w_K
            up_K, down_K = up_K & kept_K, down_K & kept_K
        t_K = pick(pred_norm[0], label_K, G)
        code_K = encode(label_K, tied_K, sign(up_K, down_K, 3), sign(x_K > t_K, x_K < t_K, 1), G)
        tl.store(code + sample.to(tl.int64) * pixels + k_K, code_K, mask=k_K < pixels)
        errors = add(errors, label_K, error_K, BLOCK, FOLD, G)
        signs = add(signs, label_K, sign_K, BLOCK, FOLD, G)
        scaled = add(scaled, label_K, sign_K * p_K, BLOCK, FOLD, G)
        if label is not None:
            top_Q = tl.maximum(top_Q, max_folds(label_K, BLOCK, FOLD))

    # A label above G spoils the sums of all regions.
    spoil = tl.where(tl.max(top_Q, 0) > G, float("nan"), 0.0)
    partial += sample.to(tl.int64) * (ctas * G * 3)
    for g in tl.static_range(G):
        tl.store(partial + (cta * G + g) * 3, tl.sum(errors[g], 0) + spoil)
        tl.store(partial + (cta * G + g) * 3 + 1, tl.sum(signs[g], 0))
        tl.store(partial + (cta * G + g) * 3 + 2, tl.sum(scaled[g], 0))

    if is_last(ticket + sample, ctas):
        for region in range(G):
            t, s = tl.load(pred_median + region), tl.load(pred_mad + region)
            target_t, target_s = tl.load(target_median + region), tl.load(target_mad + region)
            flat = is_degenerate(t, s) | is_degenerate(target_t, target_s)
            counts = state + sample.to(tl.int64) * state_stride + region * FIELDS
            kept, w = tl.load(counts + COUNT).to(tl.float32), 1.0
            place = sample * G + region
            if cut is not None:
                w, kept = tl.load(cut + place * 3 + 1), tl.load(cut + place * 3 + 2)
            c_C = tl.arange(0, CTAS)
            _finish(loss + place, terms + place * 4, partial + (c_C * G + region) * 3, c_C < ctas, counts,
                    s, flat, kept, w)  # fmt: skip


@triton.jit
def _load_cuts(
    cut: tl.tensor,  # [G, 3] of a sample
    G: tl.constexpr,
) -> tl.tensor:
    """The thresholds and the shares: two tuples."""
    thresholds, shares = (), ()
    for g in tl.static_range(G):
        thresholds = push(thresholds, tl.load(cut + g * 3))
        shares = push(shares, tl.load(cut + g * 3 + 1))
    return thresholds, shares


@triton.jit
def _weigh(error_K: tl.tensor, label_K: tl.tensor, cuts: tl.tensor, G: tl.constexpr) -> tl.tensor:
    """The weight that trimming leaves a pixel, whether it is kept or tied, and SIGNS if it is tied."""
    cut_K = pick(cuts[0], label_K, G)
    below_K, tied_K = error_K < cut_K, error_K == cut_K
    w_K = tl.where(below_K, 1.0, tl.where(tied_K, pick(cuts[1], label_K, G), 0.0))
    return w_K, below_K | tied_K, tl.where(tied_K, _SIGNS, 0)


@triton.jit
def _finish(
    loss: tl.tensor,  # its place
    terms: tl.tensor,  # [4]
    partial_C: tl.tensor,  # places of the three sums of every program
    inside_C: tl.tensor,
    counts: tl.tensor,  # [F] of the prediction
    s: tl.tensor,
    flat: tl.tensor,
    kept: tl.tensor,
    w: tl.tensor,
) -> None:
    """Loss and terms of a region, as in `kernels.codes`. An empty region is flat: it has no deviation."""
    error = tl.sum(tl.load(partial_C, mask=inside_C, other=0.0, cache_modifier=".cg"), 0)
    by_shift = tl.sum(tl.load(partial_C + 1, mask=inside_C, other=0.0, cache_modifier=".cg"), 0)
    by_scale = tl.sum(tl.load(partial_C + 2, mask=inside_C, other=0.0, cache_modifier=".cg"), 0)
    count, below, equal = tl.load(counts + COUNT), tl.load(counts + BELOW), tl.load(counts + EQUAL)
    n, kept = tl.maximum(count, 1).to(tl.float32), tl.maximum(kept, 1.0)
    tilt = (2 * below + equal - count).to(tl.float32)  # n_lt - n_gt
    A = tl.div_rn(1.0, kept * s)
    S = tl.div_rn(-A * by_scale, n)
    T = tl.div_rn(S * tilt - A * by_shift, tl.maximum(equal, 1).to(tl.float32))
    # What is not finite comes first: neither trimming nor the floor may hide it.
    spoilt = ~(tl.abs(error) < float("inf"))
    instead = tl.where(spoilt, float("nan"), 0.0)
    alive = ~(flat | spoilt)
    tl.store(loss, tl.where(alive, tl.div_rn(error, kept), instead))
    tl.store(terms, tl.where(alive, A, instead))
    tl.store(terms + 1, tl.where(alive, S, instead))
    tl.store(terms + 2, tl.where(alive, T, instead))
    tl.store(terms + 3, tl.where(alive, w, instead))


@triton.jit(do_not_specialize=["blocks", "groups"])
def _backward_kernel(
    grad_loss: tl.tensor,  # [B, G]
    code: tl.tensor,  # [B, P] uint8
    terms: tl.tensor,  # [B, G, 4]
    grad: tl.tensor,  # [B, P]
    blocks: tl.tensor,
    groups: tl.tensor,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
    G: tl.constexpr,
) -> None:
    """A table of the gradient of every code, and a look into it for every pixel."""
    pixels = groups * VECTOR
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    k_K = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    code_K = tl.load(code + sample * pixels + k_K, mask=k_K < pixels, other=0)

    v_V = tl.arange(0, _TABLE)
    region_V, rest_V = (v_V - 1) // _STATES, (v_V - 1) % _STATES
    known_V = (v_V > 0) & (region_V < G)
    tied_V = rest_V >= _SIGNS
    e_V, d_V = (rest_V % _SIGNS) // 3 - 1, rest_V % 3 - 1
    mine_V = terms + (sample * G + region_V) * 4
    by_e_V = tl.load(mine_V, mask=known_V, other=0.0) * e_V.to(tl.float32)
    by_e_V *= tl.where(tied_V, tl.load(mine_V + 3, mask=known_V, other=0.0), 1.0)
    by_d_V = tl.load(mine_V + 1, mask=known_V, other=0.0) * d_V.to(tl.float32)
    by_t_V = tl.where(d_V == 0, tl.load(mine_V + 2, mask=known_V, other=0.0), 0.0)
    upstream_V = tl.load(grad_loss + sample * G + region_V, mask=known_V, other=0.0)
    table_V = upstream_V * (by_e_V + by_d_V + by_t_V)
    grad_K = tl.gather(table_V, code_K.to(tl.int32), 0)
    tl.store(grad + sample * pixels + k_K, grad_K.to(grad.dtype.element_ty), mask=k_K < pixels)
