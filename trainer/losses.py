"""Per-image losses, so that a batch can be cut in any way: fused kernels, and plain PyTorch where those cost nothing.

All compute in at least float32 and give 0, with gradient 0, for an image without a valid pixel. A value that is not
finite shows in the loss of its image. Shape suffixes: B batch, H W pixels, G regions, N tokens, D width.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from kernels import affine_invariant_loss, cosine_margin_loss, region_median_mad
from kernels.reference import SCALE_FLOOR

Normalisation = Literal["mad", "lsq"]  # median and mean absolute deviation of either map, or least squares
DEPTH_FLOOR = 1e-6  # metres, or whatever the unit: a sigmoid may say 0, whose logarithm no optimizer survives


def regional_affine_invariant_loss(
    pred_BHW: Tensor, target_BHW: Tensor, region_BHW: Tensor, num_regions: int, trim: float = 0.0
) -> Tensor:
    """Affine-invariant loss of each image, its regions weighted by their share of the valid pixels: [B].

    With one region this is equation 1 of arXiv 2401.10891; with CutMix's two regions, each normalised by its own median
    and deviation, equations 6 to 8. The paper weighs regions by area; with holes the area that counts is the valid one.

    `trim`: fraction of every region's pixels, those with the largest residuals, that is left out: 0.1 for the
    pseudo-labels of Depth Anything V2 (arXiv 2406.09414, section 5.2). There it is a tenth of an image, and nothing is
    said of CutMix; that each region loses its tenth is our choice. See `kernels.affine_invariant_loss`.
    """
    loss_BG = affine_invariant_loss(pred_BHW, target_BHW, region_BHW, num_regions=num_regions, trim=trim)
    labels_G = torch.arange(1, num_regions + 1, device=region_BHW.device, dtype=region_BHW.dtype)
    area_BG = (region_BHW.flatten(1).unsqueeze(-1) == labels_G).sum(1).to(loss_BG.dtype)
    share_BG = area_BG / area_BG.sum(1, keepdim=True).clamp(min=1)
    return (share_BG * loss_BG).sum(1)


def regional_least_squares_loss(pred_BHW: Tensor, target_BHW: Tensor, region_BHW: Tensor, num_regions: int) -> Tensor:
    """Half the mean squared error of each image after the scale and shift that make it smallest, by region: [B].

    sum (s p + t - d)^2 / (2 M) over the M valid pixels, with the closed-form least-squares s and t of each region:
    MiDaS's scale- and shift-invariant MSE (arXiv 1907.01341, section 5). Its own code divides by the pixels of a batch;
    here, by those of an image.

    The prediction may have any scale, even a negative one, and any shift; the loss is in the target's unit, squared. A
    region whose prediction is constant has no scale: its loss is half the target's variance and its gradient 0. One or
    two pixels are always met exactly.

    Args:
        pred_BHW, target_BHW: disparity; the target is a constant.
        region_BHW: uint8 labels, 0 invalid, 1..num_regions.
    """
    residual_BHW = _least_squares_residual(pred_BHW, target_BHW.detach(), region_BHW, num_regions)
    count_B = (region_BHW > 0).sum((1, 2)).clamp(min=1)
    return residual_BHW.square().sum((1, 2)) / (2 * count_B)


def feature_alignment_loss(student_BND: Tensor, frozen_BND: Tensor, alpha: float) -> Tensor:
    """Mean of 1 - cos over an image's tokens whose cosine with the frozen encoder is below alpha: [B].

    Equation 9 of arXiv 2401.10891; an image whose tokens are all kept close has loss 0.
    """
    sum_B, count_B = cosine_margin_loss(_wide(student_BND), _wide(frozen_BND), alpha=alpha, reduction="sum_count")
    return sum_B / count_B.clamp(min=1)


def gradient_matching_loss(
    pred_BHW: Tensor,
    target_BHW: Tensor,
    region_BHW: Tensor,
    num_regions: int = 1,
    scales: int = 4,
    normalisation: Normalisation = "mad",
) -> Tensor:
    """How much the differences between neighbours differ, at several scales, of each image: [B].

    With R the difference of the two maps, the sum over k < scales of  (sum |dR/dx| + |dR/dy|) / (number of valid
    pixels)  on every 2^k-th pixel of every 2^k-th row. Neighbours count where both are valid and of one region. MiDaS's
    multi-scale gradient loss (arXiv 1907.01341, eq. 11; its code divides by the pixels left at each scale), as Depth
    Anything V2 uses it (arXiv 2406.09414, section 7.1). Of what V2 leaves open we choose the normalisation "mad", four
    scales as MiDaS, and the mean per image.

    Args:
        pred_BHW, target_BHW: disparity, any unit; the target is a constant.
        region_BHW: uint8 labels, 0 invalid, 1..num_regions.
        scales: how often the map is halved, itself included.
        normalisation: "mad": either map less its median and divided by its mean absolute deviation in its region, where
            a region without a scale takes no part (see `kernels.api`). "lsq": the prediction with the least-squares
            scale and shift of its region (MiDaS).
    """
    if normalisation == "mad":
        residual_BHW, label_BHW = _mad_residual(pred_BHW, target_BHW, region_BHW, num_regions)
    else:
        residual_BHW = _least_squares_residual(pred_BHW, target_BHW.detach(), region_BHW, num_regions)
        label_BHW = region_BHW
    loss_B = residual_BHW.new_zeros(len(residual_BHW))
    for k in range(scales):
        r_BHW, l_BHW = (x_BHW[:, :: 2**k, :: 2**k] for x_BHW in (residual_BHW, label_BHW))
        count_B = (l_BHW > 0).sum((1, 2)).clamp(min=1)
        for dim in (1, 2):
            size = r_BHW.shape[dim] - 1
            step_BHW = (r_BHW.narrow(dim, 1, size) - r_BHW.narrow(dim, 0, size)).abs()
            l0_BHW, l1_BHW = l_BHW.narrow(dim, 0, size), l_BHW.narrow(dim, 1, size)
            inside_BHW = (l0_BHW == l1_BHW) & (l0_BHW > 0)
            loss_B = loss_B + torch.where(inside_BHW, step_BHW, 0.0).sum((1, 2)) / count_B
    return loss_B


def silog_loss(pred_BHW: Tensor, target_BHW: Tensor, valid_BHW: Tensor, mean_weight: float = 0.5) -> Tensor:
    """Scale-invariant logarithmic loss of each image: [B].

    sqrt(mean d^2 - mean_weight * (mean d)^2), d = ln target - ln pred, over the valid pixels: Eigen et al. (arXiv
    1406.2283, eq. 4), with the root that Depth Anything V2's metric training takes. There the mean is over the pixels
    of a batch; here it is over those of an image, so that batches can be cut.

    Args:
        pred_BHW, target_BHW: depth in one unit, positive where valid; the target is a constant.
        valid_BHW: bool.

    An image that is met exactly has loss 0 and gradient 0 as well.
    """
    pred_BHW = torch.where(valid_BHW, _wide(pred_BHW), 1.0).clamp(min=DEPTH_FLOOR)
    target_BHW = torch.where(valid_BHW, _wide(target_BHW.detach()), 1.0)
    d_BHW = target_BHW.log() - pred_BHW.log()
    count_B = valid_BHW.sum((1, 2)).clamp(min=1)
    mean_B = d_BHW.sum((1, 2)) / count_B
    # By deviations from the mean: the difference of two nearly equal squares would be rounding.
    spread_B = torch.where(valid_BHW, d_BHW - mean_B[:, None, None], 0.0).square().sum((1, 2)) / count_B
    inside_B = spread_B + (1 - mean_weight) * mean_B.square()
    met_B = inside_B == 0  # where the root has no slope
    return torch.where(met_B, 0.0, torch.where(met_B, 1.0, inside_B).sqrt())


def _wide(x: Tensor) -> Tensor:
    """At least float32: what losses are computed in."""
    return x if x.dtype == torch.float64 else x.float()


def _least_squares_residual(pred_BHW: Tensor, target_BHW: Tensor, region_BHW: Tensor, num_regions: int) -> Tensor:
    """s p + t - d with the s and t of each region that make its square smallest; 0 at invalid pixels.

    The solution of the 2 x 2 normal equations, written with deviations from the means: s = cov(p, d) / var(p),
    t = mean(d) - s mean(p). A constant p (standard deviation below SCALE_FLOOR * max(|mean|, 1)) has s = 0.
    """
    pred_BHW, target_BHW = _wide(pred_BHW), _wide(target_BHW)
    residual_BHW = torch.zeros_like(pred_BHW)
    for g in range(1, num_regions + 1):
        inside_BHW = region_BHW == g
        count_B = inside_BHW.sum((1, 2)).clamp(min=1)
        p_BHW, p_mean_B = _centred(pred_BHW, inside_BHW, count_B)
        d_BHW, _ = _centred(target_BHW, inside_BHW, count_B)
        variance_B = p_BHW.square().sum((1, 2)) / count_B
        flat_B = variance_B <= (SCALE_FLOOR * p_mean_B.abs().clamp(min=1.0)).square()  # not of NaN, which has to show
        covariance_B = (p_BHW * d_BHW).sum((1, 2)) / count_B
        s_B = torch.where(flat_B, 0.0, covariance_B) / torch.where(flat_B, 1.0, variance_B)
        residual_BHW = torch.where(inside_BHW, s_B[:, None, None] * p_BHW - d_BHW, residual_BHW)
    return residual_BHW


def _centred(x_BHW: Tensor, inside_BHW: Tensor, count_B: Tensor) -> tuple[Tensor, Tensor]:
    """x less its mean over the pixels inside, 0 elsewhere; and the mean: [B]."""
    x_BHW = torch.where(inside_BHW, x_BHW, 0.0)
    mean_B = x_BHW.sum((1, 2)) / count_B
    return torch.where(inside_BHW, x_BHW - mean_B[:, None, None], 0.0), mean_B


def _mad_residual(pred_BHW: Tensor, target_BHW: Tensor, region_BHW: Tensor, num_regions: int) -> tuple[Tensor, Tensor]:
    """Difference of the two normalised maps, 0 where a region has no scale in either; and the labels that are left."""
    pred_BHW, known_BG = _normalised(pred_BHW, region_BHW, num_regions)
    with torch.no_grad():
        target_BHW, target_known_BG = _normalised(target_BHW, region_BHW, num_regions)
    label_BHW = torch.zeros_like(region_BHW)
    for g, usable_B in enumerate((known_BG & target_known_BG).unbind(1), start=1):
        label_BHW = torch.where((region_BHW == g) & usable_B[:, None, None], region_BHW, label_BHW)
    return torch.where(label_BHW > 0, pred_BHW - target_BHW, 0.0), label_BHW


def _normalised(x_BHW: Tensor, region_BHW: Tensor, num_regions: int) -> tuple[Tensor, Tensor]:
    """(x - median) / deviation of each pixel's region, 0 where it has none; and which regions have a scale: [B, G]."""
    x_BHW = torch.where(region_BHW > 0, _wide(x_BHW), 0.0)
    median_BG, mad_BG = region_median_mad(x_BHW, region_BHW, num_regions)
    known_BG = ~(mad_BG < SCALE_FLOOR * median_BG.abs().clamp(min=1.0))  # NaN is known: it has to show
    scale_BG = torch.where(known_BG, mad_BG, 1.0)
    hat_BHW = torch.zeros_like(x_BHW)
    for g in range(num_regions):
        t_B11, s_B11 = median_BG[:, g, None, None], scale_BG[:, g, None, None]
        hat_BHW = torch.where(region_BHW == g + 1, (x_BHW - t_B11) / s_B11, hat_BHW)
    return hat_BHW, known_BG
