"""What Ray's client says, as answers and errors of ours: a fake client, and Ray's own before a small HTTP server."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from launcher import jobs
from launcher.jobs import JobsError, JobUsageError, NoSuchJob, Refused, all_jobs, connect, job_of, told, wait
from tests.launcher.fake_jobs import Details, FakeClient, metadata

Answer = Callable[[str, str], tuple[int, str]]  # method, path -> status, body
VERSION = json.dumps({"version": "4", "ray_version": "2.60.0", "ray_commit": "x"})
WHERE = "http://head:8265"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "_LOOK_EVERY_S", 0.0)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[Answer], str]]:
    """Starts a server that answers so, and gives its URL."""
    for name in ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    for name, value in (("HOME", str(tmp_path)), ("RAY_AUTH_MODE", "disabled"), ("RAY_API_SERVER_ADDRESS", "")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv(*jobs.RAY_LEAVES_OUT)
    started: list[ThreadingHTTPServer] = []

    def start(answer: Answer) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length") or 0))
                status, body = answer(self.command, self.path)
                self.send_response(status)
                self.send_header("Content-Length", str(len(body.encode())))
                self.end_headers()
                self.wfile.write(body.encode())

            do_POST = do_PUT = do_DELETE = do_GET

            def log_message(self, format: str, *arguments: object) -> None:
                pass

        started.append(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=started[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{started[-1].server_port}"

    yield start
    for one in started:
        one.shutdown()
        one.server_close()


def one_line(error: JobsError, *words: str) -> None:
    text = str(error)
    assert "\n" not in text and all(word in text for word in words), text


def test_a_server_that_is_none_of_ray(server: Callable[[Answer], str]) -> None:
    cases: list[tuple[Answer, type[JobsError], str]] = [
        (lambda method, path: (404, "<html>\n</html>"), JobsError, "no Ray job server (HTTP 404)"),
        (lambda method, path: (200, "<html>hello</html>"), JobsError, "no Ray job server answers"),
        (lambda method, path: (200, "{}"), JobsError, "KeyError: 'ray_version'"),
        (lambda method, path: (503, "busy"), JobsError, "HTTP 503"),
        (lambda method, path: (401, "who?"), Refused, "~/.ray/auth_token"),
        (lambda method, path: (403, "no"), Refused, "~/.ray/auth_token"),
    ]
    for answer, kind, said in cases:
        url = server(answer)
        with pytest.raises(JobsError) as caught:
            connect(url)
        assert type(caught.value) is kind and caught.value.exit_status == 1
        one_line(caught.value, url, said)


def test_nobody_there(server: Callable[[Answer], str]) -> None:
    with pytest.raises(JobsError) as caught:
        connect("http://joe:hush@127.0.0.1:1")
    one_line(caught.value, "http://127.0.0.1:1: no Ray job server answers", "--address")
    assert "hush" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "mode"), [(None, None), ("file", "token"), ("RAY_AUTH_TOKEN", "token"), ("RAY_AUTH_TOKEN_PATH", "token")]
)
def test_ray_s_client_gets_the_token_the_address_and_no_list_of_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, given: str | None, mode: str | None
) -> None:
    from ray import job_submission

    variables = (
        "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_API_SERVER_ADDRESS", jobs.RAY_LEAVES_OUT[0]
    )  # fmt: skip
    for name in variables:
        monkeypatch.setenv(name, "x")  # so that it is as before when the test has ended
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(job_submission, "JobSubmissionClient", lambda url: url)
    if given == "file":
        (tmp_path / ".ray").mkdir()
        (tmp_path / ".ray" / "auth_token").write_text("x")
    elif given:
        monkeypatch.setenv(given, "x")
    url = "http://joe:hush@head:8265"
    assert connect(url) == (url, WHERE)
    assert os.environ.get("RAY_AUTH_MODE") == mode
    assert os.environ["RAY_API_SERVER_ADDRESS"] == url and os.environ[jobs.RAY_LEAVES_OUT[0]] == ""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    connect(url)
    assert os.environ["RAY_AUTH_MODE"] == "disabled"


def test_what_ray_s_client_says_of_a_job(server: Callable[[Answer], str]) -> None:
    said = {
        "/api/version": (200, VERSION),
        "/api/jobs/gone": (404, "Job gone does not exist"),
        "/api/jobs/gone/stop": (404, "Job gone does not exist"),
        "/api/jobs/gone/logs": (404, "Job gone does not exist"),
        "/api/jobs/bad": (500, 'Traceback (most recent call last):\n  File "x", line 401\nOSError: 403 does not exist'),
        "/api/jobs/": (404, "gone"),
    }  # fmt: skip
    client, where = connect(server(lambda method, path: said[path]))
    for about in (
        lambda: jobs.look(client, where, "gone"), lambda: jobs.log(client, where, "gone"),
        lambda: jobs.delete(client, where, "gone"), lambda: jobs.stop(client, where, "gone", 1),
    ):  # fmt: skip
        with pytest.raises(NoSuchJob) as caught:
            about()
        one_line(caught.value, "no job 'gone'", "fathom jobs list")
        assert caught.value.exit_status == 102
    with pytest.raises(JobsError) as bad:
        jobs.look(client, where, "bad")
    assert type(bad.value) is JobsError
    one_line(bad.value, "(HTTP 500): OSError: 403 does not exist")
    with pytest.raises(JobsError) as listing:  # nothing was asked about one job
        all_jobs(client, where)
    assert type(listing.value) is JobsError


def test_a_name_that_is_taken(server: Callable[[Answer], str], tmp_path: Path) -> None:
    taken = "Traceback ...\nValueError: Job with submission_id teacher already exists. Please use a different one."

    def answer(method: str, path: str) -> tuple[int, str]:
        if path == "/api/version":
            return 200, VERSION
        return (500, taken) if method == "POST" else (404 if method == "GET" else 200, "")

    client, where = connect(server(answer))
    folder = tmp_path / "parcel"
    folder.mkdir()
    (folder / "x").write_text("x")
    with pytest.raises(JobUsageError) as caught:
        jobs.submit(client, where, "true", job_id="teacher", folder=str(folder), metadata={}, env={})
    one_line(caught.value, "has a job of this name", "jobs resume teacher`", "jobs delete teacher.1`", "--name")


@pytest.mark.parametrize(
    "address", ["ftp://x", "http://[::1", "http://", "http://h:port", "http://a b:1", "ray://h:10001", "x://"]
)
def test_an_address_that_is_none(address: str) -> None:
    with pytest.raises(JobUsageError) as caught:
        connect(address)
    assert caught.value.exit_status == 2
    one_line(caught.value, f"--address {address}: expected the URL", "http://HOST:PORT")


def test_the_variable_that_is_wrong_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "ftp://joe:hush@x")
    with pytest.raises(JobUsageError) as caught:
        connect(None)
    one_line(caught.value, "RAY_API_SERVER_ADDRESS ftp://x: expected")


class AuthenticationError(Exception):
    """As Ray's."""


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (AuthenticationError("x\ny"), Refused, "RAY_AUTH_TOKEN"),
        (RuntimeError("Request failed with status code 401: no."), Refused, "RAY_AUTH_TOKEN"),
        (RuntimeError("line 401 of 403"), JobsError, "line 401 of 403"),
        (RuntimeError("Module: ftp does not exist.\nThis"), JobsError, "does not exist. This"),
        (ConnectionError("Failed to connect"), JobsError, "no Ray job server answers"),
        (TimeoutError(), JobsError, "no Ray job server answers"),
        (OSError(28, "No space left on device"), JobsError, "nothing was sent: /"),
        (KeyError("jobs"), JobsError, "does not answer as a Ray job server does"),
    ],
)
def test_told(error: Exception, kind: type[JobsError], said: str) -> None:
    for job in (None, "teacher"):
        with pytest.raises(JobsError) as caught, told(WHERE, job):
            raise error
        assert type(caught.value) is kind
        one_line(caught.value, WHERE, said)


