"""Damaged and odd samples through the whole loader: what can be used is shown right, what cannot keeps its slot.

Every case lies among good samples, and everything of those is compared bit for bit with a run without the fault.
Colours are perturbed, so that a random draw that moved would show; CutMix is off, as it takes no partner that is bad.

Shape suffixes: H W pixels, C channel.
"""

from __future__ import annotations

import io
import json
import os
import struct
import tarfile
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from dataio.dali_batch import MEAN, STD, DaliBatch, Row
from dataio.dataset import Dataset
from dataio.draws import Geometry
from dataio.index import index_path
from dataio.labels import LabelStore
from dataio.loader import Loader
from dataio.quarantine import Quarantine
from dataio.spec import DataError, DataSpec, Perturbation, RoleNeeds, RoleSpec
from dataio.types import Batch

from .fakes import Shards, jpeg, labelled, metadata, png, shards_of, smooth, unlabelled, write_dataset, write_labels

pytestmark = pytest.mark.timeout(120)  # a hang is a failure

S = 28
SEED = 5
H, W = 28, 42  # the short side is S: pixels are cropped and not resampled
STRONG = Perturbation(jitter_p=1.0, grayscale_p=0.2, blur_p=0.5)
PLAIN = Perturbation(flip_p=0.0)
NEEDS = {"r": RoleNeeds()}
VICTIM = "s0_002"
BATCHES = 4  # of 6: two passes over 12 samples


def good(seed: int) -> dict[str, bytes]:
    return labelled(seed, H, W)


def clean_shards() -> list[dict[str, dict[str, bytes]]]:
    return shards_of([6, 6], good)


def with_victim(members: Mapping[str, bytes]) -> Shards:
    first, second = clean_shards()
    return [{key: members if key == VICTIM else value for key, value in first.items()}, second]


def spec(folder: str, perturbation: Perturbation = STRONG, max_bad_fraction: float = 1.0, **role: Any) -> DataSpec:
    roles = {"r": RoleSpec(datasets=(folder,), batch=6, lanes=2, perturbation=perturbation, **role)}
    return DataSpec(roles=roles, input_size=S, shuffle_window=4, max_bad_fraction=max_bad_fraction)


@dataclass(frozen=True)
class Shown:
    """What a run handed out, and its account of what was bad."""

    batches: list[Batch]
    counts: Counter[str]
    listed: list[dict[str, str]]  # lines of the quarantine file

    def bad(self) -> dict[str, set[str]]:
        """Key -> reasons, of the quarantine file."""
        found: dict[str, set[str]] = {}
        for line in self.listed:
            found.setdefault(line["key"], set()).add(line["reason"])
        return found


def show(data: DataSpec, path: Path, needs: Mapping[str, RoleNeeds] = NEEDS, batches: int = BATCHES) -> Shown:
    quarantine = Quarantine(str(path), data.max_bad_fraction)
    with Loader(data, needs, views=("clean", "student"), seed=SEED, quarantine=quarantine) as loader:
        shown = [next(loader) for _ in range(batches)]
    # the thread may have counted a batch more than was taken
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return Shown(shown, quarantine.counts, lines)


def row(batch: Batch, i: int) -> dict[str, torch.Tensor]:
    """Everything of row i."""
    views = {name: view[i] for name, view in batch.views.items()}
    targets = {name: target.value_BHW[i] for name, target in batch.targets.items()}
    return {**views, **targets, "region": batch.region_BHW[i], "weight": batch.weight_B[i]}


def assert_blank(batch: Batch, i: int) -> None:
    """Zeros, region 0 and weight 0."""
    for name, tensor in row(batch, i).items():
        assert not tensor.any(), (batch.keys[i], name)


def assert_only(shown: Shown, clean: Shown, bad: Mapping[str, str], renamed: Mapping[str, str] | None = None) -> None:
    """The samples `bad` (key -> reason) are blank, counted and named; all others are as in the run without a fault.

    `renamed` maps keys of this run to those that stand in their places in the other.
    """
    met: Counter[str] = Counter()
    for batch, expected in zip(shown.batches, clean.batches, strict=True):
        assert batch.cursor == expected.cursor
        assert tuple((renamed or {}).get(key, key) for key in batch.keys) == expected.keys
        for i, key in enumerate(batch.keys):
            if key in bad:
                met[bad[key]] += 1
                assert_blank(batch, i)
            elif key not in (renamed or {}):
                assert expected.weight_B[i] == 1
                other = row(expected, i)
                for name, tensor in row(batch, i).items():
                    assert torch.equal(tensor, other[name]), (key, name)
    assert met == Counter([*bad.values(), *bad.values()]), "in both passes"
    assert {key: {reason} for key, reason in bad.items()} == shown.bad()
    assert len(shown.listed) == len(bad), "named once, however often it was met"
    assert shown.counts.keys() == met.keys()
    assert all(shown.counts[reason] >= count for reason, count in met.items())


