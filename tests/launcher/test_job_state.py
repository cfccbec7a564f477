"""Ray's word on a job's process and the run's journal, put together."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher.job_state import standing
from launcher.jobs import Job, JobsError, job_of
from tests.launcher.fake_jobs import Details, metadata

BEGAN = 1_700_000_000.0
RAY = "Job entrypoint command failed with exit code {}, last available logs (truncated to 20,000 chars):\n"


@pytest.fixture
def journal(tmp_path: Path) -> Callable[..., str]:
    """Writes (seconds since BEGAN, event, facts) down, and gives the run's folder."""

    def write(*lines: tuple[float, str, dict[str, Any]]) -> str:
        text = "".join(json.dumps({"time": BEGAN + at, "event": event, **facts}) + "\n" for at, event, facts in lines)
        (tmp_path / "journal.jsonl").write_text(text)
        return str(tmp_path)

    return write


def job(status: str, folder: str = "", name: str = "teacher", at: float = 0.0, **known: Any) -> Job:
    given = metadata("teacher", **({"run_folder": folder} if folder else {}))
    return job_of(Details(name, status, at=BEGAN + at, metadata=given, **known))


def submitted(name: str = "teacher", at: float = 1.0) -> tuple[float, str, dict[str, Any]]:
    return at, "submitted", {"job": name, "at": BEGAN}


STARTED = (2.0, "started", {"attempt": 1})
RUNNING = (3.0, "running", {"attempt": 1})


@pytest.mark.parametrize(
    ("lines", "state"),
    [
        ((), "STARTING"),
        ((submitted(),), "STARTING"),
        ((submitted(), (2.0, "pending", {"attempt": 0, "reason": "waits for room"})), "PENDING"),
        ((submitted(), STARTED), "STARTING"),
        ((submitted(), STARTED, RUNNING), "RUNNING"),
        ((submitted(), STARTED, RUNNING, (9.0, "preempted", {"attempt": 1, "step": 3})), "RECOVERING"),
        ((submitted(), STARTED, RUNNING, (9.0, "failed", {"attempt": 1, "error": "x"})), "RECOVERING"),
        ((submitted(), STARTED, RUNNING, (9.0, "resizing", {"attempt": 1, "step": 3})), "RESIZING"),
        ((submitted(), STARTED, RUNNING, (9.0, "stopping", {"attempt": 1, "reason": "SIGTERM"})), "STOPPING"),
        ((submitted(), STARTED, RUNNING, (9.0, "stopped", {"step": 3, "reason": "SIGTERM"})), "STOPPING"),
        ((submitted(), STARTED, RUNNING, (9.0, "finished", {"step": 3})), "RUNNING"),
    ],
)
def test_a_job_that_runs_stands_as_its_journal_says(
    journal: Callable[..., str], lines: tuple[Any, ...], state: str
) -> None:
    assert standing(job("RUNNING", journal(*lines))).state == state


@pytest.mark.parametrize(
    ("status", "state"),
    [("PENDING", "SUBMITTED"), ("SUCCEEDED", "SUCCEEDED"), ("STOPPED", "CANCELLED"), ("FAILED", "FAILED")],
)
def test_without_a_journal_ray_knows(status: str, state: str) -> None:
    assert standing(job(status, message="x")).state == state
    foreign = job_of(Details("a", "RUNNING", entrypoint="sh x.sh"))
    assert standing(foreign).state == "RUNNING"


def test_every_job_of_a_run_has_its_own_attempts(journal: Callable[..., str]) -> None:
    folder = journal(
        submitted(), STARTED, RUNNING, (20.0, "checkpoint", {"step": 6}),
        (21.0, "stopped", {"step": 7, "reason": "SIGTERM"}),
        submitted("teacher.2", 23.0), (24.0, "started", {"attempt": 2}), (25.0, "running", {"attempt": 2}),
        (26.0, "checkpoint", {"step": 9}), (90.0, "started", {"attempt": 3}),
    )  # fmt: skip
    first = standing(job("STOPPED", folder, ended=BEGAN + 22))
    assert (first.state, first.attempt, first.step) == ("CANCELLED", 1, 7)
    second = standing(job("RUNNING", folder, name="teacher.2", at=22.5))
    assert (second.state, second.attempt, second.step) == ("STARTING", 3, 9)
    ended = standing(job("SUCCEEDED", folder, name="teacher.2", at=22.5, ended=BEGAN + 30))  # then resumed by hand
    assert (ended.attempt, ended.step) == (2, 9)
    new = standing(job("RUNNING", folder, name="teacher.3", at=95.0))  # has written nothing yet
    assert (new.state, new.attempt, new.step) == ("STARTING", 0, None)
    namesake = standing(job("RUNNING", folder, at=200.0))  # of a job that was forgotten
    assert (namesake.state, namesake.attempt) == ("STARTING", 0)


def test_a_stopped_job_says_what_it_saved(journal: Callable[..., str]) -> None:
    folder = journal(submitted(), STARTED, RUNNING, (20.0, "stopped", {"step": 7, "reason": "SIGTERM"}))
    found = standing(job("STOPPED", folder, ended=BEGAN + 21))
    assert (found.saved, found.reason) == (True, "stopped by SIGTERM at step 7, saved")
    folder = journal(submitted(), (20.0, "stopped", {"step": 0, "reason": "SIGTERM"}))
    found = standing(job("STOPPED", folder, ended=BEGAN + 21))
    assert (found.saved, found.reason) == (True, "stopped by SIGTERM before its first step")


