"""Ray, embedded for the time of a block or joined at an address; and what it leaves behind, taken away."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.machine import whole_cpus

_ROOT = str(Path(__file__).resolve().parent.parent)  # workers import the same checkout, wherever the driver stands
_OBJECT_STORE_BYTES = 200 << 20  # what passes through it is small: payloads, results of shards
_LOOPBACK = "127.0.0.1"  # no network change, VPN or firewall touches it
_LINGER_S = 3.0
_CONNECT_S = 5.0
_FOLDER_PREFIX = "fathom-ray-"
_UNIX_SOCKET_PATH_BYTES = 107
_RAY_SOCKET_SUFFIX_BYTES = len("/session_2026-01-01_00-00-00_000000_0000000/sockets/plasma_store.12345")

# Read in the driver by ray.init and Ray Train. The chdir would break relative paths in configurations; Ray's own
# per-worker metrics are not read.
_DRIVER_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
}
# Read in Ray Train's controller and in the workers.
_WORKER_ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # how late the end of a run, or a death, is noticed
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # else every print shows twice
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # one more actor for what cluster/surroundings.py sees
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "5",  # a stuck rank is killed after it
}


class ClusterError(RuntimeError):
    """The cluster, not the work in it, failed: what happened and what to do, in one line."""

    exit_status = 1


class ClusterAddressError(ClusterError):
    """The address or the resources asked for cannot be had."""

    exit_status = 2


@dataclass(frozen=True)
class Session:
    """The Ray session in use. `logs`: Ray's own log folder on this machine, gone with an embedded session."""

    address: str | None  # as it was given
    embedded: bool
    logs: str


_current: Session | None = None


def usual_address() -> str | None:
    """Where Ray is when nobody says: RAY_ADDRESS, which Ray sets in its jobs; not a job server's URL."""
    address = os.environ.get("RAY_ADDRESS") or None
    return address if address and "://" not in address else None


@contextmanager
def ray_session(address: str | None = None, cpus: int | None = None) -> Iterator[Session]:
    """Ray for the time of the block: embedded on this machine with at least `cpus` CPUs, or joined at `address`.

    Without an address that of RAY_ADDRESS is joined, if it is set. Inside another ray_session, or where Ray is up
    already, that one is shared and left running.
    ClusterAddressError when `address` does not answer, or is not that of the session around.
    """
    global _current
    import ray

    if _current is not None or ray.is_initialized():
        session = _current or Session(address=None, embedded=False, logs=_log_folder())
        if address is not None and session.address != address:
            raise ClusterAddressError(
                f"{address}: this process uses Ray {f'at {session.address}' if session.address else 'on its own'} "
                "already; give both the same address"
            )
        yield session
        return
    address = address or usual_address()
    if address is None:
        with _process_state(), _embedded(max(cpus or 1, whole_cpus())) as session:
            yield from _share(session)
    else:
        with _process_state():
            _join(address)
            try:
                yield from _share(Session(address=address, embedded=False, logs=_log_folder()))
            finally:
                ray.shutdown()


@contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables of this process for the time of a block; what the user has set stays."""
    added = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def driver_environment() -> Any:
    """The block in which Ray Train's driver side is called."""
    return environment(_DRIVER_ENVIRONMENT)


def own_node() -> str:
    """Ray's id of the node that this process is on."""
    import ray

    return str(ray.get_runtime_context().get_node_id())


def remove_shared_memory(prefix: str) -> None:
    """Remove `/dev/shm/PREFIX*`, which must name dead processes' segments of our own (DeepSpeed's: 64 MiB a rank)."""
    folder = Path("/dev/shm")
    if prefix and "/" not in prefix and folder.is_dir():
        for path in folder.glob(f"{prefix}*"):
            with suppress(OSError):
                path.unlink()


@contextmanager
def _process_state() -> Iterator[None]:
    """Put back what Ray leaves in the driver's environment."""
    before = set(os.environ)
    try:
        yield
    finally:
        for name in set(os.environ) - before:
            if name.startswith("RAY_") or name == "PYTHONBREAKPOINT":
                del os.environ[name]


def _init(**options: Any) -> None:
    """ray.init, quiet. It replaces the SIGTERM handler by one that exits: the caller's comes back."""
    import ray

    main = threading.current_thread() is threading.main_thread()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with environment(_DRIVER_ENVIRONMENT):
            # Workers' output stays in Ray's log files: sent to the driver it would tear the progress bar.
            ray.init(log_to_driver=False, logging_level="ERROR", **options)
        ray._private.worker._worker_logs_enabled = False  # Ray's own message for every dead worker and node
    finally:
        for number, handler in handlers.items():
            if main and handler is not None and signal.getsignal(number) is not handler:
                signal.signal(number, handler)


