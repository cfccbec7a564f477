"""What one rank of a training run owns, built in order and taken down in reverse."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator

import torch
from torch import nn

from cluster import storage
from cluster.telemetry import Exporter
from cluster.worker import WorkerContext
from dataio.loader import Loader
from dataio.quarantine import Quarantine
from trainer.checkpoint import (
    Checkpoint,
    CheckpointError,
    TrainState,
    list_checkpoints,
    load_checkpoint,
    load_weights,
    save_checkpoint,
)
from trainer.config_train import TrainConfig
from trainer.engine import MOMENTS, Engine
from trainer.loop import Loop, step_seed
from trainer.record import Recorder
from trainer.run import TELEMETRY, first_difference
from trainer.tasks.base import Task, make_task


class RankTrainer(contextlib.AbstractContextManager["RankTrainer"]):
    """Task, engine, loader, loop and recorder of one rank. Leave the block to release threads, port and engine."""

    def __init__(self, config: TrainConfig, context: WorkerContext, checkpoint_path: str | None) -> None:
        self.config, self.context = config, context
        self._stack = contextlib.ExitStack()
        self._saved: int | None = None  # the step of the newest checkpoint
        try:
            self._build(load_checkpoint(checkpoint_path) if checkpoint_path else None)
        except BaseException:
            self._stack.close()
            raise

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def _build(self, checkpoint: Checkpoint | None) -> None:
        config, context = self.config, self.context
        device = torch.device(context.device)
        torch.manual_seed(step_seed(config.seed, 0, 0))  # every rank builds the same network
        self.task: Task = make_task(config)
        module = self.task.build()
        if checkpoint:
            self._check_network(checkpoint, module)
            load_weights(module, checkpoint)
        self.task.prepare(device)
        if checkpoint and checkpoint.frozen != self.task.frozen_fingerprint():
            raise CheckpointError(
                f"{checkpoint.path}: was trained with another frozen encoder than the file named now "
                "(task.frozen_encoder or model.encoder_weights); restore that file"
            )
        micro_batches = micro_batch_count(config, context.world_size)
        module.train()
        self.engine = Engine(
            module,
            self.task.parameter_groups(module),
            optim=config.optim,
            engine=config.engine,
            micro_batches=micro_batches,
            device=device,
        )
        self._stack.callback(self.engine.close)
        self._restore_optimizer(checkpoint)
        self._saved = checkpoint.state.step if checkpoint else None
        if context.rank == 0:
            self._require_space()
        exporter = Exporter(config.name, context.rank, discovery=os.path.join(config.folder, TELEMETRY))
        self.exporter = self._stack.enter_context(exporter)
        self.loader = self._loader(device, checkpoint)
        self._stack.callback(self.loader.close)
        self.recorder = Recorder(config, self.task, context, self.exporter, self.loader)
        self.loop = Loop(
            config=config,
            task=self.task,
            engine=self.engine,
            context=context,
            micro_batches=micro_batches,
            step=checkpoint.state.step if checkpoint else 0,
            cursor=dict(checkpoint.state.cursor) if checkpoint else {},
        )

    def _restore_optimizer(self, checkpoint: Checkpoint | None) -> None:
        if not checkpoint:
            return
        expected = {name: [n for n, _ in ps] for name, ps in self.engine.groups.items()}
        if dict(checkpoint.state.groups) != expected:
            raise CheckpointError(
                f"{checkpoint.path}: its parameter groups differ from this network's; check task and model"
            )
        self.engine.load_optimizer_state(checkpoint.optimizer, checkpoint.state.applied_steps)

    def _require_space(self) -> None:
        """Refuse before the first step what the disk cannot hold: `keep` checkpoints and the next one."""
        tensors = self.engine.module.state_dict().values()
        trained = [parameter for named in self.engine.groups.values() for _, parameter in named]
        each = 4 * (sum(t.numel() for t in tensors) + len(MOMENTS) * sum(p.numel() for p in trained))
        root = os.path.join(self.config.folder, "checkpoints")
        missing = self.config.checkpoint.keep + 1 - len(list_checkpoints(root))
        storage.require_free(
            root, max(1, missing) * each, f"a run that keeps {self.config.checkpoint.keep} checkpoints"
        )

    def _loader(self, device: torch.device, checkpoint: Checkpoint | None) -> Loader:
        config, context = self.config, self.context
        quarantine = Quarantine(
            os.path.join(config.folder, f"quarantine.{context.rank}.jsonl"), config.data.max_bad_fraction
        )
        loader = Loader(
            config.data,
            dict(self.task.needs),
            views=self.task.views,
            seed=config.seed,
            rank=context.rank,
            world_size=context.world_size,
            device=str(device),
            quarantine=quarantine,
        )
        if checkpoint and dict(checkpoint.state.data) != loader.describe():
            loader.close()
            field, was, found = first_difference("data", dict(checkpoint.state.data), loader.describe())
            raise CheckpointError(
                f"{checkpoint.path}: was made with other data (its shards, labels or their order changed): {field} was "
                f"{was!r} and is {found!r}; restore what it was, or start a new run from its weights with model.weights"
            )
        if checkpoint:
            loader.seek(checkpoint.state.cursor)
        return loader

    def _check_network(self, checkpoint: Checkpoint, module: nn.Module) -> None:
        """The file that `model.weights` names may have changed since: same tensors, another function."""
        saved, built = checkpoint.network, self.task.network_record(module)
        if saved is not None and built is not None and dict(saved) != built:
            field, was, found = first_difference("network", dict(saved), built)
            raise CheckpointError(
                f"{checkpoint.path}: is of another network: {field} was {was!r}, but model.preset or model.weights now "
                f"gives {found!r}; restore what they were"
            )

    def run(self) -> str | None:
        """Train to the end or to an agreed stop, then export. Returns the reason of a stop."""
        batches: Iterator = iter(self.loader)
        reason = self.loop.run(
            batches,
            on_step=lambda record, batch: self.recorder.on_step(self.loop, record, batch),
            on_checkpoint=self.save,
        )
        if reason is None and self.context.rank == 0:
            self.engine.module.eval()
            self.task.export(self.engine.module, os.path.join(self.config.folder, "weights"))
        return reason

    def save(self) -> None:
        """Write a checkpoint: all ranks gather the moments, rank 0 writes. Nothing where this step has its own."""
        if self._saved == self.loop.step:
            return
        self._saved = self.loop.step
        began = time.perf_counter()
        moments = self.engine.optimizer_state()
        if self.context.rank == 0:
            weights = {name: t.detach().cpu() for name, t in self.engine.module.state_dict().items()}
            state = TrainState(
                step=self.loop.step,
                applied_steps=self.engine.applied_steps,
                cursor=dict(self.loop.cursor),
                data=self.loader.describe(),
                groups={name: [n for n, _ in ps] for name, ps in self.engine.groups.items()},
            )
            root = os.path.join(self.config.folder, "checkpoints")
            path = save_checkpoint(
                root, state, weights, moments,
                keep=self.config.checkpoint.keep,
                frozen=self.task.frozen_fingerprint(),
                network=self.task.network_record(self.engine.module),
            )  # fmt: skip
            self.recorder.journal.write("checkpoint", step=state.step, path=os.path.basename(path))
            self.exporter.metric("fathom_checkpoint_last_success_timestamp_seconds").set_to_current_time()
        self.exporter.metric("fathom_checkpoint_duration_seconds").labels(op="save").observe(
            time.perf_counter() - began
        )


def micro_batch_count(config: TrainConfig, world_size: int) -> int:
    """Forward passes per step, the same on every rank: the largest share of a batch cut by `engine.micro_batch`."""
    share = sum(spec.batch // spec.lanes * (-(-spec.lanes // world_size)) for spec in config.data.roles.values())
    size = config.engine.micro_batch
    return -(-share // size) if isinstance(size, int) else 1
