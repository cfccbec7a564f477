"""SUN RGB-D: trees written with plain text and Pillow. Shape suffixes: H W pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dataio.spec import DataError
from tests.dataio.importers.conftest import Importing, write_image, write_png16

MATRIX = "529.500000 0.000000 365.000000 0.000000 529.600000 265.000000 0.000000 0.000000 1.000000 "
MM_HW = np.arange(1, 97).reshape(8, 12) * 80  # to 7680


def rotated(mm_HW: np.ndarray) -> np.ndarray:
    """As the files hold millimetres: 16 bits turned left by three."""
    return np.array([[int(f"{mm:016b}"[3:] + f"{mm:016b}"[:3], 2) for mm in row] for row in mm_HW])


def frame(folder: Path, mm_HW: np.ndarray, image: str = "0000103", depth: str = "0000103") -> bytes:
    """A frame as the dataset has it, with raw maps 5 mm larger and files that are not to be taken."""
    photo = write_image(folder / "image" / f"{image}.jpg", seed=int(mm_HW.sum()))
    write_png16(folder / "depth_bfx" / f"{depth}.png", rotated(mm_HW))
    write_png16(folder / "depth" / f"{depth}.png", rotated(np.where(mm_HW > 0, mm_HW + 5, 0)))
    write_image(folder / "fullres" / f"{image}.jpg", (24, 16))
    write_png16(folder / "fullres" / f"{depth}.png", rotated(np.zeros((16, 24), int)))
    (folder / "intrinsics.txt").write_text(MATRIX)
    (folder / "image" / "$thumbnails").write_text("")
    (folder / "scene.txt").write_text("office")
    return photo


def test_frames_of_several_sensors(tmp_path: Path, importing: Importing) -> None:
    root = tmp_path / "SUNRGBD"
    photo = frame(root / "kv2" / "kinect2data" / "000002_2014-resize", MM_HW)
    # names of the two files differ there
    frame(
        root / "xtion" / "sun3ddata" / "brown_bm_1" / "0001640", MM_HW + 3, "0001640-000054824024", "0001640-000054807"
    )
    packed = importing("sunrgbd", root)
    keys = [
        "kv2/kinect2data/000002_2014-resize/image/0000103",
        "xtion/sun3ddata/brown_bm_1/0001640/image/0001640-000054824024",
    ]
    assert sorted(packed.members) == keys and packed.report.skipped == {}
    assert packed.members[keys[0]]["jpg"] == photo
    np.testing.assert_allclose(packed.value(keys[0]), MM_HW / 1000, rtol=1e-6)
    np.testing.assert_allclose(packed.value(keys[1]), (MM_HW + 3) / 1000, rtol=1e-6)
    assert packed.meta(keys[0]) == {"focal_px": 529.5}


def test_holes_and_the_cap(tmp_path: Path, importing: Importing) -> None:
    mm_HW = MM_HW.copy()
    mm_HW[0, :5] = 0, 8000, 8001, 9000, 65535
    frame(tmp_path / "f", mm_HW)
    value_HW = importing("sunrgbd", tmp_path / "f").value("image/0000103")
    assert np.isnan(value_HW[0, [0, 2, 3, 4]]).all() and np.isnan(value_HW).sum() == 4
    assert value_HW[0, 1] == pytest.approx(8.0) and value_HW[0, 5] == pytest.approx(0.48)


def test_raw_depth(tmp_path: Path, importing: Importing) -> None:
    frame(tmp_path / "f", MM_HW)
    value_HW = importing("sunrgbd", tmp_path / "f", depth="raw").value("image/0000103")
    np.testing.assert_allclose(value_HW, (MM_HW + 5) / 1000, rtol=1e-6)


@pytest.mark.parametrize("text", [None, "a b", "1 2 3", MATRIX.replace("529.5", "0.0")])
def test_without_a_matrix_no_focal_length_is_invented(tmp_path: Path, importing: Importing, text: str | None) -> None:
    frame(tmp_path / "f", MM_HW)
    path = tmp_path / "f" / "intrinsics.txt"
    path.unlink() if text is None else path.write_text(text)
    assert importing("sunrgbd", tmp_path / "f").meta("image/0000103") == {}


def test_what_is_missing_or_damaged_is_left_out(tmp_path: Path, importing: Importing) -> None:
    root = tmp_path / "r"
    for name in "abcd":
        frame(root / name, MM_HW)
    (root / "a" / "depth_bfx" / "0000103.png").unlink()
    (root / "b" / "depth_bfx" / "0000103.png").write_bytes(b"\x89PNG no")
    write_image(root / "c" / "depth_bfx" / "0000103.png")
    packed = importing("sunrgbd", root)
    assert packed.report.skipped == {
        "missing_depth": ["a/image/0000103.jpg"],
        "unreadable_depth": ["b/image/0000103.jpg"],
        "depth_not_16_bit": ["c/image/0000103.jpg"],
    }
    assert sorted(packed.members) == ["d/image/0000103"]


def test_what_is_not_this_layout_is_refused(tmp_path: Path, importing: Importing) -> None:
    write_image(tmp_path / "r" / "x" / "image" / "1.jpg")
    with pytest.raises(DataError, match=r"no image/\*\.jpg with depth_bfx/\*\.png"):
        importing("sunrgbd", tmp_path / "r")
    with pytest.raises(DataError, match=r"with depth/\*\.png"):
        importing("sunrgbd", tmp_path / "r", depth="raw")
