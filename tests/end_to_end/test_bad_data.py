"""Wrong data: what is damaged as a whole is refused in one line, a bad sample is skipped, counted and named."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from tests.end_to_end.cli import (
    SIZE,
    Running,
    fathom,
    json_lines,
    refuse,
    refused,
    run_values,
    steps_done,
    succeed,
    write_config,
)
from tests.end_to_end.conftest import World
from trainer.checkpoint import find_checkpoint

pytestmark = pytest.mark.timeout(1800)  # the commands have a limit of their own


@pytest.fixture
def labelled(tmp_path: Path, data_world: World) -> Path:
    """A copy of the labelled set, to spoil."""
    return Path(shutil.copytree(data_world.data / "labelled", tmp_path / "spoiled"))


def rewrite(dataset: Path, change: Any) -> None:
    """Pass every member of the first shard through `change(name, bytes) -> bytes`, keeping `dataset.json`."""
    shard = dataset / "shards" / "000000.tar"
    with tarfile.open(shard) as tar:
        members = [(member.name, tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]
    with tarfile.open(shard, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            changed = change(name, data)
            info.size = len(changed)
            tar.addfile(info, io.BytesIO(changed))
    shard.with_suffix(".idx").unlink()


def training_on(folder: Path, dataset: Path, name: str = "teacher", **other: Any) -> Path:
    roles = {"labelled": {"datasets": [str(dataset)], "batch": 4, "lanes": 2}}
    return write_config(folder / f"{name}.yaml", run_values(name, "teacher", roles, **other))


def test_a_tar_cut_in_half_is_named_before_anything_starts(tmp_path: Path, labelled: Path) -> None:
    shard = labelled / "shards" / "000000.tar"
    os.truncate(shard, shard.stat().st_size // 2)
    line = refuse("train", training_on(tmp_path, labelled), cwd=tmp_path, words=(str(shard), "cut"))
    assert "copy it again" in line
    assert not (tmp_path / "runs").exists()


def test_a_dataset_with_no_samples(tmp_path: Path, labelled: Path) -> None:
    info = json.loads((labelled / "dataset.json").read_text())
    (labelled / "dataset.json").write_text(json.dumps(info | {"samples": 0}))
    refuse("train", training_on(tmp_path, labelled), cwd=tmp_path, words=("dataset.json", "0 samples"))
    (labelled / "dataset.json").write_text(json.dumps(info))
    (labelled / "shards" / "000000.tar").unlink()
    refuse("train", training_on(tmp_path, labelled), cwd=tmp_path, words=(str(labelled), "no shards"))
    (tmp_path / "photos").mkdir()
    refuse("data", "pack", "photos", "packed", cwd=tmp_path, words=("photos", "no photographs"))


def test_an_unlabelled_set_cannot_teach(tmp_path: Path, data_world: World) -> None:
    wide = data_world.data / "wide"
    refuse("train", training_on(tmp_path, wide), cwd=tmp_path, words=(str(wide), "no depth", "unlabelled"))


def test_bad_samples_are_skipped_counted_and_named(tmp_path: Path, labelled: Path) -> None:
    """A JPEG cut in half, a depth map of another size, one without any valid pixel: one start for the three."""

    def spoil(name: str, data: bytes) -> bytes:
        if name == "labelled_000003.jpg":
            return data[: len(data) // 2]
        if name == "labelled_000005.depth.png":
            return png(np.full((SIZE, SIZE // 2), 1000, np.uint16))
        if name == "labelled_000007.depth.png":
            return png(np.zeros((SIZE, SIZE), np.uint16))
        if name == "labelled_000007.sky.png":  # sky is a target too
            return png(np.zeros((SIZE, SIZE), np.uint8))
        return data

    rewrite(labelled, spoil)
    file = training_on(tmp_path, labelled)
    values = yaml.safe_load(file.read_text())
    values["data"]["max_bad_fraction"] = 0.5  # of a rank's own samples
    done = fathom("train", write_config(file, values), cwd=tmp_path)
    assert (done.status, done.errors) == (0, []), done.err
    found = [line for path in (tmp_path / "runs" / "teacher").glob("quarantine*.jsonl") for line in json_lines(path)]
    assert sorted((line["key"], line["reason"]) for line in found) == [
        ("labelled_000003", "bad_image"),
        ("labelled_000005", "size_mismatch"),
        ("labelled_000007", "no_valid_pixels"),
    ]
    assert all(line["shard"].endswith("000000.tar") for line in found)
    assert "skipped 3 bad samples" in done.err and "quarantine" in done.err


def png(code_HW: np.ndarray) -> bytes:
    """A grey PNG of the array's own depth."""
    file = io.BytesIO()
    Image.fromarray(code_HW).save(file, format="PNG")
    return file.getvalue()


def test_a_tar_cut_while_it_is_read_ends_the_run_in_one_line(tmp_path: Path, labelled: Path) -> None:
    """Too many samples are lost at once to go on; the checkpoints stay."""
    shard = labelled / "shards" / "000000.tar"
    run = tmp_path / "runs" / "teacher"
    running = Running("train", training_on(tmp_path, labelled, steps=2000), cwd=tmp_path)
    running.until(lambda: steps_done(run) >= 4, "step 4")
    os.truncate(shard, shard.stat().st_size // 2)
    refused(running.wait(), ("unreadable_member", str(shard), "max_bad_fraction"))
    path, passed = find_checkpoint(str(run / "checkpoints"))
    assert path is not None and passed == []
    refuse("train", tmp_path / "teacher.yaml", "--resume", cwd=tmp_path, words=(str(shard), "cut", "copy it again"))


def test_packing_leaves_out_what_cannot_be_used_and_says_so(tmp_path: Path) -> None:
    source = tmp_path / "rgbd"
    source.mkdir()
    rng = np.random.default_rng(0)
    for name in ("good", "cut", "other_size", "empty", "lonely"):
        Image.fromarray(rng.integers(0, 255, (48, 64, 3), np.uint8)).save(source / f"{name}.jpg")
    for name in ("good", "cut"):
        (source / f"{name}.depth.png").write_bytes(png(np.full((48, 64), 1500, np.uint16)))
    (source / "other_size.depth.png").write_bytes(png(np.full((48, 32), 1500, np.uint16)))
    (source / "empty.depth.png").write_bytes(png(np.zeros((48, 64), np.uint16)))
    os.truncate(source / "cut.jpg", 700)
    done = succeed("data", "pack", "rgbd", "packed", "--role", "labelled", cwd=tmp_path)
    assert "packed 1 samples" in done.out
    assert json.loads((tmp_path / "packed" / "pack_report.json").read_text())["skipped"] == {
        "unreadable_image": ["cut.jpg"],
        "no_valid_depth": ["empty.jpg"],
        "missing_depth": ["lonely.jpg"],
        "depth_size_differs": ["other_size.jpg"],
    }
