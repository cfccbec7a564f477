"""The affine-invariant loss against formulas written down a second time, and what they imply, on each backend.

Shape suffixes: B batch, H W pixels, G regions, N tokens, D width.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.reference import trimmed_count
from tests.kernels.backends import on_each_backend

INF, NAN = math.inf, math.nan

backend, run = on_each_backend()
affine_invariant_loss, region_median_mad = run("affine_invariant_loss"), run("region_median_mad")
cosine_margin_loss = run("cosine_margin_loss")


def maps(seed: int, shape: tuple[int, int, int] = (3, 7, 9), regions: int = 2, dtype: torch.dtype = torch.float32):
    """A prediction, a target and labels 0..regions, all random."""
    g = torch.Generator().manual_seed(seed)
    pred = torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)
    target = torch.rand(shape, generator=g, dtype=torch.float64).to(dtype)
    labels = torch.randint(0, regions + 1, shape, generator=g, dtype=torch.uint8)
    return pred, target, labels


def plain_loss(pred: Tensor, target: Tensor, labels: Tensor, regions: int, trim: float = 0.0) -> Tensor:
    """The paper's formula in float64, one region at a time; regions must not be empty or degenerate."""

    def normalised(x: Tensor) -> Tensor:
        t = x.median()
        return (x - t) / (x - t).abs().mean()

    losses = []
    for b in range(len(pred)):
        for g in range(1, regions + 1):
            inside = labels[b] == g
            error = (normalised(pred[b][inside].double()) - normalised(target[b][inside].double())).abs()
            losses.append(error.sort().values[: len(error) - trimmed_count(len(error), trim)].mean())
    return torch.stack(losses).view(len(pred), regions)


def gradient(loss_BG: Tensor, pred: Tensor, weight: float = 1.0) -> Tensor:
    (grad,) = torch.autograd.grad(loss_BG.sum() * weight, pred)
    return grad


