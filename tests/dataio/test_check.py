"""`fathom data check`: everything is read once, every fault is named, and the stream passes over what was listed."""

from __future__ import annotations

import io
import json
import os
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataio.check import (
    HASH_BITS,
    CheckReport,
    Likeness,
    check_dataset,
    difference_hash,
    group_duplicates,
    write_quarantine,
)
from dataio.dataset import Dataset
from dataio.frames import read_frames
from dataio.importers.base import parse_options
from dataio.importers.folder import Folder
from dataio.loader import Loader
from dataio.pack import pack
from dataio.pack_synth import pack_synth
from dataio.quarantine import BadSample, read_quarantine
from dataio.spec import DataError, DataSpec, RoleNeeds, RoleSpec
from tests.dataio.fakes import jpeg, labelled, metadata, png, shards_of, smooth, unlabelled, write_dataset


def reasons(report: CheckReport) -> dict[str, list[str]]:
    return {reason: [sample.key for sample in samples] for reason, samples in report.bad.items()}


def test_a_sound_dataset(tmp_path: Path) -> None:
    depth_HW = np.full((48, 56), 2000, np.uint16)
    depth_HW[:24], depth_HW[:12] = 500, 0
    known = {"jpg": jpeg(smooth(0, 48, 56)), "depth.png": png(depth_HW), "json": metadata(scale=0.002)}
    folder = write_dataset(tmp_path / "d", [{"a": known}, {"b": labelled(1, 40, 44), "c": labelled(2)}])
    seen: list[tuple[int, int]] = []
    report = check_dataset(folder, progress=lambda done, total: seen.append((done, total)))
    assert (report.samples, report.shards, report.bad, report.duplicates) == (3, 2, {}, [])
    assert report.sizes == {"48x56": 2, "40x44": 1}
    assert report.bytes == sum(
        size for shard in Dataset.open(folder).shards for e in shard.index.samples for _, size in e.members.values()
    )
    assert report.value is not None and report.valid is not None
    assert report.value[0] == pytest.approx(1.0, abs=0.01) and report.value[2] == pytest.approx(65, abs=0.1)
    assert report.valid == pytest.approx((0.75, (0.75 + 2 - 9 / 40 / 44 - 9 / 48 / 56) / 3))
    assert seen[-1] == (3, 3) and report.fingerprint == Dataset.open(folder).fingerprint
    assert report.quarantine() == []
    one = check_dataset(write_dataset(tmp_path / "one", [{"a": known}]))
    assert one.value == pytest.approx((1.0, 4.0, 4.0))


