"""The CPU backend at the sizes of training, and the operators as torch.compile, meta tensors and autograd see them.

Shape suffixes: B batch, H W pixels, P pixels of one sample, G regions, N tokens, D width.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
import warnings
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels import (
    affine_invariant_loss,
    cosine_margin_loss,
    cpu_affine,
    cpu_common,
    cpu_cosine,
    ops,
    region_median_mad,
)
from kernels.codes import CODES, FUSED_REGIONS, STATES

SHAPE = (3, 126, 154)


def maps(seed: int = 0, regions: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """A prediction behind a ReLU, a target, labels 0..regions."""
    g = torch.Generator().manual_seed(seed)
    target_BHW = torch.rand(SHAPE, generator=g)
    pred_BHW = (target_BHW + 0.3 * torch.randn(SHAPE, generator=g)).relu()
    return pred_BHW, target_BHW, torch.randint(0, regions + 1, SHAPE, generator=g, dtype=torch.uint8)


def features(seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    frozen_BND = torch.randn(3, 70, 96, generator=g)
    noise_BN1 = torch.linspace(0.05, 2, 70).view(1, 70, 1)
    return frozen_BND + noise_BN1 * torch.randn(3, 70, 96, generator=g), frozen_BND


def test_codes_fit_a_byte() -> None:
    assert CODES == 1 + STATES * FUSED_REGIONS <= 256


@pytest.mark.parametrize("regions", [1, 2, FUSED_REGIONS])
@pytest.mark.parametrize("trim", [0.0, 0.1, 0.5])
def test_value_and_gradient_are_the_references_in_float64(regions: int, trim: float) -> None:
    pred, target, labels = maps(regions, regions)
    upstream_BG = torch.rand(len(pred), regions, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    results = []
    for dtype, backend in ((torch.float32, "cpu"), (torch.float64, "reference")):
        x = pred.detach().to(dtype).requires_grad_()
        loss_BG = affine_invariant_loss(x, target.to(dtype), labels, regions, trim, backend=backend)
        (loss_BG * upstream_BG).sum().backward()
        results.append((loss_BG.detach().double(), x.grad.double()))
    (loss, gradient), (exact_loss, exact_gradient) = results
    torch.testing.assert_close(loss, exact_loss, rtol=1e-6, atol=0)
    # Where |e| is rounding, its sign is too; and at the median or at the trimming threshold float32 has other ties.
    off = (gradient - exact_gradient).abs() > 1e-4 * exact_gradient.abs().max()
    assert off.double().mean() <= 2e-4
    same = ~off
    assert (gradient - exact_gradient)[same].abs().max() <= 2e-6 * exact_gradient.abs().max()


def test_float64_is_exact_to_rounding() -> None:
    pred, target, labels = (x.double() if x.is_floating_point() else x for x in maps())
    found = []
    for backend in ("cpu", "reference"):
        x = pred.clone().requires_grad_()
        affine_invariant_loss(x, target, labels, 2, 0.2, backend=backend).sum().backward()
        found.append(x.grad)
    assert found[0].dtype == torch.float64
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.45, 0.499, 0.55, 0.95, 1.0])
@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_selection_is_exact_whatever_is_crowded(share: float, value: float) -> None:
    x_P = np.random.default_rng(3).random(50_001, np.float32)
    x_P[np.random.default_rng(4).random(x_P.size) < share] = value
    scratch = cpu_affine._Scratch(x_P.size, x_P.dtype)
    for k in (0, 1, 25_000, 50_000):
        assert cpu_affine._kth(x_P, k, scratch) == np.sort(x_P)[k]


@pytest.fixture
def torch_threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_threads_and_repetition_do_not_change_a_bit(torch_threads: Callable[[int], None]) -> None:
    pred, target, labels = maps()
    student, frozen = features()
    results = []
    for threads in (1, 3, 3):
        torch_threads(threads)
        x, s = pred.clone().requires_grad_(), student.clone().requires_grad_()
        loss_BG = affine_invariant_loss(x, target, labels, 2, 0.1, backend="cpu")
        (loss_BG.sum() + cosine_margin_loss(s, frozen, backend="cpu")).backward()
        results.append((loss_BG.detach(), x.grad, s.grad))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_work_in_threads_is_done_once_each_and_an_error_comes_out(torch_threads: Callable[[int], None]) -> None:
    def fail(i: int) -> None:
        if i == 3:
            raise IndexError("of the work itself")

    for threads in (1, 4, 2):
        torch_threads(threads)
        done: list[int] = []
        cpu_common.in_threads(done.append, 50)
        assert sorted(done) == list(range(50))

        with pytest.raises(IndexError, match="of the work itself"):
            cpu_common.in_threads(fail, 5)
        cpu_common.in_threads(done.append, 0)


def test_nobody_still_works_for_a_call_that_has_ended(torch_threads: Callable[[int], None]) -> None:
    torch_threads(2)
    done: list[int] = []

    def work(i: int) -> None:
        if i == 0:
            raise ValueError("at once")
        time.sleep(0.01)
        done.append(i)

    with contextlib.suppress(ValueError):
        cpu_common.in_threads(work, 6)
    ended = list(done)
    time.sleep(0.1)
    assert done == ended


def test_threads_work_again_after_a_fork(torch_threads: Callable[[int], None]) -> None:
    """As a data loader's worker is forked; its copy of the pool has no threads."""
    torch_threads(2)
    cpu_common.in_threads(lambda i: None, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python's, of forking with threads
        child = os.fork()
    if child == 0:
        signal.alarm(30)
        done: list[int] = []
        cpu_common.in_threads(done.append, 8)
        os._exit(0 if sorted(done) == list(range(8)) else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_one_byte_per_pixel_is_kept() -> None:
    pred, target, labels = maps()
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        affine_invariant_loss(pred.requires_grad_(), target, labels, 2, 0.1)
    small = sum(t.numel() * t.element_size() for t in kept if t.dtype != torch.uint8)
    assert sum(t.numel() * t.element_size() for t in kept) - small == pred.numel() and small <= 4 * 4 * 2 * len(pred)


def test_dropped_tokens_get_no_gradient_and_hold_anything() -> None:
    student, frozen = features()
    mask = torch.ones(3, 70, dtype=torch.bool)
    mask[:, ::2] = False
    wild = student.clone()
    wild[:, ::2] = float("nan")
    gradients = []
    for s in (student.clone().requires_grad_(), wild.requires_grad_()):
        cosine_margin_loss(s, frozen, 0.85, mask, backend="cpu").backward()
        gradients.append(s.grad)
    assert torch.equal(gradients[0], gradients[1]) and not gradients[0][:, ::2].any()


# --- small corners, against autograd of the reference ------------------------------------------------------------


def both(loss: Callable[..., Tensor], *leaves: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(value, gradient of a weighted sum to the first leaf) by the reference and by the CPU backend."""
    found = []
    for backend in ("reference", "cpu"):
        x = leaves[0].clone().requires_grad_()
        value = loss(x, *leaves[1:], backend)
        weights = torch.linspace(0.5, 2, value.numel(), dtype=value.dtype).view(value.shape)
        found.append((value.detach(), torch.autograd.grad((value * weights).sum(), x)[0]))
    return found


@pytest.mark.parametrize("given", [False, True])
def test_ties_at_the_trimming_threshold_share_what_is_kept(given: bool) -> None:
    """Quarters: most residuals are equal to others."""
    g = torch.Generator().manual_seed(4)
    pred, target = (torch.randint(-6, 7, (3, 9, 11), generator=g).double() / 4 for _ in range(2))
    stats = (torch.zeros(3, 1).double(), torch.full((3, 1), 2.0).double()) if given else None
    for trim in (0.1, 0.3, 0.5, 0.9):

        def loss(x: Tensor, y: Tensor, backend: str, trim: float = trim) -> Tensor:
            return affine_invariant_loss(x, y, None, 1, trim, stats, backend=backend)

        reference, cpu = both(loss, pred, target)
        torch.testing.assert_close(cpu, reference, rtol=1e-12, atol=1e-14)


def test_gradients_of_the_statistics_with_ties_and_unequal_sides() -> None:
    x = torch.tensor([[[0.0, 0.0, 0.0, 1.0, 5.0, 7.0, -2.0]], [[3.0, 3.0, 3.0, 3.0, 4.0, 1.0, 0.0]]]).double()
    for which in (0, 1):

        def stat(x: Tensor, backend: str, which: int = which) -> Tensor:
            return region_median_mad(x, backend=backend)[which]

        reference, cpu = both(stat, x)
        torch.testing.assert_close(cpu, reference, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_spoils_its_region_s_gradient_alone(value: float) -> None:
    pred, target, labels = maps()
    pred[1, 3, 4] = value
    labels[1, 3, 4] = 2
    x = pred.clone().requires_grad_()
    loss_BG = affine_invariant_loss(x, target, labels, 2, 0.1, backend="cpu")
    loss_BG.sum().backward()
    spoilt = torch.zeros_like(labels, dtype=torch.bool)
    spoilt[1] = labels[1] == 2
    assert not loss_BG[1, 1].isfinite() and loss_BG.isfinite().sum() == loss_BG.numel() - 1
    assert torch.equal(x.grad.isnan(), spoilt)


@pytest.mark.parametrize("chunk", [2**20, 500, 64])
@pytest.mark.parametrize("kept", [0.1, 0.6, 1.0])
def test_tokens_in_chunks_and_blocks(monkeypatch: pytest.MonkeyPatch, chunk: int, kept: float) -> None:
    """Several chunks a sample and several blocks a chunk, as real sizes have; sparse and dense ones."""
    monkeypatch.setattr(cpu_cosine, "VALUES", chunk)
    monkeypatch.setattr(cpu_cosine, "CACHED_VALUES", 40)
    student, frozen = features()
    mask = torch.rand(student.shape[:2], generator=torch.Generator().manual_seed(1)) < kept

    def loss(s: Tensor, f: Tensor, backend: str) -> Tensor:
        return cosine_margin_loss(s, f, 0.3, mask, reduction="sum_count", backend=backend)[0]

    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        reference, cpu = both(loss, student.to(dtype), frozen.to(dtype))
        tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
        torch.testing.assert_close(cpu, reference, rtol=tolerance, atol=tolerance)


def test_scratch_grows_with_the_features(monkeypatch: pytest.MonkeyPatch) -> None:
    for width in (4, 64, 8):
        a, b = (torch.randn(1, 5, width, generator=torch.Generator().manual_seed(s)) for s in (1, 2))
        reference, cpu = both(lambda s, f, backend: cosine_margin_loss(s, f, 1.0, backend=backend), a, b)
        torch.testing.assert_close(cpu, reference)


def test_a_cosine_rounded_above_one_has_no_slope() -> None:
    """Of 1 - min(cos, 1): parallel features whose rounded cosine is above 1 push nowhere."""
    g = torch.Generator().manual_seed(0)
    frozen = torch.randn(1, 400, 3, generator=g)
    student = frozen * torch.rand(1, 400, 1, generator=g)
    norms = np.sqrt(np.einsum("nd,nd->n", student[0], student[0])) * np.sqrt(
        np.einsum("nd,nd->n", frozen[0], frozen[0])
    )
    above = torch.from_numpy(np.einsum("nd,nd->n", student[0], frozen[0]) * (1 / norms)) > 1
    assert 10 < above.sum() < 390
    s = student.requires_grad_()
    cosine_margin_loss(s, frozen, 1.0, reduction="sum_count", backend="cpu")[0].sum().backward()
    assert torch.equal(s.grad[0].any(-1) & above, torch.zeros_like(above))


def test_what_many_pixels_share_is_sorted() -> None:
    noise_K = np.random.default_rng(0).random(10_000).astype(np.float32)
    assert not cpu_affine.is_crowded(noise_K, float(noise_K.min()))
    for value, share in ((noise_K.min() - 1, 0.45), (0.5, 0.5)):
        crowded_K = noise_K.copy()
        crowded_K[np.random.default_rng(1).random(10_000) < share] = value
        assert cpu_affine.is_crowded(crowded_K, float(crowded_K.min()))


def test_higher_derivatives_are_refused_and_forward_mode_goes_to_the_reference() -> None:
    pred, target, _ = maps()
    student, frozen = features()
    for loss, leaf in (
        (lambda x: affine_invariant_loss(x, target).sum(), pred),
        (lambda x: sum(s.sum() for s in region_median_mad(x)), pred),
        (lambda x: cosine_margin_loss(x, frozen), student),
    ):
        x = leaf.clone().requires_grad_()
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(loss(x), x, create_graph=True)
        value = loss(x)
        (grad,) = torch.autograd.grad(value, x)
        direction = torch.randn(leaf.shape, generator=torch.Generator().manual_seed(2))
        _, tangent = torch.func.jvp(loss, (leaf,), (direction,))
        torch.testing.assert_close(tangent.float(), (grad * direction).sum(), rtol=1e-3, atol=1e-5)


# --- as operators -------------------------------------------------------------------------------------------------


PRED, TARGET, LABELS = maps()
STUDENT, FROZEN = features()


def affine(x: Tensor, s: Tensor) -> Tensor:
    return affine_invariant_loss(x, TARGET.to(x.device), LABELS.to(x.device), 2, 0.1).sum()


def stats(x: Tensor, s: Tensor) -> Tensor:
    median_BG, mad_BG = region_median_mad(x, LABELS.to(x.device), 2)
    return (median_BG * mad_BG).sum()


def cosine(x: Tensor, s: Tensor) -> Tensor:
    sum_B, count_B = cosine_margin_loss(s, FROZEN.to(s.device), reduction="sum_count")
    return (sum_B / count_B.clamp(min=1)).sum()


@pytest.mark.parametrize("operator", [affine, stats, cosine])
def test_compiles_in_one_graph_with_the_same_gradient(operator: Callable[[Tensor, Tensor], Tensor]) -> None:
    torch._dynamo.reset()
    found = []
    for run in (operator, torch.compile(operator, fullgraph=True, backend="aot_eager")):
        x, s = (t.clone().requires_grad_() for t in (PRED, STUDENT))
        value = run(x, s)
        value.backward()
        found.append((value.detach(), x.grad if x.grad is not None else s.grad))
    torch._dynamo.reset()
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize(
    "loss", [affine_invariant_loss, lambda x, y: cosine_margin_loss(x, y), lambda x, y: region_median_mad(x)[1]]
)
def test_compiles_in_one_graph_for_any_shape(loss: Callable[..., Tensor], dynamic: bool | None) -> None:
    """A last, smaller batch is enough to make a size unknown."""
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, y: loss(x, y).sum(), fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for shape in ((4, 5, 7), (3, 5, 7), (2, 9, 11)):
        x, y = (torch.rand(shape, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
        found = [
            torch.autograd.grad(f(leaf, y).sum(), leaf)[0]
            for f in (loss, compiled)
            if (leaf := x.clone().requires_grad_()) is not None
        ]
        assert torch.equal(found[0], found[1])
    torch._dynamo.reset()


@pytest.mark.parametrize("operator", [affine, stats, cosine])
def test_meta_tensors_have_shapes_and_gradients(operator: Callable[[Tensor, Tensor], Tensor]) -> None:
    x, s = (t.to("meta").requires_grad_() for t in (PRED, STUDENT))
    value = operator(x, s)
    value.backward()
    assert value.device.type == "meta" and value.shape == ()
    assert (s if operator is cosine else x).grad.shape == (s if operator is cosine else x).shape


def test_the_registrations_are_sound() -> None:
    pred, target, labels = (t.flatten(1) for t in maps())
    student, frozen = features()
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    x = pred.requires_grad_()
    torch.library.opcheck(ops.affine_invariant, (x, target, labels, 2, 0.1, None, None, "cpu"), test_utils=checks)
    torch.library.opcheck(ops.region_stats, (x, labels, 2, "cpu"), test_utils=checks)
    s = student.requires_grad_()
    torch.library.opcheck(ops.cosine_margin, (s, frozen, 0.85, None, "cpu"), test_utils=checks)
    # what is returned is float64 as soon as one input is
    fake = ("test_faketensor",)
    mixed = (pred.detach(), target.double(), labels, 2, 0.1, None, None, "cpu")
    torch.library.opcheck(ops.affine_invariant, mixed, test_utils=fake)
    torch.library.opcheck(ops.region_stats, (pred.detach().double(), labels, 2, "cpu"), test_utils=fake)
    torch.library.opcheck(ops.cosine_margin, (student.detach(), frozen.double(), 0.85, None, "cpu"), test_utils=fake)


def test_labels_too_large_are_refused_in_a_compiled_graph_too() -> None:
    torch._dynamo.reset()
    loss = torch.compile(affine_invariant_loss, fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match="label 2, but num_regions is 1"):
        loss(PRED, TARGET, LABELS, 1)
    torch._dynamo.reset()
