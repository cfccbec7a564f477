"""Verbs as jobs of a Ray cluster: Ray's own job client, with errors in one line and answers that can be relied on.

Ray's exit codes do not tell a stopped job from one that succeeded, nor a lost connection from a failed job
(ray-project/ray #31183, #38142; kuberay #3216, #5099): here the job itself is asked.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.ship import CONFIG, HERE

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
GRACE_S = 600.0  # for a checkpoint, before Ray kills a job that was stopped; Ray's own is 3
CONFIG_WORD = "CONFIG"
_LOOK_EVERY_S = 1.0
_REDIAL_S = 2.0
# They tell about every upload and every closed connection.
_LOUD = ("dashboard.modules.dashboard_sdk", "dashboard.modules.job.sdk", "_private.runtime_env.packaging")

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
    def run(self) -> str:
        """The run that it works on; a job that was not submitted by us is its own."""
        return self.metadata.get("run", self.id)

    @property
    def verb(self) -> tuple[str, ...]:
        """What it does, in words; of a job that was not submitted by us its shell command."""
        return tuple(json.loads(self.metadata.get("typed", "null")) or (self.entrypoint,))

    @property
    def over(self) -> bool:
        """Whether it has ended."""
        return self.status in ("STOPPED", "SUCCEEDED", "FAILED")


def resolve_address(address: str | None) -> str:
    """The job server's URL: as given, else of Ray's own variables, else this machine's."""
    usual = os.environ.get("RAY_ADDRESS", "")  # may be a cluster's own address, which says nothing of its dashboard
    given = address or os.environ.get("RAY_API_SERVER_ADDRESS")
    found = given or (usual if usual.startswith("http") else DEFAULT_ADDRESS)
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
                f"{address}: no Ray job server answers: start a cluster (`ray start --head`), or give --address, the "
                "URL of its dashboard"
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
    given = any(name in os.environ for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))
    if "RAY_AUTH_MODE" not in os.environ and (given or token.is_file()):
        os.environ["RAY_AUTH_MODE"] = "token"  # the server's default as soon as it has a token
    os.environ["RAY_API_SERVER_ADDRESS"] = where  # Ray's client prefers it to what it is given
    with told(where):
        from ray.job_submission import JobSubmissionClient

        for logger in _LOUD:
            logging.getLogger(f"ray.{logger}").setLevel(logging.WARNING)
        return JobSubmissionClient(where)


def entrypoint(arguments: Sequence[str], restarts: int, folder: str, python: str = "python") -> str:
    """The job's shell command: the supervisor with the verb, in the folder where it was typed if the cluster sees
    that, in its shipped copy otherwise. CONFIG_WORD stands for the shipped configuration.

    PYTHONSAFEPATH, because `python -m` would look into that folder first: one called `model` there would hide ours.
    """
    words = [shlex.quote(word) if word != CONFIG_WORD else f'"$shipped/{CONFIG}"' for word in arguments]
    supervised = f"{shlex.quote(python)} -m launcher.supervisor --restarts {restarts} -- {' '.join(words)}"
    return (
        f'shipped="$PWD"; export PYTHONSAFEPATH=1 PYTHONPATH="$PWD${{PYTHONPATH:+:$PYTHONPATH}}"; '
        f"cd {shlex.quote(folder)} 2>/dev/null || cd {HERE}; exec {supervised}"
    )


def submit(
    client: Any,
    address: str,
    command: str,
    *,
    job_id: str,
    folder: str,
    metadata: Mapping[str, str],
    env: Mapping[str, str],
) -> None:
    """Submit a shell command that runs in a copy of `folder`. Raises JobsError."""
    with told(address):
        try:
            client.submit_job(
                entrypoint=command,
                submission_id=job_id,
                runtime_env={"working_dir": folder, "env_vars": {"PYTHONUNBUFFERED": "1", **env}},
                metadata=dict(metadata),
            )
        except RuntimeError as error:
            if "already exists" not in str(error):
                raise
            raise JobUsageError(
                f"{job_id}: {address} has a job of this name; `fathom jobs resume {job_id}` goes on with it, "
                f"`fathom jobs delete {job_id}` forgets it; or give --name"
            ) from None


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


def all_jobs(client: Any, address: str) -> list[Job]:
    """The newest first. Drivers that nobody submitted are left out."""
    with told(address):
        found = [job_of(details) for details in client.list_jobs() if details.submission_id]
    return sorted(found, key=lambda job: -(job.started or time.time()))


def find(client: Any, address: str, name: str) -> Job:
    """The job of this id; of a run's name, its newest one; `NAME.1` is the first. Raises NoSuchJob, JobsError."""
    found = all_jobs(client, address)
    of_run = [job for job in found if job.run == name]
    if of_run:
        return max(of_run, key=lambda job: number_of(job.id, name))
    for job in found:
        if name in (job.id, f"{job.id}.1"):
            return job
    raise NoSuchJob(f"{address}: no job {name!r}; `fathom jobs list` names those that are there")


def number_of(job_id: str, run: str) -> int:
    """The how manieth job of its run: 1 for RUN, 2 for RUN.2."""
    number = job_id.removeprefix(f"{run}.")
    return int(number) if number.isdecimal() and number != job_id else 1


def log(client: Any, address: str, job_id: str) -> str:
    """All that it has written so far. Raises NoSuchJob, JobsError."""
    with told(address):
        return str(client.get_job_logs(job_id))


def delete(client: Any, address: str, job_id: str) -> None:
    """Forget a job that has ended. Raises NoSuchJob, JobsError."""
    with told(address):
        client.delete_job(job_id)


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
                rest = str(client.get_job_logs(job_id))[shown:]  # written while nobody listened
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
