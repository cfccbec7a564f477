"""The same weights in other people's code give the same maps: transformers, timm, OpenCV; and the published values.

Weights are random and loud (`huggingface.loud_network`): with the initial ones, wrong position embeddings hide.
Shape suffixes: B batch, C channel, H W pixels, N patch tokens, T tokens with the class token first, D width.
"""

from __future__ import annotations

import gc
import os
from contextlib import nullcontext
from pathlib import Path

import cv2
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor
from transformers import DPTImageProcessor

from model import IMAGENET_MEAN, IMAGENET_STD, DepthAnything, Encoder, lower_bound_size
from model.presets import PositionMode
from tests.model import huggingface

Size = tuple[int, int]
Case = tuple[PositionMode, Size]

SIZES: tuple[Size, ...] = ((518, 518), (518, 686), (392, 518), (252, 252))
EVERY = tuple((mode, size) for mode in ("exact", "official") for size in SIZES)
FEW = (("exact", (252, 252)), ("official", (252, 252)), ("official", (518, 518)))
TINY = tuple((mode, size) for mode in ("exact", "official") for size in ((112, 112), (112, 154), (70, 98), (252, 252)))

# Of the output's mean. The order of summation alone gives 1e-6 (S) to 7e-6 (L, 24 blocks of loud random weights);
# position embeddings in the other mode give 1e-2, see the test below.
TOLERANCE = 1e-5


def our_map(net: DepthAnything, image_BCHW: Tensor) -> Tensor:
    """Ours, relative or metric."""
    prediction = net(image_BCHW)
    return prediction.disparity_BHW if prediction.depth_m_BHW is None else prediction.depth_m_BHW


def noise(size: Size, batch: int = 1) -> Tensor:
    """Images of variance 1, the same for every call."""
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def compare(preset: str, cases: tuple[Case, ...]) -> None:
    """Asserts that both networks agree in every case, on maps that hide nothing."""
    net = huggingface.loud_network(preset)
    theirs = huggingface.twin(net)
    max_depth_m = net.preset.max_depth_m
    for mode, size in cases:
        image_BCHW = noise(size)
        ours_BHW = our_map(huggingface.in_mode(net, mode), image_BCHW)
        with huggingface.official_positions() if mode == "official" else nullcontext():
            theirs_BHW = theirs(image_BCHW).predicted_depth
        assert ours_BHW.shape == theirs_BHW.shape == (1, *size)
        assert ours_BHW.std() > 0.05 * ours_BHW.mean(), "a flat map shows nothing"
        assert (ours_BHW > 0).float().mean() > 0.99, "the last ReLU hides a part of the map"
        if max_depth_m is not None:
            assert (ours_BHW < 0.98 * max_depth_m).float().mean() > 0.99, "the sigmoid hides a part of the map"
        apart = ((ours_BHW - theirs_BHW).abs().max() / theirs_BHW.mean()).item()
        assert apart <= TOLERANCE, f"{preset} {mode} {size}: {apart:.1e} of the mean"
    del net, theirs
    gc.collect()


@pytest.mark.parametrize(
    ("preset", "cases"),
    [
        pytest.param("v2-vits", EVERY, id="v2-vits"),
        pytest.param("v1-vits", FEW, id="v1-vits"),
        pytest.param("v2-vits-metric-indoor", FEW, id="v2-vits-metric-indoor"),
        pytest.param("v2-vits-metric-outdoor", FEW, id="v2-vits-metric-outdoor"),
        pytest.param("v2-vitb", FEW, id="v2-vitb"),
        pytest.param("v2-vitl", FEW, id="v2-vitl"),
        pytest.param("tiny-swiglu", TINY, id="tiny-swiglu"),
        pytest.param("tiny-swiglu-metric-indoor", TINY, id="tiny-swiglu-metric-indoor"),
    ],
)
def test_transformers_gives_the_same_map(preset: str, cases: tuple[Case, ...]) -> None:
    compare(preset, cases)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "preset",
    [
        f"{version}-{size}"
        for version, sizes in (
            ("v1", ("vits", "vitb", "vitl")),
            ("v2", ("vitb", "vitl", "vits-metric-indoor", "vits-metric-outdoor")),
        )
        for size in sizes
    ],
)
def test_transformers_gives_the_same_map_at_every_size(preset: str) -> None:
    compare(preset, EVERY)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_transformers_gives_the_same_map_with_the_giant() -> None:
    compare("v2-vitg", (("exact", (252, 252)), ("official", (252, 252))))  # weights shared: 6 GB, not 10


@torch.no_grad()
def test_the_other_position_mode_would_be_noticed() -> None:
    net = huggingface.loud_network("v2-vits")
    exact_BHW, official_BHW = (our_map(huggingface.in_mode(net, m), noise((252, 252))) for m in ("exact", "official"))
    assert (exact_BHW - official_BHW).abs().max() > 100 * TOLERANCE * exact_BHW.mean()
    same = [our_map(huggingface.in_mode(net, m), noise((518, 518))) for m in ("exact", "official")]
    assert torch.equal(*same)