def everything() -> set[str]:
    return {key for shard in clean_shards() for key in shard}


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Shown:
    root = tmp_path_factory.mktemp("clean")
    shown = show(spec(write_dataset(root / "d", clean_shards())), root / "quarantine.jsonl")
    assert not shown.listed and not shown.counts
    assert Counter(key for batch in shown.batches for key in batch.keys) == dict.fromkeys(everything(), 2)
    return shown


# --- one sample that cannot be used


def npy(value_HW: Any) -> bytes:
    out = io.BytesIO()
    np.save(out, value_HW)
    return out.getvalue()


def npz(value_HW: Any) -> bytes:
    out = io.BytesIO()
    np.savez(out, value_HW)
    return out.getvalue()


def claimed_npy(shape: str) -> bytes:
    """A `.npy` whose header states a shape that its data do not have."""
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + bytes(64)


def huge_png(width: int = 20_000, height: int = 20_000) -> bytes:
    """A sound PNG of one bit per pixel: 50 kB that decode to 1.2 GB of colours."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    ihdr = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes(height * (1 + (width + 7) // 8)), 1)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", ihdr) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def huge_jpeg(side: int = 20_000) -> bytes:
    """A JPEG whose header states `side` x `side`; the data are those of a small one."""
    data = bytearray(good(0)["jpg"])
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", side, side)
    return bytes(data)


def depth(value_HW: Any) -> dict[str, bytes]:
    return {"jpg": good(2)["jpg"], "depth.npy": npy(value_HW)}


def changed(**members: bytes) -> dict[str, bytes]:
    """A good sample with these members in place of its own."""
    return {**good(2), **{name.replace("_", "."): data for name, data in members.items()}}


ONES_HW = np.ones((H, W), np.float32)
HOLES_HW = np.full((H, W), np.nan, np.float32)
FAULTS: dict[str, tuple[str, Callable[[], dict[str, bytes]]]] = {
    "truncated JPEG": ("bad_image", lambda: changed(jpg=good(2)["jpg"][: len(good(2)["jpg"]) // 2])),
    "JPEG without an end": ("bad_image", lambda: changed(jpg=good(2)["jpg"][:-2])),
    "no image at all": ("bad_image", lambda: changed(jpg=b"<html>404</html>")),
    "zero-byte image": ("bad_image", lambda: changed(jpg=b"")),
    "zero-byte depth": ("bad_target", lambda: changed(depth_png=b"")),
    "zero-byte metadata": ("bad_metadata", lambda: changed(json=b"")),
    "missing image": ("missing_image", lambda: {"depth.png": good(2)["depth.png"]}),
    "missing depth": ("missing_target", lambda: {"jpg": good(2)["jpg"]}),
    "only something else": ("missing_image", lambda: {"txt": b"a note"}),
    "20000 x 20000 PNG": ("too_large", lambda: {"png": huge_png(), "depth.png": good(2)["depth.png"]}),
    "20000 x 20000 JPEG": ("too_large", lambda: changed(jpg=huge_jpeg())),
    "1 x 5000000 PNG": ("too_large", lambda: {"png": huge_png(1, 5_000_000), "depth.png": good(2)["depth.png"]}),
    "5000000 x 1 PNG": ("too_large", lambda: {"png": huge_png(5_000_000, 1), "depth.png": good(2)["depth.png"]}),
    "20000 x 20000 depth": ("bad_target", lambda: changed(depth_png=huge_png())),
    "JPEG turned by EXIF 2": ("rotated_by_exif", lambda: changed(jpg=turned_jpeg(2))),
    "JPEG turned by EXIF 3": ("rotated_by_exif", lambda: changed(jpg=turned_jpeg(3))),
    "JPEG turned by EXIF 6": ("rotated_by_exif", lambda: changed(jpg=turned_jpeg(6))),
    "PNG turned by EXIF": (
        "rotated_by_exif",
        lambda: {"png": encoded(photograph(), "PNG", exif=turned(3)), "depth.png": good(2)["depth.png"]},
    ),
    "JPEG turned by EXIF with a float depth": (
        "rotated_by_exif", lambda: {"jpg": turned_jpeg(3), "depth.npy": npy(ONES_HW)}
    ),
    "wrong depth size": ("size_mismatch", lambda: changed(depth_png=png(np.ones((H, W + 1), np.uint16)))),
    "transposed depth": ("size_mismatch", lambda: changed(depth_png=png(np.ones((W, H), np.uint16)))),
    "wrong size of .npy": ("size_mismatch", lambda: depth(np.ones((H + 1, W), np.float32))),
    "8-bit depth": ("bad_target", lambda: changed(depth_png=png(np.ones((H, W), np.uint8)))),
    "truncated depth": ("bad_target", lambda: changed(depth_png=good(2)["depth.png"][:-600])),
    "NaN depth (.npy)": ("no_valid_pixels", lambda: depth(HOLES_HW)),
    "infinite depth (.npy)": ("no_valid_pixels", lambda: depth(np.full((H, W), np.inf, np.float32))),
    "negative depth (.npy)": ("no_valid_pixels", lambda: depth(-ONES_HW)),
    "all-hole depth": ("no_valid_pixels", lambda: changed(depth_png=png(np.zeros((H, W), np.uint16)))),
    "codes of depths below 0": ("no_valid_pixels", lambda: changed(json=metadata(scale=1, zero=65535))),
    "truncated .npy": ("bad_target", lambda: {"jpg": good(2)["jpg"], "depth.npy": npy(ONES_HW)[:-9]}),
    ".npy of three dimensions": ("bad_target", lambda: depth(ONES_HW[None])),
    ".npy of no pixels": ("bad_target", lambda: depth(ONES_HW[:0])),
    ".npy of integers": ("bad_target", lambda: depth(ONES_HW.astype(np.int32))),
    ".npy that holds an archive": ("bad_target", lambda: {"jpg": good(2)["jpg"], "depth.npy": npz(ONES_HW)}),
    ".npy that holds half an archive": (
        "bad_target", lambda: {"jpg": good(2)["jpg"], "depth.npy": npz(ONES_HW)[:300]}
    ),
    ".npy that claims terabytes": (
        "bad_target", lambda: {"jpg": good(2)["jpg"], "depth.npy": claimed_npy("(4000000, 4000000)")}
    ),
    ".npy whose header is cut open": (
        "bad_target", lambda: {"jpg": good(2)["jpg"], "depth.npy": claimed_npy("(28, [[")}
    ),
    "metadata that nest too deep": ("bad_metadata", lambda: changed(json=b"[" * 100_000)),
    "metadata with a number of 5000 digits": ("bad_metadata", lambda: changed(json=b'{"scale": ' + b"9" * 5000 + b"}")),
    "metadata with a number of 400 digits": ("bad_metadata", lambda: changed(json=b'{"scale": ' + b"9" * 400 + b"}")),
    "metadata with a number of 200 bits": ("bad_metadata", lambda: changed(json=metadata(zero=2**200))),
    "metadata with a scale beyond float32": ("bad_metadata", lambda: changed(json=metadata(scale=1e300))),
    "metadata with a scale whose codes are": ("bad_metadata", lambda: changed(json=metadata(scale=1e37))),
    "metadata with a shift beyond float32": ("bad_metadata", lambda: changed(json=metadata(scale=1, shift=-1e39))),
    "metadata with a NaN": ("bad_metadata", lambda: changed(json=b'{"scale": NaN}')),
    "metadata that are no object": ("bad_metadata", lambda: changed(json=b"[1]")),
    "metadata in another encoding": ("bad_metadata", lambda: changed(json=b'{"\xff\xfe": 1}')),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_sample_that_cannot_be_used_keeps_its_slot(tmp_path: Path, clean: Shown, fault: str) -> None:
    reason, members = FAULTS[fault]
    folder = write_dataset(tmp_path / "d", with_victim(members()))
    shown = show(spec(folder), tmp_path / "quarantine.jsonl")
    assert_only(shown, clean, {VICTIM: reason})
    assert shown.listed[0]["shard"] == str(tmp_path / "d" / "shards" / "000000.tar")


def test_many_at_once_and_in_every_batch(tmp_path: Path, clean: Shown) -> None:
    faults = ["truncated JPEG", "wrong depth size", "truncated depth", "zero-byte image", "missing depth"]
    keys = ["s0_000", "s0_003", "s0_005", "s1_001", "s1_004"]
    bad = {key: FAULTS[fault] for key, fault in zip(keys, faults, strict=True)}
    shards = [{key: bad[key][1]() if key in bad else value for key, value in s.items()} for s in clean_shards()]
    shown = show(spec(write_dataset(tmp_path / "d", shards)), tmp_path / "quarantine.jsonl")
    assert_only(shown, clean, {key: reason for key, (reason, _) in bad.items()})
    whole = show(
        spec(write_dataset(tmp_path / "all", [dict.fromkeys(s, FAULTS[faults[0]][1]()) for s in shards])),
        tmp_path / "all.jsonl",
    )
    assert_only(whole, clean, dict.fromkeys(everything(), "bad_image"))


def test_20000_x_20000_pixels_are_never_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither fed to DALI, nor, in a process of its own, anywhere in memory."""
    image = huge_png()
    with monkeypatch.context() as patch:  # sound, or else it might be refused for another reason
        patch.setattr(Image, "MAX_IMAGE_PIXELS", None)
        with Image.open(io.BytesIO(image)) as picture:
            assert picture.size == (20_000, 20_000)
            picture.load()  # in one bit each
    members = {"png": image, "depth.png": good(2)["depth.png"]}
    folder = write_dataset(tmp_path / "d", with_victim(members))
    fed: list[Row] = []
    start = DaliBatch.start

    def spy(batch: DaliBatch, rows: Sequence[Row | None]) -> None:
        fed.extend(row for row in rows if row is not None)
        start(batch, rows)

    monkeypatch.setattr(DaliBatch, "start", spy)
    began = time.monotonic()
    show(spec(folder), tmp_path / "quarantine.jsonl")
    assert time.monotonic() - began < 30
    assert len(fed) >= 22 and max(len(row.image) for row in fed) < len(image)
    small = write_dataset(tmp_path / "small", clean_shards())
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        before = pool.submit(_peak_mib, small, str(tmp_path / "small.jsonl")).result()
        after = pool.submit(_peak_mib, folder, str(tmp_path / "large.jsonl")).result()
    assert after - before < 300, "of 1.2 GB in colours, 400 MB in grey"


