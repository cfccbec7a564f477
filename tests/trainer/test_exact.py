"""A run killed at any moment and resumed is bit for bit the run that was never killed.

Forty steps in one go against twenty, a kill -9 of all ranks, and twenty more in new processes: weights, moments,
average, counters and logged numbers. Real data, loader, engine and checkpoints on two ranks; Ray is in end_to_end.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.worker import WorkerContext
from tests.dataio.fakes import labelled, shards_of, write_dataset
from tests.trainer.ranks import kill_ranks, run_ranks
from trainer.checkpoint import find_checkpoint, load_checkpoint
from trainer.config import parse_config
from trainer.config_train import TrainConfig

STEPS, HALF = 40, 20
CELLS = [(stage, precision) for stage in (0, 1, 2, 3) for precision in ("fp32", "bf16")]
IN_CI = [(2, "bf16"), (3, "fp32")]
RANKS = 2


def config_of(runs: Path, data: str, cell: tuple[int, str]) -> TrainConfig:
    values: dict[str, Any] = {
        "name": "run",
        "runs": str(runs),
        "seed": 3,
        "steps": STEPS,
        "task": {"kind": "teacher"},
        "model": {"preset": "tiny"},
        "data": {
            "input_size": 28,
            "shuffle_window": 4,
            "roles": {"labelled": {"datasets": [data], "batch": 8, "lanes": 4, "perturbation": {"jitter_p": 0.8}}},
        },
        "optim": {
            "encoder_lr": 1e-3, "decoder_lr": 1e-2, "schedule": "cosine", "warmup_samples": 40, "clip": 1.0,
            "ema_decay": 0.9, "decay_norms_and_biases": False,
        },
        "engine": {"zero_stage": cell[0], "precision": cell[1], "micro_batch": 3},
        "checkpoint": {"every": HALF, "keep": 5},
        "track": {"tensorboard": False},
        "log_every": 1,
        "preview_every": 10_000,
    }  # fmt: skip
    return parse_config(TrainConfig, values)


def train(rank: int, world_size: int, runs: Path, data: str, cell: tuple[int, str], start: str | None) -> None:
    from trainer.worker import RankTrainer

    with RankTrainer(config_of(runs, data, cell), WorkerContext(rank=rank, world_size=world_size), start) as trainer:
        assert trainer.run() is None


def numbers(runs: Path) -> dict[int, dict[str, Any]]:
    """What was logged of every step, less what a clock says; after a resume a step may stand twice, as it was."""
    found: dict[int, dict[str, Any]] = {}
    for line in map(json.loads, (runs / "run" / "metrics.jsonl").read_text().splitlines()):
        if "event" in line:
            continue
        kept = {name: line[name] for name in ("loss", "terms", "grad_norm", "skipped", "lr", "samples")}
        assert found.setdefault(line["step"], kept) == kept
    return found


@pytest.mark.parametrize(
    "cell", [pytest.param(cell, marks=() if cell in IN_CI else pytest.mark.slow) for cell in CELLS]
)
def test_killed_and_resumed_every_bit_is_the_same(tmp_path: Path, cell: tuple[int, str]) -> None:
    data = write_dataset(tmp_path / "data", shards_of([13, 10], labelled))  # the passes end at odd places
    run_ranks(train, RANKS, tmp_path / "ranks_a", tmp_path / "whole", data, cell, None)
    root = tmp_path / "killed" / "run" / "checkpoints"
    middle = root / f"step_{HALF:08d}" / "manifest.json"
    kill_ranks(train, RANKS, tmp_path / "ranks_b", middle.exists, tmp_path / "killed", data, cell, None)
    start, passed = find_checkpoint(str(root))
    assert start == str(middle.parent) and passed == []
    run_ranks(train, RANKS, tmp_path / "ranks_c", tmp_path / "killed", data, cell, start)

    ends = [tmp_path / name / "run" / "checkpoints" / f"step_{STEPS:08d}" for name in ("whole", "killed")]
    expected, found = (load_checkpoint(str(path)) for path in ends)
    for name in ("weights", "optimizer", "ema"):
        one, other = getattr(expected, name), getattr(found, name)
        assert one.keys() == other.keys() and len(one) > 50
        assert [key for key in one if not torch.equal(one[key], other[key])] == []
    assert expected.state == found.state and expected.state.applied_steps == STEPS
    assert expected.fingerprint == found.fingerprint
    assert any(not torch.equal(expected.ema[key], expected.weights[key]) for key in expected.weights)  # type: ignore[index]
    whole, killed = numbers(tmp_path / "whole"), numbers(tmp_path / "killed")
    assert sorted(whole) == list(range(1, STEPS + 1))
    assert whole == killed