@torch.no_grad()
def test_timm_gives_the_same_tokens() -> None:
    net = huggingface.in_mode(huggingface.loud_network("v2-vits"), "exact")
    encoder: Encoder = net.pretrained
    theirs = timm.create_model("vit_small_patch14_dinov2", pretrained=False, dynamic_img_size=True).eval()
    theirs.load_state_dict({k: v for k, v in encoder.state_dict().items() if k != "mask_token"}, strict=True)
    image_BCHW = noise((518, 518))
    tokens_BTD = theirs.forward_features(image_BCHW)
    taps, classes, last_BND = encoder(image_BCHW)
    torch.testing.assert_close(last_BND, tokens_BTD[:, 1:], rtol=0, atol=5e-5)
    torch.testing.assert_close(classes[-1], tokens_BTD[:, 0], rtol=0, atol=5e-5)
    theirs_taps = theirs.get_intermediate_layers(image_BCHW, n=list(net.preset.taps), norm=True)
    for ours_BND, theirs_BND in zip(taps, theirs_taps, strict=True):
        torch.testing.assert_close(ours_BND, theirs_BND, rtol=0, atol=5e-5)


# --- photographs --------------------------------------------------------------------------------------------------


def photograph(size: Size) -> np.ndarray:
    """uint8 [H, W, 3]: slopes, a hard edge that makes the cubic overshoot, and a little noise."""
    y, x = np.mgrid[: size[0], : size[1]]
    plane = 60 + 80 * y / size[0] + 60 * (x > size[1] // 2) + 40 * np.sin(x / 9)
    grain = np.random.default_rng(0).normal(0, 4, (*size, 3))
    return (plane[..., None] + grain + [0, 9, -9]).clip(0, 255).astype(np.uint8)


def white_noise(size: Size) -> np.ndarray:
    """uint8 [H, W, 3]."""
    return np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)


# OpenCV keeps source coordinates in float32, 6e-5 apart at pixel 1000: white noise, the steepest image, agrees to 1e-5
# only where it is small, photographs everywhere.
@pytest.mark.parametrize(
    "image_HWC",
    [photograph(s) for s in ((480, 640), (231, 517), (333, 90), (640, 479), (801, 1203))]
    + [white_noise(s) for s in ((97, 61), (33, 70), (14, 15))],
    ids=lambda image: "x".join(map(str, image.shape[:2])),
)
@pytest.mark.parametrize("input_size", [112, 518])
def test_the_network_sees_what_opencv_would_have_made(image_HWC: np.ndarray, input_size: int) -> None:
    seen: list[Tensor] = []
    net = DepthAnything.from_preset("tiny")
    net.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    net.infer_image(image_HWC, input_size)
    height, width = lower_bound_size(*image_HWC.shape[:2], input_size)
    expected_HWC = cv2.resize(image_HWC / 255.0, (width, height), interpolation=cv2.INTER_CUBIC)
    assert seen[0].dtype == torch.float32 and seen[0].shape == (1, 3, height, width)
    got_HWC = seen[0][0].double().permute(1, 2, 0).numpy() * IMAGENET_STD + IMAGENET_MEAN
    np.testing.assert_allclose(got_HWC, expected_HWC, rtol=0, atol=1e-5)


# --- the published weights, where somebody has them ---------------------------------------------------------------

