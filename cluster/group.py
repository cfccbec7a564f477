"""A group of workers that run one function together inside a torch process group, on Ray Train's TorchTrainer.

One call is one attempt: nothing is started again here (cluster/attempts.py). Ray Train aborts the run on SIGINT when
`fit` is called from the main thread. So `fit` runs in a thread; the main thread keeps the signals, gives the ranks
their orders, shows rank 0's reports, and watches that the ranks move (cluster/direction.py).
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import psutil

from cluster import storage
from cluster.control import About, Control
from cluster.direction import LOOK_EVERY_S, Direction, Fit, Given, Watch
from cluster.ending import clean, nodes_alive
from cluster.failures import explain, is_secondary, portable
from cluster.runtime import ClusterAddressError, ClusterError, driver_environment, own_node, ray_session
from cluster.stop import StopFlag
from cluster.surroundings import Surroundings, reservations
from cluster.worker import Link, WorkerContext

WorkerFunction = Callable[[WorkerContext, dict[str, Any]], Any]

_POLL_EVERY_S = 0.5  # how late a rank other than 0 learns of the stop; rank 0 carries the progress too
_RANKS_A_POLL = 200  # calls a second that the control actor takes easily: larger groups speak less often
_SECONDARY_WAIT_S = 4.0


@dataclass(frozen=True)
class GroupResult:
    """`value`: what the function returned on rank 0. `stop_reason`: the stop that was passed to the ranks, if any."""

    value: Any
    stop_reason: str | None


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
    watch: Watch | None = None,
    grow: Callable[[int], bool] | None = None,
    on_progress: Callable[[dict[str, Any]], None] | None = None,
) -> GroupResult:
    """Run `fn(context, payload)` on every one of `workers` ranks and wait for all; call it from the main thread.

    On the Ray cluster at `address`, or an embedded one, or that of the `ray_session` around.
    `fn`, `payload` and what rank 0 returns are picklable, without tensors in the return value. `storage_path` is a
    folder that all nodes see; a failure leaves its details there. `on_progress` gets each new report of rank 0, in
    this thread. A stop request is passed on and the ranks' own return is waited for. With `watch`, a group that does
    not move is killed. A machine of the group that is about to go makes the ranks stop as PREEMPTED; `grow`, asked
    again and again with the number of workers that there is room for, makes them stop as RESIZED.

    Raises the exception of the lowest failing rank, with the rank's traceback as a note; WorkerDied, WorkerHung,
    MachineLost; ClusterAddressError when the cluster is too small; KeyboardInterrupt at the second SIGINT, after
    killing the ranks.
    """
    import ray

    os.makedirs(storage_path, exist_ok=True)
    with ray_session(address, cpus=workers * threads_per_worker) as session:
        require_resources(workers, threads_per_worker, use_gpu)
        control = _on_own_node(Control, watch)
        config = {
            "fn": fn, "payload": payload, "control": control, "threads": threads_per_worker, "gpu": use_gpu,
            "poll_s": max(_POLL_EVERY_S, workers / _RANKS_A_POLL),
        }  # fmt: skip
        fit = Fit()
        trainer, folder = _trainer(config, workers, name, storage_path, {"DS_ACCELERATOR": "cpu"} | dict(env or {}))
        thread = threading.Thread(target=_fit, args=(trainer, fit), name="fathom-fit", daemon=True)
        direction = Direction(control, fit, workers, watch, poll_s=config["poll_s"], others=reservations().keys())
        hung: ClusterError | None = None
        try:
            with driver_environment():
                thread.start()
                with Surroundings(threads_per_worker, use_gpu) as around:
                    given = Given(control, stop, around, grow)
                    stuck = direction.wait(given, on_progress)
            if stuck and watch:
                hung = direction.end_stuck(stuck, watch)
        except BaseException:
            direction.end()
            raise
        finally:
            ranks = direction.refresh()
            ray.kill(control)
            clean([], [about.shared_memory for about in ranks.values() if about.node == own_node()])
            shutil.rmtree(folder, ignore_errors=True)
        if hung is not None:
            raise hung
        if fit.error is not None:
            log = storage.join(storage_path, f"{name}-failure.log")
            raise explain(fit.error, ranks, nodes_alive(), session.logs, log) from None
        return GroupResult(value=fit.value, stop_reason=given.reason)


def _on_own_node(control: type[Control], watch: Watch | None) -> Any:
    """The actor, on the driver's own node: no other's loss takes it."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    settings = (
        {"silence_s": watch.silence_s, "factor": watch.factor, "shortest_s": watch.shortest_s,
         "longest_s": dict(watch.learned)}
        if watch
        else {}
    )  # fmt: skip
    place = NodeAffinitySchedulingStrategy(own_node(), soft=False)
    return ray.remote(num_cpus=0, scheduling_strategy=place)(control).remote(settings)


