"""A run that goes on on another number of ranks, or at another ZeRO stage: the same batches, the same gradients, a loss
curve within what rounding does to any run; and what a resume refuses. Real data, loader, engine, checkpoints, no Ray.

test_exact.py has the same ranks and stage, where every bit is the same.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cluster.worker import WorkerContext
from dataio.spec import DataError
from dataio.types import Batch
from tests.dataio.fakes import jpeg, labelled, png, shards_of, smooth, write_dataset
from tests.trainer.ranks import run_ranks
from trainer.checkpoint import CheckpointError, load_checkpoint
from trainer.config import parse_config
from trainer.config_train import TrainConfig

START, STEPS = 4, 24
# (ranks, ZeRO stage) that go on from the checkpoint which two ranks at stage 2 have made
OTHERS = [(1, 0), (3, 2), (4, 2), (2, 0), (2, 1), (2, 3), (3, 3), (4, 3)]
IN_CI = [(3, 2), (2, 3)]
NOISE, NOISY = 1e-7, 5  # relative, on the weights; as many runs
# Gradients through a median jump to another pixel when two change places, and with them the whole run; least squares
# is smooth, and there the spread of rounding is small enough for any mistake to show.
CURVES = {"mad": 0.2, "lsq": 1e-4}  # loss: the largest spread that still shows something, over the mean loss


def gentle(seed: int, height: int = 48, width: int = 56) -> dict[str, bytes]:
    """Members of a sample whose depth can be learned from its image: 2 to 32 m, with a hole."""
    image_HWC = smooth(seed, height, width)
    code_HW = (2000 + 30_000 * image_HWC.mean(-1) / 255).astype(np.uint16)
    code_HW[:3, :3] = 0
    return {"depth.png": png(code_HW), "jpg": jpeg(image_HWC)}


def config_of(runs: Path, data: str, stage: int = 2, loss: str = "mad", **overrides: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "name": "run",
        "runs": str(runs),
        "seed": 3,
        "steps": STEPS,
        "task": {"kind": "teacher", "loss": loss},
        "model": {"preset": "tiny"},
        "data": {
            "input_size": 28,
            "shuffle_window": 4,
            "roles": {
                "labelled": {"datasets": [data], "batch": 8, "lanes": 4, "perturbation": {"jitter_p": 0.8}},
            },
        },
        "optim": {"encoder_lr": 1e-4, "decoder_lr": 1e-3, "schedule": "linear", "clip": 1.0},
        "engine": {"zero_stage": stage, "precision": "fp32"},
        "checkpoint": {"every": START, "keep": 100},
        "track": {"tensorboard": False},
        "log_every": 1,
        "preview_every": 10_000,
    }
    return parse_config(TrainConfig, values | overrides)


def digests(batch: Batch) -> dict[str, str]:
    """sha256 of what each sample of a batch shows the network, by key."""
    target_BHW = batch.targets["disparity"].value_BHW
    found = {}
    for row, key in enumerate(batch.keys):
        parts = (batch.views["student"][row], target_BHW[row], batch.region_BHW[row], batch.weight_B[row])
        found[key] = hashlib.sha256(b"".join(part.contiguous().numpy().tobytes() for part in parts)).hexdigest()
    return {key: digest for key, digest in found.items() if key}


class Observed:
    """Hooks of a RankTrainer that note batches and gradients; with `follow`, each step starts from those weights."""

    def __init__(self, trainer: Any, follow: list[dict[str, Tensor]] | None) -> None:
        self.trainer, self.follow = trainer, follow
        self.batches: list[dict[str, str]] = []
        self.gradients: list[dict[str, np.ndarray]] = []
        self.weights: list[dict[str, Tensor]] = []
        step = trainer.engine.step

        def observed(rates: Any) -> Any:
            gradients = trainer.engine.gradients()
            self.gradients.append({name: g.double().numpy() for name, g in gradients.items()})
            return step(rates)

        trainer.engine.step = observed
        before_step = trainer.before_step

        def before(batch: Batch) -> None:
            before_step(batch)
            self.batches.append(digests(batch))
            at = len(self.batches) - 1
            if self.follow is not None:
                set_weights(trainer.engine, self.follow[at])
            else:
                whole = trainer.engine.whole_weights(everywhere=True)
                self.weights.append({name: t.detach().clone() for name, t in whole.items()})

        trainer.before_step = before


@torch.no_grad()
def set_weights(engine: Any, weights: dict[str, Tensor]) -> None:
    """Put whole tensors into an engine: fp32 masters and what the forward pass reads."""
    from deepspeed.utils import safe_set_full_fp32_param

    for name, parameter in engine.trained.items():
        if engine.stage == 0:
            parameter.data.copy_(weights[name])
            continue
        if engine.stage < 3:
            safe_set_full_fp32_param(parameter, weights[name].clone())
            parameter.data.copy_(weights[name])
            continue
        span = engine.spans[name]  # DeepSpeed's own setter fails where a parameter has fewer elements than ranks
        master, _ = engine._optimizer._get_fp32_opt_state_partition(parameter, True)
        for partition in (master, parameter.ds_tensor.data.reshape(-1)):
            partition[: len(span)].copy_(weights[name].reshape(-1)[span.start : span.stop])


def train(
    rank: int, world_size: int, runs: Path, data: str, stage: int, start: str | None, follow: Any = None,
    noise: int | None = None, loss: str = "mad",
) -> Any:  # fmt: skip
    """From `start` (None: the beginning) to the end; returns what was observed and the logged losses."""
    from trainer.worker import RankTrainer

    config = config_of(runs, data, stage, loss)
    with RankTrainer(config, WorkerContext(rank=rank, world_size=world_size), start) as trainer:
        if noise is not None:
            generator = torch.Generator().manual_seed(noise)
            weights = {n: t.detach().clone() for n, t in trainer.engine.whole_weights(everywhere=True).items()}
            noisy = {n: t * (1 + NOISE * torch.randn(t.shape, generator=generator)) for n, t in weights.items()}
            set_weights(trainer.engine, noisy)
        seen = Observed(trainer, follow)
        assert trainer.run() is None
    return seen.batches, seen.gradients, seen.weights


def losses(runs: Path) -> list[float]:
    lines = map(json.loads, (runs / "run" / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line and line["step"] > START]


def together(parts: list[Any]) -> list[dict[str, str]]:
    """The global batches: every rank's samples of a step in one table."""
    steps = range(len(parts[0][0]))
    return [{key: digest for batches, _, _ in parts for key, digest in batches[step].items()} for step in steps]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two ranks at stage 2: a checkpoint after four steps, and twenty more steps in new processes."""
    root = tmp_path_factory.mktemp("resume")
    data = write_dataset(root / "data", shards_of([7, 6], labelled))  # 13 by 8: the pass ends at an odd place
    run_ranks(train, 2, root / "first", root / "whole", data, 2, None)
    start = str(root / "whole" / "run" / "checkpoints" / f"step_{START:08d}")
    again = run_ranks(train, 2, root / "again", root / "again_runs", data, 2, start)
    return {"root": root, "data": data, "start": start, "parts": again, "losses": losses(root / "again_runs")}


OTHER_CELLS = [pytest.param(cell, marks=() if cell in IN_CI else pytest.mark.slow) for cell in OTHERS]


@pytest.mark.parametrize("cell", OTHER_CELLS)
def test_batches_and_gradients_are_the_same_on_other_ranks_and_stages(
    base: dict[str, Any], tmp_path: Path, cell: tuple[int, int]
) -> None:
    """Keys and bytes of every global batch; the gradient at the same weights, at each of twenty steps."""
    ranks, stage = cell
    follow = base["parts"][0][2]
    parts = run_ranks(train, ranks, tmp_path / "ranks", tmp_path / "runs", base["data"], stage, base["start"], follow)
    expected = together(base["parts"])
    assert together(parts) == expected and len(expected) == STEPS - START
    assert {len(batch) for batch in expected} == {8, 5}
    for step, (found, gradient) in enumerate(zip(parts[0][1], base["parts"][0][1], strict=True)):
        assert found.keys() == gradient.keys() and len(found) > 50
        length = sum(float((g**2).sum()) for g in gradient.values()) ** 0.5
        apart = sum(float(((found[name] - g) ** 2).sum()) for name, g in gradient.items()) ** 0.5
        assert apart <= 1e-5 * length, f"step {step}: {apart / length}"


@pytest.mark.slow
@pytest.mark.parametrize("loss", CURVES)
def test_the_loss_curve_stays_within_the_spread_of_rounding(tmp_path: Path, loss: str) -> None:
    """Free-running: no farther from the same ranks' curve than runs whose weights were moved by 1e-7 are.

    "Within" is twice the spread: of six curves from one distribution, each is the outermost as often as any other.
    """
    data = write_dataset(tmp_path / "data", shards_of([7, 6], gentle))

    def curve(name: str, ranks: int, stage: int, start: str | None, noise: int | None = None) -> np.ndarray:
        runs = tmp_path / name
        run_ranks(train, ranks, tmp_path / f"{name}-ranks", runs, data, stage, start, None, noise, loss)
        return np.array(losses(runs))

    whole = curve("whole", 2, 2, None)
    start = str(tmp_path / "whole" / "run" / "checkpoints" / f"step_{START:08d}")
    noisy = [curve(f"noisy{seed}", 2, 2, start, seed) for seed in range(NOISY)]
    spread = np.abs(np.array(noisy) - whole).max()
    assert 0 < spread < CURVES[loss] * whole.mean()
    for ranks, stage in OTHERS:
        apart = np.abs(curve(f"free{ranks}{stage}", ranks, stage, start) - whole).max()
        print(f"{loss}: {ranks} ranks, stage {stage}: {apart:.2e}; spread {spread:.2e}, mean loss {whole.mean():.3f}")
        assert apart <= 2 * spread


def refused(rank: int, world_size: int, runs: Path, data: str, others: list[str], checkpoints: list[str]) -> list[str]:
    """What changed inputs are told on a resume; the last one changed nothing."""
    from trainer.worker import RankTrainer

    messages = []
    attempts = [(config_of(runs, other), checkpoints[0]) for other in others]
    attempts += [(config_of(runs, data, seed=4), checkpoints[0])]
    attempts += [(config_of(runs, data, optim={"decay_norms_and_biases": False}), checkpoints[0])]
    attempts += [(config_of(runs, data), checkpoint) for checkpoint in reversed(checkpoints)]
    for config, checkpoint in attempts:
        try:
            with RankTrainer(config, WorkerContext(rank=rank, world_size=world_size), checkpoint):
                messages.append("went on")
        except (CheckpointError, DataError) as error:
            messages.append(str(error))
    return messages


def test_other_data_groups_encoders_and_weights_are_refused(base: dict[str, Any], tmp_path: Path) -> None:
    as_large = write_dataset(tmp_path / "as_large", shards_of([7, 6], lambda seed: labelled(seed + 50)))
    smaller = write_dataset(tmp_path / "smaller", shards_of([7, 5], labelled))
    checkpoint = Path(base["start"])
    changed = []
    network = json.loads((checkpoint / "manifest.json").read_text())["network"]
    changes = {
        "frozen": {"frozen": "another"},
        "weights": {"weights": "0" * 64},
        "network": {"network": network | {"position_mode": "other", "readout": "other"}},
    }
    for name, change in changes.items():
        copy = shutil.copytree(checkpoint, tmp_path / name / checkpoint.name)
        manifest = json.loads((copy / "manifest.json").read_text())
        (copy / "manifest.json").write_text(json.dumps(manifest | change))
        changed.append(str(copy))
    (messages,) = run_ranks(
        refused, 1, tmp_path / "ranks", tmp_path / "runs", base["data"], [as_large, smaller],
        [str(checkpoint), *changed],
    )  # fmt: skip
    expected = (["roles.labelled.datasets"], ["roles.labelled.datasets", "roles.labelled.samples"], ["seed"])
    for message, fields in zip(messages, expected, strict=False):
        assert f"step_{START:08d}: was made with other data" in message
        assert [part.split(": is ")[0] for part in message.split("data.")[1:]] == fields
    assert "parameter groups differ" in messages[3] and "optim.decay_norms_and_biases" in messages[3]
    named = "is of another network: network.position_mode: is 'official', but was 'other'; network.readout: "
    assert named in messages[4]
    assert "the weights in the engine are not those that were saved" in messages[5]
    assert "was trained with another frozen encoder" in messages[6]
    assert messages[7] == "went on"


def test_counters_are_those_of_the_run(base: dict[str, Any]) -> None:
    state = load_checkpoint(base["start"]).state
    # 13 samples by 8 on 4 lanes: 8 and 5 to a pass
    assert (state.step, state.applied_steps, dict(state.cursor)) == (START, START, {"labelled": 26})
    assert (state.micro_batches, state.workers) == (1, 2)
