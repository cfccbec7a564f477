"""Per-image losses made of the fused kernels. Shape suffixes: B batch, H W pixels, G regions, N tokens, D width."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import affine_invariant_loss, cosine_margin_loss


def regional_affine_invariant_loss(
    pred_BHW: Tensor, target_BHW: Tensor, region_BHW: Tensor, num_regions: int
) -> Tensor:
    """Affine-invariant loss of each image, its regions weighted by their share of the valid pixels: [B].

    With one region this is equation 1 of arXiv 2401.10891; with CutMix's two regions, each normalised by its own median
    and deviation, equations 6 to 8. The paper weighs regions by area; with holes the area that counts is the valid one.
    An image without a valid pixel has loss 0.
    """
    loss_BG = affine_invariant_loss(pred_BHW, target_BHW, region_BHW, num_regions=num_regions)
    labels_G = torch.arange(1, num_regions + 1, device=region_BHW.device, dtype=region_BHW.dtype)
    area_BG = (region_BHW.flatten(1).unsqueeze(-1) == labels_G).sum(1).to(loss_BG.dtype)
    share_BG = area_BG / area_BG.sum(1, keepdim=True).clamp(min=1)
    return (share_BG * loss_BG).sum(1)


def feature_alignment_loss(student_BND: Tensor, frozen_BND: Tensor, alpha: float) -> Tensor:
    """Mean of 1 - cos over an image's tokens whose cosine with the frozen encoder is below alpha: [B].

    Equation 9 of arXiv 2401.10891; an image whose tokens are all kept close has loss 0.
    """
    sum_B, count_B = cosine_margin_loss(student_BND, frozen_BND, alpha=alpha, reduction="sum_count")
    return sum_B / count_B.clamp(min=1)
