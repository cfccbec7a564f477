"""A group of workers that run one function together inside a torch process group, on Ray Train's TorchTrainer.

One call is one attempt: nothing is started again here (cluster/attempts.py). Ray Train aborts the run on SIGINT when
`fit` is called from the main thread. So `fit` runs in a thread; the main thread keeps the signals, gives the ranks
their orders through an actor, shows rank 0's reports, and watches that the ranks move: Ray Train does not notice one
that sleeps, nor does a collective through shared memory ever time out.
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from cluster import storage
from cluster.control import About, Control, View
from cluster.ending import clean, kill, nodes_alive, release_room, state_of
from cluster.failures import SECONDARY, MachineLost, WorkerHung, explain, portable
from cluster.runtime import ClusterAddressError, ClusterError, driver_environment, own_node, ray_session
from cluster.stop import StopFlag
from cluster.surroundings import Surroundings
from cluster.watchdog import Stuck
from cluster.worker import Link, Orders, WorkerContext

WorkerFunction = Callable[[WorkerContext, dict[str, Any]], Any]

_LOOK_EVERY_S = 0.2
_POLL_EVERY_S = 0.5  # how late a rank other than 0 learns of the stop; rank 0 carries the progress too
_RANKS_A_POLL = 200  # calls a second that the control actor takes easily: larger groups speak less often
_JOIN_S = 600.0  # for all ranks to be placed and to have found each other
_STACKS_S = 5.0
_ABORT_WAIT_S = 20.0
_NO_ROOM_S = 15.0  # machines may be on their way: whoever decides about the next attempt waits for them
_SECONDARY_WAIT_S = 4.0


@dataclass(frozen=True, kw_only=True)
class Watch:
    """How long a rank may be silent or in one phase: cluster/watchdog.py.

    `stacks`: a folder for those of a stuck group, which all machines see. `learned`: what an earlier attempt's phases
    took at most; it is added to. `on_slow` gets each straggler once: rank, host, and how many times as long as the
    median rank it needs for its own work (cluster/stragglers.py).
    """

    stacks: str
    silence_s: float = 30.0
    factor: float = 10.0
    shortest_s: float = 60.0
    learned: dict[str, float] = field(default_factory=dict)
    on_slow: Callable[[int, str, float], None] | None = None


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
        run = _Run()
        trainer, folder = _trainer(config, workers, name, storage_path, {"DS_ACCELERATOR": "cpu"} | dict(env or {}))
        thread = threading.Thread(target=_fit, args=(trainer, run), name="fathom-fit", daemon=True)
        ranks: dict[int, About] = {}
        hung: ClusterError | None = None
        try:
            with driver_environment():
                thread.start()
                with Surroundings(threads_per_worker, use_gpu) as around:
                    orders = _Orders(control, stop, around, grow)
                    stuck = _wait(run, control, workers, orders, watch, on_progress)
            if stuck and watch:
                ranks = _ask(control.ranks.remote()) or {}
                hung = _end_stuck(stuck, control, ranks, run, watch)
        except BaseException:
            kill(_ask(control.ranks.remote()) or {})
            _abort(run, control)
            raise
        finally:
            ranks = _ask(control.ranks.remote()) or ranks
            if watch:
                watch.learned.update(_ask(control.learned.remote()) or {})
            ray.kill(control)
            clean([], [about.shared_memory for about in ranks.values() if about.node == own_node()])
            shutil.rmtree(folder, ignore_errors=True)
        if hung is not None:
            raise hung
        if run.error is not None:
            log = storage.join(storage_path, f"{name}-failure.log")
            raise explain(run.error, ranks, nodes_alive(), session.logs, log) from None
        return GroupResult(value=run.value, stop_reason=orders.reason)


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
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2._internal.execution.callback import ControllerCallback

    class Announce(ControllerCallback):
        """Runs in the controller. Its actor is in nobody's hands otherwise, and can be ended by nobody."""

        def __init__(self, control: Any) -> None:
            self._control = control

        def after_controller_start(self, train_run_context: Any) -> None:
            import ray

            self._control.lead.remote(ray.get_runtime_context().current_actor)

    class Trainer(TorchTrainer):
        def _create_default_callbacks(self) -> list[Any]:
            return [*super()._create_default_callbacks(), Announce(config["control"])]

    gpu = config["gpu"]
    if gpu:
        env.pop("DS_ACCELERATOR", None)
    attempt = f"{name}-{secrets.token_hex(4)}"  # Ray Train continues an old folder of the same name
    where = os.path.abspath(storage_path)
    trainer = Trainer(
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


class _Orders:
    """Gives the ranks the first reason there is to stop: the user's, a machine about to go, room for more of them."""

    def __init__(
        self, control: Any, stop: StopFlag, around: Surroundings, grow: Callable[[int], bool] | None
    ) -> None:
        self.reason: str | None = None
        self._control, self._stop, self._around, self._grow = control, stop, around, grow
        self._here = own_node()

    def look(self, nodes: frozenset[str]) -> None:
        """To be called often. `nodes`: where the ranks are."""
        if self.reason is not None:
            return
        if self._stop.reason is not None:
            self._give(self._stop.reason, self._stop.deadline)
            return
        seen = self._around.seen
        if seen is None or not nodes:
            return
        leaving = [seen.leaving[node] for node in (nodes | {self._here}) & seen.leaving.keys()]
        if leaving:
            self._give("PREEMPTED", min((when for when in leaving if when is not None), default=None))
        elif self._grow is not None and self._grow(seen.room):
            self._give("RESIZED", None)

    def room(self) -> int | None:
        """How many workers the machines hold; None until somebody has answered."""
        return self._around.seen.room if self._around.seen else None

    def _give(self, reason: str, deadline: float | None) -> None:
        self.reason = reason
        self._control.order.remote(Orders(reason=reason, deadline=deadline))


def _wait(
    run: _Run,
    control: Any,
    workers: int,
    orders: _Orders,
    watch: Watch | None,
    on_progress: Callable[[dict[str, Any]], None] | None,
) -> Stuck | None:
    """Until the group has ended, or is stuck."""
    shown, joined_by, nodes, slow = None, time.monotonic() + _JOIN_S, frozenset[str](), set[int]()
    room_since = time.monotonic()  # when there was last room for all
    while not run.done.wait(_LOOK_EVERY_S):
        orders.look(nodes)
        view: View | None = _ask(control.look.remote(), timeout_s=1.0)
        if view is None:
            continue
        nodes = view.nodes
        if watch and watch.on_slow and (new := view.slow.keys() - slow):
            slow |= new
            _tell_slow(control, {rank: view.slow[rank] for rank in sorted(new)}, watch.on_slow)
        if on_progress is not None and view.progress is not None and view.progress != shown:
            shown = view.progress
            on_progress(shown)
        if watch and view.stuck:
            return view.stuck
        room = orders.room()
        if view.joined >= workers or room is None or room >= workers:
            room_since = time.monotonic()
        elif time.monotonic() - room_since > _NO_ROOM_S:  # Ray Train would wait for ever
            raise MachineLost(f"the ranks cannot start: the machines that are there hold {room} of {workers} workers")
        if watch and view.joined < workers and time.monotonic() > joined_by:
            raise ClusterError(f"only {view.joined} of {workers} workers have started in {_JOIN_S:.0f} s")
    if on_progress is not None and run.error is None:
        view = _ask(control.look.remote())
        if view is not None and view.progress is not None and view.progress != shown:
            on_progress(view.progress)
    return None


def _abort(run: _Run, control: Any) -> None:
    """Wait for Ray Train to see that its ranks are gone; where it goes on trying, end it."""
    import ray

    if not run.done.wait(_ABORT_WAIT_S / 2) and (controller := _ask(control.controller.remote())):
        ray.kill(controller)
        release_room()
    run.done.wait(_ABORT_WAIT_S / 2)


def _tell_slow(control: Any, slow: Mapping[int, float], tell: Callable[[int, str, float], None]) -> None:
    ranks: Mapping[int, About] = _ask(control.ranks.remote()) or {}
    for rank, ratio in slow.items():
        tell(rank, ranks[rank].host if rank in ranks else "?", ratio)


def _end_stuck(
    stuck: Stuck, control: Any, ranks: Mapping[int, About], run: _Run, watch: Watch
) -> WorkerHung | MachineLost:
    """Have all ranks that can write down where they are, and kill them. Returns what to raise."""
    control.order.remote(Orders(stacks=watch.stacks))
    missing = {f"rank-{rank}.txt" for rank in ranks if not (stuck.silent and rank in stuck.ranks)}
    ends = time.monotonic() + _STACKS_S
    while missing and time.monotonic() < ends and not run.done.is_set():
        time.sleep(_LOOK_EVERY_S)
        missing -= set(os.listdir(watch.stacks)) if os.path.isdir(watch.stacks) else set()
    culprits = [ranks[rank] for rank in stuck.ranks if rank in ranks]
    where = ", ".join(f"process {about.pid} on {about.host}{state_of(about)}" for about in culprits[:4])
    lost = kill(ranks)
    _abort(run, control)
    lost |= {about.node for about in ranks.values()} - (nodes_alive() or {about.node for about in ranks.values()})
    if stuck.silent and any(about.node in lost for about in culprits):
        return MachineLost(f"{stuck} ({where}): its machine does not answer")
    return WorkerHung(f"{stuck} ({where}); stacks in {watch.stacks}")


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
    runtime = ray.get_runtime_context()
    about = About(
        pid=os.getpid(),
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
    interval = _LOOK_EVERY_S if rank == 0 else config["poll_s"]
    try:
        with Link(context, lambda word: ray.get(control.exchange.remote(rank, word)), interval):
            return config["fn"](context, config["payload"])
    except BaseException as error:  # noqa: BLE001  it is raised again, made portable
        if SECONDARY.search(str(error)):
            time.sleep(_SECONDARY_WAIT_S)  # let the controller see the first cause
        raise portable(error, f"rank {rank}") from None
    finally:
        control.leave.remote(rank)
