"""Signals to a driver and its whole process group, as a terminal, `timeout` or a batch system sends them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from cluster.runtime import _session_folder

ROOT = Path(__file__).resolve().parent.parent.parent


class Driver:
    """tests/cluster/driver.py in a session of its own, so that its process group is only its own."""

    def __init__(self, function: str, folder: Path, save_s: float) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.cluster.driver", function, str(folder), str(save_s)],
            cwd=ROOT,
            start_new_session=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait_for_steps(self, count: int) -> None:
        assert self.process.stdout is not None
        for _ in range(count):
            line = self.process.stdout.readline()
            if not line.startswith("step"):
                raise AssertionError(f"the driver ended early: {line}{self.process.communicate()}")

    def signal_all(self, number: signal.Signals) -> None:
        os.killpg(self.process.pid, number)

    def end(self) -> tuple[int, str]:
        _, errors = self.process.communicate(timeout=120)
        return self.process.returncode, errors

    def left(self) -> list[str]:
        """Processes that are still in the driver's session."""
        found = []
        for process in psutil.process_iter():
            try:
                if os.getsid(process.pid) == self.process.pid and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(f"{process.pid} {process.name()}")
            except (psutil.Error, OSError):
                continue
        return found


@pytest.fixture
def folders() -> Iterator[None]:
    before = {*Path("/tmp").glob("fathom-ray-*")}
    yield
    mine = {path for path in {*Path("/tmp").glob("fathom-ray-*")} - before if not _in_use(path)}
    assert not mine


def _in_use(path: Path) -> bool:
    """Another test's session, in another process."""
    for process in psutil.process_iter():
        try:
            if any(str(path) in argument for argument in process.cmdline()):
                return True
        except psutil.Error:
            continue
    return not path.exists()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_the_ranks_finish_a_save_after_a_signal_to_everybody(
    tmp_path: Path, folders: None, number: signal.Signals, status: int
) -> None:
    driver = Driver("until_stopped", tmp_path, save_s=2.0)
    driver.wait_for_steps(2)
    driver.signal_all(number)
    assert driver.end() == (status, "")
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["reason"] == number.name
    assert (result["deadline"] is not None) == (number is signal.SIGTERM)
    assert (tmp_path / "saved-0").read_text() == (tmp_path / "saved-1").read_text() == str(result["steps"])
    assert driver.left() == []


def test_the_second_sigint_is_immediate(tmp_path: Path, folders: None) -> None:
    driver = Driver("ignore_stop", tmp_path, save_s=0.0)
    driver.wait_for_steps(1)
    driver.signal_all(signal.SIGINT)
    time.sleep(1.0)
    assert driver.process.poll() is None
    began = time.monotonic()
    driver.signal_all(signal.SIGINT)
    assert driver.end() == (130, "")
    assert time.monotonic() - began < 40
    assert driver.left() == []


@pytest.mark.slow  # Ray's agents look for their dead control store for a minute before they leave
def test_a_killed_driver_takes_everything_along(tmp_path: Path, folders: None) -> None:
    driver = Driver("ignore_stop", tmp_path, save_s=0.0)
    driver.wait_for_steps(1)
    driver.process.kill()
    driver.process.wait()  # its pipes stay open as long as anybody below it lives
    ends = time.monotonic() + 180
    while driver.left() and time.monotonic() < ends:
        time.sleep(0.2)
    assert driver.left() == []
    driver.end()
    with _session_folder():  # the next session removes its folder
        pass