# The first 3 x 3 of the map of COCO's 000000039769, from transformers' own checks. When
# `convert_depth_anything_to_hf.py` printed its values, transformers resized position embeddings as the originals do;
# its integration test (`test_modeling_depth_anything.py`) was renewed after that changed.
GOLDEN = [
    ("v1-vits", "official", "8.8204 8.6468 8.6195 8.3313 8.6027 8.7526 8.6526 8.6866 8.7453"),
    ("v1-vits", "exact", "8.8223 8.6483 8.6216 8.3332 8.6047 8.7545 8.6547 8.6885 8.7472"),
    ("v1-vitb", "official", "26.3997 26.3004 26.3928 26.2260 26.2092 26.3427 26.0719 26.0483 26.1254"),
    ("v1-vitl", "official", "87.9968 87.7493 88.2704 87.1927 87.6611 87.3640 86.7789 86.9469 86.7991"),
    ("v2-vits", "official", "2.6751 2.6211 2.6571 2.5820 2.6138 2.6271 2.6160 2.6141 2.6306"),
    ("v2-vitb", "official", "4.3576 4.3723 4.3908 4.3231 4.3146 4.3611 4.3016 4.3170 4.3121"),
    ("v2-vitl", "official", "162.2751 161.8504 162.8788 160.3138 160.8050 161.9835 159.3812 159.9884 160.0768"),
    ("v2-vits-metric-indoor", "official", "1.3349 1.2946 1.2801 1.2793 1.2337 1.2899 1.2629 1.2218 1.2476"),
    ("v2-vits-metric-indoor", "exact", "1.3349 1.2947 1.2802 1.2794 1.2338 1.2901 1.2630 1.2219 1.2478"),
    ("v2-vitb-metric-indoor", "official", "1.4601 1.3824 1.4904 1.5031 1.4349 1.4274 1.4570 1.4578 1.4200"),
    ("v2-vitl-metric-indoor", "official", "1.5040 1.5019 1.5218 1.5087 1.5195 1.5149 1.5437 1.5128 1.5252"),
    ("v2-vits-metric-outdoor", "official", "9.5804 8.0339 7.7386 7.9890 7.2464 7.7149 7.7021 7.2330 7.3304"),
    ("v2-vitb-metric-outdoor", "official", "10.2916 9.0933 8.8622 9.1964 9.3393 9.0644 8.9618 9.4201 9.2262"),
    ("v2-vitl-metric-outdoor", "official", "14.0137 13.3627 13.1080 13.2522 13.3943 13.3705 13.0581 13.4505 13.3925"),
    # Distill-Any-Depth: of the first row alone are the values known, and not in which mode they were made.
    ("dad-vits", "either", "2.5653 2.5249 2.5570"),
    ("dad-vitb", "either", "4.8976 4.9075 4.9403"),
    ("dad-vitl", "either", "55.1067 51.1828 51.6803"),
]
PLACES = {"relative": "", "indoor": "metric_hypersim_", "outdoor": "metric_vkitti_"}


def official_file(preset: str) -> str:
    """The name under which the originals publish a preset's weights."""
    version, size, *metric = preset.split("-")
    if version == "dad":
        return f"distill_any_depth_{size}.safetensors"
    if version == "v1":
        return f"depth_anything_{size}14.pth"
    return f"depth_anything_v2_{PLACES[metric[-1] if metric else 'relative']}{size}.pth"


def processed(image: Image.Image) -> Tensor:
    """What transformers' processor makes with the settings that it publishes with the weights."""
    processor = DPTImageProcessor(
        size={"height": 518, "width": 518}, keep_aspect_ratio=True, ensure_multiple_of=14,
        image_mean=IMAGENET_MEAN, image_std=IMAGENET_STD,
    )  # fmt: skip
    image_BCHW: Tensor = processor(image, return_tensors="pt").pixel_values
    return image_BCHW


@pytest.mark.parametrize(("preset", "mode", "values"), GOLDEN, ids=[f"{p}-{m}" for p, m, _ in GOLDEN])
def test_the_published_weights_give_the_published_values(preset: str, mode: str, values: str) -> None:
    """FATHOM_WEIGHTS names a folder with the official files and 000000039769.jpg or .png (640 x 480, two cats).

    depth_anything_vits14.pth (vitb14, vitl14); depth_anything_v2_vits.pth (vitb, vitl);
    depth_anything_v2_metric_hypersim_vits.pth and depth_anything_v2_metric_vkitti_vits.pth (vitb, vitl);
    distill_any_depth_vits.safetensors (vitb, vitl), which its authors call model.safetensors.
    """
    folder = os.environ.get("FATHOM_WEIGHTS")
    if not folder:
        pytest.skip("no real weights: set FATHOM_WEIGHTS")
    file = Path(folder) / official_file(preset)
    cats = next((p for p in (Path(folder) / f"000000039769.{e}" for e in ("jpg", "png")) if p.exists()), None)
    if not file.exists() or cats is None:
        pytest.skip(f"no real weights: {folder} lacks {file.name if cats else '000000039769.jpg'}")
    image_BCHW = processed(Image.open(cats).convert("RGB"))
    net = DepthAnything.from_pretrained(file, preset=preset.replace("dad-", "v2-"))
    expected = torch.tensor([float(v) for v in values.split()]).view(-1, 3)
    close = []
    modes: tuple[PositionMode, ...] = ("official", "exact")
    for position_mode in modes if mode == "either" else (mode,):
        with torch.no_grad():
            map_BHW = our_map(huggingface.in_mode(net, position_mode), image_BCHW)
        assert map_BHW.shape == (1, 518, 686)
        # transformers' own tolerance; the two position modes are 2e-4 apart on v1-vits
        close.append(torch.allclose(map_BHW[0, : len(expected), :3], expected, rtol=1e-4, atol=1e-4))
    assert any(close), map_BHW[0, : len(expected), :3]


def test_the_published_values_are_looked_for_in_the_right_place() -> None:
    assert official_file("v2-vitb-metric-outdoor") == "depth_anything_v2_metric_vkitti_vitb.pth"
    assert official_file("v2-vits") == "depth_anything_v2_vits.pth"
    assert official_file("v1-vitl") == "depth_anything_vitl14.pth"
    assert processed(Image.fromarray(photograph((480, 640)))).shape == (1, 3, 518, 686)
