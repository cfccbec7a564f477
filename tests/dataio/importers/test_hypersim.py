"""Hypersim: HDF5 written with h5py; the conversion against trigonometry. Shape suffixes: H W pixels."""

from __future__ import annotations

import math
from pathlib import Path

import h5py
import numpy as np
import pytest

from dataio.spec import DataError
from tests.dataio.importers.conftest import Importing, write_image

SIZE_WH = (16, 12)
FOCAL_PX = 886.81 * 16 / 1024  # of the dataset's 1024 x 768, at this size
SPLIT_HEAD = "scene_name,camera_name,frame_id,included_in_public_release,exclude_reason,split_partition_name\n"


def distances(z_m: float, size_wh: tuple[int, int] = SIZE_WH, focal_px: float = FOCAL_PX) -> np.ndarray:
    """Distances to the camera's centre, metres, of a wall that faces the camera `z_m` away."""
    width, height = size_wh
    found = np.empty((height, width))
    for row in range(height):
        for column in range(width):
            off_axis_px = math.hypot(column + 0.5 - width / 2, row + 0.5 - height / 2)
            found[row, column] = z_m / math.cos(math.atan(off_axis_px / focal_px))
    return found


def frame(root: Path, scene: str, camera: str, number: int, distance_HW: np.ndarray) -> bytes:
    """One frame with neighbours of other kinds; returns the photograph's bytes."""
    images = root / scene / "images"
    stem = f"frame.{number:04d}"
    geometry = images / f"scene_{camera}_geometry_hdf5"
    geometry.mkdir(parents=True, exist_ok=True)
    with h5py.File(geometry / f"{stem}.depth_meters.hdf5", "w") as file:
        file["dataset"] = distance_HW.astype(np.float16)
    with h5py.File(geometry / f"{stem}.normal_cam.hdf5", "w") as file:
        file["dataset"] = np.zeros((12, 16, 3), np.float16)
    preview = images / f"scene_{camera}_final_preview"
    write_image(preview / f"{stem}.color.jpg", SIZE_WH, seed=99)
    write_image(images / f"scene_{camera}_geometry_preview" / f"{stem}.depth_meters.png", SIZE_WH)
    return write_image(preview / f"{stem}.tonemap.jpg", distance_HW.shape[::-1], seed=number)


def key(scene: str, camera: str, number: int) -> str:
    return f"{scene}/images/scene_{camera}_final_preview/frame_{number:04d}_tonemap"


def matrix_csv(path: Path, **matrices: np.ndarray) -> str:
    """metadata_camera_parameters.csv with the columns that matter and one that does not."""
    names = [f"M_cam_from_uv_{row}{column}" for row in range(3) for column in range(3)]
    lines = [",".join(["scene_name", "settings_output_img_width", *names])]
    lines += [",".join([scene, "16.0", *(repr(float(x)) for x in m.ravel())]) for scene, m in matrices.items()]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def split_csv(path: Path, *rows: str) -> str:
    path.write_text(SPLIT_HEAD + "".join(f"{row}\n" for row in rows))
    return str(path)


def test_distances_become_planar_depth(tmp_path: Path, importing: Importing) -> None:
    distance_HW = distances(3.0)
    distance_HW[2, 5] *= 2  # something behind the wall
    image = frame(tmp_path / "scenes", "ai_001_002", "cam_01", 7, distance_HW)
    packed = importing("hypersim", tmp_path / "scenes")
    name = key("ai_001_002", "cam_01", 7)
    assert list(packed.members) == [name] and packed.members[name]["jpg"] == image
    value_HW = packed.value(name)
    wanted_HW = np.full((12, 16), 3.0)
    wanted_HW[2, 5] = 6.0
    np.testing.assert_allclose(value_HW, wanted_HW, rtol=1e-3)  # what float16 keeps
    assert distance_HW[0, 0] > 3.6  # the corner's distance differs by far more than that
    assert packed.meta(name)["focal_px"] == pytest.approx(FOCAL_PX, rel=1e-4)
    assert packed.info.quantity == "depth_m"


def test_the_datasets_own_size(tmp_path: Path, importing: Importing) -> None:
    frame(tmp_path / "scenes", "ai_001_001", "cam_00", 0, distances(2.0, (1024, 768), 886.81))
    packed = importing("hypersim", tmp_path / "scenes")
    name = key("ai_001_001", "cam_00", 0)
    np.testing.assert_allclose(packed.value(name), np.full((768, 1024), 2.0), rtol=1e-3)
    assert packed.meta(name)["focal_px"] == pytest.approx(886.81, abs=0.01)


def test_nan_and_infinity_are_holes(tmp_path: Path, importing: Importing) -> None:
    distance_HW = distances(3.0)
    distance_HW[0, :3] = np.nan, np.inf, 0.0
    frame(tmp_path / "scenes", "ai_001_001", "cam_00", 0, distance_HW)
    value_HW = importing("hypersim", tmp_path / "scenes").value(key("ai_001_001", "cam_00", 0))
    assert np.isnan(value_HW[0, :3]).all() and np.isfinite(value_HW).sum() == 12 * 16 - 3