def _peak_mib(folder: str, path: str) -> float:
    tempfile.tempdir = str(Path(path).parent)  # DALI removes its own at the interpreter's exit, which a child has not
    show(spec(folder), Path(path))
    return getrusage(RUSAGE_SELF).ru_maxrss / 1024


# --- odd samples that can be used


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def turned_jpeg(orientation: int) -> bytes:
    """A picture that is displayed H x W."""
    return jpeg(smooth(2, *((W, H) if orientation > 4 else (H, W))), exif=turned(orientation))


def photograph(height: int = H, width: int = W) -> Image.Image:
    return Image.fromarray(smooth(2, height, width))


def four_inks() -> Image.Image:
    """Cyan, magenta, yellow and a black that is not 0 everywhere."""
    return Image.fromarray(np.concatenate([smooth(2, H, W), smooth(3, H, W)[..., :1]], axis=-1), "CMYK")


def sixteen_bits() -> bytes:
    grey_HW = smooth(2, H, W)[..., 0].astype(np.uint16) * 257
    return png(grey_HW)


def by_pillow(data: bytes) -> np.ndarray:
    """The picture as displayed, RGB [H, W, C], by another decoder."""
    with Image.open(io.BytesIO(data)) as image:
        if image.mode.startswith("I"):
            return np.repeat((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8)[..., None], 3, axis=-1)
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


