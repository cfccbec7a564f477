"""TartanAir: version 1 written with numpy, version 2 with struct and Pillow. Shape suffixes: H W pixels, C channel."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataio.spec import DataError
from tests.dataio.importers.conftest import Importing, ramp, write_image


def frame_v1(trajectory: Path, side: str, number: int, value_HW: np.ndarray) -> bytes:
    """Returns the photograph's bytes."""
    for kind in ("depth", "seg"):
        (trajectory / f"{kind}_{side}").mkdir(parents=True, exist_ok=True)
    stem = f"{number:06d}_{side}"
    np.save(trajectory / f"depth_{side}" / f"{stem}_depth.npy", value_HW.astype(np.float32))
    np.save(trajectory / f"seg_{side}" / f"{stem}_seg.npy", np.zeros((8, 12), np.uint8))
    return write_image(trajectory / f"image_{side}" / f"{stem}.png", seed=number + 100 * (side == "right"))


def frame_v2(trajectory: Path, camera: str, number: int, value_HW: np.ndarray) -> bytes:
    """The four bytes of a little-endian float32 are blue, green, red, alpha. Returns the photograph's bytes."""
    height, width = value_HW.shape
    packed = Image.new("RGBA", (width, height))
    for row in range(height):
        for column in range(width):
            blue, green, red, alpha = struct.pack("<f", value_HW[row, column])
            packed.putpixel((column, row), (red, green, blue, alpha))
    (trajectory / f"depth_{camera}").mkdir(parents=True, exist_ok=True)
    packed.save(trajectory / f"depth_{camera}" / f"{number:06d}_{camera}_depth.png")
    return write_image(trajectory / f"image_{camera}" / f"{number:06d}_{camera}.png", seed=number)


def far(value_HW: np.ndarray) -> np.ndarray:
    """The map with sky in two pixels and a hole in a third."""
    value_HW = value_HW.copy()
    value_HW[0, :3] = 12000.0, 10000.5, 0.0
    return value_HW


def test_version_1(tmp_path: Path, importing: Importing) -> None:
    images = [frame_v1(tmp_path / "all" / "office" / "Easy" / "P001", "left", n, ramp(low=1 + n)) for n in range(3)]
    packed = importing("tartanair", tmp_path / "all")
    keys = [f"office/Easy/P001/image_left/{n:06d}_left" for n in range(3)]
    assert list(packed.members) == keys and packed.info.quantity == "depth_m"
    for number, key in enumerate(keys):
        assert packed.members[key]["png"] == images[number]
        np.testing.assert_allclose(packed.value(key), ramp(low=1 + number), atol=1e-4)
        assert packed.meta(key)["focal_px"] == 320.0


def test_version_2(tmp_path: Path, importing: Importing) -> None:
    trajectory = tmp_path / "all" / "Office" / "Data_hard" / "P000"
    image = frame_v2(trajectory, "lcam_front", 4, far(ramp(low=0.7)))
    frame_v2(trajectory, "lcam_back", 4, ramp())  # looks elsewhere
    packed = importing("tartanair", tmp_path / "all", max_depth_m="10000")
    key = "Office/Data_hard/P000/image_lcam_front/000004_lcam_front"
    assert list(packed.members) == [key] and packed.members[key]["png"] == image
    value_HW = packed.value(key)
    assert np.isnan(value_HW[0, :3]).all() and np.isfinite(value_HW).sum() == 93
    np.testing.assert_allclose(value_HW.ravel()[3:], ramp(low=0.7).ravel()[3:], atol=1e-4)


def test_sky_is_kept_unless_there_is_a_limit(tmp_path: Path, importing: Importing) -> None:
    frame_v1(tmp_path / "all" / "a" / "Easy" / "P000", "left", 0, far(ramp()))
    key = "a/Easy/P000/image_left/000000_left"
    value_HW = importing("tartanair", tmp_path / "all").value(key)
    np.testing.assert_allclose(value_HW[0, :2], (12000.0, 10000.5), rtol=1e-3)
    assert np.isnan(value_HW[0, 2]) and np.isfinite(value_HW).sum() == 95
    value_HW = importing("tartanair", tmp_path / "all", max_depth_m="3").value(key)
    wanted_HW = far(ramp())
    assert np.array_equal(np.isfinite(value_HW), (wanted_HW > 0) & (wanted_HW <= 3))


def test_options_choose_cameras_and_difficulties(tmp_path: Path, importing: Importing) -> None:
    for level in ("Easy", "Hard"):
        for side in ("left", "right"):
            frame_v1(tmp_path / "all" / "a" / level / "P000", side, 0, ramp())
    for level in ("Data_easy", "Data_hard"):
        for camera in ("lcam_front", "rcam_front"):
            frame_v2(tmp_path / "all" / "B" / level / "P000", camera, 0, ramp())

    def packed(**options: str) -> set[str]:
        names = (key.split("/") for key in importing("tartanair", tmp_path / "all", **options).members)
        return {f"{name[1]} {name[3].removeprefix('image_')}" for name in names}

    assert packed(difficulty="easy") == {"Easy left", "Data_easy lcam_front"}
    assert packed(camera="right", difficulty="hard") == {"Hard right", "Data_hard rcam_front"}
    assert len(packed(camera="both")) == 8 and len(packed()) == 4


@pytest.mark.parametrize("above", ["", "office", "office/office"])
def test_the_root_may_be_an_environment_or_hold_some(tmp_path: Path, importing: Importing, above: str) -> None:
    frame_v1(tmp_path / "all" / above / "Hard" / "P002", "left", 0, ramp())
    packed = importing("tartanair", tmp_path / "all")
    assert list(packed.members) == [f"{above}/Hard/P002/image_left/000000_left".lstrip("/")]


def test_what_is_damaged_is_skipped(tmp_path: Path, importing: Importing) -> None:
    one, two = tmp_path / "all" / "a" / "Easy" / "P000", tmp_path / "all" / "b" / "Data_easy" / "P000"
    for number in range(3):
        frame_v1(one, "left", number, ramp())
        frame_v2(two, "lcam_front", number, ramp())
    (one / "depth_left" / "000000_left_depth.npy").unlink()
    (one / "depth_left" / "000001_left_depth.npy").write_bytes(b"no numpy")
    (two / "depth_lcam_front" / "000000_lcam_front_depth.png").write_bytes(b"no PNG")
    Image.new("RGB", (12, 8)).save(two / "depth_lcam_front" / "000001_lcam_front_depth.png")
    packed = importing("tartanair", tmp_path / "all")
    counts = {reason: len(names) for reason, names in packed.report.skipped.items()}
    assert counts == {"missing_depth": 1, "unreadable_depth": 3}
    names = ["a/Easy/P000/image_left/000002_left", "b/Data_easy/P000/image_lcam_front/000002_lcam_front"]
    assert list(packed.members) == names


def test_what_is_not_this_layout_is_refused(tmp_path: Path, importing: Importing) -> None:
    (tmp_path / "all").mkdir()
    with pytest.raises(DataError, match="name the folder of TartanAir's environments"):
        importing("tartanair", tmp_path / "all")
    frame_v1(tmp_path / "all" / "a" / "Easy" / "P000", "left", 0, ramp())
    with pytest.raises(DataError, match="of the camera 'right'"):
        importing("tartanair", tmp_path / "all", camera="right")
    with pytest.raises(DataError, match="max_depth_m"):
        importing("tartanair", tmp_path / "all", max_depth_m="0")
