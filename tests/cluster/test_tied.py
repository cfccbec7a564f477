"""A tied program is stopped with its starter, and never starts after it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from cluster.tied import tied

REPOSITORY = Path(__file__).resolve().parent.parent.parent


def test_it_is_the_program_itself() -> None:
    done = subprocess.run(tied(["sh", "-c", "echo $0 $1; exit 3", "a b", "c"]), capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (3, "a b c\n")


def test_nothing_starts_for_a_process_that_has_ended(tmp_path: Path) -> None:
    """It is killed between the start of its child and the child's wish to hear of that."""
    for parent, status in ((os.getpid(), 0), (os.getpid() + 1, 143)):
        command = tied(["touch", str(tmp_path / str(status))], parent)
        assert subprocess.run(command).returncode == status
    assert [path.name for path in tmp_path.iterdir()] == ["0"]


def test_a_killed_process_takes_it_along(tmp_path: Path) -> None:
    script = (
        "import subprocess, time\nfrom cluster.tied import tied\n"
        "child = subprocess.Popen(tied(['sleep', '600']))\nprint(child.pid, flush=True)\ntime.sleep(600)\n"
    )
    where = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=where)
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    ends = time.monotonic() + 60
    while "sleep" not in child.cmdline()[:1] and time.monotonic() < ends:  # until it has become the program
        time.sleep(0.02)
    parent.kill()
    assert parent.wait(60) == -signal.SIGKILL
    parent.stdout.close()
    try:
        gone, _ = psutil.wait_procs([child], timeout=60)
        assert gone == [child]
    finally:
        if child.is_running():
            child.kill()
