"""Virtual KITTI 2: trees written with Pillow and plain text. Shape suffixes: H W pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataio.spec import DataError
from tests.dataio.importers.conftest import Importing, write_image, write_png16

SKY = 65535


def centimetres(number: int = 0) -> np.ndarray:
    """The first row is sky; below it lie 1 to 88 times 250 cm, and `number` more; the last is just before the sky."""
    code_HW = (np.arange(96).reshape(8, 12) - 11) * 250 + number
    code_HW[0] = SKY
    code_HW[7, 11] = SKY - 1
    return code_HW


def frame(rgb: Path, depth: Path, inside: str, camera: int, number: int, code_HW: np.ndarray | None = None) -> bytes:
    """One frame in the folders of the two downloads; returns the photograph's bytes."""
    code_HW = centimetres(number) if code_HW is None else code_HW
    write_png16(depth / inside / "frames" / "depth" / f"Camera_{camera}" / f"depth_{number:05d}.png", code_HW)
    name = f"Camera_{camera}/rgb_{number:05d}.jpg"
    return write_image(rgb / inside / "frames" / "rgb" / name, seed=10 * number + camera)


def key(number: int, camera: int = 0, inside: str = "Scene01/clone") -> str:
    return f"{inside}/Camera_{camera}/rgb_{number:05d}"


def test_sky_becomes_a_mask_and_no_depth(tmp_path: Path, importing: Importing) -> None:
    root = tmp_path / "v"
    images = [frame(root, root, "Scene01/clone", 0, number) for number in (0, 1)]
    packed = importing("vkitti2", root)
    assert list(packed.members) == [key(0), key(1)] and packed.report.skipped == {}
    for number, image in enumerate(images):
        assert packed.members[key(number)]["jpg"] == image
        sky_HW = np.arange(96).reshape(8, 12) < 12
        np.testing.assert_array_equal(packed.sky(key(number)), sky_HW)
        value_HW = packed.value(key(number))
        np.testing.assert_allclose(value_HW, np.where(sky_HW, np.nan, centimetres(number) / 100), rtol=1e-6)
        assert value_HW[1, 0] == pytest.approx(2.5 + number / 100) and value_HW[7, 11] == pytest.approx(655.34)


def test_a_map_without_sky_is_copied(tmp_path: Path, importing: Importing) -> None:
    root = tmp_path / "v"
    frame(root, root, "Scene01/clone", 0, 0, np.full((8, 12), 4000))
    packed = importing("vkitti2", root, max_depth_m="40")
    original = root / "Scene01/clone/frames/depth/Camera_0/depth_00000.png"
    assert packed.members[key(0)]["depth.png"] == original.read_bytes()
    assert not packed.sky(key(0)).any()


def test_far_values_become_holes_and_no_sky(tmp_path: Path, importing: Importing) -> None:
    root = tmp_path / "v"
    frame(root, root, "Scene01/clone", 0, 0)
    packed = importing("vkitti2", root, max_depth_m="80")
    code_HW = centimetres()
    np.testing.assert_allclose(packed.value(key(0)), np.where(code_HW <= 8000, code_HW / 100, np.nan), rtol=1e-6)
    np.testing.assert_array_equal(packed.sky(key(0)), code_HW == SKY)


def test_downloads_side_by_side(tmp_path: Path, importing: Importing) -> None:
    root = tmp_path / "v"
    rgb, depth, text = (root / f"vkitti_2.0.3_{name}" for name in ("rgb", "depth", "textgt"))
    frame(rgb, depth, "Scene20/15-deg-left", 1, 3)
    (text / "Scene20" / "15-deg-left").mkdir(parents=True)
    lines = ["frame cameraID K[0,0] K[1,1] K[0,2] K[1,2]", "3 0 725.0 9 620.5 187", "3 1 725.0087 9 620.5 187"]
    (text / "Scene20" / "15-deg-left" / "intrinsic.txt").write_text("\n".join(lines))
    packed = importing("vkitti2", root)
    assert list(packed.members) == [key(3, 1, "Scene20/15-deg-left")]
    assert packed.meta(key(3, 1, "Scene20/15-deg-left")) == {"focal_px": 725.0087}


def test_options_select(tmp_path: Path, importing: Importing) -> None:
    root = tmp_path / "v"
    insides = ("Scene01/clone", "Scene01/fog", "Scene02/clone", "Scene02/rain")
    for inside in insides:
        for camera in (0, 1):
            frame(root, root, inside, camera, 0)
    everything = [key(0, camera, inside) for inside in insides for camera in (0, 1)]
    assert list(importing("vkitti2", root).members) == everything
    assert list(importing("vkitti2", root, camera="1").members) == everything[1::2]
    some = importing("vkitti2", root, camera="0", variants="clone, rain")
    assert list(some.members) == [everything[0], everything[4], everything[6]]
    with pytest.raises(DataError, match="variants: 'snow' is not there, there are clone, fog, rain"):
        importing("vkitti2", root, variants="snow")


def test_what_is_missing_or_damaged_is_counted(tmp_path: Path, importing: Importing) -> None:
    root = tmp_path / "v"
    for number in range(5):
        frame(root, root, "Scene01/clone", 0, number)
    frame(root, tmp_path / "lost", "Scene01/fog", 0, 0)
    depth = root / "Scene01/clone/frames/depth/Camera_0"
    (depth / "depth_00000.png").unlink()
    (depth / "depth_00001.png").write_bytes(b"no")
    Image.new("L", (12, 8), 9).save(depth / "depth_00002.png")
    write_png16(depth / "depth_00003.png", np.full((8, 12), SKY))
    packed = importing("vkitti2", root)
    assert list(packed.members) == [key(4)]
    assert {reason: len(names) for reason, names in packed.report.skipped.items()} == {
        "missing_depth": 2,
        "unreadable_depth": 1,
        "depth_not_16_bit": 1,
        "no_valid_depth": 1,
    }


def test_what_is_not_this_layout_is_refused(tmp_path: Path, importing: Importing) -> None:
    root = tmp_path / "v"
    write_image(root / "a.png")
    for path in (root, root / "a.png"):
        with pytest.raises(DataError, match=r"no Scene01/clone/frames/rgb.* vkitti_2\.0\.3_rgb is unpacked"):
            importing("vkitti2", path)
    frame(root, tmp_path / "lost", "Scene01/clone", 0, 0)
    with pytest.raises(DataError, match=r"no Scene01/clone/frames/depth.* vkitti_2\.0\.3_depth is unpacked"):
        importing("vkitti2", root)
