"""Packing: what goes in comes out, what is bad is named, what was begun is finished."""

import hashlib
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cluster import storage
from dataio import synth
from dataio.check import check_dataset
from dataio.codec import code_of, decode_png16
from dataio.dataset import Dataset
from dataio.importers.base import parse_options
from dataio.importers.folder import Folder
from dataio.index import ShardIndex, index_path
from dataio.pack import pack
from dataio.pack_synth import pack_synth
from dataio.shards import SHARD_BYTES, PackReport, Progress, ShardWriter
from dataio.spec import DataError

LABELLED = dict(role="labelled")
UNLABELLED = dict(role="unlabelled")


def pack_folder(
    source: str,
    out: str,
    *,
    name: str = "d",
    shard_bytes: int = SHARD_BYTES,
    workers: int = 1,
    progress: Progress | None = None,
    restart: bool = False,
    **options: Any,
) -> PackReport:
    importer = Folder(source, parse_options(Folder, options))
    return pack(importer, out, name=name, shard_bytes=shard_bytes, workers=workers, progress=progress, restart=restart)


def picture(path: Path, size: tuple[int, int] = (40, 30), seed: int = 0, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), np.uint8)
    Image.fromarray(noise).save(path, **options)
    return path


def depth(path: Path, size: tuple[int, int] = (40, 30), value: int = 1500) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((size[1], size[0]), value, np.uint16)).save(path)
    return path


def pair(folder: Path, name: str, **options: int) -> None:
    picture(folder / f"{name}.jpg", **options)
    depth(folder / f"{name}.depth.png")


def contents(dataset: Dataset) -> dict[str, dict[str, bytes | None]]:
    return {
        entry.key: {extension: shard.read(entry, extension) for extension in entry.members}
        for shard in dataset.shards
        for entry in shard.index.samples
    }


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    for i in range(6):
        pair(folder, f"room{i}", seed=i)
    return folder


# --- what goes in


def test_bytes_are_copied_and_pairs_found(tmp_path):
    source = tmp_path / "süß und salzig"
    pair(source, "b/room 1.v2")
    picture(source / "a.JPEG")
    depth(source / "a.depth.png")
    picture(source / "c.png")
    depth(source / "c.depth.png")
    depth(source / "orphan.depth.png")
    Image.new("L", (40, 30), 255).save(source / "c.sky.png")
    picture(source / ".thumbs" / "x.jpg")
    (source / "notes.txt").write_text("no picture")
    report = pack_folder(str(source), str(tmp_path / "out"), **LABELLED)
    assert report == PackReport(3, {})
    found = contents(Dataset.open(str(tmp_path / "out")))
    assert {key: sorted(members) for key, members in found.items()} == {
        "a": ["depth.png", "jpg"],
        "b/room_1_v2": ["depth.png", "jpg"],
        "c": ["depth.png", "png", "sky.png"],
    }
    assert found["b/room_1_v2"]["jpg"] == (source / "b" / "room 1.v2.jpg").read_bytes()
    assert found["c"]["png"] == (source / "c.png").read_bytes()


def test_unlabelled_takes_photographs_only(source, tmp_path):
    picture(source / "z.webp")
    report = pack_folder(str(source), str(tmp_path / "out"), **UNLABELLED)
    assert report.packed == 7
    dataset = Dataset.open(str(tmp_path / "out"))
    assert (dataset.info.role, dataset.info.quantity, dataset.info.code) == ("unlabelled", None, None)
    assert {ext for members in contents(dataset).values() for ext in members} == {"jpg", "webp"}


def test_mixed_scales(tmp_path):
    pair(tmp_path / "source", "room")
    pair(tmp_path / "source", "sub/tum_1")
    spec = dict(role="labelled", overrides=(("*tum_*", 1 / 5000),))
    pack_folder(str(tmp_path / "source"), str(tmp_path / "out"), **spec)
    dataset = Dataset.open(str(tmp_path / "out"))
    found = contents(dataset)
    assert "json" not in found["room"]
    metres = {}
    for key, members in found.items():
        code = code_of(json.loads(members.get("json") or b"{}"), dataset.info.code)
        metres[key] = float(decode_png16(members["depth.png"], code)[0, 0])
    assert metres == pytest.approx({"room": 1.5, "sub/tum_1": 0.3})


