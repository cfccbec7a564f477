"""The networks: parameters and names, the decoder against a second, plain implementation, sizes, photographs.

Shape suffixes: B batch, C channel, H W pixels, h w patches, N patch tokens, D width.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model import PRESETS, DepthAnything, WeightsError, lower_bound_size
from model.types import UNUSED, EncoderOutput
from model.vit import Encoder
from tests.model.plain import loud, plain_decoder, plain_encoder

# recipes: encoder and decoder parameters, and names in the state dict, of the published files
COUNTS = {
    "vits": (22_056_576, 2_728_513, 239),
    "vitb": (86_580_480, 10_890_305, 239),
    "vitl": (304_368_640, 30_947_009, 407),
    "vitg": (1_136_480_768, 121_651_457, 631),
}


@pytest.mark.parametrize("name", [n for n in PRESETS if not n.startswith("tiny")])
def test_parameters_and_names_are_those_of_the_published_files(name: str) -> None:
    with torch.device("meta"):
        net = DepthAnything(PRESETS[name])
    encoder, decoder, keys = COUNTS[name.split("-")[1]]
    assert sum(p.numel() for p in net.pretrained.parameters()) == encoder
    assert sum(p.numel() for p in net.depth_head.parameters()) == decoder
    assert len(net.state_dict()) == keys


def test_names_are_the_official_ones() -> None:
    names = set(DepthAnything.from_preset("tiny").state_dict())
    layers = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    block = [f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")] + ["ls1.gamma", "ls2.gamma"]
    expected = {f"pretrained.blocks.{i}.{n}" for i in range(4) for n in block}
    expected |= {f"pretrained.{n}" for n in ("cls_token", "pos_embed", "mask_token")}
    modules = ["pretrained.patch_embed.proj", "pretrained.norm"]
    modules += [f"depth_head.projects.{i}" for i in range(4)] + [f"depth_head.resize_layers.{i}" for i in (0, 1, 3)]
    for k in range(1, 5):
        fusion = f"depth_head.scratch.refinenet{k}"
        modules += [f"{fusion}.out_conv"] + [f"{fusion}.resConfUnit{r}.conv{c}" for r in (1, 2) for c in (1, 2)]
        expected.add(f"depth_head.scratch.layer{k}_rn.weight")
    modules += [f"depth_head.scratch.{n}" for n in ("output_conv1", "output_conv2.0", "output_conv2.2")]
    expected |= {f"{m}.{kind}" for m in modules for kind in ("weight", "bias")}
    assert names == expected


def test_exactly_five_tensors_are_frozen_and_all_others_get_a_gradient() -> None:
    net = loud()
    net(torch.randn(1, 3, 56, 70), features=True).disparity_BHW.square().sum().backward()
    assert {n for n, p in net.named_parameters() if not p.requires_grad} == UNUSED
    assert {n for n, p in net.named_parameters() if p.grad is None} == UNUSED
    assert len(UNUSED) == 5
    split = [n for n, _ in net.encoder_parameters()] + [n for n, _ in net.decoder_parameters()]
    assert sorted(split) == sorted(n for n, _ in net.named_parameters() if n not in UNUSED)


def random_tokens(net: DepthAnything, h: int, w: int, batch: int = 2) -> EncoderOutput:
    """What an encoder might hand to this network's decoder."""
    taps = [torch.randn(batch, h * w, net.preset.width) for _ in range(4)]
    return EncoderOutput(taps, [torch.randn(batch, net.preset.width) for _ in range(4)], taps[-1])


@pytest.mark.parametrize("preset", ["tiny", "tiny-metric-outdoor"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("h", "w"), [(8, 8), (5, 7), (1, 3)])
def test_decoder_is_the_recipe(preset: str, stride: int, h: int, w: int) -> None:
    net = loud(preset, head_stride=stride)
    tokens = random_tokens(net, h, w)
    with torch.no_grad():
        got, expected = net.depth_head(tokens, h, w), plain_decoder(net, tokens, h, w)
    assert got.shape == (2, 14 * h, 14 * w)
    assert expected.std() > 1e-3
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=2e-5)


