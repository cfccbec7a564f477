"""Public loss operators: arguments are checked here, then a backend computes.

Only the backend "reference" (`kernels.reference`, the specification) is offered so far; "auto" chooses it.

Shape suffixes: B batch, H W pixels, G regions, N tokens, D width.
"""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from kernels import reference

BACKENDS = ("reference",)
MAX_REGIONS = 255


def affine_invariant_loss(
    pred_BHW: Tensor,
    target_BHW: Tensor,
    region_BHW: Tensor | None = None,
    num_regions: int = 1,
    trim: float = 0.0,
    target_stats: tuple[Tensor, Tensor] | None = None,
    backend: str = "auto",
) -> Tensor:
    """Mean absolute difference of two disparity maps after each lost its own shift and scale, per sample and region.

    loss[b, g] = mean |(p - t(p)) / s(p) - (d - t(d)) / s(d)| over the pixels of region g of sample b, where t is the
    median (the lower one of an even number) and s the mean absolute deviation from it, both over that same region.
    So the loss does not change when prediction or target are scaled by a positive factor and shifted.

    Args:
        pred_BHW: predicted disparity, any unit; float16, bfloat16, float32 or float64.
        target_BHW: target disparity, same shape, any unit. A constant: it receives no gradient.
        region_BHW: uint8 labels, 0 invalid, 1..num_regions the region; bool is read as labels 0 and 1. Pixels labelled
            0 have no influence, whatever they hold. None: every pixel is in region 1.
        num_regions: G, 1 to 255. CutMix makes two.
        trim: fraction of the pixels of each region, in [0, 1), that is left out: those floor(trim * n) with the largest
            residuals; t and s still see all pixels. Ties at the threshold share what is kept of them. The mean is over
            the kept pixels (MiDaS divides by all of them instead). Counted in millionths.
        target_stats: (t_BG, s_BG) of the target, as `region_median_mad` returns them; constants.
        backend: "auto" or "reference".

    Returns:
        loss_BG, float32 (float64 if an input is). An empty region gives loss 0 and gradient 0; so does a degenerate one
        (s of prediction or target below 1e-6 * max(|t|, 1)). A NaN or infinite value inside a region gives a loss that
        is not finite, whatever is trimmed. Pixels tied with the median share its gradient evenly.

    Raises:
        ValueError: shapes, dtypes, devices, labels, trim or backend are not as above.

    Source: Depth Anything V1 (arXiv 2401.10891), eq. 1-3, regions eq. 5-8; trimming: V2 (arXiv 2406.09414), sec. 5.2.
    """
    _check_backend(backend)
    _check_maps(region_BHW, num_regions, pred_BHW=pred_BHW, target_BHW=target_BHW)
    if not 0.0 <= trim < 1.0:
        raise ValueError(f"trim must be in [0, 1), got {trim}")
    if target_stats is not None:
        _check_target_stats(target_stats, (pred_BHW.shape[0], num_regions), pred_BHW.device)
    return reference.affine_invariant_loss(pred_BHW, target_BHW, region_BHW, num_regions, trim, target_stats)


