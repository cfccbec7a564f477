"""Verbs as jobs of a Ray cluster: Ray's own job client, with errors in one line and answers that can be relied on.

Ray's exit codes do not tell a stopped job from one that succeeded, nor a lost connection from a failed job
(ray-project/ray #31183, #38142; kuberay #3216, #5099): here the job itself is asked.
"""

from __future__ import annotations

import asyncio
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
GRACE_S = 600.0  # for a checkpoint, before Ray kills a job that was stopped; Ray's own is 3
MOST_MIB = 100.0  # of a working directory that is shipped
NEVER_SHIPPED = (
    "**/.git/**", "**/.venv/**", "**/__pycache__/**", "**/*.pyc", "**/.mypy_cache/**", "**/.ruff_cache/**",
    "**/.pytest_cache/**", "runs/**", "data/**", "labels/**", "quickstart/**", "**/*.tar", "**/*.safetensors", "**/*.pth",
)  # fmt: skip
IGNORE_FILE = ".fathomignore"
_LOOK_EVERY_S = 1.0
_REDIAL_S = 2.0

SUCCEEDED, FAILED, UNFINISHED, UNKNOWN, CANCELLED = 0, 100, 101, 102, 103  # exit status that answer for a job


class JobsError(RuntimeError):
    """The cluster or its job server refused: what happened and what to do, in one line."""

    exit_status = 1


class JobUsageError(JobsError):
    """What was asked for cannot be: the message names the option."""

    exit_status = 2


class NoSuchJob(JobsError):
    """No job has this id."""

    exit_status = UNKNOWN


@dataclass(frozen=True, kw_only=True)
class Job:
    """`status`: Ray's PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED. Times in seconds since the epoch."""

    id: str
    status: str
    entrypoint: str
    message: str | None
    exit_code: int | None  # the driver's own
    started: float | None
    ended: float | None
    metadata: Mapping[str, str]

    @property
    def answer(self) -> int:
        """The exit status that answers for the job: 0 succeeded, 100 failed, 101 not finished, 103 cancelled.

        A job that ended with 75 was preempted and can go on: not finished.
        """
        if self.status == "SUCCEEDED":
            return SUCCEEDED
        if self.status == "STOPPED":
            return CANCELLED
        if self.status == "FAILED":
            return UNFINISHED if self.exit_code == 75 else FAILED
        return UNFINISHED

    @property
    def over(self) -> bool:
        """Whether it has ended."""
        return self.status in ("STOPPED", "SUCCEEDED", "FAILED")


def resolve_address(address: str | None) -> str:
    """The job server's URL: as given, else of Ray's own variables, else this machine's."""
    found = address or os.environ.get("RAY_API_SERVER_ADDRESS") or DEFAULT_ADDRESS
    return found if "://" in found else f"http://{found}"


@contextmanager
def told(address: str) -> Iterator[None]:
    """Ray's and the connection's exceptions as JobsError, in one line with the remedy."""
    try:
        yield
    except JobsError:
        raise
    except Exception as error:
        text = " ".join(str(error).split())
        if type(error).__name__ == "AuthenticationError" or " 401" in text or " 403" in text:
            raise JobsError(
                f"{address}: refuses without the cluster's token: copy its ~/.ray/auth_token to this machine's, or set "
                "RAY_AUTH_TOKEN, and RAY_AUTH_MODE=token"
            ) from error
        if isinstance(error, ConnectionError) or "Max retries" in text or "Failed to connect" in text:
            raise JobsError(
                f"{address}: no Ray job server answers: start a cluster (`ray start --head`), or give --address, the URL "
                "of its dashboard"
            ) from error
        if "does not exist" in text or "status code 404" in text:
            raise NoSuchJob(f"{address}: {text[:300]}; `fathom jobs list` names those that are there") from error
        if isinstance(error, RuntimeError | ValueError | OSError):
            raise JobsError(f"{address}: {text[:500]}") from error
        raise


def connect(address: str | None) -> Any:
    """Ray's JobSubmissionClient. Raises JobsError."""
    where = resolve_address(address)
    token = Path("~/.ray/auth_token").expanduser()
    if "RAY_AUTH_MODE" not in os.environ and (token.is_file() or "RAY_AUTH_TOKEN" in os.environ):
        os.environ["RAY_AUTH_MODE"] = "token"  # the server's default as soon as it has a token
    with told(where):
        from ray.job_submission import JobSubmissionClient

        return JobSubmissionClient(where)


