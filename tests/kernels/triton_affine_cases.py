"""What must hold of kernels/triton_affine.py. Run by test_triton_affine.py, in a process of its own: interpreted on the
CPU if TRITON_INTERPRET is set there, else compiled on a GPU.

Shape suffixes: B batch, H W pixels, P pixels of a sample, G regions.
"""

from __future__ import annotations

import itertools
import math
import os

import pytest
import torch
from torch import Tensor

from kernels import codes, reference, triton_affine, triton_common

INF, NAN = math.inf, math.nan
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
TOLERANCE = 1e-6  # some rounding errors of float32 (6e-8)
BLOCK = 512 if INTERPRETED else 1024  # on a GPU no smaller than a program's threads
SMALL = triton_common.Tuning(8, BLOCK, BLOCK, BLOCK, BLOCK, BLOCK)
Stats = tuple[Tensor, Tensor]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a small row has several programs, and those several steps."""
    monkeypatch.setattr(triton_common, "TUNING", SMALL)


def maps(
    seed: int, shape: tuple[int, int, int] = (2, 23, 31), regions: int = 2, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """A prediction, a target and labels 0..regions, all random."""
    g = torch.Generator().manual_seed(seed)
    pred = torch.randn(shape, generator=g).to(dtype)
    target = torch.rand(shape, generator=g).to(dtype)
    labels = torch.randint(0, regions + 1, shape, generator=g, dtype=torch.uint8)
    return pred.to(DEVICE), target.to(DEVICE), labels.to(DEVICE)


def rows(x_BHW: Tensor | None) -> Tensor | None:
    return None if x_BHW is None else x_BHW.flatten(1)


def ours(
    pred: Tensor,
    target: Tensor,
    labels: Tensor | None,
    regions: int,
    trim: float = 0.0,
    stats: Stats | None = None,
    upstream: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Loss and gradient by the kernels."""
    loss, code, terms = triton_affine.forward(rows(pred), rows(target), rows(labels), regions, trim, stats)
    assert loss.dtype == terms.dtype == torch.float32 and code.dtype == torch.uint8
    upstream = torch.ones_like(loss) if upstream is None else upstream
    grad = triton_affine.backward(upstream, code, terms, pred.dtype)
    assert grad.dtype == pred.dtype and grad.is_contiguous()
    return loss, grad.view(pred.shape)


