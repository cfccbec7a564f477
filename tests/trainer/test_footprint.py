"""Bytes counted from shapes are those that a real forward pass keeps and a real engine holds."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.trainer.batches import train_config
from trainer.footprint import _counted, footprint
from trainer.tasks.base import make_task


def config_of(**changes: Any) -> Any:
    return train_config("teacher", **changes)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_real_forward_pass_keeps_what_was_counted(precision: str, rows: int) -> None:
    config = config_of(engine={"precision": precision})
    found = footprint(config, 1)
    torch.manual_seed(0)
    module = make_task(config).build().train()
    size = config.data.input_size
    with _counted(module) as kept, torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        module(torch.randn(rows, 3, size, size))
    assert found.transient + rows * found.activations == pytest.approx(kept[0], rel=0.02)
    assert found.parameters == sum(p.numel() for p in module.parameters())


def test_checkpointing_keeps_less() -> None:
    model = {"preset": "tiny"}
    plain = footprint(config_of(model=model), 1)
    less = footprint(config_of(model=model | {"activation_checkpointing": True}), 1)
    assert 0 < less.activations < 0.8 * plain.activations
    assert less.weights == plain.weights


@pytest.mark.parametrize(
    ("stage", "weights", "gradients"), [(0, 1.0, 1.0), (1, 1.0, 1.0), (2, 1.0, 0.25), (3, 0.25, 0.25)]
)
def test_zero_cuts_what_its_stage_cuts(stage: int, weights: float, gradients: float) -> None:
    found = footprint(config_of(engine={"precision": "fp32", "zero_stage": stage}), 4)
    trained, others = 4 * found.trained, 4 * (found.parameters - found.trained)
    assert found.weights == pytest.approx(weights * trained + others, abs=4)
    assert found.gradients == pytest.approx(gradients * trained, abs=4)
    alone = footprint(config_of(engine={"precision": "fp32", "zero_stage": stage}), 1)
    assert (alone.weights, alone.gradients) == (trained + others, trained)


def test_an_average_and_a_frozen_encoder_count() -> None:
    config = config_of(optim={"ema_decay": 0.99})
    assert footprint(config, 2).average == pytest.approx(2 * footprint(config, 2).trained, abs=4)
    assert footprint(config, 2).frozen == 0
    student = train_config("student", encoder="/not/read")
    task = make_task(student)
    found = footprint(student, 1)
    assert found.frozen == 4 * task.frozen_parameters() > 0


def test_no_file_is_read_and_nothing_is_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    """The giant, in seconds, on any machine: its weights alone are 5 GB."""
    import psutil

    config = config_of(
        model={"preset": "v2-vitg", "encoder_weights": "/no/such/file"}, engine={"precision": "bf16", "zero_stage": 2}
    )
    before = psutil.Process().memory_info().rss
    found = footprint(config, 8)
    assert psutil.Process().memory_info().rss - before < 1 << 30
    assert found.parameters == pytest.approx(1.26e9, rel=0.01) and found.total(1) > 5 << 30
