"""A jobs client without a cluster: jobs in memory, logs that break off where a test says so."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from launcher.submission import Request, Terms


class Details:
    """As Ray's JobDetails; `at` and `ended` in seconds since the epoch."""

    def __init__(self, name: str | None, status: str = "SUCCEEDED", **known: Any) -> None:
        self.submission_id, self.job_id = name, "01000000"
        self.status = status
        self.entrypoint = known.get("entrypoint", "sh x.sh")
        self.message = known.get("message")
        self.driver_exit_code = known.get("exit_code")
        self.start_time = int(known.get("at", time.time()) * 1000)
        self.end_time = int(known["ended"] * 1000) if "ended" in known else None
        self.metadata = known.get("metadata")
        self.runtime_env = known.get("runtime_env")


def metadata(run: str, *words: str, folder: str | Path = "/somewhere", **more: str) -> dict[str, str]:
    """As `fathom submit` writes them."""
    arguments = words or ("train", "teacher.yaml")
    asked = Request(arguments=arguments, typed=arguments, name=run)
    return asked.metadata(run) | Terms(folder=str(folder)).metadata() | more


class FakeClient:
    """`connections`: what each `tail_job_logs` sends, an exception among it breaks it off. `answers`: to get_job_info,
    one after the other, the last one for good; exceptions are raised."""

    def __init__(
        self,
        *jobs: Details,
        answers: Sequence[Any] = (),
        connections: Sequence[Sequence[Any]] = (),
        log: Any = "",
    ) -> None:
        self.jobs = list(jobs)
        self.answers, self.connections, self.log = list(answers), [list(one) for one in connections], log
        self.stopped: list[str] = []
        self.deleted: list[str] = []
        self.submitted: list[dict[str, Any]] = []

    def list_jobs(self) -> list[Details]:
        return self.jobs

    def get_job_info(self, name: str) -> Details:
        if not self.answers:
            return next(job for job in self.jobs if job.submission_id == name)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        assert isinstance(answer, Details)
        return answer

    def get_job_logs(self, name: str) -> str:
        if isinstance(self.log, list):
            self.log, answer = (self.log[1:] or self.log), self.log[0]
        else:
            answer = self.log
        if isinstance(answer, Exception):
            raise answer
        return str(answer)

    async def tail_job_logs(self, name: str) -> AsyncIterator[str]:
        for piece in self.connections.pop(0) if self.connections else ():
            if isinstance(piece, Exception):
                raise piece
            yield piece

    def stop_job(self, name: str) -> bool:
        self.stopped.append(name)
        return True

    def delete_job(self, name: str) -> bool:
        self.deleted.append(name)
        return True

    def submit_job(self, **given: Any) -> str:
        folder = Path(given["runtime_env"]["working_dir"])
        names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        self.submitted.append(given | {"files": names})
        name = str(given["submission_id"])
        self.jobs.append(
            Details(name, "RUNNING", metadata=dict(given["metadata"]), entrypoint=given["entrypoint"])
        )
        return name
