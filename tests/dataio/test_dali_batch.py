import io

import numpy as np
import pytest
import torch
from PIL import Image

from dataio import dali_batch, maps
from dataio.compose import Paste, TargetRule, cutmix, target_values
from dataio.dali_batch import AHEAD, MEAN, STD, DaliBatch, Row, self_test
from dataio.dali_frames import FramePipeline
from dataio.draws import Box, Geometry, Photometric
from dataio.types import AffineCode

from .fakes import jpeg, png, smooth

S = 56
TARGET = png(np.arange(60 * 80, dtype=np.uint16).reshape(60, 80))


def pixels(view_CHW):
    """Undo the normalisation: 0..255 [H, W, C]."""
    return (view_CHW.permute(1, 2, 0).numpy() * STD + MEAN) * 255


def batch_of(count, size=S, views=("clean",), targets=False):
    return DaliBatch(count, size, views=views, targets=targets, device="cpu", threads=1)


def test_self_test_passes():
    self_test()


def test_self_test_notices_eight_bit_codes(monkeypatch):
    real = maps.decode_codes
    monkeypatch.setattr(maps, "decode_codes", lambda png: real(png) >> 8)
    with pytest.raises(RuntimeError, match="16 bits"):
        self_test()


def test_decodes_like_pil_within_jpeg_tolerance():
    encoded = [jpeg(smooth(i, S, S), quality) for i, quality in enumerate((95, 80, 60))]
    views = batch_of(3).run([Row(image=data) for data in encoded]).views
    assert views["clean"].shape == (3, 3, S, S)
    assert views["clean"].dtype == torch.float32
    for view, data in zip(views["clean"], encoded, strict=True):
        expected = np.asarray(Image.open(io.BytesIO(data))).astype(float)
        assert np.abs(pixels(view) - expected).max() <= 2.01  # two implementations of the inverse DCT


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "P", "I;16"])
def test_other_kinds_of_images_become_rgb(mode):
    out = io.BytesIO()
    source = Image.fromarray(smooth(0, S, S))
    if mode == "I;16":
        Image.fromarray((np.asarray(source.convert("L")).astype(np.uint16)) * 257).save(out, "PNG")
        source = source.convert("L")
    else:
        source = source.convert(mode)
        source.save(out, "JPEG" if mode == "CMYK" else "PNG", **({"quality": 98} if mode == "CMYK" else {}))
    decoded = batch_of(1).run([Row(image=out.getvalue())])
    assert not decoded.bad
    expected = np.asarray(source.convert("RGB")).astype(float)
    assert np.abs(pixels(decoded.views["clean"][0]) - expected).mean() < 6


def test_webp_and_rotated_jpegs():
    out = io.BytesIO()
    Image.fromarray(smooth(3, S, S)).save(out, "WEBP", lossless=True)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    rows = [Row(image=out.getvalue()), Row(image=jpeg(smooth(4, S, S), exif=exif))]
    views = batch_of(2).run(rows).views["clean"]
    assert np.abs(pixels(views[0]) - smooth(3, S, S)).max() < 1
    assert np.abs(pixels(views[1]) - np.rot90(smooth(4, S, S), -1)).max() < 6


def test_sixteen_bits_survive():
    code_HW = np.random.default_rng(0).integers(0, 65536, (S, S)).astype(np.uint16)
    row = Row(image=jpeg(smooth(0, S, S)), target=png(code_HW))
    code_BHW = batch_of(1, targets=True).run([row]).code_BHW
    assert code_BHW.dtype == torch.uint16
    assert np.array_equal(code_BHW[0].numpy(), code_HW)


