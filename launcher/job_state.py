"""How a job stands: what Ray says of its process, and what the run's own journal says where it can be read."""

from __future__ import annotations

import re
from dataclasses import dataclass

from launcher.jobs import Job

_LAST_WORD = re.compile(r"^error: (.+)$", re.MULTILINE)
_OF_RAY = {"PENDING": "PENDING", "RUNNING": "RUNNING", "STOPPED": "CANCELLED", "SUCCEEDED": "SUCCEEDED"}
_SLACK_S = 5.0  # between the clocks of the cluster's head and of the machine that holds the journal


@dataclass(frozen=True, kw_only=True)
class Standing:
    """`state`: SUBMITTED, or one of trainer.folder.STATES."""

    state: str
    reason: str | None = None
    attempt: int = 0
    step: int | None = None


def standing(job: Job) -> Standing:
    """A job that was preempted is PENDING: it goes on when somebody resumes it."""
    written = _journal(job)
    if job.status == "FAILED" and job.exit_code == 75:
        return Standing(
            state="PENDING",
            reason=f"preempted with a checkpoint; `fathom jobs resume {job.run}` goes on",
            attempt=written.attempt,
            step=written.step,
        )
    if job.status == "FAILED":
        return Standing(state="FAILED", reason=_reason(job), attempt=written.attempt, step=written.step)
    state = _OF_RAY.get(job.status, job.status)
    if job.status == "RUNNING" and written.state:
        return written
    if job.status == "RUNNING" and job.verb[:1] == ("train",):
        state = "STARTING"
    if job.status == "PENDING" and job.started is None:
        state = "SUBMITTED"
    return Standing(state=state, attempt=written.attempt, step=written.step)


def _journal(job: Job) -> Standing:
    """What the journal has of this job; an empty state where it says nothing, or is not to be seen from here."""
    folder = job.metadata.get("run_folder")
    if not folder:
        return Standing(state="")
    from trainer.folder import FINAL, RunFolder, state_of
    from trainer.journal import read_json_lines

    try:
        lines = list(read_json_lines(RunFolder(folder).journal))
    except (OSError, RuntimeError):
        return Standing(state="")
    found = state_of(lines)
    began = job.started or 0.0
    if found is None or found.time is None or found.time < began - _SLACK_S:  # an earlier job's
        return Standing(state="")
    steps = [line["step"] for line in lines if isinstance(line.get("step"), int)]
    over = found.state in FINAL  # its last word, and the process not yet gone
    return Standing(
        state="" if over else found.state, reason=found.reason, attempt=found.attempt, step=steps[-1] if steps else None
    )


def _reason(job: Job) -> str | None:
    """The last `error:` line of its log, which Ray quotes; else what Ray says."""
    text = job.message or ""
    lines = _LAST_WORD.findall(text)
    if lines:
        return str(lines[-1])
    return text.strip().splitlines()[0][:300] if text.strip() else None
