"""A group of workers that run one function together inside a torch process group, on Ray Train's TorchTrainer.

Ray Train aborts the run on SIGINT when `fit` is called from the main thread. So `fit` runs in a thread; the main
thread keeps the signals, forwards the stop request to the ranks through an actor, and shows rank 0's reports.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import socket
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster import storage
from cluster.runtime import (
    ClusterAddressError,
    ClusterError,
    Session,
    driver_environment,
    ray_session,
    remove_shared_memory,
)
from cluster.stop import StopFlag
from cluster.worker import Link, WorkerContext

WorkerFunction = Callable[[WorkerContext, dict[str, Any]], Any]

_LOOK_EVERY_S = 0.2
_POLL_EVERY_S = 0.5  # how late a rank other than 0 learns of the stop; rank 0 carries the progress too
_ABORT_WAIT_S = 20.0
_LOG_TAIL_BYTES = 64 << 10
# A rank whose peer died fails in the next collective: the peer's end is the news, not this.
_SECONDARY = re.compile(
    r"closed by peer|reset by peer|broken pipe|remote process exited|connection was likely closed", re.IGNORECASE
)
_SECONDARY_WAIT_S = 4.0


class WorkerError(ClusterError):
    """An exception of a worker that could not travel: its type, text and traceback, as text."""


class WorkerDied(ClusterError):
    """A worker's process ended without an exception: killed, out of memory, or crashed."""


@dataclass(frozen=True)
class GroupResult:
    """`value`: what the function returned on rank 0. `stop_reason`: the stop that was passed to the ranks, if any."""

    value: Any
    stop_reason: str | None


@dataclass
class _Run:
    """What the fit thread leaves for the main thread."""

    value: Any = None
    error: BaseException | None = None
    done: threading.Event = field(default_factory=threading.Event)


class _Control:
    """The actor between the driver and the ranks. It only keeps the last word of either side."""

    def __init__(self) -> None:
        self._progress: dict[str, Any] | None = None
        self._stop: tuple[str | None, float | None] = (None, None)
        self._ranks: dict[int, dict[str, Any]] = {}

    def join(self, rank: int, about: dict[str, Any]) -> None:
        self._ranks[rank] = about

    def exchange(self, rank: int, progress: dict[str, Any] | None) -> tuple[str | None, float | None]:
        if rank == 0 and progress is not None:
            self._progress = progress
        return self._stop

    def request_stop(self, reason: str, deadline: float | None) -> None:
        self._stop = (reason, deadline)

    def look(self) -> dict[str, Any] | None:
        return self._progress

    def ranks(self) -> dict[int, dict[str, Any]]:
        return self._ranks


def run_group(
    fn: WorkerFunction,
    payload: dict[str, Any],
    *,
    workers: int,
    name: str,
    storage_path: str,
    stop: StopFlag,
    address: str | None = None,
    use_gpu: bool = False,
    threads_per_worker: int = 1,
    env: Mapping[str, str] | None = None,
    on_progress: Callable[[dict[str, Any]], None] | None = None,
) -> GroupResult:
    """Run `fn(context, payload)` on every one of `workers` ranks and wait for all; call it from the main thread.

    On the Ray cluster at `address`, or an embedded one, or that of the `ray_session` around.
    `fn`, `payload` and what rank 0 returns are picklable, without tensors in the return value. `storage_path` is a
    folder that all nodes see; a failure leaves its details there. `on_progress` gets each new report of rank 0, in
    this thread. A stop request is passed on and the ranks' own return is waited for.

    Raises the exception of the lowest failing rank, with the rank's traceback as a note; WorkerDied;
    ClusterAddressError when the cluster is too small; KeyboardInterrupt at the second SIGINT, after killing the ranks.
    """
    import ray

    os.makedirs(storage_path, exist_ok=True)
    with ray_session(address, cpus=workers * threads_per_worker) as session:
        require_resources(workers, threads_per_worker, use_gpu)
        control = ray.remote(num_cpus=0)(_Control).remote()
        config = {"fn": fn, "payload": payload, "control": control, "threads": threads_per_worker, "gpu": use_gpu}
        run = _Run()
        trainer, folder = _trainer(config, workers, name, storage_path, {"DS_ACCELERATOR": "cpu"} | dict(env or {}))
        thread = threading.Thread(target=_fit, args=(trainer, run), name="fathom-fit", daemon=True)
        ranks: dict[int, dict[str, Any]] = {}
        try:
            with driver_environment():
                thread.start()
                _wait(run, control, stop, on_progress)
        except BaseException:
            _abort(control, run)
            raise
        finally:
            ranks = _ask(control.ranks.remote()) or {}
            ray.kill(control)
            for about in ranks.values():
                if about["host"] == socket.gethostname():
                    remove_shared_memory(about["shared_memory"])
            shutil.rmtree(folder, ignore_errors=True)
        if run.error is not None:
            raise _explain(run.error, ranks, session, storage.join(storage_path, f"{name}-failure.log")) from None
        return GroupResult(value=run.value, stop_reason=stop.reason)