EXACT, BY_DCT = 1.01, 4.01  # grey levels; the second where two JPEG decoders round in their own ways
ODDITIES: dict[str, tuple[str, float, Callable[[], bytes]]] = {
    "CMYK JPEG": ("jpg", BY_DCT, lambda: encoded(four_inks(), "JPEG", quality=98)),
    "greyscale JPEG": ("jpg", BY_DCT, lambda: encoded(photograph().convert("L"), "JPEG", quality=95)),
    "progressive JPEG": ("jpg", BY_DCT, lambda: jpeg(smooth(2, H, W), progressive=True)),
    "JPEG called png": ("png", BY_DCT, lambda: jpeg(smooth(2, H, W))),
    "greyscale PNG": ("png", EXACT, lambda: encoded(photograph().convert("L"), "PNG")),
    "black and white PNG": ("png", EXACT, lambda: encoded(photograph().convert("1"), "PNG")),
    "16-bit grey PNG": ("png", EXACT, sixteen_bits),
    "palette PNG": ("png", EXACT, lambda: encoded(photograph().quantize(64), "PNG")),
    "RGBA PNG": ("png", EXACT, lambda: encoded(photograph().convert("RGBA"), "PNG")),
    "WebP": ("webp", EXACT, lambda: encoded(photograph(), "WEBP", lossless=True)),
    **{f"JPEG with EXIF {n}, upright": ("jpg", BY_DCT, partial(turned_jpeg, n)) for n in (0, 1)},
}
TURNED: dict[str, tuple[str, float, Callable[[], bytes]]] = {  # their maps are labels: of what was displayed
    **{f"JPEG turned by EXIF {n}": ("jpg", BY_DCT, partial(turned_jpeg, n)) for n in range(2, 9)},
    "PNG turned by EXIF": ("png", EXACT, lambda: encoded(photograph(W, H), "PNG", exif=turned(6))),
    "WebP turned by EXIF": ("webp", EXACT, lambda: encoded(photograph(W, H), "WEBP", lossless=True, exif=turned(8))),
}


def crop_of(key: str, height: int, width: int, identity: tuple[int | str, ...]) -> tuple[slice, slice]:
    """The S x S pixels that PLAIN shows of a picture whose short side is S."""
    box = Geometry.draw(PLAIN, S, height, width, identity)
    return slice(box.top, box.top + S), slice(box.left, box.left + S)


def pixels(view_CHW: torch.Tensor) -> np.ndarray:
    """Without the normalisation: 0..255 [H, W, C]."""
    return (view_CHW.permute(1, 2, 0).numpy() * STD + MEAN) * 255


