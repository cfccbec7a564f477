"""What this machine lets this process have: processors and main memory, a container's limits respected."""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress
from pathlib import Path

_GROUP = Path("/sys/fs/cgroup")
# Of glibc's malloc.h: M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_ARENA_MAX (the arenas of other threads cannot grow as far).
_KEEP_ALL = ((-3, 1 << 30), (-1, (1 << 31) - 1), (-8, 1))


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


def keep_freed_memory() -> None:
    """Tell the C library to keep what this process frees for its next allocation, instead of giving it back.

    The activations of a forward pass are tens of megabytes each, which glibc takes from the system and returns every
    time: 50,000 page faults and 7 % of the time of a pass of v2-vits at 518 x 784 (docs/log.md). Nothing where the C
    library is another one.
    """
    with suppress(OSError, AttributeError):
        c_library = ctypes.CDLL(None)
        for option, value in _KEEP_ALL:
            c_library.mallopt(option, value)