def test_a_job_that_ray_killed_says_so(journal: Callable[..., str]) -> None:
    folder = journal(submitted(), STARTED, RUNNING, (20.0, "stopping", {"reason": "SIGTERM"}))
    found = standing(job("STOPPED", folder, ended=BEGAN + 620))
    assert found.saved is False and (found.reason or "").startswith("killed by Ray before it saved (it had 600 s)")


@pytest.mark.parametrize(
    ("event", "facts", "saved", "reason"),
    [
        ("failed", {"error": "WorkerDied: rank 3\nx"}, False, "failed before it saved: WorkerDied: rank 3"),
        ("finished", {"step": 9}, True, "finished all the same"),
    ],
)
def test_a_stopped_job_that_ended_otherwise(
    journal: Callable[..., str], event: str, facts: dict[str, Any], saved: bool, reason: str
) -> None:
    folder = journal(submitted(), STARTED, RUNNING, (20.0, event, facts))
    found = standing(job("STOPPED", folder, ended=BEGAN + 21))
    assert (found.saved, found.reason) == (saved, reason)


def test_where_the_journal_cannot_be_seen_the_log_tells() -> None:
    stopped = job("STOPPED", "/nowhere")
    log = "SIGTERM: finishing the step\nstopped at step 12 by SIGTERM; go on with --resume\n"
    found = standing(stopped, lambda: log)
    assert (found.saved, found.reason) == (True, "stopped at step 12 by SIGTERM")
    killed = standing(stopped, lambda: "step 12\n")
    assert killed.saved is False and "killed by Ray before it saved" in (killed.reason or "")
    nothing = standing(stopped, lambda: "stopped by SIGTERM; nothing was written\n")
    assert (nothing.saved, nothing.reason) == (False, "stopped by SIGTERM")

    def away() -> str:
        raise JobsError("away")

    assert standing(stopped, away).saved is None and standing(stopped).saved is None
    other = job_of(Details("a", "STOPPED", metadata=metadata("a", "data", "pack")))
    assert standing(other, lambda: "packing").saved is None  # has nothing to go on from


@pytest.mark.parametrize(("after", "reason"), [(2, "ended before it began"), (590, "ended"), (601, "killed by Ray")])
def test_a_job_that_was_stopped_before_it_began(tmp_path: Path, after: int, reason: str) -> None:
    """Its process got the signal before it could write a word."""
    stopped = job("STOPPED", str(tmp_path), ended=BEGAN + after)
    found = standing(stopped, lambda: "")
    assert found.saved is False and (found.reason or "").startswith(reason)


def test_a_job_of_others_had_ray_s_three_seconds() -> None:
    found = standing(job_of(Details("a", "STOPPED")), lambda: "")
    assert found.saved is None and "not submitted by fathom: Ray kills it 3 s after" in (found.reason or "")


def test_a_preempted_job_goes_on_when_somebody_resumes_it(journal: Callable[..., str]) -> None:
    folder = journal(submitted(), STARTED, RUNNING, (20.0, "stopped", {"step": 7, "reason": "PREEMPTED"}))
    found = standing(job("FAILED", folder, exit_code=75, ended=BEGAN + 21))
    assert (found.state, found.attempt, found.step) == ("PENDING", 1, 7)
    assert found.reason == "stopped by PREEMPTED at step 7, saved; `fathom jobs resume teacher` goes on"
    told = RAY.format(75) + "stopped at step 7 by SIGTERM; go on with --resume\n"
    reason = standing(job("FAILED", exit_code=75, message=told)).reason or ""
    assert reason.startswith("stopped at step 7 by SIGTERM; `fathom jobs resume")
    assert "preempted with a checkpoint" in (standing(job("FAILED", exit_code=75)).reason or "")


@pytest.mark.parametrize(
    ("code", "message", "reason"),
    [
        (1, RAY.format(1) + "step 3\nerror: first\nerror: loss is not finite\nbye\n", "loss is not finite"),
        (1, RAY.format(1) + "Traceback (most recent call last):\n x\nKeyError: 1\n", "exit status 1: KeyError: 1"),
        (1, "Job entrypoint command failed with exit code 1. No logs available.", "exit status 1"),
        (-9, RAY.format(-9) + "step 3\n", "killed by SIGKILL, perhaps for want of memory: step 3"),
        (139, RAY.format(139) + "step 3\n", "killed by SIGSEGV: step 3"),
        (None, "Runtime env setup failed: no disk\nsee the log", "Runtime env setup failed: no disk"),
        (None, "Failed to start: Traceback (most recent call last):\n x\nOSError: no\n", "OSError: no"),
        (None, None, None),
    ],
)
def test_why_a_job_failed(code: int | None, message: str | None, reason: str | None) -> None:
    assert standing(job("FAILED", exit_code=code, message=message)).reason == reason


def test_the_journal_knows_why_where_the_log_says_nothing(journal: Callable[..., str]) -> None:
    folder = journal(submitted(), STARTED, RUNNING, (9.0, "failed", {"attempt": 1, "error": "WorkerDied: rank 3\nx"}))
    found = standing(job("FAILED", folder, exit_code=1, message=RAY.format(1) + "step 3\n", ended=BEGAN + 10))
    assert (found.state, found.reason, found.attempt) == ("FAILED", "WorkerDied: rank 3", 1)


def test_a_damaged_journal_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "journal.jsonl").write_text('{"event": "submitted", "job": "teacher"}\n{"time": "x"}\n[1]\nnot json\n')
    assert standing(job("RUNNING", str(tmp_path))).state == "STARTING"
