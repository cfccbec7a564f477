"""A run's attempts: the ranks are started, and started again from the newest whole checkpoint when they end too early.

What follows the end of an attempt is decided by `cluster.attempts`; here it is done, and written into the journal.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from cluster import storage
from cluster.attempts import Ending, GiveUp, Kind, Policy, decide, fitting, worth_growing
from cluster.stop import StopFlag
from cluster.worker import WorkerContext
from trainer.checkpoint import CheckpointError, clean, find_checkpoint, list_checkpoints, step_of
from trainer.config import dump_config
from trainer.config_train import TrainConfig
from trainer.divergence import TrainingDiverged
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
    from cluster.runtime import ray_session

    with ray_session(config.cluster.address, cpus=config.cluster.workers * config.cluster.threads) as session:
        attempts = Attempts(config, checkpoint, facts, on_progress, stop, say)
        if not session.embedded:  # machines may join still
            attempts.wait_for_machines()
        while True:
            outcome = attempts.once()
            if outcome is not None:
                return outcome


class Attempts:
    """The row of one run's attempts: what is next, what has been, and how the last one ended."""

    def __init__(
        self,
        config: TrainConfig,
        checkpoint: str | None,
        facts: Mapping[str, Any],
        on_progress: Report | None,
        stop: StopFlag,
        say: Callable[[str], None],
    ) -> None:
        self.config, self.facts, self.on_progress, self.stop, self.say = config, facts, on_progress, stop, say
        self.run, self.journal = RunFolder(config.folder), Journal(config.folder)
        self.policy = policy_of(config)
        self.checkpoint, self.workers, self.attempt = checkpoint, config.cluster.workers, 0
        self.endings: list[Ending] = []
        self.rollbacks = 0
        self.learned: dict[str, float] = {}

    def wait_for_machines(self) -> None:
        """Until the cluster has room. Raises ClusterAddressError when that takes too long."""
        from cluster.runtime import ClusterAddressError

        policy = self.policy
        if fitting(policy, room(self.config)) is None:
            need = f"room for {policy.min_workers} workers"
            self.say(f"waiting up to {policy.capacity_wait_s:.0f} s for {need}")
            self.journal.write("pending", reason=f"waits for {need}")
        capacity = wait_for_room(policy, self.config, self.stop)
        workers = fitting(policy, capacity)
        if workers is None and self.stop.reason is None:
            raise ClusterAddressError(
                f"the cluster has room for {capacity} workers of {self.config.cluster.threads} CPUs"
                f"{' and a GPU' if self.config.cluster.use_gpu else ''}, {policy.min_workers} are needed: use fewer "
                "workers (cluster.workers, recovery.min_workers) or threads, or a larger cluster"
            )
        self.workers = workers or self.workers

    def once(self) -> TrainOutcome | None:
        """One attempt. Returns how the run ended, or None when another one follows; raises when none is worth it."""
        if self.stop.reason is not None:
            return self.ended(TrainOutcome(folder=self.run.path, step=self.step(), stopped=self.stop.reason))
        self.attempt += 1
        self.journal.write(
            "started", attempt=self.attempt, resume=self.checkpoint, workers=self.workers, **self.facts
        )
        try:
            outcome = self.ranks()
        except BaseException as error:
            with suppress(storage.StorageError):  # a full disk must not hide what happened
                self.journal.write("failed", attempt=self.attempt, error=f"{type(error).__name__}: {error}"[:2000])
            if not isinstance(error, Exception) or isinstance(error, CheckpointError):
                raise
            if isinstance(error, TrainingDiverged) and self.stop.reason is None and self.rolled_back(error):
                return None
            return self.after(ending_of(error, self.look_back()), error)
        if outcome.stopped == "RESIZED" and self.stop.reason is None:
            self.look_back()
            self.workers = fitting(self.policy, room(self.config)) or self.workers
            self.journal.write("resizing", attempt=self.attempt, step=outcome.step, workers=self.workers)
            self.say(f"there is room again; going on from step {outcome.step} with {self.workers} workers")
            return None
        if outcome.stopped == "PREEMPTED" and self.stop.reason is None:
            self.journal.write("preempted", attempt=self.attempt, step=outcome.step)
            reason = "a machine is about to go away"
            return self.after(Ending(kind="preempted", step=self.look_back(), reason=reason), None)
        return self.ended(outcome)

    def ranks(self) -> TrainOutcome:
        """Start the worker group and wait for its end."""
        from cluster.group import Watch

        recovery = self.config.recovery
        watch = Watch(
            stacks=storage.join(self.run.path, "stacks", f"{self.attempt:03d}"),
            silence_s=recovery.silence_s,
            factor=recovery.hang_factor,
            shortest_s=recovery.hang_shortest_s,
            learned=self.learned,
            on_slow=self.slow,
        )
        told = telling(self.journal, self.attempt, self.on_progress, self.stop)
        fewer = self.workers < self.policy.workers
        grow = Growth(self.workers, self.policy, recovery.grow_patience_s) if fewer else None
        return run_ranks(self.config, self.workers, self.checkpoint, watch, grow, told, self.stop)

    def slow(self, rank: int, host: str, ratio: float) -> None:
        """A straggler, named once an attempt: its machine is worth a look."""
        with suppress(storage.StorageError):  # a full disk is no reason to end
            self.journal.write("straggler", attempt=self.attempt, rank=rank, host=host, slowdown=round(ratio, 2))
        self.say(f"rank {rank} on {host} needs {ratio:.1f} times as long as the median rank; all wait for it")

    def after(self, ending: Ending, error: Exception | None) -> TrainOutcome | None:
        """Decide what follows an end that nobody wanted. `error`: what it raised, if anything."""
        self.endings.append(ending)
        if self.stop.reason is not None:  # it was to end anyway
            return self.ended(TrainOutcome(folder=self.run.path, step=ending.step, stopped=self.stop.reason))
        decision = decide(self.endings, self.policy, wait_for_room(self.policy, self.config, self.stop))
        if isinstance(decision, GiveUp):
            if error is None:  # saved in time: somebody goes on with it elsewhere
                return self.ended(TrainOutcome(folder=self.run.path, step=ending.step, stopped="PREEMPTED"))
            if decision.because != ending.reason:
                error.add_note(decision.because)
            raise error
        self.journal.write(
            "recovering", attempt=self.attempt, because=decision.because, workers=decision.workers, step=ending.step
        )
        self.say(
            f"{decision.because}; going on from step {ending.step} with {decision.workers} workers"
            + (f" in {decision.wait_s:.0f} s" if decision.wait_s else "")
        )
        self.workers = decision.workers
        self.stop.wait(decision.wait_s)
        return None

    def rolled_back(self, error: TrainingDiverged) -> bool:
        """React to training that went astray as configured: whether it goes on from before, without those samples."""
        recovery = self.config.recovery
        if (recovery.on_spike if error.what == "spike" else recovery.on_non_finite) != "roll_back":
            return False
        if self.rollbacks >= recovery.max_rollbacks:
            error.add_note(f"went back {self.rollbacks} times; recovery.max_rollbacks is {recovery.max_rollbacks}")
            return False
        clean(self.run.checkpoints)
        late = [name for name in list_checkpoints(self.run.checkpoints) if step_of(name) >= error.first_step]
        early = len(list_checkpoints(self.run.checkpoints)) - len(late)
        every = self.config.checkpoint.every
        if not early and (every is None or error.first_step > every):
            error.add_note(f"no checkpoint from before step {error.first_step} is left; raise checkpoint.keep")
            return False
        for name in late:
            shutil.rmtree(storage.join(self.run.checkpoints, name))
        self.rollbacks += 1
        step = self.look_back()
        self.config = passing_over(self.config, [error.skip])
        storage.atomic_write(self.run.config, dump_config(self.config))
        self.journal.write(
            "rolled_back", attempt=self.attempt, why=error.what, noticed=error.step, step=step, removed=late,
            passed_over=list(error.skip), losses={str(step): loss for step, loss in error.losses.items()},
        )  # fmt: skip
        self.say(
            f"{str(error).splitlines()[0].partition(';')[0]}; going back to step {step}, and passing over the samples "
            f"{error.skip[0]}:{error.skip[1]} of the run's order"
        )
        return True

    def look_back(self) -> int:
        """Find the newest whole checkpoint, from which the next attempt starts; returns its step."""
        clean(self.run.checkpoints)
        self.checkpoint = newest_checkpoint(self.run)
        return self.step()

    def step(self) -> int:
        """Of the checkpoint from which the next attempt starts."""
        return step_of(os.path.basename(self.checkpoint)) if self.checkpoint else 0

    def ended(self, outcome: TrainOutcome) -> TrainOutcome:
        """Write the run's end down."""
        event = "stopped" if outcome.stopped else "finished"
        self.journal.write(event, step=outcome.step, reason=outcome.stopped)
        return outcome


