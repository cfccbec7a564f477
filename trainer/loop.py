"""The training loop. One step reads like the algorithm; what is particular to a task lives in trainer/tasks.

The gradient is that of   sum over terms of  weight * (sum over all images) / (number of all images with weight),
all of them over the *global* batch, however it was cut into ranks and micro-batches.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from cluster.stop import REASONS
from cluster.worker import WorkerContext
from dataio.types import Batch
from trainer.config_train import TrainConfig
from trainer.divergence import SpikeDetector, TrainingDiverged
from trainer.engine import Engine, StepResult
from trainer.schedule import factor
from trainer.tasks.base import Task
from trainer.timing import PhaseTimer

OWN_PHASES = ("forward", "loss")  # no other rank can hold these up, but for stage 3's gathering


@dataclass(kw_only=True)
class StepRecord:
    """What one step did. `terms` are this rank's parts of the global means; `Loop.global_terms` adds them up."""

    step: int
    terms: dict[str, Tensor]
    result: StepResult
    learning_rates: dict[str, float]
    images: int  # rows of the global batch, padding included
    bad_keys: tuple[str, ...] = ()  # this rank's suspects, when the step was skipped
    phases: dict[str, float] = field(default_factory=dict)  # seconds


class Hooks(Protocol):
    """What happens around the steps. Every method is called by all ranks at the same step."""

    def before_step(self, batch: Batch) -> None: ...

    def after_step(self, record: StepRecord, batch: Batch) -> None: ...

    def position(self, cursor: Mapping[str, int]) -> int:
        """Where in the run's order a cursor stands, in samples."""

    def flags(self) -> tuple[float, float, float]:
        """This rank's say in the next all-reduce: a checkpoint is due by the clock; the one under way is written; or
        it failed."""

    def agreed(self, due: bool, written: int, failed: int) -> None:
        """What all ranks said in the last step."""

    def checkpoint(self, *, last: bool, prune: bool = True) -> None:
        """Save; `last`: the run ends here, so wait until it is whole. `prune`: older ones make room as configured."""


