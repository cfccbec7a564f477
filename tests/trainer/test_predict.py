"""Photographs in, pictures out: what is found, what is skipped, what is never overwritten."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cluster.storage import StorageError
from dataio.codec import read_png16
from dataio.spec import DataError
from tests.dataio.fakes import jpeg, smooth
from trainer.predict import find_images, output_names, predict

INPUT = 28


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    from model import DepthAnything

    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("weights") / "weights"
    DepthAnything.from_preset("tiny").save_pretrained(str(folder))
    return str(folder)


def photograph(path: Path, seed: int = 0, height: int = 40, width: int = 60, **options: object) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(jpeg(smooth(seed, height, width), **options))
    return str(path)


def files_below(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_a_folder_is_predicted_with_what_is_damaged_left_out(weights: str, tmp_path: Path) -> None:
    photos = tmp_path / "photos ü"
    photograph(photos / "a.jpg", 1)
    photograph(photos / "deep" / "b.JPG", 2)
    (photos / "cut.jpg").write_bytes(jpeg(smooth(3, 40, 60))[:300])
    (photos / "notes.txt").write_text("no image")
    seen: list[tuple[int, int]] = []
    outcome = predict(
        [str(photos)], weights, str(tmp_path / "out"), input_size=INPUT, on_progress=lambda *now: seen.append(now)
    )
    assert files_below(tmp_path / "out") == [
        "a.depth.json",
        "a.depth.png",
        "a.png",
        "b.depth.json",
        "b.depth.png",
        "b.png",
    ]
    assert outcome.written == [str(tmp_path / "out" / "a.png"), str(tmp_path / "out" / "b.png")]
    assert list(outcome.skipped) == [str(photos / "cut.jpg")]
    assert "cannot be read" in outcome.skipped[str(photos / "cut.jpg")]
    assert seen[-1] == (3, 3) and [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_the_pictures_show_the_image_and_the_network_s_prediction(weights: str, tmp_path: Path) -> None:
    from model import DepthAnything

    file = photograph(tmp_path / "a.jpg", 1)
    predict([file], weights, str(tmp_path / "out"), input_size=INPUT)
    picture = np.asarray(Image.open(tmp_path / "out" / "a.png"))
    image = np.array(Image.open(file))
    assert picture.shape == (40, 120, 3)
    assert (picture[:, :60] == image).all()
    code_HW = read_png16((tmp_path / "out" / "a.depth.png").read_bytes()).astype(float)
    value_HW = DepthAnything.from_pretrained(weights).eval().infer_image(image, INPUT)
    assert code_HW.shape == (40, 60) and code_HW.min() == 16 and code_HW.max() == 65520
    stretched_HW = (value_HW - value_HW.min()) / np.ptp(value_HW)
    assert np.abs((code_HW - 16) / 65504 - stretched_HW).max() < 1 / 4000
    code = json.loads((tmp_path / "out" / "a.depth.json").read_text())
    assert code.pop("quantity") == "disparity"
    read_HW = code["scale"] * (code_HW - code["zero"]) + code["shift"]
    assert np.abs(read_HW - value_HW).max() <= np.ptp(value_HW) / 8000
    nearest = np.unravel_index(value_HW.argmax(), value_HW.shape)
    farthest = np.unravel_index(value_HW.argmin(), value_HW.shape)
    right = picture[:, 60:].astype(int)
    assert right[nearest][0] > right[nearest][2] and right[farthest][0] < right[farthest][2] + 80


def test_a_rotated_photograph_is_turned_upright(weights: str, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    file = photograph(tmp_path / "a.jpg", 1, 40, 60, exif=exif.tobytes())
    predict([file], weights, str(tmp_path / "out"), input_size=INPUT)
    picture = np.asarray(Image.open(tmp_path / "out" / "a.png"))
    assert picture.shape == (60, 80, 3)
    assert (picture[:, :40] == np.rot90(np.asarray(Image.open(file)), -1)).all()
    assert read_png16((tmp_path / "out" / "a.depth.png").read_bytes()).shape == (60, 40)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_other_colours_are_read(weights: str, tmp_path: Path, mode: str) -> None:
    suffix = "jpg" if mode == "CMYK" else "png"
    Image.fromarray(smooth(1, 40, 60)).convert(mode).save(tmp_path / f"a.{suffix}")
    outcome = predict([str(tmp_path / f"a.{suffix}")], weights, str(tmp_path / "out"), input_size=INPUT)
    assert len(outcome.written) == 1


def test_sixteen_bits_of_grey_are_not_clipped(weights: str, tmp_path: Path) -> None:
    grey_HW = smooth(1, 40, 60)[..., 0]
    Image.fromarray(grey_HW.astype(np.uint16) * 257).save(tmp_path / "a.png")
    predict([str(tmp_path / "a.png")], weights, str(tmp_path / "out"), input_size=INPUT)
    left_HWC = np.asarray(Image.open(tmp_path / "out" / "a.png"))[:, :60]
    assert (left_HWC == grey_HW[..., None]).all()


def test_when_nothing_is_readable_the_first_reason_is_given(weights: str, tmp_path: Path) -> None:
    for name in ("b.jpg", "a.png"):
        (tmp_path / name).write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"a\.png: cannot be read .*; none of 2 images is readable"):
        predict([str(tmp_path)], weights, str(tmp_path / "out"), input_size=INPUT)


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent\.jpg: no such image or folder"):
        find_images([str(tmp_path / "absent.jpg")])
    with pytest.raises(DataError, match=r"holds no image \(\.jpg, \.jpeg, \.png, \.webp\)"):
        find_images([str(tmp_path)])


def test_a_named_file_counts_whatever_its_name_and_once(tmp_path: Path) -> None:
    odd = photograph(tmp_path / "photo.dat")
    usual = photograph(tmp_path / "photo.jpeg")
    (tmp_path / "x.depth.png").write_bytes(b"a prediction")
    assert find_images([odd, odd, str(tmp_path), usual]) == [odd, usual]


def test_equal_names_do_not_collide(weights: str, tmp_path: Path) -> None:
    names = ["one/a.jpg", "two/a.jpg", "two/a.png", "one/a.depth.jpg"]
    files = [photograph(tmp_path / name, seed) for seed, name in enumerate(names)]
    found = output_names(files)
    targets = [
        target for name in found.values() for target in (f"{name}.png", f"{name}.depth.png", f"{name}.depth.json")
    ]
    assert len(set(targets)) == 12
    assert found[files[0]] == "a" and found[files[1]] == "two_a"
    predict(files, weights, str(tmp_path / "out"), input_size=INPUT)
    assert sorted(targets) == files_below(tmp_path / "out")
    left = np.asarray(Image.open(tmp_path / "out" / f"{found[files[1]]}.png"))[:, :60]
    assert (left == np.asarray(Image.open(files[1]))).all()


def test_a_photograph_is_never_overwritten(weights: str, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(smooth(1, 40, 60)).save(path)
    before = path.read_bytes()
    with pytest.raises(DataError, match=r"a\.png: would be overwritten by a prediction"):
        predict([str(path)], weights, str(tmp_path), input_size=INPUT)
    assert path.read_bytes() == before
    assert files_below(tmp_path) == ["a.png"]


def test_a_second_run_does_not_predict_its_own_pictures(weights: str, tmp_path: Path) -> None:
    photograph(tmp_path / "a.jpg")
    for _ in range(2):
        outcome = predict([str(tmp_path)], weights, str(tmp_path / "predicted"), input_size=INPUT)
        assert len(outcome.written) == 1
    assert files_below(tmp_path) == ["a.jpg", "predicted/a.depth.json", "predicted/a.depth.png", "predicted/a.png"]


def test_an_output_folder_that_cannot_be(weights: str, tmp_path: Path) -> None:
    file = photograph(tmp_path / "a.jpg")
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(StorageError, match="taken"):
        predict([file], weights, str(tmp_path / "taken"), input_size=INPUT)