def rows_of(shown: Shown, key: str) -> list[tuple[int, Batch, int]]:
    """(pass, batch, row) of a key."""
    return [
        (number // 2, batch, i)
        for number, batch in enumerate(shown.batches)
        for i, other in enumerate(batch.keys)
        if other == key
    ]


def shown_places(
    shown: Shown, expected_HWC: np.ndarray, tolerance: float
) -> list[tuple[Batch, int, tuple[slice, slice]]]:
    """(batch, row, crop) of the two times that VICTIM is shown; asserts that it is shown whole, and these pixels."""
    assert expected_HWC.shape == (H, W, 3)
    places = rows_of(shown, VICTIM)
    assert len(places) == 2
    found = []
    for epoch, batch, i in places:
        crop = crop_of(VICTIM, H, W, (SEED, epoch, VICTIM))
        assert batch.weight_B[i] == 1 and batch.region_BHW[i].all()
        assert np.abs(pixels(batch.views["clean"][i]) - expected_HWC[crop]).max() <= tolerance
        found.append((batch, i, crop))
    return found


@pytest.mark.parametrize("oddity", ODDITIES)
def test_an_odd_picture_is_shown_as_it_is(tmp_path: Path, clean: Shown, oddity: str) -> None:
    extension, tolerance, make = ODDITIES[oddity]
    image, code_HW = make(), np.arange(1000, 1000 + H * W, dtype=np.uint16).reshape(H, W)  # as displayed
    folder = write_dataset(tmp_path / "d", with_victim({extension: image, "depth.png": png(code_HW)}))
    plain = show(spec(folder, PLAIN), tmp_path / "plain.jsonl")
    assert not plain.counts
    for batch, i, crop in shown_places(plain, by_pillow(image), tolerance):
        disparity_HW = 1000.0 / code_HW[crop]
        wanted_HW = (disparity_HW - disparity_HW.min()) / np.ptp(disparity_HW)
        assert np.abs(batch.targets["disparity"].value_BHW[i].numpy() - wanted_HW).max() < 1e-4
    # what is next to it does not change, perturbed colours included; VICTIM is not compared
    shown = show(spec(folder), tmp_path / "quarantine.jsonl")
    assert not shown.listed and not shown.counts
    for batch, other in zip(shown.batches, clean.batches, strict=True):
        assert batch.keys == other.keys
        for i, key in enumerate(batch.keys):
            if key != VICTIM:
                assert all(torch.equal(tensor, row(other, i)[name]) for name, tensor in row(batch, i).items()), key


@pytest.mark.parametrize("oddity", TURNED)
def test_a_turned_picture_with_labels_is_shown_as_it_is(tmp_path: Path, oddity: str) -> None:
    extension, tolerance, make = TURNED[oddity]
    shards = [
        {key: {extension: make()} if key == VICTIM else {"jpg": members["jpg"]} for key, members in shard.items()}
        for shard in clean_shards()
    ]
    folder = write_dataset(tmp_path / "d", shards, with_depth=False)
    labels = write_labels(tmp_path / "labels", shards, H, W)
    data = spec(folder, PLAIN, labels=(labels,))
    plain = show(data, tmp_path / "plain.jsonl", {"r": RoleNeeds(sidecar=True)})
    assert not plain.counts
    shown_places(plain, by_pillow(make()), tolerance)


@pytest.mark.parametrize("extension", ["jpg", "png"])
def test_one_pixel_fills_the_input(tmp_path: Path, clean: Shown, extension: str) -> None:
    colour = np.array([[[200, 100, 50]]], np.uint8)
    image = jpeg(colour) if extension == "jpg" else png(colour)
    members = {extension: image, "depth.png": png(np.full((1, 1), 2000, np.uint16))}
    folder = write_dataset(tmp_path / "d", with_victim(members))
    shown = show(spec(folder, PLAIN), tmp_path / "quarantine.jsonl")
    assert not shown.counts
    for _, batch, i in rows_of(shown, VICTIM):
        assert batch.weight_B[i] == 1 and batch.region_BHW[i].all()
        assert np.abs(pixels(batch.views["clean"][i]) - by_pillow(image)[0, 0]).max() <= EXACT
        assert not batch.targets["disparity"].value_BHW[i].any()  # flat


@pytest.mark.parametrize("size", [(1, 3000), (3000, 1), (2, 2)])
def test_extreme_shapes_are_shown(tmp_path: Path, size: tuple[int, int]) -> None:
    code_HW = np.arange(1, 1 + size[0] * size[1], dtype=np.uint16).reshape(size)
    members = {"png": png(smooth(2, *size)), "depth.png": png(code_HW)}
    folder = write_dataset(tmp_path / "d", with_victim(members))
    shown = show(spec(folder), tmp_path / "quarantine.jsonl")
    assert not shown.counts
    assert all(batch.weight_B.all() for batch in shown.batches)


def test_holes_of_a_float_map_stay_holes(tmp_path: Path) -> None:
    """NaN, infinities, 0, negative numbers and what has no inverse in float32 are holes; the rest keeps its place."""
    depth_HW = np.linspace(1, 9, H * W, dtype=np.float32).reshape(H, W)
    depth_HW[3:9, 5:11] = np.nan
    depth_HW[0, :5] = [np.inf, -np.inf, 0, -1, 1e-40]
    depth_HW[0, 23:] = np.nan  # so that some are in every crop
    folder = write_dataset(tmp_path / "d", with_victim(depth(depth_HW)))
    shown = show(spec(folder, PLAIN), tmp_path / "quarantine.jsonl")
    assert not shown.counts
    hole_HW = ~(np.isfinite(depth_HW) & (depth_HW > 1e-30))
    for epoch, batch, i in rows_of(shown, VICTIM):
        crop = crop_of(VICTIM, H, W, (SEED, epoch, VICTIM))
        assert np.array_equal(batch.region_BHW[i].numpy() == 0, hole_HW[crop])
        value_HW = batch.targets["disparity"].value_BHW[i].numpy()
        disparity_HW = 1 / depth_HW[crop][~hole_HW[crop]]
        wanted = (disparity_HW - disparity_HW.min()) / np.ptp(disparity_HW)
        assert np.abs(value_HW[~hole_HW[crop]] - wanted).max() < 1e-3
        assert not value_HW[hole_HW[crop]].any()


def test_a_huge_but_sound_json_is_read(tmp_path: Path, clean: Shown) -> None:
    """20 MB of it: there is no limit to KEY.json, and what it says of the code holds."""
    large = metadata(scale=0.002, note="x" * 20_000_000)
    folder = write_dataset(tmp_path / "d", with_victim(changed(json=large)))
    began = time.monotonic()
    shown = show(spec(folder), tmp_path / "quarantine.jsonl")
    assert time.monotonic() - began < 30
    assert_only(shown, clean, {})  # a min-max disparity does not depend on the scale


# --- faults of the tar itself


@dataclass(frozen=True)
class Entry:
    """A member to write: any name, any type."""

    name: str
    data: bytes = b""
    type: bytes = tarfile.REGTYPE
    link: str = ""


def entries_of(samples: Mapping[str, Mapping[str, bytes]]) -> list[Entry]:
    return [
        Entry(f"{key}.{extension}", data) for key, members in samples.items() for extension, data in members.items()
    ]


def write_tar(path: Path, entries: Iterable[Entry]) -> None:
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT, encoding="utf-8", errors="surrogateescape") as tar:
        for entry in entries:
            info = tarfile.TarInfo(entry.name)
            info.size, info.type, info.linkname = len(entry.data), entry.type, entry.link
            tar.addfile(info, io.BytesIO(entry.data))


