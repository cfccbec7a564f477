"""A run that stops and goes on is the run that never stopped: real data, loader, engine, checkpoints, no Ray."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cluster.worker import WorkerContext
from dataio.spec import DataError
from tests.dataio.fakes import labelled, shards_of, write_dataset
from tests.trainer.ranks import run_ranks
from trainer.checkpoint import CheckpointError, load_checkpoint
from trainer.config import parse_config
from trainer.config_train import TrainConfig

CASES = [(stage, precision) for stage in (1, 2) for precision in ("fp32", "bf16")]
STEPS, HALF = 4, 2


def config_of(runs: Path, data: str, case: tuple[int, str], **overrides: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "name": f"zero{case[0]}-{case[1]}",
        "runs": str(runs),
        "seed": 3,
        "steps": STEPS,
        "task": {"kind": "teacher"},
        "model": {"preset": "tiny"},
        "data": {
            "input_size": 28,
            "shuffle_window": 4,
            "roles": {
                "labelled": {"datasets": [data], "batch": 8, "lanes": 4, "perturbation": {"jitter_p": 0.8}},
            },
        },
        "optim": {"encoder_lr": 1e-3, "decoder_lr": 1e-2, "schedule": "linear", "clip": 1.0},
        "engine": {"zero_stage": case[0], "precision": case[1], "micro_batch": 3},
        "checkpoint": {"every": HALF, "keep": 5},
        "log_every": 1,
    }
    return parse_config(TrainConfig, values | overrides)


def train(rank: int, world_size: int, runs: Path, data: str, checkpoints: bool, resume: bool) -> None:
    """Every case, from the start or from the middle; the checkpoints on the way are optional."""
    from trainer.worker import RankTrainer

    for case in CASES:
        config = config_of(runs, data, case)
        if not checkpoints:
            config = config_of(runs, data, case, checkpoint={"every": 1000, "keep": 5})
        start = str(runs / config.name / "checkpoints" / f"step_{HALF:08d}") if resume else None
        with RankTrainer(config, WorkerContext(rank=rank, world_size=world_size), start) as trainer:
            assert trainer.run() is None
            assert trainer.loop.step == STEPS


def from_the_middle(source: Path, target: Path) -> Path:
    """A copy of the runs as they were at half time."""
    for folder in source.iterdir():
        name = f"step_{HALF:08d}"
        shutil.copytree(folder / "checkpoints" / name, target / folder.name / "checkpoints" / name)
    return target


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("resume")
    data = write_dataset(root / "data", shards_of([7, 6], labelled))  # 13 by 8: the pass ends at an odd place
    run_ranks(train, 2, root / "ranks_whole", root / "whole", data, False, False)
    run_ranks(train, 2, root / "ranks_half", root / "half", data, True, False)
    same = from_the_middle(root / "half", root / "same")
    run_ranks(train, 2, root / "ranks_same", same, data, True, True)
    fewer = from_the_middle(root / "half", root / "fewer")
    run_ranks(train, 1, root / "ranks_fewer", fewer, data, True, True)
    return {"root": root, "data": data, "whole": root / "whole", "half": root / "half", "same": same, "fewer": fewer}  # type: ignore[dict-item]


def final(runs: dict[str, Path], which: str, case: tuple[int, str], step: int = STEPS) -> Any:
    return load_checkpoint(str(runs[which] / f"zero{case[0]}-{case[1]}" / "checkpoints" / f"step_{step:08d}"))


def lines(runs: dict[str, Path], which: str, case: tuple[int, str]) -> dict[int, dict[str, Any]]:
    path = runs[which] / f"zero{case[0]}-{case[1]}" / "metrics.jsonl"
    return {line["step"]: line for line in map(json.loads, path.read_text().splitlines())}


def differing(found: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    assert found.keys() == expected.keys() and expected
    return [name for name in expected if not torch.equal(found[name], expected[name])]


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Of all tensors together, relative."""
    assert found.keys() == expected.keys() and expected
    square = sum(float((found[name].double() - expected[name].double()).square().sum()) for name in expected)
    return float((square / sum(float(tensor.double().square().sum()) for tensor in expected.values())) ** 0.5)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("which", ["half", "same"])