def damaged(tmp_path: Path) -> str:
    """One fault of each kind between good samples."""
    good, image = labelled(0), jpeg(smooth(0, 48, 56))
    grey = np.zeros((48, 56), np.uint8)
    half = io.BytesIO()
    np.save(half, np.full((48, 56), np.nan, np.float16))
    wrong = io.BytesIO()
    np.save(wrong, np.ones((20, 20), np.float16))
    faults = {
        "cut": {**good, "jpg": image[: len(image) // 2]},
        "text": {**good, "jpg": b"no picture"},
        "empty": {**good, "jpg": b""},
        "eight": {**good, "depth.png": png(grey)},
        "hollow": {**good, "depth.png": png(grey.astype(np.uint16))},
        "wide": {**good, "depth.png": png(np.ones((48, 60), np.uint16))},
        "torn": {**good, "depth.png": good["depth.png"][:300]},
        "alone": {"jpg": image},
        "blind": {"depth.png": good["depth.png"]},
        "nan": {"jpg": image, "depth.npy": half.getvalue()},
        "small": {"jpg": image, "depth.npy": wrong.getvalue()},
        "said": {**good, "json": b"[1]"},
        "huge": {**good, "jpg": absurd()},
    }
    return write_dataset(tmp_path / "d", [{"a": labelled(1), **faults, "z": labelled(2)}, {"y": labelled(3)}])


def absurd() -> bytes:
    """A PNG that claims 20000 x 20000 pixels."""
    picture = bytearray(png(np.zeros((4, 4, 3), np.uint8)))
    picture[16:24] = (20000).to_bytes(4, "big") * 2
    picture[29:33] = zlib.crc32(picture[12:29]).to_bytes(4, "big")
    return bytes(picture)


def test_every_fault_is_named(tmp_path: Path) -> None:
    report = check_dataset(damaged(tmp_path))
    assert report.samples == 16
    assert reasons(report) == {
        "bad_image": ["cut", "text", "empty"],
        "bad_target": ["eight", "torn"],
        "no_valid_pixels": ["hollow", "nan"],
        "size_mismatch": ["wide", "small"],
        "missing_target": ["alone"],
        "missing_image": ["blind"],
        "bad_metadata": ["said"],
        "too_large": ["huge"],
    }
    assert json.loads(report.to_json())["bad"]["too_large"] == [
        {"key": "huge", "shard": "shards/000000.tar", "reason": "too_large"}
    ]


def encoded(image_HWC: np.ndarray, format: str, **options: object) -> bytes:
    out = io.BytesIO()
    Image.fromarray(image_HWC).save(out, format, **options)
    return out.getvalue()


def mutations() -> dict[str, dict[str, bytes]]:
    """Small files, whole, cut and zeroed in many places: key -> extension -> bytes."""
    picture_HWC = smooth(3, 40, 60)
    noise_HWC = np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)
    files = {
        "png": encoded(picture_HWC, "PNG"),
        "noise-png": encoded(noise_HWC, "PNG"),
        "grey-png": encoded(picture_HWC[..., 0], "PNG"),
        "deep-png": encoded(picture_HWC[..., 0].astype(np.uint16) * 257, "PNG"),
        "jpg": jpeg(picture_HWC),
        "noise-jpg": jpeg(noise_HWC),
        "progressive-jpg": jpeg(picture_HWC, progressive=True),
        "webp": encoded(picture_HWC, "WEBP"),
        "lossless-webp": encoded(noise_HWC, "WEBP", lossless=True),
    }
    found = {}
    for name, data in files.items():
        extension, size = name.rpartition("-")[2], len(data)
        changed = {"whole": data, "first": bytes(8) + data[8:]}
        changed |= {f"cut{cut}": data[:-cut] for cut in (1, 2, 4, 12, 13, 30, size // 4, size // 2)}
        changed |= {
            f"zero{start}-{stop}": data[:start] + bytes(stop - start) + data[stop:]
            for start, stop in ((size // 2, size), (size * 3 // 4, size), (size // 2, size // 2 + 9), (size - 12, size))
        }
        found |= {f"{name}-{how}": {extension: mutated} for how, mutated in changed.items()}
    return found


def test_usable_is_what_the_stream_uses(tmp_path: Path) -> None:
    """Of check, of the loader, and of pack, which gets the same files."""
    files = mutations()
    folder = write_dataset(tmp_path / "d", [files], with_depth=False)
    shown = weights(folder)
    used = {key for key in shown if shown[key] == {1.0}}
    assert {f"{name}-whole" for name in ("png", "grey-png", "jpg", "webp")} <= used
    assert {"png-cut1", "png-cut12", "jpg-cut30", "webp-cut30"} <= files.keys() - used
    for distance in (None, 2):
        bad = check_dataset(folder, distance=distance).bad
        assert {sample.key for samples in bad.values() for sample in samples} == files.keys() - used, distance
    (tmp_path / "files").mkdir()
    for key, members in files.items():
        for extension, data in members.items():
            (tmp_path / "files" / f"{key}.{extension}").write_bytes(data)
    importer = Folder(str(tmp_path / "files"), parse_options(Folder, {"role": "unlabelled"}))
    report = pack(importer, str(tmp_path / "packed"), name="d")
    assert report.skipped.keys() == {"unreadable_image"}
    assert {name.rpartition(".")[0] for name in report.skipped["unreadable_image"]} == files.keys() - used


def test_a_depth_map_without_its_end_is_bad_as_in_the_stream(tmp_path: Path) -> None:
    whole = labelled(0)
    files = {f"cut{cut}": {**whole, "depth.png": whole["depth.png"][:-cut]} for cut in (8, 12, 30)}
    near = {**whole, "depth.png": whole["depth.png"][:-1]}  # which both take
    folder = write_dataset(tmp_path / "d", [{"whole": whole, "near": near, **files}])
    assert reasons(check_dataset(folder)) == {"bad_target": list(files)}
    with Loader(spec(folder), {"r": RoleNeeds()}, views=("clean",), seed=1) as loader:
        batch = next(loader)
        batches = [batch, next(loader)]
    shown = [(key, weight) for b in batches for key, weight in zip(b.keys, b.weight_B.tolist(), strict=True) if key]
    assert {key for key, weight in shown if weight == 0} == files.keys() and len(shown) == 5


def test_masks_of_unlabelled_photographs_are_looked_at(tmp_path: Path) -> None:
    """Streams with pseudo-labels read them."""
    mask = png(np.zeros((48, 56), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = {"jpg": jpeg(smooth(0, 48, 56))}
    samples = {
        "good": {**upright, "sky.png": mask},
        "none": upright,
        "wide": {**upright, "sky.png": png(np.zeros((56, 48), np.uint8))},
        "colours": {**upright, "sky.png": png(np.zeros((48, 56, 3), np.uint8))},
        "torn": {**upright, "sky.png": mask[: len(mask) // 2]},
        "turned": {"jpg": jpeg(smooth(0, 56, 48), exif=exif), "sky.png": mask},
        "askew": {"jpg": jpeg(smooth(0, 48, 56), exif=exif), "sky.png": mask},
    }
    folder = write_dataset(tmp_path / "d", [samples, {"later": samples["wide"]}], with_depth=False)
    assert reasons(check_dataset(folder)) == {
        "size_mismatch": ["wide", "askew", "later"],
        "bad_target": ["colours", "torn"],
    }


def test_labelled_pictures_that_exif_turns_are_bad(tmp_path: Path) -> None:
    def turned(orientation: int) -> bytes:
        exif = Image.Exif()
        exif[0x0112] = orientation
        return jpeg(smooth(0, 48, 56), exif=exif)

    depth = labelled(0)["depth.png"]
    plain = io.BytesIO()
    np.save(plain, np.ones((48, 56), np.float32))
    samples = {f"r{n}": {"jpg": turned(n), "depth.png": depth} for n in range(9)}
    samples["npy"] = {"jpg": turned(3), "depth.npy": plain.getvalue()}
    report = check_dataset(write_dataset(tmp_path / "d", [samples]))
    assert reasons(report) == {"rotated_by_exif": [*(f"r{n}" for n in range(2, 9)), "npy"]}
    photographs = {key: {"jpg": members["jpg"]} for key, members in samples.items()}
    assert not check_dataset(write_dataset(tmp_path / "e", [photographs], with_depth=False)).bad


def test_a_cut_shard_and_keys_met_twice(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "d", shards_of([4, 3], labelled))
    dataset = Dataset.open(folder)
    tar = dataset.shards[1].tar
    os.truncate(tar, dataset.shards[1].index.samples[1].start + 700)
    assert reasons(check_dataset(folder)) == {"unreadable_member": ["s1_001", "s1_002"]}
    twice = write_dataset(tmp_path / "e", [{"a": labelled(0), "b": labelled(1)}], samples=3)
    with open(tmp_path / "e" / "shards" / "000000.tar", "r+b") as file:
        other = tmp_path / "f" / "shards" / "000000.tar"
        write_dataset(tmp_path / "f", [{"a": labelled(2)}])
        file.seek(Dataset.open(str(tmp_path / "f")).shards[0].index.end)  # its size, to append behind ours
        end = len((tmp_path / "e" / "shards" / "000000.tar").read_bytes().rstrip(b"\0"))
        file.seek(-(-end // 512) * 512)
        file.write(other.read_bytes())
    assert reasons(check_dataset(twice)) == {"duplicate_key": ["a", "a"]}


def test_processes_find_the_same(tmp_path: Path) -> None:
    folder = damaged(tmp_path)
    assert check_dataset(folder, workers=2, distance=2) == check_dataset(folder, distance=2)


def test_a_shard_that_changed_since_it_was_packed(tmp_path: Path) -> None:
    folder = str(tmp_path / "d")
    pack_synth("labelled", folder, seed=1, count=6, size=28, samples_per_shard=3)
    assert check_dataset(folder, checksums=True).changed == []
    with open(tmp_path / "d" / "shards" / "000001.tar", "r+b") as file:
        file.seek(-1, os.SEEK_END)  # in the padding: nothing else would notice
        file.write(b"x")
    report = check_dataset(folder, checksums=True)
    assert report.changed == ["shards/000001.tar"] and report.bad == {}
    assert "1 shards changed since they were packed: shards/000001.tar" in str(report)
    (tmp_path / "d" / "SHA256SUMS").unlink()
    with pytest.raises(DataError, match="no SHA256SUMS"):
        check_dataset(folder, checksums=True)


# --- duplicates


def test_the_same_picture_at_another_size_and_quality_is_a_duplicate(tmp_path: Path) -> None:
    picture = Image.fromarray(smooth(7, 96, 112))
    small, poor = io.BytesIO(), io.BytesIO()
    picture.resize((56, 48)).save(small, "JPEG", quality=90)
    picture.save(poor, "WEBP", quality=30)
    first = {"jpg": jpeg(np.asarray(picture))}
    shards = [
        {"a": unlabelled(1), "b": first},
        {"c": unlabelled(2), "d": {"jpg": small.getvalue()}, "e": {"webp": poor.getvalue()}},
    ]
    folder = write_dataset(tmp_path / "d", shards, with_depth=False)
    report = check_dataset(folder, distance=3)
    assert [[sample.key for sample in group] for group in report.duplicates] == [["b", "d", "e"]]
    assert [sample.key for sample in report.quarantine()] == ["d", "e"]
    assert check_dataset(folder).duplicates == []


def plain_pictures() -> dict[str, np.ndarray]:
    """Pictures that are the same all along a row, or along a column too."""
    rows_HWC = np.broadcast_to(np.linspace(0, 255, 48).astype(np.uint8)[:, None, None], (48, 56, 3))
    stripes_HWC = np.zeros((48, 56, 3), np.uint8)
    stripes_HWC[::2, :, 0], stripes_HWC[1::2, :, 1] = 255, 255
    return {
        "gradient": rows_HWC,
        "gradient upside down": rows_HWC[::-1],
        "white": np.full((48, 56, 3), 255, np.uint8),
        "dark blue": np.broadcast_to(np.array([0, 0, 60], np.uint8), (48, 56, 3)),
        "stripes": stripes_HWC,
    }


def test_plain_pictures_are_no_duplicates_of_each_other(tmp_path: Path) -> None:
    grey_HW = smooth(0, 48, 56)[..., 0].astype(np.uint16)
    deep = {"deep": png(grey_HW * 200), "deeper": png(grey_HW[::-1] * 257)}  # nearly all above 255
    members = {key.replace(" ", "_"): {"png": png(picture_HWC)} for key, picture_HWC in plain_pictures().items()}
    members |= {key: {"png": data} for key, data in deep.items()}
    folder = write_dataset(tmp_path / "d", [members, {"again": members["white"]}], with_depth=False)
    groups = check_dataset(folder, distance=16).duplicates
    assert [[sample.key for sample in group] for group in groups] == [["white", "again"]]


def test_a_hash_tells_pictures_apart() -> None:
    hashes = [difference_hash(Image.fromarray(smooth(seed, 60, 80))) for seed in range(40)]
    distances = [(a ^ b).bit_count() for i, a in enumerate(hashes) for b in hashes[:i]]
    assert min(distances) > 16
    assert difference_hash(Image.new("RGB", (5, 5))) == 0
    across, down = (difference_hash(Image.linear_gradient("L").rotate(angle)) for angle in (90, 0))
    assert across != down and 0 not in (across, down)


def likeness(hash: int, *levels: int) -> Likeness:
    return Likeness(hash, bytes(levels or (0,)))


def test_groups_are_of_what_is_like_their_first_and_no_chains() -> None:
    chain = [likeness(0), likeness(0b11), likeness(0b1111), likeness(0b111111)]
    assert group_duplicates(chain, 2) == [[0, 1], [2, 3]]
    assert group_duplicates(chain[1:], 2) == [[0, 1]]
    shades = [likeness(7, level, level) for level in (0, 4, 5, 9, 100, 0)]
    assert group_duplicates(shades, 0) == [[0, 1, 5], [2, 3]]


@pytest.mark.parametrize("distance", [0, 1, 3, 16])
def test_groups_are_those_of_comparing_all_with_all(distance: int) -> None:
    rng = np.random.default_rng(distance)
    hashes = [int.from_bytes(rng.bytes(HASH_BITS // 8), "big") for _ in range(30)]
    for i in range(60):  # relatives of those before, some bits away
        bits = sum(1 << int(bit) for bit in set(rng.integers(0, HASH_BITS, rng.integers(1, distance + 3)).tolist()))
        hashes.append(hashes[int(rng.integers(0, 30 + i))] ^ bits)
    hashes += hashes[:3]
    wanted: dict[int, list[int]] = {}
    for i, bits in enumerate(hashes):
        first = next((j for j in wanted if (hashes[j] ^ bits).bit_count() <= distance), i)
        wanted.setdefault(first, []).append(i)
    groups = [group for group in wanted.values() if len(group) > 1]
    assert group_duplicates([likeness(bits) for bits in hashes], distance) == groups and groups


@pytest.mark.parametrize("distance", [-1, 17])
def test_absurd_distances(tmp_path: Path, distance: int) -> None:
    with pytest.raises(DataError, match="distance is"):
        check_dataset(write_dataset(tmp_path / "d", shards_of([1], labelled)), distance=distance)


# --- the list that streams honour


def spec(folder: str) -> DataSpec:
    return DataSpec(roles={"r": RoleSpec(datasets=(folder,), batch=4, lanes=2)}, input_size=28, shuffle_window=4,
                    max_bad_fraction=1.0)  # fmt: skip


def weights(folder: str, passes: int = 1) -> dict[str, set[float]]:
    """Of every key, the weights it was shown with in so many passes; checks that each came once a pass."""
    found: dict[str, list[float]] = {}
    needs = {"r": RoleNeeds(target="none")}
    with Loader(spec(folder), needs, views=("clean",), seed=1) as loader:
        for batch in loader:
            for key, weight in zip(batch.keys, batch.weight_B.tolist(), strict=True):
                found.setdefault(key, []).append(weight)
            if batch.cursor["r"] >= passes * loader.samples("r"):
                break
    assert {len(shown) for key, shown in found.items() if key} == {passes}
    return {key: set(shown) for key, shown in found.items() if key}


def test_listed_samples_keep_their_slots_with_weight_0(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "d", shards_of([5, 3], unlabelled), with_depth=False)
    before = Dataset.open(folder)
    assert weights(folder) == {key: {1.0} for key in [*(f"s0_00{i}" for i in range(5)), "s1_000", "s1_001", "s1_002"]}
    report = CheckReport(
        path=folder, fingerprint="", samples=8, shards=2, bytes=0, sizes={},
        bad={"bad_image": [BadSample("s0_003", "shards/000000.tar", "bad_image")]},
        duplicates=[[BadSample(k, "shards/000001.tar", "duplicate") for k in ("s1_000", "s1_002")]],
    )  # fmt: skip
    assert write_quarantine(report) == os.path.join(folder, "quarantine.jsonl")
    assert Dataset.open(folder).fingerprint == before.fingerprint
    shown = weights(folder, passes=2)
    assert {key for key, seen in shown.items() if seen == {0.0}} == {"s0_003", "s1_002"}
    assert {key for key, seen in shown.items() if seen == {1.0}} == shown.keys() - {"s0_003", "s1_002"}


def test_labelling_and_evaluation_pass_over_them_too(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "d", shards_of([3], unlabelled), with_depth=False)
    (tmp_path / "d" / "quarantine.jsonl").write_text(
        '{"key": "s0_001", "shard": "s3://elsewhere/d/shards/000000.tar", "reason": "duplicate"}\n'
    )
    dataset = Dataset.open(folder)
    frames = list(read_frames(dataset, dataset.shards[0], lambda h, w: (28, 28)))
    assert [frame.problem for frame in frames] == [None, "duplicate", None]


def test_checking_again_sees_what_is_listed(tmp_path: Path) -> None:
    folder = damaged(tmp_path)
    first = check_dataset(folder)
    write_quarantine(first)
    assert check_dataset(folder) == first


@pytest.mark.parametrize("line", ["{", "[1]", '{"key": "a"}', '{"key": "a", "shard": "0.tar", "reason": "ugly"}'])
def test_a_damaged_list_is_named(tmp_path: Path, line: str) -> None:
    folder = write_dataset(tmp_path / "d", shards_of([2], unlabelled), with_depth=False)
    good = '{"key": "s0_000", "shard": "shards/000000.tar", "reason": "bad_image"}'
    (tmp_path / "d" / "quarantine.jsonl").write_text(f"{good}\n{line}\n")
    with pytest.raises(DataError, match=r"quarantine\.jsonl: line 2"):
        Dataset.open(folder)
    (tmp_path / "d" / "quarantine.jsonl").write_text(good)
    assert read_quarantine(folder) == {"000000": {"s0_000": "bad_image"}}