def test_image_target_and_sky_get_the_same_crop_and_flip():
    """A pattern whose place can be read off every map, at three resolutions."""
    height, width = 160, 240
    ramp_HW = np.tile(np.arange(width, dtype=float), (height, 1)) / width
    steep_HW = np.tile(np.arange(height, dtype=float)[:, None], (1, width)) / height
    image = np.stack([ramp_HW, steep_HW, 0 * ramp_HW], -1)
    small_HW = (ramp_HW[::2, ::2] * 60000 + 100).astype(np.uint16)
    sky_HW = (steep_HW > 0.5).astype(np.uint8) * 255
    row = {"image": png((image * 255).astype(np.uint8)), "target": png(small_HW), "sky": png(sky_HW)}
    for flip in (False, True):
        geometry = Geometry(height=70, width=105, top=7, left=31, flip=flip)
        decoded = batch_of(1, targets=True).run([Row(**row, geometry=geometry)])
        shown = pixels(decoded.views["clean"][0]) / 255
        columns = (31 + np.arange(S) + 0.5) / 105
        expected = columns[::-1] if flip else columns
        assert np.abs(shown[..., 0] - expected).max() < 0.015
        across = (decoded.code_BHW[0].numpy().astype(float) - 100) / 60000
        assert np.abs(across - expected).max() < 0.015
        assert np.abs(across - shown[..., 0]).max() < 0.02
        is_sky = decoded.sky_BHW[0].numpy() > 127
        clear = np.abs(shown[..., 1] - 0.5) > 0.02
        assert np.array_equal(is_sky[clear], (shown[..., 1] > 0.5)[clear])


def test_the_window_reads_across_its_edges_like_resize_then_crop():
    image = smooth(1, 112, 224)
    whole = batch_of(1, 112).run([Row(image=png(image[:, :112]))]).views["clean"][0]
    part = batch_of(1, 112).run([Row(image=png(image), geometry=Geometry(height=112, width=224))]).views["clean"][0]
    assert torch.equal(whole, part)  # no scaling: pixels as they are


def test_identity_perturbation_leaves_the_student_view_clean():
    views = batch_of(2, views=("student", "clean")).run([Row(image=jpeg(smooth(i, 60, 80))) for i in range(2)]).views
    assert torch.equal(views["clean"], views["student"])


def test_only_the_drawn_rows_are_perturbed():
    image = jpeg(smooth(0, 60, 80))
    draws = [Photometric(), Photometric(brightness=1.3), Photometric(blur_sigma=2.0), Photometric(grayscale=True)]
    views = batch_of(4, views=("clean", "student")).run([Row(image=image, photometric=d) for d in draws]).views
    clean, student = views["clean"], views["student"]
    assert torch.equal(clean[0], clean[3])
    assert torch.equal(student[0], clean[0])
    assert np.allclose(pixels(student[1]), np.minimum(255, pixels(clean[1]) * 1.3), atol=1)
    assert not torch.equal(student[2], clean[2])
    grey = pixels(student[3])
    assert np.ptp(grey, axis=-1).max() < 2
    assert np.allclose(grey[..., 0], pixels(clean[3]) @ [0.299, 0.587, 0.114], atol=2)


