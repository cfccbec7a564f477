"""What the Triton kernels of the affine-invariant loss share: how a launch is cut up, how a program reads its pixels.

A row (one map of one sample, P pixels) is read by C programs, each of which takes STEPS blocks of BLOCK neighbouring
pixels. What they find is brought together by whichever of them arrives last at the row's ticket, so that no program
ever waits for another.

Values of the G regions are tuples, which stay in registers.

Shape suffixes: B batch, G regions, P pixels of a sample; in a kernel K the BLOCK pixels of a step, Q sums
of FOLD neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import codes, reference

# For every kernel that computes residuals: a product must not be fused into a sum, here in one way and there in
# another. Two equal maps then have residual 0, and a residual has the same bits in the select and in the loss.
EXACT = {"enable_fp_fusion": False}
_STATES = tl.constexpr(codes.STATES)
_SCALE_FLOOR = tl.constexpr(reference.SCALE_FLOOR)


@dataclass(frozen=True)
class Tuning:
    """How work is cut up. Chosen from the machine code; not measured on a GPU.

    programs: how many one launch aims at, for about 130 multiprocessors that hold several each.
    select_block, loss_block, backward_block: pixels of a step; the region_ ones where there are more than two regions,
        whose sums need the registers.
    """

    programs: int = 1024
    select_block: int = 4096
    loss_block: int = 2048
    region_select_block: int = 2048
    region_loss_block: int = 512
    backward_block: int = 4096


TUNING = Tuning()  # tests put a smaller one here, so that several programs share a small row


@dataclass(frozen=True)
class Launch:
    """The programs of one launch: `ctas` for each row of groups * vector pixels, each reading `steps` blocks of it.

    vector: how many neighbouring pixels one load may take. Triton proves alignment by what it sees multiplied, so
    kernels get the row length as groups * vector.
    """

    rows: int
    ctas: int
    steps: int
    block: int
    groups: int
    vector: int

    @property
    def grid(self) -> tuple[int]:
        return (self.rows * self.ctas,)

    @property
    def arguments(self) -> dict[str, int]:
        sizes = {"ctas": self.ctas, "steps": self.steps, "groups": self.groups}
        return {**sizes, "VECTOR": self.vector, "BLOCK": self.block}


def launch(rows: int, pixels: int, block: int, *maps: Tensor) -> Launch:
    """A launch over these rows, which reads these maps."""
    blocks = triton.cdiv(pixels, block)
    steps = triton.cdiv(blocks, max(TUNING.programs // rows, 1))
    narrow = bool(maps) and all(x.element_size() <= 2 for x in maps)
    vector = 8 if narrow and pixels % 8 == 0 else 4 if pixels % 4 == 0 else 1
    return Launch(rows, triton.cdiv(blocks, steps), steps, block, pixels // vector, vector)


def pixel_block(num_regions: int) -> int:
    """Pixels of a step of a kernel that runs over pixels once."""
    return TUNING.loss_block if num_regions <= 2 else TUNING.region_loss_block


def fold(num_regions: int) -> int:
    """How many neighbours, all of one thread, such a kernel adds up before it adds them to its running sums."""
    return 4 if num_regions <= 2 else 2


def dense(label_BP: Tensor | None) -> Tensor | None:
    """The labels, contiguous."""
    return None if label_BP is None else label_BP.contiguous()


def on_device(x: Tensor) -> Any:
    """Launches go to the current device, which need not be that of the tensors."""
    return torch.cuda.device_of(x)


@triton.jit
def push(values: tl.tensor, value: tl.tensor) -> tl.tensor:
    """The tuple with one more value."""
    return values + (value,)  # noqa: RUF005 - Triton does not know the star


@triton.jit
def load_map(
    values: tl.tensor,  # [B, P], any float
    sample: tl.tensor,
    pixels: tl.tensor,
    k_K: tl.tensor,
) -> tl.tensor:
    """The map at these pixels, as float32; 0 beyond the row."""
    return tl.load(values + sample.to(tl.int64) * pixels + k_K, mask=k_K < pixels, other=0.0).to(tl.float32)


@triton.jit
def load_label(
    label: tl.tensor,  # [B, P] uint8, or None: every pixel is in region 1
    sample: tl.tensor,
    pixels: tl.tensor,
    k_K: tl.tensor,
) -> tl.tensor:
    """The labels of these pixels, as int32; 0 beyond the row."""
    inside_K = k_K < pixels
    if label is None:
        label_K = inside_K.to(tl.int32)
    else:
        label_K = tl.load(label + sample.to(tl.int64) * pixels + k_K, mask=inside_K, other=0).to(tl.int32)
    return label_K


@triton.jit
def pick(values: tl.tensor, label_K: tl.tensor, G: tl.constexpr) -> tl.tensor:
    """values[label - 1] for every pixel; the first for a pixel in no region."""
    picked_K = values[0]
    for g in tl.static_range(1, G):
        picked_K = tl.where(label_K == g + 1, values[g], picked_K)
    return picked_K


@triton.jit
def is_degenerate(median: tl.tensor, mad: tl.tensor) -> tl.tensor:
    """As in the reference: False for NaN."""
    return mad < tl.maximum(tl.abs(median), 1.0) * _SCALE_FLOOR


@triton.jit
def load_norm(
    median: tl.tensor,  # [G] of one row
    mad: tl.tensor,  # [G] of one row
    G: tl.constexpr,
) -> tl.tensor:
    """Two tuples of G scalars: the medians, and 1 / mad, or 1 where the mad is no scale, as in the reference."""
    shifts, factors = (), ()
    for g in tl.static_range(G):
        t, s = tl.load(median + g), tl.load(mad + g)
        shifts = push(shifts, t)
        factors = push(factors, tl.div_rn(1.0, tl.where(is_degenerate(t, s), 1.0, s)))
    return shifts, factors


@triton.jit
def normalised(x_K: tl.tensor, label_K: tl.tensor, norm: tl.tensor, G: tl.constexpr) -> tl.tensor:
    """(x - median) / mad of every pixel's region; anything for a pixel in none."""
    return (x_K - pick(norm[0], label_K, G)) * pick(norm[1], label_K, G)


