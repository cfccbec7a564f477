"""The public operators on Triton, through `torch.library`: what users call. Run by test_triton_affine.py, in a process
of its own: interpreted on the CPU if TRITON_INTERPRET is set there, else compiled on a GPU, and there CUDA graphs are
captured too.

Shape suffixes: B batch, H W pixels, G regions, N tokens, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels import affine_invariant_loss, api, cosine_margin_loss, region_median_mad, triton_affine, triton_cosine
from kernels.codes import FUSED_REGIONS
from tests.kernels.triton_maps import DEVICE, INTERPRETED, maps, rows, small_blocks

__all__ = ["small_blocks"]  # a fixture: pytest finds it here
Loss = Callable[[Tensor, str], Tensor]
on_cuda = pytest.mark.skipif(INTERPRETED, reason="no GPU in the interpreter")


def features(width: int = 24, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(5)
    student, frozen = (torch.randn(2, 19, width, generator=g).to(dtype) for _ in range(2))
    mask = torch.rand(2, 19, generator=g) < 0.7
    return student.to(DEVICE), frozen.to(DEVICE), mask.to(DEVICE)


def agree(leaf: Tensor, loss: Loss, tolerance: float = 2e-6) -> None:
    """Value and gradient of a weighted sum are those of the reference in float64."""
    found = []
    for x, backend in ((leaf.clone(), "triton"), (leaf.double(), "reference")):
        x.requires_grad_()
        value = loss(x, backend)
        weights = torch.linspace(0.5, 2, value.numel(), device=value.device, dtype=value.dtype).view(value.shape)
        (grad,) = torch.autograd.grad((value * weights).sum(), x)
        assert grad.dtype == x.dtype and grad.shape == x.shape
        found.append((value.detach().double(), grad.double()))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=tolerance, atol=0)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=0, atol=tolerance * found[1][1].abs().max().item())


@pytest.mark.parametrize("trim", [0.0, 0.1])
@pytest.mark.parametrize("regions", [1, 2, 5])
def test_the_loss(regions: int, trim: float) -> None:
    pred, target, labels = maps(1, regions=regions)

    def loss(x: Tensor, backend: str) -> Tensor:
        y = target.double() if backend == "reference" else target
        return affine_invariant_loss(x, y, labels, regions, trim, backend=backend)

    agree(pred, loss)


def test_the_loss_with_given_statistics_and_strides_and_a_bool_region() -> None:
    pred, target, labels = maps(2, regions=1)
    median_BG, mad_BG = region_median_mad(target, labels > 0, backend="triton")

    def loss(x: Tensor, backend: str) -> Tensor:
        y = target.transpose(1, 2).contiguous().transpose(1, 2)
        return affine_invariant_loss(x, y.to(x.dtype), labels > 0, target_stats=(median_BG, mad_BG), backend=backend)

    agree(pred, loss)
    agree(pred[:1].expand(2, -1, -1), loss)


@pytest.mark.parametrize("which", [0, 1])
def test_the_statistics_and_their_gradients(which: int) -> None:
    x, _, labels = maps(3, regions=3)
    x = (x * 4).round() / 4  # ties
    agree(x, lambda x, backend: region_median_mad(x, labels, 3, backend=backend)[which])


@pytest.mark.parametrize("masked", [False, True])
def test_the_cosine_margin(masked: bool) -> None:
    student, frozen, mask = features()

    def loss(s: Tensor, backend: str) -> Tensor:
        f = frozen.to(s.dtype)
        sums = cosine_margin_loss(s, f, 0.4, mask if masked else None, reduction="sum_count", backend=backend)
        return sums[0]

    agree(student, loss)
    agree(student.transpose(1, 2).contiguous().transpose(1, 2), loss)
    agree(student, lambda s, backend: cosine_margin_loss(s, frozen.to(s.dtype), 0.4, backend=backend))


def test_auto_takes_triton_where_it_can() -> None:
    pred = torch.empty(2, 3, 4, device="meta") if INTERPRETED else torch.empty(2, 3, 4, device="cuda")
    assert api._choose("triton", FUSED_REGIONS, pred) == "triton"
    if not INTERPRETED:
        assert api._choose("auto", 1, pred) == "triton"
        assert api._choose("auto", FUSED_REGIONS + 1, pred) == api._choose("auto", 1, pred.double()) == "reference"


def test_one_byte_a_pixel_and_two_numbers_a_token_are_kept() -> None:
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    pred, target, labels = maps(4)
    student, frozen, _ = features()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        affine_invariant_loss(pred.requires_grad_(), target, labels, 2, 0.1, backend="triton")
        assert [(t.dtype, t.numel()) for t in kept] == [(torch.uint8, pred.numel()), (torch.float32, 2 * 2 * 4)]
        kept.clear()
        cosine_margin_loss(student.requires_grad_(), frozen, backend="triton")
    own = [t for t in kept if t.data_ptr() not in (student.data_ptr(), frozen.data_ptr())]
    assert sum(t.numel() * t.element_size() for t in own) <= 8 * 2 * 19 + 64


@pytest.mark.parametrize("trim", [0.29, 0.9999999])
def test_trimming_is_counted_in_millionths(trim: float) -> None:
    pred, target, _ = maps(5, shape=(1, 10, 10))
    agree(pred, lambda x, backend: affine_invariant_loss(x, target.to(x.dtype), trim=trim, backend=backend))


# --- what only a GPU has


def captured(run: Callable[[], tuple[Tensor, ...]]) -> None:
    """Never waits for the device, and a replayed graph gives the same bits."""
    wanted = run()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(again, wanted, strict=True))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run()
    for value in found:
        value.fill_(math.nan if value.is_floating_point() else 0)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@on_cuda
@pytest.mark.parametrize("trim", [0.0, 0.1])
@pytest.mark.parametrize("regions", [1, 2])
def test_the_affine_loss_is_captured_and_never_waits(regions: int, trim: float) -> None:
    pred, target, labels = maps(6, shape=(3, 64, 80), regions=regions)
    upstream = torch.ones(3, regions, device=DEVICE)

    def run() -> tuple[Tensor, ...]:
        loss, code, terms = triton_affine.forward(rows(pred), rows(target), rows(labels), regions, trim, None)
        return loss, code, terms, triton_affine.backward(upstream, code, terms, torch.float32)

    captured(run)


@on_cuda
def test_statistics_and_cosine_are_captured_and_never_wait() -> None:
    x, _, labels = maps(7, shape=(3, 64, 80))
    captured(lambda: triton_affine.median_mad(rows(x), rows(labels), 2))
    student, frozen, mask = features(384, torch.bfloat16)
    upstream = torch.ones(2, device=DEVICE)

    def run() -> tuple[Tensor, ...]:
        sum_B, count_B, coef = triton_cosine.forward(student, frozen, 0.85, mask)
        return sum_B, count_B, coef, triton_cosine.backward(upstream, student, frozen, coef, torch.bfloat16)

    captured(run)


@on_cuda
def test_the_public_operators_never_wait() -> None:
    pred, target, labels = maps(8, shape=(2, 64, 80))
    student, frozen, mask = features(384)
    x, s = pred.requires_grad_(), student.requires_grad_()

    def step() -> None:
        loss = affine_invariant_loss(x, target, labels, 2, 0.1).sum() + cosine_margin_loss(s, frozen, 0.85, mask)
        loss.backward()

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
