"""Why a worker group ended: the first cause out of all that its ranks say, as one error, and the rest in a file."""

from __future__ import annotations

import re
import time
import traceback
from collections.abc import Collection, Mapping
from pathlib import Path

from cluster import storage
from cluster.control import About
from cluster.runtime import ClusterError

_LOG_TAIL_BYTES = 64 << 10
# A rank whose peer died fails in the next collective: the peer's end is the news, not this.
SECONDARY = re.compile(
    r"closed by peer|reset by peer|broken pipe|remote process exited|connection was likely closed", re.IGNORECASE
)
# What a rank says whose peer's machine is gone is less plain; that it comes from a collective is all there is to see.
COLLECTIVE = re.compile(r"\bgloo\b|nccl|ProcessGroup|TCPStore|\bDist(Backend|Network|Store)?Error\b", re.IGNORECASE)


class WorkerError(ClusterError):
    """An exception of a worker that could not travel: its type, text and traceback, as text."""


class WorkerDied(ClusterError):
    """A worker's process ended without an exception: killed, out of memory, or crashed."""


class WorkerHung(ClusterError):
    """The group did not move for too long and was killed: which rank is at fault, and where the stacks are."""


class MachineLost(ClusterError):
    """A worker went with its machine: the work is not to blame."""


def portable(error: BaseException, who: str) -> Exception:
    """The exception with its traceback as a note, or, where it does not survive pickling, a WorkerError like it."""
    import ray.cloudpickle

    trace = "".join(traceback.format_exception(error))
    if isinstance(error, Exception):
        error.add_note(f"{who}:\n{trace}")
        try:
            copy = ray.cloudpickle.loads(ray.cloudpickle.dumps(error))
            if type(copy) is type(error) and str(copy) == str(error):
                return error
        except Exception:  # noqa: BLE001  whatever it is, it cannot travel
            pass
    stand_in = WorkerError(f"{type(error).__name__}: {error}")
    stand_in.exit_status = getattr(error, "exit_status", stand_in.exit_status)
    stand_in.add_note(f"{who}:\n{trace}")
    return stand_in


def explain(
    error: BaseException, ranks: Mapping[int, About], alive: Collection[str], logs: str, log: str
) -> BaseException:
    """The error to raise in the driver; everything else goes to the file `log`.

    `alive`: Ray's ids of the nodes that are there still, empty where nobody knows. `logs`: Ray's log folder here.
    """
    from ray.train import TrainingFailedError
    from ray.train.v2.api.exceptions import WorkerGroupError

    if not isinstance(error, TrainingFailedError):
        return error
    failures: dict[int, BaseException] = error.worker_failures if isinstance(error, WorkerGroupError) else {}
    dead = {rank: failure for rank, failure in failures.items() if _is_death(failure)}
    told = {
        rank: failure
        for rank, failure in failures.items()
        if rank not in dead and not is_secondary(failure) and not (dead and of_a_collective(failure))
    }
    _write_log(log, error, failures, ranks, logs)
    lost = [rank for rank in dead if alive and rank in ranks and ranks[rank].node not in alive]
    if lost:  # whatever the others said, or died of, for want of it
        return MachineLost(f"rank {min(lost)} was lost with its machine ({_where(ranks, min(lost))}); details in {log}")
    if told:
        return told[min(told)]
    if dead:
        where = _where(ranks, min(dead))
        return WorkerDied(f"rank {min(dead)} died ({where}): killed, out of memory or crashed; details in {log}")
    if failures:
        return failures[min(failures)]
    cause = getattr(error, "controller_failure", error)
    last = str(cause).strip().splitlines()[-1:] or [type(cause).__name__]
    return ClusterError(f"the worker group failed: {last[0]}; details in {log}")


def is_secondary(error: BaseException) -> bool:
    """Whether torch.distributed says that another rank is gone. What a store or a socket of ours says is news."""
    return isinstance(error, RuntimeError) and bool(SECONDARY.search(str(error)))


def of_a_collective(error: BaseException) -> bool:
    """Whether it is torch.distributed that says something."""
    text = f"{type(error).__name__}: {error}"
    return isinstance(error, RuntimeError) and bool(COLLECTIVE.search(text))


def _where(ranks: Mapping[int, About], rank: int) -> str:
    about = ranks.get(rank)
    return f"process {about.pid} on {about.host}" if about else "before it had started"


def _is_death(error: BaseException) -> bool:
    from ray.exceptions import RayActorError

    inner = getattr(error, "health_check_failure", None)
    return isinstance(error, RayActorError) or isinstance(inner, RayActorError)


def _write_log(
    log: str,
    error: BaseException,
    failures: dict[int, BaseException],
    ranks: Mapping[int, About],
    logs: str,
) -> None:
    parts = [time.strftime("%Y-%m-%dT%H:%M:%S%z"), str(error)]
    for rank, failure in sorted(failures.items()):
        parts += [f"--- rank {rank}: {type(failure).__name__}: {failure}", *getattr(failure, "__notes__", [])]
    for rank, about in sorted(ranks.items()):
        for path in sorted(Path(logs).glob(f"worker-*-{about.pid}.*")):
            tail = path.read_bytes()[-_LOG_TAIL_BYTES:].decode(errors="replace").strip()
            parts += [f"--- rank {rank}: {path.name}", tail] if tail else []
    try:
        storage.atomic_write(log, "\n".join(parts) + "\n")
    except storage.StorageError as problem:
        error.add_note(str(problem))  # a full disk must not hide the failure
