"""Verbs as jobs of a Ray cluster: Ray's own job client, with errors in one line and answers that can be relied on.

Ray's exit codes do not tell a stopped job from one that succeeded, nor a lost connection from a failed job
(ray-project/ray #31183, #38142; kuberay #3216, #5099): here the job itself is asked.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from launcher.credentials import hidden
from launcher.ship import CONFIG, FULL, HERE, RAY_LEAVES_OUT, ROOM

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
GRACE_S = 600.0  # for a checkpoint, before Ray kills a job that was stopped
RAY_GRACE_S = 3.0  # of a job that says nothing about it
GRACE_VARIABLE = "RAY_JOB_STOP_WAIT_TIME_S"
CONFIG_WORD = "\0config"  # nobody can type it
_LOOK_EVERY_S = 1.0
# They tell about every upload and every closed connection.
_LOUD = ("dashboard.modules.dashboard_sdk", "dashboard.modules.job.sdk", "_private.runtime_env.packaging")
_OF_HTTP = ("requests", "urllib3", "aiohttp", "http")  # packages whose exceptions are about the connection
_STATUS = re.compile(r"(?:Request failed with status code|Version check returned) (\d{3})[:.] ?(.*)", re.DOTALL)

SUCCEEDED, FAILED, UNFINISHED, UNKNOWN, CANCELLED = 0, 100, 101, 102, 103  # exit status that answer for a job


class JobsError(RuntimeError):
    """The cluster or its job server refused: what happened and what to do, in one line."""

    exit_status = 1


class JobUsageError(JobsError):
    """What was asked for cannot be: the message names the option."""

    exit_status = 2


class Refused(JobsError):
    """The cluster wants another token: asking again changes nothing."""


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
    started: float | None  # when it was submitted
    ended: float | None
    metadata: Mapping[str, str]  # ours; none of a job that others submitted
    grace_s: float = RAY_GRACE_S  # between Ray's SIGTERM and its SIGKILL

    @property
    def ours(self) -> bool:
        """Whether `fathom submit` submitted it."""
        return bool(self.metadata)

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
        return words_of(self.metadata.get("typed")) or (self.entrypoint,)

    @property
    def over(self) -> bool:
        """Whether it has ended."""
        return self.status in ("STOPPED", "SUCCEEDED", "FAILED")


def resolve_address(address: str | None) -> str:
    """The job server's URL: as given, else of Ray's own variables, else this machine's. Raises JobUsageError."""
    usual = os.environ.get("RAY_ADDRESS", "")  # may be a cluster's own address, which says nothing of its dashboard
    choices = (
        ("--address", address),
        ("RAY_API_SERVER_ADDRESS", os.environ.get("RAY_API_SERVER_ADDRESS")),
        ("RAY_ADDRESS", usual if usual.startswith(("http://", "https://")) else None),
    )
    name, found = next(((name, text) for name, text in choices if text), ("", DEFAULT_ADDRESS))
    url = found if "://" in found else f"http://{found}"
    if not _is_url(url):
        raise JobUsageError(
            f"{name} {hidden(found)}: expected the URL of a cluster's dashboard, http://HOST:PORT or https://HOST"
        )
    return url.rstrip("/")


def _is_url(text: str) -> bool:
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:
        return False
    known = parts.scheme in ("http", "https") and port != 0
    return known and bool(re.fullmatch(r"[^\s\\]+", parts.hostname or "")) and not parts.query and not parts.fragment


@contextmanager
def told(address: str, job_id: str | None = None) -> Iterator[None]:
    """Ray's and the connection's exceptions as JobsError, in one line with the remedy. `job_id`: what it is about."""
    try:
        yield
    except JobsError:
        raise
    except Exception as error:
        raise _translated(error, address, job_id) from error


def _translated(error: Exception, address: str, job_id: str | None) -> JobsError:
    """Ray gives a type for a wrong token, the connection's own for a lost one, else a text that begins with the HTTP
    status, and goes on with a page or the server's traceback."""
    status, text = _status_of(error)
    if getattr(error, "errno", None) in FULL:
        return JobsError(f"{address}: nothing was sent: {tempfile.gettempdir()} has no space left; {ROOM}")
    if type(error).__name__ == "AuthenticationError" or status in (401, 403):
        return Refused(
            f"{address}: refuses without the cluster's token: copy its ~/.ray/auth_token to this machine's, or set "
            "RAY_AUTH_TOKEN, and RAY_AUTH_MODE=token"
        )
    if status == 404 and job_id is not None:
        return NoSuchJob(f"{address}: no job {job_id!r}; `fathom jobs list` names those that are there")
    if status in (404, 405):
        return JobsError(f"{address}: no Ray job server (HTTP {status}); --address is the URL of a cluster's dashboard")
    if status is not None:
        return JobsError(f"{address}: the job server says (HTTP {status}): {text}")
    if isinstance(error, ConnectionError | TimeoutError) or type(error).__module__.partition(".")[0] in _OF_HTTP:
        return JobsError(
            f"{address}: no Ray job server answers: start a cluster (`ray start --head`), or give --address, the "
            "URL of its dashboard"
        )
    if isinstance(error, LookupError | TypeError | ValueError | AttributeError):
        return JobsError(
            f"{address}: does not answer as a Ray job server does ({type(error).__name__}: {text}); --address is the "
            "URL of a cluster's dashboard, of a Ray like this one"
        )
    return JobsError(f"{address}: {text or type(error).__name__}")


