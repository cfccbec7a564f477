"""Model-FLOP utilisation: the arithmetic that the networks need for a step's images, over what the devices can do in
its time (PaLM, arXiv 2204.02311, appendix B).

Counted are multiplications and additions of matrix products, convolutions and attention: forward once, and twice that
for the backward pass of the network that is trained; frozen networks forward only. Recomputation is not counted.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn

from trainer.config_train import TrainConfig
from trainer.tasks.base import Task

_TRAINED = 3  # forward, and backward with respect to weights and to activations

# FLOP/s by (part of the GPU's name, dense): bf16 with tensor cores, and fp32 as PyTorch computes it by itself, without
# TF32. From NVIDIA's data sheets; the first that fits counts.
_GPUS = (
    ("B200", 2.25e15, 75e12),
    ("H200", 989.4e12, 66.9e12),
    ("H100 NVL", 835.5e12, 60e12),
    ("H100 PCIe", 756e12, 51.2e12),
    ("H100", 989.4e12, 66.9e12),
    ("A100", 312e12, 19.5e12),
    ("A40", 149.7e12, 37.4e12),
    ("A10", 125e12, 31.2e12),
    ("L40S", 362.05e12, 91.6e12),
    ("L40", 181.05e12, 90.5e12),
    ("L4", 121e12, 30.3e12),
    ("RTX 4090", 165.2e12, 82.6e12),
    ("RTX 3090", 71e12, 35.6e12),
)
_MEASURE_S = 0.15


def image_flops(network: nn.Module, size: int, **options: Any) -> int:
    """Of one forward pass on one square image of `size` pixels, from shapes alone: nothing is computed."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

    def attention(query: Any, key: Any, value: Any, *rest: Any, out_shape: Any = None, **more: Any) -> int:
        return int(sdpa_flop_count(query, key, value))

    # PyTorch counts the kernels of GPUs, and passes over the one of CPUs
    known = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention}
    device = next(network.parameters()).device
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        FlopCounterMode(display=False, custom_mapping=known) as counter,
        torch.no_grad(),
    ):
        network(torch.empty(1, 3, size, size, device=device), **options)
    return int(counter.get_total_flops())


def step_flops(task: Task, module: nn.Module, config: TrainConfig) -> int:
    """Of one optimizer step on the global batch. `module`: the trained network, whole, before an engine has it."""
    size, rows = config.data.input_size, {name: role.batch for name, role in config.data.roles.items()}
    total = _TRAINED * sum(rows.values()) * image_flops(module, size)
    for network, count in task.frozen_rows(rows):
        total += count * image_flops(network, size)
    return total


def device_flops(device: torch.device, precision: str, name: str = "") -> float:
    """FLOP/s of one device at `precision` (bf16, fp32): of a known GPU as its maker says, otherwise as one large matrix
    product does on it now (of a CPU with the threads that this process has)."""
    for part, bf16, fp32 in _GPUS:
        if part in name:
            return bf16 if precision == "bf16" else fp32
    return _measured(device, torch.bfloat16 if precision == "bf16" else torch.float32)


def _measured(device: torch.device, dtype: torch.dtype) -> float:
    size = 4096 if device.type == "cuda" else 512
    with torch.no_grad():
        left, right = (torch.rand(size, size, device=device).to(dtype) for _ in range(2))
        best, ends = float("inf"), time.perf_counter() + _MEASURE_S
        while time.perf_counter() < ends:
            began = time.perf_counter()
            product = left @ right
            product[0, 0].item()  # waits for the device
            best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best