def test_blur_is_a_gaussian_of_the_drawn_width():
    image = np.zeros((S, S, 3), np.uint8)
    image[:, S // 2 :] = 255  # an edge: its blurred profile is the kernel, summed up
    rows = [Row(image=png(image), photometric=Photometric(blur_sigma=sigma)) for sigma in (0.5, 2.0)]
    student = batch_of(2, views=("student",)).run(rows).views["student"]
    for view, sigma in zip(student, (0.5, 2.0), strict=True):
        reach = np.arange(-np.ceil(3 * sigma), np.ceil(3 * sigma) + 1)
        kernel = np.exp(-(reach**2) / (2 * sigma**2))
        expected = np.convolve(np.pad(image[0, :, 0].astype(float), 6, "edge"), kernel / kernel.sum(), "same")[6:-6]
        assert np.abs(pixels(view)[S // 2, :, 0] - expected).max() < 1


def test_contrast_is_centred_on_mid_grey():
    image = png(np.full((S, S, 3), 200, np.uint8))
    view = (
        batch_of(1, views=("student",)).run([Row(image=image, photometric=Photometric(contrast=0.5))]).views["student"]
    )
    assert np.allclose(pixels(view[0]), 128 + 0.5 * 72, atol=1)


def _damaged(kind):
    good = jpeg(smooth(9, 60, 80))
    return {
        "truncated": good[: len(good) // 2],
        "no_end": good[:-2],
        "garbage": b"\xff\xd8 no photograph",
        "empty": b"",
        "png": png(smooth(9, 60, 80))[:2000],
    }[kind]


@pytest.mark.parametrize("kind", ["truncated", "no_end", "garbage", "empty", "png"])
def test_a_corrupt_image_in_the_middle_changes_nothing_else(kind):
    draws = Photometric(brightness=1.2, hue_degrees=30.0, blur_sigma=1.0)
    rows = [
        Row(image=jpeg(smooth(i, 60, 80)), target=png(np.full((60, 80), i, np.uint16)), photometric=draws)
        for i in range(5)
    ]
    batch = batch_of(5, views=("clean", "student"), targets=True)
    expected = batch.run(rows)
    broken = [*rows[:2], Row(image=_damaged(kind), target=rows[2].target), *rows[3:]]
    found = batch.run(broken)
    assert found.bad == {2: "bad_image"}
    others = [0, 1, 3, 4]
    for name in ("clean", "student"):
        assert torch.equal(found.views[name][others], expected.views[name][others])
    assert torch.equal(found.code_BHW[others].int(), expected.code_BHW[others].int())
    again = batch.run(rows)
    assert not again.bad
    assert torch.equal(again.views["student"], expected.views["student"])


def test_several_culprits_and_their_reasons():
    good = Row(image=jpeg(smooth(0, S, S)), target=png(np.ones((S, S), np.uint16)))
    rows = [
        good,
        Row(image=b"x", target=good.target),
        Row(image=good.image, target=good.target[:60]),
        None,
        Row(image=good.image, target=good.target, sky=b"y"),
    ]
    assert batch_of(5, targets=True).run(rows).bad == {1: "bad_image", 2: "bad_target", 4: "bad_target"}


def test_batches_outlive_the_next_run():
    batch = batch_of(2)
    first = batch.run([Row(image=jpeg(smooth(i, S, S))) for i in range(2)]).views["clean"]
    kept = first.clone()
    for seed in range(5):
        batch.run([Row(image=jpeg(smooth(seed + 7, S, S)))] * 2)
    assert torch.equal(first, kept)


def test_wrong_uses():
    with pytest.raises(ValueError, match="no such view"):
        batch_of(1, views=("left",))
    with pytest.raises(ValueError, match="1 rows for a batch of 2"):
        batch_of(2).run([None])
    batch = batch_of(1)
    for _ in range(AHEAD):
        batch.start([None])
    with pytest.raises(RuntimeError, match="2 batches are started"):
        batch.start([None])


def test_disparity_of_depths_and_labels():
    code_BHW = torch.tensor([[[0, 1000], [2000, 4000]], [[0, 16], [32, 48]], [[0, 0], [0, 0]], [[5, 5], [5, 0]]])
    code_BHW = code_BHW.to(torch.uint16)
    sky_BHW = torch.zeros(4, 2, 2, dtype=torch.uint8)
    rules = [
        TargetRule(code=AffineCode(scale=0.001), quantity="depth_m", min_max=True),
        TargetRule(code=AffineCode(scale=0.5, shift=-1.0, zero=16)),
        TargetRule(code=AffineCode(scale=0.001), quantity="depth_m", min_max=True),
        TargetRule(code=AffineCode(scale=1.0), min_max=True),
    ]
    value_BHW, valid_BHW = target_values(code_BHW, sky_BHW, rules)
    assert torch.allclose(value_BHW[0], torch.tensor([[0, 1], [1 / 3, 0]]))
    assert valid_BHW[0].tolist() == [[False, True], [True, True]]
    assert torch.allclose(value_BHW[1], torch.tensor([[0, -1.0], [7, 15]]))  # codes, untouched: affine-invariant losses
    assert not valid_BHW[2].any()
    assert torch.equal(value_BHW[2:], torch.zeros(2, 2, 2))
    assert torch.isfinite(value_BHW).all()
    sky_BHW[0, 0, 0] = 255
    value_BHW, valid_BHW = target_values(code_BHW, sky_BHW, rules)
    assert torch.allclose(value_BHW[0], torch.tensor([[0, 1], [0.5, 0.25]]))
    assert valid_BHW[0].all()


def test_cutmix_pastes_into_everything():
    generator = torch.Generator().manual_seed(0)
    view = torch.randn(3, 3, 8, 8, generator=generator)
    value = torch.rand(3, 8, 8, generator=generator)
    region = torch.ones(3, 8, 8, dtype=torch.uint8)
    region[1, 3, 3] = 0
    pastes = [
        Paste(row=0, source=1, box=Box(top=2, left=1, bottom=5, right=7)),
        Paste(row=1, source=0, box=Box(top=0, left=0, bottom=2, right=2)),
    ]
    views, mixed, regions = {"clean": view.clone()}, value.clone(), region.clone()
    cutmix(pastes, views.values(), mixed, regions)
    assert torch.equal(views["clean"][0, :, 2:5, 1:7], view[1, :, 2:5, 1:7])
    assert torch.equal(views["clean"][1, :, :2, :2], view[0, :, :2, :2])  # of the unmixed one
    assert torch.equal(views["clean"][0, :, :2], view[0, :, :2])
    assert torch.equal(views["clean"][2], view[2])
    assert torch.equal(mixed[0, 2:5, 1:7], value[1, 2:5, 1:7])
    assert (regions[0, 2:5, 1:7] == 2).sum() == 17
    assert regions[0, 3, 3] == 0
    assert (regions[0] == 1).sum() == 64 - 18


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
def test_gpu_agrees_with_cpu():
    """The same definition with GPU operators: another JPEG decoder and another order of roundings, nothing more."""
    self_test("cuda")
    draws = [Photometric(), Photometric(brightness=1.2, hue_degrees=40.0), Photometric(blur_sigma=1.5, grayscale=True)]
    geometry = Geometry(height=70, width=93, top=7, left=20, flip=True)
    target = png(np.arange(120 * 160, dtype=np.uint16).reshape(120, 160))
    rows = [
        Row(image=jpeg(smooth(i, 120, 160)), target=target, photometric=draw, geometry=geometry)
        for i, draw in enumerate(draws)
    ]
    for broken in (rows, [rows[0], Row(image=b"x", target=target), rows[2]]):
        here, there = (
            DaliBatch(3, S, views=("clean", "student"), targets=True, device=device, threads=1).run(broken)
            for device in ("cpu", "cuda")
        )
        assert here.bad == there.bad
        assert torch.equal(here.code_BHW.int(), there.code_BHW.int())
        for name in ("clean", "student"):
            assert there.views[name].is_cuda
            assert (here.views[name] - there.views[name].cpu()).abs().max() < 0.1  # 5 of 255


def test_training_and_inference_resize_by_one_kernel():
    """OpenCV's, a = -0.75, of `dataio.dali_frames`, but for roundings; Catmull-Rom, a = -0.5, is some levels off."""
    image_HWC = np.random.default_rng(0).integers(60, 196, (S // 2, S // 2, 3), dtype=np.uint8)
    found_HWC = pixels(batch_of(1).run([Row(image=png(image_HWC))]).views["clean"][0])
    whole_1CHW, _ = FramePipeline(1, 1, "cpu").run([png(image_HWC)], (S, S))
    assert np.abs(found_HWC - pixels(whole_1CHW[0]).clip(0, 255)).max() < 1.5
    other_HWC = np.asarray(Image.fromarray(image_HWC).resize((S, S), Image.Resampling.BICUBIC), np.float32)
    assert np.abs(found_HWC - other_HWC).max() > 5


def test_two_batches_under_way_are_those_of_one_after_the_other():
    """Also where the first of them, or the second, holds a damaged image."""
    rows = [[Row(image=jpeg(smooth(3 * i + j, 60, 80)), target=TARGET) for j in range(3)] for i in range(4)]
    for broken in (None, 0, 1, 3):
        if broken is not None:
            rows[broken][1] = Row(image=b"x", target=TARGET)
        alone = [batch_of(3, targets=True).run(batch) for batch in rows]
        together, found = batch_of(3, targets=True), []
        together.start(rows[0])
        for batch in rows[1:]:
            together.start(batch)
            found.append(together.finish())
        found.append(together.finish())
        for one, other in zip(alone, found, strict=True):
            assert one.bad == other.bad
            assert torch.equal(one.views["clean"], other.views["clean"])
            assert torch.equal(one.code_BHW, other.code_BHW)


def test_image_and_target_damaged_is_a_bad_image():
    assert batch_of(1, targets=True).run([Row(image=b"x", target=b"y")]).bad == {0: "bad_image"}


def test_what_no_row_is_to_blame_for_is_raised(monkeypatch):
    calls, real = [], dali_batch.resized_window

    def fail_once(*args, size):
        calls.append(1)
        if len(calls) == 1:
            raise MemoryError
        return real(*args, size=size)

    monkeypatch.setattr(dali_batch, "resized_window", fail_once)
    batch, row = batch_of(1), Row(image=jpeg(smooth(0, S, S)))
    with pytest.raises(RuntimeError, match="MemoryError"):
        batch.run([row])
    assert not batch.run([row]).bad  # and the next batch has a pipeline of its own


def test_depths_of_0_and_below_are_no_measurement():
    code_BHW = torch.tensor([[[999, 1000, 2000, 3000]]]).to(torch.uint16)
    for min_max in (False, True):
        rule = TargetRule(code=AffineCode(scale=0.001, zero=1000), quantity="depth_m", min_max=min_max)
        value_BHW, valid_BHW = target_values(code_BHW, None, [rule])
        assert valid_BHW.tolist() == [[[False, False, True, True]]]
        assert torch.allclose(value_BHW, torch.tensor([[[0.0, 0.0, 1.0, 0.0 if min_max else 0.5]]]))


def test_sky_begins_at_128():
    sky_BHW = torch.tensor([[[127, 128]]], dtype=torch.uint8)
    _, valid_BHW = target_values(torch.zeros(1, 1, 2).to(torch.uint16), sky_BHW, [TargetRule()])
    assert valid_BHW.tolist() == [[[False, True]]]


def test_metres_of_depths_and_of_what_float_maps_are_coded_as():
    code_BHW = torch.tensor([[[0, 1000], [2000, 500]], [[0, 1], [2, 5]], [[7, 7], [7, 7]]]).to(torch.uint16)
    sky_BHW = torch.zeros(3, 2, 2, dtype=torch.uint8)
    sky_BHW[0, 1, 1] = 255
    rules = [
        TargetRule(code=AffineCode(scale=0.001), quantity="depth_m", wanted="depth_m"),
        TargetRule(code=AffineCode(scale=0.5, zero=1), wanted="depth_m"),  # disparity, 1 / m: 0, 0.5 and 2
        TargetRule(code=AffineCode(scale=1e-45, zero=6), wanted="depth_m"),  # too small to be inverted
    ]
    value_BHW, valid_BHW = target_values(code_BHW, sky_BHW, rules)
    assert valid_BHW.tolist() == [[[False, True], [True, False]], [[False, False], [True, True]], [[False] * 2] * 2]
    assert torch.equal(value_BHW, torch.tensor([[[0.0, 1.0], [2.0, 0.0]], [[0.0, 0.0], [2.0, 0.5]], [[0.0] * 2] * 2]))
