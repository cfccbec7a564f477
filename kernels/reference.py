"""The specification of the loss operators: plain PyTorch, differentiated by autograd. Faster backends must agree.

Affine-invariant loss: Depth Anything V1 (arXiv 2401.10891), eq. 1-3 and, per region of a CutMix image, eq. 5-8;
trimming: Depth Anything V2 (arXiv 2406.09414), section 5.2. Cosine margin: V1, eq. 9.
Arguments are checked in `kernels.api`, not here. Everything is computed in at least float32.

Shape suffixes: B batch, H W pixels, P pixels of one sample, K pixels of one region, G regions, N tokens, D width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

SCALE_FLOOR = 1e-6  # a scale below SCALE_FLOOR * max(|median|, 1) is no scale: its inverse would be the gradient
NORM_FLOOR = 1e-6  # a feature shorter than this has no direction
TRIM_UNITS = 1_000_000  # trim is counted in millionths: integers, so that every backend drops the same pixels


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """What is computed with and returned: float64 if any tensor is, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def check_labels(region: Tensor | None, num_regions: int) -> None:
    """ValueError for a label above `num_regions`. Looks at all of them: on a GPU that would mean waiting."""
    if region is not None and region.numel() and int(region.max()) > num_regions:
        raise ValueError(f"region_BHW holds label {int(region.max())}, but num_regions is {num_regions}")


def is_degenerate(median: float, mad: float) -> bool:
    """True if this mean absolute deviation is too small to be a scale. False for NaN."""
    return mad < SCALE_FLOOR * max(abs(median), 1.0)


def trim_units(trim: float) -> int:
    """The fraction in millionths."""
    return min(round(trim * TRIM_UNITS), TRIM_UNITS - 1)


def trimmed_count(count: int, trim: float) -> int:
    """How many of `count` residuals trimming drops: floor(trim * count), never all of them."""
    return count * trim_units(trim) // TRIM_UNITS


def region_median_mad(x_BHW: Tensor, region_BHW: Tensor | None, num_regions: int) -> tuple[Tensor, Tensor]:
    """See `kernels.api.region_median_mad`."""
    x_BP = x_BHW.to(compute_dtype(x_BHW)).flatten(1)
    if x_BP.shape[0] == 0:
        return _no_samples(x_BHW, num_regions), _no_samples(x_BHW, num_regions)
    stats = []
    for x_P, regions in zip(x_BP.unbind(0), _region_pixels(region_BHW, x_BP, num_regions), strict=True):
        for pixels_K in regions:
            stats.append(torch.stack(_median_mad(_select(x_P, pixels_K))))
    stats_BG2 = torch.stack(stats).view(-1, num_regions, 2)
    return stats_BG2[..., 0], stats_BG2[..., 1]


