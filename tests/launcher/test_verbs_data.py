"""`fathom data`: what each verb prints and leaves behind, and how it ends."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataio.dataset import Dataset
from dataio.importers import layout_names
from tests.dataio.fakes import labelled, write_dataset
from tests.launcher.conftest import Run

GROUP = "data"


def photograph(path: Path, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (8, 12, 3), np.uint8)).save(path)


def tum(folder: Path, count: int) -> None:
    """A sequence of TUM RGB-D."""
    for name in ("rgb", "depth"):
        for i in range(count):
            path = folder / name / f"{i}.png"
            photograph(path, i)
            if name == "depth":
                Image.fromarray(np.full((8, 12), 500 * (i + 1), np.uint16)).save(path)
        (folder / f"{name}.txt").write_text("".join(f"{i}.0 {name}/{i}.png\n" for i in range(count)))


def test_pack_a_layout_by_name_with_processes(fathom: Run, tmp_path: Path) -> None:
    tum(tmp_path / "desk", 20)
    (tmp_path / "desk" / "depth" / "3.png").unlink()
    arguments = ("pack", "desk", "packed", "--layout", "tum", "-o", "max_difference=0.5", "--workers", "2")
    status, out, _ = fathom(*arguments)
    assert status == 0
    assert out.splitlines()[-1] == "packed: packed 19 samples, skipped 1 missing_depth (rgb/3.png)"
    info = Dataset.open("packed").info
    assert (info.name, info.role, info.quantity, info.samples) == ("desk", "labelled", "depth_m", 19)
    status, out, _ = fathom(*arguments)  # once more: nothing to do
    assert status == 0 and "packed 19 samples" in out


def test_the_default_is_a_folder_of_photographs(fathom: Run, tmp_path: Path) -> None:
    photograph(tmp_path / "photos" / "a.jpg")
    assert fathom("pack", "photos", "packed")[0] == 0
    assert Dataset.open("packed").info.role == "unlabelled"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--layout", "moon"), ("layout is 'moon'", "tum")),
        (("--layout", "tum", "-o", "difference=1"), ("option 'difference' is unknown", "max_difference")),
        (("--layout", "tum", "-o", "max_difference=soon"), ("option 'max_difference' is 'soon'",)),
        (("--layout", "tum", "-o", "max_difference"), ("expected NAME=VALUE",)),
        (("--layout", "tum", "--role", "labelled"), ("option 'role' is unknown",)),
        (("--layout", "tum"), ("rgb.txt",)),
        (("--role", "labeled"), ("option 'role' is 'labeled'",)),
    ],
)
def test_wrong_arguments_end_in_one_line(
    fathom: Run, tmp_path: Path, arguments: tuple[str, ...], words: tuple[str, ...]
) -> None:
    photograph(tmp_path / "photos" / "a.jpg")
    status, _, err = fathom("pack", "photos", "packed", *arguments)
    assert status == 2 and all(word in err for word in words), err
    assert "Traceback" not in err and not (tmp_path / "packed").exists()


def test_layouts_are_listed_with_their_options(fathom: Run) -> None:
    status, out, _ = fathom("layouts")
    assert status == 0
    assert [line.split()[0] for line in out.splitlines()] == layout_names()
    assert next(line for line in out.splitlines() if line.startswith("tum ")).endswith("Options: max_difference.")


def test_check_tells_what_is_wrong_and_lists_it_when_asked(fathom: Run, tmp_path: Path) -> None:
    bad = {**labelled(1), "jpg": b"no picture"}
    write_dataset(tmp_path / "d", [{"a": labelled(0), "b": bad, "c": labelled(0)}])
    status, out, _ = fathom("check", "d", "--duplicates", "--report", "found.json", "--workers", "1")
    assert status == 1
    lines = out.splitlines()
    assert lines[0].startswith("d: 3 samples in 1 shards, ")
    assert lines[1] == "sizes: 48x56 (2)"
    assert lines[2].startswith("values: 1.0") and "valid pixels: 99.7%" in lines[2]
    assert lines[3] == "1 bad_image (the image cannot be decoded): b"
    assert lines[4] == "1 duplicate (another sample shows the same picture): c"
    assert lines[5] == "usable: 2 of 3"
    assert json.loads((tmp_path / "found.json").read_text())["sizes"] == {"48x56": 2}
    assert not (tmp_path / "d" / "quarantine.jsonl").exists()
    status, out, _ = fathom("check", "d", "--quarantine", "--workers", "1")
    assert status == 0 and "1 samples listed in d/quarantine.jsonl" in out
    assert Dataset.open("d").quarantined == {"000000": {"b": "bad_image"}}


def test_check_of_a_sound_dataset_and_of_none(fathom: Run, tmp_path: Path) -> None:
    write_dataset(tmp_path / "d", [{"a": labelled(0)}])
    assert fathom("check", "d")[0] == 0
    status, _, err = fathom("check", "nowhere")
    assert status == 2 and "no such folder" in err


def test_sky_from_a_function_of_the_user_s(fathom: Run, tmp_path: Path) -> None:
    photograph(tmp_path / "photos" / "a.jpg")
    photograph(tmp_path / "photos" / "b.png")
    Image.fromarray(np.zeros((8, 12), np.uint8)).save(tmp_path / "photos" / "b.sky.png")
    (tmp_path / "my_sky_of_this_test.py").write_text(
        "import numpy as np\n"
        "def upper(image_HWC):\n    return np.arange(image_HWC.shape[0])[:, None] + 0 * image_HWC[..., 0] < 3\n"
        "def wrong(image_HWC):\n    return image_HWC[..., 0]\n"
        "def broken(image_HWC):\n    return image_HWC['sky']\n"
    )
    status, _, err = fathom("pack", "photos", "packed", "--sky", "my_sky_of_this_test:upper", "--workers", "1",
                              "--role", "unlabelled")  # fmt: skip
    assert status == 0, err
    (shard,) = Dataset.open("packed").shards
    masks = {}
    for entry in shard.index.samples:
        masks[entry.key] = np.asarray(Image.open(io.BytesIO(shard.read(entry, "sky.png") or b"")))
    assert (masks["a"][:3] == 255).all() and not masks["a"][3:].any()
    assert not masks["b"].any()  # its own mask
    for function, words in (
        ("wrong", "a.jpg: my_sky_of_this_test:wrong returned uint8 (8, 12)"),
        ("broken", "a.jpg: my_sky_of_this_test:broken failed with IndexError: only integers"),
        ("absent", "no attribute 'absent'"),
        ("", "name a"),
    ):
        arguments = ("--sky", f"my_sky_of_this_test:{function}", "--workers", "1")
        status, _, err = fathom("pack", "photos", f"other{function}", *arguments)
        assert status == 2 and words in err
    status, _, err = fathom("pack", "photos", "other", "--sky", "no_such_module_here:f")
    assert status == 2 and "no_such_module_here" in err


@pytest.mark.parametrize("orientation", [3, 6])
def test_sky_is_found_in_the_picture_as_displayed(fathom: Run, tmp_path: Path, orientation: int) -> None:
    """A picture whose upper part is bright when EXIF turned it: so is its mask, and training shows both so."""
    shown_HWC = np.zeros((24, 40, 3), np.uint8)
    shown_HWC[:8] = 255
    undo = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90}[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    (tmp_path / "photos").mkdir()
    Image.fromarray(shown_HWC).transpose(undo).save(tmp_path / "photos" / "a.png", exif=exif)
    (tmp_path / "bright_sky_of_this_test.py").write_text("def bright(image_HWC):\n    return image_HWC[..., 0] > 127\n")
    status, _, err = fathom("pack", "photos", "packed", "--sky", "bright_sky_of_this_test:bright", "--workers", "1")
    assert status == 0, err
    (shard,) = Dataset.open("packed").shards
    (entry,) = shard.index.samples
    mask_HW = np.asarray(Image.open(io.BytesIO(shard.read(entry, "sky.png") or b"")))
    assert np.array_equal(mask_HW > 127, shown_HWC[..., 0] > 127)
    assert fathom("check", "packed", "--workers", "1")[0] == 0


def test_packing_into_the_source_is_refused(fathom: Run, tmp_path: Path) -> None:
    photograph(tmp_path / "photos" / "a.jpg")
    for source, out in (("photos", "photos"), ("photos", "photos/packed"), ("photos", ".")):
        status, _, err = fathom("pack", source, out)
        assert status == 2 and "choose a folder apart from it" in err and "Traceback" not in err
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["a.jpg"]
