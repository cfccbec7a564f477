"""Small values between the ranks of a group: as JSON in tensors, since what `torch.distributed` does with objects is to
unpickle whatever comes over a wire that nobody authenticates."""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.distributed as dist


def gathered(value: Any) -> list[Any]:
    """Every rank's value, by rank; JSON's types (tuples arrive as lists). A collective; alone, a list of one."""
    data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [_value(data)]
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    size = torch.tensor([data.numel()], device=device)
    sizes = [torch.empty_like(size) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, size)
    counts = [int(count) for count in sizes]
    padded = torch.zeros(max(counts), dtype=torch.uint8, device=device)
    padded[: data.numel()] = data.to(device)
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return [_value(part[:count].cpu()) for part, count in zip(parts, counts, strict=True)]


def first_rank_s(value: Any) -> Any:
    """Rank 0's value, on every rank. A collective."""
    return gathered(value if not dist.is_initialized() or dist.get_rank() == 0 else None)[0]


def _value(data: torch.Tensor) -> Any:
    return json.loads(bytes(data.tolist()))
