"""DALI and the draws against the reference of docs/perturbations.md, in `tests/dataio/perturbations.py`.

Images are noise: what is off by a pixel, by a tap or by a rounding shows at once. Tolerances are those of the
document's section 8. Shape suffixes: B batch, C channel, H W pixels.
"""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from scipy import stats

from dataio import draws, resize
from dataio.compose import Paste, cutmix
from dataio.dali_batch import DaliBatch, Row
from dataio.draws import Box, Geometry, Photometric
from dataio.loader import Loader
from dataio.spec import DataSpec, Perturbation, RoleNeeds, RoleSpec
from dataio.types import Batch

from . import perturbations as reference
from .fakes import png, shards_of, write_dataset, write_labels

REPOSITORY = Path(__file__).resolve().parents[2]
S = 56
STRONG = Perturbation(jitter_p=0.8, grayscale_p=0.2, blur_p=0.5, cutmix_p=0.5)
SIZES = [  # height, width, input: portrait and landscape, odd, enlarged, reduced, whole already, degenerate
    (61, 83, 56), (97, 57, 70), (30, 33, 56), (33, 17, 56), (200, 150, 56), (151, 403, 112), (56, 100, 56),
    (70, 70, 70), (1, 1, 14), (2, 3, 14), (5, 90, 14), (481, 641, 518),
]  # fmt: skip
EXTREMES = {
    "brightness 0": Photometric(brightness=0.0),
    "contrast 0": Photometric(contrast=0.0),
    "contrast 0, brightness 1.5": Photometric(contrast=0.0, brightness=1.5),
    "brightness 1.5": Photometric(brightness=1.5),
    "contrast 0.5": Photometric(contrast=0.5),
    "contrast 1.5, brightness 0.5": Photometric(contrast=1.5, brightness=0.5),
    "saturation 0": Photometric(saturation=0.0),
    "saturation 1.5": Photometric(saturation=1.5),
    "hue 90": Photometric(hue_degrees=90.0),
    "hue -90": Photometric(hue_degrees=-90.0),
    "hue 37, saturation 1.4": Photometric(hue_degrees=37.0, saturation=1.4),
    "grey": Photometric(grayscale=True),
    "grey, jitter": Photometric(grayscale=True, brightness=0.7, contrast=1.4, saturation=1.5, hue_degrees=60.0),
    "everything at its limit": Photometric(brightness=1.5, contrast=1.5, saturation=1.5, hue_degrees=90.0),
}
SIGMAS = (0.05, 0.1, 0.33, 0.34, 0.5, 1.0, 1.99, 2.0, 4.5)


def noise(seed: int, height: int, width: int) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def decode(
    rows: Sequence[Row], size: int = S, *, device: str = "cpu", targets: bool = False
) -> tuple[dict[str, npt.NDArray[np.float64]], Any]:
    """The views, normalisation undone, [B, H, W, C] in grey levels; and all that was decoded."""
    decoded = DaliBatch(
        len(rows), size, views=("clean", "student"), targets=targets, device=device, threads=1
    ).run(rows)  # fmt: skip
    assert not decoded.bad
    return {name: levels(view) for name, view in decoded.views.items()}, decoded


def levels(view_BCHW: torch.Tensor) -> npt.NDArray[np.float64]:
    view_BHWC = view_BCHW.cpu().permute(0, 2, 3, 1).numpy().astype(np.float64)
    return (view_BHWC * reference.STD + reference.MEAN) * 255


def assert_near(found: npt.NDArray[Any], expected: npt.NDArray[Any], *, most: float, share: float) -> None:
    """Grey levels: none differs by more than `most`, and no more than `share` of them by more than a tenth."""
    error = np.abs(found.astype(float) - expected)
    assert error.max() <= most
    assert np.mean(error > 0.1) <= share


def windows(size: int, height: int, width: int, count: int) -> list[Geometry]:
    return [Geometry.draw(Perturbation(), size, height, width, (7, 0, f"{i}")) for i in range(count)]


