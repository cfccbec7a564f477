"""Exact median and mean absolute deviation of image maps as Triton kernels, for every row and region of a launch.

A radix select (`kernels.triton_radix`). After its second pass the median is known to 22 bits, so the third can sum up
the distances of all other values to the nearer edge of that bucket while it counts, and the mean absolute deviation
needs no pass of its own:

    sum |x - t| = (sum of distances to the bucket) + (t - low) * n_below + (high - t) * n_above
                  + (sum over its bins of count * |bin - t|)

in which no term is negative, so nothing cancels. Float sums are added in a fixed order: the same bits in every run.

Shape suffixes: B batch, M maps (1 or 2), R = B * M rows, G regions, P pixels of a row, F fields of the state; in a
kernel K the BLOCK pixels of a step, N bins of a region, C programs of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import triton_common as common
from kernels import triton_radix as radix
from kernels.triton_common import add, is_last, load_label, load_map, pick, push, zero_sums
from kernels.triton_radix import (
    BINS,
    COUNT,
    FIELDS,
    HOLDS_NAN,
    advance,
    count_digits,
    digit,
    load_counts,
    load_prefixes,
    merge,
)

_SIGN_BIT = tl.constexpr(-(2**31))
# First digits outside these are those of quiet NaN alone, which is what an addition makes of any NaN.
_LOWEST, _HIGHEST = tl.constexpr(2), tl.constexpr(2045)


@dataclass(frozen=True)
class Stats:
    """Median and mean absolute deviation of rows, and the counts behind them (COUNT, BELOW, EQUAL of the fields)."""

    median_BMG: Tensor
    mad_BMG: Tensor
    state_BMGF: Tensor


def median_mad(maps: tuple[Tensor, ...], label_BP: Tensor | None, num_regions: int) -> Stats:
    """Of one or two maps [B, P], contiguous, that have pixels. See `kernels.triton_stats.median_mad`."""
    first_BP = maps[0]
    batch, pixels = first_BP.shape
    rows = batch * len(maps)
    work = common.launch(rows, pixels, radix.block(num_regions), *maps)
    median_BMG = first_BP.new_empty((batch, len(maps), num_regions), dtype=torch.float32)
    mad_BMG = torch.empty_like(median_BMG)
    state_BMGF = first_BP.new_empty((batch, len(maps), num_regions, FIELDS.value), dtype=torch.int32)
    rest_RCG = first_BP.new_empty((rows, work.ctas, num_regions), dtype=torch.float32)
    hists, tickets = radix.counters(first_BP, rows, num_regions)
    with common.on_device(first_BP):
        for index in range(3):
            _median_pass[work.grid](
                first_BP,
                maps[1] if len(maps) == 2 else None,
                label_BP,
                hists[index],
                tickets[index],
                state_BMGF,
                rest_RCG,
                median_BMG,
                mad_BMG,
                **work.arguments,
                **radix.sizes(num_regions),
                CTAS=triton.next_power_of_2(work.ctas) if index == 2 else 0,  # else one build would serve one size
                PASS=index,
                num_warps=radix.warps(num_regions),
            )
    return Stats(median_BMG, mad_BMG, state_BMGF)


@triton.jit
def _ordered(x: tl.tensor) -> tl.tensor:
    """Bits of a float32 as an unsigned number that sorts as the float does; -0 becomes +0."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) | _SIGN_BIT)).to(tl.uint32, bitcast=True)


@triton.jit
def _unordered(key: tl.tensor) -> tl.tensor:
    """The float32 of an ordered key, given as int32."""
    return (key ^ (((key >> 31) ^ -1) | _SIGN_BIT)).to(tl.float32, bitcast=True)


@triton.jit
def _holds_nan(counts_N: tl.tensor, N: tl.constexpr) -> tl.tensor:
    """1 if the first digits of a region show NaN, else 0."""
    n_N = tl.arange(0, N)
    return tl.max(((counts_N > 0) & ((n_N < _LOWEST) | (n_N > _HIGHEST))).to(tl.int32), 0)


@triton.jit
def _buckets(prefix: tl.tensor, G: tl.constexpr) -> tl.tensor:
    """The least and the greatest number that begin with the 22 bits found for a region: two tuples."""
    low, high = (), ()
    for g in tl.static_range(G):
        low = push(low, _unordered(prefix[g] << 10))
        high = push(high, _unordered((prefix[g] << 10) | 1023))
    return low, high


@triton.jit
def _away(x_K: tl.tensor, label_K: tl.tensor, buckets: tl.tensor, G: tl.constexpr) -> tl.tensor:
    """Distance of every pixel to the nearer edge of its region's bucket; 0 inside."""
    low_K, high_K = pick(buckets[0], label_K, G), pick(buckets[1], label_K, G)
    return tl.maximum(tl.maximum(x_K - high_K, low_K - x_K), 0.0)


