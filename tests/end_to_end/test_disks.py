"""A disk that fills up, a folder that turns read-only, while a run trains: it goes on, and ends as one left alone."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.end_to_end.cli import Running, json_lines, steps_done, write_config
from tests.end_to_end.conftest import World
from tests.end_to_end.nodes import STEPS, run_values, same_weights
from tests.trainer.disks import fill, small_disk

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """The folder, for the time of the block: root writes into any other."""
    subprocess.run(["mount", "--bind", folder, folder], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", folder], check=True)
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


def saved(run: Path) -> list[int]:
    return [line["step"] for line in json_lines(run / "journal.jsonl") if line["event"] == "checkpoint"]


def test_a_full_disk(tmp_path: Path, data_world: World, undisturbed: Path) -> None:
    with small_disk(tmp_path / "disk", 64) as disk:
        write_config(disk / "teacher.yaml", run_values(data_world))
        run = disk / "runs" / "teacher"
        running = Running("train", "teacher.yaml", cwd=disk)
        running.until(lambda: steps_done(run) >= 25, "step 25")
        before = saved(run)
        fill(disk / "full")
        time.sleep(4)  # some thirty steps, three checkpoints
        assert saved(run)[-2:] == before[-2:]
        assert all((run / "checkpoints" / f"step_{step:08d}").is_dir() for step in before[-2:])
        (disk / "full").unlink()
        done = running.wait()
        assert done.status == 0 and "Traceback" not in done.err, done.err
        assert "No space left" in done.err and "the run goes on" in done.err
        assert saved(run)[-1] == STEPS and same_weights(run, undisturbed)


def test_a_checkpoint_folder_that_turns_read_only(tmp_path: Path, data_world: World, undisturbed: Path) -> None:
    with small_disk(tmp_path / "disk", 64) as disk:  # only for the right to mount
        write_config(disk / "teacher.yaml", run_values(data_world))
        run = disk / "runs" / "teacher"
        running = Running("train", "teacher.yaml", cwd=disk)
        running.until(lambda: steps_done(run) >= 25, "step 25")
        with read_only(run / "checkpoints"):
            running.until(lambda: "checkpoint_failed" in told(run), "a failed checkpoint")
        done = running.wait()
        assert done.status == 0 and "Traceback" not in done.err, done.err
        assert "Read-only file system" in done.err
        assert saved(run)[-1] == STEPS and same_weights(run, undisturbed)


def told(run: Path) -> list[str]:
    return [line["event"] for line in json_lines(run / "journal.jsonl")]