def entrypoint(arguments: Sequence[str], restarts: int, folder: str) -> str:
    """The job's shell command: the supervisor with the verb, in the folder where it was typed if that is there."""
    words = ["python", "-m", "launcher.supervisor", "--restarts", str(restarts), "--", *arguments]
    here = shlex.quote(folder)
    return (
        f'export PYTHONPATH="$PWD${{PYTHONPATH:+:$PYTHONPATH}}"; if [ -d {here} ]; then cd {here}; fi; exec '
        f"{shlex.join(words)}"
    )


def ignored(folder: str) -> list[str]:
    """What is not shipped: ours, and the lines of .fathomignore (patterns as in .gitignore)."""
    path = Path(folder, IGNORE_FILE)
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return [*NEVER_SHIPPED, *(line.strip() for line in lines if line.strip() and not line.startswith("#"))]


def submit(
    client: Any,
    address: str,
    arguments: Sequence[str],
    *,
    job_id: str,
    folder: str,
    code: str,
    metadata: Mapping[str, str],
    grace_s: float = GRACE_S,
    restarts: int = 5,
    env: Mapping[str, str] | None = None,
) -> str:
    """Submit a verb; returns the job's id. `code`: the checkout whose packages are shipped. Raises JobsError."""
    variables = {
        "RAY_JOB_STOP_WAIT_TIME_S": f"{grace_s:g}",
        "PYTHONUNBUFFERED": "1",
        **(env or {}),
    }
    with told(address):
        return str(
            client.submit_job(
                entrypoint=entrypoint(arguments, restarts, folder),
                submission_id=job_id,
                runtime_env={"working_dir": code, "excludes": ignored(code), "env_vars": variables},
                metadata=dict(metadata),
            )
        )


def job_of(details: Any) -> Job:
    """Ray's JobDetails as ours."""
    return Job(
        id=details.submission_id or details.job_id,
        status=getattr(details.status, "value", str(details.status)),
        entrypoint=details.entrypoint,
        message=details.message,
        exit_code=details.driver_exit_code,
        started=details.start_time / 1000 if details.start_time else None,
        ended=details.end_time / 1000 if details.end_time else None,
        metadata=dict(details.metadata or {}),
    )


def look(client: Any, address: str, job_id: str) -> Job:
    """A job as it is now. Raises NoSuchJob, JobsError."""
    with told(address):
        return job_of(client.get_job_info(job_id))


def wait(client: Any, address: str, job_id: str, timeout_s: float | None = None) -> Job:
    """Until the job has ended or the time is over. A server that cannot be reached is asked again, for ever."""
    ends = None if timeout_s is None else time.monotonic() + timeout_s
    silent = False
    while True:
        try:
            job = look(client, address, job_id)
            silent = False
            if job.over:
                return job
        except NoSuchJob:
            raise
        except JobsError as error:
            if not silent:
                print(f"{error}; asking again", file=sys.stderr, flush=True)
            silent, job = True, None
        if ends is not None and time.monotonic() >= ends:
            if job is None:
                raise JobsError(f"{address}: cannot be reached")
            return job
        time.sleep(_LOOK_EVERY_S)


def follow(client: Any, address: str, job_id: str, show: Callable[[str], None]) -> Job:
    """Show the log as it grows, until the job has ended. A lost connection is made again, and nothing shown twice."""
    shown = 0
    while True:
        try:
            shown = asyncio.run(_tail(client, job_id, shown, show))
        except Exception as error:  # noqa: BLE001  the server, the network, a restarted head: the job may be well
            print(f"{address}: lost the log ({type(error).__name__}); connecting again", file=sys.stderr, flush=True)
            time.sleep(_REDIAL_S)
        try:
            job = look(client, address, job_id)
        except NoSuchJob:
            raise
        except JobsError:
            time.sleep(_REDIAL_S)
            continue
        if job.over:
            with told(address):
                rest = str(client.get_job_logs(job_id))[shown:]
            if rest:
                show(rest)
            return job


async def _tail(client: Any, job_id: str, shown: int, show: Callable[[str], None]) -> int:
    """Show what comes behind the first `shown` characters; returns how many have been shown then."""
    seen = 0
    async for text in client.tail_job_logs(job_id):
        new = text[max(0, shown - seen) :]
        seen += len(text)
        if new:
            show(new)
            shown = seen
    return max(shown, seen)


def stop(client: Any, address: str, job_id: str, grace_s: float) -> Job:
    """Ask the job to stop, and wait up to `grace_s` seconds for its end. Raises NoSuchJob, JobsError."""
    with told(address):
        client.stop_job(job_id)
    return wait(client, address, job_id, grace_s)