def _trainer(
    config: dict[str, Any], workers: int, name: str, storage_path: str, env: dict[str, str]
) -> tuple[Any, str]:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    gpu = config["gpu"]
    if gpu:
        env.pop("DS_ACCELERATOR", None)
    attempt = f"{name}-{secrets.token_hex(4)}"  # Ray Train continues an old folder of the same name
    where = os.path.abspath(storage_path)
    trainer = TorchTrainer(
        _on_worker,
        train_loop_config=config,
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=workers,
            use_gpu=gpu,
            resources_per_worker={"CPU": config["threads"], **({"GPU": 1} if gpu else {})},
        ),
        run_config=RunConfig(
            name=attempt,
            storage_path=where,
            failure_config=FailureConfig(max_failures=0),
            worker_runtime_env={"env_vars": {"OMP_NUM_THREADS": str(config["threads"]), **env}},
        ),
    )
    return trainer, storage.join(where, attempt)


def _fit(trainer: Any, run: _Run) -> None:
    try:
        run.value = trainer.fit().return_value
    except BaseException as error:  # noqa: BLE001  it is raised in the main thread
        run.error = error
    finally:
        run.done.set()


def _wait(run: _Run, control: Any, stop: StopFlag, on_progress: Callable[[dict[str, Any]], None] | None) -> None:
    forwarded, shown = False, None
    while not run.done.wait(_LOOK_EVERY_S):
        if stop.reason is not None and not forwarded:
            control.request_stop.remote(stop.reason, stop.deadline)
            forwarded = True
        if on_progress is not None:
            progress = _ask(control.look.remote(), timeout_s=1.0)
            if progress is not None and progress != shown:
                shown = progress
                on_progress(progress)
    if on_progress is not None and run.error is None:
        progress = _ask(control.look.remote())
        if progress is not None and progress != shown:
            on_progress(progress)


def _abort(control: Any, run: _Run) -> None:
    """Kill the ranks at once; Ray Train then ends by itself."""
    import ray

    for about in (_ask(control.ranks.remote()) or {}).values():
        ray.kill(about["actor"])
    run.done.wait(_ABORT_WAIT_S)


def _ask(reference: Any, timeout_s: float = 5.0) -> Any:
    import ray

    try:
        return ray.get(reference, timeout=timeout_s)
    except ray.exceptions.RayError:
        return None


def require_resources(workers: int, threads: int, use_gpu: bool) -> None:
    """Refuse what would wait for ever: ClusterAddressError when the whole cluster is too small."""
    import ray

    have = ray.cluster_resources()
    for kind, each in (("CPU", threads), ("GPU", 1 if use_gpu else 0)):
        need = workers * each
        if need > have.get(kind, 0):
            raise ClusterAddressError(
                f"{workers} workers need {need} {kind}s, the cluster has {have.get(kind, 0):g}: "
                "use fewer workers or threads, or a larger cluster"
            )


