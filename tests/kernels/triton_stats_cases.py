"""What must hold of kernels/triton_stats.py and the selection below it. Run by test_triton_affine.py, in a process of
its own: interpreted on the CPU if TRITON_INTERPRET is set there, else compiled on a GPU.

Shape suffixes: B batch, H W pixels, P pixels of a sample, G regions.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from kernels import reference, triton_affine, triton_common
from tests.kernels.triton_maps import (
    BLOCK,
    DEVICE,
    INF,
    INTERPRETED,
    NAN,
    TOLERANCE,
    maps,
    one_row,
    rows,
    same_bits,
    small_blocks,
    statistics,
)

__all__ = ["small_blocks"]  # a fixture: pytest finds it here


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
