"""`fathom submit` and `fathom jobs` before a client without a cluster: what is sent, printed, and the exit status."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launcher import job_log, jobs, recipes
from tests.launcher.conftest import Run
from tests.launcher.fake_jobs import Details, FakeClient, metadata

GROUP = "jobs"
WHERE = "http://head:8265"
LOG = "step 1\nstep 2\n"


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> FakeClient:
    """Its jobs end at once, and have written LOG."""
    client = FakeClient(connections=[[LOG]], log=LOG)
    monkeypatch.setattr(jobs, "connect", lambda address: (client, WHERE))
    monkeypatch.setattr(jobs, "_LOOK_EVERY_S", 0.0)
    monkeypatch.setattr(job_log, "_REDIAL_S", 0.0)
    return client


@pytest.fixture
def submit(fathom: Run, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """`fathom submit`, in `tmp_path`, where teacher.yaml is."""
    (tmp_path / "teacher.yaml").write_text(recipes.read("teacher-v2-vitg"))

    def run(*arguments: str) -> tuple[int, str, str]:
        with monkeypatch.context() as patched:
            patched.setattr(request.module, "GROUP", "submit")
            return fathom(*arguments)

    return run


def objects(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_what_is_sent(submit: Run, cluster: FakeClient, tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("PASSWORD=x")
    status, out, err = submit("--env", "A=1", "--grace", "90", "train", "teacher.yaml", "--set", "name=mine")
    assert (status, out, err) == (0, "mine\n", "")
    [sent] = cluster.submitted
    assert sent["runtime_env"]["env_vars"] | {"FATHOM_SUBMITTED": ""} == {
        "A": "1", "PYTHONUNBUFFERED": "1", "RAY_JOB_STOP_WAIT_TIME_S": "90", "FATHOM_JOB": "mine",
        "FATHOM_SUBMITTED": "",
    }  # fmt: skip
    assert f"cd {tmp_path} 2>/dev/null" in sent["entrypoint"] and '"$shipped/job.yaml"' in sent["entrypoint"]
    assert {"job.yaml", "here/teacher.yaml", "launcher/supervisor.py"} <= sent["files"]
    assert "here/.env" not in sent["files"]


def test_json_alone_where_json_is_asked_for(submit: Run, cluster: FakeClient) -> None:
    cluster.answers = [Details("mine", "SUCCEEDED", metadata=metadata("mine"))]
    status, out, err = submit("--wait", "--json", "train", "teacher.yaml", "--set", "name=mine")
    first, last = objects(out)
    assert status == 0 and first["id"] == last["id"] == "mine" and first["address"] == WHERE
    assert (last["state"], last["answer"]) == ("SUCCEEDED", 0) and LOG in err


@pytest.mark.parametrize(
    ("state", "code", "status"), [("SUCCEEDED", 0, 0), ("FAILED", 1, 100), ("FAILED", 75, 101), ("STOPPED", None, 103)]
)
def test_the_exit_status_answers_for_the_job(
    submit: Run, fathom: Run, cluster: FakeClient, state: str, code: int | None, status: int
) -> None:
    ended = Details("mine", state, exit_code=code, metadata=metadata("mine"))
    cluster.answers, cluster.jobs = [ended], []
    done, out, err = submit("--wait", "train", "teacher.yaml", "--set", "name=mine")
    assert (done, out) == (status, f"mine\n{LOG}") and "mine: " in err
    cluster.jobs = [ended]
    assert fathom("wait", "mine")[0] == status
    assert fathom("status", "mine", "--exit-code")[0] == status
    assert fathom("status", "mine")[0] == 0
    assert fathom("logs", "-f", "mine")[0] == 0


def test_a_job_that_is_not_there(fathom: Run, cluster: FakeClient) -> None:
    for verb in ("status", "logs", "wait", "stop", "resume", "delete"):
        status, out, err = fathom(verb, "nobody")
        assert (status, out) == (102, "") and "no job 'nobody'" in err and err.count("\n") == 1


def test_an_address_that_is_none(fathom: Run) -> None:
    for address in ("ftp://x", "http://[::1"):
        status, _, err = fathom("list", "--address", address)
        assert status == 2 and err.startswith(f"error: --address {address}: expected the URL")


def test_logs_as_json(fathom: Run, cluster: FakeClient) -> None:
    cluster.jobs = [Details("a", "SUCCEEDED")]
    for more in ((), ("-f",)):
        status, out, _ = fathom("logs", "a", "--json", *more)
        assert status == 0 and objects(out) == [{"id": "a", "line": "step 1"}, {"id": "a", "line": "step 2"}]


def test_a_job_of_others_in_the_list(fathom: Run, cluster: FakeClient) -> None:
    cluster.jobs = [
        Details("a", "RUNNING", metadata={"typed": "not json", "run_folder": "/x", "grace": "soon"}, entrypoint="sh x"),
        Details("b", "PENDING", metadata=metadata("b") | {"typed": "[1]"}),
        Details(None, "RUNNING"),
    ]
    status, out, _ = fathom("list")
    assert status == 0 and len(out.splitlines()) == 3
    states = {one["id"]: one for one in json.loads(fathom("list", "--json")[1])}
    assert states["a"]["verb"] == "sh x" and states["a"]["grace_s"] == 3 and not states["a"]["by_fathom"]
    assert states["b"]["state"] == "SUBMITTED" and states["b"]["by_fathom"]


def test_stop_says_whether_it_saved(fathom: Run, cluster: FakeClient) -> None:
    def ending(kind: str, log: str, known: dict[str, str] | None) -> tuple[int, str, str]:
        running = Details("a", "RUNNING", metadata=known)
        cluster.jobs, cluster.answers, cluster.log = [running], [running, Details("a", kind, metadata=known)], log
        return fathom("stop", "a", "--json", *(("--grace", "0") if kind == "RUNNING" else ()))

    status, out, _ = ending("STOPPED", "stopped at step 4 by SIGTERM; go on with --resume\n", metadata("a"))
    assert status == 0 and json.loads(out)["saved"] is True
    status, out, _ = ending("STOPPED", "step 4\n", metadata("a", grace="20"))
    facts = json.loads(out)
    assert status == 0 and facts["saved"] is False and "killed by Ray before it saved (it had 20 s)" in facts["reason"]
    status, out, err = ending("STOPPED", "", None)
    assert "not submitted by fathom: Ray kills it in 3 s" in err and json.loads(out)["grace_s"] == 3
    status, out, _ = ending("RUNNING", "", metadata("a"))
    assert status == 101 and cluster.stopped == ["a"] * 4


def test_who_waits_is_told_of_changes(fathom: Run, cluster: FakeClient) -> None:
    waiting, running = (Details("a", status, metadata=metadata("a")) for status in ("PENDING", "RUNNING"))
    ended = Details("a", "STOPPED", metadata=metadata("a"), exit_code=0)
    log = "stopped at step 4 by SIGTERM; go on with --resume\n"
    told = ["a: SUBMITTED", "a: STARTING", "a: CANCELLED (stopped at step 4 by SIGTERM)"]
    for words, first in (
        (("stop", "a"), "a: waiting for its end, 630 s at most"), (("wait", "a"), "a: waiting for its end"),
        (("wait", "a", "--timeout", "60"), "a: waiting for its end, 60 s at most"),
    ):  # fmt: skip
        cluster.jobs, cluster.answers, cluster.log = [waiting], [waiting, waiting, running, running, ended], log
        assert fathom(*words)[1:] == ("", "\n".join([first, *told, ""]))
        cluster.answers = [waiting, running, ended]
        assert fathom(*words, "--json")[2] == ""
    cluster.jobs = [ended]
    for verb in ("stop", "wait"):
        assert fathom(verb, "a")[2] == f"{told[-1]}\n"


def test_resume_does_the_same_in_the_same_place(
    submit: Run, fathom: Run, cluster: FakeClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ("--env", "A=1", "--env", "B=", "--grace", "90", "--restarts", "2", "--python", "python3")
    submit(*given, "train", "teacher.yaml", "--set", "name=mine")
    cluster.jobs[-1].status = "STOPPED"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "other.txt").write_text("x")
    monkeypatch.chdir(elsewhere)
    cluster.answers = [Details("mine.2", "SUCCEEDED", metadata=metadata("mine"))]
    status, out, err = fathom("resume", "mine", "--wait", "--json")
    assert status == 0 and [one["id"] for one in objects(out)] == ["mine.2", "mine.2"] and LOG in err
    first, second = cluster.submitted
    assert second["submission_id"] == "mine.2"
    assert second["entrypoint"] == first["entrypoint"].replace("job.yaml\"", "job.yaml\" --begin-or-resume")
    same = {"A": "1", "B": "", "RAY_JOB_STOP_WAIT_TIME_S": "90"}.items()
    assert same <= first["runtime_env"]["env_vars"].items() and same <= second["runtime_env"]["env_vars"].items()
    for name in ("folder", "env", "grace", "restarts", "python", "config"):
        assert first["metadata"][name] == second["metadata"][name]
    assert "here/teacher.yaml" in second["files"] and "here/other.txt" not in second["files"]


@pytest.mark.parametrize(
    "words",
    [
        ("label", "run", "s3://b/photos", "--weights", "w", "--quality", "flip"),
        ("label", "retry", "s3://b/photos/labels/0123", "--weights", "w", "--reason", "bad_image"),
    ],
)
def test_a_labelling_job_stops_with_what_it_has_and_goes_on(
    submit: Run, fathom: Run, cluster: FakeClient, words: tuple[str, ...]
) -> None:
    submit("--name", "labels", *words)
    known = cluster.jobs[-1].metadata
    running, ended = (Details("labels", kind, metadata=known) for kind in ("RUNNING", "STOPPED"))
    cluster.jobs, cluster.answers = [running], [running, ended]
    cluster.log = "stopped by SIGTERM after 3 shards; the same command goes on\n"
    status, out, _ = fathom("stop", "labels", "--json")
    found = json.loads(out)
    assert status == 0 and found["saved"] is True and found["reason"] == "stopped by SIGTERM after 3 shards"
    cluster.jobs = [ended]
    assert fathom("resume", "labels")[:2] == (0, "labels.2\n")
    first, second = cluster.submitted
    assert second["entrypoint"] == first["entrypoint"] and " ".join(words) in second["entrypoint"]


def test_resume_counts_up_over_all_ids(fathom: Run, cluster: FakeClient) -> None:
    cluster.jobs = [
        Details(name, "STOPPED", metadata=metadata(run), at=at)
        for name, run, at in (("a", "a", 1), ("a.2", "a", 2), ("a.9", "a.9", 5), ("a.x", "a.x", 6), ("b.77", "b", 7))
    ]
    for name, job_id in (("a", "a.10"), ("a.9", "a.9.2")):  # a.9 is a run of its own
        assert fathom("resume", name)[:2] == (0, f"{job_id}\n")
        cluster.jobs[-1].status = "STOPPED"
    assert fathom("resume", "a")[:2] == (0, "a.11\n")


def test_resume_where_the_folder_is_not(fathom: Run, cluster: FakeClient) -> None:
    cluster.jobs = [Details("a", "STOPPED", metadata=metadata("a", folder="/not/here"))]
    status, out, err = fathom("resume", "a")
    assert (status, out) == (0, "a.2\n") and "/not/here: is not on this machine and is not shipped" in err
    assert "cd /not/here 2>/dev/null" in cluster.submitted[0]["entrypoint"]


def test_resume_of_what_cannot_go_on(fathom: Run, cluster: FakeClient) -> None:
    cluster.jobs = [
        Details("a", "RUNNING", metadata=metadata("a")), Details("b", "STOPPED"),
        Details("c", "STOPPED", metadata=metadata("c") | {"arguments": "not json"}),
        Details("d", "STOPPED", metadata=metadata("d") | {"restarts": "x"}),
    ]  # fmt: skip
    for name, said in (("a", "jobs stop a"), ("b", "cannot go on"), ("c", "cannot go on"), ("d", "damaged")):
        status, out, err = fathom("resume", name)
        assert (status, out) == (2, "") and said in err and err.count("\n") == 1
    assert cluster.submitted == []


def test_nothing_secret_is_sent(submit: Run, fathom: Run, cluster: FakeClient) -> None:
    refused = (
        (("train", "teacher.yaml", "--set", "runs=https://joe:hush@host/x"), "runs: holds a URL with a user"),
        (("predict", "http://h/x?sig=hush", "--weights", "w", "--out", "o"), "VERB, word 2 (http...): holds a URL"),
        (("--env", "DB_PASSWORD=hush", "train", "teacher.yaml"), "--env DB_PASSWORD: looks like a secret"),
        (("--env", f"LOGIN=hf_{'hush' * 9}", "train", "teacher.yaml"), "--env LOGIN: holds a token (hf_...)"),
        (("train", "teacher.yaml", "--set", f"name=AKIA{'HUSH' * 4}"), "name: holds a token (AKIA...)"),
    )  # fmt: skip
    for arguments, said in refused:
        status, out, err = submit(*arguments)
        assert (status, out) == (2, "") and said in err and "hush" not in err.lower() and err.count("\n") == 1
    cluster.jobs = [Details("a", "STOPPED", metadata=metadata("a", config="runs: https://joe:hush@host/x\n"))]
    status, _, err = fathom("resume", "a")
    assert status == 2 and "runs: holds a URL" in err and "hush" not in err
    assert cluster.submitted == []


def test_more_than_the_server_takes(submit: Run, cluster: FakeClient) -> None:
    status, _, err = submit("--max-size", "500", "train", "teacher.yaml")
    assert status == 2 and "--max-size 500: Ray's job server takes 100 MiB at most" in err and cluster.submitted == []


def test_delete(fathom: Run, cluster: FakeClient) -> None:
    cluster.jobs = [Details("a", "STOPPED"), Details("b", "RUNNING")]
    assert fathom("delete", "a")[:2] == (0, "a: forgotten\n") and cluster.deleted == ["a"]
    assert fathom("delete", "b")[0] == 2
