"""Median and mean absolute deviation as an operator of their own: the values, and what their gradients need.

Shape suffixes: B batch, P pixels of a sample, G regions, F fields of the state; in a kernel K the BLOCK pixels of a
step, Q maxima of FOLD.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import triton_common as common
from kernels import triton_radix as radix
from kernels import triton_select as select
from kernels.triton_common import encode, is_last, load_label, load_map, load_norm, max_folds, pick, sign
from kernels.triton_radix import BELOW, COUNT, EQUAL, FIELDS


def median_mad(x_BP: Tensor, label_BP: Tensor | None, num_regions: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `kernels.api.region_median_mad`. A label above num_regions makes its sample's statistics NaN.

    Returns:
        (median_BG, mad_BG, code_BP, shares_BG3): codes (`kernels.codes`) have sgn e = 0, and shares are (1 / n_eq,
        1 / n, (n_lt - n_gt) / (n * n_eq)), 0 for an empty region.
    """
    batch, pixels = x_BP.shape
    median_BG, mad_BG, shares_BG3 = (
        x_BP.new_empty((batch, num_regions, *more), dtype=torch.float32) for more in ((), (), (3,))
    )
    code_BP = torch.empty_like(x_BP, dtype=torch.uint8, memory_format=torch.contiguous_format)
    if x_BP.numel() == 0:
        return median_BG.zero_(), mad_BG.zero_(), code_BP, shares_BG3.zero_()
    x_BP, label_BP = x_BP.contiguous(), common.dense(label_BP)
    stats = select.median_mad((x_BP,), label_BP, num_regions)
    work = common.launch(batch, pixels, common.pixel_block(num_regions), x_BP)
    with common.on_device(x_BP):
        _sign_kernel[work.grid](
            x_BP,
            label_BP,
            stats.median_BMG,
            stats.mad_BMG,
            stats.state_BMGF,
            x_BP.new_zeros((batch, 2), dtype=torch.int32),
            median_BG,
            mad_BG,
            shares_BG3,
            code_BP,
            **work.arguments,
            FOLD=common.fold(num_regions),
            G=num_regions,
            num_warps=8,
        )
    return median_BG, mad_BG, code_BP, shares_BG3


@triton.jit(do_not_specialize=radix.INTEGERS)
def _sign_kernel(
    x: tl.tensor,  # [B, P]
    label: tl.tensor,  # [B, P] uint8, or None
    median: tl.tensor,  # [B, G]
    mad: tl.tensor,  # [B, G]
    state: tl.tensor,  # [B, G, F] int32
    ticket: tl.tensor,  # [B, 2] int32, zeros: the ticket, the highest label
    median_out: tl.tensor,  # [B, G]
    mad_out: tl.tensor,  # [B, G]
    shares: tl.tensor,  # [B, G, 3]
    code: tl.tensor,  # [B, P] uint8
    ctas: tl.tensor,
    steps: tl.tensor,
    groups: tl.tensor,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
    FOLD: tl.constexpr,
    G: tl.constexpr,
) -> None:
    """The codes of x against its medians, with sgn e = 0; the last program of a sample writes the rest."""
    pixels = groups * VECTOR
    sample, cta = tl.program_id(0) // ctas, tl.program_id(0) % ctas
    shift = load_norm(median + sample * G, mad + sample * G, G)[0]
    zero_K = tl.zeros((BLOCK,), tl.int32)
    top_Q = tl.zeros((BLOCK // FOLD,), tl.int32)
    for step in range(steps):
        k_K = (cta * steps + step) * BLOCK + tl.arange(0, BLOCK)
        label_K = load_label(label, sample, pixels, k_K)
        x_K, t_K = load_map(x, sample, pixels, k_K), pick(shift, label_K, G)
        code_K = encode(label_K, zero_K, zero_K, sign(x_K > t_K, x_K < t_K, 1), G)
        tl.store(code + sample.to(tl.int64) * pixels + k_K, code_K, mask=k_K < pixels)
        top_Q = tl.maximum(top_Q, max_folds(label_K, BLOCK, FOLD))
    tl.atomic_max(ticket + sample * 2 + 1, tl.max(top_Q, 0), sem="relaxed")

    if is_last(ticket + sample * 2, ctas):
        top = tl.load(ticket + sample * 2 + 1, cache_modifier=".cg")
        spoil = tl.where(top > G, float("nan"), 0.0)
        for region in range(G):
            place = sample * G + region
            counts = state + place.to(tl.int64) * FIELDS
            count, below, equal = tl.load(counts + COUNT), tl.load(counts + BELOW), tl.load(counts + EQUAL)
            by_n = tl.div_rn(tl.where(count > 0, 1.0, 0.0), tl.maximum(count, 1).to(tl.float32))
            by_equal = tl.div_rn(tl.where(count > 0, 1.0, 0.0), tl.maximum(equal, 1).to(tl.float32))
            tilt = (2 * below + equal - count).to(tl.float32)  # n_lt - n_gt
            tl.store(median_out + place, tl.load(median + place) + spoil)
            tl.store(mad_out + place, tl.load(mad + place) + spoil)
            tl.store(shares + place * 3, by_equal + spoil)
            tl.store(shares + place * 3 + 1, by_n + spoil)
            tl.store(shares + place * 3 + 2, tilt * by_n * by_equal + spoil)
