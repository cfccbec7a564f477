"""A place to try the templates' scripts in: programs that stand for the real ones, and write down what they are called
with."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from launcher import recipes

REPOSITORY = Path(__file__).resolve().parent.parent.parent
TEMPLATES = REPOSITORY / "cluster" / "templates"
WAIT_S = 60.0

# Ray, of which there is only `ray start --block`: it comes up, and stays until SIGTERM.
RAY = """
import os, signal, stat, sys, time

node, words = os.environ.get("FAKE_NODE", "first"), sys.argv[1:]
token = os.environ.get("RAY_AUTH_TOKEN_PATH", "")
mode = oct(stat.S_IMODE(os.stat(token).st_mode)) if os.path.exists(token) else "none"

def log(what):
    with open(os.environ["FAKE_LOG"], "a") as file:
        file.write(what + "\\n")

def stop(number, frame):
    log(f"ray {node}: ends by {signal.Signals(number).name}")
    sys.exit(1)

signal.signal(signal.SIGTERM, stop)
log(f"ray {node}: {' '.join(words)}")
log(f"token {node}: {os.environ.get('RAY_AUTH_MODE')} {mode}")
if node in os.environ.get("FAKE_RAY_FAILS", "").split():
    sys.exit("Exception: this machine has no memory left")
if node in os.environ.get("FAKE_RAY_SLEEPS", "").split():
    signal.pause()
folder = next(word.partition("=")[2] for word in words if word.startswith("--temp-dir="))
with open(os.path.join(folder, "ray_current_cluster"), "w") as file:
    file.write("10.0.0.1:4321" if "--head" in words else "of a worker")
while True:
    signal.pause()
"""

# What `import ray` gives there: as many nodes as `ray start` was called for. With FAKE_LATE, time flies.
RAY_MODULE = """
import os, time

def init(**options):
    pass

def nodes():
    if "FAKE_LATE" in os.environ:
        time.sleep, time.monotonic = (lambda seconds: None), (lambda: float("inf"))
    with open(os.environ["FAKE_LOG"]) as file:
        started = [line.split()[1] for line in file if line.startswith("ray ") and " start --block " in line]
    asleep = os.environ.get("FAKE_RAY_SLEEPS", "").split()
    return [{"Alive": node.strip(":") not in asleep} for node in started]
"""

# The supervisor with a verb: FAKE_VERB is its exit status; with `wait:` before it, it first waits for a signal. `deaf:`
# is one that does not listen yet.
VERB = """
import os, signal, sys, time

def log(what):
    with open(os.environ["FAKE_LOG"], "a") as file:
        file.write(what + "\\n")

waits, _, status = os.environ["FAKE_VERB"].rpartition(":")
got = []
for number in () if waits == "deaf" else (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, frame: got.append(signal.Signals(number).name))
log("verb: " + " ".join(sys.argv[1:]))
while waits and not got:
    time.sleep(0.02)
if waits:
    log("verb got " + " ".join(got))
    time.sleep(0.5)
    log("verb has saved")
sys.exit(int(status))
"""

PYTHON = """#!/bin/bash
if [ "$1 $2" = "-m launcher.supervisor" ]; then exec {python} -S {folder}/verb.py "${{@:3}}"; fi
PYTHONPATH={folder}/modules:{repository} exec {python} "$@"
"""

# As Slurm's: SIGTERM to it is SIGKILL for the tasks.
SRUN = """#!/bin/bash
echo "srun: $*" >>"$FAKE_LOG"
tasks=0 pids=()
while :; do case $1 in --ntasks=*) tasks=${1#*=} ;; -*) ;; *) break ;; esac; shift; done
trap 'kill -KILL "${pids[@]}"; exit 143' TERM
for ((n = 1; n <= tasks; n++)); do FAKE_NODE=other$n SESSION=$SESSION-other$n "$@" & pids+=($!); done
wait
"""

# FAKE_STATE: of the job.
SCONTROL = """#!/bin/bash
echo "scontrol: $*" >>"$FAKE_LOG"
if [ "$1 $2" = "show job" ]; then
    [ -n "$FAKE_STATE" ] || exit 1
    echo "JobId=$3 JobName=fathom"; echo "   JobState=$FAKE_STATE Reason=None Dependency=(null)"
fi
"""

SSH = """#!/bin/bash
echo "ssh: $*" >>"$FAKE_LOG"
while :; do case $1 in -o) shift 2 ;; -*) shift ;; *) break ;; esac; done
host=${1#*@}; shift
case " $FAKE_UNREACHABLE " in *" $host "*)
    echo "ssh: connect to host $host port 22: Connection refused" >&2; exit 255 ;;