def expected(
    pred: Tensor,
    target: Tensor,
    labels: Tensor | None,
    regions: int,
    trim: float = 0.0,
    stats: Stats | None = None,
    upstream: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The same by the reference in float64."""
    wide = pred.detach().double().requires_grad_()
    loss = reference.affine_invariant_loss(wide, target.double(), labels, regions, trim, stats)
    upstream = torch.ones_like(loss) if upstream is None else upstream.double()
    (grad,) = torch.autograd.grad(loss, wide, upstream)
    return loss.detach(), grad


def assert_alike(found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> None:
    """Loss and gradient, the latter against the largest of its kind."""
    torch.testing.assert_close(found[0].double(), wanted[0], rtol=TOLERANCE, atol=0)
    torch.testing.assert_close(found[1].double(), wanted[1], rtol=0, atol=TOLERANCE * wanted[1].abs().max().item())


def statistics(x: Tensor, labels: Tensor | None = None, regions: int = 1) -> tuple[Tensor, Tensor]:
    median, mad, _, _ = triton_affine.median_mad(rows(x), rows(labels), regions)
    return median, mad


def one_row(*values: float) -> Tensor:
    return torch.tensor(values, device=DEVICE).view(1, 1, -1)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


# Statistics


def assert_exact_median(x: Tensor, labels: Tensor, regions: int) -> None:
    """The median of every region to the bit, and its mean absolute deviation."""
    median, mad = statistics(x, labels, regions)
    for b, g in itertools.product(range(len(x)), range(regions)):
        inside = x[b][labels[b] == g + 1].float()
        if inside.numel() == 0:
            assert median[b, g] == mad[b, g] == 0
            continue
        wanted = inside.median() + 0.0
        assert same_bits(median[b, g], wanted)
        torch.testing.assert_close(
            mad[b, g].double(), (inside.double() - wanted.double()).abs().mean(), rtol=TOLERANCE, atol=0
        )


@pytest.mark.parametrize("kind", ["normal", "ties", "zeros", "signed zeros", "offset", "far", "powers", "bf16", "fp16"])
@pytest.mark.parametrize("shape", [(2, 3, 7), (1, 37, 53)])
def test_median_is_exact(kind: str, shape: tuple[int, int, int]) -> None:
    x, y, labels = maps(1, shape, regions=2)
    x = {
        "normal": x,
        "ties": (x * 3).round(),
        "zeros": x.relu(),
        "signed zeros": torch.where(y > 0.3, torch.copysign(torch.zeros_like(x), x), x),
        "offset": x + 1024,
        "far": x * 0.01 - 3e6,
        "powers": 1 + x * 1e-3,  # from just below a power of two to just above
        "bf16": x.bfloat16(),
        "fp16": x.half(),
    }[kind]
    assert_exact_median(x, labels, 2)


@pytest.mark.parametrize("regions", [1, 3, 8])
def test_median_of_many_regions(regions: int) -> None:
    x, _, labels = maps(2, (2, 24, 26), regions)
    labels[1][labels[1] == regions] = 0  # an empty one
    assert_exact_median(x, labels, regions)


@pytest.mark.parametrize(
    "values",
    [
        [3.0],
        [2.0, 1.0],
        [5.0, 1.0, 3.0],
        [4.0, 1.0, 3.0, 2.0],
        [0.0, 0.0, 0.0, 7.0, 0.0],
        [-0.0],
        [-0.0, 0.0],
        [0.0, -0.0],
        [-0.0, -0.0, 0.0, 1.0, -1.0],
        [1.0, 2.0, 2.0, 2.0, 3.0, 9.0],
        [1e30, -1e30, 1e-30, 2.0**-126],
        [2.0**-149, -(2.0**-149), 2.0**-149],
        [1.0, 2.0, 4.0, 8.0, 16.0, 32.0],
        [1000.0, 1000.0001, 999.9999],
        [INF, 1.0, 2.0],
        [-INF, INF, 0.5, 0.25],
        [INF, INF, 1.0],
        [-INF, -INF, 1.0],
        [NAN, 1.0, 2.0],
        [1.0, -NAN, 2.0, INF],
    ],
)
def test_median_of_a_few_values(values: list[float]) -> None:
    median, mad = statistics(one_row(*values))
    wanted = [x.item() for x in reference.region_median_mad(one_row(*values), None, 1)]
    assert math.isnan(median.item()) if math.isnan(wanted[0]) else median.item() == wanted[0]
    if not math.isnan(wanted[0]):
        assert math.copysign(1.0, median.item()) == math.copysign(1.0, wanted[0])
    assert mad.item() == pytest.approx(wanted[1], rel=TOLERANCE, nan_ok=True)


def test_statistics_do_not_depend_on_how_work_is_cut_up(monkeypatch: pytest.MonkeyPatch) -> None:
    x, _, labels = maps(3, (1, 37, 53))
    found = []
    for programs, block in [(1, 4096), (1, 1024), (100, 1024), (100, BLOCK), (3, BLOCK)]:
        monkeypatch.setattr(triton_common, "TUNING", triton_common.Tuning(programs, *[block] * 5))
        median, mad, code, shares = triton_affine.median_mad(rows(x), rows(labels), 2)
        found.append((median, code, shares))
        torch.testing.assert_close(mad, reference.region_median_mad(x, labels, 2)[1], rtol=TOLERANCE, atol=0)
    assert all(torch.equal(a, b) for other in found for a, b in zip(found[0], other, strict=True))


def test_the_work_is_shared_as_these_tests_want() -> None:
    for pixels, ctas, steps in [(23 * 31, 2, 1), (64 * 96, 2, 6)] if INTERPRETED else []:
        work = triton_common.launch(4, pixels, BLOCK)
        assert (work.ctas, work.steps) == (ctas, steps)
    half = torch.zeros(1, dtype=torch.bfloat16)
    assert [triton_common.launch(4, p, BLOCK, half, half).vector for p in (64, 12, 7)] == [8, 4, 1]
    assert [triton_common.launch(4, p, BLOCK, half, torch.zeros(1)).vector for p in (64, 12, 7)] == [4, 4, 1]


def test_gradient_of_the_statistics_from_codes_and_shares() -> None:
    x, _, labels = maps(4)
    x = (x * 8).round() / 8
    labels[0][labels[0] == 2] = 0
    wide = x.double().requires_grad_()
    median, mad = reference.region_median_mad(wide, labels, 2)
    by_median, by_mad = torch.tensor([[2.0, -1.0], [0.5, 3.0]]), torch.tensor([[1.0, 4.0], [-2.0, 0.25]])
    by_median, by_mad = by_median.to(DEVICE), by_mad.to(DEVICE)
    (wanted,) = torch.autograd.grad((median * by_median + mad * by_mad).sum(), wide)
    _, _, code, shares = triton_affine.median_mad(rows(x), rows(labels), 2)
    zero = torch.zeros_like(by_mad)
    at_median = by_median * shares[..., 0] + by_mad * shares[..., 2]
    terms = torch.stack([zero, by_mad * shares[..., 1], at_median, zero], -1)
    grad = triton_affine.backward(torch.ones_like(zero), code, terms, torch.float32).view(x.shape)
    torch.testing.assert_close(grad.double(), wanted, rtol=TOLERANCE, atol=1e-9)
    assert (shares[0, 1] == 0).all()


# Loss and gradient


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
