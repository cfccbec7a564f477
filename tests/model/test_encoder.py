"""The encoder: position embeddings, taps, attention kernels, checkpointing of activations.

Shape suffixes: B batch, C channel, H W pixels, g side of the stored grid, h w patches, N patch tokens, T tokens with
the class token first, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import model.vit
from model import PRESETS, DepthAnything, Encoder, WeightsError
from model.positions import _resize_by_matrices, position_embedding
from model.weights import materialise, require_finite
from tests.model.plain import loud, plain_encoder, plain_position

GRIDS = [(8, 8), (4, 16), (9, 5), (13, 8), (8, 7), (1, 1), (37, 20), (50, 3)]


@pytest.mark.parametrize("mode", ["official", "exact"])
@pytest.mark.parametrize(("h", "w"), GRIDS)
def test_position_embedding_is_the_direct_formula(h: int, w: int, mode: Any) -> None:
    stored_1TD = torch.randn(1, 65, 24, generator=torch.Generator().manual_seed(0))
    got_1TD = position_embedding(stored_1TD, h, w, mode)
    assert got_1TD.shape == (1, 1 + h * w, 24)
    torch.testing.assert_close(got_1TD, plain_position(stored_1TD, h, w, mode), rtol=0, atol=2e-5)
    if (h, w) == (8, 8):
        assert torch.equal(got_1TD, stored_1TD)


def test_position_modes_differ_and_half_precision_is_resized_in_float32() -> None:
    stored_1TD = torch.randn(1, 65, 24, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact, official = (position_embedding(stored_1TD, 5, 11, mode) for mode in ("exact", "official"))
    assert (exact - official).abs().max() > 1e-2
    for got, mode in ((exact, "exact"), (official, "official")):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, plain_position(stored_1TD.float(), 5, 11, mode), rtol=0, atol=2e-5)


@pytest.mark.parametrize("g", [8, 37])
@pytest.mark.parametrize("mode", ["official", "exact"])
@pytest.mark.parametrize(("h", "w"), [*GRIDS, (37, 37), (37, 49), (74, 28)])
def test_the_matrix_form_is_the_interpolation(h: int, w: int, mode: Any, g: int) -> None:
    stored_1TD = torch.randn(1, 1 + g * g, 12, generator=torch.Generator().manual_seed(0))
    expected_hwD = position_embedding(stored_1TD, h, w, mode)[0, 1:].unflatten(0, (h, w))
    got_hwD = _resize_by_matrices(stored_1TD[0, 1:].unflatten(0, (g, g)), h, w, mode)
    # Both keep source coordinates in float32, 4e-6 apart near 37, and white noise is the steepest embedding there is:
    # each is up to 1.5e-5 of a standard deviation (4e-6 of the largest value) from the same sum in float64.
    torch.testing.assert_close(got_hwD, expected_hwD, rtol=0, atol=1e-5 * stored_1TD.abs().max().item())


@pytest.mark.parametrize("mode", ["official", "exact"])
@pytest.mark.parametrize(
    "changes", [{}, {"taps": (0, 1, 3, 4), "depth": 6}, {"ffn": "swiglu"}, {"fused_attention": True}]
)
def test_taps_are_the_named_blocks_in_order(changes: dict, mode: str) -> None:
    net = loud(position_mode=mode, **changes)
    image_BCHW = torch.randn(2, 3, 70, 98)
    with torch.no_grad():
        taps, classes, last_BND = net.pretrained(image_BCHW)
        blocks = plain_encoder(net, image_BCHW)
    assert len(taps) == len(classes) == 4
    for tap_BND, class_BD, i in zip(taps, classes, net.preset.taps, strict=True):
        torch.testing.assert_close(tap_BND, blocks[i][:, 1:], rtol=0, atol=1e-4)
        torch.testing.assert_close(class_BD, blocks[i][:, 0], rtol=0, atol=1e-4)
    torch.testing.assert_close(last_BND, blocks[-1][:, 1:], rtol=0, atol=1e-4)


def test_a_weight_nobody_sets_is_noticed() -> None:
    with torch.device("meta"):
        encoder = Encoder(PRESETS["tiny"])
    materialise(encoder)
    encoder.initialise()
    require_finite(encoder, "x")
    encoder.norm.bias.data.fill_(float("nan"))
    with pytest.raises(WeightsError, match=r"not finite .* norm\.bias"):
        require_finite(encoder, "x")


# --- activation checkpointing -------------------------------------------------------------------------------------


@contextmanager
def counting_saved_bytes() -> Iterator[dict[int, int]]:
    """{address: bytes} of every storage that autograd keeps for the backward pass, parameters included."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("changes", [{}, {"fused_attention": True, "ffn": "swiglu"}, {"readout": "project"}])