@dataclass
class Growth:
    """Says when a group on `workers` ranks is to be started anew on more: asked with the room that there is."""

    workers: int
    policy: Policy
    patience_s: float
    _since: float | None = None  # when there was room for more, without a break

    def __call__(self, capacity: int) -> bool:
        if capacity <= self.workers:
            self._since = None
            return False
        now = time.monotonic()
        self._since = self._since if self._since is not None else now
        return worth_growing(self.workers, self.policy, capacity, now - self._since, self.patience_s)


def passing_over(config: TrainConfig, stretches: Iterable[tuple[int, int]]) -> TrainConfig:
    """The configuration with more stretches of samples that are passed over."""
    skip = tuple(sorted({*config.data.skip_samples, *stretches}))
    return config.model_copy(update={"data": replace(config.data, skip_samples=skip)})


def policy_of(config: TrainConfig) -> Policy:
    """What the configuration forgives."""
    cluster, recovery = config.cluster, config.recovery
    return Policy(
        workers=cluster.workers,
        min_workers=recovery.min_workers or cluster.workers,
        max_failures=recovery.max_failures,
        max_preemptions=recovery.max_preemptions,
        capacity_wait_s=recovery.capacity_wait_s,
    )


def room(config: TrainConfig) -> int:
    """How many of its workers the machines hold now."""
    from cluster.surroundings import look_around

    return look_around(config.cluster.threads, config.cluster.use_gpu).room


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
    reason = next(iter(str(error).splitlines()), type(error).__name__)
    return Ending(kind=kind, step=step, reason=reason, hopeless=hopeless)


def wait_for_room(policy: Policy, config: TrainConfig, stop: StopFlag) -> int:
    """How many workers fit into the cluster, once enough do or the wait for that is over."""
    ends = time.monotonic() + policy.capacity_wait_s
    while True:
        capacity = room(config)
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
    grow: Callable[[int], bool] | None,
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
    from trainer.worker import train_worker

    return train_worker(context, payload)
