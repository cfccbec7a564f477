"""A run whose ranks end before their time starts them again by itself, and ends as one that nothing happened to."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import yaml

from tests.end_to_end.cli import (
    REPOSITORY,
    Running,
    events,
    fathom,
    gone,
    json_lines,
    steps_done,
    succeed,
    write_config,
)
from tests.end_to_end.conftest import World
from tests.end_to_end.nodes import STEPS, losses, run_values, same_weights, told

pytestmark = pytest.mark.timeout(1800)  # the commands have a limit of their own

# In every Python process: the loss that a rank reports is a hundred times too large for the samples 200 to 216.
SPIKE = """
import sys, threading, time
def watch():
    while not hasattr(sys.modules.get("trainer.loop"), "step_seed"):
        time.sleep(0.01)
    loop = sys.modules["trainer.loop"].Loop
    step = loop.train_step
    def train_step(self, batch, flags=None):
        seen = sum(self.cursor.values())
        record = step(self, batch, flags)
        if 200 <= seen < 216:
            self._loss = 100 * self._loss
        return record
    loop.train_step = train_step
threading.Thread(target=watch, daemon=True).start()
"""


def stop(process: psutil.Process) -> None:
    process.send_signal(signal.SIGSTOP)


@pytest.mark.parametrize(
    ("fault", "event"), [(psutil.Process.kill, "died"), (stop, "has not been heard of")], ids=["killed", "stopped"]
)
def test_a_rank_that_ends_or_freezes_costs_time_and_nothing_else(
    tmp_path: Path, data_world: World, undisturbed: Path, fault: Callable[[psutil.Process], None], event: str
) -> None:
    write_config(tmp_path / "teacher.yaml", run_values(data_world))
    run = tmp_path / "runs" / "teacher"
    running = Running("train", "teacher.yaml", cwd=tmp_path)
    running.until(lambda: steps_done(run) >= 25, "step 25")
    below = running.descendants()
    fault(running.ranks()[-1])
    done = running.wait()
    assert done.status == 0, done.err
    assert "Traceback" not in done.err and done.errors == []
    assert event in done.err and "going on from step " in done.err and " with 2 workers" in done.err
    assert gone(below) == []
    lines = told(run)
    assert [line["event"] for line in lines] == ["started", "failed", "recovering", "started", "finished"]
    assert [line.get("attempt") for line in lines[:4]] == [1, 1, 1, 2]
    assert 20 <= int(lines[3]["resume"][-8:]) < STEPS
    if "not been heard" in event:
        (stacks,) = (run / "stacks" / "001").iterdir()  # the other rank's
        assert "torch/distributed" in stacks.read_text()  # in a collective, whichever it was
    assert losses(run) == losses(undisturbed) and same_weights(run, undisturbed)
    assert events(run)[-1] == "finished" and not (run / "telemetry").exists()


@pytest.mark.slow
def test_a_spike_is_gone_back_from_and_its_samples_are_passed_over(
    tmp_path: Path, data_world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run ends with the bits of one that was told to pass over them from the beginning."""
    reaction = {"on_spike": "roll_back", "spike_steps": 3, "spike_window": 20, "spike_lead_steps": 2}
    values = run_values(data_world, steps=90)
    values["recovery"] = values["recovery"] | reaction
    write_config(tmp_path / "teacher.yaml", values)
    run = tmp_path / "runs" / "teacher"
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(SPIKE)
    path = os.pathsep.join([str(REPOSITORY), str(tmp_path / "site")])
    done = fathom("train", "teacher.yaml", cwd=tmp_path, env={"PYTHONPATH": path})
    assert done.status == 0, done.err
    (back,) = [line for line in told(run) if line["event"] == "rolled_back"]
    assert (back["why"], back["step"]) == ("spike", 40), back  # samples 200 to 212 are those of the steps 51 to 53
    begin, end = back["passed_over"]
    assert begin <= 192 and end >= 212, back
    assert back["removed"] and max(back["losses"].values()) > 20 * min(back["losses"].values())
    assert yaml.safe_load((run / "config.yaml").read_text())["data"]["skip_samples"] == [[begin, end]]
    assert [step for step, _ in losses(run)] == list(range(1, 91))

    write_config(tmp_path / "teacher.yaml", values | {"name": "told"})
    succeed("train", "teacher.yaml", "--set", f"data.skip_samples=[[{begin}, {end}]]", cwd=tmp_path)
    assert losses(run) == losses(tmp_path / "runs" / "told") and same_weights(run, tmp_path / "runs" / "told")
    assert [line["event"] for line in json_lines(run / "journal.jsonl")][-1] == "finished"
