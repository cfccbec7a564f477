"""What a node is asked when a cluster is looked over: facts about it and the way to others. Nothing is judged here.

The functions run on the node; `Station` is the actor that runs them there. cluster/survey.py asks.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import re
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.machine import free_memory

MIB = 1 << 20
_ROOT = Path(__file__).resolve().parent.parent
_SMI_S = 20.0  # nvidia-smi loads the driver when nobody else has
_CONNECT_S = 3.0
_VISIBLE_S = 3.0  # a network file system may show another machine's new file a little late
_GPU_QUERY = "uuid,name,driver_version,memory.total,memory.free"


@dataclass(frozen=True)
class Gpu:
    """One of NVIDIA's, as nvidia-smi lists it."""

    uuid: str
    name: str
    driver: str
    total_mib: int
    free_mib: int


@dataclass(frozen=True, kw_only=True)
class Network:
    """`wanted`: GLOO_SOCKET_IFNAME. `interface` and `address`: those that gloo takes, unless there is a `problem`."""

    hostname: str
    wanted: str
    interfaces: Mapping[str, Sequence[str]]
    interface: str
    address: str
    problem: str = ""


@dataclass(frozen=True, kw_only=True)
class NodeFacts:
    """`code`: file -> digest, below `root`. `gpu_problem`: what nvidia-smi said when it failed."""

    root: str
    versions: Mapping[str, str | None]
    code: Mapping[str, str]
    gpus: Sequence[Gpu]
    gpu_problem: str
    free_memory_bytes: int
    network: Network


@dataclass(frozen=True, kw_only=True)
class FolderFacts:
    """A shared folder as a node sees it. Rates are those of one file of some MiB, written to the disk and read back."""

    problem: str = ""
    free_bytes: int = 0
    write_mib_per_s: float = 0.0
    read_mib_per_s: float = 0.0


def node_facts(distributions: Sequence[str], rooms: Sequence[str]) -> NodeFacts:
    """All that can be told without a second node. `rooms`: the folders of the checkout whose code is compared."""
    gpus, problem = list_gpus()
    return NodeFacts(
        root=str(_ROOT),
        versions=versions(distributions),
        code=code_digests(rooms),
        gpus=gpus,
        gpu_problem=problem,
        free_memory_bytes=free_memory(),
        network=network(),
    )


def versions(distributions: Sequence[str]) -> dict[str, str | None]:
    """Python's version and those of distributions; None for what is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in distributions:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def code_digests(rooms: Sequence[str], root: Path = _ROOT) -> dict[str, str]:
    """A digest of every .py file in some folders of the checkout that this process runs."""
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()[:12]
        for room in rooms
        for path in sorted((root / room).rglob("*.py"))
    }


def list_gpus() -> tuple[list[Gpu], str]:
    """NVIDIA's GPUs, and what went wrong; neither where there is no nvidia-smi."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return [], ""
    command = [program, f"--query-gpu={_GPU_QUERY}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SMI_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        return [], one_line(error)
    if done.returncode != 0:
        return [], one_line(done.stdout.strip() or done.stderr.strip() or f"exit status {done.returncode}")
    rows = [[field.strip() for field in line.split(",")] for line in done.stdout.splitlines() if line.strip()]
    try:
        return [Gpu(uuid, name, driver, int(total), int(free)) for uuid, name, driver, total, free in rows], ""
    except ValueError:
        return [], one_line(f"an answer that is not understood: {done.stdout}")


def network() -> Network:
    """The interface that gloo would take here: PyTorch's choice, made again."""
    return choose_interface(socket.gethostname(), os.environ.get("GLOO_SOCKET_IFNAME", ""), own_interfaces())


def own_interfaces() -> dict[str, tuple[str, ...]]:
    """This machine's network interfaces and their IP addresses."""
    import psutil

    return {
        name: tuple(
            entry.address.partition("%")[0] for entry in entries if entry.family in (socket.AF_INET, socket.AF_INET6)
        )
        for name, entries in psutil.net_if_addrs().items()
    }


def choose_interface(hostname: str, wanted: str, interfaces: Mapping[str, Sequence[str]]) -> Network:
    """GLOO_SOCKET_IFNAME's interfaces, else the first address of the host's name that is ours, else loopback."""
    names = [name for name in wanted.split(",") if name]
    missing = [name for name in names if not interfaces.get(name)]
    problem, interface, address = "", "", "127.0.0.1"
    if missing:
        problem = f"GLOO_SOCKET_IFNAME={wanted}, but no {missing[0]} with an address"
    elif names:
        interface, address = names[0], interfaces[names[0]][0]
    else:
        try:
            found = socket.getaddrinfo(hostname, None, type=socket.SOCK_STREAM)
        except OSError as error:
            problem = f"the name {hostname} does not resolve ({one_line(error)})"
        else:
            own = [str(entry[4][0]) for entry in found if _can_bind(entry)]
            address = own[0] if own else address
            problem = "" if own else f"the name {hostname} resolves to no address of this node"
        # Without a usable name PyTorch takes loopback, with a warning in a worker's log.
        interface = next((name for name, has in interfaces.items() if address in has), "lo")
    return Network(
        hostname=hostname, wanted=wanted, interfaces=interfaces, interface=interface, address=address, problem=problem
    )


def _can_bind(entry: tuple[Any, ...]) -> bool:
    try:
        with socket.socket(entry[0], socket.SOCK_STREAM) as tried:
            tried.bind(entry[4])
    except OSError:
        return False
    return True


def try_folder(folder: str, token: str, name: str, mib: int) -> FolderFacts:
    """Look for `token` in the folder's file `token`, then write `mib` MiB into the file `name` and read them back."""
    path = Path(folder)
    try:
        if not path.parent.is_dir():
            return FolderFacts(problem="there is no such folder")
        ends = time.monotonic() + _VISIBLE_S
        while not (path / "token").is_file() and time.monotonic() < ends:
            time.sleep(0.1)
        if not (path / "token").is_file():
            return FolderFacts(problem="a folder of this name, but not the same one")
        if (path / "token").read_text(encoding="utf-8") != token:
            return FolderFacts(problem="what was written is not what is read")
        data = secrets.token_bytes(mib * MIB)  # a file system that compresses gains nothing
        write_s, read_s, back = _write_and_read(path / name, data)
        if back != data:
            return FolderFacts(problem="a file that was written reads differently")
        free = shutil.disk_usage(path).free
    except OSError as error:
        return FolderFacts(problem=one_line(error))
    return FolderFacts(free_bytes=free, write_mib_per_s=mib / write_s, read_mib_per_s=mib / read_s)


def _write_and_read(path: Path, data: bytes) -> tuple[float, float, bytes]:
    begun = time.perf_counter()
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        written = time.perf_counter()
        if hasattr(os, "posix_fadvise"):  # else memory is measured
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    opened = time.perf_counter()
    back = path.read_bytes()
    return max(written - begun, 1e-6), max(time.perf_counter() - opened, 1e-6), back


def one_line(error: object) -> str:
    """An exception or a text as one line of at most 200 characters, without the source's place in front."""
    text = str(error) or type(error).__name__
    text = re.sub(r"\[[^\]]*\.(?:cc|cpp|h):\d+\]\s*", "", text.partition("Exception raised from")[0])
    return " ".join(text.split())[:200]
