"""HR-WSI: trees written with Pillow. Shape suffixes: H W pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataio.importers import get_importer
from dataio.spec import DataError
from tests.dataio.importers.conftest import Importing, write_image, write_png16


def write_grey(path: Path, value_HW: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(value_HW, np.uint8)).save(path)


def steps(low: int = 0) -> np.ndarray:
    """[8, 12] of 8-bit disparities, two apart: another in every pixel."""
    return low + 2 * np.arange(96).reshape(8, 12)


def add(split: Path, name: str, disparity_HW: np.ndarray | None = None, valid_HW: np.ndarray | None = None) -> bytes:
    """One sample with the masks of instances that lie beside it. Returns the photograph's bytes."""
    write_grey(split / "gts" / f"{name}.png", steps() if disparity_HW is None else disparity_HW)
    write_grey(split / "valid_masks" / f"{name}.png", np.full((8, 12), 255) if valid_HW is None else valid_HW)
    write_grey(split / "instance_masks" / f"{name}.png", np.arange(96).reshape(8, 12) % 3)
    return write_image(split / "imgs" / f"{name}.jpg", seed=sum(name.encode()))


def test_disparity_where_the_mask_is_not_zero(tmp_path: Path, importing: Importing) -> None:
    valid_HW = np.full((8, 12), 255)
    valid_HW[3, 4], valid_HW[7, 2], valid_HW[6, 6] = 0, 0, 1
    image = add(tmp_path / "HR-WSI" / "train", "1_a", steps(), valid_HW)
    packed = importing("hrwsi", tmp_path / "HR-WSI")
    assert packed.info.quantity == "disparity"
    assert list(packed.members) == ["train/imgs/1_a"]
    assert packed.members["train/imgs/1_a"]["jpg"] == image
    assert "sky.png" not in packed.members["train/imgs/1_a"]
    value_HW = packed.value("train/imgs/1_a")
    assert [tuple(at) for at in np.argwhere(np.isnan(value_HW))] == [(3, 4), (7, 2)]
    # 0 is a value: the farthest
    for row, column in ((0, 0), (0, 11), (7, 0), (7, 11), (6, 6)):
        assert value_HW[row, column] == pytest.approx(2 * (row * 12 + column), abs=2e-3)


def test_sixteen_bits_keep_theirs(tmp_path: Path, importing: Importing) -> None:
    add(tmp_path / "train", "a")
    write_png16(tmp_path / "train" / "gts" / "a.png", steps() * 300 + 7)
    value_HW = importing("hrwsi", tmp_path).value("train/imgs/a")
    np.testing.assert_allclose(value_HW, steps() * 300 + 7, atol=0.5)


def test_splits_in_order(tmp_path: Path, importing: Importing) -> None:
    for number, (split, name) in enumerate((("train", "b"), ("train", "a"), ("val", "c"))):
        add(tmp_path / "h" / split, name, steps(number * 10))
    keys = [entry.key for entry in get_importer("hrwsi")(str(tmp_path / "h")).entries()]
    assert keys == ["train/imgs/a", "train/imgs/b"]
    packed = importing("hrwsi", tmp_path / "h")
    assert [packed.value(key)[0, 0] for key in keys] == pytest.approx([10, 0], abs=1e-3)
    packed = importing("hrwsi", tmp_path / "h", split="val")
    assert list(packed.members) == ["val/imgs/c"]
    assert packed.value("val/imgs/c")[7, 11] == pytest.approx(20 + 190, abs=1e-2)


def test_a_bad_sample_is_left_out_and_named(tmp_path: Path, importing: Importing) -> None:
    split = tmp_path / "h" / "train"
    for name in "abcdefgh":
        add(split, name)
    (split / "gts" / "b.png").unlink()
    (split / "valid_masks" / "c.png").unlink()
    (split / "gts" / "d.png").write_bytes((split / "gts" / "a.png").read_bytes()[:40])
    write_image(split / "gts" / "e.png")  # coloured: no disparity
    write_grey(split / "valid_masks" / "f.png", np.full((8, 11), 255))
    add(split, "g", steps()[:, :11], np.full((8, 11), 255))
    add(split, "h", valid_HW=np.zeros((8, 12)))
    packed = importing("hrwsi", tmp_path / "h")
    assert list(packed.members) == ["train/imgs/a"]
    assert packed.report.skipped == {
        "missing_depth": ["train/imgs/b.jpg"],
        "missing_valid_mask": ["train/imgs/c.jpg"],
        "unreadable_depth": ["train/imgs/d.jpg", "train/imgs/e.jpg"],
        "valid_mask_size_differs": ["train/imgs/f.jpg"],
        "depth_size_differs": ["train/imgs/g.jpg"],
        "no_valid_depth": ["train/imgs/h.jpg"],
    }


def test_what_is_not_this_layout_is_refused(tmp_path: Path, importing: Importing) -> None:
    add(tmp_path / "h" / "val", "a")
    for root, options in (("h", {}), ("h/val", {"split": "val"})):
        with pytest.raises(DataError, match=r"name the folder HR-WSI, which holds 'train' and 'val'"):
            importing("hrwsi", tmp_path / root, **options)
    with pytest.raises(DataError, match=r"option 'split' is 'test'"):
        importing("hrwsi", tmp_path / "h", split="test")