def test_checkpointing_changes_the_memory_and_not_one_bit(changes: dict, autocast: bool) -> None:
    net = loud(depth=8, taps=(1, 3, 5, 6), **changes)
    image_BCHW = torch.randn(2, 3, 112, 84)
    losses, gradients, saved_bytes = [], [], []
    for on in (False, True):
        net.pretrained.activation_checkpointing = on
        net.zero_grad()
        with counting_saved_bytes() as kept, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            prediction = net(image_BCHW, features=True)
            loss = prediction.disparity_BHW.square().mean() + prediction.features_BND.float().square().mean()
        loss.backward()
        losses.append(loss.detach())
        gradients.append({n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None})
        saved_bytes.append(sum(kept.values()))
    assert torch.equal(*losses)
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 100
    assert [n for n in gradients[0] if not torch.equal(gradients[0][n], gradients[1][n])] == []
    assert saved_bytes[1] < 0.6 * saved_bytes[0]


def test_checkpointing_recomputes_nothing_without_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    net = loud()
    image_BCHW = torch.randn(1, 3, 56, 56)
    net.pretrained.activation_checkpointing = True
    monkeypatch.setattr(model.vit, "checkpoint", None)
    with torch.no_grad():
        assert net(image_BCHW).disparity_BHW.isfinite().all()


# --- reduced precision --------------------------------------------------------------------------------------------


def test_bfloat16_autocast_is_close_and_returns_float32() -> None:
    net = loud()
    image_BCHW = torch.randn(2, 3, 112, 112)
    exact = net(image_BCHW).disparity_BHW
    with torch.autocast("cpu", torch.bfloat16):
        rough = net(image_BCHW).disparity_BHW
    rough.mean().backward()
    assert rough.dtype == torch.float32
    assert (rough - exact).abs().mean() < 0.02 * exact.abs().mean() + 0.05 * exact.std()


def test_a_whole_network_in_bfloat16_runs() -> None:
    net = loud().bfloat16()
    assert net(torch.randn(1, 3, 70, 56).bfloat16()).disparity_BHW.isfinite().all()


def spy_on_fused(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """The dtypes with which PyTorch's fused attention is called from here on."""
    calls: list[torch.dtype] = []
    original = F.scaled_dot_product_attention

    def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        calls.append(q.dtype)
        return original(q, k, v)

    monkeypatch.setattr(F, "scaled_dot_product_attention", fused)
    return calls


@pytest.mark.parametrize("shape", [(3, 65, 96), (2, 1601, 96), (1, 1, 96)])
def test_bfloat16_inference_on_the_cpu_takes_plain_products(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int, int]
) -> None:
    attention = loud(fused_attention=True).pretrained.blocks[0].attn
    x_BTD = torch.randn(*shape)
    calls = spy_on_fused(monkeypatch)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            plain_BTD = attention(x_BTD)
        assert calls == []
        fused_BTD = attention(x_BTD).detach()  # a gradient is wanted: the scores must not be kept
    assert calls == [torch.bfloat16]
    with torch.no_grad():
        exact_BTD = attention(x_BTD)
    assert calls == [torch.bfloat16, torch.float32]
    assert plain_BTD.dtype == fused_BTD.dtype == torch.bfloat16
    # bfloat16 has 8 bits: products of length 32 and 96 and the rounding of the scores are within 2 % of the largest
    for got_BTD in (plain_BTD, fused_BTD):
        assert (got_BTD.float() - exact_BTD).abs().max() < 0.02 * exact_BTD.abs().max()
    assert (plain_BTD - fused_BTD).abs().max() < 0.02 * exact_BTD.abs().max()


@torch.no_grad()
def test_bfloat16_inference_on_the_cpu_does_not_depend_on_the_batch() -> None:
    net: DepthAnything = loud(fused_attention=True).eval()
    image_BCHW = torch.randn(3, 3, 112, 98)
    with torch.autocast("cpu", torch.bfloat16):
        attention = net.pretrained.blocks[0].attn
        x_BTD = torch.randn(3, 57, 96)
        together_BTD, alone_BTD = attention(x_BTD), torch.cat([attention(x[None]) for x in x_BTD])
        together_BHW = net(image_BCHW).disparity_BHW
        alone_BHW = torch.cat([net(image[None]).disparity_BHW for image in image_BCHW])
    torch.testing.assert_close(together_BTD, alone_BTD, rtol=0, atol=0.01 * alone_BTD.abs().max().item())
    assert (together_BHW - alone_BHW).abs().max() < 0.02 * alone_BHW.mean()
