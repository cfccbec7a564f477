"""MPI Sintel: .dpt and .cam written with struct. Shape suffixes: H W pixels."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from dataio.spec import DataError
from tests.dataio.importers.conftest import Importing, ramp, write_image

TAG = 202021.25


def write_dpt(path: Path, value_HW: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width = value_HW.shape
    path.write_bytes(struct.pack("<fii", TAG, width, height) + struct.pack(f"<{value_HW.size}f", *value_HW.ravel()))


def write_cam(path: Path, focal_px: float) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    intrinsics = (focal_px, 0.0, 511.5, 0.0, focal_px + 1, 217.5, 0.0, 0.0, 1.0)
    path.write_bytes(struct.pack("<f9d12d", TAG, *intrinsics, *range(12)))


def frame(training: Path, scene: str, number: int, value_HW: np.ndarray) -> dict[str, bytes]:
    """A frame of both passes; returns the pictures' bytes."""
    stem = f"{scene}/frame_{number:04d}"
    write_dpt(training / "depth" / f"{stem}.dpt", value_HW)
    write_image(training / "depth_viz" / f"{stem}.png")
    write_cam(training / "camdata_left" / f"{stem}.cam", 1120.0 + number)
    return {
        render: write_image(training / render / f"{stem}.png", seed=10 * number + extra)
        for extra, render in enumerate(("final", "clean"))
    }


def test_depth_and_focal_length(tmp_path: Path, importing: Importing) -> None:
    maps = {1: ramp(), 2: ramp(low=2.0, high=9.0)}
    maps[2][0, :3] = np.nan, np.inf, 0.0
    images = {number: frame(tmp_path / "all" / "training", "alley_1", number, maps[number]) for number in maps}
    packed = importing("sintel", tmp_path / "all")
    keys = {number: f"training/final/alley_1/frame_{number:04d}" for number in maps}
    assert list(packed.members) == list(keys.values()) and packed.info.quantity == "depth_m"
    for number, key in keys.items():
        assert packed.members[key]["png"] == images[number]["final"]
        assert packed.meta(key)["focal_px"] == 1120.0 + number
    np.testing.assert_allclose(packed.value(keys[1]), maps[1], atol=1e-4)
    value_HW = packed.value(keys[2])
    assert np.isnan(value_HW[0, :3]).all() and np.isfinite(value_HW).sum() == 93
    np.testing.assert_allclose(value_HW.ravel()[3:], maps[2].ravel()[3:], atol=1e-4)


def test_the_clean_pass(tmp_path: Path, importing: Importing) -> None:
    images = frame(tmp_path / "all" / "training", "alley_1", 1, ramp())
    packed = importing("sintel", tmp_path / "all", render="clean")
    assert list(packed.members) == ["training/clean/alley_1/frame_0001"]
    assert packed.members["training/clean/alley_1/frame_0001"]["png"] == images["clean"]
    assert np.isfinite(packed.value("training/clean/alley_1/frame_0001")).all()


def test_sky_is_kept_unless_there_is_a_limit(tmp_path: Path, importing: Importing) -> None:
    value_HW = ramp()
    value_HW[0, :2] = 1e5, 71.0
    frame(tmp_path / "all" / "training", "alley_1", 1, value_HW)
    key = "training/final/alley_1/frame_0001"
    found_HW = importing("sintel", tmp_path / "all").value(key)
    np.testing.assert_allclose(found_HW[0, :2], (1e5, 71.0), rtol=1e-3)
    found_HW = importing("sintel", tmp_path / "all", max_depth_m="71").value(key)
    assert np.isnan(found_HW[0, 0]) and found_HW[0, 1] == pytest.approx(71.0, rel=1e-3)
    found_HW = importing("sintel", tmp_path / "all", max_depth_m="70").value(key)
    assert np.isnan(found_HW[0, :2]).all() and np.isfinite(found_HW).sum() == 94


def test_the_root_may_be_training_and_cameras_may_be_absent(tmp_path: Path, importing: Importing) -> None:
    frame(tmp_path / "training", "alley_1", 1, ramp())
    (tmp_path / "training" / "camdata_left" / "alley_1" / "frame_0001.cam").unlink()
    packed = importing("sintel", tmp_path / "training")
    assert list(packed.members) == ["final/alley_1/frame_0001"]
    assert "focal_px" not in packed.meta("final/alley_1/frame_0001")


def test_what_is_damaged_is_skipped(tmp_path: Path, importing: Importing) -> None:
    training = tmp_path / "all" / "training"
    for number in range(1, 7):
        frame(training, "alley_1", number, ramp())
    depth = training / "depth" / "alley_1"
    whole = (depth / "frame_0002.dpt").read_bytes()
    (depth / "frame_0001.dpt").unlink()
    (depth / "frame_0002.dpt").write_bytes(whole[:-4])
    (depth / "frame_0003.dpt").write_bytes(b"\0" + whole[1:])
    (depth / "frame_0004.dpt").write_bytes(struct.pack("<fii", TAG, -12, -8) + whole[12:])
    (training / "camdata_left" / "alley_1" / "frame_0005.cam").write_bytes(struct.pack("<f9d", TAG, *range(9)))
    packed = importing("sintel", tmp_path / "all")
    counts = {reason: len(names) for reason, names in packed.report.skipped.items()}
    assert counts == {"missing_depth": 1, "unreadable_depth": 3, "unreadable_camera": 1}
    assert list(packed.members) == ["training/final/alley_1/frame_0006"]


def test_what_is_not_this_layout_is_refused(tmp_path: Path, importing: Importing) -> None:
    (tmp_path / "all").mkdir()
    with pytest.raises(DataError, match="unpack MPI-Sintel-complete and MPI-Sintel-depth-training"):
        importing("sintel", tmp_path / "all")
    write_image(tmp_path / "all" / "training" / "final" / "alley_1" / "frame_0001.png")  # without the maps' archive
    with pytest.raises(DataError, match="training/depth"):
        importing("sintel", tmp_path / "all")
