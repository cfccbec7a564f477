"""IRS: disparity written with OpenEXR. Shape suffixes: H W pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import OpenEXR
import pytest

from dataio.spec import DataError
from tests.dataio.importers.conftest import Importing, ramp, write_image


def write_exr(path: Path, **channels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    header = {"compression": OpenEXR.ZIP_COMPRESSION, "type": OpenEXR.scanlineimage}
    OpenEXR.File(header, {name: value_HW.astype(np.float32) for name, value_HW in channels.items()}).write(str(path))


def frame(scene: Path, number: str, disparity_HW: np.ndarray) -> bytes:
    """A pair with disparity and normals; returns the left photograph's bytes."""
    write_exr(scene / f"d_{number}.exr", G=disparity_HW)
    write_exr(scene / f"n_{number}.exr", R=ramp(), G=ramp(), B=ramp())
    write_image(scene / f"r_{number}.png", seed=int(number) + 500)
    return write_image(scene / f"l_{number}.png", seed=int(number))


def test_the_left_picture_and_its_disparity(tmp_path: Path, importing: Importing) -> None:
    maps = {"2": ramp(high=90), "10": ramp(low=7)}
    maps["2"][0, :4] = np.nan, np.inf, 0.0, -1.0
    images = {number: frame(tmp_path / "all" / "Home" / "hall_l_1", number, maps[number]) for number in maps}
    packed = importing("irs", tmp_path / "all")
    keys = {number: f"Home/hall_l_1/l_{number}" for number in maps}
    assert set(packed.members) == set(keys.values()) and packed.info.quantity == "disparity"
    assert {number: packed.members[key]["png"] for number, key in keys.items()} == images
    value_HW = packed.value(keys["2"])
    assert np.isnan(value_HW[0, :4]).all() and np.isfinite(value_HW).sum() == 92
    np.testing.assert_allclose(value_HW.ravel()[4:], maps["2"].ravel()[4:], atol=1e-3)  # pixels, from the top
    np.testing.assert_allclose(packed.value(keys["10"]), maps["10"], atol=1e-3)
    meta = packed.meta(keys["10"])
    assert (meta["baseline_m"], meta["focal_px"]) == (0.1, 480.0)


def test_of_three_channels_green_counts(tmp_path: Path, importing: Importing) -> None:
    scene = tmp_path / "all" / "scene"
    frame(scene, "1", ramp())
    write_exr(scene / "d_1.exr", R=ramp(high=50), G=ramp(low=2), B=ramp(high=70))
    np.testing.assert_allclose(importing("irs", tmp_path / "all").value("scene/l_1"), ramp(low=2), atol=1e-3)


@pytest.mark.parametrize("above", ["", "scene", "Store/scene", "IRSDataset/Store/scene"])
def test_the_root_may_be_the_dataset_or_a_scene(tmp_path: Path, importing: Importing, above: str) -> None:
    frame(tmp_path / "all" / above, "00001", ramp())
    assert list(importing("irs", tmp_path / "all").members) == [f"{above}/l_00001".lstrip("/")]


def test_a_list_chooses_pictures(tmp_path: Path, importing: Importing) -> None:
    for number in ("1", "2", "3"):
        frame(tmp_path / "all" / "Home" / "a", number, ramp())
    listing = tmp_path / "IRSDataset_TEST.list"
    lines = [f"Home/a/l_{n}.png Home/a/r_{n}.png Home/a/d_{n}.exr Home/a/n_{n}.exr" for n in (3, 1)]
    listing.write_text("\t\n".join(lines) + "\t\n\n")
    packed = importing("irs", tmp_path / "all", split_file=str(listing))
    assert list(packed.members) == ["Home/a/l_1", "Home/a/l_3"]
    with pytest.raises(DataError, match=r"name the folder from which paths such as 'Home/a/l_3\.png' lead on"):
        importing("irs", tmp_path / "all" / "Home", split_file=str(listing))
    with pytest.raises(DataError, match="none: cannot be read"):
        importing("irs", tmp_path / "all", split_file=str(tmp_path / "none"))


def test_what_is_damaged_is_skipped(tmp_path: Path, importing: Importing) -> None:
    scene = tmp_path / "all" / "Home" / "a"
    for number in ("1", "2", "3", "4"):
        frame(scene, number, ramp())
    (scene / "d_1.exr").unlink()
    (scene / "d_2.exr").write_bytes((scene / "d_2.exr").read_bytes()[:60])
    (scene / "l_3.png").write_bytes(b"no PNG")
    packed = importing("irs", tmp_path / "all")
    assert packed.report.skipped == {
        "missing_depth": ["Home/a/l_1.png"],
        "unreadable_depth": ["Home/a/l_2.png"],
        "unreadable_image": ["Home/a/l_3.png"],
    }
    assert list(packed.members) == ["Home/a/l_4"]


def test_what_is_not_this_layout_is_refused(tmp_path: Path, importing: Importing) -> None:
    write_image(tmp_path / "all" / "Home" / "a" / "0001.png")
    with pytest.raises(DataError, match=r"no Home/SCENE/l_N\.png"):
        importing("irs", tmp_path / "all")
