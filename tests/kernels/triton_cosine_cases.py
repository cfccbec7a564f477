"""What must hold of kernels/triton_cosine.py. Run by test_triton_cosine.py, in a process of its own: interpreted on the
CPU if TRITON_INTERPRET is set there, else compiled on a GPU.

Shape suffixes: B batch, N tokens, D width.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from kernels import reference, triton_cosine

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
TOLERANCE = 1e-6  # some rounding errors of float32 (6e-8)


@pytest.fixture(autouse=True)
def _unwritten_memory_is_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def features(N: int, D: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Student and frozen features [3, N, D] whose cosines spread from near 1 to below 0, none of them near a margin."""
    g = torch.Generator().manual_seed(seed)
    frozen = torch.randn(3, N, D, generator=g) * 3
    noise = torch.randn(3, N, D, generator=g) * torch.linspace(0.05, 8, N).view(1, N, 1)
    student = frozen + noise
    student[:, ::4] *= -1
    student, frozen = student.to(dtype), frozen.to(dtype)
    cos = torch.nn.functional.cosine_similarity(student.double(), frozen.double(), dim=-1)
    assert all((cos - alpha).abs().min() > 1e-5 for alpha in (0.85, -0.5)), "another seed, please"
    return student.to(DEVICE), frozen.to(DEVICE)


def random_mask(N: int) -> Tensor:
    return (torch.rand(3, N, generator=torch.Generator().manual_seed(1)) > 0.4).to(DEVICE)


