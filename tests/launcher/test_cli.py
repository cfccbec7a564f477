"""The command line: help with examples, exit statuses, one-line errors, recipes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
import typer
from typer.testing import CliRunner

from launcher import recipes
from launcher.cli import build_app
from launcher.errors import carrier, run_main

REPOSITORY = Path(__file__).resolve().parent.parent.parent


def leaves(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The words of every verb."""
    children = getattr(command, "commands", None)
    if not children:
        yield path
        return
    for name, child in children.items():
        yield from leaves(child, (*path, name))


VERBS = list(leaves(typer.main.get_command(build_app())))


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_help_of_every_verb_has_an_example(verb: tuple[str, ...]) -> None:
    done = CliRunner().invoke(build_app(), [*verb, "--help"])
    assert done.exit_code == 0, done.output
    example = done.output.partition("Example")[2]
    assert f"fathom {' '.join(verb)}" in example, done.output


def test_every_recipe_that_an_example_names_exists() -> None:
    root, named = typer.main.get_command(build_app()), []
    for verb in VERBS:
        command: Any = root
        for word in verb:
            command = command.commands[word]
        named += [(" ".join(verb), name) for name in re.findall(r"fathom recipes show (\S+)", command.help)]
    assert {verb for verb, _ in named} >= {"train", "recipes show"}
    assert [(verb, name) for verb, name in named if name not in recipes.names()] == []


def test_verbs_are_listed_in_the_order_of_use() -> None:
    listing = CliRunner().invoke(build_app(), ["--help"]).output.partition("Commands:")[2]
    names = [line.split()[0] for line in listing.splitlines() if line[:3].strip()]
    assert names[-2:] == ["recipes", "doctor"]


def fathom(*arguments: str, **keywords: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launcher.cli", *arguments]
    options = {"cwd": REPOSITORY, "capture_output": True, "text": True, "check": False, "timeout": 120, **keywords}
    return subprocess.run(command, **options)


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys, atexit\nheavy = ('torch', 'ray', 'numpy', 'rich')\n"
        "atexit.register(lambda: print('loaded:', *[m for m in heavy if m in sys.modules]))\n"
        "from launcher.cli import main\nsys.argv = ['fathom', '--help']\nmain()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1].strip() == "loaded:"


def test_usage_errors_are_one_line_and_status_2() -> None:
    for arguments in (["recipies"], ["recipes", "show"], ["doctor", "--wrong"]):
        done = fathom(*arguments)
        assert done.returncode == 2, done
        assert done.stdout == ""
        assert done.stderr.startswith("error: ")
        assert len(done.stderr.splitlines()) == 1
    assert "recipes" in fathom("recipies").stderr


def test_nothing_asked_shows_help() -> None:
    done = fathom()
    assert done.returncode == 0
    assert "quickstart" in done.stdout


def status(body: Callable[[], object]) -> Any:
    """The exit status of an app whose only verb runs `body`."""
    app = typer.Typer()
    app.command()(lambda: body())
    with pytest.raises(SystemExit) as ended:
        run_main(app, ["--"])
    return ended.value.code


class WrongInput(ValueError):
    exit_status = 2


def throw(error: BaseException) -> Callable[[], NoReturn]:
    def body() -> NoReturn:
        raise error

    return body


def test_statuses(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FATHOM_DEBUG", raising=False)
    assert status(lambda: None) == 0
    assert status(lambda: 75) == 75
    assert status(throw(typer.Exit(3))) == 3
    assert status(throw(KeyboardInterrupt())) == 130
    capsys.readouterr()
    assert status(throw(WrongInput("a.yaml: batch: 3 is odd"))) == 2
    assert capsys.readouterr().err == "error: a.yaml: batch: 3 is odd\n"
    assert status(throw(RuntimeError("a bug"))) == 1
    assert "Traceback" in capsys.readouterr().err
    monkeypatch.setenv("FATHOM_DEBUG", "1")
    assert status(throw(WrongInput("wrong"))) == 2
    assert "Traceback" in capsys.readouterr().err


def test_an_error_from_a_worker_shows_its_own_message(capsys: pytest.CaptureFixture[str]) -> None:
    class Wrapped(WrongInput):
        def __init__(self, cause: Exception) -> None:
            super().__init__(f"Traceback of a worker\n{cause}")
            self.cause = cause

    assert status(throw(Wrapped(WrongInput("shards/000000.tar: cut short")))) == 2
    assert capsys.readouterr().err == "error: shards/000000.tar: cut short\n"
    assert carrier(ValueError("plain")) is None


def start(body: str) -> subprocess.Popen[bytes]:
    """A process whose app has one verb, with `body` in it. It hears SIGINT even where tests run in the background."""
    lines = (
        "import time, typer",
        "from launcher.errors import run_main",
        "app = typer.Typer()",
        "@app.command()",
        f"def verb():\n    {body}",
        "run_main(app, ['--'])",
    )
    command = [sys.executable, "-c", "\n".join(lines)]
    return subprocess.Popen(
        command,
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's `&` has children ignore it
    )


def test_nobody_reads_the_output() -> None:
    """`fathom recipes list | head -0` ends quietly."""
    child = start("time.sleep(0.3)\n    for _ in range(99999): print('x' * 99)")
    assert child.stdout is not None
    assert child.stderr is not None
    child.stdout.close()
    error = child.stderr.read()
    child.stderr.close()
    assert child.wait(60) in (1, 128 + signal.SIGPIPE)
    assert error == b""


def test_ctrl_c_is_130() -> None:
    with start("print('up', flush=True); time.sleep(60)") as child:
        assert child.stdout is not None
        child.stdout.readline()
        started = time.monotonic()
        os.kill(child.pid, signal.SIGINT)
        assert child.wait(30) == 130
        assert time.monotonic() - started < 20


def test_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "teacher-tiny.yaml").write_text("# A small teacher\nname: t\n")
    (tmp_path / "bare.yaml").write_text("name: b\n")
    monkeypatch.setattr(recipes, "folder", lambda: tmp_path)
    assert recipes.names() == ["bare", "teacher-tiny"]
    assert recipes.summary("teacher-tiny") == "A small teacher"
    assert recipes.summary("bare") == ""
    run = CliRunner()
    assert run.invoke(build_app(), ["recipes", "list"]).output.splitlines()[1] == "teacher-tiny  A small teacher"
    assert run.invoke(build_app(), ["recipes", "show", "teacher-tiny.yaml"]).output == "# A small teacher\nname: t\n"
    with pytest.raises(recipes.RecipeError, match="did you mean 'teacher-tiny'"):
        recipes.read("techer-tiny")


def test_shipped_recipes_say_what_they_are_for() -> None:
    assert [name for name in recipes.names() if not recipes.summary(name)] == []
