"""What `fathom submit` and `fathom jobs` say of a job: a table, lines, or JSON."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from typing import Any

import typer

from launcher.job_state import Standing, standing
from launcher.jobs import Job


def facts(job: Job, state: Standing) -> dict[str, Any]:
    """All of it, for JSON."""
    return {
        "id": job.id,
        "run": job.run,
        "state": state.state,
        "reason": state.reason,
        "saved": state.saved,
        "attempt": state.attempt or None,
        "step": state.step,
        "status": job.status,
        "exit_code": job.exit_code,
        "answer": job.answer,
        "verb": " ".join(job.verb),
        "by_fathom": job.ours,
        "grace_s": job.grace_s,
        "began": _clock(job.started),
        "took": _took(job),
        "folder": job.metadata.get("folder"),
        "run_folder": job.metadata.get("run_folder"),
        "config_digest": job.metadata.get("config_digest"),
    }


def table(standings: Sequence[tuple[Job, Standing]]) -> list[str]:
    """A line each, below a heading."""
    rows = [("ID", "STATE", "ATTEMPT", "BEGAN", "TOOK", "VERB")]
    rows += [
        (job.id, state.state, str(state.attempt or ""), _clock(job.started), _took(job), " ".join(job.verb))
        for job, state in standings
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def tell(job: Job, state: Standing, as_json: bool) -> None:
    """How it stands, and why: one line on stderr, or one of JSON on stdout."""
    if as_json:
        typer.echo(json.dumps(facts(job, state)))
    else:
        typer.echo(f"{job.id}: {state.state}{f' ({state.reason})' if state.reason else ''}", err=True)


class Changes:
    """Tells of a job that is waited for whenever it stands otherwise than before."""

    def __init__(self) -> None:
        self._told: tuple[str, int] | None = None

    def __call__(self, job: Job) -> None:
        """At every look at it."""
        now = standing(job)
        if (now.state, now.attempt) != self._told:
            self._told = (now.state, now.attempt)
            tell(job, now, as_json=False)


def show(text: str) -> None:
    """A piece of a log, on stdout."""
    sys.stdout.write(text)
    sys.stdout.flush()


def show_aside(text: str) -> None:
    """A piece of a log on stderr, where stdout is for JSON."""
    sys.stderr.write(text)
    sys.stderr.flush()


def _clock(seconds: float | None) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(seconds)) if seconds else ""


def _took(job: Job) -> str:
    if not job.started:
        return ""
    seconds = int((job.ended or time.time()) - job.started)
    return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"