def expected(
    student: Tensor, frozen: Tensor, alpha: float, mask: Tensor | None, grad_sum_B: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum, count and gradient by the reference in float64."""
    wide = student.detach().double().requires_grad_()
    sum_B, count_B = reference.cosine_margin_loss(wide, frozen.double(), alpha, mask)
    (grad,) = torch.autograd.grad(sum_B, wide, grad_sum_B.double())
    return sum_B.detach(), count_B, grad


def ours(
    student: Tensor,
    frozen: Tensor,
    alpha: float,
    mask: Tensor | None,
    grad_sum_B: Tensor,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same three, by the kernels; the gradient in `dtype`."""
    sum_B, count_B, coef = triton_cosine.forward(student, frozen, alpha, mask)
    assert sum_B.dtype == count_B.dtype == coef.dtype == torch.float32
    assert mask is None or (coef[~mask] == 0).all()
    grad = triton_cosine.backward(grad_sum_B, student, frozen, coef, dtype)
    assert grad.dtype == dtype and grad.shape == student.shape
    return sum_B, count_B, grad


def upstream(*values: float) -> Tensor:
    return torch.tensor(values or (0.7, -2.0, 3.0), device=DEVICE)


def assert_sums(found_B: Tensor, wanted_B: Tensor) -> None:
    """Each sum is right to TOLERANCE of itself."""
    assert found_B.isfinite().all()
    assert ((found_B - wanted_B).abs() <= TOLERANCE * wanted_B.abs()).all()


def assert_gradient(found: Tensor, wanted: Tensor, student: Tensor, grad_sum_B: Tensor) -> None:
    """Each token's gradient is right to TOLERANCE of |grad| / |s|, the length of the two vectors whose difference it is
    and which nearly cancel where student and frozen are nearly parallel. It is exactly 0 where the reference's is."""
    unit = grad_sum_B.double().abs()[:, None] / student.double().norm(dim=-1)
    assert found.isfinite().all()
    assert ((found - wanted).norm(dim=-1) <= TOLERANCE * unit).all()
    assert torch.equal((found == 0).all(-1), (wanted == 0).all(-1))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("alpha", [1.0, 0.85, -0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("N", "D"), [(11, 5), (9, 96), (8, 128), (13, 384)])
def test_agrees_with_the_reference_in_float64(N: int, D: int, dtype: torch.dtype, alpha: float, masked: bool) -> None:
    student, frozen = features(N, D, dtype)
    mask = random_mask(N) if masked else None
    wanted = expected(student, frozen, alpha, mask, upstream())
    assert wanted[1].sum() > 0 and (alpha == 1 or wanted[1].sum() < 3 * N)
    found = ours(student, frozen, alpha, mask, upstream())
    assert torch.equal(found[1].double(), wanted[1])
    assert_sums(found[0], wanted[0])
    assert_gradient(found[2], wanted[2], student, upstream())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_gradient_of_half_precision_is_the_rounded_one(dtype: torch.dtype) -> None:
    student, frozen = features(13, 96, dtype)
    wide = ours(student, frozen, 0.85, None, upstream())[2]
    narrow = ours(student, frozen, 0.85, None, upstream(), dtype)[2]
    if INTERPRETED and dtype == torch.bfloat16:  # the interpreter cuts bits off where a GPU rounds
        wide = (wide.view(torch.int32) & -(2**16)).view(torch.float32)
    assert torch.equal(narrow, wide.to(dtype))
    wanted = expected(student, frozen, 0.85, None, upstream())[2]
    # A bfloat16 has 8 bits: cut off, not rounded, it is off by up to 2**-7 of its value.
    assert (narrow.double() - wanted).square().mean().sqrt() < 4e-3 * wanted.square().mean().sqrt()


def test_student_and_frozen_may_differ_in_dtype() -> None:
    student, frozen = features(9, 96)
    narrow = frozen.to(torch.bfloat16)
    found, wanted = ours(student, narrow, 1.0, None, upstream()), ours(student, narrow.float(), 1.0, None, upstream())
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("alpha", [1.0, 0.85])
def test_masked_tokens_have_no_influence_whatever_they_hold(alpha: float) -> None:
    student, frozen = features(13, 96)
    mask = random_mask(13)
    clean = ours(student, frozen, alpha, mask, upstream())
    student[~mask] = math.nan
    frozen[~mask] = math.inf
    found = ours(student, frozen, alpha, mask, upstream())
    assert all(torch.equal(a, b) for a, b in zip(found, clean, strict=True))
    assert (found[2][~mask] == 0).all()


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("alpha", [1.0, -0.5])
def test_nan_shows_in_its_own_sample_and_token(side: int, bad: float, alpha: float) -> None:
    pair = features(11, 96)
    pair[side][1, 9, 95] = bad
    wanted = expected(*pair, alpha, None, upstream())
    found = ours(*pair, alpha, None, upstream())
    assert found[0].isnan().tolist() == wanted[0].isnan().tolist() == [False, True, False]
    assert torch.equal(found[1].double(), wanted[1])
    broken = wanted[2].isnan().any(-1)  # of an infinite token, the reference breaks only some channels
    assert broken.tolist() == [[(b, n) == (1, 9) for n in range(11)] for b in range(3)]
    assert found[2][broken].isnan().all()
    found[2][broken], wanted[2][broken], pair[0][broken] = 0.0, 0.0, 1.0
    assert_gradient(found[2], wanted[2], pair[0], upstream())


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize(("length", "counts"), [(0.0, 0), (0.9e-6, 0), (1.1e-6, 1)])
def test_a_feature_without_direction_is_not_counted(side: int, length: float, counts: int) -> None:
    pair = features(9, 5)
    pair[side][2, 8] *= length / pair[side][2, 8].norm()
    found = ours(*pair, 1.0, None, upstream())
    wanted = expected(*pair, 1.0, None, upstream())
    assert found[1].tolist() == wanted[1].tolist() == [9, 9, 8 + counts]
    assert_sums(found[0], wanted[0])
    assert_gradient(found[2], wanted[2], pair[0], upstream())
    assert bool((found[2][2, 8] != 0).any()) == bool(counts)


@pytest.mark.parametrize("grad", [1.0, math.nan, math.inf])
def test_nothing_kept_gives_0_whatever_comes_from_above(grad: float) -> None:
    _, frozen = features(9, 96)
    found = ours(frozen * 2, frozen, 0.85, None, upstream(grad, grad, grad))
    assert all((value == 0).all() for value in found)


@pytest.mark.parametrize("D", [5, 96, 384])
def test_alpha_1_keeps_parallel_tokens_whatever_the_rounding(D: int) -> None:
    _, frozen = features(40, D)
    sum_B, count_B, coef = triton_cosine.forward(frozen * 3, frozen, 1.0, None)
    assert count_B.tolist() == [40, 40, 40]
    assert (sum_B >= 0).all() and (sum_B < 1e-5).all()
    grad = triton_cosine.backward(upstream(), frozen * 3, frozen, coef, torch.float32)
    assert grad.abs().max() < 1e-5
    # As behind clamp() in the reference: some cosines were rounded to above 1, and these have no gradient at all.
    steep = coef[..., 1] != 0
    assert 0 < (~steep).sum() < 120 and (grad[~steep] == 0).all() and (coef[~steep] == 0).all()


def test_a_cosine_of_exactly_1_has_the_slope_that_clamp_gives_it() -> None:
    student, frozen = torch.zeros(1, 1, 5, device=DEVICE), torch.zeros(1, 1, 5, device=DEVICE)
    student[..., :2], frozen[..., :2] = torch.tensor([4.0, 0.0]), torch.tensor([2.0, 0.0])
    sum_B, count_B, coef = triton_cosine.forward(student, frozen, 1.0, None)
    assert (sum_B.item(), count_B.item(), coef.flatten().tolist()) == (0.0, 1.0, [1 / 16, 1 / 8])


@pytest.mark.parametrize(("alpha", "kept"), [(0.6, 1), (0.59999, 0), (0.60001, 1)])
def test_a_cosine_equal_to_the_margin_is_kept(alpha: float, kept: int) -> None:
    student, frozen = torch.zeros(1, 1, 5, device=DEVICE), torch.zeros(1, 1, 5, device=DEVICE)
    student[..., :2], frozen[..., 0] = torch.tensor([3.0, 4.0]), 1.0
    _, count_B, coef = triton_cosine.forward(student, frozen, alpha, None)
    wanted = reference.cosine_margin_loss(student, frozen, alpha, None)[1]
    assert count_B.item() == wanted.item() == kept and (coef != 0).all() == bool(kept)


def test_the_same_bits_in_every_run_and_whatever_else_is_in_the_batch() -> None:
    student, frozen = features(29, 96)
    first, second = (ours(student, frozen, 0.85, None, upstream()) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    alone = ours(student[1:2], frozen[1:2], 0.85, None, upstream()[1:2])
    assert all(torch.equal(a[1:2], b) for a, b in zip(first, alone, strict=True))


def test_more_tiles_than_are_added_up_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    student, frozen = features(37, 96)
    wanted = expected(student, frozen, 0.85, None, upstream())
    monkeypatch.setattr(triton_cosine, "TOTAL_BLOCK", 2)
    found = ours(student, frozen, 0.85, None, upstream())
    assert torch.equal(found[1].double(), wanted[1])
    assert_sums(found[0], wanted[0])


def test_views_are_read_where_they_lie() -> None:
    """Tokens behind a class token, transposed channels, every second token; all that lies between them is NaN."""
    student, frozen = features(11, 96)
    mask = random_mask(11)
    wanted = ours(student, frozen, 0.85, mask, upstream(2.0, 2.0, 2.0))
    around = torch.full((3, 12, 99), math.nan, device=DEVICE)
    around[:, 1:, 2:98] = student
    behind, rows = around[:, 1:, 2:98], frozen.repeat_interleave(2, 1)
    rows[:, 1::2] = math.nan
    transposed = student.mT.contiguous().mT
    spread = torch.full((3, 22), True, device=DEVICE)
    spread[:, ::2] = mask
    for view in (behind, transposed):
        assert not view.is_contiguous() and not spread[:, ::2].is_contiguous()
        found = ours(view, rows[:, ::2], 0.85, spread[:, ::2], torch.tensor(2.0, device=DEVICE).expand(3))
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True)) and found[2].is_contiguous()


def test_one_feature_for_all_tokens() -> None:
    student, frozen = features(11, 96)
    shared = frozen[:1, :1].expand(3, 11, 96)
    found, wanted = (f(student, shared, 1.0, None, upstream()) for f in (ours, expected))
    assert_sums(found[0], wanted[0])
    assert_gradient(found[2], wanted[2], student, upstream())


@pytest.mark.parametrize("shape", [(0, 4, 96), (2, 0, 96), (2, 4, 0)])
def test_nothing_to_do(shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a launch: one of no programs is an error on a GPU, though not in the interpreter."""
    for kernel in ("_forward_kernel", "_total_kernel", "_backward_kernel"):
        monkeypatch.setattr(triton_cosine, kernel, None)
    empty = torch.empty(shape, device=DEVICE)
    found = ours(empty, empty, 0.85, torch.ones(shape[:2], dtype=torch.bool, device=DEVICE), upstream()[: shape[0]])
    assert found[0].tolist() == found[1].tolist() == [0.0] * shape[0] and found[2].numel() == 0
