"""Ctrl-C, SIGTERM and kill at any moment: the promised exit status, nothing left running, and work that goes on."""

from __future__ import annotations

import contextlib
import json
import signal
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.end_to_end.cli import (
    Done,
    Running,
    events,
    fathom,
    gone,
    refused,
    steps_done,
    succeed,
    teacher_values,
    write_config,
)
from tests.end_to_end.conftest import World
from tests.trainer.test_labelling import save_network
from trainer.checkpoint import find_checkpoint, list_checkpoints, load_checkpoint, step_of

pytestmark = pytest.mark.timeout(1800)  # the commands have a limit of their own

STEPS = 60


def interrupt(running: Running, number: signal.Signals, status: int) -> Done:
    """Signal the whole process group; check the exit status, that nothing complains and nothing stays."""
    below = running.descendants()
    running.signal(number)
    done = running.wait()
    assert done.status == status, done.err
    assert "Traceback" not in done.err, done.err
    assert gone(below) == []
    return done


def saved(run: Path) -> int:
    """The step of the newest checkpoint, by its name."""
    return step_of(list_checkpoints(str(run / "checkpoints"))[-1])


def newest(run: Path) -> int:
    """The step of the newest whole checkpoint, which must be the newest of all."""
    path, passed = find_checkpoint(str(run / "checkpoints"))
    assert path is not None and passed == []
    return load_checkpoint(path).state.step


def test_a_run_stopped_three_times_ends_as_one_that_was_not(tmp_path: Path, world: World) -> None:
    """SIGTERM, then a killed rank, then Ctrl-C, then in peace: bitwise the weights of an uninterrupted run.

    All of it on the same ranks; the uninterrupted run is made by the same command elsewhere.
    """
    values = teacher_values(world.data, steps=STEPS, preview_every=1000) | {
        "checkpoint": {"every": 5}, "recovery": {"max_failures": 0},
    }  # fmt: skip
    write_config(tmp_path / "teacher.yaml", values)
    succeed("train", "teacher.yaml", "--set", "runs=whole", cwd=tmp_path)
    run = tmp_path / "runs" / "teacher"

    running = Running("train", "teacher.yaml", cwd=tmp_path)
    running.until(lambda: steps_done(run) >= 3, "step 3")
    done = interrupt(running, signal.SIGTERM, 75)
    assert "SIGTERM" in done.err and "--resume" in done.err
    first = newest(run)
    assert 3 <= first < STEPS, "too fast to be stopped: raise STEPS"

    running = Running("train", "teacher.yaml", "--resume", cwd=tmp_path)
    running.until(lambda: saved(run) > first, "another checkpoint")
    below = running.descendants()
    victim = running.ranks()[-1]
    victim.kill()
    done = running.wait()
    assert (done.status, len(done.errors)) == (1, 1), done.err
    assert "rank" in done.errors[0] and "died" in done.errors[0] and "Traceback" not in done.err
    assert gone(below) == []
    second = newest(run)
    assert second > first
    assert not (run / "telemetry").exists()

    running = Running("train", "teacher.yaml", "--resume", cwd=tmp_path)
    running.until(lambda: "checkpoint" in events(run)[-1:], "a checkpoint")
    done = interrupt(running, signal.SIGINT, 130)
    assert "SIGINT" in done.err and "--resume" in done.err
    assert second < newest(run) < STEPS

    succeed("train", "teacher.yaml", "--resume", cwd=tmp_path)
    assert newest(run) == STEPS
    assert [e for e in events(run) if e != "checkpoint"] == [
        "started", "stopped", "started", "failed", "gave_up", "started", "stopped", "started", "finished",
    ]  # fmt: skip
    whole = load_file(tmp_path / "whole" / "teacher" / "weights" / "model.safetensors")
    pieces = load_file(run / "weights" / "model.safetensors")
    assert whole.keys() == pieces.keys()
    assert all(bool((whole[name] == pieces[name]).all()) for name in whole)


