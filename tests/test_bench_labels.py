"""The benchmark of label formats: what it looks up is what the data plane hands out, and it prints its tables."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import bench_labels, label_students
from benchmarks.label_students import KINDS, LAST_BIT, Addressed, as_kind, coarse, photographs, with_labels
from dataio.codec import encode_png16
from dataio.dataset import Dataset, DatasetInfo
from dataio.loader import Loader
from dataio.pack_synth import pack_synth
from dataio.shards import ShardWriter
from dataio.spec import DataSpec, RoleNeeds
from dataio.types import AffineCode
from model import DepthAnything
from trainer.quickstart import Sizes, stage_config

REPOSITORY = Path(__file__).resolve().parent.parent
SIDE, COUNT, SEED = 28, 20, 5
UNIT = AffineCode(scale=1 / 65534, zero=1)


@pytest.mark.parametrize("roles", [1, 4])
def test_labels_are_looked_up_where_the_data_plane_would_have_them(
    tmp_path: Path, roles: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Maps over the whole of 0 to 1, which the data plane takes as they are, beside the images as their own depth."""
    monkeypatch.setattr(label_students, "_ADDRESSES", SIDE * SIDE * (COUNT // roles) + 1)
    sizes = Sizes(labelled=8, wide=COUNT, evaluation=1, image=SIDE)
    request = replace(bench_labels.make_request(tmp_path, SEED, 1.0), sizes=sizes)
    pack_synth("labelled", str(tmp_path / "data" / "labelled"), seed=1, count=8, size=SIDE)
    pack_synth("wide", str(tmp_path / "data" / "wide"), seed=1, count=COUNT, size=SIDE, labelled=False)
    addressed = Addressed(request, tmp_path / "addressed")
    addressed.write()
    assert (addressed.roles, addressed.each) == (roles, COUNT // roles)
    rng = np.random.default_rng(0)
    code_NHW = rng.integers(2, 65535, (COUNT, SIDE, SIDE))
    code_NHW[:, 3, 3], code_NHW[:, 9, 1] = 1, 65535
    maps_NHW = ((code_NHW - 1) / 65534).astype(np.float32)
    images = list(photographs(Dataset.open(str(tmp_path / "data" / "wide"))))
    spec = stage_config(request, "student", "-").data
    specs, needs = {"labelled": spec.roles["labelled"]}, dict.fromkeys(["labelled"], RoleNeeds())
    for role in range(roles):
        folder = tmp_path / "true" / str(role)
        with ShardWriter(str(folder / "shards")) as writer:
            for place in range(role * addressed.each, (role + 1) * addressed.each):
                key, image = images[place]
                writer.write(key, {"jpg": image, "depth.png": encode_png16(maps_NHW[place], UNIT)[0]})
        info = DatasetInfo(name="d", role="labelled", quantity="disparity", code=UNIT, samples=addressed.each)
        info.write(str(folder))
        specs[f"unlabelled{role}"] = replace(
            spec.roles["unlabelled"], datasets=(str(folder),), labels=(), batch=16 // roles, lanes=2
        )
        needs[f"unlabelled{role}"] = RoleNeeds()
    data = DataSpec(roles=specs, input_size=SIDE, shuffle_window=spec.shuffle_window)
    pasted = 0
    with Loader(data, needs, views=("student",), seed=SEED) as loader:
        batches = addressed.batches(SEED)
        for _ in range(4):  # more than a pass
            expected, found = next(loader), with_labels(*next(batches), maps_NHW, "float32")
            assert found.keys == expected.keys and found.roles == (("labelled", 8), ("unlabelled", 16))
            assert torch.equal(found.views["student"], expected.views["student"])
            assert torch.equal(found.region_BHW, expected.region_BHW)
            assert torch.equal(found.weight_B, expected.weight_B)
            value_BHW, expected_BHW = (batch.targets["disparity"].value_BHW for batch in (found, expected))
            torch.testing.assert_close(value_BHW, expected_BHW, atol=3e-7, rtol=0)
            pasted += int((found.region_BHW == 2).sum())
        batches.close()
    assert pasted


def test_the_kinds_of_labels() -> None:
    map_HW = np.random.default_rng(0).uniform(-3, 7, (30, 40)).astype(np.float32)
    span = float(map_HW.max() - map_HW.min())
    found = {kind: np.abs(as_kind(map_HW, kind, 3).astype(np.float64) - map_HW).max() / span for kind in KINDS}
    assert found["float32"] == 0 and 0 < found[LAST_BIT] < 2e-7
    assert found["png"] == found["jxl"] == pytest.approx(1 / 8188, rel=0.05)
    assert found["npy"] == pytest.approx(1 / 4096, rel=0.2)
    assert found["10 bits"] == pytest.approx(1 / 2046, rel=0.05) and found["8 bits"] == pytest.approx(1 / 510, rel=0.05)
    moved_HW = as_kind(map_HW, LAST_BIT, 3)
    assert np.all((moved_HW != map_HW) & (np.abs(moved_HW - map_HW) <= np.spacing(np.abs(map_HW))))
    assert np.array_equal(moved_HW, as_kind(map_HW, LAST_BIT, 3))
    assert len(np.unique(coarse(map_HW, 3))) == 8
    assert np.array_equal(coarse(np.full((2, 2), 5, np.float32), 8), np.full((2, 2), 5, np.float32))


def run(*arguments: str, timeout_s: float) -> str:
    """What it prints."""
    done = subprocess.run(
        [sys.executable, "benchmarks/bench_labels.py", *arguments], cwd=REPOSITORY, capture_output=True, text=True,
        timeout=timeout_s, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_formats_of_a_network_s_labels(tmp_path: Path) -> None:
    DepthAnything.from_preset("tiny").save_pretrained(str(tmp_path / "w"))
    arguments = ("--weights", str(tmp_path / "w"), "--scale", "0.05", "--input-size", "56")
    printed = run(*arguments, "--photos", str(tmp_path / "none"), timeout_s=200)
    assert f"skipped: the photographs, which are not in {tmp_path / 'none'}" in printed
    assert "### Synthetic scenes: 20 maps of 112 x 112; 49 KiB as float32" in printed
    assert [line.split()[1] for line in printed.splitlines() if line.startswith(("| png", "| npy", "| jxl"))] == [
        "npy", "png", "jxl",
    ]  # fmt: skip
    assert "gradient" not in printed


@pytest.mark.slow
def test_quick_prints_every_table(tmp_path: Path) -> None:
    printed = run("--quick", "--out", str(tmp_path), timeout_s=900)
    for line in ("### Synthetic scenes", "### The student's loss on", "### The student's gradient of", "| 16 | "):
        assert line in printed
    last = printed.splitlines()[-4:]
    assert [row.split(" | ")[0] for row in last] == [
        "| float32", "| float32, last bit moved", "| png, 12 bits", "| 8 bits",
    ]  # fmt: skip
    assert last[0].endswith("| 0 % |")
