"""One rank of a training run: what it owns, built in order and taken down in reverse; the hooks around its steps."""

from __future__ import annotations

import contextlib
import json
import platform
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from cluster import storage
from cluster.exchange import first_rank_s, gathered
from cluster.exporter import Exporter
from cluster.worker import WorkerContext
from dataio.loader import Loader
from dataio.quarantine import Quarantine
from dataio.types import Batch
from trainer.autobatch import circumstances, micro_batch_count, share_of
from trainer.checkpoint import (
    About,
    Checkpoint,
    CheckpointError,
    TrainState,
    among_the_best,
    fingerprint,
    list_checkpoints,
    load_checkpoint,
    load_weights,
)
from trainer.config import parse_config
from trainer.config_train import TrainConfig
from trainer.divergence import SpikeDetector
from trainer.ema import Ema
from trainer.ends import CheckpointLost, OutOfMemory
from trainer.engine import Engine
from trainer.flops import device_flops, step_flops
from trainer.folder import RunFolder
from trainer.invariants import Invariants
from trainer.loop import Loop, StepRecord, step_seed
from trainer.record import Recorder
from trainer.resume import require_same_data, require_same_frozen, require_same_groups, require_same_network
from trainer.saver import Keep, Saved, Saver, require_space
from trainer.shadow import Shadow
from trainer.step_metrics import count_save
from trainer.tasks.base import Task, make_task
from trainer.validation import Validator
from trainer.vitals import watch_rank


def train_worker(context: WorkerContext, payload: Mapping[str, Any]) -> dict[str, Any]:
    """One rank: build the network, engine and loader, restore, run the loop, export. Runs inside the process group."""
    config = parse_config(TrainConfig, payload["config"])
    try:
        with RankTrainer(config, context, payload["checkpoint"]) as rank:
            rank.record_devices()
            stopped = rank.run()
            return {"step": rank.saved_step if stopped else rank.loop.step, "stopped": stopped}
    except torch.OutOfMemoryError as error:
        told = "" if config.engine.micro_batch == "auto" else "engine.micro_batch: auto, "
        validates = ", a smaller validation.batch" if config.validation.datasets else ""
        raise OutOfMemory(
            f"rank {context.rank}: out of memory: {str(error).splitlines()[0]} Use {told}"
            f"model.activation_checkpointing, a higher engine.zero_stage, engine.cpu_offload{validates} or more ranks"
        ) from error


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's architecture."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()


