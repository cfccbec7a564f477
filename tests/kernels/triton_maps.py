"""What the cases of the affine-invariant kernels share: maps, and their results by kernels and by reference.

Shape suffixes: B batch, H W pixels, P pixels of a sample, G regions.
"""

from __future__ import annotations

import math
import os

import pytest
import torch
from torch import Tensor

from kernels import reference, triton_affine, triton_common

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
