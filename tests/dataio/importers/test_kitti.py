"""KITTI: trees written with Pillow and plain text. Shape suffixes: H W pixels, C channel."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataio.spec import DataError
from tests.dataio.importers.conftest import Importing, write_image, write_png16

DAY = "2011_09_26"
DRIVE = f"{DAY}_drive_0001_sync"
OTHER = f"{DAY}_drive_0002_sync"
CALIBRATION = """calib_time: 09-Jan-2012 13:57:47
K_02: 9.597910e+02 0.000000e+00 6.960217e+02 0.000000e+00 9.569251e+02 2.241806e+02 0.0 0.0 1.0
P_rect_02: 7.215377e+02 0.000000e+00 6.095593e+02 4.485728e+01 0.000000e+00 7.215377e+02 1.728540e+02 2.163791e-01
P_rect_03: 7.225377e+02 0.000000e+00 6.095593e+02 -3.395242e+02 0.000000e+00 7.215377e+02 1.728540e+02 2.199936e+00
"""


def image_path(root: Path, frame: int, camera: int = 2, drive: str = DRIVE, ending: str = "png") -> Path:
    return root / DAY / drive / f"image_0{camera}" / "data" / f"{frame:010d}.{ending}"


def depth_path(root: Path, frame: int, camera: int = 2, drive: str = DRIVE) -> Path:
    return root / drive / "proj_depth" / "groundtruth" / f"image_0{camera}" / f"{frame:010d}.png"


def codes(number: int) -> np.ndarray:
    """Sparse, as lidar is: every third pixel."""
    code_HW = np.arange(96).reshape(8, 12) * 200 + number
    return np.where(np.arange(96).reshape(8, 12) % 3 == 0, code_HW, 0)


def recording(root: Path, depth: str = "train", ending: str = "png") -> dict[str, bytes]:
    """Frames 5 to 7 of two cameras, with depth in the folder `depth`; returns the images' bytes by key."""
    images = {}
    for camera in (2, 3):
        for frame in (5, 6, 7):
            path = image_path(root, frame, camera, ending=ending)
            images[f"{DRIVE}/image_0{camera}/{frame:010d}"] = write_image(path, seed=10 * camera + frame)
            write_png16(depth_path(root / depth, frame, camera), codes(100 * camera + frame))
    (root / DAY / "calib_cam_to_cam.txt").write_text(CALIBRATION)
    return images


@pytest.mark.parametrize("depth", ["train", "val", ".", DAY, "data_depth_annotated/train"])
def test_images_and_depth_maps_are_paired(tmp_path: Path, importing: Importing, depth: str) -> None:
    images = recording(tmp_path / "k", depth)
    packed = importing("kitti", tmp_path / "k")
    assert list(packed.members) == sorted(images)
    for key, image in images.items():
        camera, frame = int(key[-12]), int(key[-10:])
        assert packed.members[key]["png"] == image
        assert packed.members[key]["depth.png"] == depth_path(tmp_path / "k" / depth, frame, camera).read_bytes()
        code_HW = codes(100 * camera + frame)
        np.testing.assert_array_equal(packed.value(key), np.where(code_HW > 0, code_HW / 256, np.nan))
        assert packed.meta(key) == {"focal_px": {2: 721.5377, 3: 722.5377}[camera]}


def test_velodyne_maps_and_grey_cameras_are_not_taken(tmp_path: Path, importing: Importing) -> None:
    images = recording(tmp_path / "k")
    write_image(tmp_path / "k" / DAY / DRIVE / "image_00" / "data" / "0000000005.png")
    write_png16(tmp_path / "k/train" / DRIVE / "proj_depth/velodyne_raw/image_02/0000000008.png", codes(1))
    packed = importing("kitti", tmp_path / "k")
    assert sorted(packed.members) == sorted(images) and packed.report.skipped == {}
    truth = tmp_path / "k/train" / DRIVE / "proj_depth/groundtruth/image_03"
    truth.rename(truth.parent.parent / "velodyne_raw/image_03")
    assert sorted(importing("kitti", tmp_path / "k").members) == sorted(images)[:3]
    (tmp_path / "k" / DAY / "calib_cam_to_cam.txt").unlink()
    assert importing("kitti", tmp_path / "k").meta(f"{DRIVE}/image_02/0000000005") == {}


@pytest.mark.parametrize("camera", ["2", "3"])
def test_one_camera(tmp_path: Path, importing: Importing, camera: str) -> None:
    images = recording(tmp_path / "k")
    packed = importing("kitti", tmp_path / "k", camera=camera)
    assert sorted(packed.members) == [key for key in sorted(images) if f"image_0{camera}" in key]


