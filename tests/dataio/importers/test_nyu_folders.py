"""NYU Depth V2 as folders: trees written with Pillow. Shape suffixes: H W pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dataio.spec import DataError
from tests.dataio.importers.conftest import Importing, write_image, write_png16

CODES_HW = np.arange(96).reshape(8, 12) * 100  # millimetres, a hole first


def test_sync_folders_are_copied(tmp_path: Path, importing: Importing) -> None:
    root = tmp_path / "sync"
    photo = write_image(root / "kitchen_0028b" / "rgb_00045.jpg")
    depth = write_png16(root / "kitchen_0028b" / "sync_depth_00045.png", CODES_HW)
    write_image(root / "bathroom_0001" / "rgb_00000.jpg", seed=1)
    write_png16(root / "bathroom_0001" / "sync_depth_00000.png", CODES_HW + 7)
    packed = importing("nyu-folders", root)
    assert sorted(packed.members) == ["bathroom_0001/rgb_00000", "kitchen_0028b/rgb_00045"]
    members = packed.members["kitchen_0028b/rgb_00045"]
    assert members["jpg"] == photo and members["depth.png"] == depth
    value_HW = packed.value("kitchen_0028b/rgb_00045")
    assert np.isnan(value_HW[0, 0]) and value_HW[0, 1] == pytest.approx(0.1) and value_HW[7, 11] == pytest.approx(9.5)
    assert packed.value("bathroom_0001/rgb_00000")[0, 1] == pytest.approx(0.107)
    assert packed.meta("kitchen_0028b/rgb_00045") == {"focal_px": 518.8579}


def test_what_the_toolbox_cut_at_ten_metres_is_a_hole(tmp_path: Path, importing: Importing) -> None:
    write_image(tmp_path / "s" / "rgb_00000.jpg")
    codes_HW = CODES_HW.copy()
    codes_HW[2, :4] = 9999, 10000, 10001, 65535
    write_png16(tmp_path / "s" / "sync_depth_00000.png", codes_HW)
    value_HW = importing("nyu-folders", tmp_path / "s").value("rgb_00000")
    assert np.isnan(value_HW[2, 1:4]).all() and np.isnan(value_HW).sum() == 4
    kept_HW = np.isfinite(value_HW)
    assert np.array_equal(np.rint(value_HW[kept_HW] * 1000), codes_HW[kept_HW])  # to the millimetre


def test_png_photographs_with_depth_beside(tmp_path: Path, importing: Importing) -> None:
    scene = tmp_path / "test" / "kitchen_0004"
    photo = write_image(scene / "rgb_0001.png")
    depth = write_png16(scene / "depth_0001.png", CODES_HW)
    write_png16(scene / "filled_0001.png", CODES_HW + 50)
    write_image(scene / "rgb_0002.png", seed=1)
    write_png16(scene / "depth_0002.png", CODES_HW + 100)
    packed = importing("nyu-folders", tmp_path / "test")
    assert sorted(packed.members) == ["kitchen_0004/rgb_0001", "kitchen_0004/rgb_0002"]
    members = packed.members["kitchen_0004/rgb_0001"]
    assert members["png"] == photo and members["depth.png"] == depth
    assert packed.value("kitchen_0004/rgb_0002")[0, 0] == pytest.approx(0.1)


def test_another_scale(tmp_path: Path, importing: Importing) -> None:
    write_image(tmp_path / "s" / "rgb_1.jpg")
    codes_HW = np.full((8, 12), 40000)
    codes_HW[0, :2] = 0, 50000
    write_png16(tmp_path / "s" / "depth_1.png", codes_HW)
    value_HW = importing("nyu-folders", tmp_path / "s", scale="0.0002").value("rgb_1")
    assert (
        value_HW[1, 1] == pytest.approx(8.0) and np.isnan(value_HW[0, :2]).all() and np.isfinite(value_HW).sum() == 94
    )


def test_what_is_missing_or_damaged_is_left_out(tmp_path: Path, importing: Importing) -> None:
    root = tmp_path / "s"
    for n in range(4):
        write_image(root / f"rgb_{n:05d}.jpg", seed=n)
    whole = write_png16(root / "sync_depth_00000.png", CODES_HW)
    (root / "sync_depth_00001.png").write_bytes(whole[:60])
    write_image(root / "sync_depth_00002.png")
    packed = importing("nyu-folders", root)
    assert packed.report.skipped == {
        "unreadable_depth": ["rgb_00001.jpg"],
        "depth_not_16_bit": ["rgb_00002.jpg"],
        "missing_depth": ["rgb_00003.jpg"],
    }
    assert sorted(packed.members) == ["rgb_00000"]


def test_what_is_not_this_layout_is_refused(tmp_path: Path, importing: Importing) -> None:
    write_image(tmp_path / "s" / "1.jpg")
    write_png16(tmp_path / "s" / "sync_depth_00000.png", CODES_HW)
    with pytest.raises(DataError, match="name a scene"):
        importing("nyu-folders", tmp_path / "s")
