"""What a rank and a run's disk show when somebody scrapes them: looked up then, so that a step pays nothing for it."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import psutil

from cluster.exporter import Exporter
from cluster.telemetry import STATES
from cluster.worker import WorkerContext

if TYPE_CHECKING:
    import torch


def watch_rank(exporter: Exporter, context: WorkerContext, device: torch.device) -> None:
    """Serve what the rank is doing and the memory that it holds."""
    exporter.before_scrape(lambda: _state(exporter, context))
    exporter.before_scrape(lambda: _memory(exporter, device))


def watch_disk(exporter: Exporter, folder: str) -> None:
    """Serve how full the file system is that holds a local folder."""

    def look() -> None:
        usage = shutil.disk_usage(folder)
        exporter.metric("fathom_disk_free_bytes").set(usage.free)
        exporter.metric("fathom_disk_size_bytes").set(usage.total)

    exporter.before_scrape(look)


def device_memory(device: torch.device) -> dict[str, float]:
    """Bytes by kind: of a GPU as PyTorch's allocator holds them, of a CPU as this process does."""
    if device.type == "cuda":
        import torch

        stats = torch.cuda.memory_stats(device)
        return {
            "allocated": stats.get("allocated_bytes.all.current", 0),
            "reserved": stats.get("reserved_bytes.all.current", 0),
            "peak": stats.get("allocated_bytes.all.peak", 0),
            "total": torch.cuda.get_device_properties(device).total_memory,
        }
    return {"resident": psutil.Process().memory_info().rss, "total": psutil.virtual_memory().total}


def _state(exporter: Exporter, context: WorkerContext) -> None:
    now = context.phase
    for state in STATES:
        exporter.metric("fathom_rank_state").labels(state=state).set(state == now)


def _memory(exporter: Exporter, device: torch.device) -> None:
    for kind, value in device_memory(device).items():
        exporter.metric("fathom_device_memory_bytes").labels(kind=kind).set(value)


