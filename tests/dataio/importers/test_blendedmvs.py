"""BlendedMVS: portable float maps and cameras written as bytes. Shape suffixes: H W pixels."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from dataio.spec import DataError
from tests.dataio.importers.conftest import Importing, ramp, write_image

CAMERA = """extrinsic
0.98 0.01 -0.17 11.5
0.02 0.99 0.03 -7.25
0.16 -0.04 0.98 3.75
0.0 0.0 0.0 1.0

intrinsic
580.25 0.0 383.5
0.0 581.75 287.5
0.0 0.0 1.0

2.5 0.0625 128 10.5
"""


def view(project: Path, number: int, value_HW: np.ndarray) -> bytes:
    """Returns the photograph's bytes."""
    stem = f"{number:08d}"
    for kind in ("rendered_depth_maps", "cams"):
        (project / kind).mkdir(parents=True, exist_ok=True)
    height, width = value_HW.shape
    rows = [struct.pack(f"<{width}f", *value_HW[row]) for row in reversed(range(height))]
    data = f"Pf\n{width} {height}\n-1.000000\n".encode() + b"".join(rows)
    (project / "rendered_depth_maps" / f"{stem}.pfm").write_bytes(data)
    (project / "cams" / f"{stem}_cam.txt").write_text(CAMERA)
    (project / "cams" / "pair.txt").write_text("0\n")
    write_image(project / "blended_images" / f"{stem}_masked.jpg", seed=number + 50)
    return write_image(project / "blended_images" / f"{stem}.jpg", seed=number)


def test_depth_in_the_scenes_unit(tmp_path: Path, importing: Importing) -> None:
    maps = [ramp(low=20, high=80), ramp(low=0.01, high=0.02)]
    maps[0][0, :2] = 0.0  # where the mesh has a hole
    images = [view(tmp_path / "all" / "5bfe5ae0", number, value_HW) for number, value_HW in enumerate(maps)]
    packed = importing("blendedmvs", tmp_path / "all")
    keys = [f"5bfe5ae0/blended_images/{number:08d}" for number in range(2)]
    assert list(packed.members) == keys and packed.info.quantity == "depth_m"
    assert [packed.members[key]["jpg"] for key in keys] == images  # and no masked one
    value_HW = packed.value(keys[0])
    assert np.isnan(value_HW[0, :2]).all() and np.isfinite(value_HW).sum() == 94
    np.testing.assert_allclose(value_HW.ravel()[2:], maps[0].ravel()[2:], rtol=1e-3)
    np.testing.assert_allclose(packed.value(keys[1]), maps[1], rtol=1e-4)
    meta = packed.meta(keys[0])
    assert meta["unit"] == "scene" and meta["focal_px"] == 580.25


def test_a_list_chooses_projects(tmp_path: Path, importing: Importing) -> None:
    for project in "hgfbedca":
        view(tmp_path / "all" / project, 0, ramp())
    (tmp_path / "BlendedMVS_training.txt").write_text("c\na\nz\n")
    packed = importing("blendedmvs", tmp_path / "all", split_file=str(tmp_path / "BlendedMVS_training.txt"))
    assert [key.split("/")[0] for key in packed.members] == ["a", "c"]
    assert [key.split("/")[0] for key in importing("blendedmvs", tmp_path / "all").members] == list("abcdefgh")


def test_what_is_damaged_is_skipped(tmp_path: Path, importing: Importing) -> None:
    project = tmp_path / "all" / "aa"
    for number in range(6):
        view(project, number, ramp() if number else np.zeros((8, 12)))
    (project / "rendered_depth_maps" / "00000001.pfm").unlink()
    (project / "rendered_depth_maps" / "00000002.pfm").write_bytes(b"Pf\n12 8\n-1\n")
    (project / "cams" / "00000003_cam.txt").write_text("extrinsic\n")
    (project / "cams" / "00000004_cam.txt").unlink()
    packed = importing("blendedmvs", tmp_path / "all")
    counts = {reason: len(names) for reason, names in packed.report.skipped.items()}
    assert counts == {"no_valid_depth": 1, "missing_depth": 1, "unreadable_depth": 1, "unreadable_camera": 1}
    assert list(packed.members) == ["aa/blended_images/00000004", "aa/blended_images/00000005"]
    assert "focal_px" not in packed.meta("aa/blended_images/00000004")  # without its file, none is invented


def test_what_is_not_this_layout_is_refused(tmp_path: Path, importing: Importing) -> None:
    (tmp_path / "all").mkdir()
    with pytest.raises(DataError, match="name the folder of BlendedMVS's projects"):
        importing("blendedmvs", tmp_path / "all")
    view(tmp_path / "all" / "aa", 0, ramp())
    listing = tmp_path / "list.txt"
    with pytest.raises(DataError, match=r"list\.txt: cannot be read"):
        importing("blendedmvs", tmp_path / "all", split_file=str(listing))
    listing.write_text("bb\n")
    with pytest.raises(DataError, match="none of the projects"):
        importing("blendedmvs", tmp_path / "all", split_file=str(listing))
