"""DDAD: scenes in the DGP format, written with json, NumPy and SciPy's rotations. Shape suffixes: H W pixels."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from dataio.spec import DataError
from tests.dataio.importers.conftest import Importing, write_image

FX, FY, CX, CY = 20.0, 16.0, 6.5, 3.5
LIDAR = (Rotation.from_euler("xyz", (2, -3, 147), degrees=True), np.array([400.0, -260.0, 12.5]))
# looks along the vehicle's x axis, with x to its right and y down, and turned a little
CAMERA = (
    LIDAR[0] * Rotation.from_matrix([[0, 0, 1], [-1, 0, 0], [0, -1, 0]]) * Rotation.from_euler("y", 20, degrees=True),
    np.array([398.5, -259.0, 13.8]),
)
SEEN = [(0, 0, 7.5), (3, 2, 30.0), (11, 7, 200.0), (5, 4, 12.25)]  # column, row, metres


def cloud(seen: Sequence[tuple[float, float, float]], fx: float = FX) -> np.ndarray:
    """Points [N, 4] in the lidar's frame that the camera sees at (column, row, z), at the middle of these pixels."""
    u, v, z = np.array(seen, float).T
    xyz = np.stack([(u + 0.5 - CX) * z / fx, (v + 0.5 - CY) * z / FY, z], axis=1)
    points = LIDAR[0].inv().apply(CAMERA[0].apply(xyz) + CAMERA[1] - LIDAR[1])
    return np.concatenate([points, np.full((len(points), 1), 0.3)], axis=1)


def as_pose(pose: tuple[Rotation, np.ndarray]) -> dict[str, Any]:
    qx, qy, qz, qw = pose[0].as_quat()
    rotation = {"qw": qw, "qx": qx, "qy": qy, "qz": qz}
    return {"rotation": rotation, "translation": dict(zip("xyz", pose[1].tolist(), strict=True))}


def calibration(folder: Path) -> None:
    (folder / "calibration").mkdir(parents=True)
    intrinsics = [dict.fromkeys(("fx", "fy", "cx", "cy", "skew"), 0.0)]
    intrinsics += [{"fx": fx, "fy": FY, "cx": CX, "cy": CY, "skew": 0.0} for fx in (FX, 2 * FX)]
    content = {"names": ["LIDAR", "CAMERA_01", "CAMERA_09"], "intrinsics": intrinsics, "extrinsics": []}
    (folder / "calibration" / "c0e1.json").write_text(json.dumps(content))


def scene(root: Path, name: str, clouds: Sequence[Any]) -> dict[str, bytes]:
    """A scene with a sample per point cloud and two cameras; returns the photographs' bytes by key."""
    folder, images, data, samples = root / name, {}, [], []
    calibration(folder)
    (folder / "point_cloud" / "LIDAR").mkdir(parents=True)
    for number, points in enumerate(clouds):
        file = f"point_cloud/LIDAR/{number}.npz"
        np.savez_compressed(folder / file, data=points)
        datums: dict[str, dict[str, Any]] = {"LIDAR": {"point_cloud": {"filename": file, "pose": as_pose(LIDAR)}}}
        for camera in ("CAMERA_09", "CAMERA_01"):
            file = f"rgb/{camera}/{number}.png"
            images[f"{name}/{file[:-4]}"] = write_image(folder / file, seed=len(images))
            image = {"filename": file, "height": 8, "width": 12, "channels": 3, "pose": as_pose(CAMERA)}
            datums[camera] = {"image": image}
        keys = [f"{camera}{number}" for camera in datums]
        data += [{"id": {"name": n}, "key": k, "datum": d} for k, (n, d) in zip(keys, datums.items(), strict=True)]
        samples.append({"datum_keys": keys, "calibration_key": "c0e1"})
    (folder / "scene_a8dc.json").write_text(json.dumps({"data": data, "samples": samples}))
    return images


def dataset(root: Path, train: Sequence[str], val: Sequence[str] = (), name: str = "ddad.json") -> None:
    splits = {"0": train, "1": val}
    files = {key: {"filenames": [f"{s}/scene_a8dc.json" for s in names]} for key, names in splits.items() if names}
    (root / name).write_text(json.dumps({"metadata": {"name": "DDAD"}, "scene_splits": files}))


def wanted(seen: Sequence[tuple[int, int, float]]) -> np.ndarray:
    value_HW = np.full((8, 12), np.nan)
    for column, row, z in seen:
        value_HW[row, column] = z
    return value_HW


def test_points_fall_on_their_pixels(tmp_path: Path, importing: Importing) -> None:
    images = scene(tmp_path / "d", "000000", [cloud(SEEN), cloud(SEEN[:2])])
    dataset(tmp_path / "d", ["000000"])
    packed = importing("ddad", tmp_path / "d")
    keys = ["000000/rgb/CAMERA_01/0", "000000/rgb/CAMERA_01/1"]
    assert list(packed.members) == keys
    for key, seen in zip(keys, (SEEN, SEEN[:2]), strict=True):
        assert packed.members[key]["png"] == images[key]
        np.testing.assert_allclose(packed.value(key), wanted(seen), rtol=2**-11)
        assert packed.meta(key)["focal_px"] == FX


