"""The command line as a user runs it: a process, its exit status, what it printed; and the small world it works in."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

REPOSITORY = Path(__file__).resolve().parent.parent.parent
TIMEOUT_S = 600.0  # a start of Ray takes seconds on a quiet machine and minutes on a busy one
SIZE = 56  # pixels: four patches a side


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    status: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        """The `error:` lines."""
        return [line for line in self.err.splitlines() if line.startswith("error: ")]


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "launcher.cli", *map(str, arguments)]


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(REPOSITORY), **(extra or {})}


def fathom(*arguments: str | Path, cwd: Path, env: Mapping[str, str] | None = None) -> Done:
    """Run a verb to its end."""
    process = Running(*arguments, cwd=cwd, env=env)
    return process.wait()


def succeed(*arguments: str | Path, cwd: Path) -> Done:
    """Run a verb that must succeed."""
    done = fathom(*arguments, cwd=cwd)
    assert done.status == 0, f"{arguments}: {done.status}\n{done.out}\n{done.err}"
    assert "Traceback" not in done.err
    return done


def refuse(*arguments: str | Path, cwd: Path, words: tuple[str, ...]) -> str:
    """Run a verb that must end with status 2 and one line that holds all `words`; returns the line."""
    return refused(fathom(*arguments, cwd=cwd), words)


def refused(done: Done, words: tuple[str, ...]) -> str:
    """Check that a command ended with status 2 and one `error:` line that holds all `words`; returns the line."""
    assert done.status == 2, f"{done.status}\n{done.out}\n{done.err}"
    assert "Traceback" not in done.err, done.err
    assert len(done.errors) == 1, done.err
    for word in words:
        assert word in done.errors[0], f"{word!r} is not in: {done.errors[0]}"
    return done.errors[0]


started: list[Running] = []  # for the fixture that ends what a failed test left


class Running:
    """A command that runs in a process group of its own, as in a terminal."""

    def __init__(self, *arguments: str | Path, cwd: Path, env: Mapping[str, str] | None = None) -> None:
        self.process = subprocess.Popen(
            command(*arguments), cwd=cwd, env=environment(env), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL, text=True, start_new_session=True,
        )  # fmt: skip
        started.append(self)

    def until(self, condition: Callable[[], Any], what: str) -> Any:
        """Wait until `condition()` is true and return it; fails when the command ends before."""
        deadline = time.monotonic() + TIMEOUT_S
        while not (value := condition()):
            if self.process.poll() is not None:
                done = self.wait()
                raise AssertionError(f"ended with {done.status} before {what}:\n{done.out}\n{done.err}")
            if time.monotonic() > deadline:
                self.end()
                raise AssertionError(f"no {what} within {TIMEOUT_S:.0f} s")
            time.sleep(0.02)
        return value

    def signal(self, number: signal.Signals) -> None:
        """Signal every process of the group, as a terminal's Ctrl-C does."""
        os.killpg(self.process.pid, number)

    def descendants(self) -> list[psutil.Process]:
        """All processes below the command."""
        try:
            return psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def wait(self) -> Done:
        """Wait for the end."""
        try:
            out, err = self.process.communicate(timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.end()
            raise
        return Done(self.process.returncode, out, err)

    def ranks(self) -> list[psutil.Process]:
        """Ray's worker processes that train."""
        return [process for process in self.descendants() if "RayTrainWorker" in title(process)]

    def end(self) -> None:
        """Kill the command and all below it, if it still runs."""
        if self.process.poll() is None:
            for process in [*self.descendants(), psutil.Process(self.process.pid)]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            self.process.communicate()


def title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # it has just ended
        return ""


def gone(processes: list[psutil.Process], patience_s: float = 10.0) -> list[psutil.Process]:
    """Those of `processes` that still run after `patience_s`."""
    _, alive = psutil.wait_procs(processes, timeout=patience_s)
    return alive


def write_config(path: Path, values: Mapping[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(dict(values), sort_keys=False))
    return path


def json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file that may be growing; none when it is not there yet."""
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def steps_done(run: Path) -> int:
    """The last step that a run has logged."""
    lines = json_lines(run / "metrics.jsonl")
    return int(lines[-1]["step"]) if lines else 0


def events(run: Path) -> list[str]:
    """What happened to a run, less what depends on when rank 0 reports."""
    told = (entry["event"] for entry in json_lines(run / "journal.jsonl"))
    return [event for event in told if event not in ("running", "stopping")]


def run_values(name: str, kind: str, roles: Mapping[str, Any], **other: Any) -> dict[str, Any]:
    """A whole training configuration, tiny; `other` replaces or adds top-level sections."""
    return {
        "name": name,
        "seed": 3,
        "steps": 6,
        "task": {"kind": kind},
        "model": {"preset": "tiny"},
        "data": {"input_size": SIZE, "shuffle_window": 8, "roles": dict(roles)},
        "optim": {"encoder_lr": 1.0e-3, "decoder_lr": 1.0e-3},
        "engine": {"precision": "fp32"},
        "cluster": {"workers": 2},
        "checkpoint": {"every": 3},
        "log_every": 1,
        "preview_every": 3,
    } | other


def teacher_values(data: Path, name: str = "teacher", **other: Any) -> dict[str, Any]:
    """A teacher on the labelled set of a world."""
    roles = {"labelled": {"datasets": [str(data / "labelled")], "batch": 4, "lanes": 2}}
    return run_values(name, "teacher", roles, **other)
