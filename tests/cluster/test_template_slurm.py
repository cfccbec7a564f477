"""The Slurm script among programs that stand for `srun`, `scontrol`, `ray` and the verb."""

from __future__ import annotations

import re
import shlex
import signal
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from launcher.submission import request
from tests.cluster.stage import WAIT_S, Stage, options_of, staged, text_of, write_config


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[Stage]:
    """A job of three nodes."""
    with staged(tmp_path / "stage") as made:
        for folder in ("scratch", "state"):
            (made.folder / folder).mkdir()
        made.env |= {
            "SLURM_JOB_ID": "4711", "SLURM_JOB_NUM_NODES": "3", "SLURM_CPUS_PER_TASK": "4", "FAKE_VERB": "0",
            "FATHOM_SCRATCH": str(made.folder / "scratch"), "FATHOM_STATE": str(made.folder / "state"),
            "FATHOM_START_S": "60", "FAKE_STATE": "RUNNING",
        }  # fmt: skip
        yield made


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In the current folder."""
    monkeypatch.chdir(tmp_path)
    return write_config(tmp_path)


def left(slurm: Stage) -> list[str]:
    """Processes and files that a job has not taken away."""
    files = [str(path) for name in ("scratch", "state") for path in (slurm.folder / name).iterdir()]
    return files + [" ".join(process.cmdline()) for process in slurm.processes()]


def test_a_job_starts_the_head_then_the_others_then_the_verb(slurm: Stage) -> None:
    done = slurm.run("slurm.sbatch", "train", "teacher.yaml", "--set", "steps=7")
    assert done.returncode == 0, done.stderr
    kinds = [line.split(":")[0] for line in slurm.lines()]
    rays = [place for place, kind in enumerate(kinds) if kind.startswith("ray ")]
    assert kinds[rays[0]] == "ray first" and sorted(kinds[n] for n in rays[1:3]) == ["ray other1", "ray other2"]
    assert kinds.index("srun") > rays[0] and kinds.index("verb") > rays[2]
    assert slurm.lines("verb") == ["verb: -- train teacher.yaml --set steps=7 --set cluster.address=10.0.0.1:4321"]
    assert not slurm.lines("scontrol") and left(slurm) == []
    assert "ssh -L 8265:localhost:" in done.stderr


def test_a_jobs_ray_knows_its_options_and_shares_nothing_with_another_job(slurm: Stage) -> None:
    slurm.run("slurm.sbatch", "train", "teacher.yaml")
    head, *others = [options_of(line) for line in slurm.lines("ray ") if " start " in line]
    for options in (head, *others):
        assert options["block"] and options["num_cpus"] == 4 and "/fathom-4711" in options["temp_dir"]
        assert options["min_worker_port"] == options["max_worker_port"] == options["dashboard_agent_listen_port"] == 0
    assert head["head"] and head["port"] == 0 and head["dashboard_host"] == "127.0.0.1"
    assert 1024 < head["ray_client_server_port"] != head["dashboard_port"] > 1024
    assert [options["address"] for options in others] == ["10.0.0.1:4321"] * 2


def test_a_jobs_token_is_its_own_and_stands_on_no_command_line(slurm: Stage) -> None:
    process = slurm.start("slurm.sbatch", "train", "teacher.yaml", FAKE_VERB="wait:0")
    slurm.wait_for(lambda: slurm.lines("verb"), "verb")
    token = slurm.folder / "state" / ".fathom-4711" / "token"
    assert stat.S_IMODE(token.stat().st_mode) == 0o600 and stat.S_IMODE(token.parent.stat().st_mode) == 0o700
    assert re.fullmatch("[0-9a-f]{64}", token.read_text())
    assert token.read_text() not in slurm.log.read_text()
    assert token.read_text() not in " ".join(word for one in slurm.processes() for word in one.cmdline())
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=WAIT_S)
    assert len(slurm.lines("token")) == 3 and all(line.endswith(": token 0o600") for line in slurm.lines("token"))


def test_srun_starts_one_ray_on_each_other_node_and_lets_them_fail_alone(slurm: Stage) -> None:
    slurm.run("slurm.sbatch", "train", "teacher.yaml")
    started, cleaned = slurm.lines("srun")
    for words in (started.split(), cleaned.split()):
        assert {"--relative=1", "--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--no-kill"} <= set(words)
        assert {"--kill-on-bad-exit=0", "--wait=0", "--cpus-per-task=4"} <= set(words)
    assert cleaned.endswith('rm -rf "$SESSION"')


def test_a_job_of_one_node_needs_no_srun(slurm: Stage) -> None:
    done = slurm.run("slurm.sbatch", "train", "teacher.yaml", SLURM_JOB_NUM_NODES="1")
    assert done.returncode == 0 and slurm.lines("verb") and not slurm.lines("srun") and left(slurm) == []


@pytest.mark.parametrize("status", [1, 2, 130])
def test_a_jobs_exit_status_is_the_verbs(slurm: Stage, status: int) -> None:
    done = slurm.run("slurm.sbatch", "train", "teacher.yaml", FAKE_VERB=str(status), SLURM_JOB_NUM_NODES="1")
    assert done.returncode == status and not slurm.lines("scontrol") and left(slurm) == []


def test_a_job_that_was_preempted_is_queued_again_when_all_is_tidy(slurm: Stage) -> None:
    done = slurm.run("slurm.sbatch", "train", "teacher.yaml", FAKE_VERB="75")
    assert done.returncode == 75 and slurm.lines()[-1] == "scontrol: requeue 4711" and left(slurm) == []


def test_before_the_time_limit_the_verb_saves_and_the_job_is_queued_again(slurm: Stage) -> None:
    process = slurm.start("slurm.sbatch", "train", "teacher.yaml", FAKE_VERB="wait:75")
    slurm.wait_for(lambda: slurm.lines("verb"), "verb")
    process.send_signal(signal.SIGTERM)  # B: to the script alone
    slurm.wait_for(lambda: slurm.lines("verb got"), "signal")
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=WAIT_S)
    assert process.returncode == 75, err
    order = ("verb got SIGTERM", "verb has saved", "ray first: ends by SIGTERM")
    places = [slurm.lines().index(line) for line in order]
    assert places == sorted(places) and slurm.lines()[-1] == "scontrol: requeue 4711" and left(slurm) == []


@pytest.mark.parametrize("state", ["CANCELLED", "COMPLETING", "PREEMPTED", ""])
def test_a_job_that_was_cancelled_saves_and_does_not_come_back(slurm: Stage, state: str) -> None:
    """Plain `scancel` is SIGTERM, too. An empty state: Slurm does not answer."""
    env = {"FAKE_VERB": "wait:75", "FAKE_STATE": state, "SLURM_JOB_NUM_NODES": "1"}
    process = slurm.start("slurm.sbatch", "train", "teacher.yaml", **env)
    slurm.wait_for(lambda: slurm.lines("verb"), "verb")
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=WAIT_S)
    assert process.returncode == 75 and "verb has saved" in slurm.lines() and "not queued again" in err
    assert slurm.lines("scontrol") == ["scontrol: show job 4711"] and left(slurm) == []


def test_a_verb_that_the_signal_meets_before_it_listens_has_lost_nothing(slurm: Stage) -> None:
    process = slurm.start("slurm.sbatch", "train", "teacher.yaml", FAKE_VERB="deaf:0", SLURM_JOB_NUM_NODES="1")
    slurm.wait_for(lambda: slurm.lines("verb"), "verb")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=WAIT_S)
    assert process.returncode == 75 and slurm.lines()[-1] == "scontrol: requeue 4711" and left(slurm) == []


def test_who_stops_a_job_for_good_does_not_find_it_queued_again(slurm: Stage) -> None:
    process = slurm.start("slurm.sbatch", "train", "teacher.yaml", FAKE_VERB="wait:130")
    slurm.wait_for(lambda: slurm.lines("verb"), "verb")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=WAIT_S)
    assert process.returncode == 130 and "verb got SIGINT" in slurm.lines()
    assert not slurm.lines("scontrol") and left(slurm) == []


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
@pytest.mark.parametrize("asleep", ["first", "other2"])
def test_a_job_that_ends_before_its_nodes_are_up_runs_no_verb(
    slurm: Stage, asleep: str, number: signal.Signals, status: int
) -> None:
    process = slurm.start("slurm.sbatch", "train", "teacher.yaml", FAKE_RAY_SLEEPS=asleep)
    slurm.wait_for(lambda: slurm.lines(f"ray {asleep}"), "ray")
    process.send_signal(number)
    process.communicate(timeout=WAIT_S)
    assert process.returncode == status and not slurm.lines("verb") and left(slurm) == []
    assert slurm.lines("scontrol: requeue") == (["scontrol: requeue 4711"] if status == 75 else [])


def test_nodes_that_do_not_come_up_fail_the_job(slurm: Stage) -> None:
    done = slurm.run("slurm.sbatch", "train", "teacher.yaml", FAKE_RAY_SLEEPS="other2", FAKE_LATE="yes")
    assert done.returncode == 1 and re.search(r"error: only [12] of 3 nodes are up after 60 s", done.stderr)
    assert not slurm.lines("verb") and left(slurm) == []


def test_a_head_that_dies_fails_the_job_with_its_own_words(slurm: Stage) -> None:
    done = slurm.run("slurm.sbatch", "train", "teacher.yaml", FAKE_RAY_FAILS="first")
    assert done.returncode == 1 and "no memory left" in done.stderr and "error: Ray's head has ended" in done.stderr
    assert not slurm.lines("srun") and left(slurm) == []


@pytest.mark.parametrize(("verb", "count", "resumes"), [("train", "0", 0), ("train", "1", 1), ("evaluate", "1", 0)])
def test_from_the_second_time_on_training_goes_on(slurm: Stage, verb: str, count: str, resumes: int) -> None:
    slurm.run("slurm.sbatch", verb, "a.yaml", SLURM_RESTART_COUNT=count, SLURM_JOB_NUM_NODES="1")
    [line] = slurm.lines("verb")
    assert line.split().count("--begin-or-resume") == resumes


@pytest.mark.parametrize(
    "words",
    [
        ["train", "teacher.yaml"], ["evaluate", "evaluate.yaml"], ["label", "run", "data/photos", "--weights", "w"],
    ],
)  # fmt: skip
def test_a_jobs_words_are_those_of_the_command_line(slurm: Stage, config: Path, words: list[str]) -> None:
    values = {"weights": "w", "datasets": [{"path": "data/nyu"}]}
    (config.parent / "evaluate.yaml").write_text(yaml.safe_dump(values))
    slurm.run("slurm.sbatch", *words, SLURM_JOB_NUM_NODES="1")
    [line] = slurm.lines("verb")
    asked = request(shlex.split(line.removeprefix("verb: -- ")), None)
    if asked.config:
        assert yaml.safe_load(asked.config)["cluster"]["address"] == "10.0.0.1:4321"
    else:
        assert asked.arguments[-2:] == ("--address", "10.0.0.1:4321")


def test_an_interface_gives_the_addresses(slurm: Stage) -> None:
    slurm.run("slurm.sbatch", "train", "teacher.yaml", FATHOM_INTERFACE="ib0")
    starts = [options_of(line) for line in slurm.lines("ray ") if " start " in line]
    assert [options["node_ip_address"] for options in starts] == ["10.1.2.3"] * 3


def test_two_jobs_on_one_node_leave_each_other_alone(slurm: Stage) -> None:
    first = slurm.start("slurm.sbatch", "train", "teacher.yaml", FAKE_VERB="wait:0")
    slurm.wait_for(lambda: slurm.lines("verb"), "verb")
    second = slurm.run("slurm.sbatch", "train", "student.yaml", SLURM_JOB_ID="4712", SLURM_JOB_NUM_NODES="1")
    assert second.returncode == 0, second.stderr
    running = [" ".join(process.cmdline()) for process in slurm.processes()]
    assert sum("/fathom-4711" in line and "ray.py start" in line for line in running) == 3
    assert not any("/fathom-4712" in line for line in running)
    first.send_signal(signal.SIGINT)
    first.communicate(timeout=WAIT_S)
    assert left(slurm) == []


@pytest.mark.parametrize("words", [[], ["--help"], ["jobs", "list"]])
def test_a_job_without_a_verb_is_refused(slurm: Stage, words: list[str]) -> None:
    done = slurm.run("slurm.sbatch", *words)
    assert done.returncode == 2 and "usage: sbatch slurm.sbatch train|evaluate|label" in done.stderr
    assert slurm.lines() == [] and left(slurm) == []


def test_outside_of_a_job_nothing_is_started(slurm: Stage) -> None:
    done = slurm.run("slurm.sbatch", "train", "teacher.yaml", SLURM_JOB_ID="")
    assert done.returncode == 2 and "not in a Slurm job" in done.stderr and slurm.lines() == []


def test_slurm_is_asked_for_a_signal_in_time_and_another_turn() -> None:
    asked = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", text_of("slurm.sbatch"), re.MULTILINE))
    kind, at = asked["signal"].split("@")
    assert kind == "B:TERM" and int(at) >= 120
    assert {"requeue", "no-kill"} <= asked.keys() and asked["ntasks-per-node"] == "1" and asked["open-mode"] == "append"
    assert len(asked) == text_of("slurm.sbatch").count("#SBATCH")  # no comments behind, no typing errors
