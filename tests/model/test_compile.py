"""torch.compile takes the whole network in one graph, and one graph serves every size.

Shape suffixes: B batch, C channel, H W pixels, N patch tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._inductor.config
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from model import DepthAnything, DepthPrediction
from tests.model.plain import loud

# The stored grid's size among others, upright and lying, several batches; none of 1, which is always its own graph.
SIZES = [(2, 112, 140), (3, 70, 98), (2, 126, 112), (4, 252, 56), (2, 112, 112)]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(
    net: DepthAnything, backend: str, dynamic: bool
) -> tuple[Callable[[Tensor], DepthPrediction], CompileCounterWithBackend]:
    """The network compiled in one graph, or an error; and the counter of such graphs."""
    counter = CompileCounterWithBackend(backend)
    return torch.compile(lambda x: net(x, features=True), backend=counter, fullgraph=True, dynamic=dynamic), counter


def assert_same(got: DepthPrediction, expected: DepthPrediction) -> None:
    """Both predictions have the same fields, equal up to rounding: compiled, the positions are resized by matrices."""
    for field in ("disparity_BHW", "depth_m_BHW", "features_BND"):
        assert (getattr(got, field) is None) == (getattr(expected, field) is None)
        if getattr(got, field) is not None:
            scale = getattr(expected, field).detach().abs().max().item()
            torch.testing.assert_close(getattr(got, field), getattr(expected, field), rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize("mode", ["official", "exact"])
@pytest.mark.parametrize("preset", ["tiny", "tiny-swiglu-metric-indoor"])
@pytest.mark.parametrize("size", [(1, 112, 112), (2, 70, 98)])
def test_compiles_without_a_graph_break(preset: str, mode: str, size: tuple[int, int, int]) -> None:
    net = loud(preset, position_mode=mode).eval()
    run, counter = compiled(net, "eager", dynamic=False)
    batch, height, width = size
    with torch.no_grad():
        image_BCHW = torch.randn(batch, 3, height, width)
        assert_same(run(image_BCHW), net(image_BCHW, features=True))
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("backend", "changes"),
    [
        ("eager", {"position_mode": "official"}),
        ("eager", {"position_mode": "exact"}),
        ("eager", {"fused_attention": True, "ffn": "swiglu", "readout": "project"}),
        ("aot_eager", {"position_mode": "official"}),
    ],
)
def test_one_graph_serves_every_size(backend: str, changes: dict[str, Any]) -> None:
    net = loud(**changes).eval()
    run, counter = compiled(net, backend, dynamic=True)
    graphs = []
    with torch.no_grad():
        for batch, height, width in SIZES:
            image_BCHW = torch.randn(batch, 3, height, width)
            assert_same(run(image_BCHW), net(image_BCHW, features=True))
            graphs.append(counter.frame_count)
    assert len(set(graphs)) == 1  # 2 where the compiler began again, for the constants of the position embedding


def test_inductor_compiles_it() -> None:
    net = loud("tiny-swiglu").eval()
    # One thread: inductor's pool of compilers would outlive the test.
    with torch._inductor.config.patch(compile_threads=1), torch.no_grad():
        run, _ = compiled(net, "inductor", dynamic=False)
        image_BCHW = torch.randn(2, 3, 70, 98)
        assert_same(run(image_BCHW), net(image_BCHW, features=True))


@pytest.mark.parametrize(
    ("mode", "checkpointing", "dynamic"),
    [("official", False, False), ("official", True, False), ("official", False, True), ("exact", True, True)],
)
def test_training_compiles_too(mode: str, checkpointing: bool, dynamic: bool) -> None:
    net = loud(position_mode=mode, fused_attention=True).train()
    net.pretrained.activation_checkpointing = checkpointing
    run, counter = compiled(net, "aot_eager", dynamic)
    graphs = []
    for batch, height, width in SIZES[:2] if dynamic else SIZES[:1]:
        image_BCHW = torch.randn(batch, 3, height, width)
        gradients = []
        predictions = run(image_BCHW), net(image_BCHW, features=True)
        assert_same(*predictions)
        for prediction in predictions:
            net.zero_grad()
            (prediction.disparity_BHW.square().mean() + prediction.features_BND.square().mean()).backward()
            gradients.append({n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None})
        got, expected = gradients
        assert got.keys() == expected.keys()
        for name, gradient in expected.items():  # rounding pushes a few of the decoder's ReLUs over their kink
            assert (got[name] - gradient).norm() <= 2e-3 * gradient.norm(), name
        graphs.append(counter.frame_count)
    assert len(set(graphs)) == 1