def test_one_pass_gives_depth_and_final_tokens() -> None:
    net = loud()
    image_BCHW = torch.randn(2, 3, 112, 84)
    with torch.no_grad():
        prediction = net(image_BCHW, features=True)
        blocks = plain_encoder(net, image_BCHW)
        tokens = EncoderOutput([blocks[i][:, 1:] for i in net.preset.taps], [], blocks[-1][:, 1:])
        expected = plain_decoder(net, tokens, 8, 6)
    assert prediction.depth_m_BHW is None
    torch.testing.assert_close(prediction.disparity_BHW, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(prediction.features_BND, tokens.last_BND, rtol=0, atol=1e-4)
    assert net(image_BCHW).features_BND is None


def test_a_projected_readout_joins_the_class_token_to_every_patch() -> None:
    net = loud(readout="project")
    names = {k for k in net.state_dict() if "readout" in k}
    assert names == {f"depth_head.readout_projects.{i}.0.{kind}" for i in range(4) for kind in ("weight", "bias")}
    assert net.depth_head.readout_projects[0][0].weight.shape == (96, 192)
    assert not any("readout" in k for k in DepthAnything.from_preset("tiny").state_dict())
    tokens = random_tokens(net, 5, 7)
    with torch.no_grad():
        got_BHW, expected_BHW = net.depth_head(tokens, 5, 7), plain_decoder(net, tokens, 5, 7)
        others = tokens._replace(classes=[torch.randn_like(c) for c in tokens.classes])
        other_BHW = net.depth_head(others, 5, 7)
    torch.testing.assert_close(got_BHW, expected_BHW, rtol=1e-5, atol=2e-5)
    assert (got_BHW - other_BHW).abs().max() > 1e-2
    net(torch.randn(1, 3, 56, 56)).disparity_BHW.sum().backward()
    assert all(p.grad is not None for n, p in net.named_parameters() if "readout" in n)


@pytest.mark.parametrize(("h", "w"), [(8, 8), (4, 10), (2, 2), (14, 6)])
def test_even_fusion_is_the_interpolation_on_even_grids(h: int, w: int) -> None:
    net, even = loud(), loud(fusion="even")
    image_BCHW = torch.randn(2, 3, 14 * h, 14 * w)
    with torch.no_grad():
        got_BHW, expected_BHW = even(image_BCHW).disparity_BHW, net(image_BCHW).disparity_BHW
    torch.testing.assert_close(got_BHW, expected_BHW, rtol=0, atol=1e-6)


def test_even_fusion_refuses_odd_grids() -> None:
    net = loud(fusion="even")
    for size in ((112, 98), (42, 56)):
        with pytest.raises(ValueError, match=rf"multiples of 28, found {size[0]} x {size[1]}"):
            net(torch.zeros(1, 3, *size))
    assert net.infer_image(np.zeros((90, 61, 3), np.uint8), input_size=112).shape == (90, 61)


NETS = {name: loud(name).eval() for name in ("tiny", "tiny-swiglu-metric-indoor")}
SIDES = st.integers(1, 50).map(lambda patches: 14 * patches)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(height=SIDES, width=SIDES, name=st.sampled_from(sorted(NETS)))
def test_any_sides_that_are_multiples_of_14_give_a_map_of_the_same_size(height: int, width: int, name: str) -> None:
    net = NETS[name]
    with torch.no_grad():
        prediction = net(torch.ones(1, 3, height, width), features=True)
    map_BHW = prediction.disparity_BHW if net.preset.head == "relative" else prediction.depth_m_BHW
    assert map_BHW.shape == (1, height, width) and map_BHW.dtype == torch.float32
    assert map_BHW.isfinite().all() and (map_BHW >= 0).all()
    assert prediction.features_BND.shape == (1, height * width // 196, net.preset.width)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    order=st.integers(1, 5).flatmap(lambda n: st.permutations(range(n))),
    h=st.integers(1, 9),
    w=st.integers(1, 9),
    name=st.sampled_from(sorted(NETS)),
)
def test_the_order_of_a_batch_does_not_matter(order: list[int], h: int, w: int, name: str) -> None:
    image_BCHW = torch.randn(len(order), 3, 14 * h, 14 * w, generator=torch.Generator().manual_seed(h))
    with torch.no_grad():
        straight, mixed = (NETS[name](x, features=True) for x in (image_BCHW, image_BCHW[order]))
    for field in ("disparity_BHW", "depth_m_BHW", "features_BND"):
        expected, got = getattr(straight, field), getattr(mixed, field)
        if expected is not None:  # a row of a matrix product may be summed in another order elsewhere in the batch
            torch.testing.assert_close(got, expected[order], rtol=1e-6, atol=1e-6 * expected.abs().max().item())


def test_metric_head_stays_below_its_depth() -> None:
    prediction = loud("tiny-metric-indoor")(torch.randn(1, 3, 56, 56))
    assert prediction.disparity_BHW is None
    assert prediction.depth_m_BHW.min() > 0 and prediction.depth_m_BHW.max() < 20


@pytest.mark.parametrize("seed", range(12))
def test_a_fresh_network_is_alive_and_seeded(seed: int) -> None:
    torch.manual_seed(seed)
    net = DepthAnything.from_preset("tiny")
    assert (net(torch.randn(1, 3, 112, 112)).disparity_BHW > 0).float().mean() > 0.9
    torch.manual_seed(seed)
    assert DepthAnything.from_preset("tiny").fingerprint() == net.fingerprint()


@pytest.mark.parametrize(
    ("image", "says"),
    [
        (torch.zeros(1, 4, 28, 28), r"\[B, 3, H, W\], found shape \[1, 4, 28, 28\]"),
        (torch.zeros(3, 28, 28), r"found shape \[3, 28, 28\]"),
        (torch.zeros(1, 3, 30, 28), "multiples of 14, found 30 x 28"),
        (torch.zeros(1, 3, 28, 28, dtype=torch.uint8), "found torch.uint8"),
    ],
)
def test_wrong_images_are_refused(image: Tensor, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        DepthAnything.from_preset("tiny")(image)


# --- photographs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((480, 640), (518, 686)),
        ((375, 1242), (518, 1722)),
        ((352, 1216), (518, 1792)),
        ((1365, 2048), (518, 784)),
        ((720, 1280), (518, 924)),
        ((300, 400), (518, 686)),
        ((436, 1024), (518, 1218)),
        ((1216, 1936), (518, 826)),
        ((2000, 300), (3458, 518)),
    ],
)
def test_lower_bound_size(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert lower_bound_size(*size) == expected


def test_lower_bound_size_refuses_nothing_at_all() -> None:
    with pytest.raises(ValueError, match="positive"):
        lower_bound_size(0, 10)


@pytest.mark.parametrize("size", [(112, 112), (33, 97), (1, 1), (201, 90)])
def test_infer_image_keeps_any_size(size: tuple[int, int]) -> None:
    image_HWC = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    depth_HW = loud().infer_image(image_HWC, input_size=112)
    assert depth_HW.shape == size and depth_HW.dtype == np.float32
    assert np.isfinite(depth_HW).all() and (depth_HW >= 0).all()


def test_infer_image_is_normalise_forward_resize_and_versions_differ() -> None:
    image_HWC = np.random.default_rng(0).integers(0, 256, (90, 130, 3), dtype=np.uint8)
    v2 = loud()
    v1 = loud(output_align_corners=False)
    for net in (v1, v2):
        net.depth_head.scratch.output_conv2[2].weight.data *= 30
    scaled = F.interpolate(torch.from_numpy(image_HWC).permute(2, 0, 1)[None] / 255.0, (112, 168), mode="bicubic")
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        map_BHW = v2((scaled - mean.view(3, 1, 1)) / std.view(3, 1, 1)).disparity_BHW
    for net, corners in ((v1, False), (v2, True)):
        expected = F.interpolate(map_BHW[None], (90, 130), mode="bilinear", align_corners=corners)[0, 0]
        np.testing.assert_allclose(net.infer_image(image_HWC, 112), expected, rtol=1e-3, atol=1e-3)
    assert np.abs(v1.infer_image(image_HWC, 112) - v2.infer_image(image_HWC, 112)).max() > 1e-2
    assert not PRESETS["v1-vits"].output_align_corners and PRESETS["v2-vits"].output_align_corners


@pytest.mark.parametrize(
    "image",
    [np.zeros((8, 8, 3), np.uint16), np.zeros((8, 8, 3)), np.zeros((8, 8), np.uint8), np.zeros((8, 8, 4), np.uint8)],
)
def test_infer_image_refuses_other_arrays(image: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"expected .* found"):
        DepthAnything.from_preset("tiny").infer_image(image)


def test_importing_the_room_imports_no_torch() -> None:
    code = (
        "import sys, model; model.PRESETS, model.lower_bound_size, model.WeightsError, model.DepthPrediction;"
        "assert 'torch' not in sys.modules and 'timm' not in sys.modules; model.DepthAnything; model.Encoder"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_an_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(WeightsError, match=r"v2-vist.*v2-vits"):
        DepthAnything.from_preset("v2-vist")


def test_the_decoder_runs_channels_last_and_its_head_in_float32() -> None:
    """Where the time goes on a CPU, and what a bfloat16 map would lose: it has 256 levels between two powers of two."""
    net = loud("tiny-swiglu").eval()
    formats = []
    for module in (net.depth_head.projects, net.depth_head.scratch):
        for layer in module.modules():
            if isinstance(layer, torch.nn.Conv2d) and layer.out_channels > 1:
                layer.register_forward_hook(
                    lambda _module, _inputs, out: formats.append(out.is_contiguous(memory_format=torch.channels_last))
                )
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        map_BHW = net(torch.randn(2, 3, 112, 140)).disparity_BHW
    assert len(formats) >= 20 and all(formats)
    assert map_BHW.dtype == torch.float32 and not torch.equal(map_BHW.bfloat16().float(), map_BHW)
    assert (map_BHW.bfloat16().float() != map_BHW).float().mean() > 0.9


@pytest.mark.parametrize("cls", [DepthAnything, Encoder])
def test_shapes_alone_take_no_memory_and_no_file(cls: Any) -> None:
    """The giant's weights are 5 GB: what it would take is asked on laptops, too."""
    with torch.device("meta"):
        network = cls.from_preset("v2-vitg", encoder_weights="/no/such/file")
    assert all(tensor.is_meta for tensor in network.state_dict().values())
    with torch.device("meta"):
        small = cls.from_preset("tiny").state_dict()
    real = cls.from_preset("tiny").state_dict()
    assert {name: t.shape for name, t in small.items()} == {name: t.shape for name, t in real.items()}
    assert not any(tensor.is_meta for tensor in real.values())
