"""The benchmarks run, at sizes that measure nothing: whoever has a GPU for an hour should not mend them first."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks import ablation, ablation_table, real_rgbd
from dataio import synth
from model import DepthAnything
from trainer.config import ConfigError, dump_config
from trainer.config_train import TrainConfig
from trainer.quickstart import stage_config
from trainer.tasks.base import make_task

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
    "bench_step.py --device cpu --preset tiny --batch 2 --size 56 --steps 2": (
        "| trainer |", "| bare |", "| metrics' updates |",
    ),
    "bench_data.py --device cpu --threads 1 --size 56 --batch 6 --images 12 --repeats 1": (
        "| ours |",
        "| DataLoader, webdataset, PIL |",
        "| waiting for DALI |",
        "| disparity, CutMix |",
    ),
    "bench_control.py --ranks 50 --seconds 4 --shards 500 --steps 20 --entries 100": (  # fails above 5 % of a core
        "| watching 50 ranks |",
        "| a rank's plan |",
        "| all together |",
    ),
    "bench_label.py --preset tiny --size 28 --repeats 2 --images 2 --workers 1 --precision fp32 --no-transformers": (
        "| labelling |", "| bare |", "| flip+scale | 2.56 |",
    ),
    "bench_leases.py --shards 200 --workers 8 --clients 1 --paced 1 --shard-s 1 --done 100": (  # fails at 10 s
        "| cold start with 100 done |",
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
    ("larger-student", "larger-control"),
    ("larger-both", "larger-control"),
)


def config_of(request: ablation.Request, name: str) -> TrainConfig:
    return stage_config(ablation.of_network(request, name), name, "LABELS")


def test_every_row_of_the_ablation_is_a_configuration_and_controls_have_its_budget(tmp_path: Path) -> None:
    request = ablation.make_request(tmp_path, 11, 1.0)
    configs = {name: config_of(request, name) for name in ablation.ROWS}
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


# What docs/decisions/0006-the-ablation.md says of every row; None where a row has no such role or no labels.
JITTER = {"jitter_p": 0.8, "grayscale_p": 0.2, "blur_p": 0.5, "blur_sigma": (0.025, 0.5), "cutmix_p": 0.0}
FLIPS = {"jitter_p": 0.0, "grayscale_p": 0.0, "blur_p": 0.0, "cutmix_p": 0.0}
STRONG = {**JITTER, "cutmix_p": 0.5}
LABELLED, WIDE = ["labelled"], ["wide"]
WIDER = {"network": ("tiny-wide", "encoder-larger")}
DESIGN: dict[str, dict[str, Any]] = {
    "teacher": {"steps": 800, "labelled": (8, LABELLED, FLIPS)},
    "student-plain": {
        "steps": 800, "labelled": (8, LABELLED, FLIPS), "unlabelled": (16, WIDE, FLIPS), "labels": ("teacher", "wide"),
    },
    "student-perturbed": {
        "steps": 800, "labelled": (8, LABELLED, FLIPS), "unlabelled": (16, WIDE, STRONG), "labels": ("teacher", "wide"),
    },
    "student": {
        "steps": 800, "labelled": (8, LABELLED, FLIPS), "unlabelled": (16, WIDE, STRONG), "labels": ("teacher", "wide"),
        "aligned": True,
    },
    "labelled-only": {"steps": 800, "labelled": (24, LABELLED, FLIPS)},
    "labelled-only-jitter": {"steps": 800, "labelled": (24, LABELLED, JITTER)},
    "jittered-student": {
        "steps": 800, "labelled": (8, LABELLED, JITTER), "unlabelled": (16, WIDE, STRONG),
        "labels": ("labelled-only-jitter", "wide"),
    },
    "labelled-only-jitter-long": {"steps": 1600, "labelled": (24, LABELLED, JITTER)},
    "jittered-self": {
        "steps": 800, "labelled": (8, LABELLED, JITTER), "unlabelled": (16, LABELLED, STRONG),
        "labels": ("labelled-only-jitter", "labelled"),
    },
    "oracle": {"steps": 800, "labelled": (24, ["labelled", "wide-true"], JITTER), "weights": (1, 2)},
    "scarce-control": {"steps": 800, "labelled": (24, ["scarce"], JITTER)},
    "scarce-student": {
        "steps": 800, "labelled": (8, ["scarce"], JITTER), "unlabelled": (16, WIDE, STRONG),
        "labels": ("scarce-control", "wide"),
    },
    "more-student": {
        "steps": 1600, "labelled": (8, LABELLED, JITTER), "unlabelled": (16, ["wide-more"], STRONG),
        "labels": ("labelled-only-jitter-long", "wide-more"),
    },
    "larger-control": {"steps": 800, "labelled": (24, LABELLED, JITTER), **WIDER},
    "larger-student": {
        "steps": 800, "labelled": (8, LABELLED, JITTER), "unlabelled": (16, WIDE, STRONG),
        "labels": ("labelled-only-jitter", "wide"), **WIDER,
    },
    "larger-both": {
        "steps": 800, "labelled": (8, LABELLED, JITTER), "unlabelled": (16, WIDE, STRONG),
        "labels": ("larger-control", "wide"), **WIDER,
    },
}  # fmt: skip


def test_the_design_has_no_other_rows() -> None:
    assert DESIGN.keys() == ablation.ROWS.keys()


@pytest.mark.parametrize("name", DESIGN)
def test_every_row_is_what_the_design_says(tmp_path: Path, name: str) -> None:
    request = ablation.make_request(tmp_path, 11, 1.0)
    config, wanted, row = config_of(request, name), DESIGN[name], ablation.ROWS[name]
    preset, encoder = wanted.get("network", ("tiny", "encoder"))
    assert config.model.preset == preset and row.encoder == encoder
    assert config.model.encoder_weights == str(tmp_path / "runs" / encoder / "weights" / "encoder.safetensors")
    assert config_of(request, encoder).model.preset == preset and config_of(request, encoder).task.kind == "pretext"
    assert config.steps == wanted["steps"] and config.seed == 11
    assert {role for role in ("labelled", "unlabelled") if role in wanted} == set(config.data.roles)
    for role, spec in config.data.roles.items():
        batch, sets, perturbation = wanted[role]
        assert spec.batch == batch and [Path(path).name for path in spec.datasets] == sets, role
        assert {key: getattr(spec.perturbation, key) for key in perturbation} == perturbation, role
        assert spec.perturbation.flip_p == 0.5
        assert tuple(spec.weights) == (wanted.get("weights", ()) if role == "labelled" else ())
    assert (row.teacher, row.images if row.teacher else None) == wanted.get("labels", (None, None))
    if "unlabelled" in wanted:
        assert row.images == Path(config.data.roles["unlabelled"].datasets[0]).name  # the labels are of these images
        terms = make_task(config).term_weights
        assert terms.get("feature", 0.0) == pytest.approx(1 / 3 if wanted.get("aligned") else 0.0)
        assert terms["labelled"] == terms["unlabelled"] == pytest.approx(1 / 3 if wanted.get("aligned") else 1 / 2)
    marks = {"l": True, "u": "unlabelled" in wanted, "s": wanted.get("unlabelled", (0, 0, FLIPS))[2] is STRONG}
    assert row.marks == "".join(letter for letter in "lus" if marks[letter]) + "f" * wanted.get("aligned", False)


def test_the_design_s_scenes(tmp_path: Path) -> None:
    """800 and 100 labelled, 4,000 and 8,000 wide, of the training seed; 500 of each domain, of another."""
    for seed in (11, 12):
        assert ablation.data_sets(ablation.make_request(tmp_path, seed, 1.0)) == {
            "labelled": ("labelled", seed, 800, True),
            "scarce": ("labelled", seed, 100, True),
            "wide": ("wide", seed, 4000, False),
            "wide-true": ("wide", seed, 4000, True),
            "wide-more": ("wide", seed, 8000, False),
            "evaluation-wide": ("wide", 61_000_000 + seed, 500, True),
            "evaluation-labelled": ("labelled", 61_000_000 + seed, 500, True),
        }
    assert ablation.SEEDS == (11, 12, 13)


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


def write_run(request: ablation.Request, name: str, commit: str, **changes: Any) -> None:
    """What of a run tells how it was trained; `changes` of its configuration."""
    folder = Path(request.out) / "runs" / name
    folder.mkdir(parents=True)
    labels = f"{request.out}/data/wide/labels/f00d"
    config = stage_config(request, name, labels).model_copy(update=changes)
    (folder / "config.yaml").write_text(dump_config(config))
    (folder / "environment.json").write_text(json.dumps({"commit": commit}))


def test_the_ablation_prints_means_spreads_and_paired_differences(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = write_rows(tmp_path, 11, {"teacher": 0.5, "student": 0.6})
    second = write_rows(tmp_path, 12, {"teacher": 0.6, "student": 0.65})
    write_run(first, "teacher", "abc")
    write_run(first, "student", "def")
    write_run(second, "student", "fed")
    ablation.report(tmp_path, {11: first, 12: second})
    lines = capsys.readouterr().out.splitlines()
    assert "| x |  |  |  | teacher | 0.4500 +- 0.0707" + 3 * " | 0.5500 +- 0.0707" + " | 2 |" in lines
    assert "|  |  |  |  | best constant | 0.4500 +- 0.0707 | 0.5500 +- 0.0707 | - | - | 2 |" in lines
    # 0.05 / sqrt(2) / sqrt(2) is the standard error
    assert "| student | teacher | +0.1000, +0.0500 | +0.0750 +- 0.0250 | -0.0750 +- 0.0250 | helps |" in lines
    content = json.loads((tmp_path / "ablation.json").read_text())
    assert content["rows"]["12"]["student"]["wide"]["delta1"] == 0.65
    assert content["commits"] == {
        "11": {"teacher": "abc", "student": "def"},
        "12": {"teacher": None, "student": "fed"},
    }
    assert "commit" not in content


@pytest.mark.parametrize(
    ("delta1", "abs_rel", "words"),
    [
        ([0.02, 0.03, 0.025], [-0.01, -0.02, -0.03], "helps"),
        ([0.02, 0.03, -0.001], [-0.01, -0.02, -0.03], "not shown"),  # not in every seed
        ([0.02, 0.03, 0.025], [-0.01, -0.02, 0.0], "not shown"),  # AbsRel does not fall everywhere
        ([0.001, 0.03, 0.002], [-0.01, -0.02, -0.03], "not shown"),  # 0.011, twice its standard error 0.019
        ([0.02, 0.06, 0.02], [-0.01, -0.02, -0.03], "helps"),  # 0.0333, 0.0267; its standard deviation is 0.0231
        ([-0.02, 0.01, -0.03], [-0.01, -0.02, -0.03], "no"),
        ([0.0, 0.0], [0.0, 0.0], "no"),
        ([0.02], [-0.01], "one seed"),
        ([-0.02], [0.01], "one seed"),
    ],
)
def test_the_verdict_is_that_of_the_rule(delta1: list[float], abs_rel: list[float], words: str) -> None:
    assert ablation_table.verdict(delta1, abs_rel) == words


def test_a_folder_of_another_design_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request = write_rows(tmp_path, 11, {"teacher": 0.5})
    assert ablation.read_rows(request).rows.keys() == {"teacher"}
    moved = tmp_path / "moved"
    Path(request.out).rename(moved)
    assert ablation.read_rows(ablation.make_request(moved, 11, 1.0)).rows.keys() == {"teacher"}
    with pytest.raises(ConfigError, match="choose another --out"):
        ablation.read_rows(ablation.make_request(moved, 11, 0.5))
    for name, change in {
        "oracle": {"overrides": {**ablation.ROWS["oracle"].overrides, "data.roles.labelled.weights": [2, 1]}},
        "jittered-student": {"overrides": {}},
        "scarce-student": {"teacher": "teacher"},
    }.items():
        with monkeypatch.context() as patch:
            patch.setitem(ablation.ROWS, name, replace(ablation.ROWS[name], **change))
            with pytest.raises(ConfigError, match=rf"design\.networks\.{name}\..*; choose another --out"):
                ablation.read_rows(ablation.make_request(moved, 11, 1.0))
    with monkeypatch.context() as patch:
        patch.setitem(ablation.ROWS, "another", ablation.ROWS["oracle"])
        assert ablation.read_rows(ablation.make_request(moved, 11, 1.0)).rows.keys() == {"teacher"}
    with monkeypatch.context() as patch:
        patch.setattr(ablation, "MAX_DEPTH_M", 80.0)
        with pytest.raises(ConfigError, match="choose another --out"):
            ablation.read_rows(ablation.make_request(moved, 11, 1.0))


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
    flat = real_rgbd.score(np.ones((56, 56)), real_rgbd.read_depth(frames / "livingroom_2.depth.png", 0.001))
    for space in ("depth", "disparity"):  # a constant that is fitted by least squares is another constant
        assert rows["best constant"][space]["abs_rel"] < flat[space]["abs_rel"]
    assert sheet.size == (4 * 56, 56)
    assert "does not beat the mean depth map" in real_rgbd.verdict(
        {**rows, "tiny, fine-tuned": rows["mean depth map"]}, "tiny, fine-tuned"
    )


def test_the_mean_depth_map_is_the_mean_disparity_of_what_was_measured() -> None:
    hole = np.nan
    mean_HW = real_rgbd.mean_disparity([np.array([[1.0, hole, hole]]), np.array([[2.0, 4.0, hole]])])
    np.testing.assert_allclose(mean_HW, [[0.75, 0.25, (1 + 0.5 + 0.25) / 3]])


def test_the_floor_and_the_scores_of_a_frame_by_hand() -> None:
    """1, 2 and 4 m. As one depth 1 m has the least AbsRel (weights 1, 1/2, 1/4), as one disparity 1/4 (1, 2, 4)."""
    depth_HW = np.array([[1.0, 2.0, 4.0, np.nan]])
    floor = real_rgbd.floor(depth_HW)
    assert floor["depth"]["abs_rel"] == pytest.approx((0 + 1 / 2 + 3 / 4) / 3)
    assert floor["disparity"]["abs_rel"] == pytest.approx((3 / 4 + 1 / 2 + 0) / 3)
    # (1, 0, 0) is fitted as 0.625 x + 0.375 to (1, 1/2, 1/4): tests/trainer/test_protocols.py::test_by_hand
    scores = real_rgbd.score(np.array([[1.0, 0.0, 0.0, 9.0]]), depth_HW)
    assert scores["disparity"]["abs_rel"] == pytest.approx((0 + 0.25 + 0.5) / 3)
    assert scores["depth"]["abs_rel"] == pytest.approx((0 + abs(1 / 0.375 - 2) / 2 + abs(1 / 0.375 - 4) / 4) / 3)


def test_results_of_real_frames_name_the_weights_they_started_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames, weights = write_frames(tmp_path / "frames"), str(tmp_path / "weights")
    DepthAnything.from_preset("tiny").save_pretrained(weights)
    monkeypatch.setattr(real_rgbd, "fine_tune", lambda arguments: weights)
    (tmp_path / "out").mkdir()
    for given in ([], ["--weights", weights]):
        command = ["real_rgbd.py", str(frames), "--size", "56", "--out", str(tmp_path / "out"), *given]
        monkeypatch.setattr(sys, "argv", command)
        real_rgbd.main()
        settings = json.loads((tmp_path / "out" / "results.json").read_text())["settings"]
        assert settings["weights"] == (weights if given else None) and settings["steps"] == "600"


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
