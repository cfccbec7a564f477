"""What bench_kernels.py compares: the cases, and for each case the ways to compute the same loss.

Shape suffixes: B batch, H W pixels, P pixels of one sample, G regions, R rows of a stack, N tokens, D width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels

OURS, TWO_CALLS, FLOOR = "ours", "ours, one call a region", "copy of the same bytes"
SIDE = 518
TOKENS = (SIDE // 14) ** 2
ALPHA, TRIM = 0.85, 0.1
HOLES = 0.1

Outputs = tuple[Tensor, ...]
Provider = Callable[[], Outputs]  # one forward pass


@dataclass(frozen=True)
class Case:
    """One table: an operator at one size. width is K2's D; kept the share of its tokens below the margin."""

    operator: str
    batch: int
    dtype: torch.dtype
    regions: int = 1
    trim: float = 0.0
    width: int = 0
    kept: float = 1.0

    @property
    def title(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        if self.operator == "K1":
            trimmed = f", {self.trim:.0%} trimmed" if self.trim else ""
            regions = "one region" if self.regions == 1 else f"{self.regions} regions"
            return f"K1 affine-invariant, B={self.batch}, {SIDE} x {SIDE}, {regions}{trimmed}, {dtype}"
        return f"K2 cosine margin, B={self.batch}, {TOKENS} tokens, D={self.width}, {self.kept:.0%} kept, {dtype}"

    @property
    def elements(self) -> int:
        """Pixels of K1, tokens of K2: what saved bytes are given per."""
        return self.batch * (SIDE * SIDE if self.operator == "K1" else TOKENS)

    @property
    def floor_bytes(self) -> tuple[float, float]:
        """The least that forward and backward must read and write."""
        if self.operator == "K1":  # two maps and a label in, a code out; the code in, a gradient out
            return self.elements * (2 * self.dtype.itemsize + 2), self.elements * (1 + self.dtype.itemsize)
        features = self.elements * self.width * self.dtype.itemsize
        return 2 * features + 8 * self.elements, (1 + 2 * self.kept) * features + 8 * self.elements


def cases(operators: list[str], batches: list[int], device: str) -> list[Case]:
    """The first ones are those that the targets are about."""
    half = torch.bfloat16 if device == "cuda" else torch.float32
    found = []
    for batch in batches:
        for regions, trim in ((1, 0.0), (2, 0.0), (1, TRIM)):
            found.append(Case("K1", batch, torch.float32, regions, trim))
        for width in (384, 768, 1024):
            found.append(Case("K2", batch, half, width=width))
        found.append(Case("K2", batch, half, width=768, kept=0.5))
    return [case for case in found if case.operator in operators]


def providers(case: Case, device: str, compiled: bool) -> tuple[Tensor, dict[str, Provider]]:
    """What to differentiate by, and the contestants. All outputs of a contestant add up to the same number."""
    if case.operator == "K1":
        return _affine(case, device, compiled)
    return _cosine(case, device, compiled)


def floors(case: Case, device: str) -> dict[str, Callable[[], object]]:
    """Per pass, a device copy that reads and writes as much as the pass must: half of it each."""
    forward, backward = case.floor_bytes
    actions: dict[str, Callable[[], object]] = {}
    for name, size in {"forward": forward, "backward": backward, "both": forward + backward}.items():
        here = torch.ones(int(size) // 2, dtype=torch.uint8, device=device)
        actions[name] = functools.partial(torch.empty_like(here).copy_, here)
    return actions


# --- K1 -----------------------------------------------------------------------------------------------------------


def _affine(case: Case, device: str, compiled: bool) -> tuple[Tensor, dict[str, Provider]]:
    pred_BHW, target_BHW, label_BHW = _maps(case, device)
    G, trim = case.regions, case.trim
    rows = pred_BHW.flatten(1), target_BHW.flatten(1), label_BHW.flatten(1)  # views: pred stays the leaf

    def library(backend: str) -> Outputs:
        return (kernels.affine_invariant_loss(pred_BHW, target_BHW, label_BHW, G, trim, backend=backend),)

    found: dict[str, Provider] = {"reference": lambda: library("reference")}
    found["eager"] = lambda: (affine_eager(pred_BHW.flatten(1), *rows[1:], G, trim),)
    if compiled:
        where, stock = (torch.compile(f, dynamic=False) for f in (affine_where, affine_topk))
        found["torch.compile"] = lambda: (where(pred_BHW.flatten(1), *rows[1:], G, trim),)
        found["topk, compiled"] = lambda: (stock(pred_BHW.flatten(1), *rows[1:], G, trim),)
    else:
        found["topk"] = lambda: (affine_topk(pred_BHW.flatten(1), *rows[1:], G, trim),)
    found[OURS] = lambda: library("auto")
    if G > 1:
        single = [(label_BHW == g).to(torch.uint8) for g in range(1, G + 1)]
        found[TWO_CALLS] = lambda: tuple(
            kernels.affine_invariant_loss(pred_BHW, target_BHW, one_BHW, 1, trim) for one_BHW in single
        )
    return pred_BHW, found


def _maps(case: Case, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Prediction, target and labels: smooth maps with noise, holes, and a rectangle from another image."""
    g = torch.Generator().manual_seed(1)
    coarse = torch.rand(case.batch, 1, 9, 9, generator=g).to(device)
    target_BHW = F.interpolate(coarse, size=(SIDE, SIDE), mode="bilinear", align_corners=True)[:, 0]
    noise = torch.randn(case.batch, SIDE, SIDE, generator=g).to(device)
    pred_BHW = (3.0 * target_BHW + 0.2 * noise + 5.0).to(case.dtype).requires_grad_()
    label_BHW = torch.ones(case.batch, SIDE, SIDE, dtype=torch.uint8, device=device)
    if case.regions == 2:
        label_BHW[:, 100:400, 60:430] = 2
    holes = torch.rand(case.batch, SIDE, SIDE, generator=g).to(device) < HOLES
    return pred_BHW, target_BHW.to(case.dtype).contiguous(), label_BHW.masked_fill_(holes, 0)


def affine_eager(pred_BP: Tensor, target_BP: Tensor, label_BP: Tensor, num_regions: int, trim: float) -> Tensor:
    """What one writes first: boolean indexing, torch.median and sort, sample by sample."""
    losses = []
    for b in range(len(pred_BP)):
        for g in range(1, num_regions + 1):
            mask_P = label_BP[b] == g
            maps = [x_P[mask_P] - x_P[mask_P].median() for x_P in (pred_BP[b], target_BP[b])]
            residual = (maps[0] / maps[0].abs().mean() - maps[1] / maps[1].abs().mean()).abs()
            if trim:
                residual = residual.sort().values[: len(residual) - int(trim * len(residual))]
            losses.append(residual.mean())
    return torch.stack(losses).view(-1, num_regions)


def affine_where(pred_BP: Tensor, target_BP: Tensor, label_BP: Tensor, num_regions: int, trim: float) -> Tensor:
    """The same for a compiler: no shape depends on data."""
    losses = []
    for g in range(1, num_regions + 1):
        mask_BP = label_BP == g
        count_B1 = mask_BP.sum(1, keepdim=True)
        medians = [torch.where(mask_BP, x, torch.nan).nanmedian(1, keepdim=True).values for x in (pred_BP, target_BP)]
        residual_BP = _residual(pred_BP, target_BP, mask_BP, count_B1, *medians)
        if trim:
            sorted_BP = torch.where(mask_BP, residual_BP, torch.inf).sort(1).values
            kept_B1 = count_B1 - (trim * count_B1).long()
            inside_BP = torch.arange(pred_BP.shape[1], device=pred_BP.device) < kept_B1
            losses.append((torch.where(inside_BP, sorted_BP, 0.0).sum(1, keepdim=True) / kept_B1)[:, 0])
        else:
            losses.append((torch.where(mask_BP, residual_BP, 0.0).sum(1, keepdim=True) / count_B1)[:, 0])
    return torch.stack(losses, 1)


def affine_topk(pred_BP: Tensor, target_BP: Tensor, label_BP: Tensor, num_regions: int, trim: float) -> Tensor:
    """The best of stock PyTorch that we know: one topk for the medians of both maps and all regions."""
    P = pred_BP.shape[1]
    masks = [label_BP == g for g in range(1, num_regions + 1)]
    mask_RP, stack_RP = torch.cat(masks * 2), torch.cat([pred_BP] * num_regions + [target_BP] * num_regions)
    with torch.no_grad():
        # As many of the other pixels below as make the median of a region the median of its row.
        below_R1 = (P - 1) // 2 - (mask_RP.sum(1, keepdim=True) - 1) // 2
        outside_RP = torch.where((~mask_RP).cumsum(1) <= below_R1, -torch.inf, torch.inf)
        values, indices = torch.where(mask_RP, stack_RP, outside_RP).topk((P - 1) // 2 + 1, largest=False, sorted=False)
        index_R1 = indices.gather(1, values.argmax(1, keepdim=True))
    losses = []
    for g, index_2B1 in enumerate(index_R1.view(2, num_regions, -1, 1).unbind(1)):
        mask_BP, count_B1 = masks[g], masks[g].sum(1, keepdim=True)
        medians = pred_BP.gather(1, index_2B1[0]), target_BP.gather(1, index_2B1[1])
        residual_BP = _residual(pred_BP, target_BP, mask_BP, count_B1, *medians)
        if trim:
            dropped_B1 = (trim * count_B1).long()
            with torch.no_grad():
                largest = torch.where(mask_BP, residual_BP, -1.0).topk(int(trim * P) + 1, sorted=True).values
            mask_BP = mask_BP & (residual_BP <= largest.gather(1, dropped_B1))
            count_B1 = count_B1 - dropped_B1
        losses.append((torch.where(mask_BP, residual_BP, 0.0).sum(1, keepdim=True) / count_B1)[:, 0])
    return torch.stack(losses, 1)


def _residual(
    pred_BP: Tensor, target_BP: Tensor, mask_BP: Tensor, count_B1: Tensor, median_B1: Tensor, target_median_B1: Tensor
) -> Tensor:
    hats = []
    for x_BP, t_B1 in ((pred_BP, median_B1), (target_BP, target_median_B1)):
        shifted_BP = x_BP.float() - t_B1
        hats.append(shifted_BP / (torch.where(mask_BP, shifted_BP.abs(), 0.0).sum(1, keepdim=True) / count_B1))
    return (hats[0] - hats[1]).abs()


# --- K2 -----------------------------------------------------------------------------------------------------------


def _cosine(case: Case, device: str, compiled: bool) -> tuple[Tensor, dict[str, Provider]]:
    g = torch.Generator().manual_seed(1)
    shape = case.batch, TOKENS, case.width
    frozen_BND, noise_BND = (torch.randn(shape, generator=g).to(device) for _ in range(2))
    # A quarter of noise is a cosine of 0.97; noise alone one near 0.
    near_BN1 = torch.rand(case.batch, TOKENS, 1, generator=g).to(device) >= case.kept
    student_BND = torch.where(near_BN1, frozen_BND + 0.25 * noise_BND, noise_BND).to(case.dtype).requires_grad_()
    frozen_BND = frozen_BND.to(case.dtype)

    def library(backend: str) -> Outputs:
        loss = kernels.cosine_margin_loss
        return loss(student_BND, frozen_BND, ALPHA, reduction="sum_count", backend=backend)[:1]

    found: dict[str, Provider] = {"reference": lambda: library("reference")}
    found["eager"] = lambda: (cosine_eager(student_BND, frozen_BND),)
    if compiled:
        where = torch.compile(cosine_where, dynamic=False)
        found["torch.compile"] = lambda: where(student_BND, frozen_BND)[:1]
    found[OURS] = lambda: library("auto")
    return student_BND, found


def cosine_eager(student_BND: Tensor, frozen_BND: Tensor) -> Tensor:
    """What one writes first: cosine_similarity and boolean indexing, in the features' own dtype."""
    cos_BN = F.cosine_similarity(student_BND, frozen_BND, dim=-1)
    return (1.0 - cos_BN[cos_BN <= ALPHA]).sum()


def cosine_where(student_BND: Tensor, frozen_BND: Tensor) -> Outputs:
    """The same for a compiler, in float32: per sample the sum and the number of kept tokens."""
    cos_BN = F.cosine_similarity(student_BND.float(), frozen_BND.float(), dim=-1)
    keep_BN = cos_BN <= ALPHA
    return torch.where(keep_BN, 1.0 - cos_BN, 0.0).sum(1), keep_BN.sum(1)
