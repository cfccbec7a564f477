"""A verb that is killed or preempted is run again, one that ends by itself is not; signals reach it once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import pytest

from launcher import supervisor
from launcher.supervisor import Supervisor, again, main, worth_another

REPOSITORY = Path(__file__).resolve().parent.parent.parent

# Stands for a verb: counts its starts, and does what the next word of `script` says.
VERB = """
import os, signal, sys, time
folder, arguments = sys.argv[1], sys.argv[2:]
with open(f"{folder}/starts", "a") as file:
    file.write(" ".join(arguments) + "\\n")
count = len(open(f"{folder}/starts").readlines())
what = open(f"{folder}/script").read().split()[min(count, 99) - 1]
if what == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
if what == "wait":
    def stopped(number, frame):
        with open(f"{folder}/signals", "a") as file:
            file.write(signal.Signals(number).name + "\\n")
        time.sleep(0.3)
        sys.exit(75 if number == signal.SIGTERM else 130)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stopped)
    with open(f"{folder}/pid", "w") as file:
        file.write(str(os.getpid()))
    open(f"{folder}/ready", "w").close()
    while True:
        time.sleep(0.05)
sys.exit(int(what))
"""


def started(
    folder: Path, script: str, *arguments: str, restarts: int = 3, before: str = "supervisor.FIRST_WAIT_S = 0.01"
) -> subprocess.Popen[str]:
    (folder / "verb.py").write_text(textwrap.dedent(VERB))
    (folder / "script").write_text(script)
    program = f"""
import sys
from launcher import supervisor
{before}
verb = [sys.executable, {str(folder / "verb.py")!r}, {str(folder)!r}]
sys.exit(supervisor.Supervisor({list(arguments)!r}, {restarts}, verb).run())
"""
    return subprocess.Popen(
        [sys.executable, "-c", program], cwd=REPOSITORY, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, errors = process.communicate(timeout=60)
    return process.returncode, errors


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def gone(pid: int) -> bool:
    """Ended; where nobody collects orphans, a zombie is."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return True
    return state == "Z"


def starts(folder: Path) -> list[str]:
    return (folder / "starts").read_text().splitlines()


def test_a_killed_verb_goes_on_or_begins(tmp_path: Path) -> None:
    status, said = ended(started(tmp_path, "kill 75 0", "train", "teacher.yaml"))
    assert status == 0
    assert starts(tmp_path) == ["train teacher.yaml", *["train teacher.yaml --begin-or-resume"] * 2]
    assert "killed by SIGKILL; going on in" in said and "preempted; going on in" in said


@pytest.mark.parametrize("status", [0, 1, 2, 130])
def test_a_verb_that_ends_by_itself_is_not_run_again(tmp_path: Path, status: int) -> None:
    assert ended(started(tmp_path, f"{status} 0", "train", "teacher.yaml"))[0] == status
    assert len(starts(tmp_path)) == 1


def test_it_gives_up_in_time(tmp_path: Path) -> None:
    status, said = ended(started(tmp_path, "kill " * 9, "train", "teacher.yaml", restarts=2))
    assert status == 128 + signal.SIGKILL and len(starts(tmp_path)) == 3
    assert "killed by SIGKILL, 3 times in a row; giving up" in said


def test_a_verb_that_cannot_go_on_is_not_started_again(tmp_path: Path) -> None:
    assert ended(started(tmp_path, "kill 0", "data", "pack"))[0] == 137
    assert starts(tmp_path) == ["data pack"]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
@pytest.mark.parametrize("whole_group", [False, True])
def test_a_signal_reaches_the_verb_once_and_its_end_is_waited_for(
    tmp_path: Path, number: signal.Signals, status: int, whole_group: bool
) -> None:
    process = started(tmp_path, "wait 0", "train", "teacher.yaml")
    until(lambda: (tmp_path / "ready").exists())
    if whole_group:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    assert ended(process)[0] == status
    assert (tmp_path / "signals").read_text().split() == [number.name]
    assert len(starts(tmp_path)) == 1


