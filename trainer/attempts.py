"""A run's attempts: the ranks are started, and started again from the newest whole checkpoint when they end too early.

What follows the end of an attempt is decided by `cluster.attempts`; here it is done, and written into the journal. A
driver that was killed finds there what its successor has to know (trainer/history.py).
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from cluster import storage
from cluster.announce import announced_nodes
from cluster.attempts import Ending, GiveUp, Kind, Policy, decide, fitting, reason_of, worth_growing
from cluster.stop import StopFlag
from cluster.surroundings import Seen
from trainer.checkpoint import CheckpointError, clean, find_checkpoint, list_checkpoints, remove, step_of
from trainer.config import dump_config
from trainer.config_train import TrainConfig
from trainer.divergence import TrainingDiverged
from trainer.ends import CheckpointLost, OutOfMemory
from trainer.folder import RunFolder
from trainer.history import history_of
from trainer.journal import Journal
from trainer.ranks import TrainOutcome, leaves_here, look, run_ranks

_LOOK_EVERY_S = 1.0
_SETTLE_S = 5.0  # for Ray to count as free what an attempt that has ended used

Report = Callable[[Mapping[str, Any]], None]


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

    cpus = config.cluster.workers * config.cluster.threads
    with ray_session(config.cluster.address, cpus=cpus) as session, announced_nodes(RunFolder(config.folder).telemetry):
        return Attempts(config, checkpoint, facts, on_progress, stop, say, alone=session.embedded).run()


class Attempts:
    """The row of one run's attempts: what is next, what has been, and how the last one ended. `alone`: on a Ray of its
    own, to which no machine comes and of which none goes."""

    def __init__(
        self,
        config: TrainConfig,
        checkpoint: str | None,
        facts: Mapping[str, Any],
        on_progress: Report | None,
        stop: StopFlag,
        say: Callable[[str], None],
        *,
        alone: bool = True,
    ) -> None:
        self.config, self.facts, self.on_progress, self.stop, self.say = config, facts, on_progress, stop, say
        self.folder, self.journal, self.alone = RunFolder(config.folder), Journal(config.folder), alone
        self.policy = policy_of(config)
        self.checkpoint, self.workers = checkpoint, config.cluster.workers
        past = history_of(self.journal.read())
        self.attempt, self.endings, self.rollbacks = past.attempt, [*past.endings], [*past.rollbacks]
        self.began = past.ran  # ranks have been at work: what they need is there
        self.learned: dict[str, float] = {}
        self._noted = True

    def run(self) -> TrainOutcome:
        """All of them. Raises what the last one raised, once no further one is worth it."""
        try:
            if not self.alone:  # machines may join still
                self.wait_for_machines()
            while True:
                outcome = self.once()
                if outcome is not None:
                    return outcome
        except KeyboardInterrupt:
            self.note("stopped", attempt=self.attempt, step=self.step(), reason="SIGINT")
            raise
        except BaseException as error:
            self.note("gave_up", attempt=self.attempt, because=reason_of(error))
            raise

    def wait_for_machines(self) -> None:
        """Until the cluster has room. Raises ClusterAddressError when that takes too long."""
        from cluster.runtime import ClusterAddressError

        seen = self.wait_for_room()
        workers = fitting(self.policy, seen.room)
        if workers is None and self.stop.reason is None:
            cluster = self.config.cluster
            gpu = " and a GPU" if cluster.use_gpu else ""
            others = f" ({seen.most} if nobody else used it)" if seen.most > seen.room else ""
            raise ClusterAddressError(
                f"the cluster has room for {seen.room} workers of {cluster.threads} CPUs{gpu}{others}, "
                f"{self.policy.min_workers} are needed: use fewer workers (cluster.workers, recovery.min_workers) or "
                "threads, wait longer (recovery.capacity_wait_s), or use a larger cluster"
            )
        self.workers = workers or self.workers

    def wait_for_room(self) -> Seen:
        """How many workers there is room for, once there is enough or the wait for that is over."""
        policy = self.policy
        began = time.monotonic()
        told = False
        while True:
            seen, why = self.seen()
            waited_s = time.monotonic() - began
            fits = fitting(policy, seen.room)
            if fits is not None and (fits == fitting(policy, seen.most) or waited_s >= _SETTLE_S):
                return seen
            if fits is None and not told and waited_s >= min(_SETTLE_S, policy.capacity_wait_s / 2):
                told = True
                need = f"room for {policy.min_workers} workers"
                self.say(f"waiting up to {policy.capacity_wait_s:.0f} s for {need}; {why}")
                self.note("pending", attempt=self.attempt, reason=f"waits for {need}")
            if waited_s >= policy.capacity_wait_s or self.stop.wait(_LOOK_EVERY_S):
                return seen

    def seen(self) -> tuple[Seen, str]:
        """A look at the cluster, and what it says. One that does not answer has no room for now."""
        try:
            seen = look(self.config)
        except Exception as error:  # noqa: BLE001  Ray raises this and that while its control store is away
            return Seen(), f"the cluster does not answer ({reason_of(error)})"
        return seen, f"there is room for {seen.room}"

    def leaves(self) -> bool:
        """Whether the driver's own machine is about to go, as far as anybody says."""
        with suppress(Exception):
            return leaves_here()
        return False

    def note(self, event: str, **facts: Any) -> None:
        """Into the journal. A full disk is no reason to end: the journal says less then, the checkpoints say enough."""
        try:
            self.journal.write(event, **facts)
        except storage.StorageError as error:
            if self._noted:  # told once
                self.say(f"warning: the journal lacks {event!r} and maybe more: {error}")
            self._noted = False

    def once(self) -> TrainOutcome | None:
        """One attempt. Returns how the run ended, or None when another one follows; raises when none is worth it."""
        if self.stop.reason is not None:
            return self.ended(self.stopped_by(self.stop.reason))
        if self.leaves():
            return self.ended(self.stopped_by("PREEMPTED"))  # whoever started it starts it again elsewhere
        self.attempt += 1
        self.note("started", attempt=self.attempt, resume=self.checkpoint, workers=self.workers, **self.facts)
        try:
            outcome = self.ranks()
        except Exception as error:  # noqa: BLE001  what it means is for `decide` to say
            return self.failed(error)
        finally:
            self.folder.forget_ranks()
        if outcome.stopped and (asked := self.asked()):  # whatever the ranks were told first
            return self.ended(replace(outcome, stopped=asked))
        if outcome.stopped == "RESIZED":
            self.look_back()
            self.workers = fitting(self.policy, self.wait_for_room().room) or self.workers
            self.note("resizing", attempt=self.attempt, step=outcome.step, workers=self.workers)
            self.say(f"there is room again; going on from step {outcome.step} with {self.workers} workers")
            return None
        if outcome.stopped == "PREEMPTED":
            step = self.look_back()
            reason = "a machine is about to go away"
            self.note("preempted", attempt=self.attempt, step=step, reason=reason)
            return self.after(Ending(kind="preempted", step=step, reason=reason), None)
        return self.ended(outcome)

    def asked(self) -> str | None:
        """Why the run is to stop, if it is."""
        return self.stop.reason

    def failed(self, error: Exception) -> TrainOutcome | None:
        """What follows an attempt that raised: None, another one; raises when none is worth it."""
        told = f"{type(error).__name__}: {error}"[:2000]
        try:
            if isinstance(error, CheckpointError):
                raise error
            ending = self.ending_of(error)
        except CheckpointError:  # the ranks refuse it, or none that is left is whole
            self.note("failed", attempt=self.attempt, error=told)
            raise
        self.note("failed", attempt=self.attempt, error=told, kind=ending.kind, step=ending.step)
        if isinstance(error, TrainingDiverged) and self.stop.reason is None and self.rolled_back(error):
            return None
        return self.after(ending, error)

    def ending_of(self, error: Exception) -> Ending:
        """What an attempt's exception means: whose fault it is, and whether trying again is of any use."""
        from cluster.failures import MachineLost, WorkerDied, WorkerHung
        from cluster.runtime import ClusterAddressError

        kinds: dict[type[Exception], Kind] = {
            WorkerDied: "died", WorkerHung: "hung", MachineLost: "lost",
        }  # fmt: skip
        kind: Kind = next((kind for cause, kind in kinds.items() if isinstance(error, cause)), "failed")
        hopeless = getattr(error, "exit_status", 1) == 2 or getattr(error, "hopeless", False)
        if isinstance(error, ClusterAddressError) and not self.alone:  # a machine went while this was being started
            kind, hopeless = "lost", False
        elif isinstance(error, storage.StorageError) and self.began:  # it was there
            kind, hopeless = "away", False
        elif isinstance(error, OutOfMemory) and self.workers < self.config.cluster.workers:
            # each of few workers has more to hold: wait for more of them
            kind, hopeless = "lost", False
            why = f"{self.workers} ran out of memory"
            self.policy = replace(self.policy, min_workers=self.workers + 1, why_so_many=why)
        return Ending(kind=kind, step=self.look_back(), reason=reason_of(error), hopeless=hopeless)

    def ranks(self) -> TrainOutcome:
        """Start the worker group and wait for its end."""
        from cluster.direction import Watch

        recovery = self.config.recovery
        watch = Watch(
            stacks=storage.join(self.folder.path, "stacks", f"{self.attempt:03d}"),
            silence_s=recovery.silence_s,
            factor=recovery.hang_factor,
            shortest_s=recovery.hang_shortest_s,
            learned=self.learned,
            on_slow=self.slow,
            on_event=self.saw,
        )
        fewer = self.workers < self.policy.workers
        grow = Growth(self.workers, self.policy, recovery.grow_patience_s) if fewer else None
        return run_ranks(self.config, self.workers, self.checkpoint, watch, grow, self.on_progress, self.stop)

    def saw(self, event: str, facts: Mapping[str, Any]) -> None:
        """The ranks are at work, or were told to stop."""
        self.began = True
        self.note(event, attempt=self.attempt, **facts)

    def slow(self, rank: int, host: str, ratio: float) -> None:
        """A straggler, named once an attempt: its machine is worth a look."""
        self.note("straggler", attempt=self.attempt, rank=rank, host=host, slowdown=round(ratio, 2))
        self.say(f"rank {rank} on {host} needs {ratio:.1f} times as long as the median rank; all wait for it")

    def after(self, ending: Ending, error: Exception | None) -> TrainOutcome | None:
        """Decide what follows an end that nobody wanted. `error`: what it raised, if anything."""
        self.endings.append(ending)
        if error is not None and (ending.hopeless or isinstance(error, CheckpointLost)):
            raise error
        room = 0 if self.asked() or self.leaves() else self.wait_for_room().room
        if asked := self.asked():  # it was to end anyway
            if error is not None:
                self.say(f"{ending.reason}; ending at step {ending.step}, the newest checkpoint's")
            return self.ended(self.stopped_by(asked))
        if self.leaves():
            return self.ended(self.stopped_by("PREEMPTED"))
        decision = decide(self.endings, self.policy, room)
        if isinstance(decision, GiveUp):
            if error is None:  # saved in time: somebody goes on with it elsewhere
                return self.ended(self.stopped_by("PREEMPTED"))
            if decision.because != ending.reason:
                error.add_note(decision.because)
            raise error
        self.note(
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
        if self.rollbacks and error.first_step > self.rollbacks[-1]:  # it had got past the last one
            self.rollbacks.clear()
        if len(self.rollbacks) >= recovery.max_rollbacks:
            times = f"{len(self.rollbacks)} times without getting past step {max(self.rollbacks, default=0)}"
            error.add_note(f"went back {times}; recovery.max_rollbacks is {recovery.max_rollbacks}")
            return False
        clean(self.folder.checkpoints)
        found = list_checkpoints(self.folder.checkpoints)
        late = [name for name in found if step_of(name) >= error.first_step]
        if len(late) == len(found) and had_checkpoint_before(error.first_step, self.journal.read()):
            error.add_note(f"no checkpoint from before step {error.first_step} is left; raise checkpoint.keep")
            return False
        remove(self.folder.checkpoints, late)
        self.rollbacks.append(error.step)
        self.endings.clear()  # their steps are not there any more
        step = self.look_back()
        self.config = passing_over(self.config, [error.skip])
        try:
            storage.atomic_write(self.folder.config, dump_config(self.config))
        except storage.StorageError as problem:
            error.add_note(f"went back to step {step}, but could not note which samples to pass over: {problem}")
            return False
        self.note(
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
        clean(self.folder.checkpoints)
        self.checkpoint = newest_checkpoint(self.folder)
        return self.step()

    def step(self) -> int:
        """Of the checkpoint from which the next attempt starts."""
        return step_of(os.path.basename(self.checkpoint)) if self.checkpoint else 0

    def ended(self, outcome: TrainOutcome) -> TrainOutcome:
        """Write the run's end down."""
        self.note("stopped" if outcome.stopped else "finished", step=outcome.step, reason=outcome.stopped)
        return outcome

    def stopped_by(self, reason: str) -> TrainOutcome:
        """An end at the newest checkpoint."""
        return TrainOutcome(folder=self.folder.path, step=self.step(), stopped=reason)


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


def had_checkpoint_before(step: int, journal: Iterable[Mapping[str, Any]]) -> bool:
    """Whether the run's way to where it is had one from before `step`, which may have made room since. Pure."""
    had = False
    for line in journal:
        if line.get("event") == "rolled_back":  # to there, or to the very beginning
            had = 0 < int(line["step"]) < step
        elif line.get("event") == "checkpoint":
            had = had or int(line["step"]) < step
    return had


def newest_checkpoint(run: RunFolder) -> str | None:
    """The newest whole one; those passed over are told. Raises CheckpointError when there are some, and none whole."""
    checkpoint, passed = find_checkpoint(run.checkpoints)
    for line in passed:
        with suppress(storage.StorageError):
            Journal(run.path).write("checkpoint_passed_over", problem=line)
        print(f"passed over {line}", file=sys.stderr)
    if passed and not checkpoint:
        raise CheckpointError(
            f"{run.checkpoints}: none of {len(passed)} is whole ({passed[0]}); restore one, or move them away "
            "to start from step 0"
        )
    return checkpoint