def test_each_scene_has_its_own_camera(tmp_path: Path, importing: Importing) -> None:
    shifted = np.array([[0.6, 0.0, 0.07], [0.0, 0.4, -0.09], [0.01, -0.05, -1.1]])
    height, width = 12, 16
    distance_HW = np.empty((height, width))
    for row in range(height):
        for column in range(width):
            uv1 = [-1 + (column + 0.5) * 2 / width, 1 - (row + 0.5) * 2 / height, 1.0]  # v points up
            ray = shifted @ uv1
            point = ray * (2.5 / -ray[2])  # where it meets the wall: the camera looks along -z
            distance_HW[row, column] = np.linalg.norm(point)
    root = tmp_path / "scenes"
    frame(root, "ai_001_001", "cam_00", 0, distances(3.0))
    frame(root, "ai_002_001", "cam_00", 0, distance_HW)
    frame(root, "ai_003_001", "cam_00", 0, distances(3.0))
    tan = math.tan(math.radians(30))
    nominal = np.array([[tan, 0, 0], [0, tan * 0.75, 0], [0, 0, -1.0]])
    table = matrix_csv(tmp_path / "cameras.csv", ai_001_001=nominal, ai_002_001=shifted)
    packed = importing("hypersim", root, camera_parameters=table)
    plain, other = key("ai_001_001", "cam_00", 0), key("ai_002_001", "cam_00", 0)
    np.testing.assert_allclose(packed.value(plain), np.full((12, 16), 3.0), rtol=1e-3)
    np.testing.assert_allclose(packed.value(other), np.full((12, 16), 2.5), rtol=1e-3)
    assert packed.meta(plain)["focal_px"] == pytest.approx(FOCAL_PX, rel=1e-4)
    assert packed.meta(other)["focal_px"] == pytest.approx(8 * 1.1 / 0.6)
    assert set(packed.report.skipped) == {"missing_camera"} and packed.report.packed == 2


def test_the_official_split(tmp_path: Path, importing: Importing) -> None:
    root = tmp_path / "scenes"
    for scene, number in (("ai_001_001", 0), ("ai_001_001", 1), ("ai_001_001", 12), ("ai_002_001", 0)):
        frame(root, scene, "cam_00", number, distances(3.0))
    table = split_csv(
        tmp_path / "split.csv",
        "ai_001_001,cam_00,12,True,,train",
        "ai_001_001,cam_00,1,False,CONTENT FLAGGED FOR REMOVAL,",
        "ai_001_001,cam_00,0,True,,train",
        "ai_001_001,cam_01,0,True,,train",
        "ai_002_001,cam_00,0,True,,val",
        "ai_009_001,cam_00,0,True,,train",
    )
    packed = importing("hypersim", root, split_file=table, split="train")
    assert list(packed.members) == [key("ai_001_001", "cam_00", n) for n in (0, 12)]
    missing = "ai_001_001/images/scene_cam_01_final_preview/frame.0000.tonemap.jpg"
    # what the scene should have is reported, a scene that was not downloaded is not
    assert packed.report.skipped == {"missing_depth": [missing]}
    assert list(importing("hypersim", root, split_file=table, split="val").members) == [key("ai_002_001", "cam_00", 0)]
    assert len(importing("hypersim", root, split_file=table).members) == 3
    assert len(importing("hypersim", root).members) == 4
    with pytest.raises(DataError, match="of test in it"):
        importing("hypersim", root, split_file=table, split="test")


def test_what_is_damaged_is_skipped(tmp_path: Path, importing: Importing) -> None:
    root = tmp_path / "scenes"
    for number in range(5):
        frame(root, "ai_001_001", "cam_00", number, distances(3.0))
    frame(root, "ai_001_001", "cam_00", 5, distances(0.0))
    folder = root / "ai_001_001" / "images" / "scene_cam_00_geometry_hdf5"
    (folder / "frame.0000.depth_meters.hdf5").unlink()
    (folder / "frame.0001.depth_meters.hdf5").write_bytes(b"no HDF5")
    with h5py.File(folder / "frame.0002.depth_meters.hdf5", "w") as file:
        file["dataset"] = np.ones((12, 16, 3))
    with h5py.File(folder / "frame.0003.depth_meters.hdf5", "w") as file:
        file["dataset"] = np.ones((12, 15))
    packed = importing("hypersim", root)
    assert list(packed.members) == [key("ai_001_001", "cam_00", 4)]
    counts = {reason: len(names) for reason, names in packed.report.skipped.items()}
    assert counts == {"missing_depth": 1, "unreadable_depth": 2, "depth_size_differs": 1, "no_valid_depth": 1}


def test_what_is_not_this_layout_is_refused(tmp_path: Path, importing: Importing) -> None:
    (tmp_path / "scenes").mkdir()
    with pytest.raises(DataError, match="name the folder of Hypersim's scenes"):
        importing("hypersim", tmp_path / "scenes")
    frame(tmp_path / "scenes", "ai_001_001", "cam_00", 0, distances(3.0))
    with pytest.raises(DataError, match="split=train needs split_file"):
        importing("hypersim", tmp_path / "scenes", split="train")
    with pytest.raises(DataError, match=r"none\.csv: cannot be read"):
        importing("hypersim", tmp_path / "scenes", split_file=str(tmp_path / "none.csv"))
    cameras = matrix_csv(tmp_path / "cameras.csv", ai_001_001=np.eye(3))
    with pytest.raises(DataError, match="no column 'split_partition_name'"):
        importing("hypersim", tmp_path / "scenes", split_file=cameras)
    (tmp_path / "cameras.csv").write_text(Path(cameras).read_text().rpartition(",")[0] + "\n")
    with pytest.raises(DataError, match="must be numbers"):
        importing("hypersim", tmp_path / "scenes", camera_parameters=cameras)
