"""ScanNet: streams written with struct and zlib, exported frames with Pillow. Shape suffixes: H W pixels."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest

from dataio.spec import DataError
from tests.dataio.importers.conftest import Importing, write_image, write_png16

COLOR_WH, DEPTH_WH = (27, 20), (12, 9)  # 1.35 and 1.33, as 1296x968 and 640x480
MM_HW = np.arange(108).reshape(9, 12) * 70  # a hole first
MATRIX = "1169.621094 0.000000 646.295044 0.000000\n0.000000 1167.105103 489.927032 0.000000\n"


def enlarged(code_HW: np.ndarray) -> np.ndarray:
    """Under the centre of each of the photograph's pixels, with whole numbers alone."""
    (width, height), (w, h) = COLOR_WH, DEPTH_WH
    return np.array([[code_HW[(2 * y + 1) * h // (2 * height), (2 * x + 1) * w // (2 * width)]
                      for x in range(width)] for y in range(height)])  # fmt: skip


def exported(scene: Path, number: int, size_wh: tuple[int, int] = COLOR_WH) -> bytes:
    write_png16(scene / "depth" / f"{number}.png", MM_HW + number)
    (scene / "pose").mkdir(exist_ok=True)
    (scene / "pose" / f"{number}.txt").write_text("-inf")
    return write_image(scene / "color" / f"{number}.jpg", size_wh, seed=number)


def head(frames: int, *, version: int = 4, shift: float = 1000.0, codecs: tuple[int, int] = (2, 1)) -> bytes:
    """A stream up to its first frame; the photographs' focal length is 1169.5, the depth maps' 577.5."""
    name = b"StructureSensor"
    matrices = [0.0] * 64
    matrices[0], matrices[5], matrices[32], matrices[37] = 1169.5, 1167.25, 577.5, 578.5
    return (
        struct.pack("<I", version) + struct.pack("<Q", len(name)) + name + struct.pack("<64f", *matrices)
        + struct.pack("<i", codecs[0]) + struct.pack("<i", codecs[1])
        + struct.pack("<IIII", *COLOR_WH, *DEPTH_WH) + struct.pack("<f", shift) + struct.pack("<Q", frames)
    )  # fmt: skip


def frame(photo: bytes, depth: bytes) -> bytes:
    pose = struct.pack("<16f", *[float("-inf")] * 16)
    return pose + struct.pack("<QQ", 111, 222) + struct.pack("<QQ", len(photo), len(depth)) + photo + depth


def packed_depth(code_HW: np.ndarray) -> bytes:
    return zlib.compress(b"".join(struct.pack("<H", code) for code in code_HW.ravel()))


def stream(path: Path, count: int = 3, shift: float = 1000.0) -> list[bytes]:
    """A stream of `count` frames, each 1 code deeper than the one before; returns the photographs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    photos = [write_image(path.parent.parent / "photos" / f"{n}.jpg", COLOR_WH, seed=n) for n in range(count)]
    frames = [frame(photo, packed_depth(MM_HW + n)) for n, photo in enumerate(photos)]
    path.write_bytes(head(count, shift=shift) + b"".join(frames) + struct.pack("<Q", 0))
    return photos


def test_exported_frames(tmp_path: Path, importing: Importing) -> None:
    scene = tmp_path / "scans" / "scene0000_00"
    photo = exported(scene, 0)
    exported(scene, 10)
    exported(scene.with_name("scene0000_01"), 0)
    (scene / "intrinsic").mkdir()
    (scene / "intrinsic" / "intrinsic_color.txt").write_text(MATRIX)
    (scene / "intrinsic" / "intrinsic_depth.txt").write_text(MATRIX.replace("1169", "577"))
    packed = importing("scannet", tmp_path / "scans")
    keys = ["scene0000_00/color/0", "scene0000_00/color/10", "scene0000_01/color/0"]
    assert sorted(packed.members) == keys and packed.members[keys[0]]["jpg"] == photo
    value_HW = packed.value(keys[0])
    assert value_HW.shape == (20, 27) and np.isnan(value_HW).sum() == np.count_nonzero(enlarged(MM_HW) == 0) > 0
    for key, more in (keys[0], 0), (keys[1], 10):
        np.testing.assert_allclose(np.nan_to_num(packed.value(key)), enlarged(MM_HW + more) / 1000, rtol=1e-6)
    assert packed.meta(keys[0]) == {"focal_px": 1169.621094} and packed.meta(keys[2]) == {}


def test_depth_of_the_photographs_size_is_copied(tmp_path: Path, importing: Importing) -> None:
    scene = tmp_path / "scene0000_00"
    exported(scene, 100, DEPTH_WH)
    (scene / "intrinsics_color.txt").write_text(MATRIX)  # as in scannet_frames_25k
    packed = importing("scannet", scene)
    assert packed.members["color/100"]["depth.png"] == (scene / "depth" / "100.png").read_bytes()
    assert packed.meta("color/100") == {"focal_px": 1169.621094}


def test_every_counts_frames_in_their_order(tmp_path: Path, importing: Importing) -> None:
    for number in (0, 2, 10, 11):
        exported(tmp_path / "s" / "a", number)
    stream(tmp_path / "s" / "b" / "b.sens", 5)
    keys = sorted(importing("scannet", tmp_path / "s", every="2").members)
    assert keys == ["a/color/0", "a/color/10", "b/b/000000", "b/b/000002", "b/b/000004"]


def test_streams(tmp_path: Path, importing: Importing) -> None:
    photos = stream(tmp_path / "s" / "scene0000_00" / "scene0000_00.sens")
    packed = importing("scannet", tmp_path / "s" / "scene0000_00")
    assert sorted(packed.members) == [f"scene0000_00/{n:06d}" for n in range(3)]
    for n, photo in enumerate(photos):
        key = f"scene0000_00/{n:06d}"
        assert packed.members[key]["jpg"] == photo
        np.testing.assert_allclose(np.nan_to_num(packed.value(key)), enlarged(MM_HW + n) / 1000, rtol=1e-6)
        assert packed.meta(key) == {"focal_px": 1169.5}
    assert np.isnan(packed.value("scene0000_00/000000")[0, 0])


def test_the_stream_says_its_scale(tmp_path: Path, importing: Importing) -> None:
    stream(tmp_path / "s" / "a" / "a.sens", 1, shift=4000.0)
    value_HW = importing("scannet", tmp_path / "s" / "a").value("a/000000")
    assert value_HW[-1, -1] == pytest.approx(MM_HW[-1, -1] / 4000)


def test_an_exported_scene_is_not_read_twice(tmp_path: Path, importing: Importing) -> None:
    exported(tmp_path / "s" / "a", 7)
    stream(tmp_path / "s" / "a" / "a.sens")
    assert list(importing("scannet", tmp_path / "s").members) == ["a/color/7"]


def test_what_is_missing_or_damaged_is_left_out(tmp_path: Path, importing: Importing) -> None:
    scene = tmp_path / "s"
    for number in range(5):
        exported(scene, number)
    (scene / "depth" / "0.png").unlink()
    (scene / "depth" / "1.png").write_bytes(b"no")
    write_png16(scene / "depth" / "2.png", np.ones((9, 9)))
    (scene / "color" / "3.jpg").write_bytes(b"no")
    packed = importing("scannet", scene)
    assert packed.report.skipped == {
        "missing_depth": ["color/0.jpg"],
        "unreadable_depth": ["color/1.jpg"],
        "depth_size_differs": ["color/2.jpg"],
        "unreadable_image": ["color/3.jpg"],
    }
    assert list(packed.members) == ["color/4"]


def test_damaged_frames_of_a_stream_are_left_out(tmp_path: Path, importing: Importing) -> None:
    photo = write_image(tmp_path / "photo.jpg", COLOR_WH)
    good = packed_depth(MM_HW)
    frames = [(photo, good), (photo, good[:9]), (photo, packed_depth(MM_HW[1:])), (photo[:200], good), (photo, good)]
    folder = tmp_path / "s"
    folder.mkdir()
    (folder / "a.sens").write_bytes(head(5) + b"".join(frame(*pair) for pair in frames))
    packed = importing("scannet", folder)
    assert packed.report.skipped == {
        "unreadable_depth": ["a.sens a/000001", "a.sens a/000002"],
        "unreadable_image": ["a.sens a/000003"],
    }
    assert sorted(packed.members) == ["a/000000", "a/000004"]


def test_broken_streams_are_named_and_the_others_stay(tmp_path: Path, importing: Importing) -> None:
    folder = tmp_path / "s" / "all"
    stream(folder / "whole.sens")
    data = (folder / "whole.sens").read_bytes()
    photo = write_image(tmp_path / "photo.jpg", COLOR_WH)
    one = frame(photo, packed_depth(MM_HW))
    broken = {
        "cut": data[:-20],  # in the last frame
        "empty": b"",
        "version": head(1, version=3) + one,
        "shift": head(1, shift=0.0) + one,
        "raw": head(1, codecs=(0, 1)) + one,
        "occi": head(1, codecs=(2, 2)) + one,
    }
    for name, content in broken.items():
        (folder / f"{name}.sens").write_bytes(content)
    packed = importing("scannet", folder)
    assert packed.report.skipped == {
        "unreadable_stream": [f"{name}.sens {name}/rest" for name in ("cut", "empty", "shift", "version")],
        "unknown_compression": ["occi.sens occi/000000", "raw.sens raw/000000"],
    }
    assert sorted(packed.members) == ["cut/000000", "cut/000001", *(f"whole/{n:06d}" for n in range(3))]


def test_what_is_not_this_layout_is_refused(tmp_path: Path, importing: Importing) -> None:
    write_image(tmp_path / "s" / "rgb" / "0.jpg")
    with pytest.raises(DataError, match=r"no \.sens and no color/N\.jpg"):
        importing("scannet", tmp_path / "s")