@dataclass(kw_only=True)
class Loop:
    """Runs steps until `config.steps` or an agreed stop. `cursor` and `step` are what a checkpoint saves."""

    config: TrainConfig
    task: Task
    engine: Engine
    context: WorkerContext
    micro_batches: int
    step: int = 0
    cursor: Mapping[str, int] = field(default_factory=dict)
    skipped_in_a_row: int = 0
    spikes: SpikeDetector | None = None
    losses: Sequence[float | None] = ()  # of the last two steps, None where the detector has seen it
    began: Sequence[Sequence[Any]] = ()  # (step, cursor) of the last steps
    _said: Tensor | None = None  # sums over ranks of `_flags`, of the last step
    _loss: Tensor | None = None  # this rank's part of the last step's
    _seen: int = 0  # the last step whose loss the detector got
    _began: deque[tuple[int, Mapping[str, int]]] = field(default_factory=deque)

    def __post_init__(self) -> None:
        self.timer = PhaseTimer(self.engine.device)
        self._forward = self.timer.timed("forward", self.engine)
        rows = self.spikes.steps + self.config.recovery.spike_lead_steps if self.spikes else 0
        began = ((int(step), dict(cursor)) for step, cursor in self.began)
        self._began = deque(began, maxlen=max(rows, self.config.engine.max_skipped_steps) + 2)

    def run(self, batches: Iterator[Batch], hooks: Hooks) -> str | None:
        """Train; returns the reason of an early stop, agreed by all ranks, or None at the end."""
        before, last = self.losses or (None, None)
        self._loss = self._part(before)
        self._said = self._flags(hooks)  # somebody may have asked while the ranks were starting
        dist.all_reduce(self._said)
        self._loss = self._part(last)
        while self.step < self.config.steps:
            *flags, loss = self._said.tolist()
            *stops, due, written, failed = map(int, flags)
            if any(stops):
                hooks.checkpoint(last=True)
                return next(reason for reason, asked in zip(REASONS, stops, strict=True) if asked)
            self._seen = self.step - 1
            if self.spikes and self.spikes.see(self._seen, loss):  # it travelled with the last step's counts
                self.spiked(hooks, self.spikes)
            hooks.agreed(bool(due), written, failed)
            self._began.append((self.step + 1, self.cursor))
            self.context.beat(self.step + 1, "data")
            started = time.perf_counter()
            batch = next(batches)
            waited = time.perf_counter() - started
            self.context.beat(self.step + 1, "step")
            hooks.before_step(batch)
            record = self.train_step(batch, self._flags(hooks))
            record.phases["data_wait"] = waited
            own_s = waited + sum(record.phases.get(phase, 0.0) for phase in OWN_PHASES)
            self.context.own_work(own_s, len(batch))
            self.skipped_in_a_row = self.skipped_in_a_row + 1 if record.result.skipped else 0
            hooks.after_step(record, batch)
            if self.skipped_in_a_row >= self.config.engine.max_skipped_steps:
                self.give_up(hooks)
            every = self.config.checkpoint.every
            if every and self.step % every == 0 and self.step < self.config.steps:
                hooks.checkpoint(last=False)
        hooks.checkpoint(last=True)
        return None

    def train_step(self, batch: Batch, flags: Tensor | None = None) -> StepRecord:
        """One optimizer update from one global batch. Every rank must call it with its share of the same batch."""
        torch.manual_seed(step_seed(self.config.seed, self.step, self.context.rank))
        counts = self.global_counts(batch, flags)
        terms = {name: torch.zeros((), device=self.engine.device) for name in counts}
        weights = self.task.term_weights
        for index, micro in enumerate(cut(batch, self.micro_batches)):
            with self.timer("loss"), self.engine.autocast():
                sums = self.task.sums(self._forward, micro)
                means = {name: sums[name] / counts[name] for name in counts}
                loss = torch.stack([weights[name] * means[name] for name in counts]).sum()
            with self.timer("backward"):  # the engine averages gradients over ranks; ours are parts of a sum
                self.engine.backward(poisoned(loss) * self.context.world_size, last=index == self.micro_batches - 1)
            for name in counts:
                terms[name] += means[name].detach()
        rates = self.learning_rates()
        with self.timer("optimizer"):
            result = self.engine.step(rates)
        self.step += 1
        self.cursor = batch.cursor
        self._loss = torch.stack([weights[name] * terms[name] for name in terms]).sum()
        return StepRecord(
            step=self.step,
            terms=terms,
            result=result,
            learning_rates=rates,
            images=self.config.global_batch,
            bad_keys=self.suspects(batch) if result.skipped else (),
            phases=self.timer.take(),
        )

    def global_counts(self, batch: Batch, flags: Tensor | None = None) -> dict[str, Tensor]:
        """Images with weight per term over all ranks, at least 1; carries the ranks' flags along."""
        local = self.task.counts(batch)
        packed = torch.stack([local[name].float() for name in local])
        if flags is not None:
            packed = torch.cat([packed, flags])
        dist.all_reduce(packed)
        if flags is not None:
            self._said = on_host(packed[len(local) :])
        return {name: packed[i].clamp(min=1) for i, name in enumerate(local)}

    def _part(self, loss: float | None) -> Tensor:
        """This rank's part of a step's loss of which only the sum is known."""
        mine = 0.0 if self.context.rank else math.nan if loss is None else loss
        return torch.tensor(mine, device=self.engine.device)

    def recent(self) -> tuple[list[float | None], list[list[Any]]]:
        """`losses` and `began`, for a checkpoint: who resumes within a spike sees what one that went on had seen.

        A collective where there is a detector.
        """
        began: list[list[Any]] = [[step, dict(cursor)] for step, cursor in self._began]
        if self.spikes is None or self._loss is None or self._said is None:
            return [], began
        last = self._loss.float().clone()
        dist.all_reduce(last)
        before = float(self._said[-1]) if self._seen < self.step - 1 else math.nan
        return [loss if math.isfinite(loss) else None for loss in (before, float(last))], began

    def global_terms(self, record: StepRecord) -> dict[str, float]:
        """Mean of each term over the global batch. A collective."""
        packed = torch.stack(list(record.terms.values()))
        dist.all_reduce(packed)
        return dict(zip(record.terms, packed.tolist(), strict=True))

    def suspects(self, batch: Batch) -> tuple[str, ...]:
        """Keys of this rank's samples whose own loss, or its gradient at the network's output, is not finite.

        All ranks call it after a skipped step. None where only the network's own gradient was not finite.
        """
        found = []
        # as many forward passes on every rank as the one with most rows needs: at stage 3 each is a collective
        for number, row in enumerate(cut(batch, self.most_rows(batch))):
            outputs: list[Tensor] = []
            with self.engine.autocast():
                sums = self.task.sums(lambda *args, **kw: self._detached(outputs, *args, **kw), row)  # noqa: B023
            if number < len(batch) and not finite_with_gradient(torch.stack(list(sums.values())).sum(), outputs):
                found.append(batch.keys[number])
        return tuple(key for key in found if key)

    def _detached(self, outputs: list[Tensor], *args: Any, **kwargs: Any) -> Any:
        """The network's prediction, cut off from the network; its tensors are added to `outputs`."""
        with torch.no_grad():
            prediction = self.engine(*args, **kwargs)
        if isinstance(prediction, Tensor):
            outputs.append(prediction.detach().requires_grad_())
            return outputs[-1]
        fields = [t.detach().requires_grad_() if isinstance(t, Tensor) else t for t in prediction]
        outputs += [t for t in fields if isinstance(t, Tensor)]
        return type(prediction)(*fields)

    def most_rows(self, batch: Batch) -> int:
        """The largest number of rows that any rank has of this batch: collectives of a forward pass have to pair up."""
        rows = torch.tensor(len(batch), device=self.engine.device)
        dist.all_reduce(rows, dist.ReduceOp.MAX)
        return int(rows)

    def _flags(self, hooks: Hooks) -> Tensor:
        """This rank's: asked to stop, by reason; a checkpoint is due, the one under way is written, failed; and its
        part of the last step's loss, which costs no wait this way."""
        stops = [float(self.context.stop_requested() == reason) for reason in REASONS]
        flags = on_device(torch.tensor([*stops, *hooks.flags()]), self.engine.device)
        loss = self._loss if self._loss is not None else flags.new_full((), torch.nan)
        return torch.cat([flags, loss.float().reshape(1)])

    def learning_rates(self) -> dict[str, float]:
        """Rates of this step: functions of samples seen, so the number of ranks does not change them."""
        optim, batch = self.config.optim, self.config.global_batch
        total = self.config.steps * batch
        scale = factor(self.step * batch, total, optim.warmup_samples, optim.schedule, optim.power)
        return {"encoder": optim.encoder_lr * scale, "decoder": optim.decoder_lr * scale}

    def give_up(self, hooks: Hooks) -> None:
        """Save the weights, which are those of the last good step, and raise TrainingDiverged.

        The checkpoints before stay, as it may be these weights that overflow; and who resumes has all steps again.
        """
        skipped, self.skipped_in_a_row = self.skipped_in_a_row, 0
        first = self.step - skipped + 1
        told = f"step_{self.step:08d} has the weights of the last good step"
        try:
            hooks.checkpoint(last=True, prune=False)
        except RuntimeError as error:  # a full disk must not hide why the run ends
            told = str(error)
        raise TrainingDiverged(
            f"step {self.step}: {skipped} steps in a row had a non-finite loss or gradient (engine.max_skipped_steps); "
            f"{told}. With --resume it goes on behind the samples of these steps, at lower optim.encoder_lr and "
            "optim.decoder_lr if you say so; to go on from an earlier checkpoint, move the newer ones away and pass "
            "over the samples that journal.jsonl names with --skip-samples; recovery.on_non_finite: roll_back does that"
        ).about("non_finite", first, self.step, self.stretch(first, hooks), {})

    def spiked(self, hooks: Hooks, spikes: SpikeDetector) -> None:
        """Raise TrainingDiverged: nothing is saved, since these weights are what went wrong."""
        lead = self.config.recovery.spike_lead_steps
        losses, last = spikes.losses, spikes.high[-1]
        raise TrainingDiverged(
            f"step {spikes.first}: the loss left its course (above {spikes.limit():.4g} for {spikes.steps} steps, "
            f"{last[1]:.4g} at step {last[0]}: recovery.spike_factor, spike_steps); go on from "
            "before it with these samples passed over (recovery.on_spike: roll_back does that), or at lower rates"
        ).about("spike", max(1, spikes.first - lead), self.step, self.stretch(spikes.first - lead, hooks), losses)

    def stretch(self, first: int, hooks: Hooks) -> tuple[int, int]:
        """The samples of the run's order from a step on, or from the first that is known, to here."""
        began = [cursor for step, cursor in self._began if step >= first]
        return (hooks.position(began[0]) if began else hooks.position(self.cursor)), hooks.position(self.cursor)