def test_the_forms_of_the_eigen_split(tmp_path: Path, importing: Importing) -> None:
    recording(tmp_path / "k")
    image = f"{DRIVE}/image_02/data/0000000006.png {DRIVE}/proj_depth/groundtruth/image_02/0000000006.png"
    right = f"{DRIVE}/image_03/data/0000000005"
    forms = {
        "bts": f"{DAY}/{image} 721.5377\n{DAY}/{right}.png None 721.5377\n",
        "zoe": f"/{image} 721.5377\n{right}.png {DRIVE}/proj_depth/groundtruth/image_03/0000000005.png 721.5\n",
        "anything": f"/some/raw_data/{DAY}/{image}\n/some/raw_data/{DAY}/{right}.png /some/depth/val/x.png\n\n",
        "monodepth2": f"{DAY}/{DRIVE} 6 l\n{DAY}/{DRIVE} 0000000005 r\n{DAY}/{DRIVE} 6 l\n",
        "monodepth": f"{DAY}/{image}\n{DAY}/{right}.jpg {DAY}/{DRIVE}/image_02/data/0000000005.jpg\n",
    }
    keys = [f"{DRIVE}/image_02/0000000006", f"{DRIVE}/image_03/0000000005"]
    for name, text in forms.items():
        (tmp_path / f"{name}.txt").write_text(text)
        packed = importing("kitti", tmp_path / "k", split_file=str(tmp_path / f"{name}.txt"))
        assert list(packed.members) == keys, name
        assert packed.report.skipped == {}
        assert packed.value(keys[1])[0, 3] == (600 + 305) / 256
    (tmp_path / "k" / "split.txt").write_text(forms["bts"])
    packed = importing("kitti", tmp_path / "k", split_file="split.txt", camera="2")  # found in the root
    assert list(packed.members) == keys[:1]


def test_jpegs_made_of_the_recordings(tmp_path: Path, importing: Importing) -> None:
    images = recording(tmp_path / "k", ending="jpg")
    (tmp_path / "l.txt").write_text(f"{DAY}/{DRIVE}/image_02/data/0000000005.png None 721.5377\n")
    packed = importing("kitti", tmp_path / "k", split_file=str(tmp_path / "l.txt"))
    key = f"{DRIVE}/image_02/0000000005"
    assert list(packed.members) == [key] and packed.members[key]["jpg"] == images[key]
    with pytest.raises(DataError, match="crop kb needs PNG"):
        importing("kitti", tmp_path / "k", crop="kb")


def test_crop(tmp_path: Path, importing: Importing) -> None:
    recording(tmp_path / "k")
    (tmp_path / "l.txt").write_text(f"{DAY}/{DRIVE} 5 l\n{DAY}/{DRIVE} 6 l\n{DAY}/{DRIVE} 7 l\n")
    image = write_image(image_path(tmp_path / "k", 5), (1227, 361))
    code_HW = np.random.default_rng(0).integers(0, 65536, (361, 1227))
    write_png16(depth_path(tmp_path / "k/train", 5), code_HW)
    write_image(image_path(tmp_path / "k", 7), (1240, 361))
    write_png16(depth_path(tmp_path / "k/train", 7), code_HW)
    packed = importing("kitti", tmp_path / "k", split_file=str(tmp_path / "l.txt"), crop="kb")
    assert {reason: len(names) for reason, names in packed.report.skipped.items()} == {
        "smaller_than_crop": 1,
        "depth_size_differs": 1,
    }
    key = f"{DRIVE}/image_02/0000000005"
    cropped_HWC = np.asarray(Image.open(io.BytesIO(packed.members[key]["png"])))
    np.testing.assert_array_equal(cropped_HWC, np.asarray(Image.open(io.BytesIO(image)))[9:361, 5:1221])
    part_HW = code_HW[9:361, 5:1221]
    np.testing.assert_array_equal(packed.value(key), np.where(part_HW > 0, part_HW / 256, np.nan))
    assert packed.meta(key) == {"focal_px": 721.5377}


def test_what_is_missing_or_damaged_is_counted(tmp_path: Path, importing: Importing) -> None:
    root = tmp_path / "k"
    recording(root)
    depth_path(root / "train", 5).unlink()
    depth_path(root / "train", 6).write_bytes(b"no")
    Image.new("L", (12, 8), 9).save(depth_path(root / "train", 6, 3))
    frames = (f"{DAY}/{DRIVE} {frame} {side}" for frame in (5, 6, 7) for side in "lr")
    (tmp_path / "l.txt").write_text("\n".join([*frames, f"{DAY}/{DRIVE} 8 l", f"{DAY}/{OTHER} 9 l"]))
    packed = importing("kitti", root, split_file=str(tmp_path / "l.txt"))
    assert sorted(packed.members) == [f"{DRIVE}/image_0{c}/000000000{f}" for c, f in ((2, 7), (3, 5), (3, 7))]
    assert {reason: len(names) for reason, names in packed.report.skipped.items()} == {
        "missing_depth": 1,
        "unreadable_depth": 1,
        "depth_not_16_bit": 1,
        "missing_image": 2,
    }


def test_what_is_not_this_layout_is_refused(tmp_path: Path, importing: Importing) -> None:
    root = tmp_path / "k"
    write_image(root / "a.png")
    with pytest.raises(DataError, match="raw recordings"):
        importing("kitti", root)
    write_image(image_path(root, 5))
    with pytest.raises(DataError, match=r"unpack data_depth_annotated\.zip"):
        importing("kitti", root)
    write_png16(depth_path(root, 5), codes(1))
    with pytest.raises(DataError, match=r"split_file none\.txt: no text file"):
        importing("kitti", root, split_file="none.txt")
    (root / "l.txt").write_text(f"{DAY}/{DRIVE}\n")
    with pytest.raises(DataError, match="names no frame: lines are"):
        importing("kitti", root, split_file="l.txt")