class RankTrainer(contextlib.AbstractContextManager["RankTrainer"]):
    """Task, engine, loader, loop and recorder of one rank. Leave the block to release threads, port and engine."""

    def __init__(self, config: TrainConfig, context: WorkerContext, checkpoint_path: str | None) -> None:
        self.config, self.context, self.folder = config, context, RunFolder(config.folder)
        self.device = torch.device(context.device)
        self._stack = contextlib.ExitStack()
        self._saved: int | None = None  # the step of the newest checkpoint, written or under way
        self._score: tuple[int, float] | None = None  # (step, value) of the last validation
        self._failure: storage.StorageError | None = None  # of the newest save
        self._save_s = 0.0  # what the last one took
        self.measured: dict[str, Any] | None = None  # under what `micro_batch: auto` was found
        self._clock = time.monotonic()
        try:
            began = time.monotonic()
            checkpoint = load_checkpoint(checkpoint_path) if checkpoint_path else None
            self._load_s = time.monotonic() - began
            self._build(checkpoint)
        except BaseException:
            self._stack.close()
            raise

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def _build(self, checkpoint: Checkpoint | None) -> None:
        config, context = self.config, self.context
        module = self._network(checkpoint)
        self.validator = Validator.of(config, module, context.rank, context.world_size, self.device)
        copied = config.optim.ema_decay is not None or config.engine.zero_stage == 3
        self.shadow = Shadow(module, copied)
        micro_batches = self._micro_batches(module, checkpoint)
        self._ideal_s = self._ideal_step_s(module)
        module.train()
        self.engine = Engine(
            module,
            self.task.parameter_groups(module),
            optim=config.optim,
            engine=config.engine,
            micro_batches=micro_batches,
            device=self.device,
        )
        self._stack.callback(self.engine.close)
        self.ema = Ema(self.engine, config.optim.ema_decay) if config.optim.ema_decay else None
        self.invariants = Invariants(self.engine, self.ema) if config.engine.debug else None
        if checkpoint:
            self._restore(checkpoint)
        lower = self.validator.lower_is_better if self.validator else True
        keep = Keep(
            newest=config.checkpoint.keep,
            best=config.checkpoint.keep_best,
            metric=config.validation.metric if self.validator else None,
            lower_is_better=lower,
        )
        if context.rank == 0:
            existing = len(list_checkpoints(self.folder.checkpoints))
            require_space(self.folder.checkpoints, self.engine, keep, existing, averaged=self.ema is not None)
        exporter = Exporter(
            config.name, "train", rank=context.rank, host=config.cluster.metrics_host, discovery=self.folder.telemetry
        )
        self.exporter = self._stack.enter_context(exporter)
        watch_rank(exporter, context, self.device)
        if checkpoint:
            exporter.metric("fathom_checkpoint_duration_seconds").labels(op="load").observe(self._load_s)
        self.loader = self._loader(checkpoint)
        self._stack.callback(self.loader.close)
        self.recorder = Recorder(config, self.task, context, self.exporter, self.loader, self._ideal_s)
        self._stack.callback(self.recorder.close)
        self.saver = Saver(self.folder.checkpoints, self.engine, self.ema, keep, self._on_saved)
        self._stack.callback(self.saver.close)
        self.loop = Loop(
            config=config,
            task=self.task,
            engine=self.engine,
            context=context,
            micro_batches=micro_batches,
            step=checkpoint.state.step if checkpoint else 0,
            cursor=dict(checkpoint.state.cursor) if checkpoint else {},
            skipped_in_a_row=checkpoint.state.skipped_in_a_row if checkpoint else 0,
            spikes=SpikeDetector.of(config.recovery, checkpoint.state.spikes if checkpoint else None),
            losses=checkpoint.state.losses if checkpoint else (),
            began=checkpoint.state.began if checkpoint else (),
        )

    def _micro_batches(self, module: nn.Module, checkpoint: Checkpoint | None) -> int:
        """As configured; where `auto` chose before, in the same circumstances, that again: a resume keeps every bit."""
        if self.config.engine.micro_batch == "auto":
            mine = circumstances(self.config, self.context.world_size, self.device)
            self.measured = first_rank_s(mine)  # so that all ranks measure or none
            if checkpoint and checkpoint.state.measured == self.measured:
                return checkpoint.state.micro_batches
        return micro_batch_count(self.config, self.task, module, self.context, self.device)

    def _network(self, checkpoint: Checkpoint | None) -> nn.Module:
        """The network with its initial or saved weights, and what is frozen beside it."""
        torch.manual_seed(step_seed(self.config.seed, 0, 0))  # every rank builds the same network
        self.task: Task = make_task(self.config)
        module = self.task.build()
        if checkpoint:
            require_same_network(checkpoint, self.task, module)
            load_weights(module, checkpoint)
        self.task.prepare(self.device)
        if checkpoint:
            require_same_frozen(checkpoint, self.task)
        return module

    def _ideal_step_s(self, module: nn.Module) -> float | None:
        """What a step's arithmetic takes at the devices' full speed; rank 0 alone shows it."""
        if self.context.rank:
            return None
        peak = device_flops(self.device, self.config.engine.precision, device_name(self.device))
        return step_flops(self.task, module, self.config) / (peak * self.context.world_size)

    def _restore(self, checkpoint: Checkpoint) -> None:
        """Moments, average and counters; then look whether what the engine holds is what was saved."""
        require_same_groups(checkpoint, self.engine)
        self.engine.load_optimizer_state(checkpoint.optimizer, checkpoint.state.applied_steps)
        if self.ema:
            self.ema.load(checkpoint.ema or checkpoint.weights)
        self._saved = checkpoint.state.step
        weights = self.engine.whole_weights()
        if not first_rank_s(self.context.rank == 0 and fingerprint(weights) == checkpoint.fingerprint):
            raise CheckpointError(
                f"{checkpoint.path}: the weights in the engine are not those that were saved (their fingerprints "
                "differ); remove the folder to go on from the one before"
            )

    def _loader(self, checkpoint: Checkpoint | None) -> Loader:
        config, context = self.config, self.context
        quarantine = Quarantine(self.folder.quarantine(context.rank), config.data.max_bad_fraction)
        loader = Loader(
            config.data,
            dict(self.task.needs),
            views=self.task.views,
            seed=config.seed,
            rank=context.rank,
            world_size=context.world_size,
            device=str(self.device),
            quarantine=quarantine,
        )
        if checkpoint:
            try:
                require_same_data(checkpoint, loader)
            except CheckpointError:
                loader.close()
                raise
            loader.seek(checkpoint.state.cursor)
        return loader

    def record_devices(self) -> None:
        """Add every rank's machine and device to environment.json. A collective."""
        ranks = gathered({"host": platform.node(), "device": device_name(self.device)})
        if self.context.rank == 0:
            content = json.loads(storage.read_bytes(self.folder.environment))
            storage.atomic_write(self.folder.environment, json.dumps(content | {"ranks": ranks}, indent=1))

    def run(self) -> str | None:
        """Train to the end or to an agreed stop, then export. Returns the reason of a stop."""
        batches: Iterator[Batch] = iter(self.loader)
        self._clock = time.monotonic()
        if self.loop.step:
            self.recorder.resumed(self.loop.step)
        self._say_micro_batches()
        reason = self.loop.run(batches, self)
        if reason is None:
            self.context.beat(self.loop.step, "export")
            network = self.shadow.current(self.engine, self.ema, everywhere=False)
            if self.context.rank == 0 and network is not None:
                self.task.export(network, self.folder.weights)
        return reason

    def _say_micro_batches(self) -> None:
        if self.config.engine.micro_batch == "auto" and self.context.rank == 0:
            count, share = self.loop.micro_batches, share_of(self.config, self.context.world_size)
            rows = -(-share // count)
            self.recorder.note(f"micro_batch: auto: {count} forward passes of at most {rows} rows a step and rank")
            self.recorder.write("micro_batches", count=count, rows=rows)

    # Hooks of the loop.

    def before_step(self, batch: Batch) -> None:
        if self.invariants:
            self.invariants.before_step(batch)

    def after_step(self, record: StepRecord, batch: Batch) -> None:
        if self.ema and not record.result.skipped:
            self.ema.update()
        if self.invariants:
            self.invariants.after_step(record)
        self.recorder.on_step(self.loop, record, batch)
        if self.validator and self.validator.due(record.step):
            self._validate(self.validator)

    def position(self, cursor: Mapping[str, int]) -> int:
        return self.loader.number(cursor) * self.config.global_batch

    def flags(self) -> tuple[float, float, float]:
        minutes = self.config.checkpoint.every_minutes
        overdue = minutes is not None and time.monotonic() - self._clock >= 60 * minutes
        return float(overdue and self.context.rank == 0), *self.saver.flags()  # rank 0's clock, so that all agree

    def agreed(self, due: bool, written: int, failed: int) -> None:
        self.context.beat(self.loop.step, "saving")  # rank 0 may write the manifest, the others wait
        with self.recorder.timed("checkpoint"):
            self.saver.settle(written, failed)
        if due and self.loop.step:
            self.checkpoint(last=False)
        self.recorder.start_clock()

    def checkpoint(self, *, last: bool, prune: bool = True) -> None:
        """Nothing where this step has its own, unless `prune` is off. CheckpointLost when the last is not written."""
        with self.recorder.timed("checkpoint"):
            self._checkpoint(last=last, prune=prune)

    def _checkpoint(self, *, last: bool, prune: bool) -> None:
        if not prune:
            self._saved = None  # a validation's of this very step holds the count of skipped steps
        if last and self._short_of_time():
            self._finish()
            if not self._failure:
                self.recorder.note(f"no time for another checkpoint: step {self._saved}'s is the last")
                return
        for _ in range(2 if last else 1):  # the run's last one is tried twice
            if self._saved != self.loop.step:
                self._finish()
                self.context.beat(self.loop.step, "checkpoint")
                self._clock = time.monotonic()
                self.saver.begin(self._state(), self._about(), prune=prune)
                self._saved = self.loop.step
            if last:
                self._finish()
        if last and self._failure:
            raise CheckpointLost(f"the last checkpoint could not be written: {self._failure}")

    @property
    def saved_step(self) -> int:
        """Of the newest checkpoint; the loop's where there is none."""
        return self.loop.step if self._saved is None else self._saved

    def _short_of_time(self) -> bool:
        """Whether the save under way is all that the time before the machine goes is enough for. A collective."""
        deadline = self.context.deadline
        late = deadline is not None and time.time() + 2 * self._save_s > deadline  # that one, and another
        return self.saver.busy and self._saved not in (None, self.loop.step) and any(gathered(late))

    def _finish(self) -> None:
        """Wait for the files of the save under way: a phase of its own, which takes as long as the disks do."""
        self.context.beat(self.loop.step, "saving")
        self.saver.finish()

    def _state(self) -> TrainState:
        losses, began = self.loop.recent()
        return TrainState(
            step=self.loop.step,
            applied_steps=self.engine.applied_steps,
            cursor=dict(self.loop.cursor),
            data=self.loader.describe(),
            groups={name: [n for n, _ in ps] for name, ps in self.engine.groups.items()},
            micro_batches=self.loop.micro_batches,
            measured=self.measured,
            workers=self.context.world_size,
            skipped_in_a_row=self.loop.skipped_in_a_row,
            spikes=self.loop.spikes.record() if self.loop.spikes else None,
            losses=losses,
            began=began,
        )

    def _about(self) -> About:
        scored = self._score is not None and self._score[0] == self.loop.step
        return About(
            frozen=self.task.frozen_fingerprint(),
            network=self.task.network_record(self.engine.module),
            score=self._score[1] if scored and self._score else None,
            metric=self.config.validation.metric if scored else None,
        )

    def _on_saved(self, saved: Saved) -> None:
        """A failed save is told and counted; the run goes on."""
        path = f"step_{saved.step:08d}"
        count_save(self.exporter, saved, self.context.rank, storage.join(self.folder.checkpoints, path))
        if saved.error is not None:
            self._saved, self._failure = None, storage.StorageError(saved.error)
            if self.context.rank == 0:
                self.recorder.note(f"warning: checkpoint of step {saved.step} failed: {saved.error}; the run goes on")
                self.recorder.write("checkpoint_failed", step=saved.step, error=saved.error)
            return
        self._failure, self._save_s = None, saved.seconds
        if self.context.rank == 0:
            self.recorder.write(
                "checkpoint", step=saved.step, path=path,
                stall_seconds=round(saved.stall_s, 3), seconds=round(saved.seconds, 3),
            )  # fmt: skip

    def _validate(self, validator: Validator) -> None:
        """Measure the network as it would be exported; save it when it is among the best."""
        self.context.beat(self.loop.step, "validation")
        network = self.shadow.current(self.engine, self.ema, everywhere=True)
        assert network is not None
        try:
            with self.recorder.timed("evaluation"):
                values = validator.run(network, lambda: self.context.stop_requested() is not None)
        finally:
            self.shadow.put_away()
            self.engine.module.train()
        if values is None:
            self.recorder.note(f"the validation of step {self.loop.step} was left off: the run is to stop")
            return
        self.recorder.event("validation", self.loop.step, values)
        if self.validator and self.validator.skipped and self.context.rank == 0:
            self.recorder.write("validation_skipped", step=self.loop.step, images=self.validator.skipped)
        score = validator.score(values)
        if score is None:
            return
        self._score = (self.loop.step, score)
        self.recorder.shown[self.config.validation.metric] = score
        if self.config.checkpoint.keep_best and self._is_among_the_best(validator, score):
            self.checkpoint(last=False)

    def _is_among_the_best(self, validator: Validator, score: float) -> bool:
        """Rank 0 looks at what is on disk, and tells."""
        best, metric = self.config.checkpoint.keep_best, self.config.validation.metric
        told = self.context.rank == 0 and among_the_best(
            self.folder.checkpoints, metric, validator.lower_is_better, score, best
        )
        return bool(first_rank_s(told))