def test_a_stop_while_it_waits_starts_nothing_more(tmp_path: Path) -> None:
    process = started(tmp_path, "kill 0", "train", "teacher.yaml", before="supervisor.FIRST_WAIT_S = 60")
    assert process.stderr is not None
    assert "going on in 60 s" in process.stderr.readline()
    process.send_signal(signal.SIGTERM)
    assert ended(process)[0] == 75  # what was saved before stands, and can be gone on with
    assert len(starts(tmp_path)) == 1


def test_a_stop_while_the_verb_is_being_started_reaches_it(tmp_path: Path) -> None:
    stop = """
import os, signal
start = supervisor.subprocess.Popen
def popen(*words, **options):
    os.kill(os.getpid(), signal.SIGTERM)
    return start(*words, **options)
supervisor.subprocess.Popen = popen
"""
    process = started(tmp_path, "wait 0", "train", "teacher.yaml", before=stop)
    try:
        assert process.wait(30) in (75, 128 + signal.SIGTERM)  # when it listened, or before
    finally:
        with suppress(ProcessLookupError):
            process.kill()  # and the verb with it
        ended(process)


class Clock(Supervisor):
    """Its verb is killed after each of `lives` seconds; then it succeeds. Nothing is started, nobody waits."""

    def __init__(self, lives: list[float], restarts: int, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(["train", "a.yaml"], restarts)
        self.lives, self.now, self.waits = lives, 0.0, list[float]()
        monkeypatch.setattr(supervisor.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(supervisor.signal, "signal", lambda *_: None)
        monkeypatch.setattr(self._stopping, "wait", self.waits.append)

    def _once(self, arguments: Sequence[str]) -> int:
        if not self.lives:
            return 0
        self.now += self.lives.pop(0)
        return -signal.SIGKILL


def test_it_waits_longer_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock([1.0] * 8, 9, monkeypatch)
    assert clock.run() == 0 and clock.waits == [1, 2, 4, 8, 16, 32, 60, 60]


def test_a_verb_that_got_somewhere_starts_the_count_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock([1.0, 1.0, 600.0, 1.0, 599.0, 600.0], 2, monkeypatch)
    assert clock.run() == 128 + signal.SIGKILL and clock.waits == [1, 2, 1, 2]
    assert clock.lives == [600.0]


@pytest.mark.parametrize("whole_group", [False, True])
def test_a_killed_supervisor_leaves_no_driver(tmp_path: Path, whole_group: bool) -> None:
    process = started(tmp_path, "wait 0", "train", "teacher.yaml")
    until(lambda: (tmp_path / "ready").exists())
    verb = int((tmp_path / "pid").read_text())
    if whole_group:  # what Ray does when its own part dies
        os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    assert process.wait(60) == -signal.SIGKILL
    try:
        until(lambda: gone(verb))
    finally:
        with suppress(ProcessLookupError):
            os.kill(verb, signal.SIGKILL)
    assert (tmp_path / "signals").read_text().split() == ["SIGTERM"]  # so it could save
    assert process.stderr is not None
    process.stderr.close()


def test_what_goes_on_and_how() -> None:
    assert again(["train", "a.yaml"]) == ["train", "a.yaml", "--begin-or-resume"]
    for mode in ("--resume", "--begin-or-resume"):
        assert again(["train", "a.yaml", mode]) == ["train", "a.yaml", mode]
    for words in (["label", "run", "d", "--weights", "w"], ["label", "retry", "l", "--weights", "w"]):
        assert again(words) == words
    for words in (["data", "check", "d"], ["label", "verify", "l"], ["label", "status", "l"], ["label"], []):
        assert again(words) is None
    assert worth_another(-9, False) and worth_another(75, False)
    assert not worth_another(-2, False) and not worth_another(-9, True) and not worth_another(1, False)


def test_usage(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in ([], ["--"], ["train"], ["--restarts", "x", "--", "train"]):
        assert main(argv) == 2
        assert "usage:" in capsys.readouterr().err
