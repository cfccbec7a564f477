"""The fused operators as PyTorch sees them: `torch.library` operators with shape and gradient rules.

So `torch.compile(fullgraph=True)` and meta tensors work, on a machine without a GPU too. `backend` says who computes:
"cpu" (NumPy) or "triton". Arguments are checked in `kernels.api`.

Shape suffixes: B batch, P pixels of one sample, G regions, N tokens, D width.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from kernels.reference import compute_dtype


def _fused(loss: str, backend: str) -> Any:
    """The module that computes a loss, such as kernels.triton_affine: it has forward and backward."""
    return import_module(f"kernels.{backend}_{loss}")


# --- affine-invariant loss ----------------------------------------------------------------------------------------


@torch.library.custom_op("fathom::affine_invariant", mutates_args=())
def affine_invariant(
    pred_BP: Tensor,
    target_BP: Tensor,
    label_BP: Tensor | None,
    num_regions: int,
    trim: float,
    median_BG: Tensor | None,
    mad_BG: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss_BG, code_BP, terms_BG4): see `kernels.codes`."""
    stats = None if median_BG is None or mad_BG is None else (median_BG, mad_BG)
    fused = _fused("affine", backend)
    loss_BG, code_BP, terms_BG4 = fused.forward(pred_BP, target_BP, label_BP, num_regions, trim, stats)
    return loss_BG, code_BP, terms_BG4


@affine_invariant.register_fake
def _(
    pred_BP: Tensor, target_BP: Tensor, label_BP: Tensor | None, num_regions: int, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    batch, dtype = pred_BP.shape[0], compute_dtype(pred_BP, target_BP)
    loss_BG = pred_BP.new_empty((batch, num_regions), dtype=dtype)
    code_BP = torch.empty(pred_BP.shape, dtype=torch.uint8, device=pred_BP.device)
    return loss_BG, code_BP, pred_BP.new_empty((batch, num_regions, 4), dtype=dtype)


@torch.library.custom_op("fathom::affine_invariant_backward", mutates_args=())
def affine_invariant_backward(
    grad_BG: Tensor, code_BP: Tensor, terms_BG4: Tensor, dtype: torch.dtype, backend: str
) -> Tensor:
    """Gradient to the prediction, [B, P] of `dtype`."""
    grad_BP: Tensor = _fused("affine", backend).backward(grad_BG.contiguous(), code_BP, terms_BG4, dtype)
    return grad_BP


@affine_invariant_backward.register_fake
def _(grad_BG: Tensor, code_BP: Tensor, terms_BG4: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
    return torch.empty(code_BP.shape, dtype=dtype, device=code_BP.device)


def _save_affine(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(*output[1:])
    ctx.dtype, ctx.backend = inputs[0].dtype, inputs[-1]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _refuse_second_order(loss: str) -> None:
    """With create_graph=True: the gradient would come out as a constant, silently."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(f"{loss} has no second derivative in this backend: use backend='reference' for it")


def _backward_affine(ctx: Any, grad_BG: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    _refuse_second_order("affine_invariant_loss")
    grad_BP = None
    if grad_BG is not None:
        grad_BP = affine_invariant_backward(grad_BG, *ctx.saved_tensors, ctx.dtype, ctx.backend)
    return grad_BP, None, None, None, None, None, None, None


affine_invariant.register_autograd(_backward_affine, setup_context=_save_affine)


# --- its statistics -----------------------------------------------------------------------------------------------


@torch.library.custom_op("fathom::region_stats", mutates_args=())
def region_stats(
    x_BP: Tensor, label_BP: Tensor | None, num_regions: int, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(median_BG, mad_BG, code_BP, shares_BG3): shares are what one pixel has of their gradients."""
    median_BG, mad_BG, code_BP, shares_BG3 = _fused("affine", backend).median_mad(x_BP, label_BP, num_regions)
    return median_BG.clone(), mad_BG.clone(), code_BP, shares_BG3.clone()


@region_stats.register_fake
def _(x_BP: Tensor, label_BP: Tensor | None, num_regions: int, backend: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    stats_BG = x_BP.new_empty((x_BP.shape[0], num_regions), dtype=compute_dtype(x_BP))
    code_BP = torch.empty(x_BP.shape, dtype=torch.uint8, device=x_BP.device)
    return stats_BG, torch.empty_like(stats_BG), code_BP, stats_BG.new_empty((*stats_BG.shape, 3))


def _save_stats(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[2:])
    ctx.dtype, ctx.backend = inputs[0].dtype, inputs[-1]
    ctx.mark_non_differentiable(*output[2:])


def _backward_stats(ctx: Any, median_BG: Tensor, mad_BG: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    _refuse_second_order("region_median_mad")
    code_BP, shares_BG3 = ctx.saved_tensors
    zero_BG = torch.zeros_like(median_BG)
    at_median_BG = median_BG * shares_BG3[..., 0] + mad_BG * shares_BG3[..., 2]
    terms_BG4 = torch.stack([zero_BG, mad_BG * shares_BG3[..., 1], at_median_BG, zero_BG], -1)
    ones_BG = torch.ones_like(median_BG)
    return affine_invariant_backward(ones_BG, code_BP, terms_BG4, ctx.dtype, ctx.backend), None, None, None


region_stats.register_autograd(_backward_stats, setup_context=_save_stats)


# --- cosine-margin loss -------------------------------------------------------------------------------------------


@torch.library.custom_op("fathom::cosine_margin", mutates_args=())
def cosine_margin(
    student_BND: Tensor, frozen_BND: Tensor, alpha: float, token_mask_BN: Tensor | None, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(sum_B, count_B, coef_BN2): coef is what the backward pass needs of every token, 0 of dropped ones."""
    sum_B, count_B, coef_BN2 = _fused("cosine", backend).forward(student_BND, frozen_BND, alpha, token_mask_BN)
    return sum_B, count_B, coef_BN2


@cosine_margin.register_fake
def _(
    student_BND: Tensor, frozen_BND: Tensor, alpha: float, token_mask_BN: Tensor | None, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    sum_B = student_BND.new_empty(student_BND.shape[0], dtype=compute_dtype(student_BND, frozen_BND))
    return sum_B, torch.empty_like(sum_B), sum_B.new_empty((*student_BND.shape[:2], 2))


@torch.library.custom_op("fathom::cosine_margin_backward", mutates_args=())
def cosine_margin_backward(
    grad_B: Tensor, student_BND: Tensor, frozen_BND: Tensor, coef_BN2: Tensor, backend: str
) -> Tensor:
    """Gradient to the student, of its shape and dtype."""
    fused, dtype = _fused("cosine", backend), student_BND.dtype
    grad_BND: Tensor = fused.backward(grad_B.contiguous(), student_BND, frozen_BND, coef_BN2, dtype)
    return grad_BND


@cosine_margin_backward.register_fake
def _(grad_B: Tensor, student_BND: Tensor, frozen_BND: Tensor, coef_BN2: Tensor, backend: str) -> Tensor:
    return torch.empty(student_BND.shape, dtype=student_BND.dtype, device=student_BND.device)


def _save_cosine(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[0], inputs[1], output[2])
    ctx.backend = inputs[-1]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward_cosine(ctx: Any, grad_B: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    _refuse_second_order("cosine_margin_loss")
    grad_BND = None if grad_B is None else cosine_margin_backward(grad_B, *ctx.saved_tensors, ctx.backend)
    return grad_BND, None, None, None, None


cosine_margin.register_autograd(_backward_cosine, setup_context=_save_cosine)
