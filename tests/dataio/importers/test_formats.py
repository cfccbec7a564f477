"""Readers of depth files, against files that others write. Shape suffixes: H W pixels."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import h5py
import numpy as np
import OpenEXR
import pytest

from dataio.importers import formats, get_importer, layout_names
from dataio.importers.base import BadItem, Importer, as_key, parse_options
from dataio.spec import DataError
from tests.dataio.importers.conftest import ramp


@pytest.mark.parametrize("order", ["<", ">"])
def test_pfm(order: str) -> None:
    value_HW = ramp()
    data = f"Pf\n12 8\n{'-1.0' if order == '<' else '1.0'}\n".encode() + value_HW[::-1].astype(f"{order}f4").tobytes()
    assert np.array_equal(formats.read_pfm(data), value_HW)
    for broken in (data[:-1], data + b"x", b"PF" + data[2:], b"", data.replace(b"12 8", b"12"), b"Pf\n12 8\nx\n"):
        with pytest.raises(BadItem, match="unreadable_depth"):
            formats.read_pfm(broken)


def test_exr(tmp_path: Path) -> None:
    for name in ("Y", "R", "depth"):
        header = {"compression": OpenEXR.ZIP_COMPRESSION, "type": OpenEXR.scanlineimage}
        OpenEXR.File(header, {name: ramp()}).write(str(tmp_path / f"{name}.exr"))
        assert np.array_equal(formats.read_exr(tmp_path / f"{name}.exr"), ramp())
    OpenEXR.File(header, {"A": ramp(), "Z": ramp(high=9.0)}).write(str(tmp_path / "two.exr"))
    assert np.array_equal(formats.read_exr(tmp_path / "two.exr"), ramp(high=9.0))
    (tmp_path / "cut.exr").write_bytes((tmp_path / "Y.exr").read_bytes()[:60])
    for name, reason in (("cut", "unreadable_depth"), ("none", "missing_depth")):
        with pytest.raises(BadItem, match=reason):
            formats.read_exr(tmp_path / f"{name}.exr")


def test_hdf5(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file["depth"] = np.stack([ramp(), ramp(high=9.0)])
    assert np.array_equal(formats.read_hdf5(path, "depth", 1), ramp(high=9.0))
    assert formats.read_hdf5(path, "depth").shape == (2, 8, 12)
    (tmp_path / "cut.h5").write_bytes(path.read_bytes()[:100])
    for name, dataset, index, reason in (
        ("a.h5", "other", None, "unreadable_depth"),
        ("a.h5", "depth", 2, "unreadable_depth"),
        ("cut.h5", "depth", None, "unreadable_depth"),
        ("none.h5", "depth", None, "missing_depth"),
    ):
        with pytest.raises(BadItem, match=reason):
            formats.read_hdf5(tmp_path / name, dataset, index)


def test_npy() -> None:
    for value in (ramp(), ramp()[..., None]):
        file = io.BytesIO()
        np.save(file, value)
        assert np.array_equal(formats.read_npy(file.getvalue()), ramp())
    file = io.BytesIO()
    np.save(file, np.zeros((2, 3, 4)))
    for broken in (file.getvalue(), b"", b"no"):
        with pytest.raises(BadItem, match="unreadable_depth"):
            formats.read_npy(broken)


def test_holes() -> None:
    nan = np.nan
    found = formats.holes([[0.0, -1.0, nan, np.inf, 0.5, 2.0, 3.0]], high=2.0)
    np.testing.assert_array_equal(found, np.array([[nan, nan, nan, nan, 0.5, 2.0, nan]], np.float32))


def test_resize_nearest_takes_what_lies_under_the_centre() -> None:
    assert formats.resize_nearest(np.arange(4)[None], (8, 1)).tolist() == [[0, 0, 1, 1, 2, 2, 3, 3]]
    assert formats.resize_nearest(np.arange(9)[None], (3, 1)).tolist() == [[1, 4, 7]]
    assert np.array_equal(formats.resize_nearest(ramp(), (12, 8)), ramp())


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(DataError, match=r"needs h5py: pip install 'fathom-depth\[import\]'"):
        formats.read_hdf5(tmp_path / "a.h5", "depth")


def test_keys() -> None:
    assert as_key("a b/c.d/photo.0001.JPG") == "a_b/c_d/photo_0001"
    assert as_key("plain") == "plain"


@pytest.mark.parametrize("name", layout_names())
def test_every_layout_says_what_it_is(name: str) -> None:
    importer = get_importer(name)
    assert issubclass(importer, Importer) and importer.name == name
    assert importer.definition and importer.__doc__
    assert all(field.default is not None or not field.is_required() for field in importer.Options.model_fields.values())


def test_options() -> None:
    tum = get_importer("tum")
    assert parse_options(tum, {"max_difference": "0.5"}) == tum.Options(max_difference=0.5)  # type: ignore[call-arg]
    with pytest.raises(DataError, match=r"option 'max' is unknown; the layout 'tum' has the options max_difference"):
        parse_options(tum, {"max": "1"})
    with pytest.raises(DataError, match=r"option 'max_difference' is 'soon'"):
        parse_options(tum, {"max_difference": "soon"})
    with pytest.raises(DataError, match=r"layout is 'moon': there are .*folder.*tum"):
        get_importer("moon")
