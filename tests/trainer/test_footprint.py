"""Bytes counted from shapes are those that a real forward pass keeps; test_footprint_engine.py asks a real engine."""

from __future__ import annotations

import gc
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from tests.trainer.batches import train_config
from trainer import optim
from trainer.footprint import _counted, footprint, forward_peak
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


def allocations(module: Any, image_BCHW: torch.Tensor, folder: Path, *, low: bool) -> tuple[int, int]:
    """(bytes not given back when a real forward pass ends, bytes held at a time at most), by PyTorch's allocator.

    The prediction lives until both are known, and autocast.
    """
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        gc.collect()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            prediction = module(image_BCHW)
        assert prediction is not None
    held = held_bytes(seen, folder)
    return held[-1], max(held)


def held_bytes(seen: profile, folder: Path) -> list[int]:
    """By PyTorch's allocator, after each of its changes."""
    seen.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]")
    return list(itertools.accumulate(size for _, size in changes))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_allocator_agrees(precision: str, checkpointing: bool, tmp_path: Path) -> None:
    """Autocast's copies of weights live until it ends, whether autograd has saved them (no checkpointing) or not."""
    model = {"preset": "tiny", "activation_checkpointing": checkpointing}
    config = config_of(model=model, engine={"precision": precision})
    found = footprint(config, 1)
    module = make_task(config).build().train()
    kept, _ = allocations(module, torch.randn(2, 3, 28, 28), tmp_path, low=precision == "bf16")
    assert found.transient + 2 * found.activations == pytest.approx(kept, rel=0.05)
    if precision == "bf16":
        assert 0.9 * 2 * found.parameters < found.transient < 2 * found.parameters
    else:
        assert found.transient < 0.01 * 4 * found.parameters


def test_the_most_that_inference_holds_is_the_allocator_s(tmp_path: Path) -> None:
    def fake() -> Any:
        with torch.device("meta"):
            return make_task(config_of()).build()

    module = make_task(config_of()).build().eval().requires_grad_(False)
    with torch.no_grad():
        _, most = allocations(module, torch.randn(8, 3, 56, 56), tmp_path, low=False)
    plan = forward_peak(fake(), rows=8, size=56, low=False)
    assert plan == pytest.approx(most, rel=0.25)  # the operators' own scratch is not in it
    assert 0.4 * plan < forward_peak(fake(), rows=8, size=56, low=True) < plan


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
    trained, whole = 4 * found.trained, 4 * found.parameters
    assert found.weights == pytest.approx(weights * whole, abs=4)  # frozen ones are cut as well
    assert found.gathered == (whole if stage == 3 else 0)  # smaller than the limit
    assert found.gradients == pytest.approx(gradients * trained, abs=4)
    alone = footprint(config_of(engine={"precision": "fp32", "zero_stage": stage}), 1)
    assert (alone.weights, alone.gathered, alone.gradients) == (whole, 0, trained)


def test_stage_3_gathers_up_to_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optim, "GATHERED", 1000)
    monkeypatch.setattr(optim, "SMALL", 10)
    config = config_of(engine={"precision": "fp32", "zero_stage": 3})
    with torch.device("meta"):
        small = sum(p.numel() for p in make_task(config).build().parameters() if p.numel() <= 10)
    assert footprint(config, 2).gathered == 4 * (1000 + small)


@pytest.mark.parametrize(("stage", "gradients"), [(1, 1.0), (2, 0.0), (3, 0.0)])
def test_offload_takes_main_memory_in_place_of_the_device_s(stage: int, gradients: float) -> None:
    found = footprint(config_of(engine={"precision": "fp32", "zero_stage": stage, "cpu_offload": True}), 2)
    assert found.gradients == gradients * 4 * found.trained
    assert found.optimizer == 4 * found.trained  # the bucket
    assert found.main_memory >= 16 * found.trained // 2
    assert found.total(0) == found.weights + found.gathered + found.gradients + found.optimizer + found.transient


def test_an_average_and_a_frozen_encoder_count() -> None:
    config = config_of(optim={"ema_decay": 0.99})
    assert footprint(config, 2).average == pytest.approx(2 * footprint(config, 2).trained, abs=4)
    assert footprint(config, 2).frozen == 0
    student = train_config("student", encoder="/not/read")
    task = make_task(student)
    found = footprint(student, 1)
    assert found.frozen == 4 * task.frozen_parameters() > 0


def test_no_file_is_read_and_nothing_is_allocated(tmp_path: Path) -> None:
    """The giant, in seconds, on any machine: its weights alone are 5 GB."""
    config = config_of(
        model={"preset": "v2-vitg", "encoder_weights": "/no/such/file"}, engine={"precision": "bf16", "zero_stage": 2}
    )
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        found = footprint(config, 8)
    assert max(held_bytes(seen, tmp_path), default=0) < 1 << 20
    assert found.parameters == pytest.approx(1.26e9, rel=0.01) and found.total(1) > 5 << 30
