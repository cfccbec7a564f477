"""A run whose ranks end before their time starts them again by itself, and ends as one that nothing happened to."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

from tests.end_to_end.cli import Running, events, gone, json_lines, steps_done, succeed, teacher_values, write_config
from tests.end_to_end.conftest import World
from trainer.journal import logged_lines

pytestmark = pytest.mark.timeout(1800)  # the commands have a limit of their own

STEPS = 60
QUICK = {"silence_s": 5.0, "hang_shortest_s": 5.0, "max_failures": 3}


@pytest.fixture(scope="module")
def undisturbed(data_world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, left alone."""
    folder = tmp_path_factory.mktemp("undisturbed")
    write_config(folder / "teacher.yaml", values(data_world))
    succeed("train", "teacher.yaml", cwd=folder)
    return folder / "runs" / "teacher"


def values(world: World) -> dict[str, object]:
    return teacher_values(world.data, steps=STEPS, preview_every=1000) | {
        "checkpoint": {"every": 10}, "recovery": QUICK, "log_every": 1,
    }  # fmt: skip


def stop(process: psutil.Process) -> None:
    process.send_signal(signal.SIGSTOP)


@pytest.mark.parametrize(
    ("fault", "event"), [(psutil.Process.kill, "died"), (stop, "has not been heard of")], ids=["killed", "stopped"]
)
def test_a_rank_that_ends_or_freezes_costs_time_and_nothing_else(
    tmp_path: Path, data_world: World, undisturbed: Path, fault: Callable[[psutil.Process], None], event: str
) -> None:
    write_config(tmp_path / "teacher.yaml", values(data_world))
    run = tmp_path / "runs" / "teacher"
    running = Running("train", "teacher.yaml", cwd=tmp_path)
    running.until(lambda: steps_done(run) >= 25, "step 25")
    below = running.descendants()
    fault(running.ranks()[-1])
    done = running.wait()
    assert done.status == 0, done.err
    assert "Traceback" not in done.err and done.errors == []
    assert event in done.err and "going on from step 20 with 2 workers" in done.err
    assert gone(below) == []
    told = [line for line in json_lines(run / "journal.jsonl") if line["event"] not in ("checkpoint", "running")]
    assert [line["event"] for line in told] == ["started", "failed", "recovering", "started", "finished"]
    assert [line.get("attempt") for line in told[:4]] == [1, 1, 1, 2]
    assert told[3]["resume"].endswith("step_00000020")
    if "not been heard" in event:
        (stacks,) = (run / "stacks" / "001").iterdir()  # the other rank's
        assert "all_reduce" in stacks.read_text()
    found, expected = (logged_lines(str(folder)) for folder in (run, undisturbed))
    assert [(line["step"], line["loss"]) for line in found] == [(line["step"], line["loss"]) for line in expected]
    whole, pieces = (load_file(folder / "weights" / "model.safetensors") for folder in (undisturbed, run))
    assert all(bool((whole[name] == pieces[name]).all()) for name in whole)
    assert events(run)[-1] == "finished" and not (run / "telemetry").exists()
