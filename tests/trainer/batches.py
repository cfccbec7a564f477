"""Batches made by hand, and the tasks that take them: small, seeded, with one bad sample and one CutMix region."""

from __future__ import annotations

import torch

from dataio.types import Batch, Target
from trainer.config import parse_config
from trainer.config_train import TrainConfig
from trainer.tasks.base import Task, make_task

SIZE = 28  # 2 x 2 patches


def train_config(kind: str, encoder: str | None = None, **overrides: object) -> TrainConfig:
    """A configuration whose data are never opened."""
    roles = {
        "teacher": {"labelled": {"datasets": ["/nowhere"], "batch": 8, "lanes": 4}},
        "pretext": {"unlabelled": {"datasets": ["/nowhere"], "batch": 8, "lanes": 4}},
        "student": {
            "labelled": {"datasets": ["/nowhere"], "batch": 4, "lanes": 4},
            "unlabelled": {"datasets": ["/nowhere"], "labels": ["/nowhere"], "batch": 8, "lanes": 4},
        },
    }[kind]
    values = {
        "name": "test",
        "steps": 4,
        "task": {"kind": kind},
        "model": {"preset": "tiny", "encoder_weights": encoder},
        "data": {"input_size": SIZE, "roles": roles},
        "optim": {"encoder_lr": 1e-3, "decoder_lr": 1e-2, "schedule": "constant"},
        "engine": {"precision": "fp32"},
    }
    return parse_config(TrainConfig, values | overrides)


def task_of(config: TrainConfig) -> Task:
    """The task, its frozen networks built."""
    task = make_task(config)
    task.prepare(torch.device("cpu"))
    return task


def global_batch(config: TrainConfig, seed: int = 0) -> list[dict[str, object]]:
    """One dict per row of the global batch, roles in sorted order; row 1 is bad, row 3 has few valid pixels."""
    generator = torch.Generator().manual_seed(seed)
    rows: list[dict[str, object]] = []
    for role in sorted(config.data.roles):
        for _ in range(config.data.roles[role].batch):
            index = len(rows)
            region_HW = torch.ones(SIZE, SIZE, dtype=torch.uint8)
            if role == "unlabelled" and index % 2:
                region_HW[5:20, 8:24] = 2
            region_HW[torch.rand(SIZE, SIZE, generator=generator) < (0.9 if index == 3 else 0.1)] = 0
            image_CHW = torch.randn(3, SIZE, SIZE, generator=generator)
            disparity_HW = torch.rand(SIZE, SIZE, generator=generator)
            good = index != 1
            rows.append(
                {
                    "role": role,
                    "student": image_CHW * good,
                    "clean": image_CHW.roll(1, 2) * good,
                    "disparity": disparity_HW * good,
                    "region": region_HW * good,
                    "weight": float(good),
                    "key": f"sample_{index}",
                }
            )
    return rows


def share(config: TrainConfig, rank: int, world_size: int, seed: int = 0) -> Batch:
    """Rank's rows of the global batch, every `world_size`-th of each role, in role order."""
    chosen: list[dict[str, object]] = []
    counts = []
    for role in sorted(config.data.roles):
        rows = [row for row in global_batch(config, seed) if row["role"] == role][rank::world_size]
        counts.append((role, len(rows)))
        chosen += rows

    def stack(name: str) -> torch.Tensor:
        return torch.stack([torch.as_tensor(row[name]) for row in chosen])

    return Batch(
        views={"student": stack("student"), "clean": stack("clean")},
        targets={"disparity": Target(value_BHW=stack("disparity"), quantity="disparity")},
        region_BHW=stack("region"),
        weight_B=stack("weight").float(),
        roles=tuple(counts),
        keys=tuple(str(row["key"]) for row in chosen),
        cursor={role: config.data.roles[role].batch * (seed + 1) for role in config.data.roles},
    )
