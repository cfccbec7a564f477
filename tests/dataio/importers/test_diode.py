"""DIODE: trees of PNG and .npy, the latter packed by hand. Shape suffixes: H W pixels, C channel."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dataio.importers import get_importer
from dataio.spec import DataError
from tests.dataio.importers.conftest import Importing, ramp, write_image

SCAN = "scene_00019/scan_00183"


def write_npy(path: Path, value: np.ndarray) -> None:
    """A .npy of version 1.0, little-endian, rows first."""
    kind = value.dtype.newbyteorder("<").str
    head = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {value.shape}, }}".ljust(117) + "\n"
    path.write_bytes(b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head.encode() + value.tobytes())


def add(root: Path, stem: str, depth_HW: np.ndarray | None = None, mask_HW: np.ndarray | None = None) -> bytes:
    """One sample as the archive has it: depth [H, W, 1], mask [H, W], both float32. Returns the photograph's bytes."""
    image = write_image(root / f"{stem}.png", seed=len(stem))
    depth_HW = ramp() if depth_HW is None else depth_HW
    mask_HW = np.ones((8, 12)) if mask_HW is None else mask_HW
    write_npy(root / f"{stem}_depth.npy", depth_HW.astype(np.float32)[..., None])
    write_npy(root / f"{stem}_depth_mask.npy", mask_HW.astype(np.float32))
    return image


def test_metres_where_the_mask_is_one(tmp_path: Path, importing: Importing) -> None:
    depth_HW, mask_HW = ramp(high=40.0), np.ones((8, 12))
    mask_HW[2, 3] = 0
    depth_HW[5, 7] = 0  # no return, though the mask forgot it
    depth_HW[2, 4], mask_HW[2, 4] = np.inf, 0
    stem = f"train/indoors/{SCAN}/00019_00183_indoors_000_010"
    image = add(tmp_path / "d", stem, depth_HW, mask_HW)
    packed = importing("diode", tmp_path / "d")
    assert packed.info.quantity == "depth_m" and list(packed.members) == [stem]
    assert packed.members[stem]["png"] == image
    assert packed.meta(stem)["focal_px"] == 886.81
    value_HW = packed.value(stem)
    assert [tuple(at) for at in np.argwhere(np.isnan(value_HW))] == [(2, 3), (2, 4), (5, 7)]
    for row, column in ((0, 0), (0, 11), (7, 0), (7, 11), (3, 5)):
        assert value_HW[row, column] == pytest.approx(1 + 39 * (row * 12 + column) / 95, abs=1e-3)


def test_splits_and_domains(tmp_path: Path, importing: Importing) -> None:
    root = tmp_path / "d"
    stems = [f"{split}/{domain}/{SCAN}/{name}" for split, domain, name in (
        ("train", "outdoor", "a"), ("train", "indoors", "b"), ("train", "indoors", "a"), ("val", "outdoor", "c"),
    )]  # fmt: skip
    for number, stem in enumerate(stems):
        add(root, stem, ramp(low=number + 1, high=number + 2))
    rooms, streets = [stems[2], stems[1]], [stems[0]]
    keys = [entry.key for entry in get_importer("diode")(str(root)).entries()]
    assert keys == rooms + streets
    packed = importing("diode", root, split="train")
    assert [packed.value(stem)[0, 0] for stem in stems[:3]] == pytest.approx([1, 2, 3], rel=1e-4)
    assert list(importing("diode", root, domain="indoors").members) == rooms
    assert list(importing("diode", root, domain="outdoor").members) == streets
    assert list(importing("diode", root, domain="outdoor", split="val").members) == [stems[3]]


def test_a_bad_sample_is_left_out_and_named(tmp_path: Path, importing: Importing) -> None:
    root, folder = tmp_path / "d", f"train/outdoor/{SCAN}"
    for name in "abcdefgh":
        add(root, f"{folder}/{name}")
    (root / folder / "b_depth.npy").unlink()
    (root / folder / "c_depth_mask.npy").unlink()
    (root / folder / "d_depth.npy").write_bytes((root / folder / "a_depth.npy").read_bytes()[:200])
    add(root, f"{folder}/e", mask_HW=np.ones((8, 11)))
    add(root, f"{folder}/f", depth_HW=ramp((11, 8)), mask_HW=np.ones((8, 11)))
    add(root, f"{folder}/g", mask_HW=np.zeros((8, 12)))
    add(root, f"{folder}/h", depth_HW=np.zeros((8, 12)))
    packed = importing("diode", root)
    assert list(packed.members) == [f"{folder}/a"]
    assert packed.report.skipped == {
        "missing_depth": [f"{folder}/b.png"],
        "missing_depth_mask": [f"{folder}/c.png"],
        "unreadable_depth": [f"{folder}/d.png"],
        "depth_mask_size_differs": [f"{folder}/e.png"],
        "depth_size_differs": [f"{folder}/f.png"],
        "no_valid_depth": [f"{folder}/g.png", f"{folder}/h.png"],
    }


def test_what_is_not_this_layout_is_refused(tmp_path: Path, importing: Importing) -> None:
    add(tmp_path / "d", f"val/indoors/{SCAN}/a")
    for root, options in (("d", {}), ("d/val", {"split": "val"}), ("d", {"split": "val", "domain": "outdoor"})):
        with pytest.raises(DataError, match=r"name the folder that holds 'train' and 'val', or choose another split"):
            importing("diode", tmp_path / root, **options)
    with pytest.raises(DataError, match=r"option 'domain' is 'moon'"):
        importing("diode", tmp_path / "d", domain="moon")
