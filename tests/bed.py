"""Several machines on one: each a network, process, mount and host-name namespace of its own, joined by a bridge.

Every machine's processes live below one that stands for it: killing that one is the loss of the machine, and nothing of
it survives, neither process nor interface nor mount. The bridge lies in a namespace of its own too, so this machine's
network is left alone. Files are shared, as by a network file system, but /dev/shm and the folder for temporary files
are each machine's own.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import psutil
import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
SUBNET = "10.77.0"
RAY_PORT, DASHBOARD_PORT = 6379, 8265
_WAIT_S = 60.0
_INIT = """
set -e
hostname {name}
ip link set lo up
mount -t tmpfs -o size=512m tmpfs /dev/shm
mount --bind {private} {temporary}
touch {private}/.up
while :; do sleep 3600 & wait $! || true; done
"""


def available() -> str | None:
    """Why there can be no such machines here; None when there can."""
    if os.geteuid() != 0:
        return "no network namespaces: not root"
    for tool in ("ip", "unshare", "nsenter"):
        if shutil.which(tool) is None:
            return f"no network namespaces: no {tool}"
    tried = subprocess.run(
        ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--mount-proc", "ip", "link", "add", "name",
         "bridge", "type", "bridge"], capture_output=True, text=True,
    )  # fmt: skip
    return None if tried.returncode == 0 else f"no network namespaces: {tried.stderr.strip()}"


@dataclass
class Machine:
    """One of the bed's. `address`: what the others reach it by."""

    name: str
    address: str
    holder: subprocess.Popen[bytes]  # `unshare`; its child is the first process inside
    port: str = ""  # of the bridge
    env: dict[str, str] = field(default_factory=dict)

    @property
    def first(self) -> int:
        """The process that stands for the machine, by its number here; 0 when it is gone."""
        try:
            children = psutil.Process(self.holder.pid).children()
        except psutil.NoSuchProcess:
            return 0
        return children[0].pid if children else 0

    def start(self, *words: str | Path, cwd: Path, env: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
        """Start a command on this machine."""
        inside = ["nsenter", "--target", str(self.first), "--net", "--uts", "--mount", "--pid", f"--wd={cwd}"]
        return subprocess.Popen(
            [*inside, *map(str, words)], env={**os.environ, **self.env, **(env or {})}, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip

    def run(
        self, *words: str | Path, cwd: Path, env: Mapping[str, str] | None = None, timeout_s: float = 300.0
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on this machine to its end."""
        process = self.start(*words, cwd=cwd, env=env)
        try:
            out, err = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        return subprocess.CompletedProcess(list(words), process.returncode, out, err)

    def processes(self, word: str = "") -> list[psutil.Process]:
        """Those that run on it, with `word` in their command line."""
        found: list[psutil.Process] = []
        if not self.first:
            return found
        for process in [*psutil.Process(self.first).children(recursive=True), *_orphans(self.first)]:
            with contextlib.suppress(psutil.Error):
                if word in " ".join(process.cmdline()) and process not in found:
                    found.append(process)
        return found

    def kill(self) -> None:
        """The machine is gone, with all that ran on it."""
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            if first := self.first:
                os.kill(first, signal.SIGKILL)
        self.holder.wait(timeout=_WAIT_S)


def _orphans(first: int) -> list[psutil.Process]:
    """What nsenter has brought in is no child of the machine's first process: told by the namespace."""
    try:
        space = os.readlink(f"/proc/{first}/ns/pid_for_children")
    except OSError:
        return []
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if os.readlink(f"/proc/{process.pid}/ns/pid") == space and process.pid != first:
                found.append(process)
    return found


class Bed:
    """A context manager: machines `head`, `node1`, ... with Ray on all, and `outside`, without.

    `cpus`: of each machine with Ray. The cluster wants its token (in `home`, the machines' HOME). `bare`: nobody has
    started Ray.
    """

    def __init__(self, folder: Path, cpus: Sequence[int], *, bare: bool = False) -> None:
        self.folder, self.home = folder, folder / "home"
        self.site = folder / "site"  # on the path of every Python process there
        self.temporary = Path()  # on the machines; Ray's sockets want a short path
        self.machines: dict[str, Machine] = {}
        self.cuts: set[str] = set()  # machines whose network was cut since they were made: Ray gives them up
        self._cpus, self._bare = cpus, bare
        self._switch: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Bed:
        self.home.mkdir(parents=True)
        self.site.mkdir()
        self.temporary = Path(tempfile.mkdtemp(prefix="ft-bed-", dir="/tmp"))
        try:
            self._build()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for machine in self.machines.values():
            machine.kill()
        if self._switch is not None:
            self._switch.kill()
            self._switch.wait(timeout=_WAIT_S)
        if self.temporary.name:
            self.temporary.rmdir()

    @property
    def head(self) -> Machine:
        return self.machines["head"]

    @property
    def outside(self) -> Machine:
        return self.machines["outside"]

    @property
    def dashboard(self) -> str:
        """The address for `fathom submit`."""
        return f"http://{self.head.address}:{DASHBOARD_PORT}"

    @property
    def address(self) -> str:
        """The address for `cluster.address`."""
        return f"{self.head.address}:{RAY_PORT}"

    def cut(self, name: str) -> None:
        """Pull the machine's network cable."""
        self._on_switch("ip", "link", "set", self.machines[name].port, "down")
        self.cuts.add(name)

    def mend(self, name: str) -> None:
        """Put it back."""
        self._on_switch("ip", "link", "set", self.machines[name].port, "up")

    def replace(self, name: str) -> None:
        """A new machine in the place of one that was killed."""
        cpus = self._cpus[list(self.machines).index(name)]
        self.machines[name].kill()
        with contextlib.suppress(AssertionError):  # it goes with the machine, but only some time after it
            self._on_switch("ip", "link", "delete", self.machines[name].port)
        self.cuts.discard(name)
        shutil.rmtree(self.folder / f"ray-{name}")
        self.add(name)
        self.start_ray(name, cpus)

    def add(self, name: str) -> Machine:
        """A machine without Ray."""
        number = list(self.machines).index(name) + 1 if name in self.machines else len(self.machines) + 1
        private = self.folder / f"ray-{name}"
        private.mkdir()
        script = _INIT.format(name=name, private=private, temporary=self.temporary)
        holder = subprocess.Popen(
            ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child", "bash", "-c",
             script], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        machine = Machine(name, f"{SUBNET}.{number}", holder, port=f"port{number}")
        self.machines[name] = machine
        wait_for((private / ".up").exists, f"machine {name}")
        assert self._switch is not None
        self._on_switch("ip", "link", "add", machine.port, "type", "veth", "peer", "eth0", "netns", str(machine.first))
        self._on_switch("ip", "link", "set", machine.port, "master", "bridge", "up")
        self._inside(machine, "ip", "address", "add", f"{machine.address}/24", "dev", "eth0")
        self._inside(machine, "ip", "link", "set", "eth0", "up")
        tools = str(Path(sys.executable).parent)
        machine.env = {
            "HOME": str(self.home), "TMPDIR": str(self.temporary), "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0", "GLOO_SOCKET_IFNAME": "eth0",
            "PYTHONPATH": str(self.site), "OMP_NUM_THREADS": "1",
            "XDG_CACHE_HOME": os.environ.get("XDG_CACHE_HOME") or str(Path("~/.cache").expanduser()),  # built operators
        }  # fmt: skip
        return machine

    def start_ray(self, name: str, cpus: int) -> None:
        """Ray on a machine: its head on `head`, a node of that on others."""
        machine = self.machines[name]
        words = ["ray", "start", "--node-ip-address", machine.address, "--num-cpus", str(cpus), "--object-store-memory",
                 str(80 << 20), "--disable-usage-stats"]  # fmt: skip
        if name == "head":
            words += ["--head", "--port", str(RAY_PORT), "--dashboard-host", machine.address, "--dashboard-port",
                      str(DASHBOARD_PORT)]  # fmt: skip
        else:
            words += ["--address", self.address]
        done = machine.run(*words, cwd=self.folder)
        assert done.returncode == 0, f"{name}: {done.stdout}\n{done.stderr}"

    def _build(self) -> None:
        self._switch = subprocess.Popen(
            ["unshare", "--net", "sleep", "infinity"], stdin=subprocess.DEVNULL, start_new_session=True
        )
        own = os.readlink("/proc/self/ns/net")
        wait_for(lambda: os.readlink(f"/proc/{self._switch.pid}/ns/net") != own, "the bridge's namespace")  # type: ignore[union-attr]
        self._on_switch("ip", "link", "add", "bridge", "type", "bridge")
        self._on_switch("ip", "link", "set", "bridge", "up")
        for name in ("head", *(f"node{number}" for number in range(1, len(self._cpus))), "outside"):
            self.add(name)
        if self._bare:
            return
        token = self.head.run("ray", "get-auth-token", "--generate", cwd=self.folder)
        assert token.returncode == 0, token.stderr
        for name, cpus in zip(self.machines, self._cpus, strict=False):
            self.start_ray(name, cpus)

    def _on_switch(self, *words: str) -> None:
        assert self._switch is not None
        _checked(["nsenter", "--target", str(self._switch.pid), "--net", *words])

    def _inside(self, machine: Machine, *words: str) -> None:
        _checked(["nsenter", "--target", str(machine.first), "--net", *words])


def _checked(words: Sequence[str]) -> None:
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}"


def wait_for(condition: object, what: str, timeout_s: float = _WAIT_S) -> object:
    """Until `condition()` is true; returns it."""
    assert callable(condition)
    ends = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < ends, f"no {what} within {timeout_s:.0f} s"
        time.sleep(0.05)
    return value


@contextlib.contextmanager
def bed(folder: Path, cpus: Sequence[int], *, bare: bool = False) -> Iterator[Bed]:
    """A Bed, or a skipped test where there can be none."""
    reason = available()
    if reason:
        pytest.skip(reason)
    with Bed(folder, cpus, bare=bare) as made:
        yield made