def dataset_of(folder: Path, first: Sequence[Entry], samples: int = 12) -> str:
    """The clean dataset with another first shard."""
    write_dataset(folder, clean_shards(), samples=samples)
    write_tar(folder / "shards" / "000000.tar", first)
    return str(folder)


def test_this_way_of_writing_changes_nothing(tmp_path: Path, clean: Shown) -> None:
    folder = dataset_of(tmp_path / "d", entries_of(clean_shards()[0]))
    assert_only(show(spec(folder), tmp_path / "quarantine.jsonl"), clean, {})


@pytest.mark.parametrize("where", ["header", "extended header", "data", "last"])
def test_a_truncated_tar_loses_what_is_behind_the_cut(tmp_path: Path, clean: Shown, where: str) -> None:
    folder = write_dataset(tmp_path / "d", clean_shards())
    tar = tmp_path / "d" / "shards" / "000000.tar"
    entries = Dataset.open(folder).shards[0].index.samples  # writes the index, which tells what the tar held
    offset, size = entries[2].members["jpg"]
    assert entries[2].start + 1536 == next(iter(entries[2].members.values()))[0], "three blocks: PAX, its text, the own"
    cut = {
        "header": entries[2].start + 100,
        "extended header": entries[2].start + 700,
        "data": offset + size // 2,
        "last": entries[5].end - 1024,
    }[where]
    os.truncate(tar, cut)
    lost = [entry.key for entry in entries if entry.end > cut]
    assert len(lost) == (1 if where == "last" else 4)
    shown = show(spec(folder), tmp_path / "quarantine.jsonl")
    assert_only(shown, clean, dict.fromkeys(lost, "unreadable_member"))
    os.remove(index_path(str(tar)))
    _refused(folder, "bytes found, at least .* expected: .*copy it again|not a tar file .*: restore it")


@pytest.mark.parametrize("member", [0, 1])
def test_a_bad_tar_header_loses_one_sample(tmp_path: Path, clean: Shown, member: int) -> None:
    folder = write_dataset(tmp_path / "d", clean_shards())
    tar = tmp_path / "d" / "shards" / "000000.tar"
    entry = Dataset.open(folder).shards[0].index.samples[2]
    assert entry.key == VICTIM
    before = tar.stat()
    at = entry.start if member == 0 else list(entry.members.values())[1][0] - 512
    with open(tar, "r+b") as file:
        file.seek(at)
        file.write(os.urandom(512))
    os.utime(tar, ns=(before.st_atime_ns, before.st_mtime_ns))  # a disk that forgets does not date it
    shown = show(spec(folder), tmp_path / "quarantine.jsonl")
    assert_only(shown, clean, {VICTIM: "unreadable_member"})
    os.utime(tar)  # newer than its index: it is scanned again
    _refused(folder, "is no tar header: the file is damaged; restore it|not a tar file .*: restore it")


