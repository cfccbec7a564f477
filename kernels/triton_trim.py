"""Where trimming cuts the residuals of the affine-invariant loss, exactly, as Triton kernels.

A radix select (`kernels.triton_radix`) of |e|, whose bits sort as it does; e is computed anew in every pass.

Shape suffixes: B batch, P pixels of a sample, G regions, F fields of the state; in a kernel K the BLOCK pixels of a
step, N bins of a region.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import triton_common as common
from kernels import triton_radix as radix
from kernels.triton_common import is_last, load_label, load_map, load_norm, normalised
from kernels.triton_radix import (
    BINS,
    COUNT,
    FIELDS,
    TRIM_UNITS,
    advance,
    count_digits,
    digit,
    load_counts,
    load_prefixes,
    merge,
)


def trim_cut(
    pred_BP: Tensor, target_BP: Tensor, label_BP: Tensor | None, norms: tuple[Tensor, ...], units: int
) -> Tensor:
    """Where trimming cuts: cut_BG3 = (threshold, kept share of the residuals that equal it, number kept).

    norms: (median_BG, mad_BG) of the prediction, then of the target. units: millionths to drop.
    """
    batch, pixels = pred_BP.shape
    num_regions = norms[0].shape[1]
    work = common.launch(batch, pixels, radix.block(num_regions), pred_BP, target_BP)
    cut_BG3 = pred_BP.new_empty((batch, num_regions, 3), dtype=torch.float32)
    state_BGF = pred_BP.new_empty((batch, num_regions, FIELDS.value), dtype=torch.int32)
    hists, tickets = radix.counters(pred_BP, batch, num_regions)
    with common.on_device(pred_BP):
        for index in range(3):
            _trim_pass[work.grid](
                pred_BP,
                target_BP,
                label_BP,
                *norms,
                norms[0].stride(0),
                norms[2].stride(0),
                hists[index],
                tickets[index],
                state_BGF,
                cut_BG3,
                units,
                **work.arguments,
                **radix.sizes(num_regions),
                PASS=index,
                num_warps=radix.warps(num_regions),
                **common.EXACT,
            )
    return cut_BG3


@triton.jit(do_not_specialize=[*radix.INTEGERS, "units", "pred_stride", "target_stride"])
def _trim_pass(
    pred: tl.tensor,  # [B, P]
    target: tl.tensor,  # [B, P]
    label: tl.tensor,  # [B, P] uint8, or None
    pred_median: tl.tensor,  # [B, G], each sample by the stride
    pred_mad: tl.tensor,
    target_median: tl.tensor,
    target_mad: tl.tensor,
    pred_stride: tl.tensor,
    target_stride: tl.tensor,
    hist: tl.tensor,  # [B, REGIONS * BINS] int32, zeros
    ticket: tl.tensor,  # [B] int32, zeros
    state: tl.tensor,  # [B, G, F] int32
    cut: tl.tensor,  # [B, G, 3], written in pass 2
    units: tl.tensor,
    ctas: tl.tensor,
    steps: tl.tensor,
    groups: tl.tensor,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
    G: tl.constexpr,
    REGIONS: tl.constexpr,
    PASS: tl.constexpr,
) -> None:
    """Counts one digit of every |residual|, whose bits sort as it does, and finds that digit of the threshold."""
    N: tl.constexpr = 1024 if PASS == 2 else BINS
    pixels = groups * VECTOR
    sample, cta = tl.program_id(0) // ctas, tl.program_id(0) % ctas
    if PASS != 1:
        sample = tl.num_programs(0) // ctas - 1 - sample
    state += sample.to(tl.int64) * (G * FIELDS)
    prefix = load_prefixes(state, PASS, G)
    pred_norm = load_norm(pred_median + sample * pred_stride, pred_mad + sample * pred_stride, G)
    target_norm = load_norm(target_median + sample * target_stride, target_mad + sample * target_stride, G)

    counts_H = tl.zeros((N * REGIONS,), tl.int32)
    for step in range(steps):
        k_K = (cta * steps + step) * BLOCK + tl.arange(0, BLOCK)
        label_K = load_label(label, sample, pixels, k_K)
        p_K = normalised(load_map(pred, sample, pixels, k_K), label_K, pred_norm, G)
        q_K = normalised(load_map(target, sample, pixels, k_K), label_K, target_norm, G)
        key_K = tl.abs(p_K - q_K).to(tl.uint32, bitcast=True)
        digit_K, wanted_K = digit(key_K, label_K, prefix, PASS, G)
        counts_H = count_digits(counts_H, digit_K, wanted_K, label_K, N, REGIONS)
    merge(hist, sample, counts_H, N, REGIONS)

    if is_last(ticket + sample, ctas):
        for region in range(G):
            mine = state + region * FIELDS
            counts_N = load_counts(hist, sample, region, N, REGIONS)
            bits, below, equal = advance(mine, counts_N, units, PASS, N)
            if PASS == 2:
                count = tl.load(mine + COUNT)
                kept = count - (count.to(tl.int64) * units // TRIM_UNITS).to(tl.int32)
                share = tl.div_rn((kept - below).to(tl.float32), tl.maximum(equal, 1).to(tl.float32))
                tl.store(cut + (sample * G + region) * 3, bits.to(tl.float32, bitcast=True))
                tl.store(cut + (sample * G + region) * 3 + 1, share)
                tl.store(cut + (sample * G + region) * 3 + 2, kept.to(tl.float32))
