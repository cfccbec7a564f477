"""A log is shown once, whatever happens to the connections; what happens to its reader ends it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from launcher import job_log
from launcher.job_log import JsonLines, follow
from launcher.jobs import NoSuchJob
from tests.launcher.fake_jobs import Details, FakeClient

WHERE = "http://head:8265"
RUNNING, ENDED = Details("a", "RUNNING"), Details("a", "SUCCEEDED")
REPOSITORY = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_log, "_REDIAL_S", 0.0)


def followed(client: FakeClient) -> str:
    pieces: list[str] = []
    assert follow(client, WHERE, "a", pieces.append).over
    return "".join(pieces)


def test_a_connection_that_breaks(capsys: pytest.CaptureFixture[str]) -> None:
    lost = RuntimeError("WebSocket connection closed unexpectedly with close code 1006")
    client = FakeClient(
        answers=[RUNNING, RUNNING, ENDED],
        connections=[["one\ntw", "o\n", lost], ["one\n", "two\nth", lost], ["one\ntwo\nthree\n"]],
        log="one\ntwo\nthree\n",
    )
    assert followed(client) == "one\ntwo\nthree\n"
    assert capsys.readouterr().err.count("lost the log of a (RuntimeError)") == 2


def test_a_connection_that_is_closed(capsys: pytest.CaptureFixture[str]) -> None:
    client = FakeClient(answers=[RUNNING, ENDED], connections=[["one\n"], ["one\ntwo\n"]], log="one\ntwo\n")
    assert followed(client) == "one\ntwo\n"
    assert capsys.readouterr().err.count("it was closed") == 1


def test_what_was_written_while_nobody_listened() -> None:
    client = FakeClient(answers=[ENDED], connections=[["one\n", OSError("away")]], log="one\ntwo\n")
    assert followed(client) == "one\ntwo\n"
    assert followed(FakeClient(answers=[ENDED], log="one\n")) == "one\n"


def test_an_outage_is_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    away = ConnectionError("away")
    client = FakeClient(
        answers=[*[away] * 5, RUNNING, *[away] * 5, ENDED],
        connections=[["one\n", away], *[[away]] * 5, ["one\ntwo\n", away], *[[away]] * 5],
        log="one\ntwo\n",
    )
    assert followed(client) == "one\ntwo\n"
    assert capsys.readouterr().err.count("connecting again") == 2


def test_the_end_of_a_log_that_is_gone(capsys: pytest.CaptureFixture[str]) -> None:
    away = RuntimeError("Request failed with status code 500: away")
    again = FakeClient(answers=[ENDED], connections=[["one\n"]], log=[away, away, "one\ntwo\n"])
    assert followed(again) == "one\ntwo\n"
    assert followed(FakeClient(answers=[ENDED], connections=[["one\n"]], log=away)) == "one\n"
    assert "the end of the log is not shown" in capsys.readouterr().err


def test_a_job_that_is_forgotten_meanwhile() -> None:
    gone = RuntimeError("Request failed with status code 404: Job a does not exist.")
    with pytest.raises(NoSuchJob):
        followed(FakeClient(answers=[gone], connections=[["one\n"]]))


@pytest.mark.parametrize("error", [BrokenPipeError(), OSError(28, "No space left on device"), RuntimeError("x")])
def test_a_reader_that_fails_is_not_a_lost_connection(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    def show(text: str) -> None:
        raise error

    with pytest.raises(type(error)):
        follow(FakeClient(answers=[RUNNING], connections=[["one\n"]] * 3), WHERE, "a", show)
    assert capsys.readouterr().err == ""


def test_head_ends_the_command() -> None:
    """`fathom jobs logs -f ID | head -1`, of a job that never ends."""
    program = """
import asyncio, sys
from launcher import jobs, verbs_jobs
from launcher.cli import build_app
from launcher.errors import run_main
from tests.launcher.fake_jobs import Details, FakeClient

class Endless(FakeClient):
    async def tail_job_logs(self, name):
        while True:
            yield "line\\n"
            await asyncio.sleep(0.01)

jobs.connect = lambda address: (Endless(Details("a", "RUNNING")), "http://head:8265")
run_main(build_app(), ["jobs", "logs", "-f", "a"])
"""
    command = f"{sys.executable} -c '{program}' | head -1"
    done = subprocess.run(
        ["sh", "-c", command], cwd=REPOSITORY, capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip
    assert done.stdout == "line\n" and done.stderr == ""


def test_json_lines_are_whole(capsys: pytest.CaptureFixture[str]) -> None:
    lines = JsonLines("a")
    for piece in ("one\ntw", "o\n\n", 'th"ree'):
        lines(piece)
    lines.close()
    lines.close()
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert found == [{"id": "a", "line": line} for line in ("one", "two", "", 'th"ree')]