def test_folders_links_and_devices_are_passed_over(tmp_path: Path, clean: Shown) -> None:
    first, last = clean_shards()[0], entries_of(clean_shards()[0])[-2:]
    entries = [
        Entry("folder", type=tarfile.DIRTYPE),
        Entry("folder.jpg", type=tarfile.DIRTYPE),
        *entries_of(first)[:-2],
        Entry("s0_004.webp", type=tarfile.SYMTYPE, link="/etc/hostname"),
        Entry("outside.jpg", type=tarfile.SYMTYPE, link="../../outside.jpg"),
        Entry("again.jpg", type=tarfile.LNKTYPE, link="s0_000.jpg"),
        Entry("pipe.jpg", type=tarfile.FIFOTYPE),
        Entry("disk.jpg", type=tarfile.BLKTYPE),
        *last,
    ]
    folder = dataset_of(tmp_path / "d", entries)
    assert_only(show(spec(folder), tmp_path / "quarantine.jsonl"), clean, {})


def test_a_link_in_place_of_the_image_is_not_followed(tmp_path: Path, clean: Shown) -> None:
    outside = tmp_path / "outside.jpg"
    outside.write_bytes(good(2)["jpg"])
    entries = [
        Entry(entry.name, type=tarfile.SYMTYPE, link=str(outside)) if entry.name == f"{VICTIM}.jpg" else entry
        for entry in entries_of(clean_shards()[0])
    ]
    shown = show(spec(dataset_of(tmp_path / "d", entries)), tmp_path / "quarantine.jsonl")
    assert_only(shown, clean, {VICTIM: "missing_image"})


@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "absolute"])
def test_names_that_lead_out_are_not_read_and_nothing_is_written(tmp_path: Path, clean: Shown, name: str) -> None:
    name = str(tmp_path / "evil") if name == "absolute" else name
    samples = {name if key == VICTIM else key: members for key, members in clean_shards()[0].items()}
    folder = dataset_of(tmp_path / "d", entries_of(samples))
    shown = show(spec(folder), tmp_path / "quarantine.jsonl")
    assert_only(shown, clean, {name: "unsafe_name"}, renamed={name: VICTIM})
    files = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    tars = [f"d/shards/{shard:06d}.{suffix}" for shard in (0, 1) for suffix in ("idx", "tar")]
    assert files == ["d/dataset.json", *tars, "quarantine.jsonl"]


@pytest.mark.parametrize("apart", [False, True])
def test_a_key_met_twice_in_a_shard_is_used_neither_time(tmp_path: Path, clean: Shown, apart: bool) -> None:
    """Neither is: which of the two is meant cannot be known. Side by side or with another sample in between."""
    first = list(clean_shards()[0].items())
    victim, neighbour = first[2][0], first[4 if apart else 3][0]
    entries = [entry for key, members in first for entry in entries_of({victim if key == neighbour else key: members})]
    folder = dataset_of(tmp_path / "d", entries)
    shown = show(spec(folder), tmp_path / "quarantine.jsonl")
    for batch, expected in zip(shown.batches, clean.batches, strict=True):
        for i, key in enumerate(batch.keys):
            if key == victim:
                assert expected.keys[i] in (victim, neighbour)
                assert_blank(batch, i)
            else:
                assert key == expected.keys[i]
                assert all(torch.equal(tensor, row(expected, i)[name]) for name, tensor in row(batch, i).items()), key
    assert shown.bad() == {victim: {"duplicate_key"}}
    assert shown.counts["duplicate_key"] >= 4  # two slots, two passes


def test_a_key_met_in_two_shards_is_two_samples(tmp_path: Path, clean: Shown) -> None:
    first, second = clean_shards()
    members = second.pop("s1_003")
    folder = write_dataset(tmp_path / "d", [first, {**second, VICTIM: members}])
    shown = show(spec(folder, PLAIN), tmp_path / "quarantine.jsonl")
    assert not shown.counts and not shown.listed
    places = rows_of(shown, VICTIM)
    assert sorted(epoch for epoch, _, _ in places) == [0, 0, 1, 1]
    pictures = {"first": by_pillow(first[VICTIM]["jpg"]), "second": by_pillow(members["jpg"])}
    seen: Counter[tuple[int, str]] = Counter()
    for epoch, batch, i in places:
        crop = crop_of(VICTIM, H, W, (SEED, epoch, VICTIM))
        found = pixels(batch.views["clean"][i])
        seen.update((epoch, name) for name, image in pictures.items() if np.abs(found - image[crop]).max() <= BY_DCT)
        assert batch.weight_B[i] == 1
    assert seen == {(epoch, name): 1 for epoch in (0, 1) for name in pictures}


# --- refused at opening