@triton.jit
def sum_folds(x_K: tl.tensor, BLOCK: tl.constexpr, FOLD: tl.constexpr) -> tl.tensor:
    """Sums of FOLD neighbours, which one thread holds: so running sums take so much fewer registers."""
    return tl.sum(tl.reshape(x_K, (BLOCK // FOLD, FOLD)), 1)


@triton.jit
def max_folds(x_K: tl.tensor, BLOCK: tl.constexpr, FOLD: tl.constexpr) -> tl.tensor:
    """The greatest of FOLD neighbours."""
    return tl.max(tl.reshape(x_K, (BLOCK // FOLD, FOLD)), 1)


@triton.jit
def zero_sums(BLOCK: tl.constexpr, FOLD: tl.constexpr, G: tl.constexpr) -> tl.tensor:
    """A tuple of G running sums."""
    sums = ()
    for _ in tl.static_range(G):
        sums = push(sums, tl.zeros((BLOCK // FOLD,), tl.float32))
    return sums


@triton.jit
def add(
    sums: tl.tensor,
    label_K: tl.tensor,
    x_K: tl.tensor,
    BLOCK: tl.constexpr,
    FOLD: tl.constexpr,
    G: tl.constexpr,
) -> tl.tensor:
    """The running sums, each with the pixels of its region added."""
    more = ()
    for g in tl.static_range(G):
        more = push(more, sums[g] + sum_folds(tl.where(label_K == g + 1, x_K, 0.0), BLOCK, FOLD))
    return more


@triton.jit
def sign(up: tl.tensor, down: tl.tensor, unit: tl.constexpr) -> tl.tensor:
    """unit, -unit or 0."""
    return tl.where(up, unit, tl.where(down, -unit, 0))


@triton.jit
def encode(label_K: tl.tensor, tied_K: tl.tensor, e_K: tl.tensor, d_K: tl.tensor, G: tl.constexpr) -> tl.tensor:
    """The byte of `kernels.codes`, from SIGNS * tied, 3 * sgn e and sgn(x - t)."""
    code_K = (label_K - 1) * _STATES + tied_K + e_K + d_K + 5
    return tl.where((label_K > 0) & (label_K <= G), code_K, 0).to(tl.uint8)


@triton.jit
def is_last(ticket: tl.tensor, ctas: tl.tensor) -> tl.tensor:
    """True in the last of a row's programs to come here; it sees what the others wrote before."""
    tl.debug_barrier()  # all threads of this program have written; the atomic then publishes it
    return tl.atomic_add(ticket, 1, sem="acq_rel", scope="gpu") == ctas - 1