def test_on_as_many_ranks_every_bit_is_the_same(runs: dict[str, Path], which: str, case: tuple[int, str]) -> None:
    """`half` wrote a checkpoint on its way, `same` went on from it in new processes."""
    expected, found = final(runs, "whole", case), final(runs, which, case)
    assert differing(found.weights, expected.weights) == []
    assert differing(found.optimizer, expected.optimizer) == []
    assert found.state == expected.state


@pytest.mark.parametrize("case", CASES)
def test_on_fewer_ranks_only_rounding_differs(runs: dict[str, Path], case: tuple[int, str]) -> None:
    expected, found, middle = (
        final(runs, *which) for which in (("whole", case), ("fewer", case), ("half", case, HALF))
    )
    tolerance = 1e-5 if case[1] == "fp32" else 1e-2
    moved = {name: expected.weights[name] - middle.weights[name] for name in expected.weights}
    assert distance({n: found.weights[n] - middle.weights[n] for n in moved}, moved) < 30 * tolerance
    assert distance(found.weights, expected.weights) < tolerance
    if case[1] == "fp32":  # from scratch a map is nearly flat, and its deviation divides: bf16's rounding, which hangs
        # on the shape of the batch, can turn the gradient of such a step
        assert distance(found.optimizer, expected.optimizer) < 5 * tolerance
    assert found.state == expected.state


@pytest.mark.parametrize("case", CASES)
def test_rates_losses_and_cursor_go_on(runs: dict[str, Path], case: tuple[int, str]) -> None:
    whole = lines(runs, "whole", case)
    assert sorted(whole) == [1, 2, 3, 4]
    assert whole[3]["lr"] == pytest.approx({"encoder": 0.5e-3, "decoder": 0.5e-2})
    for which in ("same", "fewer"):
        found = lines(runs, which, case)
        assert sorted(found) == [3, 4]
        for step in (3, 4):
            assert found[step]["lr"] == whole[step]["lr"]
            assert found[step]["loss"] == pytest.approx(whole[step]["loss"], rel=1e-4 if case[1] == "fp32" else 2e-2)
    # 13 samples by 8 on 4 lanes: 8 and 5 to a pass
    assert final(runs, "half", case, HALF).state.cursor == {"labelled": 13}
    assert final(runs, "fewer", case).state.cursor == {"labelled": 26}


def refused(rank: int, world_size: int, runs: Path, data: str, others: list[str], checkpoints: list[str]) -> list[str]:
    """What changed inputs are told on a resume; the last one changed nothing."""
    from trainer.worker import RankTrainer

    messages = []
    config = config_of(runs, data, (2, "fp32"))
    attempts = [(config_of(runs, other, (2, "fp32")), checkpoints[0]) for other in others]
    attempts += [(config_of(runs, data, (2, "fp32"), seed=4), checkpoints[0])]
    attempts += [(config, checkpoint) for checkpoint in reversed(checkpoints)]
    for config, checkpoint in attempts:
        try:
            with RankTrainer(config, WorkerContext(rank=rank, world_size=world_size), checkpoint):
                messages.append("went on")
        except (CheckpointError, DataError) as error:
            messages.append(str(error))
    return messages


def test_other_data_another_order_and_another_encoder_are_refused(runs: dict[str, Path], tmp_path: Path) -> None:
    as_large = write_dataset(tmp_path / "as_large", shards_of([7, 6], lambda seed: labelled(seed + 50)))
    smaller = write_dataset(tmp_path / "smaller", shards_of([7, 5], labelled))
    checkpoint = runs["half"] / "zero2-fp32" / "checkpoints" / f"step_{HALF:08d}"
    other_encoder = shutil.copytree(checkpoint, tmp_path / checkpoint.name)
    manifest = json.loads((other_encoder / "manifest.json").read_text())
    (other_encoder / "manifest.json").write_text(json.dumps(manifest | {"frozen": "another"}))
    (messages,) = run_ranks(
        refused, 1, tmp_path / "ranks", tmp_path / "runs", str(runs["data"]), [as_large, smaller],
        [str(checkpoint), str(other_encoder)],
    )  # fmt: skip
    for message, field in zip(messages, ("roles.labelled.datasets", "roles.labelled.datasets", "seed"), strict=False):
        assert "step_00000002: was made with other data" in message
        assert f"data.{field} was " in message
    assert "was trained with another frozen encoder" in messages[3]
    assert messages[4] == "went on"