esac
export FAKE_NODE=$host FATHOM_SCRATCH=$FAKE_HOSTS/$host/tmp HOME=$FAKE_HOSTS/${FAKE_SHARED_HOME:-$host}/home
mkdir -p "$HOME" "$FATHOM_SCRATCH"
exec "$@"
"""


@dataclass
class Stage:
    """A folder of programs that stand for the real ones, and a script among them."""

    folder: Path
    env: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        programs = self.folder / "bin"
        (self.folder / "modules").mkdir(parents=True)
        programs.mkdir()
        (self.folder / "home").mkdir()
        (self.folder / "modules" / "ray.py").write_text(RAY_MODULE)
        (self.folder / "verb.py").write_text(VERB)
        (self.folder / "ray.py").write_text(RAY)
        python = shlex.quote(sys.executable)
        self.log.touch()
        self._program("ray", f'#!/bin/bash\nexec {python} -S {self.folder}/ray.py "$@"\n')
        self._program("python", PYTHON.format(python=python, folder=self.folder, repository=REPOSITORY))
        self._program("srun", SRUN)
        self._program("ssh", SSH)
        self._program("scontrol", SCONTROL)
        self._program("hostname", '#!/bin/bash\necho "${FAKE_NODE:-first}"\n')
        self._program("ip", '#!/bin/bash\necho "7: $6    inet 10.1.2.3/24 brd 10.1.2.255 scope global $6"\n')
        self.env = {
            "PATH": f"{programs}{os.pathsep}/usr/bin{os.pathsep}/bin", "HOME": str(self.folder / "home"),
            "TMPDIR": str(self.folder), "FAKE_LOG": str(self.log), "FATHOM_VENV": str(self.folder),
        }  # fmt: skip

    def _program(self, name: str, text: str) -> None:
        path = self.folder / "bin" / name
        path.write_text(text)
        path.chmod(0o755)

    @property
    def log(self) -> Path:
        return self.folder / "log"

    def lines(self, beginning: str = "") -> list[str]:
        """What was written down, in order."""
        return [line for line in self.log.read_text().splitlines() if line.startswith(beginning)]

    def start(self, script: str, *words: str | Path, **env: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", str(TEMPLATES / script), *map(str, words)], cwd=self.folder, env={**self.env, **env}, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip

    def run(self, script: str, *words: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
        process = self.start(script, *words, **env)
        out, err = process.communicate(timeout=WAIT_S)
        return subprocess.CompletedProcess([script, *map(str, words)], process.returncode, out, err)

    def processes(self) -> list[psutil.Process]:
        """Those of the stage that still run."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if any(str(self.folder) in word for word in process.cmdline()):
                    found.append(process)
        return found

    def wait_for(self, condition: Callable[[], object], what: str) -> None:
        ends = time.monotonic() + WAIT_S
        while not condition():
            assert time.monotonic() < ends, f"no {what}: {self.log.read_text()}"
            time.sleep(0.02)


@contextlib.contextmanager
def staged(folder: Path) -> Iterator[Stage]:
    """A Stage; what of it still runs at the end is killed."""
    made = Stage(folder)
    try:
        yield made
    finally:
        for process in made.processes():
            with contextlib.suppress(psutil.Error):
                process.kill()


def write_config(folder: Path) -> Path:
    """A configuration that the verbs' own parser accepts."""
    path = folder / "teacher.yaml"
    path.write_text(recipes.read("teacher-v1-vitl"))
    return path


def options_of(line: str) -> dict[str, Any]:
    """The options of a `ray start`, read by Ray's own parser: it refuses those that it does not know."""
    from ray.scripts.scripts import start

    words = shlex.split(line)
    return dict(start.make_context("start", words[words.index("start") + 1 :]).params)


def text_of(name: str) -> str:
    return (TEMPLATES / name).read_text(encoding="utf-8")


def code_of(name: str) -> str:
    """A template without its comments."""
    return "\n".join(re.sub(r"(^|\s)#.*", "", line) for line in text_of(name).splitlines())
