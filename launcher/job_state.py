"""How a job stands: what Ray says of its process, and what the run's own journal says where it can be read."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from launcher.jobs import Job, JobsError
from launcher.supervisor import again

_LAST_WORD = re.compile(r"^error: (.+)$", re.MULTILINE)
_STOPPED = re.compile(r"^(stopped (?:at step \d+ )?by [A-Z]+[^;\n]*)(.*)$", re.MULTILINE)  # what verbs say last
_QUOTED = re.compile(r"Job entrypoint command failed with exit code -?\d+(?:, last available logs[^\n]*\n|\.[^\n]*)")
_OF_RAY = {"PENDING": "SUBMITTED", "RUNNING": "RUNNING", "STOPPED": "CANCELLED", "SUCCEEDED": "SUCCEEDED"}
# Of a job that runs: what its journal's last word means while the process is still there.
_STILL_THERE = {"submitted": "STARTING", "finished": "RUNNING", "stopped": "STOPPING", "failed": "RECOVERING"}
Lines = list[dict[str, Any]]  # of a journal
_SLACK_S = 5.0  # between the clocks of the cluster's head and of the machine that holds the journal


@dataclass(frozen=True, kw_only=True)
class Standing:
    """`state`: SUBMITTED, or one of trainer.folder.STATES. `saved`: whether a job that was stopped had time to, so that
    nothing it had done is lost; None where nobody knows."""

    state: str
    reason: str | None = None
    attempt: int = 0
    step: int | None = None
    saved: bool | None = None


def standing(job: Job, log: Callable[[], str] | None = None) -> Standing:
    """A job that was preempted is PENDING: it goes on when somebody resumes it. One that Ray has yet to start is
    SUBMITTED. `log` gives what it wrote, looked at only where the journal cannot be seen."""
    lines = journal_lines(job)
    written = _written(lines)
    if job.status == "STOPPED":
        return _cancelled(job, lines, written, log)
    if job.status == "FAILED" and job.exit_code == 75:
        why = _ended_by(lines) or _said_by(job.message or "") or "preempted with a checkpoint"
        return replace(written, state="PENDING", reason=f"{why}; `fathom jobs resume {job.run}` goes on")
    if job.status == "FAILED":
        return replace(written, state="FAILED", reason=_failure(job, lines))
    if job.status == "RUNNING" and written.state:
        return written
    state = "STARTING" if job.status == "RUNNING" and job.verb[:1] == ("train",) else _OF_RAY.get(job.status)
    return replace(written, state=state or job.status, reason=None)


def journal_lines(job: Job) -> Lines:
    """What the run's journal has of this job: behind its own "submitted", not before it began, nor after it ended.

    Empty where it says nothing, or is not to be seen from here.
    """
    folder = job.metadata.get("run_folder")
    if not folder:
        return []
    from trainer.folder import RunFolder
    from trainer.journal import read_json_lines

    try:
        lines = read_json_lines(RunFolder(folder).journal)
    except (OSError, RuntimeError):
        return []
    first = (job.started or 0.0) - _SLACK_S
    last = (job.ended or float("inf")) + _SLACK_S
    found, owner = [], None
    for line in lines:
        if line.get("event") == "submitted":
            owner = line.get("job")
        time = line.get("time")
        if owner == job.id and isinstance(time, int | float) and first <= time <= last:
            found.append(line)
    return found


def _written(lines: Lines) -> Standing:
    """The journal's last word on a job that still runs; an empty state where it says nothing."""
    from trainer.folder import STATES, state_of

    found = state_of(lines)
    if found is None:
        return Standing(state="")
    event = [event for line in lines if (event := str(line.get("event"))) in STATES][-1]
    steps = [line["step"] for line in lines if isinstance(line.get("step"), int)]
    return Standing(
        state=_STILL_THERE.get(event, found.state),
        reason=found.reason,
        attempt=found.attempt,
        step=steps[-1] if steps else None,
    )


def _cancelled(job: Job, lines: Lines, written: Standing, log: Callable[[], str] | None) -> Standing:
    """Whether it saved: by the journal, else by its own last words; what neither knows, Ray does not either."""
    from trainer.folder import last_end

    last = last_end(lines)
    saved: bool | None = None
    reason = _ended_by(lines)
    if last is not None:
        saved = last["event"] != "failed"
        reason = reason or (f"failed before it saved: {_error(last)}" if not saved else "finished all the same")
    elif lines:
        saved = False
    elif log is not None:
        reason, saved = _last_words(job, log)
    if saved is False and reason is None and not lines and _sooner(job):
        reason = "ended before it began"
    elif saved is False and reason is None:
        reason = f"killed by Ray before it saved (it had {job.grace_s:g} s); what it saved earlier stands"
    if not job.ours:
        reason = f"not submitted by fathom: Ray kills it {job.grace_s:g} s after the signal, whether it saved or not"
    return replace(written, state="CANCELLED", reason=reason, saved=saved)


def _sooner(job: Job) -> bool:
    """Whether it lived for less than Ray's patience, so that Ray cannot have killed it."""
    return job.started is not None and job.ended is not None and job.ended - job.started < job.grace_s


def _last_words(job: Job, log: Callable[[], str]) -> tuple[str | None, bool | None]:
    try:
        text = log()
    except JobsError:
        return None, None
    found = _STOPPED.findall(text)
    if found:
        words, rest = found[-1]
        return words.strip(), "nothing was written" not in rest
    return None, False if job.ours and again(job.verb) is not None else None


def _ended_by(lines: Lines) -> str | None:
    """Why and where the journal says that it was stopped; None where that is not its last word."""
    from trainer.folder import last_end

    last = last_end(lines)
    if last is None or last["event"] != "stopped":
        return None
    step = last.get("step")
    where = f"at step {step}, saved" if step else "before its first step"
    return f"stopped by {last.get('reason')} {where}"


def _said_by(text: str) -> str | None:
    found = _STOPPED.findall(text)
    return found[-1][0].strip() if found else None


def _failure(job: Job, lines: Lines) -> str | None:
    """The last `error:` line of its log, which Ray quotes; the journal's; else how it ended, and its last line."""
    text = (job.message or "").strip()
    said = _LAST_WORD.findall(text)
    if said:
        return str(said[-1])
    from trainer.folder import last_end

    last = last_end(lines)
    if last is not None and last["event"] == "failed":
        return _error(last)
    quoted = _QUOTED.match(text)
    if quoted:
        text = text[quoted.end() :].strip()
    found = [line.strip() for line in text.splitlines() if line.strip()]
    # Of the job's log, and of a traceback, the last line says most; of what Ray says itself, the first.
    word = found[-1 if quoted or "Traceback (most recent call last)" in text else 0][:300] if found else ""
    return ": ".join(part for part in (_ending(job.exit_code), word) if part) or None


def _error(failed: Mapping[str, Any]) -> str:
    return (str(failed.get("error") or "").splitlines() or ["for no reason given"])[0][:300]


def _ending(status: int | None) -> str:
    if status is None:
        return ""
    number = -status if status < 0 else status - 128
    try:
        name = signal.Signals(number).name
    except ValueError:
        return f"exit status {status}"
    hint = ", perhaps for want of memory" if name == "SIGKILL" else ""
    return f"killed by {name}{hint}"