# ---- DALI, step by step


@pytest.mark.parametrize("height, width, size", SIZES)
def test_resize_crop_and_flip(height: int, width: int, size: int) -> None:
    image_HWC = noise(height, height, width)
    chosen = windows(size, height, width, 6)
    assert {window.flip for window in chosen} == {False, True}
    # no draw makes these: both sides resized by factors of their own; the whole image, squeezed
    chosen += [Geometry(height=size + 9, width=2 * size, top=4, left=size // 3), Geometry(height=size, width=size)]
    views, _ = decode([Row(image=png(image_HWC), geometry=window) for window in chosen], size)
    for found, window in zip(views["clean"], chosen, strict=True):
        assert_near(found, reference.clean(image_HWC, window, size), most=2.01, share=0.03)
    assert np.array_equal(views["clean"], views["student"])


@pytest.mark.parametrize("height, width", [(4, 3000), (3000, 4)])
def test_long_images_are_not_resized_whole(height: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    image_HWC = noise(1, height, width)
    chosen = windows(14, height, width, 40)
    assert max(window.top + window.left for window in chosen) > 5000
    monkeypatch.setattr(resize.F, "interpolate", None)
    for window in chosen:
        place = np.array([window.height, window.width, window.top, window.left], np.int32)
        assert_near(
            resize.resized_window(image_HWC, place, 14), reference.resize(image_HWC, window, 14), most=1, share=0.001
        )


def test_sixteen_times_the_side_is_resized_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resize.F, "grid_sample", None)
    for place in ((14, 16 * 14, 0, 5), (16 * 14, 14, 5, 0)):
        found = resize.resized_window(np.zeros((20, 20, 3), np.uint8), np.array(place, np.int32), 14)
        assert found.shape == (14, 14, 3)


def test_a_window_reads_what_lies_beyond_its_edges() -> None:
    """Crop after resize: the first column of a window mixes in the pixels on its left, as if it were not cut there."""
    image_HWC = noise(0, 84, 168)
    window = Geometry(height=S, width=2 * S, left=S // 2)
    views, _ = decode([Row(image=png(image_HWC), geometry=window), Row(image=png(image_HWC[:, 42:126]))])
    assert np.abs(views["clean"][0] - reference.resize(image_HWC, window, S)).max() <= 2.01
    assert np.abs(views["clean"][0] - views["clean"][1])[:, 0].max() > 5


def test_the_view_is_normalised_by_imagenets_numbers() -> None:
    image_HWC = noise(3, S, S)
    _, decoded = decode(
        [Row(image=png(image_HWC)), Row(image=png(image_HWC), geometry=Geometry(height=S, width=S, flip=True))]
    )
    for view_CHW, expected in zip(decoded.views["clean"], (image_HWC, image_HWC[:, ::-1]), strict=True):
        assert view_CHW.dtype == torch.float32
        assert np.abs(view_CHW.numpy() - reference.normalise(expected)).max() < 1e-6


@pytest.mark.parametrize("name", EXTREMES)
def test_colour(name: str) -> None:
    image_HWC, draw = noise(4, S, S), EXTREMES[name]
    views, _ = decode([Row(image=png(image_HWC), photometric=draw)])
    assert np.abs(views["student"][0] - reference.perturb(image_HWC, draw)).max() < 1e-3
    assert np.array_equal(views["clean"][0].round(), image_HWC)


def test_drawn_colours() -> None:
    image_HWC = noise(5, S, S)
    drawn = [replace(reference.photometric(STRONG, (0, 0, f"{i}")), blur_sigma=0.0) for i in range(64)]
    assert sum(draw.grayscale and draw.brightness != 1 for draw in drawn) > 3
    views, _ = decode([Row(image=png(image_HWC), photometric=draw) for draw in drawn])
    for found, draw in zip(views["student"], drawn, strict=True):
        assert np.abs(found - reference.perturb(image_HWC, draw)).max() < 1e-3


@pytest.mark.parametrize("sigma", SIGMAS)
def test_blur(sigma: float) -> None:
    image_HWC, draw = noise(6, S, S), Photometric(blur_sigma=sigma)
    views, _ = decode([Row(image=png(image_HWC), photometric=draw)])
    assert np.abs(views["student"][0] - reference.blur(image_HWC, sigma)).max() < 1e-3


def test_sigma_0_is_off_and_0_1_hardly_on() -> None:
    """0.1 is UniMatch's smallest sigma: a kernel whose neighbours weigh e^-50."""
    image_HWC = noise(8, S, S)
    views, _ = decode([Row(image=png(image_HWC), photometric=Photometric(blur_sigma=sigma)) for sigma in (0.0, 0.1)])
    assert np.array_equal(views["student"].round(), [image_HWC, image_HWC])


# ---- DALI, everything together


@pytest.mark.parametrize("height, width, size", SIZES)
def test_everything_together(height: int, width: int, size: int) -> None:
    image_HWC = noise(height + 1, height, width)
    drawn = [reference.photometric(STRONG, (1, 0, f"{i}")) for i in range(12 if size < 518 else 4)]
    if size == S:
        drawn += [replace(draw, blur_sigma=sigma) for draw in EXTREMES.values() for sigma in (0.0, 0.1, 2.0)]
    chosen = windows(size, height, width, len(drawn))
    rows = [
        Row(image=png(image_HWC), geometry=window, photometric=draw) for window, draw in zip(chosen, drawn, strict=True)
    ]
    views, decoded = decode(rows, size)
    for i, (window, draw) in enumerate(zip(chosen, drawn, strict=True)):
        assert_near(views["clean"][i], reference.clean(image_HWC, window, size), most=2.01, share=0.03)
        # a level of the resize grows with contrast, brightness and the hue's matrix
        assert_near(views["student"][i], reference.student(image_HWC, window, draw, size), most=12, share=0.06)
        # and exactly, from the clean view that was made: both views show the same pixels
        seen_HWC = reference.flip(np.round(views["clean"][i]), window)
        exact_HWC = reference.flip(reference.perturb(seen_HWC, draw), window)
        assert np.abs(views["student"][i] - exact_HWC).max() < 2e-3
    assert np.abs(decoded.views["student"][0].numpy() - reference.normalise(views["student"][0])).max() < 1e-6


# ---- codes and sky


@pytest.mark.parametrize("height, width, size", SIZES)
def test_depth_and_sky_take_the_reference_pixels(height: int, width: int, size: int) -> None:
    """Codes that are their own row, then their own column, at the image's size and at another; sky of the same size."""
    image = png(noise(0, height, width))
    chosen = windows(size, height, width, 5)
    for target_h, target_w in {(height, width), (max(1, height // 2), max(1, width // 3))}:
        row_HW, column_HW = np.indices((target_h, target_w)).astype(np.uint16)
        for code_HW, axis in ((row_HW, 0), (column_HW, 1)):
            sky_HW = (code_HW % 256).astype(np.uint8)
            rows = [Row(image=image, target=png(code_HW), sky=png(sky_HW), geometry=window) for window in chosen]
            _, decoded = decode(rows, size, targets=True)
            found_BHW = decoded.code_BHW.numpy().astype(np.int64)
            assert np.array_equal(found_BHW % 256, decoded.sky_BHW.numpy())
            for found_HW, window in zip(found_BHW, chosen, strict=True):
                taken = reference.nearest_rows_columns(target_h, target_w, window, size)[axis]
                expected_HW = np.broadcast_to(taken[:, None] if axis == 0 else taken, (size, size))
                assert np.array_equal(found_HW, expected_HW)


# ---- CutMix


def test_cutmix_against_the_text() -> None:
    size, count = 28, 6
    rng = np.random.default_rng(0)
    view, value = rng.random((count, 3, size, size)), rng.random((count, size, size))
    region = rng.integers(0, 2, (count, size, size)).astype(np.uint8)
    strengths = replace(STRONG, cutmix_p=1.0)
    pastes = []
    for i in range(count):
        box = reference.cutmix_box(strengths, size, (0, 0, f"{i}"))
        assert box is not None
        pastes.append(Paste(row=i, source=reference.cutmix_partner(i, count, 0, "role", 0, i), box=box))
    mixed = [torch.from_numpy(array.copy()) for array in (view, value, region)]
    cutmix(pastes, mixed[:1], mixed[1], mixed[2])
    for paste in pastes:
        inside = inside_of(paste.box, size)
        i, j = paste.row, paste.source
        assert np.array_equal(mixed[0][i], np.where(inside, view[j], view[i]))
        assert np.array_equal(mixed[1][i], np.where(inside, value[j], value[i]))
        assert np.array_equal(mixed[2][i], np.where(inside, 2 * region[j], region[i]))


def inside_of(box: Box, size: int) -> npt.NDArray[np.bool_]:
    rows, columns = np.indices((size, size))
    return (box.top <= rows) & (rows < box.bottom) & (box.left <= columns) & (columns < box.right)


# ---- draws against the written formulae


def test_words_are_philox_keyed_by_the_identity() -> None:
    for identity in [(0, 0, "k"), (12, 3, "a/b_ü", "geometry"), (2**40, 0, ""), (0, "unlabelled", 1, 77, "partner")]:
        assert [int(word) for word in draws.raw_words(11, *identity)] == reference.words(11, *identity)


def test_draws_follow_their_formulae() -> None:
    unusual = Perturbation(
        flip_p=0.3, jitter_p=0.6, brightness=1.7, contrast=0.2, saturation=1.0, hue=0.5, grayscale_p=0.4, blur_p=0.7,
        blur_sigma=(0.0, 1.1), cutmix_p=0.8, cutmix_area=(0.3, 0.9), cutmix_aspect=(0.5, 4.0),
    )  # fmt: skip
    for strengths in (STRONG, unusual, Perturbation()):
        for i in range(60):
            identity = (5, i % 3, f"key{i}")
            height, width, size = SIZES[i % len(SIZES)]
            expected = reference.geometry(strengths, size, height, width, identity)
            assert Geometry.draw(strengths, size, height, width, identity) == expected
            ours, written = Photometric.draw(strengths, identity), reference.photometric(strengths, identity)
            for name in Photometric.__dataclass_fields__:
                assert getattr(ours, name) == pytest.approx(getattr(written, name), rel=1e-12, abs=1e-12)
            assert draws.cutmix_box(strengths, 518, identity) == reference.cutmix_box(strengths, 518, identity)
    for own in range(5):
        for position in range(20):
            where = (5, "unlabelled", 1, position)
            assert draws.cutmix_partner(own, 5, *where) == reference.cutmix_partner(own, 5, *where)


# ---- distributions; every seed is fixed, so each of these always passes or always fails

COUNT = 20_000
UNLIKELY = 1e-4  # some thirty comparisons: 3 in 1000 sets of seeds would fail by chance


def uniform(values: npt.ArrayLike, low: float = 0.0, high: float = 1.0) -> bool:
    return bool(stats.kstest(values, "uniform", (low, high - low)).pvalue > UNLIKELY)


def as_often(count: int, of: int, p: float) -> bool:
    return bool(stats.binomtest(count, of, p).pvalue > UNLIKELY)


def test_crops_are_uniform_and_flips_fair() -> None:
    drawn = [Geometry.draw(Perturbation(), 56, 75, 56, (0, i % 7, f"{i}")) for i in range(COUNT)]
    tops = [window.top for window in drawn]
    assert set(tops) == set(range(20))
    assert stats.chisquare(np.bincount(tops)).pvalue > UNLIKELY
    assert {(window.left, window.width) for window in drawn} == {(0, 56)}
    flips = [window.flip for window in drawn]
    assert as_often(sum(flips), COUNT, 0.5)
    assert abs(np.corrcoef(tops, flips)[0, 1]) < 0.04
    # neighbours in the name have nothing in common
    assert abs(np.corrcoef(tops[1:], tops[:-1])[0, 1]) < 0.04


def test_colour_draws_have_their_rates_and_ranges() -> None:
    drawn = [Photometric.draw(STRONG, (0, i % 7, f"{i}")) for i in range(COUNT)]
    jittered = [draw for draw in drawn if draw.brightness != 1]
    assert as_often(len(jittered), COUNT, 0.8)
    assert as_often(sum(draw.grayscale for draw in drawn), COUNT, 0.2)
    assert as_often(sum(draw.grayscale for draw in jittered), len(jittered), 0.2)
    assert as_often(sum(draw.blur_sigma > 0 for draw in jittered), len(jittered), 0.5)
    blurred = [draw.blur_sigma for draw in drawn if draw.blur_sigma]
    assert as_often(len(blurred), COUNT, 0.5)
    assert uniform(blurred, 0.1, 2.0)
    for name in ("brightness", "contrast", "saturation"):
        assert uniform([getattr(draw, name) for draw in jittered], 0.5, 1.5), name
    assert uniform([draw.hue_degrees for draw in jittered], -90, 90)
    # no draw says anything about another
    names = ("brightness", "contrast", "saturation", "hue_degrees", "grayscale", "blur_sigma")
    columns = np.array([[float(getattr(draw, name)) for name in names] for draw in jittered]).T
    flips = [Geometry.draw(STRONG, 56, 75, 56, (0, i % 7, f"{i}")).flip for i in range(COUNT)]
    columns = np.vstack([columns, [flip for flip, draw in zip(flips, drawn, strict=True) if draw.brightness != 1]])
    correlations = np.corrcoef(columns) - np.eye(len(columns))
    assert np.abs(correlations).max() < 0.04


def test_boxes_have_uniform_areas_and_the_aspects_that_fit() -> None:
    size = 518
    boxes = [draws.cutmix_box(STRONG, size, (0, i % 7, f"{i}")) for i in range(COUNT)]
    drawn = [box for box in boxes if box is not None]
    assert as_often(len(drawn), COUNT, 0.5)
    heights = np.array([box.bottom - box.top for box in drawn])
    widths = np.array([box.right - box.left for box in drawn])
    # whole pixels are lost at the lower and right edges: half of one each in the mean
    assert uniform((heights + 0.5) * (widths + 0.5) / size**2, 0.02, 0.4)
    assert uniform([(box.top + 0.5) / (size - h + 1) for box, h in zip(drawn, heights, strict=True)])
    assert uniform([(box.left + 0.5) / (size - w + 1) for box, w in zip(drawn, widths, strict=True)])
    assert not uniform(heights / widths, 0.3, 1 / 0.3)  # what does not fit is drawn again
    aspects, shares = _aspects_that_fit()

    def below(values: npt.NDArray[Any]) -> Any:
        return np.interp(values, aspects, shares)

    assert stats.kstest((heights + 0.5) / (widths + 0.5), below).pvalue > UNLIKELY


def _aspects_that_fit() -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Cumulative distribution of height / width: uniform, weighted for each area by how often such a box fits."""
    area, aspect = np.meshgrid(np.linspace(0.02, 0.4, 200), np.linspace(0.3, 1 / 0.3, 2000), indexing="ij")
    fits = np.clip(1 - np.sqrt(area * aspect), 0, 1) * np.clip(1 - np.sqrt(area / aspect), 0, 1)
    density = (fits / fits.sum(axis=1, keepdims=True)).sum(axis=0)
    return aspect[0], np.cumsum(density) / density.sum()


def test_partners_are_uniform_among_the_others() -> None:
    assert {draws.cutmix_partner(0, 2, 0, "role", 0, i) for i in range(50)} == {1}
    for share in (3, 5):
        found = [(draws.cutmix_partner(1, share, 0, "role", 0, i) - 1) % share for i in range(1000)]
        counts = np.bincount(found, minlength=share)
        assert counts[0] == 0
        assert stats.chisquare(counts[1:]).pvalue > UNLIKELY


# ---- the loader: the same sample, the same bytes


def photograph(seed: int) -> dict[str, bytes]:
    side = 60 + seed % 5
    return {"jpg": png(noise(seed, side, 97 - seed % 7))}  # a PNG in all but name: no decoder has a choice


@pytest.fixture(scope="module")
def pseudo_labelled(tmp_path_factory: pytest.TempPathFactory) -> DataSpec:
    root = tmp_path_factory.mktemp("pseudo_labelled")
    shards = shards_of([9, 7, 8], photograph)
    role = RoleSpec(
        datasets=(write_dataset(root / "u", shards, with_depth=False),),
        labels=(write_labels(root / "labels", shards, height=42, width=63),),
        batch=16,
        lanes=4,  # 6 samples each, 4 of them in a batch: three partners to choose from, and a partial batch
        perturbation=replace(STRONG, cutmix_p=0.7),
    )
    return DataSpec(roles={"unlabelled": role}, input_size=S, shuffle_window=5)


def batches(data: DataSpec, count: int, *, seed: int = 5, **options: Any) -> list[Batch]:
    needs = {"unlabelled": RoleNeeds(sidecar=True)}
    with Loader(data, needs, views=("student", "clean"), seed=seed, **options) as loader:
        return [next(loader) for _ in range(count)]


def bytes_by_key(shares: Sequence[Batch]) -> Mapping[str, tuple[bytes, ...]]:
    """What every sample of these batches became."""
    return {
        key: tuple(
            tensor[i].numpy().tobytes()
            for tensor in (*(batch.views[name] for name in ("student", "clean")), batch.targets["disparity"].value_BHW,
                           batch.region_BHW, batch.weight_B)
        )
        for batch in shares
        for i, key in enumerate(batch.keys)
        if key
    }  # fmt: skip


STEPS = 5  # one pass has 2


@pytest.mark.parametrize("ranks, threads", [(2, 1), (3, 2), (4, 1), (1, 4)])
def test_ranks_and_threads_change_no_byte(pseudo_labelled: DataSpec, ranks: int, threads: int) -> None:
    alone = batches(pseudo_labelled, STEPS)
    data = replace(pseudo_labelled, threads=threads)
    shares = [batches(data, STEPS, rank=rank, world_size=ranks) for rank in range(ranks)]
    for step, batch in enumerate(alone):
        assert bytes_by_key([share[step] for share in shares]) == bytes_by_key([batch])


def test_a_resume_on_other_ranks_changes_no_byte(pseudo_labelled: DataSpec) -> None:
    alone = batches(pseudo_labelled, STEPS)
    cursor = alone[1].cursor
    shares = [batches(pseudo_labelled, STEPS - 2, rank=rank, world_size=3, cursor=cursor) for rank in range(3)]
    for step, batch in enumerate(alone[2:]):
        assert bytes_by_key([share[step] for share in shares]) == bytes_by_key([batch])


def test_every_epoch_and_every_seed_perturbs_anew(pseudo_labelled: DataSpec) -> None:
    found = batches(pseudo_labelled, 4)
    first, second = (bytes_by_key(part) for part in (found[:2], found[2:]))
    assert len(first) == 24
    assert first.keys() == second.keys()
    assert not any(first[key][0] == second[key][0] for key in first)
    other = bytes_by_key(batches(pseudo_labelled, 2, seed=6))
    assert other.keys() == first.keys()
    assert not any(first[key][0] == other[key][0] for key in first)


def test_what_the_loader_hands_out_is_what_the_text_says(tmp_path: Path) -> None:
    """From the photographs and the identities alone: every view and every region of two passes."""
    sizes, lanes, batch_size = [9, 7], 2, 8
    shards = shards_of(sizes, photograph)
    source = {key: members["jpg"] for shard in shards for key, members in shard.items()}
    strengths = replace(STRONG, cutmix_p=0.7)
    folder = write_dataset(tmp_path / "u", shards, with_depth=False)
    role = RoleSpec(datasets=(folder,), batch=batch_size, lanes=lanes, perturbation=strengths)
    data = DataSpec(roles={"unlabelled": role}, input_size=S)
    needs = {"unlabelled": RoleNeeds(target="none")}
    pasted = 0
    with Loader(data, needs, views=("student", "clean"), seed=9) as loader:
        for number, batch in zip(range(4), loader, strict=False):
            epoch, within = divmod(number, sum(sizes) // batch_size)
            share = batch_size // lanes
            plain: dict[str, list[npt.NDArray[Any]]] = {"clean": [], "student": []}
            for key in batch.keys:
                image_HWC = np.asarray(Image.open(io.BytesIO(source[key])))
                height, width = image_HWC.shape[:2]
                window = reference.geometry(strengths, S, height, width, (9, epoch, key))
                draw = reference.photometric(strengths, (9, epoch, key))
                plain["clean"].append(reference.clean(image_HWC, window, S))
                plain["student"].append(reference.student(image_HWC, window, draw, S))
            for i, key in enumerate(batch.keys):
                lane, own = divmod(i, share)
                position = lane * sum(sizes) // lanes + within * share + own
                partner = lane * share + reference.cutmix_partner(own, share, 9, "unlabelled", epoch, position)
                box = reference.cutmix_box(strengths, S, (9, epoch, key))
                inside = np.zeros((S, S), bool) if box is None else inside_of(box, S)
                pasted += box is not None
                assert np.array_equal(batch.region_BHW[i], 1 + inside)
                for name, most in (("clean", 2.01), ("student", 12)):
                    expected = np.where(inside[..., None], plain[name][partner], plain[name][i])
                    assert_near(levels(batch.views[name][i : i + 1])[0], expected, most=most, share=0.06)
    assert pasted > 10


# ---- GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
@pytest.mark.parametrize("height, width, size", SIZES)
def test_a_gpu_agrees_with_the_reference(height: int, width: int, size: int) -> None:
    """Tolerances wider than the CPU's: other roundings, between passes too."""
    image_HWC = noise(height + 2, height, width)
    drawn = [*EXTREMES.values(), *(Photometric(blur_sigma=sigma) for sigma in SIGMAS)]
    drawn += [reference.photometric(STRONG, (2, 0, f"{i}")) for i in range(12)]
    chosen = windows(size, height, width, len(drawn))
    code_HW = np.arange(height * width, dtype=np.uint32).reshape(height, width).astype(np.uint16)
    rows = [
        Row(image=png(image_HWC), target=png(code_HW), geometry=window, photometric=draw)
        for window, draw in zip(chosen, drawn, strict=True)
    ]
    views, decoded = decode(rows, size, device="cuda", targets=True)
    codes_BHW = decode(rows, size, targets=True)[1].code_BHW.numpy()
    assert np.array_equal(decoded.code_BHW.cpu().numpy(), codes_BHW)  # decoded and cut in main memory on both
    for i, (window, draw) in enumerate(zip(chosen, drawn, strict=True)):
        clean_HWC = reference.flip(np.clip(reference.resize_gpu(image_HWC, window, size), 0, 255), window)
        assert np.abs(views["clean"][i] - clean_HWC).max() <= 1.6
        seen_HWC = reference.flip(np.round(views["clean"][i]), window)
        exact_HWC = reference.flip(reference.perturb(seen_HWC, draw), window)
        assert np.abs(views["student"][i] - exact_HWC).max() <= 0.1


# ---- the picture


def test_the_comparison_picture_is_drawn(tmp_path: Path) -> None:
    out = tmp_path / "picture.png"
    command = [sys.executable, "benchmarks/show_perturbations.py", "--out", str(out), "--size", "56", "--images", "1"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "| contrast 0.5 |" in done.stdout
    with Image.open(out) as picture:
        assert picture.width > 5 * 56
