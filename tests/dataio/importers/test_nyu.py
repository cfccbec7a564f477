"""NYU Depth V2, labelled: a MATLAB 7.3 file written with h5py, element by element. Shape suffixes: N samples, H W."""

from __future__ import annotations

import io
import pickle
from pathlib import Path

import h5py
import numpy as np
import pytest
import scipy.io
from PIL import Image

from dataio.importers.nyu import Nyu, NyuOptions
from dataio.spec import DataError
from tests.dataio.importers.conftest import Importing

FILE = "nyu_depth_v2_labeled.mat"
COUNT, HEIGHT, WIDTH = 4, 8, 12


def colour(n: int, y: int, x: int) -> tuple[int, int, int]:
    return 40 * n + y, 10 * x + n, 200 - 7 * y - n


def metres(n: int, y: int, x: int) -> float:
    return 1 + 2 * n + y / 16 + x / 256


def labelled(folder: Path) -> Path:
    """images and depths as MATLAB saves H W 3 N and H W N: axes reversed, behind a block of 512 bytes."""
    images, depths = np.zeros((COUNT, 3, WIDTH, HEIGHT), np.uint8), np.zeros((COUNT, WIDTH, HEIGHT), np.float32)
    for n, y, x in np.ndindex(COUNT, HEIGHT, WIDTH):
        images[n, :, x, y] = colour(n, y, x)
        depths[n, x, y] = metres(n, y, x)
    raw = depths + np.float32(0.5)
    raw[:, 3, 1] = 0  # column 3, row 1: not measured
    raw[:, 4, 1] = 10  # beyond what the toolbox keeps
    raw[:, 5, 1] = 9.96875
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / FILE
    with h5py.File(path, "w", userblock_size=512) as file:
        for name, value in (("images", images), ("depths", depths), ("rawDepths", raw)):
            file.create_dataset(name, data=value, chunks=(1, *value.shape[1:]), compression="gzip", fletcher32=True)
        file["accelData"] = np.zeros((4, COUNT))
    return path


def splits(folder: Path, train: list[int], test: list[int]) -> None:
    columns = {"trainNdxs": train, "testNdxs": test}
    scipy.io.savemat(folder / "splits.mat", {k: np.array(v, np.uint16)[:, None] for k, v in columns.items()})


def break_chunk(path: Path, dataset: str, index: int) -> None:
    """Turn a byte in one sample's part of the file."""
    with h5py.File(path, "r") as file:
        _, chunk = file[dataset].id.read_direct_chunk((index, 0, 0, 0)[: file[dataset].ndim])
    data = path.read_bytes()
    assert data.count(chunk) == 1
    data = data.replace(chunk, chunk[:12] + bytes([chunk[12] ^ 0xFF]) + chunk[13:])
    path.write_bytes(data)


def test_pixels_and_metres(tmp_path: Path, importing: Importing) -> None:
    labelled(tmp_path / "n")
    packed = importing("nyu", tmp_path / "n")
    assert sorted(packed.members) == ["0001", "0002", "0003", "0004"]
    for n in range(COUNT):
        pixels = np.asarray(Image.open(io.BytesIO(packed.members[f"{n + 1:04d}"]["png"])))
        value_HW = packed.value(f"{n + 1:04d}")
        assert pixels.shape == (HEIGHT, WIDTH, 3) and value_HW.shape == (HEIGHT, WIDTH)
        for y, x in np.ndindex(HEIGHT, WIDTH):
            assert tuple(pixels[y, x]) == colour(n, y, x)
            assert value_HW[y, x] == pytest.approx(metres(n, y, x), abs=1e-4)
    assert packed.meta("0001")["focal_px"] == 518.8579
    assert packed.info.quantity == "depth_m"


def test_raw_depth_has_holes(tmp_path: Path, importing: Importing) -> None:
    packed = importing("nyu", labelled(tmp_path / "n"), depth="raw")
    value_HW = packed.value("0003")
    assert value_HW[0, 0] == pytest.approx(metres(2, 0, 0) + 0.5, abs=1e-4)
    assert np.isnan(value_HW[1, 3]) and np.isnan(value_HW[1, 4]) and np.isnan(value_HW).sum() == 2
    assert value_HW[1, 5] == pytest.approx(9.96875, abs=1e-4)


def test_splits_count_from_one(tmp_path: Path, importing: Importing) -> None:
    path = labelled(tmp_path / "n")
    splits(tmp_path / "n", train=[4, 1], test=[2, 3])
    assert sorted(importing("nyu", path, split="train").members) == ["0001", "0004"]
    packed = importing("nyu", tmp_path / "n", split="test")
    assert sorted(packed.members) == ["0002", "0003"]
    assert packed.value("0002")[0, 0] == pytest.approx(metres(1, 0, 0), abs=1e-4)
    assert len(importing("nyu", path).members) == COUNT


def test_a_damaged_sample_is_left_out(tmp_path: Path, importing: Importing) -> None:
    path = labelled(tmp_path / "n")
    break_chunk(path, "depths", 1)
    break_chunk(path, "images", 2)
    packed = importing("nyu", path)
    assert packed.report.skipped == {"unreadable_depth": [f"{FILE} 0002"], "unreadable_image": [f"{FILE} 0003"]}
    assert sorted(packed.members) == ["0001", "0004"]


def test_it_is_sent_to_other_processes(tmp_path: Path) -> None:
    importer = Nyu(str(labelled(tmp_path / "n")), NyuOptions(depth="raw"))
    entry = list(importer.entries())[1]
    sent = pickle.loads(pickle.dumps((importer, entry)))
    value_HW = sent[0].read(sent[1]).value_HW
    assert value_HW is not None and value_HW[0, 0] == pytest.approx(metres(1, 0, 0) + 0.5)


def test_what_is_not_this_layout_is_refused(tmp_path: Path, importing: Importing) -> None:
    folder = tmp_path / "n"
    folder.mkdir()
    with pytest.raises(DataError, match=f"{FILE}: missing"):
        importing("nyu", folder)
    (folder / FILE).write_bytes(b"no")
    with pytest.raises(DataError, match="not the labelled file"):
        importing("nyu", folder)
    with h5py.File(folder / FILE, "w") as file:
        file["images"] = np.zeros((2, 3, 4, 5), np.uint8)
    with pytest.raises(DataError, match="not the labelled file"):
        importing("nyu", folder)
    with h5py.File(folder / FILE, "a") as file:
        file["depths"], file["rawDepths"] = np.zeros((2, 4, 5)), np.zeros((2, 5, 4))
    with pytest.raises(DataError, match="has the shape"):
        importing("nyu", folder)


def test_a_split_needs_its_file(tmp_path: Path, importing: Importing) -> None:
    path = labelled(tmp_path / "n")
    with pytest.raises(DataError, match=r"splits\.mat: missing"):
        importing("nyu", path, split="train")
    (path.parent / "splits.mat").write_bytes(b"no")
    with pytest.raises(DataError, match="no trainNdxs can be read"):
        importing("nyu", path, split="train")
    scipy.io.savemat(path.parent / "splits.mat", {"trainNdxs": [[1]]})
    with pytest.raises(DataError, match="no testNdxs can be read"):
        importing("nyu", path, split="test")
    for wrong in (0, COUNT + 1):
        splits(path.parent, train=[1, wrong], test=[2])
        with pytest.raises(DataError, match="does not fit"):
            importing("nyu", path, split="train")
