"""The training loop. One step reads like the algorithm; what is particular to a task lives in trainer/tasks.

The gradient is that of   sum over terms of  weight * (sum over all images) / (number of all images with weight),
all of them over the *global* batch, however it was cut into ranks and micro-batches.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from torch import Tensor

from cluster.worker import WorkerContext
from dataio.types import Batch
from trainer.config_train import TrainConfig
from trainer.engine import Engine, StepResult
from trainer.schedule import factor
from trainer.tasks.base import Task


class TrainingDiverged(RuntimeError):
    """Too many consecutive steps without a finite gradient."""

    exit_status = 1


@dataclass(kw_only=True)
class StepRecord:
    """What one step did. `terms` are this rank's parts of the global means; `Loop.global_terms` adds them up."""

    step: int
    terms: dict[str, Tensor]
    result: StepResult
    learning_rates: dict[str, float]
    images: int  # rows of the global batch, padding included
    bad_keys: tuple[str, ...] = ()  # samples of this rank with a non-finite loss, when the step was skipped
    phases: dict[str, float] = field(default_factory=dict)  # seconds


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
    _stop_votes: Tensor | None = None

    def run(
        self,
        batches: Iterator[Batch],
        *,
        on_step: Callable[[StepRecord, Batch], None],
        on_checkpoint: Callable[[], None],
    ) -> str | None:
        """Train; returns the reason of an early stop, agreed by all ranks, or None at the end."""
        self._stop_votes = self.vote()  # somebody may have asked while the ranks were starting
        dist.all_reduce(self._stop_votes)
        while self.step < self.config.steps:
            if self.stop_agreed():
                on_checkpoint()
                return self.context.stop_requested() or "stopped"
            started = time.perf_counter()
            batch = next(batches)
            record = self.train_step(batch, waited=time.perf_counter() - started)
            on_step(record, batch)
            self.give_up_if_diverged(record)
            every = self.config.checkpoint.every
            if every and self.step % every == 0 and self.step < self.config.steps:
                on_checkpoint()
        on_checkpoint()
        return None

    def train_step(self, batch: Batch, waited: float = 0.0) -> StepRecord:
        """One optimizer update from one global batch. Every rank must call it with its share of the same batch."""
        began = time.perf_counter()
        torch.manual_seed(step_seed(self.config.seed, self.step, self.context.rank))
        counts = self.global_counts(batch)
        terms = {name: torch.zeros((), device=self.engine.device) for name in counts}
        weights, bad_keys = self.task.term_weights, []
        for index, micro in enumerate(cut(batch, self.micro_batches)):
            with self.engine.autocast():
                sums = self.task.sums(self.engine, micro)
            means = {name: sums[name] / counts[name] for name in counts}
            loss = torch.stack([weights[name] * means[name] for name in counts]).sum()
            # The engine averages gradients over ranks; ours are parts of a sum.
            self.engine.backward(loss * self.context.world_size, last=index == self.micro_batches - 1)
            for name in counts:
                terms[name] += means[name].detach()
            bad_keys.append((loss.detach(), micro.keys))
        computed = time.perf_counter()
        rates = self.learning_rates()
        result = self.engine.step(rates)
        self.step += 1
        self.cursor = batch.cursor
        return StepRecord(
            step=self.step,
            terms=terms,
            result=result,
            learning_rates=rates,
            images=self.config.global_batch,
            bad_keys=tuple(key for loss, keys in bad_keys if result.skipped and not loss.isfinite() for key in keys),
            phases={"data_wait": waited, "compute": computed - began, "optimizer": time.perf_counter() - computed},
        )

    def global_counts(self, batch: Batch) -> dict[str, Tensor]:
        """Images with weight per term over all ranks, at least 1; carries the ranks' votes to stop along."""
        local = self.task.counts(batch)
        packed = torch.stack([*(local[name].float() for name in local), self.vote()])
        dist.all_reduce(packed)
        self._stop_votes = packed[-1]
        return {name: packed[i].clamp(min=1) for i, name in enumerate(local)}

    def global_terms(self, record: StepRecord) -> dict[str, float]:
        """Mean of each term over the global batch. A collective."""
        packed = torch.stack(list(record.terms.values()))
        dist.all_reduce(packed)
        return dict(zip(record.terms, packed.tolist(), strict=True))

    def vote(self) -> Tensor:
        """1 when this rank was asked to stop, else 0."""
        return torch.tensor(float(self.context.stop_requested() is not None), device=self.engine.device)

    def stop_agreed(self) -> bool:
        """Whether any rank asked to stop in the last step: the same answer on every rank."""
        return self._stop_votes is not None and bool(self._stop_votes.item() > 0)

    def learning_rates(self) -> dict[str, float]:
        """Rates of this step: functions of samples seen, so the number of ranks does not change them."""
        optim, batch = self.config.optim, self.config.global_batch
        scale = factor(self.step * batch, self.config.steps * batch, optim.warmup_samples, optim.schedule)
        return {"encoder": optim.encoder_lr * scale, "decoder": optim.decoder_lr * scale}

    def give_up_if_diverged(self, record: StepRecord) -> None:
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if record.result.skipped else 0
        if self.skipped_in_a_row >= self.config.engine.max_skipped_steps:
            raise TrainingDiverged(
                f"step {self.step}: {self.skipped_in_a_row} steps in a row had a non-finite gradient "
                "(engine.max_skipped_steps); lower optim.encoder_lr and optim.decoder_lr or look at the samples in "
                "journal.jsonl"
            )


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
