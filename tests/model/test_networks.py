"""The networks: sizes, taps, position embeddings, and the decoder against a second, plain implementation.

Shape suffixes: B batch, C channel, H W pixels, h w patches, N patch tokens, T tokens with the class token, D width.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model import PRESETS, DepthAnything, Encoder, WeightsError, get_preset, lower_bound_size
from model.weights import UNUSED, materialise, require_finite

# recipes: encoder and decoder parameters, and names in the state dict, of the published files
COUNTS = {
    "vits": (22_056_576, 2_728_513, 239),
    "vitb": (86_580_480, 10_890_305, 239),
    "vitl": (304_368_640, 30_947_009, 407),
    "vitg": (1_136_480_768, 121_651_457, 631),
}


def loud(preset: str = "tiny", seed: int = 0, **changes: object) -> DepthAnything:
    """A network whose LayerScale, position embedding and biases are large, so that no part can hide."""
    torch.manual_seed(seed)
    net = DepthAnything.from_preset(replace(get_preset(preset), **changes))
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name.endswith(("gamma", "pos_embed", "cls_token")):
                parameter.normal_(0, 1)
            elif name.endswith("norm.bias") or "norm1" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return net


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


def plain_encoder(net: DepthAnything, image_BCHW: Tensor) -> list[Tensor]:
    """Every block's tokens through the final norm, class token dropped; written out from DINOv2's definition."""
    w = {k.removeprefix("pretrained."): v for k, v in net.state_dict().items()}
    p = net.preset
    size_B, _, height, width = image_BCHW.shape
    x = F.conv2d(image_BCHW, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=14)
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat([w["cls_token"].expand(size_B, -1, -1), x], 1)
    x = x + plain_position(w["pos_embed"], height // 14, width // 14, p.grid)
    out = []
    for i in range(p.depth):
        b = f"blocks.{i}."

        def linear(x: Tensor, name: str, b: str = b) -> Tensor:
            return x @ w[f"{b}{name}.weight"].T + w[f"{b}{name}.bias"]

        y = F.layer_norm(x, (p.width,), w[b + "norm1.weight"], w[b + "norm1.bias"], 1e-6)
        q, k, v = linear(y, "attn.qkv").reshape(size_B, -1, 3, p.heads, p.width // p.heads).permute(2, 0, 3, 1, 4)
        attention = (q @ k.transpose(-1, -2) / (p.width // p.heads) ** 0.5).softmax(-1)
        y = linear((attention @ v).transpose(1, 2).flatten(2), "attn.proj")
        x = x + w[b + "ls1.gamma"] * y
        y = F.layer_norm(x, (p.width,), w[b + "norm2.weight"], w[b + "norm2.bias"], 1e-6)
        if p.ffn == "swiglu":
            gate, value = linear(y, "mlp.fc1").chunk(2, -1)
            y = linear(F.silu(gate) * value, "mlp.fc2")
        else:
            y = linear(F.gelu(linear(y, "mlp.fc1")), "mlp.fc2")
        x = x + w[b + "ls2.gamma"] * y
        out.append(F.layer_norm(x, (p.width,), w["norm.weight"], w["norm.bias"], 1e-6)[:, 1:])
    return out


def plain_position(pos_1TD: Tensor, h: int, w: int, grid: int) -> Tensor:
    """The resize as a direct sum: cubic kernel a = -0.75 at source (i + 0.5) grid / (h + 0.1) - 0.5, edges repeated."""
    if (h, w) == (grid, grid):
        return pos_1TD

    def matrix(n: int) -> Tensor:
        m, a = torch.zeros(n, grid, dtype=torch.float64), -0.75
        for i in range(n):
            source = (i + 0.5) * grid / (n + 0.1) - 0.5
            first = int(np.floor(source))
            for j in range(first - 1, first + 3):
                t = abs(source - j)
                near = (a + 2) * t**3 - (a + 3) * t**2 + 1
                far = a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a
                m[i, min(max(j, 0), grid - 1)] += near if t <= 1 else far
        return m

    patches = pos_1TD[0, 1:].double().reshape(grid, grid, -1)
    patches = torch.einsum("ia,jb,abd->ijd", matrix(h), matrix(w), patches).float()
    return torch.cat([pos_1TD[:, :1], patches.reshape(1, h * w, -1)], 1)


@pytest.mark.parametrize(("h", "w"), [(8, 8), (4, 16), (9, 5), (13, 8), (1, 1), (37, 20)])
def test_position_embedding_is_the_direct_formula(h: int, w: int) -> None:
    encoder = loud().pretrained
    got = encoder.position_embedding(h, w)
    torch.testing.assert_close(got, plain_position(encoder.pos_embed, h, w, 8), rtol=0, atol=2e-5)
    if (h, w) == (8, 8):
        assert got is encoder.pos_embed or torch.equal(got, encoder.pos_embed)


@pytest.mark.parametrize(
    "changes", [{}, {"taps": (0, 1, 3, 4), "depth": 6}, {"ffn": "swiglu"}, {"fused_attention": True}]
)
def test_taps_are_the_named_blocks_in_order(changes: dict) -> None:
    net = loud(**changes)
    image_BCHW = torch.randn(2, 3, 70, 98)
    with torch.no_grad():
        taps, last = net.pretrained(image_BCHW)
        blocks = plain_encoder(net, image_BCHW)
    assert len(taps) == 4
    for tap, i in zip(taps, net.preset.taps, strict=True):
        torch.testing.assert_close(tap, blocks[i], rtol=0, atol=1e-4)
    torch.testing.assert_close(last, blocks[-1], rtol=0, atol=1e-4)


def plain_decoder(net: DepthAnything, taps: list[Tensor], h: int, w: int) -> Tensor:
    """DPT written out level by level from the recipe, on the raw tensors."""
    s = {k.removeprefix("depth_head."): v for k, v in net.state_dict().items()}

    def conv(x: Tensor, name: str, **kw: int) -> Tensor:
        return F.conv2d(x, s[f"{name}.weight"], s.get(f"{name}.bias"), **kw)

    def unit(x: Tensor, name: str) -> Tensor:
        return conv(conv(x.relu(), f"{name}.conv1", padding=1).relu(), f"{name}.conv2", padding=1) + x

    def up(x: Tensor, size: tuple[int, int]) -> Tensor:
        return F.interpolate(x, size, mode="bilinear", align_corners=True)

    maps = []
    for i, tap in enumerate(taps):
        x = conv(tap.transpose(1, 2).reshape(len(tap), -1, h, w).contiguous(), f"projects.{i}")
        if i < 2:
            x = F.conv_transpose2d(
                x, s[f"resize_layers.{i}.weight"], s[f"resize_layers.{i}.bias"], stride=4 if i == 0 else 2
            )
        if i == 3:
            x = conv(x, "resize_layers.3", stride=2, padding=1)
        maps.append(conv(x, f"scratch.layer{i + 1}_rn", padding=1))
    path = maps[3]
    for k in (4, 3, 2, 1):
        name = f"scratch.refinenet{k}"
        if k < 4:
            path = path + unit(maps[k - 1], f"{name}.resConfUnit1")
        path = unit(path, f"{name}.resConfUnit2")
        size = maps[k - 2].shape[2:] if k > 1 else (path.shape[2] * 2, path.shape[3] * 2)
        path = conv(up(path, size), f"{name}.out_conv")
    stride = net.preset.head_stride
    path = up(conv(path, "scratch.output_conv1", padding=1), (14 * h // stride, 14 * w // stride))
    path = conv(conv(path, "scratch.output_conv2.0", padding=1).relu(), "scratch.output_conv2.2")
    path = path.relu() if net.preset.head == "relative" else path.sigmoid() * net.preset.max_depth_m
    return (up(path, (14 * h, 14 * w)) if stride > 1 else path)[:, 0]


@pytest.mark.parametrize("preset", ["tiny", "tiny-metric-outdoor"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("h", "w"), [(8, 8), (5, 7), (1, 3)])
def test_decoder_is_the_recipe(preset: str, stride: int, h: int, w: int) -> None:
    net = loud(preset, head_stride=stride)
    taps = [torch.randn(2, h * w, net.preset.width) for _ in range(4)]
    with torch.no_grad():
        got, expected = net.depth_head(taps, h, w), plain_decoder(net, taps, h, w)
    assert got.shape == (2, 14 * h, 14 * w)
    assert expected.std() > 1e-3
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=2e-5)


def test_one_pass_gives_depth_and_final_tokens() -> None:
    net = loud()
    image_BCHW = torch.randn(2, 3, 112, 84)
    with torch.no_grad():
        prediction = net(image_BCHW, features=True)
        blocks = plain_encoder(net, image_BCHW)
        expected = plain_decoder(net, [blocks[i] for i in net.preset.taps], 8, 6)
    assert prediction.depth_m_BHW is None
    torch.testing.assert_close(prediction.disparity_BHW, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(prediction.features_BND, blocks[-1], rtol=0, atol=1e-4)
    assert net(image_BCHW).features_BND is None


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


def test_a_weight_nobody_sets_is_noticed() -> None:
    with torch.device("meta"):
        encoder = Encoder(PRESETS["tiny"])
    materialise(encoder)
    encoder.initialise()
    require_finite(encoder, "x")
    encoder.norm.bias.data.fill_(float("nan"))
    with pytest.raises(WeightsError, match=r"not finite .* norm\.bias"):
        require_finite(encoder, "x")


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


@pytest.mark.parametrize("preset", ["tiny", "tiny-metric-indoor"])
@pytest.mark.parametrize("size", [(112, 112), (70, 98)])
def test_compiles_without_a_graph_break(preset: str, size: tuple[int, int]) -> None:
    net = loud(preset)
    image_BCHW = torch.randn(1, 3, *size)
    compiled = torch.compile(lambda x: net(x, features=True), backend="eager", fullgraph=True)
    with torch.no_grad():
        got, expected = compiled(image_BCHW), net(image_BCHW, features=True)
    for field in ("disparity_BHW", "depth_m_BHW", "features_BND"):
        assert (getattr(got, field) is None) == (getattr(expected, field) is None)
        if getattr(got, field) is not None:
            torch.testing.assert_close(getattr(got, field), getattr(expected, field))


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
