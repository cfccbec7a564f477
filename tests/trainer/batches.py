"""Batches made by hand, and the tasks that take them: small, seeded, with one bad sample and one CutMix region."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dataio.types import Batch, Target
from trainer.config import parse_config
from trainer.config_train import TrainConfig
from trainer.tasks.base import Task, make_task

SIZE = 28  # 2 x 2 patches
FROZEN_PRESET = "tiny-swiglu"  # another width than tiny's

# Every way to train: the task and its options. "student-projected" wants `frozen_encoder` too.
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "teacher": {"kind": "teacher"},
    "teacher-v2": {"kind": "teacher", "gradient_weight": 2.0},
    "teacher-lsq": {"kind": "teacher", "loss": "lsq", "gradient_weight": 0.5},
    "student": {"kind": "student"},
    "student-v2": {
        "kind": "student", "labelled_weight": 0, "unlabelled_weight": 1, "feature_weight": 1, "trim": 0.1,
        "gradient_weight": 2.0,
    },
    "student-lsq": {"kind": "student", "loss": "lsq", "gradient_weight": 0.5},
    "student-projected": {"kind": "student", "frozen_preset": FROZEN_PRESET, "frozen_view": "clean"},
    "metric": {"kind": "metric"},
    "pretext": {"kind": "pretext"},
}  # fmt: skip
_LABELLED = {"datasets": ["/nowhere"], "lanes": 4}
_UNLABELLED = {**_LABELLED, "labels": ["/nowhere"]}


def roles_of(task: Mapping[str, Any]) -> dict[str, Any]:
    """The roles that a task with these options needs."""
    if task["kind"] == "pretext":
        return {"unlabelled": {**_LABELLED, "batch": 8}}
    if task["kind"] != "student":
        return {"labelled": {**_LABELLED, "batch": 8}}
    roles: dict[str, Any] = {}
    if task.get("labelled_weight", 1) > 0:
        roles["labelled"] = {**_LABELLED, "batch": 4}
    if task.get("unlabelled_weight", 1) > 0:
        roles["unlabelled"] = {**_UNLABELLED, "batch": 8}
    elif task.get("feature_weight", 1) > 0:
        roles["unlabelled"] = {**_LABELLED, "batch": 8}
    return roles or {"labelled": {**_LABELLED, "batch": 8}}  # which no task needs then


def encoder_file(folder: Path, preset: str = "tiny") -> str:
    """A seeded encoder's weights."""
    from model import DepthAnything
    from model.save import save_encoder

    torch.manual_seed(3)
    path = folder / f"{preset}.safetensors"
    save_encoder(DepthAnything.from_preset(preset).pretrained, path)
    return str(path)


def train_config(kind: str, encoder: str | None = None, **overrides: object) -> TrainConfig:
    """A configuration whose data are never opened. `kind`: one of VARIANTS, whose task `overrides` may replace."""
    task: Any = overrides.get("task", VARIANTS[kind])
    values = {
        "name": "test",
        "steps": 4,
        "task": task,
        "model": {"preset": "tiny-metric-indoor" if kind == "metric" else "tiny", "encoder_weights": encoder},
        "data": {"input_size": SIZE, "roles": roles_of({**task, "kind": VARIANTS[kind]["kind"]})},
        "optim": {"encoder_lr": 1e-3, "decoder_lr": 1e-2, "schedule": "constant"},
        "engine": {"precision": "fp32"},
    }
    return parse_config(TrainConfig, values | overrides)


def variant_config(variant: str, folder: Path | str, **overrides: object) -> TrainConfig:
    """One of VARIANTS, with encoders out of a folder that `encoder_file` filled for "tiny" and FROZEN_PRESET."""
    task = dict(VARIANTS[variant])
    if "frozen_preset" in task:
        task["frozen_encoder"] = f"{folder}/{FROZEN_PRESET}.safetensors"
    return train_config(variant, f"{folder}/tiny.safetensors", **{"task": task, **overrides})


def task_of(config: TrainConfig) -> Task:
    """The task, its frozen networks built."""
    task = make_task(config)
    task.prepare(torch.device("cpu"))
    return task


def global_batch(config: TrainConfig, seed: int = 0) -> list[dict[str, object]]:
    """One dict per row of the global batch, roles in sorted order; row 1 is bad, row 3 has few valid pixels.

    Disparity is in 0..1, and depth 0..30 m, so that some of it is out of the indoor range: all of row 5's.
    """
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
                    "depth_m": (disparity_HW + (index == 5)) * 30 * good,
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

    quantity: Any = "depth_m" if config.task.kind == "metric" else "disparity"
    return Batch(
        views={"student": stack("student"), "clean": stack("clean")},
        targets={quantity: Target(value_BHW=stack(quantity), quantity=quantity)},
        region_BHW=stack("region"),
        weight_B=stack("weight").float(),
        roles=tuple(counts),
        keys=tuple(str(row["key"]) for row in chosen),
        cursor={role: config.data.roles[role].batch * (seed + 1) for role in config.data.roles},
    )
