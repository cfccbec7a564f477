"""Losses against what one would write with loops, in float64. Shape suffixes: B batch, H W pixels, G regions."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import affine_invariant_loss
from trainer.losses import (
    feature_alignment_loss,
    gradient_matching_loss,
    regional_affine_invariant_loss,
    regional_least_squares_loss,
    silog_loss,
)


def maps(seed: int = 0, regions: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    target_BHW = torch.rand(3, 21, 18, generator=g) + 0.1
    pred_BHW = 2 * target_BHW + 0.3 * torch.rand(3, 21, 18, generator=g) + 0.1
    region_BHW = torch.ones(3, 21, 18, dtype=torch.uint8)
    region_BHW[:, 5:15, 4:11] = regions
    region_BHW[torch.rand(3, 21, 18, generator=g) < 0.2] = 0
    return pred_BHW, target_BHW, region_BHW


def normalised(x: Tensor) -> Tensor:
    x = x.double()
    return (x - x.median()) / (x - x.median()).abs().mean()


def aligned(pred: Tensor, target: Tensor) -> Tensor:
    """The residual of the least-squares fit, by a solver that knows nothing of closed forms."""
    pred, target = pred.double(), target.double()
    design = torch.stack([pred, torch.ones_like(pred)], 1)
    return design @ torch.linalg.lstsq(design, target[:, None]).solution[:, 0] - target


def gradient_matching(
    pred: Tensor, target: Tensor, region: Tensor, regions: int, scales: int, normalisation: str = "mad"
) -> float:
    """Of one image, pixel by pixel."""
    r = torch.zeros(pred.shape, dtype=torch.float64)
    for g in range(1, regions + 1):
        p, t = pred[region == g], target[region == g]
        r[region == g] = aligned(p, t) if normalisation == "lsq" else normalised(p) - normalised(t)
    total = 0.0
    for k in range(scales):
        d, label = r[:: 2**k, :: 2**k], region[:: 2**k, :: 2**k]
        here = 0.0
        for i in range(d.shape[0]):
            for j in range(d.shape[1]):
                for a, b in ((i + 1, j), (i, j + 1)):
                    if a < d.shape[0] and b < d.shape[1] and label[i, j] == label[a, b] > 0:
                        here += abs(d[a, b] - d[i, j]).item()
        total += here / max(int((label > 0).sum()), 1)
    return total


@pytest.mark.parametrize("normalisation", ["mad", "lsq"])
@pytest.mark.parametrize("regions", [1, 2])
def test_gradient_matching_is_what_the_loops_say(regions: int, normalisation: Any) -> None:
    pred, target, region = maps(regions=regions)
    loss_B = gradient_matching_loss(pred, target, region, regions, scales=4, normalisation=normalisation)
    wanted = [gradient_matching(*one, regions, 4, normalisation) for one in zip(pred, target, region, strict=True)]
    torch.testing.assert_close(loss_B.double(), torch.tensor(wanted, dtype=torch.float64), rtol=2e-6, atol=0)


def test_gradient_matching_ignores_scale_shift_and_holes() -> None:
    pred, target, region = maps()
    pred[region == 0], target[region == 0] = math.nan, math.inf
    pred.requires_grad_()
    loss_B = gradient_matching_loss(pred, target, region, 2)
    moved_B = gradient_matching_loss(3 * pred.detach() + 5, 0.5 * target - 2, region, 2)
    torch.testing.assert_close(loss_B, moved_B, rtol=1e-5, atol=0)
    assert gradient_matching_loss(2 * target + 1, target, region, 2).max() < 1e-5
    (grad,) = torch.autograd.grad(loss_B.sum(), pred)
    assert torch.equal(grad[region == 0], torch.zeros_like(grad[region == 0])) and grad.isfinite().all()
    # A shift or a scaling of the whole prediction changes nothing, so the gradient has no part along them.
    valid = torch.where(region > 0, pred.detach(), 0.0)
    assert grad.sum((1, 2)).abs().max() < 1e-6 and (grad * valid).sum((1, 2)).abs().max() < 1e-6


def test_gradient_matching_differentiates_the_normalisation_too() -> None:
    """Finite differences, away from ties and kinks."""
    pred, target, region = maps()
    pred.requires_grad_()
    (grad,) = torch.autograd.grad(gradient_matching_loss(pred, target, region, 2)[1], pred)
    direction = torch.randn(pred.shape, generator=torch.Generator().manual_seed(1))
    moved = [(pred.detach() + h * direction)[1] for h in (1e-5, -1e-5)]
    losses = [gradient_matching(one, target[1], region[1], 2, 4) for one in moved]
    assert (losses[0] - losses[1]) / 2e-5 == pytest.approx((grad[1] * direction[1]).sum().item(), rel=1e-2)


@pytest.mark.parametrize("loss", [gradient_matching_loss, regional_affine_invariant_loss])
def test_images_and_regions_without_anything_to_learn(loss) -> None:
    pred, target, region = maps()
    region[0] = 0
    pred[1][region[1] == 2] = 0.25  # flat: no scale
    pred.requires_grad_()
    loss_B = loss(pred, target, region, 2)
    (grad,) = torch.autograd.grad(loss_B.sum(), pred)
    assert loss_B[0] == 0 and (loss_B[1:] > 0).all() and grad.isfinite().all()
    assert not grad[0].any() and not grad[1][region[1] == 2].any() and grad[1][region[1] == 1].any()


def test_regions_count_by_their_valid_pixels() -> None:
    pred, target, region = maps()
    loss_BG = affine_invariant_loss(pred, target, region, 2)
    area_BG = torch.stack([(region == g).sum((1, 2)) for g in (1, 2)], 1)
    wanted_B = (loss_BG * area_BG).sum(1) / area_BG.sum(1)
    torch.testing.assert_close(regional_affine_invariant_loss(pred, target, region, 2), wanted_B)


def test_alignment_is_a_mean_over_the_tokens_that_are_kept() -> None:
    g = torch.Generator().manual_seed(0)
    frozen = torch.randn(3, 9, 16, generator=g)
    student = frozen + torch.randn(3, 9, 16, generator=g)
    student[2] = frozen[2]  # all close enough
    cos_BN = torch.nn.functional.cosine_similarity(student, frozen, dim=-1)
    wanted = [(1 - c[c <= 0.8]).mean() for c in cos_BN[:2]] + [torch.tensor(0.0)]
    assert (cos_BN[:2] > 0.8).any() and (cos_BN[:2] <= 0.8).any()
    torch.testing.assert_close(feature_alignment_loss(student, frozen, 0.8), torch.stack(wanted))


def test_gradient_matching_leaves_out_a_flat_target_and_a_map_far_from_zero() -> None:
    pred, target, region = maps()
    flat = target.clone()
    flat[region == 2] = 0.5
    far = pred.clone()
    far[region == 2] = 3e6 + 0.25 * (torch.rand((region == 2).sum(), generator=torch.Generator().manual_seed(1)) > 0.5)
    only_first = torch.where(region == 2, 0, region)
    counted = [((region[:, :: 2**k, :: 2**k] == 1).sum((1, 2)), k) for k in range(4)]
    assert all((count > 0).all() for count, _ in counted)
    wanted_B = gradient_matching_loss(pred, target, only_first, 2)
    # a deviation of 0.1 is none beside 3e6: 1e-6 of the median is the least
    for p, t in ((pred, flat), (far, target)):
        torch.testing.assert_close(gradient_matching_loss(p, t, region, 2), wanted_B)


def test_a_nan_shows() -> None:
    pred, target, region = maps()
    pred[2, 0, 0], region[2, 0, 0] = math.nan, 1
    assert gradient_matching_loss(pred, target, region, 2)[2].isnan()
    assert silog_loss(pred, target, region > 0)[2].isnan() and silog_loss(pred, target, region > 0)[:2].isfinite().all()


@pytest.mark.parametrize("mean_weight", [0.5, 0.85, 1.0])
def test_silog_is_the_formula(mean_weight: float) -> None:
    pred, target, region = maps()
    pred[region == 0], target[region == 0] = -1.0, math.nan
    pred.requires_grad_()
    loss_B = silog_loss(pred, target, region > 0, mean_weight)
    wanted = []
    for p, t, label in zip(pred.detach().double(), target.double(), region, strict=True):
        d = t[label > 0].log() - p[label > 0].log()
        wanted.append((d.square().mean() - mean_weight * d.mean() ** 2).sqrt())
    torch.testing.assert_close(loss_B.double(), torch.stack(wanted), rtol=2e-6, atol=0)
    (grad,) = torch.autograd.grad(loss_B.sum(), pred)
    assert grad.isfinite().all() and not grad[region == 0].any() and grad[region > 0].all()


def test_silog_of_nothing_of_a_perfect_depth_and_of_zero() -> None:
    pred, target, region = maps()
    valid = region > 0
    valid[0] = False
    pred[1] = target[1]
    pred[2][valid[2]] = 0.0  # a saturated sigmoid
    pred.requires_grad_()
    loss_B = silog_loss(pred, target, valid)
    (grad,) = torch.autograd.grad(loss_B.sum(), pred)
    assert loss_B[0] == loss_B[1] == 0 and loss_B[2] > 1 and loss_B.isfinite().all()
    assert grad.isfinite().all() and not grad[:2].any()


@pytest.mark.parametrize("regions", [1, 2])
def test_least_squares_is_half_the_mean_square_that_a_solver_leaves(regions: int) -> None:
    pred, target, region = maps(regions=regions)
    wanted = []
    for p, t, label in zip(pred, target, region, strict=True):
        squares = [aligned(p[label == g], t[label == g]).square().sum() for g in range(1, regions + 1)]
        wanted.append(sum(squares) / (2 * (label > 0).sum()))
    loss_B = regional_least_squares_loss(pred, target, region, regions)
    torch.testing.assert_close(loss_B.double(), torch.stack(wanted), rtol=2e-6, atol=0)  # type: ignore[arg-type]
    exact_B = regional_least_squares_loss(pred.double(), target.double(), region, regions)
    torch.testing.assert_close(exact_B, torch.stack(wanted), rtol=1e-12, atol=0)  # type: ignore[arg-type]


def test_least_squares_ignores_scale_shift_sign_holes_and_the_order_of_pixels() -> None:
    pred, target, region = (x.double() if x.is_floating_point() else x for x in maps(regions=1))
    loss_B = regional_least_squares_loss(pred, target, region, 1)
    for moved in (3 * pred + 5, 1e-3 * pred - 2, -0.5 * pred):
        torch.testing.assert_close(regional_least_squares_loss(moved, target, region, 1), loss_B, rtol=1e-9, atol=0)
    torch.testing.assert_close(regional_least_squares_loss(pred, 3 * target + 1, region, 1), 9 * loss_B)
    order = torch.randperm(21 * 18, generator=torch.Generator().manual_seed(2))
    shuffled = (x.flatten(1)[:, order].view_as(x) for x in (pred, target, region))
    torch.testing.assert_close(regional_least_squares_loss(*shuffled, 1), loss_B)
    pred[region == 0], target[region == 0] = math.nan, math.inf
    pred.requires_grad_()
    with_holes_B = regional_least_squares_loss(pred, target, region, 1)
    assert torch.equal(with_holes_B, loss_B)
    (grad,) = torch.autograd.grad(with_holes_B.sum(), pred)
    assert grad.isfinite().all() and not grad[region == 0].any() and grad[region > 0].all()
    assert grad.sum((1, 2)).abs().max() < 1e-7  # a shift changes nothing


@pytest.mark.parametrize("valid", [0, 1, 2, 3])
def test_least_squares_of_a_few_pixels(valid: int) -> None:
    pred, target, region = maps(regions=1)
    region.zero_()
    region[:, 4, :valid] = 1
    pred = pred.double().requires_grad_()
    loss_B = regional_least_squares_loss(pred, target.double(), region, 1)
    (grad,) = torch.autograd.grad(loss_B.sum(), pred)
    assert loss_B.isfinite().all() and grad.isfinite().all()
    if valid < 3:  # met exactly
        assert loss_B.abs().max() < 1e-28 and grad.abs().max() < 1e-12
    else:
        assert (loss_B > 0).all()


@pytest.mark.parametrize("constant", [0.0, 0.3, 1e6])
def test_least_squares_of_constant_maps(constant: float) -> None:
    pred, target, region = maps(regions=1)
    flat = torch.full_like(pred, constant).requires_grad_()
    loss_B = regional_least_squares_loss(flat, target, region, 1)
    (grad,) = torch.autograd.grad(loss_B.sum(), flat)
    spread_B = torch.stack([t[label > 0].var(correction=0) for t, label in zip(target, region, strict=True)])
    torch.testing.assert_close(loss_B, spread_B / 2)
    assert not grad.any()
    # against a constant target the best scale is 0 (beside 1e6, to what rounding leaves of its mean)
    loss_B = regional_least_squares_loss(pred, torch.full_like(pred, constant), region, 1)
    assert loss_B.max() <= 1e-6 * max(constant, 1e-6)


LOSSES = {
    "mad": partial(regional_affine_invariant_loss, num_regions=2),
    "mad, trimmed": partial(regional_affine_invariant_loss, num_regions=2, trim=0.1),
    "lsq": partial(regional_least_squares_loss, num_regions=2),
    "gradients, mad": partial(gradient_matching_loss, num_regions=2),
    "gradients, lsq": partial(gradient_matching_loss, num_regions=2, normalisation="lsq"),
    "silog": lambda pred, target, region: silog_loss(pred, target, region > 0),
}


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    """In float64, on maps without ties; every loss is smooth but for a set that no step of 1e-6 meets here."""
    pred, target, region = (x[:2, 3:12, 2:10] for x in maps())
    region = region.contiguous()
    assert torch.autograd.gradcheck(
        lambda x: LOSSES[name](x, target.double(), region), pred.double().requires_grad_(), eps=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_of_its_own_image_alone(name: str) -> None:
    """An image has the loss it has alone, one without a pixel has none, and NaN stays where it is."""
    pred, target, region = maps()
    region[1] = 0
    pred[2, 0, 0], region[2, 0, 0] = math.nan, 1
    pred.requires_grad_()
    loss_B = LOSSES[name](pred, target, region)
    alone_B = torch.cat([LOSSES[name](pred[i : i + 1], target[i : i + 1], region[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(loss_B, alone_B, equal_nan=True)
    assert loss_B[0] > 0 and loss_B[1] == 0 and loss_B[2].isnan()
    (grad,) = torch.autograd.grad(loss_B[:2].sum(), pred)
    assert grad[0].any() and grad[0].isfinite().all() and not grad[1].any()


@pytest.mark.parametrize("name", LOSSES)
def test_a_target_is_a_constant(name: str) -> None:
    pred, target, region = maps()
    pred.requires_grad_()
    target.requires_grad_()
    loss = LOSSES[name](pred, target, region).sum()
    of_pred, of_target = torch.autograd.grad(loss, (pred, target), allow_unused=True)
    assert of_pred.any() and (of_target is None or not of_target.any())


def test_the_frozen_features_are_constants() -> None:
    g = torch.Generator().manual_seed(0)
    student, frozen = (torch.randn(2, 5, 4, generator=g).requires_grad_() for _ in range(2))
    loss = feature_alignment_loss(student, frozen, 0.85).sum()
    of_student, of_frozen = torch.autograd.grad(loss, (student, frozen), allow_unused=True)
    assert of_student.any() and (of_frozen is None or not of_frozen.any())


def test_alignment_has_the_gradient_of_finite_differences() -> None:
    g = torch.Generator().manual_seed(0)
    frozen = torch.randn(2, 5, 4, generator=g, dtype=torch.float64)
    student = (frozen + torch.randn(2, 5, 4, generator=g, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: feature_alignment_loss(x, frozen, 0.85), student)
    order = torch.tensor([3, 0, 4, 2, 1])
    torch.testing.assert_close(
        feature_alignment_loss(student[:, order], frozen[:, order], 0.85), feature_alignment_loss(student, frozen, 0.85)
    )


# --- what other implementations do wrong --------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [regional_affine_invariant_loss, gradient_matching_loss])
def test_the_median_is_that_of_valid_pixels_where_most_are_holes(loss: Any) -> None:
    """MiDaS's robust loss takes the median of mask * target, holes as zeros: with more than half of them it is 0."""
    pred, target, region = maps(regions=1)
    pred, target = pred + 1.5, target + 1.5
    region[:, 6:] = 0  # 6 of 21 rows are left
    assert (region > 0).float().mean() < 0.3
    assert (torch.where(region > 0, target, 0.0).flatten(1).median(1).values == 0).all()
    loss_B = loss(pred, target, region, 1)
    # of the rows alone, where the naive median is right; the stride-2^k grid begins at the same corner
    torch.testing.assert_close(loss(pred[:, :6], target[:, :6], region[:, :6], 1), loss_B)


def test_a_tenth_really_goes() -> None:
    """Copies of MiDaS's trimmed loss slice the tuple (values, indices) of torch.sort, which trims nothing."""
    pred, target, region = maps(regions=1)
    pred[:, ::7, ::5] += 10.0  # outliers, fewer than a tenth
    region[0, ::7, ::5] = 0  # one image without
    whole_B = regional_affine_invariant_loss(pred, target, region, 1)
    trimmed_B = regional_affine_invariant_loss(pred, target, region, 1, trim=0.1)
    for i, (p, t, label) in enumerate(zip(pred, target, region, strict=True)):
        residual = (normalised(p[label > 0]) - normalised(t[label > 0])).abs().sort().values
        kept = residual[: len(residual) - math.floor(0.1 * len(residual))]
        assert trimmed_B[i].item() == pytest.approx(kept.mean().item(), rel=2e-6)
        assert whole_B[i].item() == pytest.approx(residual.mean().item(), rel=2e-6)
    assert (trimmed_B < whole_B).all() and (trimmed_B[1:] < 0.95 * whole_B[1:]).all()
