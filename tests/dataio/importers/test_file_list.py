"""Lists of pairs: files written with NumPy, h5py, OpenEXR, struct and Pillow. Shape suffixes: H W pixels."""

from __future__ import annotations

import struct
from pathlib import Path

import h5py
import numpy as np
import OpenEXR
import pytest

from dataio.spec import DataError
from tests.dataio.importers.conftest import Importing, ramp, write_image, write_png16

CODES_HW = np.arange(96).reshape(8, 12) * 100  # 0 is the first pixel; up to 9500


def write_list(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return path


def pair(folder: Path, name: str = "a", seed: int = 0) -> bytes:
    """FOLDER/rgb/NAME.jpg and FOLDER/depth/NAME.png; returns the photograph's bytes."""
    write_png16(folder / "depth" / f"{name}.png", CODES_HW)
    return write_image(folder / "rgb" / f"{name}.jpg", seed=seed)


def test_images_and_pngs_are_copied(tmp_path: Path, importing: Importing) -> None:
    images = {name: pair(tmp_path / "d", name, seed=ord(name)) for name in "ab"}
    lines = ["# image depth", "", "rgb/b.jpg depth/b.png", "rgb/a.jpg depth/a.png 518.8579", "rgb/b.jpg depth/b.png"]
    packed = importing("file-list", write_list(tmp_path / "d" / "train.txt", *lines))
    assert list(packed.members) == ["rgb/b", "rgb/a"]  # in the list's order, a repeated line once
    for name in "ab":
        members = packed.members[f"rgb/{name}"]
        assert members["jpg"] == images[name]
        assert members["depth.png"] == (tmp_path / "d" / "depth" / f"{name}.png").read_bytes()
    assert packed.meta("rgb/a") == {"focal_px": 518.8579} and packed.meta("rgb/b") == {}
    value_HW = packed.value("rgb/a")
    assert np.isnan(value_HW[0, 0]) and value_HW[0, 1] == pytest.approx(0.1) and value_HW[7, 11] == pytest.approx(9.5)


def test_scale_of_the_codes(tmp_path: Path, importing: Importing) -> None:
    pair(tmp_path / "d")
    packed = importing("file-list", write_list(tmp_path / "d" / "l.txt", "rgb/a.jpg depth/a.png"), depth_scale="0.01")
    np.testing.assert_allclose(packed.value("rgb/a").ravel()[1:], CODES_HW.ravel()[1:] * 0.01, rtol=1e-6)


def test_every_format_of_depth(tmp_path: Path, importing: Importing) -> None:
    value_HW = ramp(low=0.5, high=90.0)
    value_HW[0, :4] = 0, -3, np.nan, np.inf
    folder = tmp_path / "d"
    folder.mkdir()
    np.save(folder / "a.npy", value_HW.astype(np.float64))
    for name in ("b.h5", "c.hdf5"):
        with h5py.File(folder / name, "w") as file:
            file["depth"] = value_HW[None]
            file["z"] = value_HW * 2
    header = {"compression": OpenEXR.ZIP_COMPRESSION, "type": OpenEXR.scanlineimage}
    OpenEXR.File(header, {"Y": value_HW}).write(str(folder / "d.exr"))
    rows = struct.pack("<96f", *value_HW[::-1].ravel())
    (folder / "e.PFM").write_bytes(b"Pf\n12 8\n-1.0\n" + rows)
    names = ("a.npy", "b.h5", "c.hdf5", "d.exr", "e.PFM")
    for name in names:
        write_image(folder / f"{name[0]}.png")
    path = write_list(folder / "l.txt", *(f"{name[0]}.png {name}" for name in names))
    wanted_HW = np.where(np.isfinite(value_HW) & (value_HW > 0), value_HW, np.nan)
    packed = importing("file-list", path)
    for key in "abcde":
        np.testing.assert_allclose(packed.value(key), wanted_HW, rtol=2**-11)
    near = importing("file-list", path, max_depth_m="80", hdf5_dataset="z")
    for key in "ade":
        np.testing.assert_allclose(near.value(key), np.where(wanted_HW <= 80, wanted_HW, np.nan), rtol=2**-11)
    assert near.report.skipped == {} and near.value("c")[1, 0] == pytest.approx(2 * value_HW[1, 0], rel=2**-11)


def test_values_beyond_the_limit_of_a_png(tmp_path: Path, importing: Importing) -> None:
    pair(tmp_path / "d", "a")
    pair(tmp_path / "d", "b")
    near_bytes = write_png16(tmp_path / "d" / "depth" / "b.png", CODES_HW // 2)
    path = write_list(tmp_path / "d" / "l.txt", "rgb/a.jpg depth/a.png", "rgb/b.jpg depth/b.png")
    packed = importing("file-list", path, max_depth_m="5")
    wanted_HW = np.where((CODES_HW > 0) & (CODES_HW <= 5000), CODES_HW / 1000, np.nan)
    np.testing.assert_allclose(packed.value("rgb/a"), wanted_HW, rtol=1e-6)  # the limit itself stays
    assert packed.members["rgb/b"]["depth.png"] == near_bytes  # nothing is beyond: copied


def test_bases_and_paths_that_start_with_a_slash(tmp_path: Path, importing: Importing) -> None:
    pair(tmp_path / "data" / "kitchen")
    pair(tmp_path / "data" / "away")
    lists = tmp_path / "lists"
    bts = write_list(lists / "bts.txt", "/kitchen/rgb/a.jpg /kitchen/depth/a.png 5.0 /right.jpg /right.png")
    assert list(importing("file-list", bts, base=str(tmp_path / "data")).members) == ["kitchen/rgb/a"]
    apart = write_list(lists / "apart.txt", "a.jpg a.png")
    options = {
        "base": str(tmp_path / "data"),
        "image_base": "kitchen/rgb",
        "depth_base": str(tmp_path / "data/away/depth"),
    }
    packed = importing("file-list", apart, **options)
    assert list(packed.members) == ["a"] and packed.report.skipped == {}
    away = tmp_path / "data" / "away"
    absolute = write_list(lists / "absolute.txt", f"{away}/rgb/a.jpg {away}/depth/a.png")
    (key,) = importing("file-list", absolute).members
    assert key == f"{away}/rgb/a".lstrip("/")


@pytest.mark.parametrize("separator", ["\t", ",", ", "])
def test_paths_with_spaces(tmp_path: Path, importing: Importing, separator: str) -> None:
    pair(tmp_path / "d" / "my room")
    line = separator.join(("my room/rgb/a.jpg", "my room/depth/a.png", "500.0"))
    packed = importing("file-list", write_list(tmp_path / "d" / "l.txt", line))
    assert packed.meta("my_room/rgb/a") == {"focal_px": 500.0}
    assert np.isfinite(packed.value("my_room/rgb/a")).sum() == 95


def test_what_is_missing_or_damaged_is_counted(tmp_path: Path, importing: Importing) -> None:
    for name in "abcdefgh":
        pair(tmp_path / "d", name)
    depth = tmp_path / "d" / "depth"
    (depth / "c.png").write_bytes((depth / "c.png").read_bytes()[:60])
    (depth / "d.npy").write_bytes(b"no")
    np.save(depth / "e.npy", np.zeros((8, 12, 3), np.float32))
    np.save(depth / "f.npy", np.full((4, 6), 2.0))
    (depth / "g.tif").write_bytes(b"II*")
    pair(tmp_path / "d", "i")
    with h5py.File(depth / "i.h5", "w") as file:
        file["depth"] = np.ones((3, 8, 12))
    images = [f"rgb/{name}.jpg" for name in "abcdefgh"]
    depths = ["None", "depth/none.png", "depth/c.png", "depth/d.npy", "depth/e.npy", "depth/f.npy", "depth/g.tif"]
    lines = [" ".join(both) for both in zip(images, [*depths, "depth/h.png"], strict=True)]
    lines += ["rgb/i.jpg depth/i.h5", "rgb/none.jpg depth/h.png"]
    path = write_list(tmp_path / "d" / "l.txt", *lines)
    for options in ({}, {"max_depth_m": "50"}):
        packed = importing("file-list", path, **options)
        assert list(packed.members) == ["rgb/h"]
        assert packed.report.skipped == {
            "missing_depth": ["rgb/a.jpg", "rgb/b.jpg"],
            "unreadable_depth": ["rgb/c.jpg", "rgb/d.jpg", "rgb/e.jpg", "rgb/i.jpg"],
            "depth_size_differs": ["rgb/f.jpg"],
            "unknown_depth_format": ["rgb/g.jpg"],
            "missing_image": ["rgb/none.jpg"],
        }


def test_what_is_no_list_is_refused(tmp_path: Path, importing: Importing) -> None:
    pair(tmp_path / "d")
    with pytest.raises(DataError, match="name the text file"):
        importing("file-list", tmp_path / "d")
    with pytest.raises(DataError, match="no text"):
        importing("file-list", tmp_path / "d" / "rgb" / "a.jpg")
    with pytest.raises(DataError, match="no line"):
        importing("file-list", write_list(tmp_path / "d" / "empty.txt", "# nothing"))
    for line in ("rgb/a.jpg", "my rgb/a.jpg depth/a.png", "rgb/a.jpg depth/a.png near", ",depth/a.png"):
        with pytest.raises(DataError, match=r"line 2 is .* separate them by tabs or commas"):
            importing("file-list", write_list(tmp_path / "d" / "l.txt", "rgb/a.jpg depth/a.png", line))
    with pytest.raises(DataError, match=r"none of its 1 images is there, .*/d/x/a.jpg: name the folder"):
        importing("file-list", write_list(tmp_path / "d" / "l.txt", "/x/a.jpg /x/a.png"))
    with pytest.raises(DataError, match="check base"):
        importing("file-list", write_list(tmp_path / "d" / "l.txt", "rgb/a.jpg depth/a.png"), base="/no/such")
    with pytest.raises(DataError, match="layout hypersim"):
        importing("file-list", write_list(tmp_path / "d" / "l.txt", "rgb/a.jpg frame.0000.depth_meters.hdf5"))
