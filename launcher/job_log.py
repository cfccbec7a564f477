"""A job's log as it grows, over connections that are lost and made again."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from launcher.jobs import Job, JobsError, NoSuchJob, Refused, log, look

_REDIAL_S = 2.0
_LAST_TRIES = 5  # for the end of a log: a machine that is gone has taken it along


@dataclass
class Shown:
    """How much of a log has been shown: the server sends it from its beginning on every connection."""

    show: Callable[[str], None]
    characters: int = 0

    def take(self, text: str, start: int) -> None:
        """Show what is new of a text that begins at the log's character `start`."""
        new = text[max(0, self.characters - start) :]
        if new:
            self.show(new)
            self.characters = start + len(text)


class JsonLines:
    """Shows a log as one JSON object a line, on stdout."""

    def __init__(self, job_id: str) -> None:
        self._job_id = job_id
        self._rest = ""

    def __call__(self, text: str) -> None:
        """What came; a line that is not whole yet is kept."""
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            self._write(line)

    def close(self) -> None:
        """The last line, where nothing ended it."""
        if self._rest:
            self._write(self._rest)
        self._rest = ""

    def _write(self, line: str) -> None:
        print(json.dumps({"id": self._job_id, "line": line}), flush=True)


def follow(client: Any, address: str, job_id: str, show: Callable[[str], None]) -> Job:
    """Show the log as it grows, until the job has ended. A lost connection is made again, and nothing shown twice.

    An outage is told once, on stderr. Raises NoSuchJob, Refused, and what `show` raises.
    """
    shown = Shown(show)
    telling = True
    while True:
        before = shown.characters
        lost = asyncio.run(_receive(client, job_id, shown))
        telling = telling or shown.characters > before
        job = None
        try:
            job = look(client, address, job_id)
        except (NoSuchJob, Refused):
            raise
        except JobsError as error:
            lost = lost or error
        if job is not None and job.over:
            _finish(client, address, job_id, shown)
            return job
        if telling:
            why = type(lost).__name__ if lost else "it was closed"
            print(f"{address}: lost the log of {job_id} ({why}); connecting again", file=sys.stderr, flush=True)
            telling = False
        time.sleep(_REDIAL_S)


async def _receive(client: Any, job_id: str, shown: Shown) -> Exception | None:
    """Show what comes until the connection ends; returns what broke it, None when the server closed it."""
    chunks = client.tail_job_logs(job_id)
    seen = 0
    while True:
        try:
            text = await anext(chunks)
        except StopAsyncIteration:
            return None
        except Exception as error:  # noqa: BLE001  the server, the network, a restarted head: the job may be well
            return error
        shown.take(text, seen)  # what this raises is about our own reader, not about the connection
        seen += len(text)


def _finish(client: Any, address: str, job_id: str, shown: Shown) -> None:
    """Show what was written while nobody listened."""
    for left in reversed(range(_LAST_TRIES)):
        try:
            rest = log(client, address, job_id)
        except JobsError as error:
            if not left:
                print(f"{error}; the end of the log is not shown", file=sys.stderr, flush=True)
                return
            time.sleep(_REDIAL_S)
        else:
            shown.take(rest, 0)
            return