def _join(address: str) -> None:
    remedy = "start it there, or give the address of its head node"
    host, _, port = address.rpartition(":")
    if host and port.isdigit() and "://" not in address:  # ray.init alone would try for five minutes
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S).close()
        except OSError as error:
            raise ClusterAddressError(f"no Ray cluster answers at {address} ({error}): {remedy}") from error
    try:
        _init(address=address, runtime_env=_runtime_env({}))
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ClusterAddressError(f"cannot join the Ray cluster at {address} ({reason}): {remedy}") from error


def _share(session: Session) -> Iterator[Session]:
    global _current
    _current = session
    try:
        yield session
    finally:
        _current = None


@contextmanager
def _embedded(cpus: int) -> Iterator[Session]:
    import ray

    before = _children()
    with _session_folder() as folder:
        with _process_groups_apart(), _loopback_kept():
            _init(
                num_cpus=cpus,
                include_dashboard=False,
                object_store_memory=_OBJECT_STORE_BYTES,
                runtime_env=_runtime_env({"GLOO_SOCKET_IFNAME": "lo"} if _has_lo() else {}),
                _node_ip_address=_LOOPBACK if _has_lo() else None,
                _temp_dir=folder,
            )
        try:
            yield Session(address=None, embedded=True, logs=_log_folder())
        finally:
            started = [child for child in _children() if child not in before]
            ray.shutdown()
            ends = time.monotonic() + _LINGER_S  # workers leave by themselves when their raylet is gone
            while any(_runs(process) for process in started) and time.monotonic() < ends:
                time.sleep(0.05)
            _kill([process for process in started if _is_ray(process)])


@contextmanager
def _process_groups_apart() -> Iterator[None]:
    """Processes that Ray starts in the block get groups of their own.

    A signal to the driver's whole group (a terminal, `timeout`) then leaves Ray and the ranks up for a last
    checkpoint. Ray itself blocks SIGINT in them but dies of SIGTERM; blocking that too would cost ray.shutdown a
    second for each.
    """
    from ray._private import services

    original = services.ConsolePopen

    class Apart(original):  # type: ignore[misc,valid-type]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, process_group=0, **options)

    services.ConsolePopen = Apart
    try:
        yield
    finally:
        services.ConsolePopen = original


def _kill(processes: list[Any]) -> None:
    import psutil

    for process in processes:
        with suppress(psutil.Error):
            process.kill()  # psutil compares start times: never a reused pid


def _runs(process: Any) -> bool:
    import psutil

    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def _is_ray(process: Any) -> bool:
    """Not the caller's own child that happens to be as young."""
    import psutil

    try:
        return any("ray" in os.path.basename(part) or "/ray/" in part for part in process.cmdline()[:4])
    except psutil.Error:
        return False


def _children() -> list[Any]:
    import psutil

    return list(psutil.Process().children(recursive=True))


def _runtime_env(extra: dict[str, str]) -> dict[str, Any]:
    path = os.pathsep.join([_ROOT, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))])
    values = {name: os.environ.get(name, value) for name, value in (_WORKER_ENVIRONMENT | extra).items()}
    return {"env_vars": {"PYTHONPATH": path, **values}}


def _log_folder() -> str:
    import ray

    return os.path.join(ray._private.worker._global_node.get_session_dir_path(), "logs")


@contextmanager
def _session_folder() -> Iterator[str | None]:
    """A locked folder of our own for Ray's session, and the end of folders whose driver was killed.

    None (Ray's default) where socket paths in it would be too long.
    """
    for parent in dict.fromkeys([tempfile.gettempdir(), "/tmp"]):
        folder_bytes = len(os.fsencode(parent)) + len(f"/{_FOLDER_PREFIX}12345678")
        if folder_bytes + _RAY_SOCKET_SUFFIX_BYTES > _UNIX_SOCKET_PATH_BYTES or not os.access(parent, os.W_OK):
            continue
        for old in Path(parent).glob(f"{_FOLDER_PREFIX}*"):
            with suppress(OSError), (old / "lock").open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(old, ignore_errors=True)
        folder = tempfile.mkdtemp(prefix=_FOLDER_PREFIX, dir=parent)
        try:
            with Path(folder, "lock").open("wb") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return
    yield None


@contextmanager
def _loopback_kept() -> Iterator[None]:
    """Ray replaces 127.0.0.1 by an address that others reach; only on loopback itself do all of its processes listen on
    loopback alone, and anybody who reaches one of them may run what he likes."""
    from ray._private import services

    original = services.resolve_ip_for_localhost
    services.resolve_ip_for_localhost = lambda host: host if host == _LOOPBACK else original(host)
    try:
        yield
    finally:
        services.resolve_ip_for_localhost = original


def _has_lo() -> bool:
    with suppress(OSError):
        return any(name == "lo" for _, name in socket.if_nameindex())
    return False
