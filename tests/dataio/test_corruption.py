"""Damaged and odd samples through the whole loader: what can be used is shown right, what cannot keeps its slot.

Every case lies among good samples, and everything of those is compared bit for bit with a run without the fault.
Colours are perturbed, so that a random draw that moved would show; CutMix is off, as it takes no partner that is bad.

Shape suffixes: H W pixels, C channel.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dataio.dali_batch import MEAN, STD, DaliBatch, Row
from dataio.dataset import Dataset
from dataio.draws import Geometry
from dataio.index import index_path
from dataio.labels import LabelStore
from dataio.loader import Loader
from dataio.quarantine import Quarantine
from dataio.spec import DataError, DataSpec, Perturbation, RoleNeeds, RoleSpec
from dataio.types import Batch

from .cases import (
    BY_DCT,
    EXACT,
    FAULTS,
    ODDITIES,
    TURNED,
    VICTIM,
    Entry,
    H,
    W,
    by_pillow,
    changed,
    clean_shards,
    dataset_of,
    depth,
    entries_of,
    everything,
    good,
    huge_png,
    with_victim,
)
from .fakes import jpeg, metadata, png, shards_of, smooth, unlabelled, write_dataset, write_labels

pytestmark = pytest.mark.timeout(120)  # a hang is a failure

S = 28  # the short side of the cases: their pixels are cropped and not resampled
SEED = 5
STRONG = Perturbation(jitter_p=1.0, grayscale_p=0.2, blur_p=0.5)
PLAIN = Perturbation(flip_p=0.0)
NEEDS = {"r": RoleNeeds()}
BATCHES = 4  # of 6: two passes over 12 samples


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


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Shown:
    root = tmp_path_factory.mktemp("clean")
    shown = show(spec(write_dataset(root / "d", clean_shards())), root / "quarantine.jsonl")
    assert not shown.listed and not shown.counts
    assert Counter(key for batch in shown.batches for key in batch.keys) == dict.fromkeys(everything(), 2)
    return shown


# --- one sample that cannot be used


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
