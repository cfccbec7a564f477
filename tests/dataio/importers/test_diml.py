"""DIML/CVL RGB-D: trees of its four forms, written with Pillow. Shape suffixes: H W pixels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataio.spec import DataError
from tests.dataio.importers.conftest import Importing, write_image, write_png16

MM_HW = np.arange(96).reshape(8, 12) * 600  # a hole first, to 57 m


def sample_indoor(scene: Path, name: str = "in_01_160217_123138") -> tuple[bytes, bytes]:
    photo = write_image(scene / "color" / f"{name}_c.png")
    depth = write_png16(scene / "depth_filled" / f"{name}_depth_filled.png", MM_HW)
    write_png16(scene / "depth_raw" / f"{name}_depth_raw.png", MM_HW // 2)
    write_image(scene / "depth_v" / f"{name}_depth_v.png")
    return photo, depth


def full_indoor(batch: Path, name: str = "in_k_01_160217_1") -> tuple[bytes, bytes]:
    write_png16(batch / "up_png" / f"{name}0_ud.png", MM_HW + 9)
    write_png16(batch / "raw_png" / f"{name}_d.png", MM_HW // 2)
    return write_image(batch / "col" / f"{name}_c.png"), write_png16(batch / "up_png" / f"{name}_ud.png", MM_HW)


def sample_outdoor(folder: Path, name: str = "0001") -> tuple[bytes, bytes]:
    write_image(folder / "outright" / f"{name}.png", seed=5)
    write_confidence(folder / "confidencemap" / f"{name}.png")
    return write_image(folder / "outleft" / f"{name}.png"), write_png16(folder / "depthmap" / f"{name}.png", MM_HW)


def full_outdoor(batch: Path, name: str = "170721_C0_000001") -> tuple[bytes, bytes]:
    write_image(batch / "right" / f"{name}_right.png", seed=5)
    write_confidence(batch / "conf" / f"{name}_conf.png")
    photo = write_image(batch / "left" / f"{name}_left.png")
    return photo, write_png16(batch / "depth" / f"{name}_depth.png", MM_HW)


def write_confidence(path: Path) -> None:
    """Row y has 32 * y."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.repeat(np.arange(8, dtype=np.uint8) * 32, 12).reshape(8, 12)).save(path)


Write = Callable[[Path], tuple[bytes, bytes]]

FORMS = [
    (sample_indoor, "LR/12. Livingroom", "LR/12__Livingroom/color/in_01_160217_123138_c"),
    (full_indoor, "16. Billiard Hall/160217/1", "16__Billiard_Hall/160217/1/col/in_k_01_160217_1_c"),
    (sample_outdoor, "HR", "HR/outleft/0001"),
    (full_outdoor, "170721_C0/A", "170721_C0/A/left/170721_C0_000001_left"),
]


@pytest.mark.parametrize("write, folder, key", FORMS)
def test_each_form(tmp_path: Path, importing: Importing, write: Write, folder: str, key: str) -> None:
    photo, depth = write(tmp_path / "diml" / folder)
    packed = importing("diml", tmp_path / "diml")
    assert list(packed.members) == [key] and packed.report.skipped == {}
    assert packed.members[key]["png"] == photo and packed.members[key]["depth.png"] == depth
    value_HW = packed.value(key)
    assert np.isnan(value_HW[0, 0]) and np.isfinite(value_HW).sum() == 95
    assert value_HW[0, 1] == pytest.approx(0.6) and value_HW[7, 11] == pytest.approx(57.0)


def test_files_of_one_name_in_two_places(tmp_path: Path, importing: Importing) -> None:
    sample_outdoor(tmp_path / "o" / "a")
    sample_outdoor(tmp_path / "o" / "b")
    write_png16(tmp_path / "o" / "b" / "depthmap" / "0001.png", MM_HW + 9)
    packed = importing("diml", tmp_path / "o")
    assert [packed.value(f"{place}/outleft/0001")[0, 1] for place in "ab"] == pytest.approx([0.6, 0.609])


@pytest.mark.parametrize("write, folder, key", FORMS[2:])
def test_outdoor_pixels_need_confidence(
    tmp_path: Path, importing: Importing, write: Write, folder: str, key: str
) -> None:
    write(tmp_path / "diml" / folder)
    sample_indoor(tmp_path / "diml" / "in")
    packed = importing("diml", tmp_path / "diml", confidence="0.5019607843137255")  # 128: row 4 is not above it
    value_HW = packed.value(key)
    assert np.isnan(value_HW[:5]).all()
    np.testing.assert_allclose(value_HW[5:], MM_HW[5:] / 1000, rtol=1e-6)
    assert np.isfinite(packed.value("in/color/in_01_160217_123138_c")).sum() == 95  # indoor has none


def test_without_confidence_no_outdoor_sample(tmp_path: Path, importing: Importing) -> None:
    root = tmp_path / "o"
    for name in ("a", "b", "c", "d", "e"):
        sample_outdoor(root, name)
    folder = root / "confidencemap"
    (folder / "a.png").unlink()
    (folder / "b.png").write_bytes(b"no")
    Image.new("L", (5, 5)).save(folder / "c.png")
    (root / "depthmap" / "d.png").unlink()
    packed = importing("diml", root, confidence="0.4")
    assert packed.report.skipped == {
        "missing_confidence": ["outleft/a.png"],
        "unreadable_confidence": ["outleft/b.png"],
        "confidence_size_differs": ["outleft/c.png"],
        "missing_depth": ["outleft/d.png"],
    }
    assert list(packed.members) == ["outleft/e"]


def test_what_is_missing_or_damaged_is_left_out(tmp_path: Path, importing: Importing) -> None:
    root = tmp_path / "s"
    for name in ("a", "b", "c"):
        sample_indoor(root, name)
    (root / "depth_filled" / "a_depth_filled.png").unlink()
    (root / "depth_filled" / "b_depth_filled.png").write_bytes(b"no")
    packed = importing("diml", root)
    assert packed.report.skipped == {
        "missing_depth": ["color/a_c.png"],
        "unreadable_depth": ["color/b_c.png"],
    }
    assert list(packed.members) == ["color/c_c"]


def test_what_is_not_this_layout_is_refused(tmp_path: Path, importing: Importing) -> None:
    write_image(tmp_path / "s" / "color" / "1.jpg")
    write_image(tmp_path / "s" / "color" / "1_c.png")
    with pytest.raises(DataError, match="color/ with depth_filled/, col/ with up_png/"):
        importing("diml", tmp_path / "s")
