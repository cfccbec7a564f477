"""ETH3D: trees written with Pillow, struct and plain text. Shape suffixes: H W pixels."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataio.importers import get_importer
from dataio.spec import DataError
from tests.dataio.importers.conftest import Importing, ramp, write_image

INF = float("inf")
CAMERAS = """# Camera list with one line of data per camera:
#   CAMERA_ID, MODEL, WIDTH, HEIGHT, PARAMS[]
# Number of cameras: 2
0 THIN_PRISM_FISHEYE 6048 4032 3411.42 3410.02 3041.29 2014.07 0.21047 0.21102 -5.36231e-06 0.00051541 -0.158023 0.4
1 THIN_PRISM_FISHEYE 6048 4032 3414.66 3413.90 3040.85 2014.22 0.20521 0.20766 -7.39878e-06 0.00055421 -0.155701 0.4
"""
IMAGES = """# Image list with two lines of data per image:
#   IMAGE_ID, QW, QX, QY, QZ, TX, TY, TZ, CAMERA_ID, NAME
#   POINTS2D[] as (X, Y, POINT3D_ID)
5 0.885 0.159 -0.432 0.0652 -2.42 0.586 3.64 1 dslr_images/DSC_0002.JPG
3268.48 18.41 -1 2921.78 19.79 -1 3076.91 22.63 12
6 0.885 0.159 -0.432 0.0652 -2.42 0.586 3.64 0 dslr_images/DSC_0001.JPG

"""


def add(scene: Path, name: str, depth_HW: np.ndarray | None = None) -> bytes:
    """A photograph and its bare float32, row by row. Returns the photograph's bytes."""
    image = write_image(scene / "images" / "dslr_images" / name, seed=int(name[4:8]))
    depths = scene / "ground_truth_depth" / "dslr_images"
    depths.mkdir(parents=True, exist_ok=True)
    rows = (ramp() if depth_HW is None else depth_HW).tolist()
    (depths / name).write_bytes(b"".join(struct.pack(f"<{len(row)}f", *row) for row in rows))
    return image


def add_calibration(scene: Path) -> Path:
    folder = scene / "dslr_calibration_jpg"
    folder.mkdir(parents=True)
    (folder / "cameras.txt").write_text(CAMERAS)
    (folder / "images.txt").write_text(IMAGES)
    return folder


def test_metres_row_by_row_and_infinite_holes(tmp_path: Path, importing: Importing) -> None:
    depth_HW = ramp(low=2.0, high=30.0)
    depth_HW[1, 2], depth_HW[7, 0] = INF, 0.0
    root = tmp_path / "eth3d"
    image = add(root / "office", "DSC_0219.JPG", depth_HW)
    other = add(root / "courtyard", "DSC_0286.JPG", np.full((8, 12), 7.5))
    assert not (root / "office" / "dslr_calibration_jpg").exists()
    packed = importing("eth3d", root)
    key = "office/images/dslr_images/DSC_0219"
    assert list(packed.members) == ["courtyard/images/dslr_images/DSC_0286", key]
    assert packed.info.quantity == "depth_m"
    assert packed.members[key]["jpg"] == image
    assert packed.members["courtyard/images/dslr_images/DSC_0286"]["jpg"] == other
    assert "focal_px" not in packed.meta(key)
    value_HW = packed.value(key)
    assert [tuple(at) for at in np.argwhere(np.isnan(value_HW))] == [(1, 2), (7, 0)]
    for row, column in ((0, 0), (0, 11), (1, 0), (7, 11), (4, 6)):
        assert value_HW[row, column] == pytest.approx(2 + 28 * (row * 12 + column) / 95, abs=1e-3)
    assert np.all(packed.value("courtyard/images/dslr_images/DSC_0286") == 7.5)


def test_a_scene_alone_with_the_focal_length_of_each_camera(tmp_path: Path, importing: Importing) -> None:
    scene = tmp_path / "relief"
    for name in ("DSC_0001.JPG", "DSC_0002.JPG", "DSC_0003.JPG"):
        add(scene, name)
    add_calibration(scene)
    # undistorted photographs have another camera and size; here they are no photographs of the set
    write_image(scene / "images" / "dslr_images_undistorted" / "DSC_0001.JPG", (13, 9))
    packed = importing("eth3d", scene)
    focals = {key: packed.meta(key).get("focal_px") for key in packed.members}
    assert focals == {
        "images/dslr_images/DSC_0001": 3411.42,
        "images/dslr_images/DSC_0002": 3414.66,
        "images/dslr_images/DSC_0003": None,  # not in images.txt: none is invented
    }


def test_calibration_that_is_damaged_is_named(tmp_path: Path, importing: Importing) -> None:
    scene = tmp_path / "relief"
    add(scene, "DSC_0001.JPG")
    cameras = add_calibration(scene) / "cameras.txt"
    for broken in ("0 PINHOLE 12 8\n", "0 PINHOLE 12 8 wide 1 1\n", CAMERAS.replace("\n1 ", "\n7 ")):
        cameras.write_text(broken)
        with pytest.raises(DataError, match=r"dslr_calibration_jpg: cameras\.txt and images\.txt are not COLMAP's"):
            importing("eth3d", scene)


def test_a_bad_sample_is_left_out_and_named(tmp_path: Path, importing: Importing) -> None:
    scene = tmp_path / "e" / "pipes"
    for number in range(1, 9):
        add(scene, f"DSC_000{number}.JPG")
    depths = scene / "ground_truth_depth" / "dslr_images"
    (depths / "DSC_0002.JPG").unlink()
    (depths / "DSC_0003.JPG").write_bytes((depths / "DSC_0001.JPG").read_bytes()[:-4])
    (scene / "images" / "dslr_images" / "DSC_0004.JPG").write_bytes(b"no photograph")
    exif = Image.Exif()
    exif[0x0112] = 8  # the camera was turned: viewers rotate the photograph, its depth map stays as it is
    turned = scene / "images" / "dslr_images" / "DSC_0005.JPG"
    Image.open(turned).save(turned, exif=exif)
    add(scene, "DSC_0006.JPG", np.full((8, 12), INF))
    add(scene, "DSC_0007.JPG", ramp((12, 9)))
    add(scene, "DSC_0008.JPG", np.zeros((8, 12)))
    packed = importing("eth3d", tmp_path / "e")
    assert list(packed.members) == ["pipes/images/dslr_images/DSC_0001"]
    name = "pipes/images/dslr_images/DSC_000{}.JPG".format
    assert packed.report.skipped == {
        "missing_depth": [name(2)],
        "depth_size_differs": [name(3), name(7)],
        "unreadable_image": [name(4)],
        "rotated_by_exif": [name(5)],
        "no_valid_depth": [name(6), name(8)],
    }


def test_order_is_fixed(tmp_path: Path) -> None:
    for scene in ("b", "a"):
        for name in ("DSC_0002.JPG", "DSC_0001.JPG"):
            add(tmp_path / scene, name)
    keys = [entry.key for entry in get_importer("eth3d")(str(tmp_path)).entries()]
    assert keys == [f"{scene}/images/dslr_images/DSC_000{number}" for scene in "ab" for number in (1, 2)]


def test_what_is_not_this_layout_is_refused(tmp_path: Path, importing: Importing) -> None:
    write_image(tmp_path / "e" / "pipes" / "images" / "dslr_images" / "DSC_0001.JPG")
    for folder in ("e", "e/pipes/images"):
        with pytest.raises(DataError, match=r"unpack X_dslr_jpg\.7z and X_dslr_depth\.7z of each scene"):
            importing("eth3d", tmp_path / folder)