@triton.jit
def _load_row(first: tl.tensor, second: tl.tensor, row: tl.tensor, pixels: tl.tensor, k_K: tl.tensor) -> tl.tensor:
    """Pixels of a map: the rows of two maps alternate."""
    if second is None:
        x_K = load_map(first, row, pixels, k_K)
    else:
        if row % 2 == 0:
            x_K = load_map(first, row // 2, pixels, k_K)
        else:
            x_K = load_map(second, row // 2, pixels, k_K)
    return x_K


@triton.jit(do_not_specialize=radix.INTEGERS)
def _median_pass(
    first: tl.tensor,  # [B, P]
    second: tl.tensor,  # [B, P], or None if there is one map
    label: tl.tensor,  # [B, P] uint8, or None
    hist: tl.tensor,  # [R, REGIONS * BINS] int32, zeros
    ticket: tl.tensor,  # [R] int32, zeros
    state: tl.tensor,  # [R, G, F] int32
    rest: tl.tensor,  # [R, C, G]
    median: tl.tensor,  # [R, G], written in pass 2, as is mad
    mad: tl.tensor,  # [R, G]
    ctas: tl.tensor,
    steps: tl.tensor,
    groups: tl.tensor,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
    G: tl.constexpr,
    REGIONS: tl.constexpr,
    CTAS: tl.constexpr,
    PASS: tl.constexpr,
) -> None:
    """Counts one digit of every value of its rows, and finds that digit of the medians."""
    N: tl.constexpr = 1024 if PASS == 2 else BINS
    pixels = groups * VECTOR
    row, cta = tl.program_id(0) // ctas, tl.program_id(0) % ctas
    if PASS == 1:
        row = tl.num_programs(0) // ctas - 1 - row  # the rows read last are those still in the cache
    sample = row if second is None else row // 2
    state += row.to(tl.int64) * (G * FIELDS)
    prefix = load_prefixes(state, PASS, G)
    buckets, sums = (), ()
    if PASS == 2:
        buckets, sums = _buckets(prefix, G), zero_sums(BLOCK, 4, G)

    counts_H = tl.zeros((N * REGIONS,), tl.int32)
    for step in range(steps):
        k_K = (cta * steps + step) * BLOCK + tl.arange(0, BLOCK)
        x_K = _load_row(first, second, row, pixels, k_K)
        label_K = load_label(label, sample, pixels, k_K)
        digit_K, wanted_K = digit(_ordered(x_K), label_K, prefix, PASS, G)
        counts_H = count_digits(counts_H, digit_K, wanted_K, label_K, N, REGIONS)
        if PASS == 2:
            sums = add(sums, label_K, _away(x_K, label_K, buckets, G), BLOCK, 4, G)
    merge(hist, row, counts_H, N, REGIONS)
    rest += row.to(tl.int64) * (ctas * G)
    if PASS == 2:
        for g in tl.static_range(G):
            tl.store(rest + cta * G + g, tl.sum(sums[g], 0))

    if is_last(ticket + row, ctas):
        for region in range(G):
            mine = state + region * FIELDS
            counts_N = load_counts(hist, row, region, N, REGIONS)
            bits, below, _ = advance(mine, counts_N, None, PASS, N)
            if PASS == 0:
                tl.store(mine + HOLDS_NAN, _holds_nan(counts_N, N))
            if PASS == 2:
                c_C = tl.arange(0, CTAS)
                away_C = tl.load(rest + c_C * G + region, mask=c_C < ctas, other=0.0, cache_modifier=".cg")
                place = row * G + region
                _write(mine, median + place, mad + place, bits, below, counts_N, tl.sum(away_C, 0), N)


@triton.jit
def _write(
    state: tl.tensor,  # [F] of one row and region
    median: tl.tensor,  # its place
    mad: tl.tensor,  # its place
    key: tl.tensor,
    below: tl.tensor,
    counts_N: tl.tensor,
    away: tl.tensor,
    N: tl.constexpr,
) -> None:
    """The median from its key, and the mean absolute deviation by the formula at the top."""
    count, spoilt = tl.load(state + COUNT), tl.load(state + HOLDS_NAN) > 0
    t = _unordered(key)
    start = key & -N
    low, high = _unordered(start), _unordered(start | (N - 1))
    n_N = tl.arange(0, N)
    bin_N = _unordered(start | n_N)
    inside_N = tl.where(counts_N > 0, counts_N.to(tl.float32) * tl.abs(bin_N - t), 0.0)
    before = below - tl.sum(tl.where(n_N < (key & (N - 1)), counts_N, 0), 0)
    after = count - before - tl.sum(counts_N, 0)
    total = away + (t - low) * before.to(tl.float32) + (high - t) * after.to(tl.float32) + tl.sum(inside_N, 0)
    s = tl.div_rn(total, tl.maximum(count, 1).to(tl.float32))
    # Of infinities the formula makes what the reference does, but maximum() has dropped NaN.
    t, s = tl.where(spoilt, float("nan"), t), tl.where(spoilt, float("nan"), s)
    tl.store(median, tl.where(count > 0, t, 0.0))
    tl.store(mad, tl.where(count > 0, s, 0.0))
