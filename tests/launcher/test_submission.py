"""A command line is checked and resolved before anything is sent; its metadata are enough to go on."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from launcher import recipes
from launcher.errors import status_of
from launcher.jobs import CONFIG_WORD, Job, JobUsageError, entrypoint, find, number_of, resolve_address
from launcher.submission import Request, Terms, again, environment, refuse_secrets, request
from launcher.supervisor import main as supervise


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "teacher.yaml"
    path.write_text(recipes.read("teacher-v2-vitg"))
    return path


def test_the_configuration_is_resolved_here(config: Path) -> None:
    asked = request(["train", "teacher.yaml", "--set", "steps=7", "--debug", "--set=name=mine"], None)
    assert asked.arguments == ("train", CONFIG_WORD, "--debug")
    assert asked.name == "mine" and asked.run_folder == str(config.parent / "runs" / "mine")
    values = yaml.safe_load(asked.config or "")
    assert values["steps"] == 7 and values["name"] == "mine" and values["runs"] == str(config.parent / "runs")
    other = request(["train", "teacher.yaml", "--set", "steps=8", "--debug", "--set=name=mine"], None)
    assert asked.digest != other.digest and len(asked.digest or "") == 16
    assert request(["train", "teacher.yaml", "--set", "steps=7", "--set=name=mine"], None).digest == asked.digest


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train", "teacher.yaml", "--set", "stepz=7"], "stepz"),
        (["train", "nothing.yaml"], "no such configuration file"),
        (["train", "teacher.yaml", "--frobnicate"], "frobnicate"),
        (["frobnicate"], "'frobnicate' is none that can be used here"),
        (["jobs", "list"], "'jobs' is none that can be used here"),
        (["data", "frobnicate"], "'data frobnicate'"),
        (["label"], "Usage: fathom label"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_sent(
    config: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(Exception) as caught:
        request(words, None)
    assert status_of(caught.value) == 2
    assert said in capsys.readouterr().err


def test_verbs_without_a_configuration_get_a_name(config: Path) -> None:
    one, two = (request(["data", "layouts"], None) for _ in range(2))
    assert one.name.startswith("data-layouts-2") and one.name != two.name and one.config is None
    assert request(["data", "layouts"], "mine").name == "mine"
    with pytest.raises(JobUsageError, match="--name"):
        request(["data", "layouts"], "a/b")


def test_metadata_are_enough_to_go_on(config: Path) -> None:
    asked = request(["train", "teacher.yaml", "--set", "steps=7"], None)
    known = asked.metadata("teacher")
    assert all(isinstance(value, str) for value in known.values())
    config.unlink()
    resumed = again(known)
    assert resumed.arguments == ("train", CONFIG_WORD, "--begin-or-resume") and resumed.config == asked.config
    assert again(resumed.metadata("teacher")).arguments == resumed.arguments
    for words in (["label", "run", "d", "--weights", "w"], ["label", "retry", "l", "--weights", "w", "--reason", "x"]):
        known = request(words, "labels").metadata("labels")
        assert list(again(known).arguments) == words and again(known).name == "labels"
    for words in (["predict", "a.jpg"], ["data", "layouts"], ["label", "verify", "l"]):
        with pytest.raises(JobUsageError, match="cannot go on"):
            again({"arguments": json.dumps(words), "run": "x"})
    with pytest.raises(JobUsageError, match="cannot go on"):
        again({"arguments": "not json", "run": "x"})


@pytest.mark.parametrize(
    ("words", "kept"),
    [
        (["train", "train"], ["train", CONFIG_WORD]),
        (["train", "./train"], ["train", CONFIG_WORD]),
        (["train", "--set", "steps=7", "train", "--resume"], ["train", CONFIG_WORD, "--resume"]),
        (["train", "--skip-samples", "1:2", "--", "train"], ["train", "--skip-samples", "1:2", "--", CONFIG_WORD]),
        (["train", "1:2", "--skip-samples", "1:2"], ["train", CONFIG_WORD, "--skip-samples", "1:2"]),
        (["train", "--skip-samples", "1:2", "1:2"], ["train", "--skip-samples", "1:2", CONFIG_WORD]),
        (["train", "CONFIG"], ["train", CONFIG_WORD]),
    ],
)
def test_a_configuration_may_be_called_like_any_other_word(config: Path, words: list[str], kept: list[str]) -> None:
    for name in ("train", "1:2", "CONFIG"):
        (config.parent / name).write_text(config.read_text())
    assert list(request(words, None).arguments) == kept
    assert "job.yaml" not in entrypoint(["predict", "CONFIG"], 0, "/somewhere")  # only what we put there is replaced


def test_the_terms_go_on_too(monkeypatch: pytest.MonkeyPatch) -> None:
    terms = Terms(folder="/a b", grace_s=60, restarts=2, python="python3", env={"A": "b=c", "E": ""})
    assert Terms.of(terms.metadata()) == terms
    assert Terms.of(Terms(folder="/x").metadata()).env == {}
    for damage in ({"folder": ""}, {"restarts": "x"}, {"env": "not json"}, {"env": "{}"}, {"env": '["AWS_SECRET=x"]'}):
        with pytest.raises(JobUsageError):
            Terms.of(terms.metadata() | damage)
    assert Terms.of(terms.metadata() | {"grace": "soon"}).grace_s == 600


def test_variables_that_hold_secrets_do_not_travel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert environment(["A=b=c", "HF_HUB_OFFLINE", "EMPTY="]) == {"A": "b=c", "HF_HUB_OFFLINE": "1", "EMPTY": ""}
    assert len(environment(["KEYBOARD=de", "TOKENIZERS_PARALLELISM=false", "MIRROR=https://host:80/x"])) == 3
    refused = (
        "AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY=x", "my_password=1", "HF_TOKEN", "9=1", "NOT_SET_ANYWHERE",
        "GITHUB_PAT=x", "PGPASSWORD=x", "AUTH_HEADER=x", "PROXY=http://joe:pw@host:80", "FATHOM_JOB=x",
        "RAY_JOB_STOP_WAIT_TIME_S=1",
    )  # fmt: skip
    for item in refused:
        with pytest.raises(JobUsageError, match="--env") as caught:
            environment([item])
        assert "joe" not in str(caught.value)


def test_credentials_in_urls_do_not_travel(config: Path) -> None:
    def said(words: list[str], terms: Terms) -> str:
        with pytest.raises(JobUsageError) as caught:
            refuse_secrets(request(words, None), terms)
        text = str(caught.value)
        assert "\n" not in text and "hush" not in text and "nodes' environment" in text
        return text

    terms = Terms(folder=str(config.parent))
    url = "https://joe:hush@host/a.tar"
    refuse_secrets(request(["train", "teacher.yaml"], None), terms)
    assert said(["train", "teacher.yaml", "--set", f"runs={url}"], terms).startswith("runs: holds a URL with a user")
    signed = "s3://b/a.tar?X-Amz-Date=1&X-Amz-Signature=hush"
    assert "runs: holds a URL with the parameter X-Amz-Signature" in said(
        ["train", "teacher.yaml", "--set", f"runs={signed}"], terms
    )
    words = ["predict", url, "--weights", "w", "--out", "o"]
    assert "VERB, word 2 (https...): holds a URL with a user" in said(words, terms)
    other = Request(arguments=("data",), typed=("data",), name="x")
    for changed in (Terms(folder="/", python=url), Terms(folder=f"/{url}")):
        with pytest.raises(JobUsageError):
            refuse_secrets(other, changed)
    nested = Request(arguments=("train",), typed=("train",), name="x", config=f"data:\n  sources:\n  - url: {url}\n")
    with pytest.raises(JobUsageError, match=r"^data\.sources\.0\.url: "):
        refuse_secrets(nested, terms)


def shell(command: str, folder: Path) -> list[str]:
    """The arguments that the supervisor would get, and where."""
    (folder / "fake").write_text('#!/bin/sh\npwd\necho "$PYTHONPATH"\nfor word in "$@"; do echo "$word"; done\n')
    (folder / "fake").chmod(0o755)
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(["/bin/sh", "-c", command], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_the_job_s_command_survives_a_shell(tmp_path: Path) -> None:
    shipped, typed = tmp_path / "ship ped", tmp_path / "it's here"
    (shipped / "here").mkdir(parents=True)
    words = ["train", CONFIG_WORD, "--set", "a=$HOME `x` 'y' \"z\"", "*"]
    command = entrypoint(words, 3, str(typed), python=str(shipped / "fake"))
    expected = ["-m", "launcher.supervisor", "--restarts", "3", "--", "train", f"{shipped}/job.yaml", *words[2:]]
    assert shell(command, shipped) == [str(shipped / "here"), str(shipped), *expected]
    typed.mkdir()
    assert shell(command, shipped)[0] == str(typed)
    assert shlex.split(command)  # no quote is left open


def test_the_supervisor_refuses_what_it_does_not_know(capsys: pytest.CaptureFixture[str]) -> None:
    assert supervise(["--restarts", "x", "--", "train"]) == 2 and "usage" in capsys.readouterr().err


class Details:
    def __init__(self, name: str, run: str | None, started: int) -> None:
        self.submission_id, self.job_id, self.status, self.entrypoint = name, None, "SUCCEEDED", "x"
        self.message, self.driver_exit_code, self.end_time = None, 0, None
        self.start_time, self.metadata = started * 1000, {"fathom": "1", "run": run} if run else {"run": "a"}


class Client:
    def __init__(self, *details: Details) -> None:
        self.list_jobs = lambda: list(details)


def test_a_run_s_name_is_its_newest_job() -> None:
    client = Client(
        Details("a", "a", 1), Details("a.2", "a", 2), Details("a.10", "a", 9), Details("b", None, 4),
        Details("a.3", "a", 3),
    )  # fmt: skip
    for name, found in (("a", "a.10"), ("a.2", "a.2"), ("a.1", "a"), ("b", "b")):
        assert find(client, "x", name).id == found
    assert [number_of(name, "a") for name in ("a", "a.2", "a.10")] == [1, 2, 10]
    assert number_of("a.2", "a.2") == 1
    anew = Client(Details("a", "a", 9), Details("a.2", "a", 5))  # the first one was forgotten, and submitted again
    assert find(anew, "x", "a").id == "a" and find(anew, "x", "a.2").id == "a.2"


@pytest.mark.parametrize(
    ("status", "code", "answer"),
    [("SUCCEEDED", 0, 0), ("FAILED", 1, 100), ("FAILED", 137, 100), ("FAILED", 75, 101), ("RUNNING", None, 101),
     ("PENDING", None, 101), ("STOPPED", None, 103)],
)  # fmt: skip
def test_the_answer_for_a_job(status: str, code: int | None, answer: int) -> None:
    job = Job(
        id="a", status=status, entrypoint="", message=None, exit_code=code, started=None, ended=None, metadata={}
    )
    assert job.answer == answer


def test_where_the_job_server_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_address("https://given/ray/") == "https://given/ray"
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    assert resolve_address(None) == "http://127.0.0.1:8265"
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")  # the cluster's own
    assert resolve_address(None) == "http://127.0.0.1:8265"
    monkeypatch.setenv("RAY_ADDRESS", "http://head:8265")
    assert resolve_address(None) == "http://head:8265"
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "other:1")
    assert resolve_address(None) == "http://other:1"
    assert resolve_address("https://given") == "https://given"