def test_the_nearest_point_of_a_pixel_counts(tmp_path: Path, importing: Importing) -> None:
    scene(tmp_path / "d", "s", [cloud([(3, 2, 30), (3.4, 2.4, 9), (2.6, 1.6, 50), (4, 2, 20)])])
    dataset(tmp_path / "d", ["s"])
    value_HW = importing("ddad", tmp_path / "d").value("s/rgb/CAMERA_01/0")
    np.testing.assert_allclose(value_HW, wanted([(3, 2, 9), (4, 2, 20)]), rtol=2**-11)


def test_points_behind_or_beside_the_image_are_left_out(tmp_path: Path, importing: Importing) -> None:
    outside = [(12, 3, 5), (-1, 3, 5), (4, 8, 5), (4, -1, 5), (4, 4, -5)]
    points = np.concatenate([cloud([*outside, (5, 4, 3.0)]), np.full((2, 4), np.nan), np.full((1, 4), np.inf)])
    scene(tmp_path / "d", "s", [points])
    dataset(tmp_path / "d", ["s"])
    value_HW = importing("ddad", tmp_path / "d").value("s/rgb/CAMERA_01/0")
    np.testing.assert_allclose(value_HW, wanted([(5, 4, 3.0)]), rtol=2**-11)


def test_another_camera_has_its_own_calibration(tmp_path: Path, importing: Importing) -> None:
    scene(tmp_path / "d", "s", [cloud([(3, 2, 10.0)], fx=2 * FX)])
    dataset(tmp_path / "d", ["s"])
    packed = importing("ddad", tmp_path / "d", camera="CAMERA_09")
    assert packed.meta("s/rgb/CAMERA_09/0")["focal_px"] == 2 * FX
    np.testing.assert_allclose(packed.value("s/rgb/CAMERA_09/0"), wanted([(3, 2, 10.0)]), rtol=2**-11)
    with pytest.raises(DataError, match="nothing in it"):
        importing("ddad", tmp_path / "d", camera="CAMERA_05")


def test_points_with_named_fields(tmp_path: Path, importing: Importing) -> None:
    records = np.zeros(len(SEEN), [("INTENSITY", "f4"), ("Z", "f8"), ("X", "f8"), ("Y", "f8")])
    for axis, name in enumerate("XYZ"):
        records[name] = cloud(SEEN)[:, axis]
    scene(tmp_path / "d", "s", [records])
    dataset(tmp_path / "d", ["s"])
    value_HW = importing("ddad", tmp_path / "d").value("s/rgb/CAMERA_01/0")
    np.testing.assert_allclose(value_HW, wanted(SEEN), rtol=2**-11)


def test_splits_and_a_named_file(tmp_path: Path, importing: Importing) -> None:
    root = tmp_path / "d"
    for name in ("000000", "000001"):
        scene(root, name, [cloud(SEEN)])
    dataset(root, ["000001"], ["000000"])
    (root / "agents.json").write_text("{}")
    assert list(importing("ddad", root).members) == ["000001/rgb/CAMERA_01/0"]
    assert list(importing("ddad", root, split="val").members) == ["000000/rgb/CAMERA_01/0"]
    dataset(root, ["000000", "000001"], name="ddad_tiny.json")
    with pytest.raises(DataError, match=r"ddad\.json, ddad_tiny\.json: name one"):
        importing("ddad", root)
    assert len(importing("ddad", root / "ddad_tiny.json").members) == 2
    with pytest.raises(DataError, match="no scenes in the split 'val'"):
        importing("ddad", root / "ddad_tiny.json", split="val")


def test_what_is_missing_or_damaged_is_counted(tmp_path: Path, importing: Importing) -> None:
    root = tmp_path / "d"
    behind = cloud([(4, 4, -5.0)])
    scene(root, "s", [cloud(SEEN), cloud(SEEN), cloud(SEEN), cloud(SEEN)[:, :2], cloud(SEEN), behind, cloud(SEEN)])
    scene(root, "t", [cloud(SEEN)])
    dataset(root, ["s", "t"])
    clouds = root / "s" / "point_cloud" / "LIDAR"
    (clouds / "0.npz").unlink()
    whole = (clouds / "1.npz").read_bytes()
    (clouds / "1.npz").write_bytes(whole[: len(whole) // 2])
    np.save(clouds / "2.npz.npy", cloud(SEEN))
    (clouds / "2.npz.npy").rename(clouds / "2.npz")
    content = json.loads((root / "s" / "scene_a8dc.json").read_text())
    content["samples"][4]["datum_keys"] = ["CAMERA_014"]
    (root / "s" / "scene_a8dc.json").write_text(json.dumps(content))
    (root / "t" / "calibration" / "c0e1.json").write_text("{}")
    packed = importing("ddad", root)
    assert list(packed.members) == ["s/rgb/CAMERA_01/6"]
    assert {reason: len(names) for reason, names in packed.report.skipped.items()} == {
        "missing_depth": 2,
        "unreadable_depth": 3,
        "no_valid_depth": 1,
        "unreadable_calibration": 1,
    }


def test_what_is_not_this_layout_is_refused(tmp_path: Path, importing: Importing) -> None:
    root = tmp_path / "d"
    scene(root, "s", [cloud(SEEN)])
    with pytest.raises(DataError, match=r"no DGP dataset such as ddad\.json"):
        importing("ddad", root)
    dataset(root, ["t"])
    with pytest.raises(DataError, match=r"t/scene_a8dc\.json: missing"):
        importing("ddad", root)
    dataset(root, ["s"])
    (root / "s" / "scene_a8dc.json").write_text('{"data": [{}]}')
    with pytest.raises(DataError, match="no DGP scene"):
        importing("ddad", root)
