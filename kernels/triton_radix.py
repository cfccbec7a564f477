"""One pass of a radix select as Triton kernels share it: count a digit of every candidate, find the digit of a rank.

Keys of 32 bits are settled in three passes of 11, 11 and 10 bits, for all rows and regions of a launch at once. Every
program counts, in shared memory, how many of its values that have the digits found so far have which next digit; the
counts are added up in global memory, and the program that arrives last at a row finds the digit of the wanted rank.
Counts are integers, so nothing depends on the order of arrival. Algorithm: radix select as in RAFT's select_k (Zhang et
al., SC 2023).

Shape suffixes: R rows, G regions, F fields of the state; in a kernel K the BLOCK pixels of a step, H bins of all
regions, N bins of one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import reference
from kernels import triton_common as common
from kernels.triton_common import pick, push

BINS = tl.constexpr(2048)
TRIM_UNITS = tl.constexpr(reference.TRIM_UNITS)
# Fields of the state of a row and region: the bits found so far, the rank among the values that have them, how many
# values there are, how many are below those bits, how many have those and the last digit, and whether there is NaN.
FIELDS = tl.constexpr(6)
PREFIX, RANK, COUNT, BELOW, EQUAL, HOLDS_NAN = (tl.constexpr(i) for i in range(6))
INTEGERS = ["ctas", "steps", "groups"]  # that are not compiled for: one program serves all sizes


def block(num_regions: int) -> int:
    """Pixels of a step."""
    return common.TUNING.select_block if num_regions <= 2 else common.TUNING.region_select_block


def warps(num_regions: int) -> int:
    """Counts and sums are held in registers between steps, so many regions need many threads."""
    return 8 if num_regions <= 2 else 16


def sizes(num_regions: int) -> dict[str, int]:
    """The number of regions, and the power of two that holds it."""
    return {"G": num_regions, "REGIONS": triton.next_power_of_2(num_regions)}


def counters(like: Tensor, rows: int, num_regions: int) -> tuple[Tensor, Tensor]:
    """Zeroed histograms [3, R * REGIONS * BINS] and tickets [3, R or more], by one memset."""
    bins = rows * triton.next_power_of_2(num_regions) * BINS.value
    zeros = like.new_zeros(3 * (bins + triton.cdiv(rows, 4) * 4), dtype=torch.int32)  # so that all are aligned
    return zeros[: 3 * bins].view(3, -1), zeros[3 * bins :].view(3, -1)


@triton.jit
def digit(key_K: tl.tensor, label_K: tl.tensor, prefix: tl.tensor, PASS: tl.constexpr, G: tl.constexpr) -> tl.tensor:
    """The digit that this pass counts, and whether it counts: the digits before it are those found so far."""
    wanted_K = (label_K > 0) & (label_K <= G)
    if PASS == 0:
        digit_K = key_K >> 21
    elif PASS == 1:
        digit_K = (key_K >> 10) & 2047
        wanted_K = wanted_K & ((key_K >> 21).to(tl.int32) == pick(prefix, label_K, G))
    else:
        digit_K = key_K & 1023
        wanted_K = wanted_K & ((key_K >> 10).to(tl.int32) == pick(prefix, label_K, G))
    return digit_K.to(tl.int32), wanted_K


@triton.jit
def count_digits(
    counts_H: tl.tensor,
    digit_K: tl.tensor,
    wanted_K: tl.tensor,
    label_K: tl.tensor,
    N: tl.constexpr,
    REGIONS: tl.constexpr,
) -> tl.tensor:
    """The counts so far of this program with those of a step."""
    if REGIONS > 1:
        digit_K += (label_K - 1) * N
    return counts_H + tl.histogram(digit_K, N * REGIONS, mask=wanted_K)


@triton.jit
def merge(
    hist: tl.tensor,  # [R, REGIONS * BINS]
    row: tl.tensor,
    counts_H: tl.tensor,
    N: tl.constexpr,
    REGIONS: tl.constexpr,
) -> None:
    """Adds this program's counts to those of the row."""
    mine_H = hist + row.to(tl.int64) * (REGIONS * BINS) + tl.arange(0, N * REGIONS)
    tl.atomic_add(mine_H, counts_H, mask=counts_H > 0, sem="relaxed")


@triton.jit
def load_counts(
    hist: tl.tensor, row: tl.tensor, region: tl.tensor, N: tl.constexpr, REGIONS: tl.constexpr
) -> tl.tensor:
    """The counts of a region by all programs, past the cache of this multiprocessor."""
    mine_N = hist + row.to(tl.int64) * (REGIONS * BINS) + region * N + tl.arange(0, N)
    return tl.load(mine_N, cache_modifier=".cg")


@triton.jit
def load_prefixes(
    state: tl.tensor,  # [G, F] of a row
    PASS: tl.constexpr,
    G: tl.constexpr,
) -> tl.tensor:
    """The bits found so far, a tuple; empty in the first pass."""
    prefixes = ()
    if PASS > 0:
        for g in tl.static_range(G):
            prefixes = push(prefixes, tl.load(state + g * FIELDS + PREFIX))
    return prefixes


@triton.jit
def _descend(counts_N: tl.tensor, rank: tl.tensor, N: tl.constexpr) -> tl.tensor:
    """The bin that holds the value of this rank, how many values are in the bins before it, and in the bin itself."""
    upto_N = tl.cumsum(counts_N, 0)
    before_N = upto_N <= rank
    digit = tl.minimum(tl.sum(before_N.to(tl.int32), 0), N - 1)
    below = tl.max(tl.where(before_N, upto_N, 0), 0)
    return digit, below, tl.sum(tl.where(tl.arange(0, N) == digit, counts_N, 0), 0)


@triton.jit
def advance(
    state: tl.tensor,  # [F] of one row and region
    counts_N: tl.tensor,
    units: tl.tensor,
    PASS: tl.constexpr,
    N: tl.constexpr,
) -> tl.tensor:
    """Finds the next digit and puts it into the state. Returns (bits so far, number below them, number in the bin).

    units: how many millionths of the values, the largest, to leave out; the largest of the others is wanted. If None,
    the lower median is.
    """
    if PASS == 0:
        count = tl.sum(counts_N, 0)
        if units is None:
            rank = (count - 1) // 2
        else:
            rank = count - 1 - (count.to(tl.int64) * units // TRIM_UNITS).to(tl.int32)
        tl.store(state + COUNT, count)
        bits, below, equal = _descend(counts_N, rank, N)
        passed = below
    else:
        rank = tl.load(state + RANK)
        prefix, below = tl.load(state + PREFIX), tl.load(state + BELOW)
        tl.debug_barrier()  # every thread has read the state before it changes
        digit, passed, equal = _descend(counts_N, rank, N)
        bits, below = prefix * N + digit, below + passed
    tl.store(state + PREFIX, bits)
    tl.store(state + RANK, rank - passed)
    tl.store(state + BELOW, below)
    tl.store(state + EQUAL, equal)
    return bits, below, equal