def affine_invariant_loss(
    pred_BHW: Tensor,
    target_BHW: Tensor,
    region_BHW: Tensor | None,
    num_regions: int,
    trim: float,
    target_stats: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """See `kernels.api.affine_invariant_loss`."""
    dtype = compute_dtype(pred_BHW, target_BHW)
    pred_BP = pred_BHW.to(dtype).flatten(1)
    target_BP = target_BHW.detach().to(dtype).flatten(1)
    if pred_BP.shape[0] == 0:
        return _no_samples(pred_BP, num_regions)
    losses = []
    # unbind, not indexing: the backward of pred_BP[b] would fill a whole [B, P] tensor for every sample.
    rows = zip(pred_BP.unbind(0), target_BP.unbind(0), _region_pixels(region_BHW, pred_BP, num_regions), strict=True)
    for b, (pred_P, target_P, regions) in enumerate(rows):
        for g, pixels_K in enumerate(regions):
            target_K = _select(target_P, pixels_K)
            if target_stats is None:
                stats = _median_mad(target_K)
            else:
                stats = (target_stats[0][b, g].detach().to(dtype), target_stats[1][b, g].detach().to(dtype))
            losses.append(_region_loss(_select(pred_P, pixels_K), target_K, stats, trim))
    return torch.stack(losses).view(-1, num_regions)


def _region_loss(pred_K: Tensor, target_K: Tensor, target_stats: tuple[Tensor, Tensor], trim: float) -> Tensor:
    """Mean |pred^ - target^| over the kept pixels of one region, where x^ = (x - median(x)) / scale(x). A scalar."""
    if pred_K.numel() == 0:
        return pred_K.sum()
    pred_hat_K, pred_degenerate = _normalised(pred_K, *_median_mad(pred_K))
    target_hat_K, target_degenerate = _normalised(target_K, *target_stats)
    residual_K = (pred_hat_K - target_hat_K).abs()
    mean = residual_K.mean()
    if not math.isfinite(mean.item()):
        return mean  # before trimming and the floor, either of which could hide it
    if pred_degenerate or target_degenerate:
        return (pred_K * 0).sum()  # 0, and exactly 0 for every pixel in backward
    return mean if trim == 0 else _trimmed_mean(residual_K, trim)


def _median_mad(x_K: Tensor) -> tuple[Tensor, Tensor]:
    """Lower median and mean absolute deviation from it; (0, 0) for no pixel. Scalars."""
    if x_K.numel() == 0:
        zero = x_K.sum()
        return zero, zero
    # median() without a dimension: its gradient is shared evenly among ties; median(dim) gives all to one of them.
    # + 0.0 makes -0 and +0 the same bits, whichever of them the selection meets first.
    median = x_K.median() + 0.0
    return median, (x_K - median).abs().mean()


def _normalised(x_K: Tensor, median: Tensor, mad: Tensor) -> tuple[Tensor, bool]:
    """(x - median) / mad, or x - median if the mad is no scale; and which of the two it is."""
    degenerate = is_degenerate(median.item(), mad.item())
    return (x_K - median if degenerate else (x_K - median) / mad), degenerate


def _trimmed_mean(residual_K: Tensor, trim: float) -> Tensor:
    """Mean of residual_K without its largest; equal residuals at the threshold share what is kept of them."""
    count = residual_K.numel()
    kept = count - trimmed_count(count, trim)
    threshold = residual_K.detach().kthvalue(kept).values
    below_K, equal_K = residual_K < threshold, residual_K == threshold
    share = (kept - below_K.sum()).to(residual_K.dtype) / equal_K.sum()
    weight_K = torch.where(equal_K, share, below_K.to(residual_K.dtype))
    return (residual_K * weight_K).sum() / kept


def _region_pixels(region_BHW: Tensor | None, like_BP: Tensor, num_regions: int) -> list[list[Tensor | None]]:
    """For each sample the pixel indices of each region, K of P; None stands for every pixel."""
    if region_BHW is None:
        # Without labels every pixel is in region 1; further regions are empty.
        empty_K = torch.empty(0, dtype=torch.int64, device=like_BP.device)
        return [[None] + [empty_K] * (num_regions - 1)] * like_BP.shape[0]
    labels = region_BHW.flatten(1).unbind(0)
    return [[(label_P == g).nonzero().squeeze(1) for g in range(1, num_regions + 1)] for label_P in labels]


def _select(x_P: Tensor, pixels_K: Tensor | None) -> Tensor:
    return x_P if pixels_K is None else x_P.index_select(0, pixels_K)


def _no_samples(x: Tensor, num_regions: int) -> Tensor:
    """[0, G], attached to the graph of a batch of no samples."""
    return x.to(compute_dtype(x)).flatten(1).sum(1, keepdim=True).expand(-1, num_regions)


def cosine_margin_loss(
    student_BND: Tensor, frozen_BND: Tensor, alpha: float, token_mask_BN: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Per sample, the sum of 1 - cos over the kept tokens and their number: ([B], [B]). See `kernels.api`."""
    dtype = compute_dtype(student_BND, frozen_BND)
    student_BND, frozen_BND = student_BND.to(dtype), frozen_BND.detach().to(dtype)
    with torch.no_grad():
        # Comparisons are written so that NaN is kept: a network that diverged must show.
        short_BN = (student_BND.norm(dim=-1) < NORM_FLOOR) | (frozen_BND.norm(dim=-1) < NORM_FLOOR)
        usable_BN = ~short_BN if token_mask_BN is None else token_mask_BN & ~short_BN
    # This where() stands before the division, so that no NaN of an unusable token flows back into the student.
    student_BND = torch.where(usable_BN[..., None], student_BND, 1.0)
    norms_BN = student_BND.norm(dim=-1) * frozen_BND.norm(dim=-1)
    # Rounding must not decide which parallel tokens count when alpha is 1: hence the clamp.
    cos_BN = ((student_BND * frozen_BND).sum(-1) / norms_BN).clamp(max=1.0)
    keep_BN = usable_BN & ~(cos_BN > alpha)
    return torch.where(keep_BN, 1.0 - cos_BN, 0.0).sum(1), keep_BN.sum(1).to(dtype)