def poisoned(loss: Tensor) -> Tensor:
    """The loss; where it is not finite, so is its gradient then, and the engine drops the step on all ranks."""
    return loss * (1 + 0 * loss.detach())


def finite_with_gradient(loss: Tensor, inputs: Sequence[Tensor]) -> bool:
    """Whether a scalar and its gradients with respect to `inputs` are all finite."""
    if not loss.isfinite():
        return False
    if not loss.requires_grad:
        return True
    gradients = torch.autograd.grad(loss, inputs, allow_unused=True)
    return all(bool(g.isfinite().all()) for g in gradients if g is not None)


def on_device(flags: Tensor, device: torch.device) -> Tensor:
    """A copy on the device without waiting for what the device still does: from pinned memory."""
    return flags.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else flags


def on_host(flags: Tensor) -> Tensor:
    """A copy in main memory without waiting; it has arrived once the step's gradient norm has been read."""
    if not flags.is_cuda:
        return flags
    host = torch.empty(flags.shape, dtype=flags.dtype, pin_memory=True)
    return host.copy_(flags, non_blocking=True)


def cut(batch: Batch, pieces: int) -> Iterator[Batch]:
    """Exactly `pieces` micro-batches on every rank, so that collectives pair up: where rows are too few, the last
    piece comes again with weight 0."""
    size = -(-len(batch) // pieces)
    made = 0
    micro = batch
    for micro in batch.split(size):
        made += 1
        yield micro
    for _ in range(pieces - made):
        yield replace(micro, weight_B=torch.zeros_like(micro.weight_B))


def step_seed(seed: int, step: int, rank: int) -> int:
    """Seed of torch's generator for one step of one rank: nothing random carries over from step to step."""
    return (seed * 1_000_003 + step * 1_009 + rank) % 2**63
