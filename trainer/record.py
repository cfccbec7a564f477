"""What a run shows of itself while it trains: metrics.jsonl, Prometheus, progress, previews."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping

import numpy as np
import torch
from PIL import Image

from cluster import storage
from cluster.telemetry import Exporter
from cluster.worker import WorkerContext
from dataio.loader import Loader
from dataio.show import colorize
from dataio.types import Batch
from model.preprocess import IMAGENET_MEAN, IMAGENET_STD
from trainer.config_train import TrainConfig
from trainer.journal import Journal
from trainer.loop import Loop, StepRecord
from trainer.tasks.base import Task

READ_METRICS = {
    "bytes": "fathom_data_read_bytes_total",
    "cache_hits": "fathom_data_cache_hits_total",
    "cache_misses": "fathom_data_cache_misses_total",
}


class Recorder:
    """Rank 0 writes files and reports progress; every rank feeds its own metrics."""

    def __init__(
        self, config: TrainConfig, task: Task, context: WorkerContext, exporter: Exporter, loader: Loader
    ) -> None:
        self.config, self.task, self.context, self.exporter = config, task, context, exporter
        self.loader = loader
        self._skipped_before: dict[str, int] = {}
        self._read_before: dict[str, int] = {}
        self.journal = Journal(config.folder)
        self._last = time.perf_counter()
        exporter.metric("fathom_world_size").set(context.world_size)

    def on_step(self, loop: Loop, record: StepRecord, batch: Batch) -> None:
        """Called after every step on every rank (it holds collectives at the logging interval)."""
        seconds = self._feed(record, batch)
        if record.result.skipped:
            self._skipped(record)
        due = record.step % self.config.log_every == 0 or record.step in (1, self.config.steps)
        if due:
            self._log(loop.global_terms(record), record, seconds)
        if self.context.rank == 0 and (
            record.step % self.config.preview_every == 0 or record.step == self.config.steps
        ):
            self.preview(loop.engine.module, record.step, batch)

    def _feed(self, record: StepRecord, batch: Batch) -> float:
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        metric = self.exporter.metric
        metric("fathom_steps_total").inc()
        metric("fathom_images_total").inc(len(batch))
        metric("fathom_step_duration_seconds").observe(seconds)
        metric("fathom_last_step_timestamp_seconds").set_to_current_time()
        for phase, spent in record.phases.items():
            metric("fathom_phase_seconds_total").labels(phase=phase).inc(spent)
        for group, rate in record.learning_rates.items():
            metric("fathom_learning_rate").labels(group=group).set(rate)
        for reason, count in dict(self.loader.quarantine.counts).items():
            metric("fathom_samples_skipped_total").labels(reason=reason).inc(
                count - self._skipped_before.get(reason, 0)
            )
            self._skipped_before[reason] = count
        for what, name in READ_METRICS.items():
            count = self.loader.read_counts()[what]
            metric(name).inc(count - self._read_before.get(what, 0))
            self._read_before[what] = count
        if math.isfinite(record.result.grad_norm):
            metric("fathom_grad_norm").set(record.result.grad_norm)
        return seconds

    def _skipped(self, record: StepRecord) -> None:
        self.exporter.metric("fathom_steps_skipped_total").labels(reason="non_finite").inc()
        gathered: list[tuple[str, ...] | None] = [None] * self.context.world_size
        torch.distributed.all_gather_object(gathered, record.bad_keys)
        if self.context.rank == 0:
            keys = sorted({key for keys in gathered for key in keys or ()})
            self.journal.write("step_skipped", step=record.step, reason="non_finite", keys=keys)

    def _log(self, terms: Mapping[str, float], record: StepRecord, seconds: float) -> None:
        for name, value in terms.items():
            self.exporter.metric("fathom_loss").labels(term=name).set(value)
        if self.context.rank:
            return
        weights = self.task.term_weights
        total = sum(weights[name] * value for name, value in terms.items())
        line = {
            "step": record.step,
            "samples": record.step * record.images,
            "loss": finite(total),
            "terms": {name: finite(value) for name, value in terms.items()},
            "grad_norm": finite(record.result.grad_norm),
            "skipped": record.result.skipped,
            "lr": record.learning_rates,
            "seconds": round(seconds, 4),
            "images_per_second": round(record.images / seconds, 2),
            "phases": {name: round(spent, 4) for name, spent in record.phases.items()},
        }
        storage.append_line(os.path.join(self.config.folder, "metrics.jsonl"), json.dumps(line))
        self.context.report(
            {"done": record.step, "total": self.config.steps, "loss": total, "metrics": self.exporter.address}
        )

    @torch.no_grad()
    def preview(self, module: torch.nn.Module, step: int, batch: Batch) -> None:
        """previews/step_NNNNNNNN.png: image | target | prediction, of two rows from either end: every role shows."""
        rows = sorted({row % len(batch) for row in (0, 1, -2, -1)})
        image_BCHW = batch.views["student"][rows]
        was_training = module.training
        module.eval()
        predicted_BHW = self.task.preview(module, image_BCHW).float().cpu().numpy()
        module.train(was_training)
        target = batch.targets.get("disparity")
        valid_BHW = (batch.region_BHW[rows] > 0).cpu().numpy()
        strips = []
        for at, (row, image_CHW) in enumerate(zip(rows, image_BCHW.float().cpu().numpy(), strict=True)):
            panels = [denormalise(image_CHW)]
            if target is not None:
                panels.append(colorize(target.value_BHW[row].float().cpu().numpy(), valid_BHW[at]))
            panels.append(colorize(predicted_BHW[at], np.ones_like(predicted_BHW[at], bool)))
            strips.append(np.concatenate(panels, 1))
        folder = os.path.join(self.config.folder, "previews")
        os.makedirs(folder, exist_ok=True)
        with storage.atomic_writer(os.path.join(folder, f"step_{step:08d}.png")) as file:
            Image.fromarray(np.concatenate(strips, 0)).save(file, format="PNG")


def finite(value: float) -> float | None:
    """JSON knows no NaN and no infinity: None stands for both."""
    return value if math.isfinite(value) else None


def denormalise(image_CHW: np.ndarray) -> np.ndarray:
    """ImageNet-normalised [3, H, W] -> uint8 [H, W, 3]."""
    mean, std = (np.asarray(v, np.float32)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
    return (np.clip(image_CHW * std + mean, 0, 1) * 255).round().astype(np.uint8).transpose(1, 2, 0)
