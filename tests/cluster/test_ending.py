"""What a group that was ended by force must not leave: reservations, processes, shared memory."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster.ending import clean, release_room
from cluster.runtime import Session, ray_session


@pytest.fixture(scope="module", autouse=True)
def session() -> Iterator[Session]:
    with ray_session(cpus=2) as session:
        yield session


class Keeper:
    """Reserves what a group of ranks would."""

    def reserve(self) -> None:
        import ray
        from ray.util import placement_group

        ray.get(placement_group([{"CPU": 1}, {"CPU": 1}]).ready())


def free() -> float:
    import ray

    return float(ray.available_resources().get("CPU", 0.0))


def until(condition: Any, what: str) -> None:
    ends = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < ends, f"no {what}"
        time.sleep(0.1)


def test_what_a_killed_controller_had_reserved_is_given_back() -> None:
    """Ray keeps it for as long as the job lives: guarded here, since it is why the function exists."""
    import ray

    whole = free()
    keeper: Any = ray.remote(num_cpus=0)(Keeper).remote()
    ray.get(keeper.reserve.remote())
    ray.kill(keeper)
    time.sleep(2)
    until(lambda: free() == whole - 2, "reservation that stays")
    release_room()
    until(lambda: free() == whole, "room")


def test_only_ray_s_own_processes_are_killed() -> None:
    """A process that has taken the number of a dead rank is somebody else's."""
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    rank = subprocess.Popen(["bash", "-c", "exec -a ray::RayTrainWorker sleep 60"])
    try:
        until(lambda: "ray::" in Path(f"/proc/{rank.pid}/cmdline").read_text(), "name")
        born = {process.pid: psutil.Process(process.pid).create_time() for process in (other, rank)}
        clean([(rank.pid, born[rank.pid] - 60)], [])  # another rank's, which began later
        assert rank.poll() is None
        clean([*born.items(), (2**22 + 1, 0.0)], [])
        until(lambda: not psutil.pid_exists(rank.pid), "end")  # waited for already: its status is gone
        assert other.poll() is None
    finally:
        for process in (other, rank):
            process.kill()
            process.wait()


def test_shared_memory_goes_by_its_prefix() -> None:
    prefix = f"fathom-test-{os.getpid()}-"
    mine, other = Path("/dev/shm", f"{prefix}a"), Path("/dev/shm", f"fathom-tests-{os.getpid()}")
    try:
        mine.write_bytes(b"x")
        other.write_bytes(b"x")
        clean([], [prefix, ""])
        assert not mine.exists() and other.exists()
    finally:
        for path in (mine, other):
            path.unlink(missing_ok=True)
