"""Public loss operators: arguments are checked here, then a backend computes.

Backends: "triton" for CUDA, "cpu" (NumPy), and "reference" (`kernels.reference`, plain PyTorch, the specification).
"auto" chooses by device: "triton" for CUDA, "cpu" for the CPU; "reference" for what the fused ones do not do: other
devices, more than eight regions, forward-mode differentiation, and on CUDA float64 or a machine without Triton. The
fused ones have no second derivatives: asked for those (create_graph=True) they raise RuntimeError.

Shape suffixes: B batch, H W pixels, G regions, N tokens, D width.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from typing import Literal, overload

import torch
from torch import Tensor
from torch.autograd import forward_ad

from kernels import reference
from kernels.codes import FUSED_REGIONS

BACKENDS = ("triton", "cpu", "reference")
MAX_REGIONS = 255
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_HAS_TRITON = importlib.util.find_spec("triton") is not None


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
        backend: "auto", "triton", "cpu" or "reference".

    Returns:
        loss_BG, float32 (float64 if an input is). An empty region gives loss 0 and gradient 0; so does a degenerate one
        (s of prediction or target below 1e-6 * max(|t|, 1)). A NaN or infinite value inside a region gives a loss that
        is not finite, whatever is trimmed. Pixels tied with the median share its gradient evenly.

    Raises:
        ValueError: shapes, dtypes, devices, labels, trim or backend are not as above. A label above num_regions is one
            too, but on CUDA, where looking would mean waiting: there the sample's losses are NaN.

    Source: Depth Anything V1 (arXiv 2401.10891), eq. 1-3, regions eq. 5-8; trimming: V2 (arXiv 2406.09414), sec. 5.2.
    """
    _check_maps(region_BHW, num_regions, pred_BHW=pred_BHW, target_BHW=target_BHW)
    if not 0.0 <= trim < 1.0:
        raise ValueError(f"trim must be in [0, 1), got {trim}")
    if target_stats is not None:
        _check_target_stats(target_stats, (pred_BHW.shape[0], num_regions), pred_BHW.device)
    backend = _choose(backend, num_regions, pred_BHW, target_BHW)
    if backend == "reference":
        reference.check_labels(region_BHW, num_regions)
        return reference.affine_invariant_loss(pred_BHW, target_BHW, region_BHW, num_regions, trim, target_stats)
    from kernels import ops

    dtype = reference.compute_dtype(pred_BHW, target_BHW)
    median_BG, mad_BG = (None, None) if target_stats is None else (s.detach().to(dtype) for s in target_stats)
    pred_BP, target_BP, label_BP = _rows(pred_BHW), _rows(target_BHW.detach()), _label_rows(region_BHW)
    loss_BG: Tensor = ops.affine_invariant(
        pred_BP, target_BP, label_BP, num_regions, float(trim), median_BG, mad_BG, backend
    )[0]
    return loss_BG


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
    _check_maps(region_BHW, num_regions, x_BHW=x_BHW)
    backend = _choose(backend, num_regions, x_BHW)
    if backend == "reference":
        reference.check_labels(region_BHW, num_regions)
        return reference.region_median_mad(x_BHW, region_BHW, num_regions)
    from kernels import ops

    median_BG, mad_BG, _, _ = ops.region_stats(_rows(x_BHW), _label_rows(region_BHW), num_regions, backend)
    return median_BG, mad_BG


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
        backend: "auto", "triton", "cpu" or "reference".

    Returns:
        "mean": a scalar. "sum_count": (sum_B, count_B), per sample. float32 (float64 if an input is). A token whose
        feature is shorter than 1e-6 on either side has no direction and is not counted. NaN gives NaN.

    Raises:
        ValueError: shapes, dtypes, devices, alpha, reduction or backend are not as above.

    Source: Depth Anything V1 (arXiv 2401.10891), eq. 9, read as its author corrects it (repository, issue 80).
    """
    _check_floating(3, "[B, N, D]", student_BND=student_BND, frozen_BND=frozen_BND)
    if not -1.0 < alpha <= 1.0:
        raise ValueError(f"alpha must be in (-1, 1], got {alpha}")
    if reduction not in ("mean", "sum_count"):
        raise ValueError(f"reduction must be 'mean' or 'sum_count', got {reduction!r}")
    if token_mask_BN is not None:
        wanted = (torch.bool, student_BND.shape[:2], student_BND.device)
        _check_like("token_mask_BN", token_mask_BN, wanted)
    backend = _choose(backend, 1, student_BND, frozen_BND)
    if backend == "reference":
        sum_B, count_B = reference.cosine_margin_loss(student_BND, frozen_BND, alpha, token_mask_BN)
    else:
        from kernels import ops

        sum_B, count_B, _ = ops.cosine_margin(student_BND, frozen_BND.detach(), float(alpha), token_mask_BN, backend)
    if reduction == "sum_count":
        return sum_B, count_B
    return sum_B.sum() / count_B.sum().clamp(min=1.0)


def _choose(backend: str, num_regions: int, *tensors: Tensor) -> str:
    """The backend to use. Raises ValueError for one that is unknown or cannot do this."""
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"backend is {backend!r}; there are 'auto', {', '.join(map(repr, BACKENDS))}")
    device = tensors[0].device.type
    problems = {
        "triton": _triton_problem(device, num_regions, tensors),
        "cpu": _fused_problem(num_regions) or (None if device in ("cpu", "meta") else f"the tensors are on {device}"),
        "reference": None,
    }
    if backend == "auto":
        return next(name for name in (("triton", "reference") if device == "cuda" else ("cpu", "reference"))
                    if problems[name] is None)  # fmt: skip
    if problems[backend] is not None:
        raise ValueError(f"backend {backend!r} cannot do this: {problems[backend]}; use 'auto'")
    return backend


def _fused_problem(num_regions: int) -> str | None:
    # Inside torch.func.jvp and the like: a custom operator would pass a tangent of 0 on, silently.
    if not torch.compiler.is_compiling() and getattr(forward_ad, "_current_level", -1) >= 0:
        return "forward-mode differentiation"
    return None if num_regions <= FUSED_REGIONS else f"num_regions is {num_regions}, at most {FUSED_REGIONS} here"


def _triton_problem(device: str, num_regions: int, tensors: tuple[Tensor, ...]) -> str | None:
    if not _HAS_TRITON:
        return "the package triton is not installed"
    if device not in ("cuda", "meta") and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the tensors are on {device}, not on a GPU"
    if any(t.dtype == torch.float64 for t in tensors):
        return "float64"
    return _fused_problem(num_regions)


def _rows(x_BHW: Tensor) -> Tensor:
    return x_BHW.flatten(1).contiguous()


def _label_rows(region_BHW: Tensor | None) -> Tensor | None:
    return None if region_BHW is None else _rows(region_BHW.to(torch.uint8))


def _check_maps(region_BHW: Tensor | None, num_regions: int, **maps: Tensor) -> None:
    _check_floating(3, "[B, H, W]", **maps)
    if not isinstance(num_regions, int) or not 1 <= num_regions <= MAX_REGIONS:
        raise ValueError(f"num_regions must be in 1..{MAX_REGIONS}, got {num_regions}")
    if region_BHW is None:
        return
    first = next(iter(maps.values()))
    dtype = torch.bool if region_BHW.dtype == torch.bool else torch.uint8
    _check_like("region_BHW", region_BHW, (dtype, first.shape, first.device))


def _check_target_stats(stats: tuple[Tensor, Tensor], shape: tuple[int, int], device: torch.device) -> None:
    if len(stats) != 2:
        raise ValueError(f"target_stats must be (median_BG, mad_BG), got {len(stats)} values")
    for name, value in zip(("median_BG", "mad_BG"), stats, strict=True):
        if not isinstance(value, Tensor) or not value.is_floating_point():
            found = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"target_stats: {name} must be floating point, got {found}")
        _check_like(f"target_stats: {name}", value, (value.dtype, torch.Size(shape), device))


def _check_floating(ndim: int, layout: str, **tensors: Tensor) -> None:
    """All are floating-point tensors of this layout, of one shape and on one device."""
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{name} must be a tensor, got {type(value).__name__}")
    first, *others = tensors.values()
    if any(t.ndim != ndim for t in tensors.values()) or any(t.shape != first.shape for t in others):
        raise ValueError(f"expected one shape {layout}, got {_described(tensors)}")
    if any(t.dtype not in DTYPES for t in tensors.values()):
        raise ValueError(f"expected floating-point tensors of 16, 32 or 64 bits, got {_described(tensors)}")
    if any(t.device != first.device for t in others):
        raise ValueError(f"expected one device, got {_described(tensors)}")


def _described(tensors: Mapping[str, Tensor]) -> str:
    # only for an error: torch.compile cannot trace the text of a size that it does not know
    return ", ".join(f"{name} {tuple(t.shape)} {t.dtype} {t.device}" for name, t in tensors.items())


def _check_like(name: str, tensor: Tensor, wanted: tuple[torch.dtype, torch.Size, torch.device]) -> None:
    dtype, shape, device = wanted
    if (tensor.dtype, tensor.shape, tensor.device) != wanted:
        found = f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
        raise ValueError(f"{name} must be {dtype} {tuple(shape)} on {device}, got {found}")