def _refused(folder: str, words: str, **role: Any) -> None:
    """One line that names the file and says what to do."""
    with pytest.raises(DataError, match=words) as caught:
        Loader(spec(folder, **role), NEEDS, views=("clean",), seed=SEED).close()
    assert "\n" not in str(caught.value)
    assert str(Path(folder).parent) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("two words.jpg", "white space in its name: .* pack again"),
        ("tab\there.jpg", "white space in its name: .* pack again"),
        ("line\nbreak.jpg", "white space in its name: .* pack again"),
        ("caf\udce9.jpg", "not UTF-8: rename it, or pack the dataset again"),
    ],
)
def test_names_that_an_index_cannot_hold_are_refused(tmp_path: Path, name: str, words: str) -> None:
    folder = dataset_of(tmp_path / "d", [*entries_of(clean_shards()[0]), Entry(name, good(2)["jpg"])], samples=13)
    _refused(folder, words)


def test_a_tar_of_other_files_is_refused(tmp_path: Path) -> None:
    _refused(dataset_of(tmp_path / "d", [Entry("README", b"x")], samples=6), "holds no samples, but 'README': delete")


@pytest.mark.parametrize("entries", [[], [Entry("shards", type=tarfile.DIRTYPE)]])
def test_an_empty_tar_is_a_shard_of_no_samples(tmp_path: Path, entries: list[Entry]) -> None:
    folder = dataset_of(tmp_path / "d", entries, samples=6)
    for _ in range(2):  # the second time with the index that the first has written
        shown = show(spec(folder), tmp_path / "quarantine.jsonl")
        assert not shown.counts
        assert {key for batch in shown.batches for key in batch.keys if key} == set(clean_shards()[1])
    assert [len(shard.index) for shard in Dataset.open(folder).shards] == [0, 6]


def test_a_file_of_no_bytes_or_of_something_else_is_refused(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "d", clean_shards())
    tar = tmp_path / "d" / "shards" / "000000.tar"
    for data, words in ((b"", "0 bytes found"), (b"<html>404</html>" * 100, "not a tar file")):
        tar.write_bytes(data)
        _refused(folder, words)


# --- labels beside the photographs


def test_a_damaged_label_is_a_bad_sample_and_a_cut_label_shard_is_refused(tmp_path: Path) -> None:
    shards = shards_of([6, 6], lambda seed: unlabelled(seed, H, W))
    folder = write_dataset(tmp_path / "d", shards, with_depth=False)
    labels = write_labels(tmp_path / "labels", shards)
    needs = {"r": RoleNeeds(sidecar=True)}
    data = spec(folder, labels=(labels,))
    expected = show(data, tmp_path / "clean.jsonl", needs)
    store = LabelStore.open(labels)
    tar = Path(store.tar("000000"))
    entry = next(sample for sample in store.index("000000").samples if sample.key == VICTIM)
    offset, size = entry.members["disparity.png"]
    whole = tar.read_bytes()
    for start, length in ((offset + size // 2, size // 2), (offset, 8), (entry.start, 512)):  # pixels, magic, header
        tar.write_bytes(whole[:start] + bytes(length) + whole[start + length :])
        shown = show(data, tmp_path / f"{start}.jsonl", needs)
        assert_only(shown, expected, {VICTIM: "missing_target" if start == entry.start else "bad_target"})
    tar.write_bytes(whole[:-1024])
    with pytest.raises(DataError, match=r"000000.*`fathom label run` finishes them"):
        show(data, tmp_path / "cut.jsonl", needs)


# --- too many


@pytest.mark.parametrize("bad_batch", ["first", "last"])
def test_past_the_fraction_the_run_ends_and_names_an_example(tmp_path: Path, clean: Shown, bad_batch: str) -> None:
    """One of 12, where a twentieth is allowed: found at the pass's end, in whichever of its batches it was."""
    key = clean.batches[0 if bad_batch == "first" else 1].keys[0]
    shards = [{k: changed(jpg=b"") if k == key else v for k, v in shard.items()} for shard in clean_shards()]
    folder = write_dataset(tmp_path / "d", shards)
    path = tmp_path / "quarantine.jsonl"
    with pytest.raises(DataError, match="1 of 12 samples are bad: 1 bad_image") as caught:
        show(spec(folder, max_bad_fraction=0.05), path)
    message = str(caught.value)
    assert f"for example {key} in {tmp_path / 'd' / 'shards' / f'{int(key[1]):06d}.tar'}" in message
    assert str(path) in message and "max_bad_fraction is 0.05" in message and "\n" not in message
    assert_only(show(spec(folder, max_bad_fraction=0.1), tmp_path / "more.jsonl"), clean, {key: "bad_image"})


def test_every_sample_bad_ends_the_run(tmp_path: Path) -> None:
    shards = [dict.fromkeys(shard, changed(jpg=b"")) for shard in clean_shards()]
    folder = write_dataset(tmp_path / "d", shards)
    with pytest.raises(DataError, match="12 of 12 samples are bad: 12 bad_image"):
        show(spec(folder, max_bad_fraction=0.99), tmp_path / "quarantine.jsonl")