def _status_of(error: Exception) -> tuple[int | None, str]:
    """The HTTP status that an exception is about, if any, and its last line: of a traceback the one that says most."""
    found = _STATUS.match(str(error))
    status = int(found[1]) if found else getattr(getattr(error, "response", None), "status_code", None)
    lines = [line.strip() for line in hidden(found[2] if found else str(error)).splitlines() if line.strip(" .")]
    return status, (lines[-1] if status is not None and lines else " ".join(lines))[:500]


def connect(address: str | None) -> tuple[Any, str]:
    """Ray's JobSubmissionClient, and what to call it in messages: its URL, without a password. Raises JobsError."""
    where = resolve_address(address)
    token = Path("~/.ray/auth_token").expanduser()
    given = any(name in os.environ for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))
    if "RAY_AUTH_MODE" not in os.environ and (given or token.is_file()):
        os.environ["RAY_AUTH_MODE"] = "token"  # the server's default as soon as it has a token
    os.environ["RAY_API_SERVER_ADDRESS"] = where  # Ray's client prefers it to what it is given
    os.environ.update([RAY_LEAVES_OUT])
    with told(hidden(where)):
        from ray.job_submission import JobSubmissionClient

        for logger in _LOUD:
            logging.getLogger(f"ray.{logger}").setLevel(logging.WARNING)
        return JobSubmissionClient(where), hidden(where)


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
            if f"Job with submission_id {job_id} already exists" not in str(error):
                raise
            raise JobUsageError(
                f"{job_id}: {address} has a job of this name; `fathom jobs resume {job_id}` goes on with it, "
                f"`fathom jobs delete {job_id}.1` forgets it; or give --name"
            ) from None


def job_of(details: Any) -> Job:
    """Ray's JobDetails as ours. Others' metadata may say anything: they are left out."""
    given = dict(details.metadata or {})
    ours = given if given.get("fathom") == "1" else {}
    env = (getattr(details, "runtime_env", None) or {}).get("env_vars") or {}
    return Job(
        id=details.submission_id or details.job_id,
        status=getattr(details.status, "value", str(details.status)),
        entrypoint=details.entrypoint,
        message=details.message,
        exit_code=details.driver_exit_code,
        started=details.start_time / 1000 if details.start_time else None,
        ended=details.end_time / 1000 if details.end_time else None,
        metadata=ours,
        grace_s=seconds_of(ours.get("grace"), GRACE_S) if ours else seconds_of(env.get(GRACE_VARIABLE), RAY_GRACE_S),
    )


def words_of(text: str | None) -> tuple[str, ...]:
    """A list of words out of metadata; empty where there is none, or it is damaged."""
    try:
        found = json.loads(text or "[]")
    except ValueError:
        return ()
    return tuple(found) if isinstance(found, list) and all(isinstance(word, str) for word in found) else ()


def seconds_of(text: str | None, default: float) -> float:
    """A number out of metadata; `default` where there is none, or it is damaged."""
    return float(text) if text is not None and re.fullmatch(r"\d{1,9}(\.\d*)?", text) else default


def look(client: Any, address: str, job_id: str) -> Job:
    """A job as it is now. Raises NoSuchJob, JobsError."""
    with told(address, job_id):
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
        # not by number alone: NAME may have been forgotten and submitted anew since NAME.2
        return max(of_run, key=lambda job: (job.started or time.time(), number_of(job.id, name)))
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
    with told(address, job_id):
        return str(client.get_job_logs(job_id))


def delete(client: Any, address: str, job_id: str) -> None:
    """Forget a job that has ended. Raises NoSuchJob, JobsError."""
    with told(address, job_id):
        client.delete_job(job_id)


def wait(
    client: Any, address: str, job_id: str, timeout_s: float | None = None, seen: Callable[[Job], None] | None = None
) -> Job:
    """Until the job has ended or the time is over. A server that cannot be reached is asked again, for ever.

    `seen` gets the job at every look at which it still runs.
    """
    ends = None if timeout_s is None else time.monotonic() + timeout_s
    silent = False
    while True:
        try:
            job = look(client, address, job_id)
            silent = False
            if job.over:
                return job
            if seen is not None:
                seen(job)
        except (NoSuchJob, Refused):
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


def stop(
    client: Any, address: str, job_id: str, grace_s: float, seen: Callable[[Job], None] | None = None
) -> Job:
    """Ask the job to stop, and wait up to `grace_s` seconds for its end. Raises NoSuchJob, JobsError."""
    with told(address, job_id):
        client.stop_job(job_id)
    return wait(client, address, job_id, grace_s, seen)
