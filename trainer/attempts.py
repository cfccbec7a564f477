"""A run's attempts: the ranks are started, and started again from the newest whole checkpoint when they end too early.

What follows the end of an attempt is decided by `cluster.attempts`; here it is done, and written into the journal.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cluster import storage
from cluster.attempts import Ending, GiveUp, Kind, Policy, decide, fitting
from cluster.stop import StopFlag
from cluster.worker import WorkerContext
from trainer.checkpoint import CheckpointError, clean, find_checkpoint, step_of
from trainer.config_train import TrainConfig
from trainer.folder import RunFolder
from trainer.journal import Journal

if TYPE_CHECKING:
    from cluster.group import Watch

_LOOK_EVERY_S = 1.0

Report = Callable[[Mapping[str, Any]], None]


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


def run_attempts(
    config: TrainConfig,
    checkpoint: str | None,
    facts: Mapping[str, Any],
    on_progress: Report | None,
    stop: StopFlag,
    say: Callable[[str], None],
) -> TrainOutcome:
    """Train from `checkpoint` on, in as many attempts as it takes; returns when done or stopped.

    `facts` go into the journal with each. Raises what the last attempt raised, once no further one is worth it.
    """
    from cluster.group import Watch
    from cluster.runtime import ray_session

    run, journal, endings = RunFolder(config.folder), Journal(config.folder), list[Ending]()
    cluster, recovery = config.cluster, config.recovery
    policy = Policy(
        workers=cluster.workers,
        min_workers=recovery.min_workers or cluster.workers,
        max_failures=recovery.max_failures,
        max_preemptions=recovery.max_preemptions,
        capacity_wait_s=recovery.capacity_wait_s,
    )
    learned: dict[str, float] = {}
    workers = cluster.workers
    with ray_session(cluster.address, cpus=cluster.workers * cluster.threads):
        while True:
            attempt = len(endings) + 1
            watch = Watch(
                stacks=storage.join(run.path, "stacks", f"{attempt:03d}"),
                silence_s=recovery.silence_s,
                factor=recovery.hang_factor,
                shortest_s=recovery.hang_shortest_s,
                learned=learned,
            )
            journal.write("started", attempt=attempt, resume=checkpoint, workers=workers, **facts)
            try:
                told = telling(journal, attempt, on_progress, stop)
                outcome = run_ranks(config, workers, checkpoint, watch, told, stop)
            except BaseException as error:
                with suppress(storage.StorageError):  # a full disk must not hide what happened
                    journal.write("failed", attempt=attempt, error=f"{type(error).__name__}: {error}"[:2000])
                if not isinstance(error, Exception) or isinstance(error, CheckpointError):
                    raise
                clean(run.checkpoints)
                checkpoint = newest_checkpoint(run)
                step = step_of(os.path.basename(checkpoint)) if checkpoint else 0
                endings.append(ending_of(error, step))
                if stop.reason is not None:  # it was to end anyway
                    outcome = TrainOutcome(folder=config.folder, step=step, stopped=stop.reason)
                else:
                    decision = decide(endings, policy, wait_for_room(policy, config, stop))
                    if isinstance(decision, GiveUp):
                        if decision.because != endings[-1].reason:
                            error.add_note(decision.because)
                        raise
                    journal.write("recovering", attempt=attempt, because=decision.because, workers=decision.workers)
                    say(
                        f"{decision.because}; going on from step {step} with {decision.workers} workers"
                        + (f" in {decision.wait_s:.0f} s" if decision.wait_s else "")
                    )
                    workers = decision.workers
                    if not stop.wait(decision.wait_s):
                        continue
                    outcome = TrainOutcome(folder=config.folder, step=step, stopped=stop.reason)
            journal.write("stopped" if outcome.stopped else "finished", step=outcome.step, reason=outcome.stopped)
            return outcome


def telling(journal: Journal, attempt: int, on_progress: Report | None, stop: StopFlag) -> Report:
    """`on_progress`, and the journal's entries for the first step and for a stop that is under way."""
    told = set[str]()

    def tell(event: str, **facts: Any) -> None:
        if event not in told:
            told.add(event)
            with suppress(storage.StorageError):  # a full disk is no reason to end
                journal.write(event, attempt=attempt, **facts)

    def report(progress: Mapping[str, Any]) -> None:
        tell("running")
        if stop.reason is not None:
            tell("stopping", reason=stop.reason)
        if on_progress:
            on_progress(progress)

    return report


def ending_of(error: Exception, step: int) -> Ending:
    """What an attempt's exception means. `step`: of the newest whole checkpoint now."""
    from cluster.failures import MachineLost, WorkerDied, WorkerHung

    kinds: dict[type[Exception], Kind] = {WorkerDied: "died", WorkerHung: "hung", MachineLost: "lost"}
    kind: Kind = next((kind for cause, kind in kinds.items() if isinstance(error, cause)), "failed")
    hopeless = getattr(error, "exit_status", 1) == 2 or getattr(error, "hopeless", False)
    return Ending(kind=kind, step=step, reason=f"{error}".splitlines()[0], hopeless=hopeless)


def wait_for_room(policy: Policy, config: TrainConfig, stop: StopFlag) -> int:
    """How many workers fit into the cluster, once enough do or the wait for that is over."""
    from cluster.group import room

    ends = time.monotonic() + policy.capacity_wait_s
    while True:
        capacity = room(config.cluster.threads, config.cluster.use_gpu)
        if fitting(policy, capacity) is not None or time.monotonic() > ends or stop.wait(_LOOK_EVERY_S):
            return capacity


def newest_checkpoint(run: RunFolder) -> str | None:
    """The newest whole one; those passed over are told. Raises CheckpointError when there are some, and none whole."""
    checkpoint, passed = find_checkpoint(run.checkpoints)
    for line in passed:
        Journal(run.path).write("checkpoint_passed_over", problem=line)
        print(f"passed over {line}", file=sys.stderr)
    if passed and not checkpoint:
        raise CheckpointError(
            f"{run.checkpoints}: none of {len(passed)} is whole ({passed[0]}); restore one, or move them away "
            "to start from step 0"
        )
    return checkpoint


def run_ranks(
    config: TrainConfig,
    workers: int,
    checkpoint: str | None,
    watch: Watch,
    on_progress: Callable[[Mapping[str, Any]], None] | None,
    stop: StopFlag,
) -> TrainOutcome:
    """Start the worker group and wait for its end."""
    from cluster.group import run_group

    cluster = config.cluster
    result = run_group(
        on_rank,
        {"config": config.model_dump(mode="json"), "checkpoint": checkpoint, "attempt": attempt_of(config)},
        address=cluster.address,
        workers=workers,
        use_gpu=cluster.use_gpu,
        threads_per_worker=cluster.threads,
        name=config.name,
        storage_path=config.folder,
        watch=watch,
        on_progress=on_progress,
        stop=stop,
    )
    return TrainOutcome(folder=config.folder, step=result.value["step"], stopped=result.value["stopped"])


def attempt_of(config: TrainConfig) -> str:
    """What the driver has just written into environment.json, to be found there by every rank."""
    return str(json.loads(storage.read_bytes(RunFolder(config.folder).environment))["attempt"])


def on_rank(context: WorkerContext, payload: Mapping[str, Any]) -> dict[str, Any]:
    """What Ray calls on every rank. The driver itself imports none of the rank's libraries."""
    from trainer.worker import train_worker

    return train_worker(context, payload)