def test_an_error_of_ours_stays() -> None:
    with pytest.raises(JobUsageError, match=r"^mine$"), told(WHERE, "teacher"):
        raise JobUsageError("mine")


def test_metadata_of_others_are_left_alone() -> None:
    foreign = job_of(Details("a", metadata={"typed": "not json", "grace": "soon", "run": "b"}, entrypoint="sh x"))
    assert not foreign.ours and foreign.run == "a" and foreign.verb == ("sh x",) and foreign.grace_s == 3
    told_ray = job_of(Details("a", runtime_env={"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "90"}}))
    assert told_ray.grace_s == 90
    for damage in ("not json", "{}", '[1, "a"]', "null"):
        broken = job_of(Details("a", metadata=metadata("a", grace="soon") | {"typed": damage}))
        assert broken.ours and broken.verb == ("sh x.sh",) and broken.grace_s == 600
    assert job_of(Details("a", metadata=metadata("a", grace="45"))).grace_s == 45


def test_wait_asks_again_when_the_server_is_away(capsys: pytest.CaptureFixture[str]) -> None:
    away = ConnectionError("away")
    running, ended = Details("a", "RUNNING"), Details("a", "FAILED", exit_code=75)
    client = FakeClient(answers=[running, away, away, running, away, ended])
    job = wait(client, WHERE, "a")
    assert job.over and job.answer == 101
    assert capsys.readouterr().err.count("asking again") == 2  # two outages


def test_wait_gives_up_where_asking_is_of_no_use() -> None:
    gone = RuntimeError("Request failed with status code 404: Job a does not exist.")
    for error, kind in ((gone, NoSuchJob), (AuthenticationError("no"), Refused)):
        with pytest.raises(kind):
            wait(FakeClient(answers=[error]), WHERE, "a")


def test_wait_ends_when_its_time_is_over() -> None:
    assert wait(FakeClient(answers=[Details("a", "RUNNING")]), WHERE, "a", 0.02).answer == 101
    with pytest.raises(JobsError, match="cannot be reached"):
        wait(FakeClient(answers=[ConnectionError("away")]), WHERE, "a", 0.02)


def test_stop_waits_for_the_end() -> None:
    client = FakeClient(answers=[Details("a", "RUNNING"), Details("a", "STOPPED")])
    assert jobs.stop(client, WHERE, "a", 60).answer == 103 and client.stopped == ["a"]
