"""The benchmarks run, at sizes that measure nothing: whoever has a GPU for an hour should not mend them first."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks import ablation, ablation_table, real_rgbd
from dataio import synth
from model import DepthAnything
from trainer.config import ConfigError
from trainer.quickstart import stage_config

REPOSITORY = Path(__file__).resolve().parent.parent
COMMANDS = {
    "bench_kernels.py --device cpu --batch 1 --operators K1 K2 --repeats 1 --no-compile --case-s 0.01": (
        "### K1 affine-invariant, B=1, 518 x 518, 2 regions, float32",
        "### K2 cosine margin, B=1, 1369 tokens, D=1024, 100% kept, float32",
        "| ours, one call a region |",
        "| copy of the same bytes |",
    ),
    "bench_losses.py --device cpu --preset tiny --batch 2 --size 70 --repeats 1": ("| frozen encoder |", "| SiLog |"),
    "bench_checkpoint.py --preset tiny --repeats 2": ("| 2 | 0 |", "| 2 | 1 |"),
    "bench_step.py --device cpu --preset tiny --batch 2 --size 56 --steps 2 --stages 2": (
        "| trainer, zero_stage 2 |",
        "| bare, zero_stage 2 |",
    ),
    "bench_data.py --device cpu --threads 1 --size 56 --batch 6 --images 12 --repeats 1": (
        "| ours |",
        "| DataLoader, webdataset, PIL |",
        "| waiting for DALI |",
        "| disparity, CutMix |",
    ),
    "bench_model.py --device cpu --preset tiny --size 70 --repeats 1": ("float32", "bfloat16", "transformers"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_benchmark_prints_its_table(command: str) -> None:
    script, *arguments = command.split()
    done = subprocess.run(
        [sys.executable, f"benchmarks/{script}", *arguments],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for line in COMMANDS[command]:
        assert line in done.stdout


EQUAL_BUDGET = (
    ("student", "labelled-only"),
    ("student-perturbed", "labelled-only-jitter"),
    ("student-plain", "labelled-only"),
    ("jittered-student", "labelled-only-jitter"),
    ("jittered-self", "labelled-only-jitter"),
    ("oracle", "labelled-only-jitter"),
    ("scarce-student", "scarce-control"),
    ("more-student", "labelled-only-jitter-long"),
)


def test_every_row_of_the_ablation_is_a_configuration_and_controls_have_its_budget(tmp_path: Path) -> None:
    request = ablation.make_request(tmp_path, 11, 1.0)
    configs = {name: stage_config(request, name, "LABELS") for name in ablation.ROWS}
    for name, control in EQUAL_BUDGET:
        assert configs[name].steps == configs[control].steps
        assert configs[name].global_batch == configs[control].global_batch == 24
        assert configs[name].model == configs[control].model and configs[name].optim == configs[control].optim
    known = ablation.data_sets(request)
    used = {Path(path).name for config in configs.values() for role in config.data.roles.values()
            for path in role.datasets}  # fmt: skip
    assert used <= known.keys() and not any(name.startswith("evaluation") for name in used)
    assert {seed for _, seed, *_ in known.values()} == {11, 61_000_011}
    pairs = {row for pair in ablation_table.COMPARISONS for row in pair}
    assert pairs <= ablation.ROWS.keys()


def write_rows(out: Path, seed: int, delta1: dict[str, float], scale: float = 1.0) -> ablation.Request:
    """What an ablation leaves of one seed."""
    request = ablation.make_request(out / f"seed{seed}", seed, scale)
    Path(request.out).mkdir(parents=True)
    domains = ("wide", "wide, disparity space", "wide, best constant", "labelled domain")
    rows: dict[str, Any] = {
        name: {domain: {"abs_rel": 1 - value, "delta1": value} for domain in domains} for name, value in delta1.items()
    }
    content = {"rows": rows, "seconds": {}, "stand_in": True, "images": 0, "design": ablation.design(request)}
    (Path(request.out) / ablation.FILE).write_text(json.dumps(content))
    return request


def test_the_ablation_prints_means_spreads_and_paired_differences(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = write_rows(tmp_path, 11, {"teacher": 0.5, "student": 0.6})
    second = write_rows(tmp_path, 12, {"teacher": 0.6, "student": 0.65})
    ablation.report(tmp_path, {11: first, 12: second})
    lines = capsys.readouterr().out.splitlines()
    assert "| x |  |  |  | teacher | 0.4500 +- 0.0707" + 3 * " | 0.5500 +- 0.0707" + " | 2 |" in lines
    assert "| student | teacher | +0.1000, +0.0500 | +0.0750 +- 0.0354 | -0.0750 +- 0.0354 |" in lines
    assert json.loads((tmp_path / "ablation.json").read_text())["rows"]["12"]["student"]["wide"]["delta1"] == 0.65
    with pytest.raises(ConfigError, match="choose another --out"):
        ablation.read_rows(ablation.make_request(Path(first.out), 11, 0.5))


@pytest.mark.slow
def test_an_ablation_that_is_done_prints_its_table_again(tmp_path: Path) -> None:
    arguments = ("--out", str(tmp_path / "out"), "--seeds", "11", "--scale", "0.02")
    first = run("ablation.py", *arguments, "--rows", "scarce-control", "scarce-student", timeout_s=900)
    assert "| scarce-student | scarce-control |" in first
    assert run("ablation.py", *arguments, "--table").splitlines()[-1] == first.splitlines()[-1]


def write_frames(folder: Path) -> Path:
    """Three frames as ../shared/real/rgbd has them."""
    folder.mkdir()
    for number in range(3):
        scene = synth.render("labelled", 1, number, 56)
        Image.fromarray(scene.image_HWC).save(folder / f"livingroom_{number}.jpg")
        code_HW = np.where(scene.sky_HW, 0, np.clip(scene.depth_m_HW * 1000, 0, 65535)).astype(np.uint16)
        Image.fromarray(code_HW).save(folder / f"livingroom_{number}.depth.png")
    return folder


def test_real_frames_are_compared_with_both_baselines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frames, weights = write_frames(tmp_path / "frames"), str(tmp_path / "weights")
    DepthAnything.from_preset("tiny").save_pretrained(weights)
    command = ["real_rgbd.py", str(frames), "--size", "56", "--weights", weights, "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", command)
    arguments = real_rgbd.parse()
    assert real_rgbd.training_config(arguments, str(frames)).model.weights == weights
    rows, sheet = real_rgbd.measure(arguments, weights)
    assert list(rows) == ["best constant", "mean depth map", "before fine-tuning", "tiny, fine-tuned"]
    assert rows["before fine-tuning"] == rows["tiny, fine-tuned"]
    assert sheet.size == (4 * 56, 56)
    assert "does not beat the mean depth map" in real_rgbd.verdict(
        {**rows, "tiny, fine-tuned": rows["mean depth map"]}, "tiny, fine-tuned"
    )


def test_the_mean_depth_map_is_the_mean_disparity_of_what_was_measured() -> None:
    hole = np.nan
    mean_HW = real_rgbd.mean_disparity([np.array([[1.0, hole, hole]]), np.array([[2.0, 4.0, hole]])])
    np.testing.assert_allclose(mean_HW, [[0.75, 0.25, (1 + 0.5 + 0.25) / 3]])


@pytest.mark.slow
def test_real_frames_train_a_network(tmp_path: Path) -> None:
    frames = write_frames(tmp_path / "frames")
    arguments = ("--steps", "3", "--size", "56", "--out", str(tmp_path / "out"))
    printed = run("real_rgbd.py", str(frames), *arguments, timeout_s=300)
    assert "| tiny, fine-tuned |" in printed and "proves plumbing, not science" in printed
    assert (tmp_path / "out" / "sheet.png").is_file()


def run(script: str, *arguments: str, timeout_s: float = 120) -> str:
    """What a benchmark prints."""
    done = subprocess.run(
        [sys.executable, f"benchmarks/{script}", *arguments], cwd=REPOSITORY, capture_output=True, text=True,
        timeout=timeout_s,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_without_a_gpu_the_gpu_script_says_so_and_runs_nothing() -> None:
    blind = os.environ | {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(["bash", "benchmarks/gpu.sh"], cwd=REPOSITORY, capture_output=True, text=True, env=blind)
    assert done.returncode == 3
    assert "no NVIDIA GPU" in done.stdout