def _on_worker(config: dict[str, Any]) -> Any:
    """The body of every rank."""
    import ray
    import ray.train
    import ray.train.torch
    import torch
    import torch.distributed

    train, control = ray.train.get_context(), config["control"]
    rank = train.get_world_rank()
    torch.set_num_threads(config["threads"])
    nodes: list[Any] = [None] * train.get_world_size()
    torch.distributed.all_gather_object(nodes, train.get_node_rank())
    # DeepSpeed asks for what only its own launcher sets.
    os.environ["CROSS_RANK"] = str(train.get_node_rank())
    os.environ["CROSS_SIZE"] = str(len(set(nodes)))
    os.environ["LOCAL_SIZE"] = str(train.get_local_world_size())
    buffers = f"deepspeed_allreduce_buffer_{os.getuid()}_{os.environ['MASTER_ADDR']}_{os.environ['MASTER_PORT']}_"
    about = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "actor": ray.get_runtime_context().current_actor,
        "shared_memory": buffers,
    }
    ray.get(control.join.remote(rank, about))
    context = WorkerContext(
        rank=rank,
        world_size=train.get_world_size(),
        local_rank=train.get_local_rank(),
        device=str(ray.train.torch.get_device()) if config["gpu"] else "cpu",
    )
    interval = _LOOK_EVERY_S if rank == 0 else _POLL_EVERY_S
    try:
        with Link(context, lambda progress: ray.get(control.exchange.remote(rank, progress)), interval):
            return config["fn"](context, config["payload"])
    except BaseException as error:  # noqa: BLE001  it is raised again, made portable
        if _SECONDARY.search(str(error)):
            time.sleep(_SECONDARY_WAIT_S)  # let the controller see the first cause
        raise portable(error, f"rank {rank}") from None


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


def _explain(error: BaseException, ranks: dict[int, dict[str, Any]], session: Session, log: str) -> BaseException:
    """The error to raise in the driver; everything else goes to the file `log`."""
    from ray.train import TrainingFailedError
    from ray.train.v2.api.exceptions import WorkerGroupError

    if not isinstance(error, TrainingFailedError):
        return error
    failures: dict[int, BaseException] = error.worker_failures if isinstance(error, WorkerGroupError) else {}
    dead = {rank: failure for rank, failure in failures.items() if _is_death(failure)}
    told = {
        rank: failure for rank, failure in failures.items() if rank not in dead and not _SECONDARY.search(str(failure))
    }
    _write_log(log, error, failures, ranks, session)
    if told:
        return told[min(told)]
    if dead:
        rank = min(dead)
        about = ranks.get(rank, {})
        where = f"process {about['pid']} on {about['host']}" if about else "before it had started"
        return WorkerDied(f"rank {rank} died ({where}): killed, out of memory or crashed; details in {log}")
    if failures:
        return failures[min(failures)]
    cause = getattr(error, "controller_failure", error)
    last = str(cause).strip().splitlines()[-1:] or [type(cause).__name__]
    return ClusterError(f"the worker group failed: {last[0]}; details in {log}")


def _is_death(error: BaseException) -> bool:
    from ray.exceptions import RayActorError

    inner = getattr(error, "health_check_failure", None)
    return isinstance(error, RayActorError) or isinstance(inner, RayActorError)


def _write_log(
    log: str,
    error: BaseException,
    failures: dict[int, BaseException],
    ranks: dict[int, dict[str, Any]],
    session: Session,
) -> None:
    parts = [time.strftime("%Y-%m-%dT%H:%M:%S%z"), str(error)]
    for rank, failure in sorted(failures.items()):
        parts += [f"--- rank {rank}: {type(failure).__name__}: {failure}", *getattr(failure, "__notes__", [])]
    for rank, about in sorted(ranks.items()):
        for path in sorted(Path(session.logs).glob(f"worker-*-{about['pid']}.*")):
            tail = path.read_bytes()[-_LOG_TAIL_BYTES:].decode(errors="replace").strip()
            parts += [f"--- rank {rank}: {path.name}", tail] if tail else []
    try:
        storage.atomic_write(log, "\n".join(parts) + "\n")
    except storage.StorageError as problem:
        error.add_note(str(problem))  # a full disk must not hide the failure
