"""What must hold of kernels/triton_affine.py. Run by test_triton_affine.py, in a process of its own: interpreted on the
CPU if TRITON_INTERPRET is set there, else compiled on a GPU.

Shape suffixes: B batch, H W pixels, P pixels of a sample, G regions.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from kernels import codes, reference, triton_affine
from tests.kernels.triton_maps import (
    DEVICE,
    INF,
    INTERPRETED,
    NAN,
    TOLERANCE,
    assert_alike,
    expected,
    maps,
    ours,
    rows,
    small_blocks,
    statistics,
)

__all__ = ["small_blocks"]  # a fixture: pytest finds it here


@pytest.mark.parametrize("trim", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("shape, regions", [((2, 3, 7), 1), ((1, 37, 53), 2), ((3, 16, 24), 1), ((1, 64, 96), 2)])
def test_loss_and_gradient_equal_the_reference(shape: tuple[int, int, int], regions: int, trim: float) -> None:
    pred, target, labels = maps(5, shape, regions)
    assert_alike(ours(pred, target, labels, regions, trim), expected(pred, target, labels, regions, trim))


@pytest.mark.parametrize("trim", [0.0, 0.25])
@pytest.mark.parametrize("regions", [3, 8])
def test_many_regions(regions: int, trim: float) -> None:
    pred, target, labels = maps(6, (1, 24, 31), regions)
    assert_alike(ours(pred, target, labels, regions, trim), expected(pred, target, labels, regions, trim))


@pytest.mark.parametrize("trim", [0.0, 0.2])
def test_without_labels_every_pixel_is_in_region_1(trim: float) -> None:
    pred, target, labels = maps(7)
    loss, grad = ours(pred, target, None, 2, trim)
    assert_alike((loss, grad), expected(pred, target, None, 2, trim))
    assert (loss[:, 1] == 0).all()
    again = ours(pred, target, torch.ones_like(labels), 2, trim)
    assert torch.equal(loss, again[0]) and torch.equal(grad, again[1])


@pytest.mark.parametrize("trim", [0.0, 0.2])
def test_given_target_statistics_replace_the_targets_own(trim: float) -> None:
    pred, target, labels = maps(8)
    stats = statistics(target, labels, 2)
    own, given = ours(pred, target, labels, 2, trim), ours(pred, target, labels, 2, trim, stats)
    assert torch.equal(own[0], given[0]) and torch.equal(own[1], given[1])
    other = (stats[0].double() + 1, stats[1].double() * 2)
    assert_alike(ours(pred, target, labels, 2, trim, other), expected(pred, target, labels, 2, trim, other))


def test_upstream_gradient_per_sample_and_region() -> None:
    pred, target, labels = maps(9)
    upstream = torch.tensor([[2.0, -3.0], [0.0, 0.5]], device=DEVICE)
    given = (pred, target, labels, 2, 0.1, None, upstream)
    assert_alike(ours(*given), expected(*given))


def test_ties_at_the_median_share_its_gradient() -> None:
    pred, target, labels = maps(10)
    pred = (pred * 2).round()
    assert_alike(ours(pred, target, labels, 2), expected(pred, target, labels, 2))


@pytest.mark.parametrize("trim", [0.1, 0.3, 0.7, 0.999999])
def test_ties_at_the_threshold_share_what_is_kept(trim: float) -> None:
    # Half of the pixels at 0 and a quarter at either end: median 0 and deviation 2, so residuals are exact eighths.
    pred = torch.tensor([-4.0, 0.0, 0.0, 4.0], device=DEVICE).repeat(160).view(1, 20, 32)
    target = torch.randint(-2, 3, pred.shape, generator=torch.Generator().manual_seed(11)).to(DEVICE) / 4
    stats = (torch.zeros(1, 1, device=DEVICE), torch.full((1, 1), 2.0, device=DEVICE))
    wanted = expected(pred, target, None, 1, trim, stats)
    assert_alike(ours(pred, target, None, 1, trim, stats), wanted)
    assert len(wanted[1].unique()) < 30


def test_equal_maps_have_loss_0_and_no_gradient() -> None:
    pred, _, labels = maps(12)
    loss, grad = ours(pred, pred * 4, labels, 2)
    assert (loss == 0).all() and (grad == 0).all()


@pytest.mark.parametrize("trim", [0.0, 0.1])
def test_the_gradient_is_orthogonal_to_shift_and_scale(trim: float) -> None:
    pred, target, labels = maps(13)
    _, grad = ours(pred, target, labels, 2, trim)
    for b, g in itertools.product(range(2), (1, 2)):
        inside = labels[b] == g
        mine, x = grad[b][inside].double(), pred[b][inside].double()
        assert abs(mine.sum().item()) < 1e-6 * mine.abs().sum().item()
        assert abs((mine * x).sum().item()) < 1e-6 * (mine * x).abs().sum().item()
        assert mine.abs().sum() > 0.1
    assert (grad[labels == 0] == 0).all()


@pytest.mark.parametrize("trim", [0.0, 0.2])
def test_scale_shift_and_order_of_pixels_do_not_matter(trim: float) -> None:
    pred, target, labels = maps(14)
    loss, _ = ours(pred, target, labels, 2, trim)
    for scale, shift in [(0.37, 5.0), (12.0, -3.0)]:
        # Rounding of the moved map: its magnitude over its spread times 6e-8.
        torch.testing.assert_close(ours(pred * scale + shift, target, labels, 2, trim)[0], loss, rtol=2e-6, atol=0)
        torch.testing.assert_close(ours(pred, target * scale + shift, labels, 2, trim)[0], loss, rtol=2e-6, atol=0)
    order = torch.randperm(23 * 31, generator=torch.Generator().manual_seed(14)).to(DEVICE)
    shuffled = [x.flatten(1)[:, order].view(x.shape) for x in (pred, target, labels)]
    torch.testing.assert_close(ours(*shuffled, 2, trim)[0], loss, rtol=TOLERANCE, atol=0)


def test_regions_in_one_call_equal_regions_one_by_one() -> None:
    pred, target, labels = maps(15, regions=3)
    together, grad = ours(pred, target, labels, 3, 0.1)
    for g in range(3):
        alone, alone_grad = ours(pred, target, (labels == g + 1).to(torch.uint8), 1, 0.1)
        torch.testing.assert_close(together[:, g : g + 1], alone, rtol=TOLERANCE, atol=0)
        torch.testing.assert_close(torch.where(labels == g + 1, grad, 0.0), alone_grad, rtol=1e-5, atol=1e-8)


def test_the_same_bits_every_time() -> None:
    pred, target, labels = maps(16)
    runs = []
    for _ in range(2):
        loss, code, terms = triton_affine.forward(rows(pred), rows(target), rows(labels), 2, 0.1, None)
        runs.append((loss, code, terms, triton_affine.backward(loss, code, terms, torch.float32)))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("trim", [0.0, 0.3])
def test_codes_and_terms_are_those_of_the_contract(trim: float) -> None:
    pred, target, labels = maps(17)
    _, code, terms = triton_affine.forward(rows(pred), rows(target), rows(labels), 2, trim, None)
    value = code.view(pred.shape).int() - 1
    assert ((value < 0) == (labels == 0)).all() and terms.shape == (2, 2, 4)
    tied = 0
    for b, g in itertools.product(range(2), range(2)):
        inside = labels[b] == g + 1
        state = value[b][inside] - codes.STATES * g
        assert ((state >= 0) & (state < codes.STATES)).all()
        x, y = pred[b][inside].double(), target[b][inside].double()
        p, q = ((z - z.median()) / (z - z.median()).abs().mean() for z in (x, y))
        kept = len(x) - reference.trimmed_count(len(x), trim)
        threshold = (p - q).abs().sort().values[kept - 1]
        sign = torch.where((p - q).abs() <= threshold * (1 + 1e-12), (p - q).sign(), 0)
        assert torch.equal(state % codes.SIGNS, (3 * (sign + 1) + (x - x.median()).sign() + 1).int())
        tied += int((state >= codes.SIGNS).sum())
        A, _, _, W = terms[b, g].tolist()
        assert pytest.approx(1 / (kept * (x - x.median()).abs().mean().item()), rel=TOLERANCE) == A and W == 1.0
    assert tied == (4 if trim else 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("other", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 9, 13), (1, 16, 32)])
def test_half_precision_is_computed_in_float32(
    shape: tuple[int, int, int], dtype: torch.dtype, other: torch.dtype
) -> None:
    pred, target, labels = maps(18, shape)
    pred, target = pred.to(dtype), target.to(other)
    loss, grad = ours(pred, target, labels, 2)
    wide_loss, wide_grad = ours(pred.float(), target.float(), labels, 2)
    assert torch.equal(loss, wide_loss)
    # Triton's interpreter cuts bfloat16 off where a GPU rounds: up to a unit in the last of 8 bits.
    rtol = 2**-7 if INTERPRETED and dtype == torch.bfloat16 else 0
    torch.testing.assert_close(grad, wide_grad.to(dtype), rtol=rtol, atol=0)
    assert_alike((wide_loss, wide_grad), expected(pred, target, labels, 2))
    assert_alike(ours(target.float(), pred, labels, 2), expected(target, pred, labels, 2))


def test_memory_layout_does_not_matter() -> None:
    pred, target, labels = maps(19)
    spread = [torch.stack([x.flatten(1), x.flatten(1)], -1)[..., 0] for x in (pred, target, labels)]
    assert not spread[0].is_contiguous()
    plain = triton_affine.forward(rows(pred), rows(target), rows(labels), 2, 0.1, None)
    found = triton_affine.forward(*spread, 2, 0.1, None)
    assert all(torch.equal(a, b) for a, b in zip(plain, found, strict=True))


# The corners


@pytest.mark.parametrize("trim", [0.0, 0.2])
def test_invalid_pixels_have_no_influence_whatever_they_hold(trim: float) -> None:
    pred, target, labels = maps(20)
    clean = ours(pred, target, labels, 2, trim)
    pred[labels == 0], target[labels == 0] = NAN, INF
    found = ours(pred, target, labels, 2, trim)
    assert torch.equal(clean[0], found[0]) and torch.equal(clean[1], found[1])
    median, mad = statistics(pred, labels, 2)
    assert median.isfinite().all() and mad.isfinite().all()


@pytest.mark.parametrize("trim", [0.0, 0.2])
def test_an_empty_region_gives_loss_0_and_gradient_0(trim: float) -> None:
    pred, target, labels = maps(21)
    labels[1] = 0
    labels[0][labels[0] == 2] = 0
    loss, code, terms = triton_affine.forward(rows(pred), rows(target), rows(labels), 2, trim, None)
    assert loss[0, 0] > 0 and (loss.flatten()[1:] == 0).all() and (terms.flatten(0, 1)[1:] == 0).all()
    grad = triton_affine.backward(torch.ones_like(loss), code, terms, torch.float32)
    assert (grad[1] == 0).all() and grad.isfinite().all()


@pytest.mark.parametrize("shape", [(0, 12), (3, 0)])
def test_nothing_at_all(shape: tuple[int, int]) -> None:
    x = torch.zeros(shape, device=DEVICE)
    loss, code, terms = triton_affine.forward(x, x, None, 2, 0.1, None)
    assert loss.tolist() == [[0.0, 0.0]] * shape[0] and terms.shape == (shape[0], 2, 4) and not terms.any()
    assert triton_affine.backward(loss, code, terms, torch.bfloat16).shape == shape
    median, mad, code, shares = triton_affine.median_mad(x, None, 2)
    assert median.shape == mad.shape == (shape[0], 2) and code.shape == shape and shares.shape == (shape[0], 2, 3)
    assert not (median.any() or mad.any() or shares.any())


@pytest.mark.parametrize("spread, level, alive", [(0.0, 0.5, False), (1e-7, 0.0, False), (1e-4, 0.0, True),
                                                  (1e-2, 1e5, False), (0.5, 1e5, True)])  # fmt: skip
def test_a_region_without_spread_gives_loss_0_and_gradient_0(spread: float, level: float, alive: bool) -> None:
    _, target, _ = maps(22, (1, 4, 4))
    flat = level + spread * torch.linspace(-1, 1, 16, device=DEVICE).view(1, 4, 4)
    for pair in [(flat, target), (target, flat)]:
        loss, grad = ours(*pair, None, 1)
        assert grad.isfinite().all() and bool(loss.item() > 0) == bool(grad.abs().sum() > 0) == alive
        given, _ = ours(*pair, None, 1, 0.0, reference.region_median_mad(pair[1], None, 1))
        assert bool(given.item() > 0) == alive


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("where", ["pred", "target"])
@pytest.mark.parametrize("trim", [0.0, 0.3])
def test_a_value_that_is_not_finite_shows_whatever_is_trimmed(bad: float, where: str, trim: float) -> None:
    pred, target, labels = maps(23, (2, 9, 13))
    labels[0, 0, 0] = 1
    stats = statistics(target, labels, 2)
    clean, _ = ours(pred, target, labels, 2, trim)
    (pred if where == "pred" else target)[0, 0, 0] = bad
    for given_stats in (None, stats):
        loss, code, terms = triton_affine.forward(rows(pred), rows(target), rows(labels), 2, trim, given_stats)
        assert not loss[0, 0].isfinite() and terms[0, 0].isnan().all()
        assert torch.equal(loss.flatten()[1:], clean.flatten()[1:]) and terms.flatten(0, 1)[1:].isfinite().all()
        grad = triton_affine.backward(torch.ones_like(loss), code, terms, torch.float32).view(pred.shape)
        assert grad[0][labels[0] == 1].isnan().all() and grad[0][labels[0] != 1].isfinite().all()
    flat = torch.ones_like(pred)  # the other map being degenerate does not hide it either
    pair = (pred, flat) if where == "pred" else (flat, target)
    loss, _ = ours(*pair, labels, 2, trim)
    assert not loss[0, 0].isfinite() and (loss.flatten()[1:] == 0).all()


@pytest.mark.parametrize("trim", [0.0, 0.3])
@pytest.mark.parametrize("place", [0, -1])
def test_a_label_above_the_regions_makes_its_sample_nan(place: int, trim: float) -> None:
    pred, target, labels = maps(24)
    clean, _ = ours(pred, target, labels, 2, trim)
    labels[1].view(-1)[place] = 3
    loss, grad = ours(pred, target, labels, 2, trim)
    assert loss[1].isnan().all() and torch.equal(loss[0], clean[0])
    assert grad[1][(labels[1] == 1) | (labels[1] == 2)].isnan().all()
    for value in triton_affine.median_mad(rows(pred), rows(labels), 2):
        if value.is_floating_point():
            assert value[1].isnan().all() and value[0].isfinite().all()