def test_ctrl_c_during_start_up_and_a_second_one(tmp_path: Path, world: World) -> None:
    """The first is remembered while the ranks start, and the run can be resumed; the second ends at once.

    Meanwhile a second process in the run's folder is refused.
    """
    write_config(tmp_path / "teacher.yaml", teacher_values(world.data))
    run = tmp_path / "runs" / "teacher"
    running = Running("train", "teacher.yaml", cwd=tmp_path)
    running.until(lambda: "started" in events(run), "the journal's first entry")
    done = interrupt(running, signal.SIGINT, 130)
    assert "stopped at step 0" in done.err
    assert events(run)[-1] == "stopped"

    running = Running("train", "teacher.yaml", "--resume", cwd=tmp_path)
    running.until(lambda: events(run)[-1] == "started", "the journal's next entry")
    line = refused(fathom("train", "teacher.yaml", "--resume", cwd=tmp_path), (str(run), "another process"))
    assert "wait for it" in line
    running.until(running.ranks, "the ranks")
    below = running.descendants()
    running.signal(signal.SIGINT)
    running.signal(signal.SIGINT)
    done = running.wait()
    assert done.status == 130 and "Traceback" not in done.err, done.err
    assert gone(below) == []
    done = succeed("train", "teacher.yaml", "--resume", cwd=tmp_path)
    assert "6 steps done" in done.out


def test_ctrl_c_during_data_synth(tmp_path: Path) -> None:
    arguments = ("data", "synth", "wide", "--domain", "wide", "--count", "1500", "--workers", "2",
                 "--shard-samples", "50")  # fmt: skip
    shards = tmp_path / "wide" / "shards"
    running = Running(*arguments, cwd=tmp_path)
    running.until(lambda: list(shards.glob("*.idx")), "a finished shard")
    done = interrupt(running, signal.SIGINT, 130)
    assert "the same command goes on" in done.err
    assert not (tmp_path / "wide" / "dataset.json").exists()
    kept = {path: path.stat().st_mtime_ns for path in shards.glob("*.tar")}
    assert 0 < len(kept) < 30
    done = succeed(*arguments, cwd=tmp_path)
    assert "packed 1500 samples" in done.out
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def in_hand(labels: Path) -> set[str]:
    """The shards that workers were at, as the runs' files say."""
    found: set[str] = set()
    for path in labels.glob("leases/*.json"):
        with contextlib.suppress(OSError, ValueError):
            found |= json.loads(path.read_text())["leased"].keys()
    return found


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_a_signal_during_label_run_finishes_the_shards_in_hand(
    tmp_path: Path, number: signal.Signals, status: int
) -> None:
    teacher = save_network(tmp_path / "teacher", 3)
    succeed("data", "synth", "wide", "--count", "96", "--no-labels", "--shard-samples", "8", cwd=tmp_path)
    arguments = ("label", "run", "wide", "--weights", teacher, "--input-size", "336", "--batch", "4")
    running = Running(*arguments, cwd=tmp_path)
    (labels,) = running.until(lambda: list((tmp_path / "wide" / "labels").glob("*")), "the folder of the labels")
    running.until(lambda: list(labels.glob("ledger/*.json")) and in_hand(labels), "a labelled shard, and one in hand")
    begun = in_hand(labels)
    done = interrupt(running, number, status)
    assert f"{number.name}: finishing the shards in hand" in done.err
    assert f"stopped by {number.name} after " in done.err and "the same command goes on" in done.err
    kept = {path: path.read_bytes() for path in [*labels.glob("ledger/*.json"), *labels.glob("shards/*")]}
    stems = {path.stem for path in labels.glob("ledger/*.json")}
    assert begun <= stems and 0 < len(stems) < 12, "too fast to be stopped: more shards"
    whole = {f"{stem}{ending}" for stem in stems for ending in (".tar", ".idx")}
    assert {path.name for path in labels.glob("shards/*")} == whole
    assert not [*labels.glob("leases/*"), *labels.glob("telemetry/*")]
    done = succeed(*arguments, cwd=tmp_path)
    assert done.out == f"{labels}\n" and len(list(labels.glob("ledger/*.json"))) == 12
    assert {path: path.read_bytes() for path in kept} == kept
    assert "proved" in succeed("label", "verify", labels, cwd=tmp_path).out
