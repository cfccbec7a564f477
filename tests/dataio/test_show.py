"""Contact sheets: colours that mean the same everywhere, and a row for whatever is in a dataset."""

import io

import numpy as np
import pytest
from PIL import Image

from dataio.codec import DEPTH_MM, encode_png16
from dataio.dataset import DatasetInfo
from dataio.importers.folder import Folder, FolderOptions
from dataio.labels import LabelSample, LabelStore
from dataio.pack import pack
from dataio.pack_synth import pack_synth
from dataio.shards import ShardWriter
from dataio.show import colorize, contact_sheet, save
from dataio.spec import DataError


def test_near_is_warm():
    ramp_HW = np.tile(np.linspace(0.1, 5, 50, dtype=np.float32), (4, 1))
    disparity_HWC, depth_HWC = colorize(ramp_HW), colorize(ramp_HW, quantity="depth_m")
    assert disparity_HWC.dtype == np.uint8
    assert disparity_HWC.shape == (4, 50, 3)
    red, blue = disparity_HWC[0, -1], disparity_HWC[0, 0]
    assert red[0] > red[2] + 80
    assert blue[2] > blue[0] + 60
    assert np.array_equal(depth_HWC, disparity_HWC[:, ::-1])


def test_invalid_is_grey_and_does_not_stretch_the_colours():
    value_HW = np.linspace(0, 1, 400, dtype=np.float32).reshape(20, 20)
    valid_HW = np.ones((20, 20), bool)
    valid_HW[0] = False
    wild_HW = value_HW.copy()
    wild_HW[0] = 1e9
    wild_HW[0, 3] = np.nan
    picture_HWC = colorize(wild_HW, valid_HW)
    assert np.array_equal(picture_HWC, colorize(value_HW, valid_HW))
    assert np.all(picture_HWC[0] == picture_HWC[0, 0, 0])
    assert np.ptp(picture_HWC[1].astype(int), axis=-1).min() > 0


@pytest.mark.parametrize("value", [np.full((3, 3), np.nan), np.zeros((3, 3)), np.full((3, 3), np.inf)])
def test_nothing_to_see(value):
    assert colorize(value).shape == (3, 3, 3)


@pytest.mark.parametrize("arguments", [(np.zeros(3),), (np.zeros((2, 2)), np.ones((2, 3), bool))])
def test_colorize_refuses(arguments):
    with pytest.raises(ValueError, match="one shape"):
        colorize(*arguments)


@pytest.fixture
def scenes(tmp_path):
    pack_synth("labelled", str(tmp_path / "d"), seed=1, count=5, size=56, samples_per_shard=2)
    return str(tmp_path / "d")


def test_sheet(scenes):
    sheet = contact_sheet(scenes, 3, seed=4)
    assert sheet.mode == "RGB"
    assert np.array_equal(np.array(sheet), np.array(contact_sheet(scenes, 3, seed=4)))
    assert not np.array_equal(np.array(sheet), np.array(contact_sheet(scenes, 3, seed=5)))
    assert contact_sheet(scenes, 100).height > sheet.height


def test_sheet_of_labels(scenes, tmp_path):
    store = LabelStore.create(str(tmp_path / "labels"), {"teacher": "x"})
    ramp_HW = np.tile(np.linspace(0, 1, 42, dtype=np.float32), (42, 1))
    for i in range(3):
        keys = [f"labelled_{k:06d}" for k in (2 * i, 2 * i + 1) if k < 5]
        samples = [
            LabelSample.encoded(key, ramp_HW, {}) if i else LabelSample.failed(key, "truncated_image") for key in keys
        ]
        store.commit(f"{i:06d}", samples, keys=keys)
    with_labels = contact_sheet(scenes, 5, labels=store.path)
    assert not np.array_equal(np.array(with_labels), np.array(contact_sheet(scenes, 5)))


def test_bad_samples_have_a_row(tmp_path):
    jpg = io.BytesIO()
    Image.new("RGB", (20, 10), "red").save(jpg, format="JPEG")
    deep = io.BytesIO()
    np.save(deep, np.ones((10, 20), np.float16))
    hollow, _ = encode_png16(np.zeros((10, 20)), DEPTH_MM)
    with ShardWriter(str(tmp_path / "shards")) as writer:
        writer.write("cut", {"jpg": jpg.getvalue()[:300], "depth.png": b""})
        writer.write("good", {"jpg": jpg.getvalue(), "depth.npy": deep.getvalue()})
        writer.write("hollow", {"jpg": jpg.getvalue(), "depth.png": hollow})
        writer.write("imageless", {"depth.png": b""})
        writer.write("targetless", {"jpg": jpg.getvalue(), "json": b"{"})
        writer.write("torn", {"jpg": jpg.getvalue(), "depth.png": b"torn"})
    info = DatasetInfo(name="d", role="labelled", quantity="depth_m", code=DEPTH_MM, samples=6)
    info.write(str(tmp_path))
    assert contact_sheet(str(tmp_path), 6).height > 6 * 20


def test_sheet_errors(scenes, tmp_path):
    with pytest.raises(DataError, match="count is 0"):
        contact_sheet(scenes, 0)
    with pytest.raises(DataError, match="no such folder"):
        contact_sheet(str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="fathom label run"):
        contact_sheet(scenes, labels=str(tmp_path))


def test_save(scenes, tmp_path):
    sheet = contact_sheet(scenes, 1)
    for name in ("a.png", "b.jpg"):
        save(sheet, str(tmp_path / name))
        with Image.open(tmp_path / name) as image:
            assert image.size == sheet.size
    with pytest.raises(DataError, match=r"name it \.png or \.jpg"):
        save(sheet, str(tmp_path / "c.xyz"))
    assert not (tmp_path / "c.xyz").exists()


def test_real_photographs(shared_real, tmp_path):
    pack(Folder(str(shared_real / "photos"), FolderOptions(role="unlabelled")), str(tmp_path / "d"), name="photos")
    assert contact_sheet(str(tmp_path / "d"), 2).width > 400
