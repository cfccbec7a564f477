"""The cosine-margin loss against torch's own cosine, and its corners. Shape suffixes: B batch, N tokens, D width."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.kernels.backends import on_each_backend

backend, run = on_each_backend()
cosine_margin_loss = run("cosine_margin_loss")


def features(seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Student and frozen features [3, 11, 16] whose cosines spread over both sides of 0.85."""
    g = torch.Generator().manual_seed(seed)
    frozen = torch.randn(3, 11, 16, generator=g, dtype=torch.float64)
    noise = torch.randn(3, 11, 16, generator=g, dtype=torch.float64) * torch.linspace(0.05, 2, 11).view(1, 11, 1)
    return (frozen + noise).to(dtype), frozen.to(dtype)


def cosine(student: Tensor, frozen: Tensor) -> Tensor:
    return torch.nn.functional.cosine_similarity(student.double(), frozen.double(), dim=-1)


@pytest.mark.parametrize("alpha", [0.85, 0.5, 1.0])
@pytest.mark.parametrize("masked", [False, True])
def test_value_gradient_and_count(alpha: float, masked: bool) -> None:
    student, frozen = features()
    student.requires_grad_()
    mask = torch.rand(3, 11, generator=torch.Generator().manual_seed(1)) > 0.4 if masked else None
    cos = cosine(student, frozen)
    kept = (cos < alpha) if mask is None else (cos < alpha) & mask
    assert alpha == 1 or 0 < kept.sum() < 33
    sum_B, count_B = cosine_margin_loss(student, frozen, alpha, mask, reduction="sum_count")
    expected_B = torch.where(kept, 1 - cos, 0.0).sum(1)
    torch.testing.assert_close(sum_B.double(), expected_B, rtol=1e-5, atol=1e-6)
    assert count_B.tolist() == kept.sum(1).tolist() and count_B.dtype == torch.float32
    mean = cosine_margin_loss(student, frozen, alpha, mask)
    assert mean.item() == pytest.approx((1 - cos)[kept].mean().item(), rel=1e-5)
    (ours,) = torch.autograd.grad(mean * 3, student)
    (theirs,) = torch.autograd.grad((1 - cos)[kept].mean() * 3, student)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert (ours[~kept] == 0).all() and (ours[kept] != 0).any()


def test_gradcheck() -> None:
    student, frozen = features(2, torch.float64)
    assert torch.autograd.gradcheck(lambda x: cosine_margin_loss(x, frozen), [student.requires_grad_()])


def test_the_gradient_does_not_change_lengths() -> None:
    student, frozen = features(3, torch.float64)
    (grad,) = torch.autograd.grad(cosine_margin_loss(student.requires_grad_(), frozen), student)
    assert (grad * student).sum(-1).abs().max() < 1e-12


def test_masked_tokens_have_no_influence_whatever_they_hold() -> None:
    student, frozen = features(4)
    mask = torch.ones(3, 11, dtype=torch.bool)
    mask[:, 7:] = False
    clean = cosine_margin_loss(student[:, :7], frozen[:, :7])
    student[:, 7:9], frozen[:, 9:] = math.nan, math.inf
    student.requires_grad_()
    loss = cosine_margin_loss(student, frozen, token_mask_BN=mask)
    torch.testing.assert_close(loss, clean)
    (grad,) = torch.autograd.grad(loss, student)
    assert grad.isfinite().all() and (grad[:, 7:] == 0).all()


@pytest.mark.parametrize("mask", [None, torch.ones(3, 11, dtype=torch.bool)])
@pytest.mark.parametrize("side", [0, 1])
def test_a_feature_without_direction_is_not_counted(side: int, mask: Tensor | None) -> None:
    pair = features(5)
    pair[side][0, 10] = 0.0
    student = pair[0].requires_grad_()
    sum_B, count_B = cosine_margin_loss(student, pair[1], 1.0, mask, reduction="sum_count")
    assert count_B.tolist() == [10, 11, 11]
    (grad,) = torch.autograd.grad(sum_B.sum(), student)
    assert grad.isfinite().all() and (grad[0, 10] == 0).all()


def test_nothing_kept_gives_0_and_gradient_0() -> None:
    _, frozen = features(6)
    student = (frozen * 2).requires_grad_()
    loss = cosine_margin_loss(student, frozen)
    (grad,) = torch.autograd.grad(loss, student)
    assert loss.item() == 0 and (grad == 0).all()
    assert cosine_margin_loss(student[:0], frozen[:0]).item() == 0


def test_alpha_1_keeps_parallel_tokens_whatever_the_rounding() -> None:
    _, frozen = features(7)
    _, count_B = cosine_margin_loss(frozen * 3, frozen, 1.0, reduction="sum_count")
    assert count_B.tolist() == [11, 11, 11]


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_shows(side: int, bad: float) -> None:
    pair = features(8)
    pair[side][1, 0, 0] = bad
    sum_B, _ = cosine_margin_loss(*pair, reduction="sum_count")
    assert sum_B.isnan().tolist() == [False, True, False]


def test_the_frozen_side_is_a_constant() -> None:
    student, frozen = features(9)
    loss = cosine_margin_loss(student.requires_grad_(), frozen.requires_grad_())
    assert torch.autograd.grad(loss, [student, frozen], allow_unused=True)[1] is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    student, frozen = features(10, dtype)
    wide = student.float().requires_grad_()
    loss, expected = cosine_margin_loss(student.requires_grad_(), frozen), cosine_margin_loss(wide, frozen.float())
    assert loss.dtype == torch.float32 and torch.equal(loss, expected)
    (ours,), (theirs,) = torch.autograd.grad(loss, student), torch.autograd.grad(expected, wide)
    assert torch.equal(ours, theirs.to(dtype))
