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

from dataio.check import CheckReport, check_dataset, difference_hash, group_duplicates, write_quarantine
from dataio.dataset import Dataset
from dataio.frames import read_frames
from dataio.loader import Loader
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


def test_a_hash_tells_pictures_apart() -> None:
    hashes = [difference_hash(Image.fromarray(smooth(seed, 60, 80))) for seed in range(40)]
    distances = [(a ^ b).bit_count() for i, a in enumerate(hashes) for b in hashes[:i]]
    assert min(distances) > 6
    assert difference_hash(Image.new("RGB", (5, 5))) == 0


@pytest.mark.parametrize("distance", [0, 1, 3, 16])
def test_groups_are_those_of_comparing_all_with_all(distance: int) -> None:
    rng = np.random.default_rng(distance)
    hashes = [int(x) for x in rng.integers(0, 2**63, 30)]
    for i in range(60):  # relatives of those before, some bits away
        bits = sum(1 << int(bit) for bit in set(rng.integers(0, 64, rng.integers(1, distance + 3)).tolist()))
        hashes.append(hashes[int(rng.integers(0, 30 + i))] ^ bits)
    hashes += hashes[:3]
    related = [{i} for i in range(len(hashes))]
    for i, a in enumerate(hashes):
        for j, b in enumerate(hashes[:i]):
            if (a ^ b).bit_count() <= distance and related[i] is not related[j]:
                joined = related[i] | related[j]
                for member in joined:
                    related[member] = joined
    wanted = sorted({tuple(sorted(group)) for group in related if len(group) > 1})
    assert sorted(map(tuple, group_duplicates(hashes, distance))) == wanted


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