def test_depth_in_a_folder_of_its_own(tmp_path):
    picture(tmp_path / "source" / "rgb" / "1.png")
    depth(tmp_path / "source" / "depth" / "1.png")
    spec = dict(role="labelled", depth="../depth/{stem}.png")
    assert pack_folder(str(tmp_path / "source"), str(tmp_path / "out"), **spec).packed == 1


def test_shards_roll_by_bytes(source, tmp_path):
    size = (source / "room0.jpg").stat().st_size + (source / "room0.depth.png").stat().st_size
    spec = dict(role="labelled", shard_bytes=int(2.8 * (size + 2048)))
    pack_folder(str(source), str(tmp_path / "out"), **spec)
    assert [shard.samples for shard in Dataset.open(str(tmp_path / "out")).shards] == [2, 2, 2]


def test_progress_counts_every_source_item(source, tmp_path):
    seen = []
    pack_folder(str(source), str(tmp_path / "out"), **LABELLED, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i, 6) for i in range(1, 7)]


# --- what is bad


def test_bad_samples_are_named_by_reason(source, tmp_path):
    whole = picture(source / "cut.jpg", (200, 200)).read_bytes()
    (source / "cut.jpg").write_bytes(whole[: len(whole) * 9 // 10])
    depth(source / "cut.depth.png", (200, 200))
    (source / "text.jpg").write_text("no picture")
    picture(source / "alone.jpg")
    pair(source, "wide")
    depth(source / "wide.depth.png", (41, 30))
    pair(source, "hollow")
    depth(source / "hollow.depth.png", value=0)
    pair(source, "eight")
    Image.new("L", (40, 30), 9).save(source / "eight.depth.png")
    pair(source, "torn")
    (source / "torn.depth.png").write_bytes((source / "torn.depth.png").read_bytes()[:60])
    pair(source, "turned")
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(source / "turned.jpg", exif=exif)
    pair(source, "masked")
    Image.new("L", (4, 3)).save(source / "masked.sky.png")
    report = pack_folder(str(source), str(tmp_path / "out"), **LABELLED)
    assert report == PackReport(
        6,
        {
            "missing_depth": ["alone.jpg"],
            "unreadable_image": ["cut.jpg", "text.jpg"],
            "depth_not_16_bit": ["eight.jpg"],
            "no_valid_depth": ["hollow.jpg"],
            "unusable_sky": ["masked.jpg"],
            "unreadable_depth": ["torn.jpg"],
            "rotated_by_exif": ["turned.jpg"],
            "depth_size_differs": ["wide.jpg"],
        },
    )
    assert "2 unreadable_image (cut.jpg, text.jpg)" in str(report)
    written = json.loads((tmp_path / "out" / "pack_report.json").read_text())
    assert written == {"packed": report.packed, "skipped": report.skipped}
    assert Dataset.open(str(tmp_path / "out")).info.samples == 6


@pytest.mark.parametrize("ending", ["jpg", "png", "webp"])
@pytest.mark.parametrize("part", [0.3, 0.97])
def test_every_cut_picture_is_found(source, tmp_path, ending, part):
    options = {"lossless": True} if ending == "webp" else {"progressive": True} if ending == "jpg" else {}
    path = picture(source / f"cut.{ending}", (300, 200), **options)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * part)])
    report = pack_folder(str(source), str(tmp_path / "out"), **UNLABELLED)
    assert report.skipped == {"unreadable_image": [f"cut.{ending}"]}


def turned(path: Path, orientation: int, size: tuple[int, int] = (40, 30)) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture(path, size, exif=exif)