def region_median_mad(
    x_BHW: Tensor, region_BHW: Tensor | None = None, num_regions: int = 1, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Exact median and mean absolute deviation from it, per sample and region: t and s of `affine_invariant_loss`.

    Args:
        x_BHW: a map in any unit; float16, bfloat16, float32 or float64.
        region_BHW, num_regions, backend: as in `affine_invariant_loss`.

    Returns:
        (median_BG, mad_BG), in the unit of x, float32 (float64 if x is), differentiable. The median of an even number
        of values is the lower one, as in torch. An empty region gives (0, 0); one that holds NaN gives NaN.

    Raises:
        ValueError: shapes, dtypes, devices, labels or backend are not as above.

    Source: Depth Anything V1 (arXiv 2401.10891), eq. 2.
    """
    _check_backend(backend)
    _check_maps(region_BHW, num_regions, x_BHW=x_BHW)
    return reference.region_median_mad(x_BHW, region_BHW, num_regions)


@overload
def cosine_margin_loss(
    student_BND: Tensor,
    frozen_BND: Tensor,
    alpha: float = ...,
    token_mask_BN: Tensor | None = ...,
    reduction: Literal["mean"] = ...,
    backend: str = ...,
) -> Tensor: ...


@overload
def cosine_margin_loss(
    student_BND: Tensor,
    frozen_BND: Tensor,
    alpha: float = ...,
    token_mask_BN: Tensor | None = ...,
    *,
    reduction: Literal["sum_count"],
    backend: str = ...,
) -> tuple[Tensor, Tensor]: ...


def cosine_margin_loss(
    student_BND: Tensor,
    frozen_BND: Tensor,
    alpha: float = 0.85,
    token_mask_BN: Tensor | None = None,
    reduction: Literal["mean", "sum_count"] = "mean",
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Pull a student's features towards a frozen encoder's, but leave alone the tokens that are close enough.

    1 - cos(student, frozen) over the tokens whose cosine is not above alpha; alpha 1 keeps every token.

    Args:
        student_BND: features of the student; float16, bfloat16, float32 or float64.
        frozen_BND: features of the frozen encoder, same shape. A constant: it receives no gradient.
        alpha: the margin, in (-1, 1].
        token_mask_BN: bool, True for tokens to look at; the others have no influence, whatever they hold. None: all.
        reduction: "mean" is over all kept tokens of the call (0 if none is kept); "sum_count" leaves the division to
            the caller, who knows the other ranks.
        backend: "auto" or "reference".

    Returns:
        "mean": a scalar. "sum_count": (sum_B, count_B), per sample. float32 (float64 if an input is). A token whose
        feature is shorter than 1e-6 on either side has no direction and is not counted. NaN gives NaN.

    Raises:
        ValueError: shapes, dtypes, devices, alpha, reduction or backend are not as above.

    Source: Depth Anything V1 (arXiv 2401.10891), eq. 9, read as its author corrects it (repository, issue 80).
    """
    _check_backend(backend)
    _check_floating(3, "[B, N, D]", student_BND=student_BND, frozen_BND=frozen_BND)
    if not -1.0 < alpha <= 1.0:
        raise ValueError(f"alpha must be in (-1, 1], got {alpha}")
    if reduction not in ("mean", "sum_count"):
        raise ValueError(f"reduction must be 'mean' or 'sum_count', got {reduction!r}")
    if token_mask_BN is not None:
        wanted = (torch.bool, student_BND.shape[:2], student_BND.device)
        _check_like("token_mask_BN", token_mask_BN, wanted)
    sum_B, count_B = reference.cosine_margin_loss(student_BND, frozen_BND, alpha, token_mask_BN)
    if reduction == "sum_count":
        return sum_B, count_B
    return sum_B.sum() / count_B.sum().clamp(min=1.0)


def _check_backend(backend: str) -> None:
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(
            f"backend {backend!r} is not available here; available: 'auto', {', '.join(map(repr, BACKENDS))}"
        )


def _check_maps(region_BHW: Tensor | None, num_regions: int, **maps: Tensor) -> None:
    _check_floating(3, "[B, H, W]", **maps)
    if not 1 <= num_regions <= MAX_REGIONS:
        raise ValueError(f"num_regions must be in 1..{MAX_REGIONS}, got {num_regions}")
    if region_BHW is None:
        return
    first = next(iter(maps.values()))
    dtype = torch.bool if region_BHW.dtype == torch.bool else torch.uint8
    _check_like("region_BHW", region_BHW, (dtype, first.shape, first.device))
    if region_BHW.numel() and int(region_BHW.max()) > num_regions:
        raise ValueError(f"region_BHW holds label {int(region_BHW.max())}, but num_regions is {num_regions}")


def _check_target_stats(stats: tuple[Tensor, Tensor], shape: tuple[int, int], device: torch.device) -> None:
    if len(stats) != 2:
        raise ValueError(f"target_stats must be (median_BG, mad_BG), got {len(stats)} values")
    for name, value in zip(("median_BG", "mad_BG"), stats, strict=True):
        if not value.is_floating_point():
            raise ValueError(f"target_stats: {name} must be floating point, got {value.dtype}")
        _check_like(f"target_stats: {name}", value, (value.dtype, torch.Size(shape), device))


def _check_floating(ndim: int, layout: str, **tensors: Tensor) -> None:
    """All are floating-point tensors of this layout, of one shape and on one device."""
    found = ", ".join(f"{name} {tuple(t.shape)} {t.dtype} {t.device}" for name, t in tensors.items())
    if any(t.ndim != ndim for t in tensors.values()) or len({t.shape for t in tensors.values()}) > 1:
        raise ValueError(f"expected one shape {layout}, got {found}")
    if not all(t.is_floating_point() for t in tensors.values()):
        raise ValueError(f"expected floating-point tensors, got {found}")
    if len({t.device for t in tensors.values()}) > 1:
        raise ValueError(f"expected one device, got {found}")


def _check_like(name: str, tensor: Tensor, wanted: tuple[torch.dtype, torch.Size, torch.device]) -> None:
    dtype, shape, device = wanted
    if (tensor.dtype, tensor.shape, tensor.device) != wanted:
        found = f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
        raise ValueError(f"{name} must be {dtype} {tuple(shape)} on {device}, got {found}")
