"""What this machine lets this process have: processors and main memory, a container's limits respected."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

_GROUP = Path("/sys/fs/cgroup")


def usable_cpus() -> float:
    """Processors this process may use: its affinity, and a container's quota, which may be a fraction."""
    count = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    try:
        quota, period = (_GROUP / "cpu.max").read_text(encoding="utf-8").split()
        return count if quota == "max" else min(count, int(quota) / int(period))
    except (OSError, ValueError):
        return count


def whole_cpus() -> int:
    """`usable_cpus` as a number of processes: at least 1."""
    return max(1, int(usable_cpus()))


def free_memory() -> int:
    """Bytes of main memory that can be had now, of the machine or of the control group that it gives us."""
    import psutil

    free = int(psutil.virtual_memory().available)
    with suppress(OSError, ValueError):  # no control group, or no limit in it
        limit, used = ((_GROUP / name).read_text(encoding="utf-8") for name in ("memory.max", "memory.current"))
        free = min(free, int(limit) - int(used))
    return max(free, 0)