def one_row(*values: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(values, dtype=dtype).view(1, 1, -1)


# Statistics


@pytest.mark.parametrize(
    "values",
    [
        [3.0],
        [2.0, 1.0],
        [5.0, 1.0, 3.0],
        [4.0, 1.0, 3.0, 2.0],
        [0.0, 0.0, 0.0, 7.0, 0.0],
        [-0.0, 0.0],
        [0.0, -0.0],
        [-0.0, -0.0, 0.0, 1.0, -1.0],
        [1.0, 2.0, 2.0, 2.0, 3.0, 9.0],
        [1e30, -1e30, 1e-30, 2.0**-126],
        [1.0, 2.0, 4.0, 8.0, 16.0, 32.0],
        [1000.0, 1000.0001, 999.9999],
        [INF, 1.0, 2.0],
        [-INF, INF, 0.5, 0.25],
        [INF, INF, 1.0],
    ],
)
def test_median_is_torchs_lower_median_to_the_bit(values: list[float]) -> None:
    x = torch.tensor(values)
    median, mad = region_median_mad(x.view(1, 1, -1))
    expected = sorted(values)[(len(values) - 1) // 2]
    assert median.item() == x.median().item() == torch.tensor(expected).item()
    assert math.copysign(1.0, median.item()) == (1.0 if expected == 0 else math.copysign(1.0, expected))
    if all(map(math.isfinite, values)):
        exact = np.abs(np.float64(x.numpy()) - x.median().double().item()).mean()
        assert mad.item() == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("kind", ["normal", "zeros", "ties", "bf16", "offset"])
@pytest.mark.parametrize("shape", [(2, 1, 1), (2, 1, 2), (2, 13, 17), (1, 64, 65)])
def test_median_of_each_region(kind: str, shape: tuple[int, int, int]) -> None:
    x, _, labels = maps(1, shape, regions=3)
    if kind == "zeros":
        x = x.relu()
    elif kind == "ties":
        x = (x * 3).round()
    elif kind == "bf16":
        x = x.bfloat16()
    elif kind == "offset":
        x = x + 1024
    median, mad = region_median_mad(x, labels, 3)
    assert median.dtype == mad.dtype == torch.float32
    for b in range(shape[0]):
        for g in range(3):
            inside = x[b][labels[b] == g + 1].float()
            if inside.numel() == 0:
                assert median[b, g] == mad[b, g] == 0
                continue
            assert median[b, g] == inside.median()
            exact = (inside.double() - inside.median()).abs().mean()
            assert mad[b, g].item() == pytest.approx(exact.item(), rel=1e-6)


def test_invalid_pixels_do_not_count_in_the_median() -> None:
    x = one_row(NAN, 5.0, INF, 6.0, 7.0, -INF)
    labels = torch.tensor([0, 1, 0, 1, 1, 0], dtype=torch.uint8).view(1, 1, -1)
    median, mad = region_median_mad(x, labels)
    assert median.item() == 6.0 and mad.item() == pytest.approx(2 / 3)


def test_median_of_a_region_with_nan_is_nan() -> None:
    median, mad = region_median_mad(one_row(1.0, NAN, 2.0))
    assert median.isnan().all() and mad.isnan().all()


def test_statistics_are_differentiable_and_ties_share_the_median() -> None:
    x = one_row(0.0, 2.0, 2.0, 5.0, dtype=torch.float64).requires_grad_()
    assert gradient(region_median_mad(x)[0], x).flatten().tolist() == [0.0, 0.5, 0.5, 0.0]
    assert gradient(region_median_mad(x)[1], x).flatten().tolist() == [-0.25, 0.0, 0.0, 0.25]


# Loss and gradient


@pytest.mark.parametrize("trim", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("shape", [(1, 3, 3), (3, 7, 9), (2, 41, 37)])
def test_loss_and_gradient_equal_the_formula_in_float64(shape: tuple[int, int, int], trim: float) -> None:
    pred, target, labels = maps(2, shape)
    labels[:, 0, :2], labels[:, 1, :2] = 1, 2
    pred.requires_grad_()
    ours, theirs = affine_invariant_loss(pred, target, labels, 2, trim), plain_loss(pred, target, labels, 2, trim)
    assert ours.shape == (shape[0], 2) and ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=0)  # float32: a few ulp of sums over n
    torch.testing.assert_close(gradient(ours, pred), gradient(theirs, pred), rtol=1e-5, atol=1e-7)


def test_gradient_equals_the_closed_form_with_ties_at_the_median() -> None:
    g = torch.Generator().manual_seed(3)
    x = (torch.randn(1, 9, 11, generator=g, dtype=torch.float64) * 2).round().requires_grad_()
    y = torch.rand(1, 9, 11, generator=g, dtype=torch.float64)
    loss = affine_invariant_loss(x, y)
    n, t = x.numel(), x.detach().median()
    s = (x.detach() - t).abs().mean()
    p, q = (x.detach() - t) / s, (y - y.median()) / (y - y.median()).abs().mean()
    sign = (p - q).sign()
    by_scale = -(sign * p).sum() / (n * s)
    by_shift = -sign.sum() / (n * s) + by_scale * ((x < t).sum() - (x > t).sum()) / n
    assert int((x == t).sum()) > 5
    expected = sign / (n * s) + by_scale / n * (x.detach() - t).sign() + (x == t) * by_shift / (x == t).sum()
    torch.testing.assert_close(gradient(loss, x), expected, rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("trim", [0.0, 0.2])
def test_gradcheck(trim: float) -> None:
    pred, target, labels = maps(4, (2, 5, 5), dtype=torch.float64)
    labels[0] = 2  # an empty region
    assert torch.autograd.gradcheck(
        lambda x: affine_invariant_loss(x, target, labels, 2, trim), [pred.requires_grad_()], atol=1e-6
    )


def test_the_gradient_is_orthogonal_to_shift_and_scale() -> None:
    pred, target, labels = maps(5, (2, 30, 31), dtype=torch.float64)
    pred.requires_grad_()
    grad = gradient(affine_invariant_loss(pred, target, labels, 2, trim=0.1), pred)
    for inside in [(labels == g) & (torch.arange(2) == b).view(2, 1, 1) for b in range(2) for g in (1, 2)]:
        assert abs(grad[inside].sum().item()) < 1e-12
        assert abs((grad * pred.detach())[inside].sum().item()) < 1e-12
        assert grad[inside].abs().sum() > 0.1
    assert (grad[labels == 0] == 0).all()


def test_upstream_gradient_per_sample_and_region() -> None:
    pred, target, labels = maps(6)
    pred.requires_grad_()
    weight = torch.tensor([[2.0, -3.0], [0.0, 0.5], [1.0, 7.0]])
    (grad,) = torch.autograd.grad(affine_invariant_loss(pred, target, labels, 2), pred, weight)
    unit = gradient(affine_invariant_loss(pred, target, labels, 2), pred)
    factor = torch.where(labels == 1, weight[:, 0].view(3, 1, 1), weight[:, 1].view(3, 1, 1))
    torch.testing.assert_close(grad, unit * factor, rtol=1e-6, atol=1e-9)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    scale=st.floats(0.01, 100),
    shift=st.floats(-100, 100),
    trim=st.sampled_from([0.0, 0.1, 0.25]),
)
def test_scale_shift_and_order_of_pixels_do_not_matter(seed: int, scale: float, shift: float, trim: float) -> None:
    pred, target, labels = maps(seed, (1, 6, 7), dtype=torch.float64)
    loss = affine_invariant_loss(pred, target, labels, 2, trim)
    torch.testing.assert_close(affine_invariant_loss(pred * scale + shift, target, labels, 2, trim), loss)
    torch.testing.assert_close(affine_invariant_loss(pred, target * scale + shift, labels, 2, trim), loss)
    order = torch.randperm(42, generator=torch.Generator().manual_seed(seed))
    shuffled = [x.flatten(1)[:, order].view(1, 6, 7) for x in (pred, target, labels)]
    torch.testing.assert_close(affine_invariant_loss(shuffled[0], shuffled[1], shuffled[2], 2, trim), loss)


def test_regions_in_one_call_equal_regions_one_by_one() -> None:
    pred, target, labels = maps(7, regions=3)
    together = affine_invariant_loss(pred, target, labels, 3)
    for g in range(3):
        alone = affine_invariant_loss(pred, target, labels == g + 1)
        assert torch.equal(together[:, g : g + 1], alone)


def test_without_labels_every_pixel_is_in_region_1() -> None:
    pred, target, labels = maps(8)
    plain = affine_invariant_loss(pred, target, num_regions=2)
    assert torch.equal(plain[:, :1], affine_invariant_loss(pred, target, torch.ones_like(labels)))
    assert (plain[:, 1] == 0).all()


def test_invalid_pixels_have_no_influence_whatever_they_hold() -> None:
    pred, target, labels = maps(9)
    clean = affine_invariant_loss(pred, target, labels, 2)
    pred[labels == 0], target[labels == 0] = NAN, INF
    pred.requires_grad_()
    loss = affine_invariant_loss(pred, target, labels, 2)
    assert torch.equal(loss, clean)
    grad = gradient(loss, pred)
    assert grad.isfinite().all() and (grad[labels == 0] == 0).all()


def test_given_target_statistics_replace_the_targets_own() -> None:
    pred, target, labels = maps(10)
    stats = region_median_mad(target, labels, 2)
    own = affine_invariant_loss(pred, target, labels, 2)
    assert torch.equal(affine_invariant_loss(pred, target, labels, 2, target_stats=stats), own)
    other = affine_invariant_loss(pred, target, labels, 2, target_stats=(stats[0] + 1, stats[1] * 2))
    assert (other != own).all()


def test_the_target_is_a_constant() -> None:
    pred, target, labels = maps(11)
    pred.requires_grad_()
    target.requires_grad_()
    stats = region_median_mad(target, labels, 2)
    for given_stats in (None, stats):
        loss = affine_invariant_loss(pred, target, labels, 2, target_stats=given_stats)
        _, to_target = torch.autograd.grad(loss.sum(), [pred, target], allow_unused=True)
        assert to_target is None


def test_the_same_bits_every_time() -> None:
    pred, target, labels = maps(12, (4, 50, 51))
    pred.requires_grad_()
    runs = []
    for _ in range(2):
        loss = affine_invariant_loss(pred, target, labels, 2, trim=0.1)
        runs.append((loss.detach(), gradient(loss, pred)))
    assert torch.equal(runs[0][0], runs[1][0]) and torch.equal(runs[0][1], runs[1][1])


def test_memory_layout_does_not_matter() -> None:
    pred, target, labels = maps(13)
    transposed = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (pred, target, labels)]
    assert not transposed[0].is_contiguous()
    assert torch.equal(affine_invariant_loss(*transposed, 2), affine_invariant_loss(pred, target, labels, 2))


# The corners


def test_an_empty_region_gives_loss_0_and_gradient_0() -> None:
    pred, target, labels = maps(14)
    labels[1] = 0
    pred.requires_grad_()
    loss = affine_invariant_loss(pred, target, labels, 2)
    assert (loss[1] == 0).all() and (loss[[0, 2]] > 0).all()
    grad = gradient(loss, pred)
    assert (grad[1] == 0).all() and grad.isfinite().all()


def test_a_batch_without_a_valid_pixel_can_be_differentiated() -> None:
    pred = torch.randn(2, 3, 3, requires_grad=True)
    loss = affine_invariant_loss(pred, torch.rand(2, 3, 3), torch.zeros(2, 3, 3, dtype=torch.uint8))
    assert (loss == 0).all() and (gradient(loss, pred) == 0).all()


def test_a_batch_of_no_samples() -> None:
    pred = torch.randn(0, 3, 3, requires_grad=True)
    loss = affine_invariant_loss(pred, torch.rand(0, 3, 3), num_regions=2)
    assert loss.shape == (0, 2) and gradient(loss, pred).shape == (0, 3, 3)
    assert region_median_mad(pred)[0].shape == (0, 1)


@pytest.mark.parametrize("spread, level, alive", [(0.0, 0.5, False), (1e-7, 0.0, False), (1e-4, 0.0, True),
                                                  (1e-2, 1e5, False), (0.5, 1e5, True)])  # fmt: skip
def test_a_region_without_spread_gives_loss_0_and_gradient_0(spread: float, level: float, alive: bool) -> None:
    _, target, _ = maps(15, (1, 4, 4))
    flat = level + spread * torch.linspace(-1, 1, 16).view(1, 4, 4)
    flat.requires_grad_()
    loss = affine_invariant_loss(flat, target)
    grad = gradient(loss, flat)
    assert grad.isfinite().all()
    assert bool(loss.item() > 0) == bool(grad.abs().sum() > 0) == alive
    free = target.clone().requires_grad_()
    loss = affine_invariant_loss(free, flat.detach())
    assert bool(loss.item() > 0) == bool(gradient(loss, free).abs().sum() > 0) == alive


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("where", ["pred", "target"])
@pytest.mark.parametrize("trim", [0.0, 0.3])
def test_a_value_that_is_not_finite_shows_whatever_is_trimmed(bad: float, where: str, trim: float) -> None:
    pred, target, labels = maps(16)
    stats = region_median_mad(target, labels, 2)
    labels[0, 0, 0] = 1
    {"pred": pred, "target": target}[where][0, 0, 0] = bad
    for given_stats in (None, stats):
        loss = affine_invariant_loss(pred, target, labels, 2, trim, given_stats)
        assert not loss[0, 0].isfinite()
        assert loss.flatten()[1:].isfinite().all()
    flat = torch.ones_like(pred)  # the other map being degenerate does not hide it either
    pair = (pred, flat) if where == "pred" else (flat, target)
    for given_stats in (None, stats if where == "target" else None):
        loss = affine_invariant_loss(*pair, labels, 2, trim, given_stats)
        assert not loss[0, 0].isfinite() and (loss.flatten()[1:] == 0).all()


def test_trimming_drops_exactly_the_largest_fraction() -> None:
    assert [trimmed_count(10, t) for t in (0.0, 0.1, 0.2, 0.3, 0.29, 0.9999999)] == [0, 1, 2, 3, 2, 9]
    assert trimmed_count(268324, 0.1) == 26832 and trimmed_count(10000, 0.0157) == 157 and trimmed_count(1, 0.99) == 0
    pred, target, _ = maps(17, (1, 10, 10))
    pred.requires_grad_()
    p, q = (
        (x.detach() - x.detach().median()) / (x.detach() - x.detach().median()).abs().mean() for x in (pred, target)
    )
    residual = (p - q).abs().flatten()
    loss = affine_invariant_loss(pred, target, trim=0.2)
    assert loss.item() == pytest.approx(residual.sort().values[:80].mean().item(), rel=1e-6)
    assert loss.item() < 0.9 * affine_invariant_loss(pred, target).item()


def test_equal_residuals_at_the_threshold_share_what_is_kept() -> None:
    # Residuals 0, 0, 0, 1, 1 (scaled): one of two equal ones is dropped; the value is that of sort()[:4].
    target = one_row(-2.0, -1.0, 0.0, 1.0, 2.0, dtype=torch.float64)
    pred = one_row(-3.0, -1.0, 0.0, 1.0, 3.0, dtype=torch.float64).requires_grad_()
    stats = (torch.zeros(1, 1), torch.full((1, 1), 1.6))  # the prediction's own scale, so that the middle agrees
    loss = affine_invariant_loss(pred, target, trim=0.2, target_stats=stats)
    assert loss.item() == pytest.approx(1 / 1.6 / 4)
    grad = gradient(loss, pred).flatten()
    torch.testing.assert_close(grad, -grad.flip(0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    pred, target, labels = maps(18, dtype=dtype)
    wide = pred.float().requires_grad_()
    pred.requires_grad_()
    loss = affine_invariant_loss(pred, target, labels, 2, trim=0.1)
    expected = affine_invariant_loss(wide, target.float(), labels, 2, trim=0.1)
    assert loss.dtype == torch.float32 and torch.equal(loss, expected)
    assert torch.equal(gradient(loss, pred), gradient(expected, wide).to(dtype))


def test_float64_stays_float64() -> None:
    pred, target, _ = maps(19, dtype=torch.float64)
    assert affine_invariant_loss(pred, target).dtype == torch.float64
    assert region_median_mad(pred)[0].dtype == torch.float64
    assert cosine_margin_loss(pred, target).dtype == torch.float64
