"""What a run's driver asks of the cluster: room, and a group of ranks."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cluster import storage
from cluster.stop import StopFlag
from cluster.worker import WorkerContext
from trainer.config_train import TrainConfig
from trainer.folder import RunFolder

if TYPE_CHECKING:
    from cluster.direction import Watch
    from cluster.surroundings import Seen


_SHARED_WAIT_S = 30.0  # a network file system may show an old state for so long


@dataclass(frozen=True, kw_only=True)
class TrainOutcome:
    """How a run ended: `stopped` is the reason of an early stop (SIGINT, SIGTERM) or None when it is complete."""

    folder: str
    step: int
    stopped: str | None = None

    @property
    def weights(self) -> str:
        """Folder of the exported network."""
        return RunFolder(self.folder).weights


def look(config: TrainConfig) -> Seen:
    """How many of its workers the machines hold."""
    from cluster.surroundings import look_around

    return look_around(config.cluster.threads, config.cluster.use_gpu)


def leaves_here() -> bool:
    """Whether the driver's own machine is about to go: then another driver has to go on, on another one."""
    from cluster.runtime import own_node
    from cluster.surroundings import leaving_nodes

    return own_node() in leaving_nodes()


def run_ranks(
    config: TrainConfig,
    workers: int,
    checkpoint: str | None,
    watch: Watch,
    grow: Callable[[int], bool] | None,
    on_progress: Callable[[Mapping[str, Any]], None] | None,
    stop: StopFlag,
) -> TrainOutcome:
    """Start the worker group and wait for its end."""
    from cluster.group import run_group

    cluster = config.cluster
    result = run_group(
        on_rank,
        {
            "config": config.model_dump(mode="json"), "folder": config.folder, "attempt": attempt_of(config),
            "checkpoint": checkpoint,
        },
        address=cluster.address,
        workers=workers,
        use_gpu=cluster.use_gpu,
        threads_per_worker=cluster.threads,
        name=config.name,
        storage_path=config.folder,
        watch=watch,
        grow=grow,
        on_progress=on_progress,
        stop=stop,
    )
    return TrainOutcome(folder=config.folder, step=result.value["step"], stopped=result.value["stopped"])


def attempt_of(config: TrainConfig) -> str:
    """What the driver has just written into environment.json, to be found there by every rank."""
    return str(json.loads(storage.read_bytes(RunFolder(config.folder).environment))["attempt"])


def on_rank(context: WorkerContext, payload: Mapping[str, Any]) -> dict[str, Any]:
    """What Ray calls on every rank. The driver itself imports none of the rank's libraries."""
    require_shared(RunFolder(payload["folder"]), payload["attempt"])
    from trainer.worker import train_worker

    return train_worker(context, payload)


def require_shared(run: RunFolder, attempt: str) -> None:
    """StorageError unless this rank sees what the driver has just written: its checkpoints must go to one folder."""
    ends = time.monotonic() + _SHARED_WAIT_S
    path = run.environment
    while not storage.exists(path) or json.loads(storage.read_bytes(path)).get("attempt") != attempt:
        if time.monotonic() > ends:
            raise storage.StorageError(
                f"{path}: is not there, or of another attempt, on {platform.node()}; runs must be a folder that all "
                "machines of the cluster share"
            )
        time.sleep(_SHARED_WAIT_S / 30)
