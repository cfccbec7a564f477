"""MegaDepth: trees written with h5py, and lists as Python 2 pickled them. Shape suffixes: H W pixels."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import h5py
import numpy as np
import pytest

from dataio.importers import get_importer
from dataio.spec import DataError
from tests.dataio.importers.conftest import Importing, ramp, write_image


def add(root: Path, name: str, depth_HW: np.ndarray | None = None, dense: str = "0000/dense0") -> bytes:
    """A photograph and its depth in a file of its own. Returns the photograph's bytes."""
    image = write_image(root / dense / "imgs" / name, seed=sum(name.encode()))
    depths = root / dense / "depths"
    depths.mkdir(parents=True, exist_ok=True)
    with h5py.File(depths / f"{name.rsplit('.', 1)[0]}.h5", "w") as file:
        file["depth"] = ramp() if depth_HW is None else depth_HW
    return image


def write_list(path: Path, names: list[str]) -> str:
    """A list of texts as pickle's protocol 0 writes it."""
    path.write_bytes(b"(lp0\n" + b"".join(f"S'{name}'\na".encode() for name in names) + b".")
    return str(path)


def test_depth_in_the_scenes_unit(tmp_path: Path, importing: Importing) -> None:
    depth_HW = ramp(low=0.4, high=9.9)
    depth_HW[2, 5] = 0
    root = tmp_path / "MegaDepth_v1"
    image = add(root, "4553_8a2b_o.jpg", depth_HW)
    packed = importing("megadepth", root)
    key = "0000/dense0/imgs/4553_8a2b_o"
    assert list(packed.members) == [key] and packed.members[key]["jpg"] == image
    assert packed.info.quantity == "depth_m" and packed.meta(key)["unit"] == "scene"
    value_HW = packed.value(key)
    assert [tuple(at) for at in np.argwhere(np.isnan(value_HW))] == [(2, 5)]
    for row, column in ((0, 0), (0, 11), (7, 0), (7, 11), (3, 4)):
        assert value_HW[row, column] == pytest.approx(0.4 + 9.5 * (row * 12 + column) / 95, abs=1e-3)


def test_all_parts_of_all_scenes_in_order(tmp_path: Path, importing: Importing) -> None:
    places = [("0001/dense0", "a.jpg"), ("0000/dense1", "a.b.JPG"), ("0000/dense0", "b.png"), ("0000/dense0", "a.jpg")]
    for number, (dense, name) in enumerate(places):
        add(tmp_path / "m", name, ramp(low=number + 1.5, high=number + 2), dense)
    (tmp_path / "m" / "0000" / "dense0" / "imgs" / "notes.txt").write_text("no photograph")
    keys = ["0000/dense0/imgs/a", "0000/dense0/imgs/b", "0000/dense1/imgs/a_b", "0001/dense0/imgs/a"]
    assert [entry.key for entry in get_importer("megadepth")(str(tmp_path / "m")).entries()] == keys
    packed = importing("megadepth", tmp_path / "m")
    assert [packed.value(key)[0, 0] for key in keys] == pytest.approx([4.5, 3.5, 2.5, 1.5], rel=1e-4)


def test_a_wide_range_keeps_its_precision(tmp_path: Path, importing: Importing) -> None:
    """The scale is arbitrary: a map may span what 16 bits cannot, or lie below what half precision holds."""
    wide_HW = np.geomspace(1e-7, 1e-3, 96).astype(np.float32).reshape(8, 12)
    add(tmp_path / "m", "a.jpg", wide_HW)
    np.testing.assert_array_equal(importing("megadepth", tmp_path / "m").value("0000/dense0/imgs/a"), wide_HW)


def test_an_official_list_chooses(tmp_path: Path, importing: Importing) -> None:
    root = tmp_path / "m"
    for name in "abc":
        add(root, f"{name}.jpg")
    listed = write_list(
        tmp_path / "imgs_MD.p", ["/0000/dense0/imgs/c.jpg", "0000/dense0/imgs/a.jpg", "0000/dense0/imgs/gone.jpg"]
    )
    packed = importing("megadepth", root, list_file=listed)
    assert list(packed.members) == ["0000/dense0/imgs/a", "0000/dense0/imgs/c"]
    assert packed.report.skipped == {"missing_image": ["0000/dense0/imgs/gone.jpg"]}


def test_a_list_that_is_none_is_refused(tmp_path: Path, importing: Importing) -> None:
    add(tmp_path / "m", "a.jpg")
    path = tmp_path / "imgs_MD.p"
    for content in (b"", b"0000/dense0/imgs/a.jpg\n", pickle.dumps([1]), pickle.dumps(7), pickle.dumps(os.getcwd)):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"list_file: .*imgs_MD\.p: no pickled list of texts"):
            importing("megadepth", tmp_path / "m", list_file=str(path))
    for names in ([], ["0000/dense0/depths/a.h5"], ["a.jpg"]):
        with pytest.raises(DataError, match=r"it must list SCENE/denseN/imgs/NAME\.jpg"):
            importing("megadepth", tmp_path / "m", list_file=write_list(path, names))
    with pytest.raises(DataError, match=r"list_file: .*gone: cannot be read"):
        importing("megadepth", tmp_path / "m", list_file=str(tmp_path / "gone"))


def test_a_list_runs_no_code(tmp_path: Path, importing: Importing) -> None:
    add(tmp_path / "m", "a.jpg")
    path, mark = tmp_path / "imgs_MD.p", tmp_path / "mark"
    path.write_bytes(f"cos\nmkdir\n(S'{mark}'\ntR.".encode())
    with pytest.raises(DataError, match=r"it holds os\.mkdir"):
        importing("megadepth", tmp_path / "m", list_file=str(path))
    assert not mark.exists()


def test_a_bad_sample_is_left_out_and_named(tmp_path: Path, importing: Importing) -> None:
    root = tmp_path / "m"
    for name in "abcdefgh":
        add(root, f"{name}.jpg")
    depths = root / "0000" / "dense0" / "depths"
    (depths / "b.h5").unlink()
    (depths / "c.h5").write_bytes((depths / "a.h5").read_bytes()[:300])
    ordinal_HW = np.zeros((8, 12), np.float32)
    ordinal_HW[:2], ordinal_HW[5:] = -1, 2.5
    add(root, "d.jpg", ordinal_HW)
    add(root, "e.jpg", np.float32(np.arange(96).reshape(8, 12) % 4))
    add(root, "f.jpg", np.zeros((8, 12), np.float32))
    add(root, "g.jpg", ramp((12, 9)))
    add(root, "h.jpg", ramp()[None])
    packed = importing("megadepth", root)
    assert list(packed.members) == ["0000/dense0/imgs/a"]
    name = "0000/dense0/imgs/{}.jpg".format
    assert packed.report.skipped == {
        "missing_depth": [name("b")],
        "unreadable_depth": [name("c"), name("h")],
        "ordinal_depth": [name("d"), name("e")],
        "no_valid_depth": [name("f")],
        "depth_size_differs": [name("g")],
    }


def test_what_is_not_this_layout_is_refused(tmp_path: Path, importing: Importing) -> None:
    add(tmp_path / "phoenix" / "S6" / "zl548" / "MegaDepth_v1", "a.jpg")
    with pytest.raises(DataError, match=r"name the folder MegaDepth_v1, .* below phoenix/S6/zl548"):
        importing("megadepth", tmp_path / "phoenix")
