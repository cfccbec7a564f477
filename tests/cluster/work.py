"""Functions that the group's and the pool's tests run in workers: a module, so that they travel by name."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from cluster.worker import WorkerContext


class OddError(ValueError):
    """An exception whose constructor does not take what pickle gives it."""

    exit_status = 2

    def __init__(self, left: str, right: str) -> None:
        super().__init__(f"{left} and {right}")


class UserError(ValueError):
    exit_status = 2


def add_ranks(context: WorkerContext, payload: dict[str, Any]) -> dict[str, Any]:
    import torch
    import torch.distributed as dist

    value = torch.tensor([float(context.rank + 1)])
    dist.all_reduce(value)
    for step in range(payload.get("steps", 1)):
        context.report({"step": step, "rank": context.rank})
        time.sleep(payload.get("sleep_s", 0.0))
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "CROSS_RANK", "CROSS_SIZE", "LOCAL_SIZE", "OMP_NUM_THREADS", "EXTRA")
    return {
        "sum": value.item(),
        "context": (context.rank, context.world_size, context.local_rank, context.device),
        "environment": {name: os.environ.get(name) for name in names},
        "threads": torch.get_num_threads(),
        "cwd": str(Path.cwd()),
        "gloo": os.environ.get("GLOO_SOCKET_IFNAME"),
    }


def fail(context: WorkerContext, payload: dict[str, Any]) -> None:
    import torch
    import torch.distributed as dist

    if context.rank == payload["rank"]:
        if payload["how"] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if payload["how"] == "odd":
            raise OddError("this", "that")
        raise UserError("field x: found 1, allowed 2")
    dist.all_reduce(torch.zeros(1))


def until_stopped(context: WorkerContext, payload: dict[str, Any]) -> dict[str, Any]:
    """Steps until all ranks agree to stop, then takes `save_s` seconds to save a file."""
    import torch
    import torch.distributed as dist

    steps, ends = 0, time.monotonic() + payload.get("limit_s", 60.0)
    while time.monotonic() < ends:
        steps += 1
        context.report({"step": steps})
        stopped = torch.tensor([float(context.stop_requested() is not None)])
        dist.all_reduce(stopped)
        if stopped.item():
            break
        time.sleep(0.05)
    time.sleep(payload.get("save_s", 0.0))
    Path(payload["folder"], f"saved-{context.rank}").write_text(str(steps))
    return {"steps": steps, "reason": context.stop_requested(), "deadline": context.deadline}


def ignore_stop(context: WorkerContext, payload: dict[str, Any]) -> None:
    context.report({"step": 1})
    time.sleep(60)


def hang(context: WorkerContext, payload: dict[str, Any]) -> str:
    """Ten steps; in the sixth, `rank` lies down while it waits for data."""
    import torch
    import torch.distributed as dist

    mark = Path(payload["folder"], f"pid-{context.rank}")
    mark.with_suffix(".new").write_text(str(os.getpid()))
    mark.with_suffix(".new").rename(mark)  # whoever sees it can read it
    for step in range(1, 11):
        context.beat(step, "data")
        if step == 6 and context.rank == payload["rank"]:
            lie_down(payload["how"])
        context.beat(step, "step")
        dist.all_reduce(torch.zeros(1))
        time.sleep(0.3)
    return "done"


def lie_down(how: str) -> None:
    if how == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(600)


class Worker:
    """A pool's object. Items: a number is doubled; others do as they say."""

    def __init__(self, folder: str = "") -> None:
        self._folder = folder

    def process(self, item: Any) -> Any:
        if item == "die once":
            mark = Path(self._folder, "died")
            if not mark.exists():
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return "survived"
        if item == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if item == "bad":
            raise UserError("item bad: found 1, allowed 2")
        if isinstance(item, float):
            time.sleep(item)
        return 2 * item


def broken_worker() -> Worker:
    raise UserError("weights: no such file")
