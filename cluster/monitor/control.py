"""Starting, finding and ending the monitor of a folder: a process of its own (daemon.py), known by a file in
FOLDER/.monitor, where its data are as well."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from cluster import storage
from cluster.monitor.prometheus import LOOPBACK, MonitorError, Settings, program

FOLDER = ".monitor"
STATE = "monitor.json"
TARGETS = "targets.json"
LOG = "monitor.log"
PAGE_PORT = 9840
_MODULE = "cluster.monitor.daemon"
_ROOT = str(Path(__file__).resolve().parent.parent.parent)
_UP_S = 90.0
_DOWN_S = 40.0


@dataclass(frozen=True, kw_only=True)
class Order:
    """What a monitor is to do. `folders`: where runs and labels are looked for, absolute; data are kept in the first.
    `host`: where the page is served. Ports: None for the usual one, or a free one where that is taken.
    `targets_only`: neither Prometheus nor a page, for a site that has its own."""

    folders: tuple[str, ...]
    settings: Settings = field(default_factory=Settings)
    host: str = LOOPBACK
    port: int | None = None
    prometheus_port: int | None = None
    targets_only: bool = False

    @property
    def state(self) -> str:
        """The monitor's own folder."""
        return state_folder(self.folders[0])

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Order:
        """Raises ValueError, KeyError or TypeError for anything that `to_json` has not made."""
        values = json.loads(text)
        settings = values.pop("settings")
        settings["alertmanagers"] = tuple(settings["alertmanagers"])
        return Order(**{**values, "folders": tuple(values["folders"]), "settings": Settings(**settings)})


@dataclass(frozen=True, kw_only=True)
class State:
    """A monitor that is up. `page` and `prometheus`: `host:port`; None with `targets_only`."""

    pid: int
    began: float  # when the process did, as the kernel has it: process ids are used again
    machine: str
    since: float  # seconds since the epoch
    order: Order
    page: str | None
    prometheus: str | None

    def write(self) -> None:
        """Raises StorageError."""
        values = {**asdict(self), "order": self.order.to_json()}
        storage.atomic_write(os.path.join(self.order.state, STATE), json.dumps(values, indent=1) + "\n")


def state_folder(folder: str) -> str:
    """Of the monitor of a folder of runs."""
    return os.path.join(os.path.abspath(folder), FOLDER)


def targets_path(state: str) -> str:
    """The `file_sd` file that a monitor keeps."""
    return os.path.join(state, TARGETS)


def find(folder: str) -> State | None:
    """The monitor of a folder, if it is up. MonitorError when that is so on another machine."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        with open(os.path.join(state_folder(folder), STATE), encoding="utf-8") as file:
            values = json.load(file)
        state = State(**{**values, "order": Order.from_json(values["order"])})
        if state.machine != socket.gethostname():
            raise MonitorError(
                f"{folder}: its monitor is on {state.machine}, or was when that machine went down: ask there, or "
                f"remove {os.path.join(state_folder(folder), STATE)}"
            )
        if _runs(state):
            return state
    return None


def up(order: Order) -> tuple[State, bool]:
    """Start a monitor, or find it up; returns it and whether it was up before.

    MonitorError when it does not come up, or when one of other settings is up.
    """
    found = find(order.folders[0])
    if found is not None:
        if found.order != order:
            raise MonitorError(
                f"{order.folders[0]}: a monitor with other settings is up (process {found.pid}); end it with "
                "`fathom monitor down`"
            )
        return found, True
    if not order.targets_only:
        program()
    storage.make_folder(order.state)
    log = os.path.join(order.state, LOG)
    path = os.pathsep.join([_ROOT, *filter(None, [os.environ.get("PYTHONPATH")])])
    with open(log, "ab") as output:
        began = output.tell()
        process = subprocess.Popen(
            [sys.executable, "-m", _MODULE, order.to_json()],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": path},
        )
    ends = time.monotonic() + _UP_S
    while time.monotonic() < ends:
        if process.poll() is not None:
            raise MonitorError(f"the monitor did not come up: {_said(log, began)}")
        state = find(order.folders[0])
        if state is not None and state.pid == process.pid:
            return state, False
        time.sleep(0.05)
    process.terminate()
    raise MonitorError(f"the monitor did not come up within {_UP_S:.0f} s; look at {log}")


def down(folder: str) -> bool:
    """End the monitor of a folder; False when none is up. Its data stay. MonitorError when it does not end."""
    import psutil

    state = find(folder)
    if state is None:
        return False
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(state.pid)
        try:
            process.send_signal(signal.SIGTERM)
        except psutil.AccessDenied:
            raise MonitorError(f"process {state.pid} is another user's ({process.username()}); ask there") from None
        try:
            process.wait(_DOWN_S)
        except psutil.TimeoutExpired:
            raise MonitorError(f"process {state.pid} has not ended within {_DOWN_S:.0f} s; kill it") from None
    return True


def absolute(folders: Sequence[str]) -> tuple[str, ...]:
    """Folders as an Order wants them. MonitorError for one that is no folder on a disk."""
    for folder in folders:
        if storage.is_url(folder):
            raise MonitorError(
                f"{folder}: is a URL; name folders on a disk. What labels a store announces its metrics in the folder "
                "that `fathom label run --telemetry` names"
            )
        if os.path.exists(folder) and not os.path.isdir(folder):
            raise MonitorError(f"{folder}: is no folder; name those that hold runs (default: runs)")
    return tuple(dict.fromkeys(os.path.abspath(folder) for folder in folders))


def _runs(state: State) -> bool:
    import psutil

    try:
        process = psutil.Process(state.pid)
        return process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - state.began) < 1.0
    except psutil.Error:
        return False


def _said(log: str, began: int) -> str:
    """The last line of a log from `began` on."""
    with suppress(OSError), open(log, "rb") as file:
        file.seek(began)
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
        if lines:
            return lines[-1].removeprefix("error: ")
    return f"look at {log}"