def test_what_no_stream_takes_is_left_out_with_its_reason(source, tmp_path, capfd):
    for format in ("GIF", "TIFF"):
        Image.new("RGB", (40, 30)).save(source / f"{format}.jpg", format)
    Image.new("1", (10_500, 10_500)).save(source / "large.png")
    Image.new("1", (9_900, 9_900)).save(source / "near.png")  # more than Pillow warns of
    Image.new("1", (20_001, 2)).save(source / "long.png")
    script = (
        "import sys; from dataio.importers import get_importer; from dataio.importers.base import parse_options\n"
        "from dataio.pack import pack; folder = get_importer('folder')\n"
        "importer = folder(sys.argv[1], parse_options(folder, {'role': 'unlabelled'}))\n"
        "print(pack(importer, sys.argv[2], name='d'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(source), str(tmp_path / "out")],
        cwd=Path(__file__).resolve().parents[2], capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert done.stdout == (
        "packed 7 samples, skipped 2 too_large (large.png, long.png); 2 unreadable_image (GIF.jpg, TIFF.jpg)\n"
    )
    assert "Warning" not in done.stderr


def test_depth_maps_and_masks_are_judged_as_the_stream_does(source, tmp_path):
    for name in ("tiff", "endless", "colours", "torn", "jpeg"):
        pair(source, name)
    Image.fromarray(np.full((30, 40), 9, np.uint16)).save(source / "tiff.depth.png", "TIFF")
    (source / "endless.depth.png").write_bytes((source / "endless.depth.png").read_bytes()[:-12])
    Image.new("RGB", (40, 30)).save(source / "colours.sky.png")
    picture(source / "torn.sky.png")
    noise_HW = np.random.default_rng(0).integers(0, 255, (30, 40), np.uint8)
    Image.fromarray(noise_HW).save(source / "torn.sky.png")
    (source / "torn.sky.png").write_bytes((source / "torn.sky.png").read_bytes()[:700])
    Image.new("L", (40, 30)).save(source / "jpeg.sky.png", "JPEG")
    report = pack_folder(str(source), str(tmp_path / "out"), **LABELLED)
    assert report.packed == 6
    assert report.skipped == {
        "unreadable_depth": ["endless.jpg", "tiff.jpg"],
        "unusable_sky": ["colours.jpg", "jpeg.jpg", "torn.jpg"],
    }


@pytest.mark.parametrize("orientation", range(10))
def test_labelled_pictures_that_exif_turns(source, tmp_path, orientation):
    pair(source, "turned")
    turned(source / "turned.jpg", orientation)
    report = pack_folder(str(source), str(tmp_path / "out"), **LABELLED)
    assert report.skipped == ({"rotated_by_exif": ["turned.jpg"]} if orientation in range(2, 9) else {})


@pytest.mark.parametrize(("orientation", "mask", "fits"), [(3, (40, 30), 1), (6, (30, 40), 1), (6, (40, 30), 0)])
def test_a_mask_has_the_size_of_the_picture_as_displayed(tmp_path, orientation, mask, fits):
    turned(tmp_path / "source" / "a.jpg", orientation)
    picture(tmp_path / "source" / "b.jpg")
    Image.new("L", mask, 255).save(tmp_path / "source" / "a.sky.png")
    report = pack_folder(str(tmp_path / "source"), str(tmp_path / "out"), **UNLABELLED)
    assert report.skipped == ({} if fits else {"unusable_sky": ["a.jpg"]})
    assert not check_dataset(str(tmp_path / "out")).bad


@pytest.mark.parametrize("out", ["source", "source/packed", "source/a/../packed", "link", "link/packed", "."])
def test_output_and_source_must_lie_apart(source, tmp_path, out):
    (tmp_path / "link").symlink_to(source)
    before = tree(tmp_path)
    with pytest.raises(DataError, match="choose a folder apart from it"):
        pack_folder(str(source), str(tmp_path / out), **LABELLED)
    with pytest.raises(DataError, match="choose a folder apart from it"):
        pack_folder(str(source), f"file://{tmp_path / out}", **LABELLED)
    assert tree(tmp_path) == before
    assert pack_folder(str(source), str(tmp_path / "source2"), **LABELLED).packed == 6  # no folder inside, for its name


def test_nothing_usable(tmp_path):
    picture(tmp_path / "source" / "a.jpg")
    with pytest.raises(DataError, match=r"no usable sample.*1 missing_depth \(a\.jpg\)"):
        pack_folder(str(tmp_path / "source"), str(tmp_path / "out"), **LABELLED)
    assert not (tmp_path / "out" / "dataset.json").exists()


@pytest.mark.parametrize("names", [("a.jpg", "a.png"), ("a b.jpg", "a_b.jpg"), ("a.jpg", "a.jpeg")])
def test_two_photographs_with_one_key(tmp_path, names):
    for name in names:
        picture(tmp_path / "source" / name)
    with pytest.raises(DataError, match="would both have the key"):
        pack_folder(str(tmp_path / "source"), str(tmp_path / "out"), **UNLABELLED)
    assert not (tmp_path / "out").exists()


def test_no_source(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no such folder"):
        pack_folder(str(tmp_path / "nowhere"), str(tmp_path / "out"), **LABELLED)
    with pytest.raises(DataError, match="no photographs"):
        pack_folder(str(tmp_path / "empty"), str(tmp_path / "out"), **LABELLED)


@pytest.mark.parametrize(
    "change",
    [
        {"role": "labeled"},
        {"name": ""},
        {"depth": "x.png"},
        {"sky": "/x/{stem}.png"},
        {"depth_scale": 0.0},
        {"depth_scale": float("nan")},
        {"overrides": (("*", -1.0),)},
        {"shard_bytes": 0},
    ],
)
def test_wrong_arguments(source, tmp_path, change):
    spec = {"role": "labelled", **change}
    with pytest.raises(DataError, match=next(iter(change)).removesuffix("s")):
        pack_folder(str(source), str(tmp_path / "out"), **spec)


def test_no_space(source, tmp_path, monkeypatch):
    asked = []

    def full(path: str, needed: int, what: str) -> None:
        asked.append(needed)
        raise storage.StorageError(f"{path}: {what}: no space")

    monkeypatch.setattr(storage, "require_free", full)
    with pytest.raises(storage.StorageError, match="no space"):
        pack_folder(str(source), str(tmp_path / "out"), **LABELLED)
    assert asked[0] > sum(path.stat().st_size for path in source.iterdir())
    assert not (tmp_path / "out" / "shards").exists()


# --- what was begun


SMALL = dict(role="labelled", shard_bytes=10_000)


class Stop(Exception):
    """Stands for whatever ends a process in the middle."""


def stop_at(number: int):
    def progress(done: int, total: int) -> None:
        if done == number:
            raise Stop

    return progress


def test_an_exception_leaves_no_dataset_and_no_half_shard(source, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(Stop):
        pack_folder(str(source), str(out), **SMALL, progress=stop_at(5))
    assert not (out / "dataset.json").exists()
    tars = sorted((out / "shards").iterdir())
    assert [path.suffix for path in tars] == [".idx", ".tar"] * (len(tars) // 2)
    assert len(tars) >= 2
    for path in tars[1::2]:
        ShardIndex.build(str(path))
    with pytest.raises(DataError, match=r"no dataset\.json"):
        Dataset.open(str(out))


@pytest.mark.parametrize("at", [1, 3, 4, 6, 8])
def test_resuming_gives_the_same_dataset_and_keeps_whole_shards(source, tmp_path, at):
    (source / "room2x.jpg").write_text("bad")
    (source / "room4x.jpg").write_text("bad")
    straight = pack_folder(str(source), str(tmp_path / "straight"), **SMALL)
    out = tmp_path / "out"
    with pytest.raises(Stop):
        pack_folder(str(source), str(out), **SMALL, progress=stop_at(at))
    kept = {path: path.stat().st_mtime_ns for path in (out / "packing").glob("0*.json")}
    seen = []
    resumed = pack_folder(str(source), str(out), **SMALL, progress=lambda done, total: seen.append(done))
    assert resumed == straight
    assert tree(out) == tree(tmp_path / "straight")
    assert all(path.stat().st_mtime_ns == then for path, then in kept.items())
    if kept:
        assert seen[0] > 1


def test_packing_a_finished_dataset_again_changes_nothing(source, tmp_path):
    first = pack_folder(str(source), str(tmp_path / "out"), **SMALL)
    before = tree(tmp_path / "out")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "shards").iterdir()}
    assert pack_folder(str(source), str(tmp_path / "out"), **SMALL) == first
    assert tree(tmp_path / "out") == before
    assert all(path.stat().st_mtime_ns == then for path, then in times.items())


def test_a_lost_shard_is_made_again(source, tmp_path):
    pack_folder(str(source), str(tmp_path / "out"), **SMALL)
    before = tree(tmp_path / "out")
    (tmp_path / "out" / "shards" / "000001.tar").unlink()
    pack_folder(str(source), str(tmp_path / "out"), **SMALL)
    assert tree(tmp_path / "out") == before


def test_other_arguments_are_refused_or_start_anew(source, tmp_path):
    out = str(tmp_path / "out")
    pack_folder(str(source), out, **SMALL)
    other = dict(role="labelled", shard_bytes=10_000, depth_scale=0.002)
    with pytest.raises(DataError, match=re.escape("depth_scale was 0.001, now 0.002")):
        pack_folder(str(source), out, **other)
    (tmp_path / "out" / "mine.txt").write_text("kept")
    pack_folder(str(source), out, **UNLABELLED, restart=True)
    dataset = Dataset.open(out)
    assert (dataset.info.role, len(dataset.shards)) == ("unlabelled", 1)
    assert (tmp_path / "out" / "mine.txt").exists()


def test_changed_files_are_refused(source, tmp_path):
    pack_folder(str(source), str(tmp_path / "out"), **SMALL)
    pair(source, "more")
    with pytest.raises(DataError, match="files was"):
        pack_folder(str(source), str(tmp_path / "out"), **SMALL)


@pytest.mark.parametrize("restart", [True, False])
def test_a_dataset_of_another_origin_is_left_alone(source, tmp_path, restart):
    out = tmp_path / "out"
    pack_folder(str(source), str(out), **SMALL)
    (out / "packing" / "plan.json").unlink()
    before = tree(out)
    with pytest.raises(DataError, match="not packed here"):
        pack_folder(str(source), str(out), **SMALL, restart=restart)
    assert tree(out) == before


def test_into_a_url(source, tmp_path):
    pack_folder(str(source), str(tmp_path / "out"), **SMALL)
    pack_folder(str(source), "memory://pack-test", **SMALL)
    assert Dataset.open("memory://pack-test").fingerprint == Dataset.open(str(tmp_path / "out")).fingerprint
    with pytest.raises(DataError, match="behind a URL"):
        pack_folder(str(source), "memory://pack-test", **SMALL, restart=True)


# --- the writer


def test_writer_rolls_by_samples_and_says_so(tmp_path):
    told = []
    with ShardWriter(str(tmp_path), shard_samples=2, first=7, on_shard=lambda *what: told.append(what)) as writer:
        for i in range(3):
            writer.write(f"k{i}", {"jpg": b"x"})
    sizes = [(tmp_path / f"{stem}.tar").stat().st_size for stem in ("000007", "000008")]
    sums = [hashlib.sha256((tmp_path / f"{stem}.tar").read_bytes()).hexdigest() for stem in ("000007", "000008")]
    assert told == [("000007", 2, sizes[0], sums[0]), ("000008", 1, sizes[1], sums[1])]
    index = ShardIndex.open(str(tmp_path / "000008.tar"))
    assert Path(index_path(str(tmp_path / "000008.tar"))).read_text() == index.text


def test_writer_discards_the_open_shard(tmp_path):
    def write() -> None:
        with ShardWriter(str(tmp_path), shard_samples=1) as writer:
            writer.write("a", {"jpg": b"x"})
            writer.write("b", {"jpg": b"x"})
            raise Stop

    with pytest.raises(Stop):
        write()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000000.idx", "000000.tar"]


# --- synthetic scenes


def test_synth(tmp_path):
    report = pack_synth("labelled", str(tmp_path / "a"), seed=3, count=5, size=56, samples_per_shard=2)
    assert report.packed == 5
    dataset = Dataset.open(str(tmp_path / "a"))
    assert [shard.samples for shard in dataset.shards] == [2, 2, 1]
    members = contents(dataset)["labelled_000004"]
    scene = synth.render("labelled", 3, 4, 56)
    depth_HW = decode_png16(members["depth.png"], dataset.info.code)
    assert np.array_equal(np.isnan(depth_HW), scene.sky_HW | (scene.depth_m_HW <= 0))
    assert np.nanmax(np.abs(depth_HW - scene.depth_m_HW)) <= 0.0006
    sky_HW = np.array(Image.open(io.BytesIO(members["sky.png"])))
    assert np.array_equal(sky_HW, scene.sky_HW * np.uint8(255))
    assert json.loads(members["json"])["focal_px"] == pytest.approx(scene.focal_px, abs=1e-3)


def test_synth_resumes_and_does_not_depend_on_where_it_starts(tmp_path):
    with pytest.raises(Stop):
        pack_synth(
            "wide", str(tmp_path / "a"), seed=1, count=5, size=28, samples_per_shard=2, labelled=False,
            progress=stop_at(4),
        )  # fmt: skip
    for out in ("a", "b"):
        pack_synth("wide", str(tmp_path / out), seed=1, count=5, size=28, samples_per_shard=2, labelled=False)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    pack_synth("wide", str(tmp_path / "c"), seed=1, start=3, count=2, size=28, labelled=False)
    whole, part = (contents(Dataset.open(str(tmp_path / out))) for out in "bc")
    assert part == {key: whole[key] for key in ("wide_000003", "wide_000004")}


def test_synth_does_not_depend_on_the_number_of_processes(tmp_path):
    for workers in (1, 2):
        pack_synth("wide", str(tmp_path / str(workers)), seed=1, count=70, size=28, labelled=False, workers=workers)
    assert tree(tmp_path / "1") == tree(tmp_path / "2")


@pytest.mark.parametrize("change", [{"count": 0}, {"size": 0}, {"samples_per_shard": 0}, {"domain": "mars"}])
def test_synth_wrong_arguments(tmp_path, change):
    with pytest.raises(DataError, match=next(iter(change))):
        pack_synth(**{"domain": "wide", "out": str(tmp_path / "a"), "seed": 1, "count": 1, "size": 28, **change})


# --- real data


def test_real_rgbd_and_photographs(shared_real, tmp_path):
    spec = dict(name="rgbd", role="labelled", overrides=(("tum_*", 1 / 5000),))
    assert pack_folder(str(shared_real / "rgbd"), str(tmp_path / "rgbd"), **spec) == PackReport(4, {})
    dataset = Dataset.open(str(tmp_path / "rgbd"))
    for key, members in contents(dataset).items():
        code = code_of(json.loads(members.get("json") or b"{}"), dataset.info.code)
        depth_HW = decode_png16(members["depth.png"], code)
        assert 0.3 < np.nanmedian(depth_HW) < 4, key
        assert np.nanmax(depth_HW) < 12, key
    photos = pack_folder(str(shared_real / "photos"), str(tmp_path / "photos"), **UNLABELLED)
    assert photos == PackReport(12, {})
