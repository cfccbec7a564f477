"""Ray, embedded for the time of a block or joined at an address; and what it leaves behind, taken away."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_ROOT = str(Path(__file__).resolve().parent.parent)  # workers import the same checkout, wherever the driver stands
_OBJECT_STORE_BYTES = 200 << 20  # what passes through it is small: payloads, results of shards
_LINGER_S = 3.0
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

    embedded: bool
    logs: str


_current: Session | None = None


@contextmanager
def ray_session(address: str | None = None, cpus: int | None = None) -> Iterator[Session]:
    """Ray for the time of the block: embedded on this machine with at least `cpus` CPUs, or joined at `address`.

    Inside another ray_session, or where Ray is up already, that one is shared and left running. Enter it before
    torch or anything else starts threads that need SIGTERM. ClusterAddressError when `address` does not answer.
    """
    global _current
    import ray

    if _current is not None or ray.is_initialized():
        yield _current or Session(embedded=False, logs=_log_folder())
        return
    if address is None:
        with _embedded(max(cpus or 1, os.cpu_count() or 1)) as session:
            yield from _share(session)
    else:
        try:
            with environment(_DRIVER_ENVIRONMENT):
                ray.init(address=address, runtime_env=_runtime_env({}), **_quiet())
        except (ConnectionError, RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ClusterAddressError(f"no Ray cluster answers at {address}: {reason}; is it started there?") from error
        try:
            yield from _share(Session(embedded=False, logs=_log_folder()))
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


def remove_shared_memory(prefix: str) -> None:
    """Remove `/dev/shm/PREFIX*`, which must name dead processes' segments of our own (DeepSpeed's: 64 MiB a rank)."""
    folder = Path("/dev/shm")
    if prefix and "/" not in prefix and folder.is_dir():
        for path in folder.glob(f"{prefix}*"):
            with suppress(OSError):
                path.unlink()


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

    folder = _session_folder()
    before = set(_children(recursive=False))
    # Ray blocks SIGINT in all it starts, so that Ctrl-C reaches the driver alone. SIGTERM to a whole process group
    # (timeout, Slurm) has to leave the ranks time for a checkpoint too: a mask is inherited.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        with environment(_DRIVER_ENVIRONMENT):
            ray.init(
                num_cpus=cpus,
                include_dashboard=False,
                object_store_memory=_OBJECT_STORE_BYTES,
                runtime_env=_runtime_env({"GLOO_SOCKET_IFNAME": "lo"} if _has_lo() else {}),
                _node_ip_address=_loopback(),
                _temp_dir=folder,
                **_quiet(),
            )
    except BaseException:
        ray.shutdown()
        _remove(folder)
        raise
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    ray._private.worker._worker_logs_enabled = False  # Ray's own messages about dead workers: we tell, in one line
    heads = [child for child in _children(recursive=False) if child not in before]
    try:
        yield Session(embedded=True, logs=_log_folder())
    finally:
        _shut_down(heads)
        _remove(folder)


def _shut_down(heads: list[Any]) -> None:
    """ray.shutdown, and the end of every process below `heads`, those that Ray started directly."""
    import psutil
    import ray

    everything = list(heads)
    for head in heads:
        with suppress(psutil.Error):
            everything += head.children(recursive=True)
    over = threading.Event()

    def hasten() -> None:
        # Deaf to SIGTERM, each head would cost ray.shutdown a second. It ends the raylet first, once the driver has
        # left; from then on nothing needs the others.
        raylets = [head for head in heads if _name(head) == "raylet"]
        while not over.wait(0.05) and any(_runs(raylet) for raylet in raylets):
            pass
        _kill(heads)

    helper = threading.Thread(target=hasten, name="fathom-shutdown", daemon=True)
    helper.start()
    ray.shutdown()
    over.set()
    helper.join()
    ends = time.monotonic() + _LINGER_S  # the workers leave by themselves when the raylet is gone
    while any(_runs(process) for process in everything) and time.monotonic() < ends:
        time.sleep(0.05)
    _kill(everything)


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


def _name(process: Any) -> str:
    import psutil

    try:
        return str(process.name())
    except psutil.Error:
        return ""


def _children(recursive: bool) -> list[Any]:
    import psutil

    return list(psutil.Process().children(recursive=recursive))


def _quiet() -> dict[str, Any]:
    # Workers' output stays in Ray's log files: sent to the driver it would tear the progress bar.
    return {"log_to_driver": False, "logging_level": "ERROR"}


def _runtime_env(extra: dict[str, str]) -> dict[str, Any]:
    path = os.pathsep.join([_ROOT, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))])
    values = {name: os.environ.get(name, value) for name, value in (_WORKER_ENVIRONMENT | extra).items()}
    return {"env_vars": {"PYTHONPATH": path, **values}}


def _log_folder() -> str:
    import ray

    return os.path.join(ray._private.worker._global_node.get_session_dir_path(), "logs")  # noqa: PTH118


def _session_folder() -> str | None:
    """A folder of our own for Ray's session; None (Ray's default) where socket paths in it would be too long."""
    for parent in (tempfile.gettempdir(), "/tmp"):
        folder_bytes = len(os.fsencode(parent)) + len("/fathom-ray-12345678")
        if folder_bytes + _RAY_SOCKET_SUFFIX_BYTES <= _UNIX_SOCKET_PATH_BYTES and os.access(parent, os.W_OK):
            return tempfile.mkdtemp(prefix="fathom-ray-", dir=parent)
    return None


def _remove(folder: str | None) -> None:
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)


def _loopback() -> str | None:
    """An address that no network change, VPN or firewall touches. Ray replaces 127.0.0.1 by a routable one."""
    return "127.0.0.2" if sys.platform == "linux" and _has_lo() else None


def _has_lo() -> bool:
    with suppress(OSError):
        return any(name == "lo" for _, name in socket.if_nameindex())
    return False
