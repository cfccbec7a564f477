"""Counted arithmetic against the formula of a transformer, and the measure of a device."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from model import Encoder, get_preset
from tests.trainer.batches import train_config
from trainer.flops import device_flops, image_flops, step_flops
from trainer.tasks.base import make_task


@pytest.mark.parametrize(("preset", "size"), [("tiny", 70), ("v2-vits", 518)])
def test_an_encoder_s_arithmetic_is_what_its_shapes_say(preset: str, size: int) -> None:
    """Projections and MLP: 24 n d^2 a block; attention: 4 n^2 d a block; the patches: one matrix product."""
    chosen = get_preset(preset)
    patches = (size // 14) ** 2
    n, d = patches + 1, chosen.width
    expected = 2 * patches * 3 * 14 * 14 * d + chosen.depth * (24 * n * d * d + 4 * n * n * d)
    with torch.device("meta"):
        encoder = Encoder(chosen)
    encoder.to_empty(device="cpu")
    assert image_flops(encoder, size) == expected


def test_a_step_counts_the_backward_pass_of_what_is_trained_alone() -> None:
    config = train_config("teacher")
    task = make_task(config)
    module = task.build()
    size = config.data.input_size
    assert step_flops(task, module, config) == 3 * config.global_batch * image_flops(module, size)

    class WithFrozen:
        frozen_rows = staticmethod(lambda rows: [(module, rows["labelled"])])

    beside: Any = WithFrozen()
    assert step_flops(beside, module, config) == (3 + 1) * config.global_batch * image_flops(module, size)


def test_known_gpus_are_looked_up_and_others_measured() -> None:
    cpu = torch.device("cpu")
    assert device_flops(cpu, "bf16", "NVIDIA H200") == 989.4e12
    assert device_flops(cpu, "fp32", "NVIDIA A100-SXM4-80GB") == 19.5e12
    assert device_flops(cpu, "bf16", "NVIDIA H100 PCIe") < device_flops(cpu, "bf16", "NVIDIA H100 80GB HBM3")
    assert 1e8 < device_flops(cpu, "fp32", "x86_64") < 1e14