def _trainer(
    config: dict[str, Any], workers: int, name: str, storage_path: str, env: dict[str, str]
) -> tuple[Any, str]:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.train.v2._internal.callbacks import DatasetsCallback
    from ray.train.v2._internal.execution.callback import ControllerCallback

    from cluster.rendezvous import STORE_IS_SERVED, MeetingConfig

    class Announce(ControllerCallback):
        """Runs in the controller. Its actor is in nobody's hands otherwise, and can be ended by nobody."""

        def __init__(self, control: Any) -> None:
            self._control = control

        def after_controller_start(self, train_run_context: Any) -> None:
            import ray

            self._control.lead.remote(ray.get_runtime_context().current_actor)

    class Trainer(TorchTrainer):
        def _create_default_callbacks(self) -> list[Any]:
            """Without the actor that would manage Ray datasets: it holds up the start by seconds, for none."""
            usual = super()._create_default_callbacks()
            return [*(one for one in usual if not isinstance(one, DatasetsCallback)), Announce(config["control"])]

    gpu = config["gpu"]
    if gpu:
        env.pop("DS_ACCELERATOR", None)
    attempt = f"{name}-{secrets.token_hex(4)}"  # Ray Train continues an old folder of the same name
    where = os.path.abspath(storage_path)
    trainer = Trainer(
        _on_worker,
        train_loop_config=config,
        torch_config=MeetingConfig(backend="cpu:gloo,cuda:nccl" if gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=workers,
            use_gpu=gpu,
            resources_per_worker={"CPU": config["threads"], **({"GPU": 1} if gpu else {})},
        ),
        run_config=RunConfig(
            name=attempt,
            storage_path=where,
            failure_config=FailureConfig(max_failures=0),
            worker_runtime_env={"env_vars": {"OMP_NUM_THREADS": str(config["threads"]), **STORE_IS_SERVED, **env}},
        ),
    )
    return trainer, storage.join(where, attempt)


def _fit(trainer: Any, fit: Fit) -> None:
    try:
        fit.value = trainer.fit().return_value
    except BaseException as error:  # noqa: BLE001  it is raised in the main thread
        fit.error = error
    finally:
        fit.done.set()


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

    from cluster.exchange import gathered

    train, control = ray.train.get_context(), config["control"]
    rank = train.get_world_rank()
    torch.set_num_threads(config["threads"])
    nodes = gathered(train.get_node_rank())
    # DeepSpeed asks for what only its own launcher sets.
    os.environ["CROSS_RANK"] = str(train.get_node_rank())
    os.environ["CROSS_SIZE"] = str(len(set(nodes)))
    os.environ["LOCAL_SIZE"] = str(train.get_local_world_size())
    buffers = f"deepspeed_allreduce_buffer_{os.getuid()}_{os.environ['MASTER_ADDR']}_{os.environ['MASTER_PORT']}_"
    runtime = ray.get_runtime_context()
    about = About(
        pid=os.getpid(),
        born=psutil.Process().create_time(),
        host=socket.gethostname(),
        node=runtime.get_node_id(),
        actor=runtime.current_actor,
        shared_memory=buffers,
    )
    ray.get(control.join.remote(rank, about))
    context = WorkerContext(
        rank=rank,
        world_size=train.get_world_size(),
        local_rank=train.get_local_rank(),
        device=str(ray.train.torch.get_device()) if config["gpu"] else "cpu",
    )
    interval = LOOK_EVERY_S if rank == 0 else config["poll_s"]
    try:
        with Link(context, lambda word: ray.get(control.exchange.remote(rank, word)), interval):
            return config["fn"](context, config["payload"])
    except BaseException as error:  # noqa: BLE001  it is raised again, made portable
        if is_secondary(error):
            time.sleep(_SECONDARY_WAIT_S)  # let the controller see the first cause
        raise portable(error, f"rank {rank}") from None
    finally:
        control.leave.remote(rank)
