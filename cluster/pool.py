"""A pool of actors that process items one by one, in any order: for work that fails and is retried item by item."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from cluster.failures import WorkerDied, portable
from cluster.group import require_resources
from cluster.runtime import ray_session
from cluster.stop import StopFlag

_LOOK_EVERY_S = 0.2
_RETRIES = 2  # an item whose actor died this often more than once is taken for the cause


class Processor(Protocol):
    """What `make` returns, inside an actor."""

    def process(self, item: Any) -> Any: ...


@dataclass(frozen=True)
class PoolResult:
    """`done` items were processed. `complete`: none is left; False after a stop."""

    done: int
    complete: bool


@dataclass
class _Task:
    actor: Any
    item: Any
    tries: int
    building: bool


class _Actor:
    """Holds one Processor. It is made in a call of its own, so that its exception comes back as one."""

    def __init__(self, make: Callable[[], Processor], threads: int) -> None:
        self._make, self._threads = make, threads
        self._processor: Processor | None = None

    def build(self) -> None:
        import torch

        torch.set_num_threads(self._threads)
        try:
            self._processor = self._make()
        except BaseException as error:  # noqa: BLE001  it is raised again, made portable
            raise portable(error, "a worker") from None

    def process(self, item: Any) -> Any:
        assert self._processor is not None
        try:
            return self._processor.process(item)
        except BaseException as error:  # noqa: BLE001  it is raised again, made portable
            raise portable(error, "a worker") from None


def run_pool(
    make: Callable[[], Processor],
    items: Iterable[Any],
    *,
    workers: int,
    on_result: Callable[[Any, Any], None],
    stop: StopFlag,
    address: str | None = None,
    threads_per_worker: int = 1,
    use_gpu: bool = False,
) -> PoolResult:
    """Process every item on one of `workers` actors built by `make()`; call it from the main thread.

    On the Ray cluster at `address`, or an embedded one, or that of the `ray_session` around.
    `on_result(item, result)` is called in this thread, in the order of completion. Items are taken as actors become
    free. After a stop request no item is taken, those in flight are finished. When an actor's process dies it is
    replaced and its item tried again, twice at most.

    Raises what `make` or `process` raised, with the worker's traceback as a note; WorkerDied; ClusterAddressError
    when the cluster is too small; KeyboardInterrupt at the second SIGINT. The actors are gone when it returns.
    """
    with ray_session(address, cpus=workers * threads_per_worker):
        require_resources(workers, threads_per_worker, use_gpu)
        pool = _Pool(make, items, threads_per_worker, use_gpu)
        try:
            return pool.run(workers, on_result, stop)
        finally:
            pool.close()


class _Pool:
    def __init__(self, make: Callable[[], Processor], items: Iterable[Any], threads: int, use_gpu: bool) -> None:
        self._make, self._threads, self._use_gpu = make, threads, use_gpu
        self._items: Iterator[Any] = iter(items)
        self._again: list[tuple[Any, int]] = []  # item, times tried
        self._idle: list[Any] = []
        self._tasks: dict[Any, _Task] = {}
        self._actors: list[Any] = []
        self._complete = False  # the iterator has ended

    def run(self, workers: int, on_result: Callable[[Any, Any], None], stop: StopFlag) -> PoolResult:
        import ray

        done = 0
        for _ in range(workers):
            self._build(None, 0)
        while True:
            while self._idle and stop.reason is None and self._feed():
                pass
            busy = [task for task in self._tasks.values() if not task.building]
            if not busy and (stop.reason is not None or (self._complete and not self._again)):
                return PoolResult(done=done, complete=self._complete and not self._again)
            ready, _ = ray.wait(list(self._tasks), timeout=_LOOK_EVERY_S) if self._tasks else ([], [])
            for reference in ready:
                task = self._tasks.pop(reference)
                try:
                    result = ray.get(reference)
                except ray.exceptions.RayTaskError as error:
                    raise error.cause from None
                except ray.exceptions.RayActorError as error:
                    self._replace(task, error)
                    continue
                self._idle.append(task.actor)
                if not task.building:
                    done += 1
                    on_result(task.item, result)

    def close(self) -> None:
        import ray

        for actor in self._actors:
            ray.kill(actor)

    def _feed(self) -> bool:
        """Give the next item to an idle actor; whether there was one."""
        if self._again:
            item, tries = self._again.pop(0)
        else:
            try:
                item, tries = next(self._items), 0
            except StopIteration:
                self._complete = True
                return False
        actor = self._idle.pop()
        self._tasks[actor.process.remote(item)] = _Task(actor, item, tries, building=False)
        return True

    def _build(self, item: Any, tries: int) -> None:
        import ray

        options: dict[str, Any] = {"num_cpus": self._threads, "max_restarts": 0}
        options |= {"num_gpus": 1} if self._use_gpu else {}
        variables = {"OMP_NUM_THREADS": str(self._threads)}
        actor = ray.remote(**options, runtime_env={"env_vars": variables})(_Actor).remote(self._make, self._threads)
        self._actors.append(actor)
        self._tasks[actor.build.remote()] = _Task(actor, item, tries, building=True)

    def _replace(self, task: _Task, error: BaseException) -> None:
        self._actors.remove(task.actor)
        if task.tries >= _RETRIES:
            what = "while starting" if task.building else f"on item {str(task.item)[:200]!r}"
            reason = " ".join(str(error).split())[:300]
            raise WorkerDied(f"a worker died {task.tries + 1} times {what}: killed, out of memory or crashed: {reason}")
        if not task.building:
            self._again.append((task.item, task.tries + 1))
        self._build(None, task.tries + 1 if task.building else 0)
