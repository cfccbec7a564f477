"""TUM RGB-D: trees written with plain text and Pillow. Shape suffixes: H W pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dataio.spec import DataError
from tests.dataio.importers.conftest import Importing, write_image, write_png16


def sequence(folder: Path, rgb: list[float], depth: list[float]) -> dict[str, bytes]:
    """Lists with the dataset's three lines of comment, and their files; returns the photographs' bytes."""
    images = {}
    for name, times in (("rgb", rgb), ("depth", depth)):
        lines = ["# color images", "# file: 'x.bag'", "# timestamp filename"]
        for time in times:
            path = folder / name / f"{time:.6f}.png"
            if name == "rgb":
                images[path.stem] = write_image(path, seed=int(time * 100))
            else:
                write_png16(path, np.full((8, 12), int(time * 1000)))
            lines.append(f"{time:.6f} {name}/{time:.6f}.png")
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n")
    return images


def test_frames_are_joined_by_the_nearest_time(tmp_path: Path, importing: Importing) -> None:
    folder = tmp_path / "rgbd_dataset_freiburg2_desk"
    images = sequence(folder, rgb=[10.0, 10.03, 10.10, 11.0], depth=[9.99, 10.015, 10.045, 10.10, 10.9])
    packed = importing("tum", folder)
    # 10.0 is as near to 9.99 as it gets (0.01), 10.03 has two at 0.015, 11.0 has none within 0.02
    assert packed.report.skipped == {"missing_depth": ["rgb/11.000000.png"]}
    metres = {key: float(packed.value(key)[0, 0]) for key in packed.members}
    wanted = {"rgb/10_000000": 9.990 / 5, "rgb/10_030000": 2.003, "rgb/10_100000": 2.02}
    assert metres == pytest.approx(wanted, abs=1e-6)
    assert packed.members["rgb/10_000000"]["png"] == images["10.000000"]
    assert packed.meta("rgb/10_000000") == {"focal_px": 520.9}


def test_a_folder_of_sequences_and_another_tolerance(tmp_path: Path, importing: Importing) -> None:
    sequence(tmp_path / "all" / "a", rgb=[1.0], depth=[1.5])
    sequence(tmp_path / "all" / "b", rgb=[1.0], depth=[1.0])
    packed = importing("tum", tmp_path / "all", max_difference="0.6")
    assert sorted(packed.members) == ["a/rgb/1_000000", "b/rgb/1_000000"]
    assert packed.meta("a/rgb/1_000000") == {}  # no camera in the name: no focal length is invented


def test_holes_stay_holes(tmp_path: Path, importing: Importing) -> None:
    sequence(tmp_path / "s", rgb=[1.0], depth=[1.0])
    codes = np.arange(96).reshape(8, 12) * 600
    write_png16(tmp_path / "s" / "depth" / "1.000000.png", codes)
    value_HW = importing("tum", tmp_path / "s").value("rgb/1_000000")
    assert np.isnan(value_HW[0, 0]) and np.isfinite(value_HW).sum() == 95
    np.testing.assert_allclose(value_HW.ravel()[1:], codes.ravel()[1:] / 5000, rtol=1e-6)


def test_what_is_not_this_layout_is_refused(tmp_path: Path, importing: Importing) -> None:
    (tmp_path / "s").mkdir()
    with pytest.raises(DataError, match=r"no rgb\.txt"):
        importing("tum", tmp_path / "s")
    (tmp_path / "s" / "rgb.txt").write_text("1.0 rgb/1.png\n")
    with pytest.raises(DataError, match=r"depth\.txt: missing"):
        importing("tum", tmp_path / "s")
    (tmp_path / "s" / "depth.txt").write_text("soon depth/1.png\n")
    with pytest.raises(DataError, match="timestamp"):
        importing("tum", tmp_path / "s")
