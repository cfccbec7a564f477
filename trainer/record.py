"""What a run shows of itself while it trains: metrics.jsonl, Prometheus, trackers, progress, previews.

Nothing here waits for the device between log lines: tensors are read at `log_every` and at previews only (a skipped
step is the exception).

Shape suffixes: B batch, C channel, H W pixels.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw

from cluster import storage
from cluster.exchange import gathered
from cluster.exporter import Exporter
from cluster.worker import WorkerContext
from dataio.loader import Loader
from dataio.show import colorize
from dataio.types import Batch, Target
from model.preprocess import IMAGENET_MEAN, IMAGENET_STD
from trainer.config_train import TrainConfig
from trainer.folder import RunFolder
from trainer.journal import RESUMED, Journal
from trainer.loop import Loop, StepRecord
from trainer.step_metrics import Since, StepMetrics, spent
from trainer.tasks.base import Task
from trainer.trackers import Tracker, open_trackers

TILE = 252  # largest width of a preview's panel, pixels: a run of 500,000 steps makes a thousand previews
_STRIP = 16  # height of a line of text, pixels
# The panel `valid`: no target, the image itself, what CutMix pasted.
_REGION_COLOURS = np.array([[48, 48, 48], [222, 222, 222], [90, 160, 230]], np.uint8)


class Recorder:
    """Rank 0 writes files and reports progress; every rank feeds its own metrics. `ideal_s`: what a step would take if
    the devices did nothing but the networks' arithmetic at full speed, None where nobody knows."""

    def __init__(
        self,
        config: TrainConfig,
        task: Task,
        context: WorkerContext,
        exporter: Exporter,
        loader: Loader,
        ideal_s: float | None = None,
    ) -> None:
        self.config, self.task, self.context, self.exporter = config, task, context, exporter
        self.loader, self.folder = loader, RunFolder(config.folder)
        self.journal = Journal(config.folder)
        self._trackers: list[Tracker] | None = None  # the first step tells where their curves go on
        self._failed_trackers: set[str] = set()
        self._notes: list[str] = []
        self._lost: set[str] = set()  # records that could not be written, each told once
        self.shown: dict[str, float] = {}  # beside the loss in the progress line, until it is changed
        self._last = time.perf_counter()
        self._ideal_s = ideal_s
        self._since: Since | None = None  # no step has begun
        self._metrics = StepMetrics(exporter)
        if context.rank == 0:
            exporter.metric("fathom_world_size").set(context.world_size)
            exporter.metric("fathom_steps_planned").set(config.steps)

    def on_step(self, loop: Loop, record: StepRecord, batch: Batch) -> None:
        """Called after every step on every rank (it holds collectives at log lines, previews and skipped steps)."""
        step, last = record.step, record.step == self.config.steps
        self._open_trackers(step)
        due = step % self.config.log_every == 0 or step == 1 or last
        terms = loop.global_terms(record) if due else {}  # waits for the device, which is part of the step's time
        self._feed(record, batch)
        if record.result.skipped:
            self._skipped(record, batch)
        if due:
            self._log(terms, record)
        if step % self.config.preview_every == 0 or last:
            self.preview(loop.engine.module, step, batch)
        self._last = time.perf_counter()  # what logging took is no part of the next step

    def start_clock(self) -> None:
        """A step begins, its wait for data included: a validation or checkpoint before it is no part of its time."""
        self._last = time.perf_counter()
        self._since = self._since or Since()

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """The block, between steps, is a phase of the run (PHASES of cluster/telemetry.py)."""
        began = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - began
            self._metrics.phase(phase, spent)
            if self._since:
                self._since.apart[phase] = self._since.apart.get(phase, 0.0) + spent

    def event(self, name: str, step: int, values: Mapping[str, float]) -> None:
        """Results that are measured now and then, such as a validation's; on ranks other than 0 nothing happens.

        They get a line of their own in metrics.jsonl, `{"step": ..., "event": name, "values": {...}}`, the gauge
        `fathom_event_result` and the trackers' `name/KEY`.
        """
        if self.context.rank:
            return
        self._open_trackers(step + 1)
        line = {"step": step, "event": name, "values": {key: finite(value) for key, value in values.items()}}
        self._append(line)
        for key, value in values.items():
            self.exporter.metric("fathom_event_result").labels(event=name, name=key).set(value)
        self._track(step, {f"{name}/{key}": value for key, value in values.items()})

    def resumed(self, step: int) -> None:
        """The run goes on from this step: what was logged behind it is void."""
        if not self.context.rank:
            self._append({"step": step, "event": RESUMED})

    def note(self, text: str) -> None:
        """Show a line to the user, with the next progress."""
        self._notes.append(text)

    def close(self) -> None:
        """Let the trackers send the rest. Again is nothing."""
        for tracker in self._trackers or ():
            tracker.close()
        self._trackers = []

    def _feed(self, record: StepRecord, batch: Batch) -> None:
        """This rank's own metrics: host numbers only."""
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        self._since = since = self._since or Since(began=now - seconds)
        since.steps += 1
        since.images += record.images
        since.seconds += seconds
        since.waited += record.phases.get("data_wait", 0.0)
        self._metrics.step(seconds, len(keys_of(batch)), record.phases)
        if self.context.slowdown is not None:
            self.exporter.metric("fathom_rank_slowdown_ratio").set(self.context.slowdown)
        if not self.context.rank:
            self.exporter.metric("fathom_step").set(record.step)
            for group, rate in record.learning_rates.items():
                self.exporter.metric("fathom_learning_rate").labels(group=group).set(rate)
        self._metrics.loader(self.loader)

    def _skipped(self, record: StepRecord, batch: Batch) -> None:
        """Names the samples at fault; where none could be singled out, all of the global batch."""
        self.exporter.metric("fathom_steps_skipped_total").labels(reason="non_finite").inc()
        told = gathered([record.bad_keys, keys_of(batch)])
        if self.context.rank:
            return
        suspects = {key for keys, _ in told for key in keys}
        keys = sorted(suspects or {key for _, keys in told for key in keys})
        self.write("step_skipped", step=record.step, reason="non_finite", keys=keys, singled_out=bool(suspects))

    def _log(self, terms: Mapping[str, float], record: StepRecord) -> None:
        since, self._since = self._since or Since(), Since()
        waited = self._most(since.waited, record)
        if self.context.rank:
            return
        grad_norm = float(record.result.grad_norm)  # it may be a tensor until somebody asks
        weights = self.task.term_weights
        total = sum(weights[name] * value for name, value in terms.items())
        images_per_second = since.images / max(since.seconds, 1e-9)
        for name, value in (*terms.items(), ("total", total)):
            self.exporter.metric("fathom_loss").labels(term=name).set(value)
        if math.isfinite(grad_norm):
            self.exporter.metric("fathom_grad_norm").set(grad_norm)
        utilisation = {}
        if self._ideal_s is not None and since.seconds:
            utilisation = {"mfu": round(self._ideal_s * since.steps / since.seconds, 4)}
            self.exporter.metric("fathom_model_flops_utilization_ratio").set(utilisation["mfu"])
        self._expect_checkpoints(since.seconds / max(1, since.steps))
        self._append(
            {
                "step": record.step,
                "samples": record.step * record.images,
                "loss": finite(total),
                "terms": {name: finite(value) for name, value in terms.items()},
                "grad_norm": finite(grad_norm),
                "skipped": record.result.skipped,
                "lr": record.learning_rates,
                "seconds": round(since.seconds / max(1, since.steps), 6),
                "images_per_second": round(images_per_second, 2),
                **utilisation,
                "time": round(time.time(), 3),
                "spent": spent(since, waited),
                "phases": {name: round(spent, 6) for name, spent in record.phases.items()},
            }
        )
        scalars = {"loss": total, "grad_norm": grad_norm, "images_per_second": images_per_second, **utilisation}
        for group, values in (("terms", terms), ("lr", record.learning_rates), ("phases", record.phases)):
            scalars |= {f"{group}/{name}": value for name, value in values.items()}
        self._track(record.step, scalars)
        self.context.report(
            {
                "done": record.step,
                "total": self.config.steps,
                "loss": total,
                "metrics": self.exporter.address,
                "shown": {"loss": total, "images/s": images_per_second, **self.shown},
                "notes": list(self._notes),
            }
        )

    def _most(self, seconds: float, record: StepRecord) -> float:
        """The largest of all ranks': the others wait for that one in their backward pass. A collective."""
        if self.context.world_size == 1:
            return seconds
        most = torch.tensor(seconds, dtype=torch.float64, device=next(iter(record.terms.values())).device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        return float(most)

    def _expect_checkpoints(self, step_s: float) -> None:
        every = self.config.checkpoint
        intervals = [step_s * every.every] if every.every else []
        intervals += [60 * every.every_minutes] if every.every_minutes else []
        if intervals:
            self.exporter.metric("fathom_checkpoint_interval_seconds").set(min(intervals))

    def _append(self, line: Mapping[str, Any]) -> None:
        with self._unless_full("metrics.jsonl"):
            storage.append_line(self.folder.metrics, json.dumps(line))

    def _open_trackers(self, next_step: int) -> None:
        if self._trackers is None and not self.context.rank:
            self._trackers = open_trackers(self.config, next_step, self._tracker_failed)

    def write(self, event: str, **facts: Any) -> None:
        """A line of the journal, unless the disk is full: a run that trains does not end for its records."""
        with self._unless_full("journal.jsonl"):
            self.journal.write(event, **facts)

    @contextmanager
    def _unless_full(self, what: str) -> Iterator[None]:
        try:
            yield
        except storage.StorageError as error:
            self.exporter.metric("fathom_record_failures_total").inc()
            if what not in self._lost:
                self._lost.add(what)
                self.note(f"warning: {what} cannot be written: {error}; the run goes on without it")

    def _track(self, step: int, scalars: Mapping[str, float]) -> None:
        values = {name: value for name, value in scalars.items() if math.isfinite(value)}
        for tracker in self._trackers or ():
            tracker.log(step, values)

    def _tracker_failed(self, tracker: str, problem: str) -> None:
        """Counts a call that is lost; the first of each tracker is told. Called from the trackers' threads, too."""
        self.exporter.metric("fathom_tracker_failures_total").labels(tracker=tracker).inc()
        if tracker in self._failed_trackers:
            return
        self._failed_trackers.add(tracker)
        note = f"warning: track.{tracker}: {problem}; the run goes on, and metrics.jsonl has everything"
        self._notes.append(note)
        print(note, file=sys.stderr, flush=True)
        with suppress(storage.StorageError):  # the same full disk, perhaps
            self.journal.write("tracker_failed", tracker=tracker, problem=problem)

    @torch.no_grad()
    def preview(self, module: torch.nn.Module, step: int, batch: Batch) -> None:
        """previews/step_NNNNNNNN.png: two rows from either end of rank 0's batch, so that every role shows.

        A collective: under ZeRO 3 every rank holds a part of the weights, so each runs the forward pass, on the same
        number of rows.
        """
        rows = preview_rows(len(batch))
        rows = sorted(rows[: self._fewest(len(rows), batch.weight_B.device)])
        if not rows:
            return
        was_training = module.training
        module.eval()
        predicted_BHW = self.task.preview(module, batch.views["student"][rows])
        module.train(was_training)
        if self.context.rank:
            return
        picture_HWC = draw_preview(batch, rows, predicted_BHW)
        path = storage.join(self.folder.previews, f"step_{step:08d}.png")
        with self._unless_full("a preview"), storage.atomic_writer(path) as file:
            Image.fromarray(picture_HWC).save(file, format="PNG")
        for tracker in self._trackers or ():
            tracker.image(step, "preview", picture_HWC)

    def _fewest(self, count: int, device: torch.device) -> int:
        """The smallest `count` of all ranks. A collective."""
        if self.context.world_size == 1:
            return count
        fewest = torch.tensor(count, device=device)
        dist.all_reduce(fewest, dist.ReduceOp.MIN)
        return int(fewest)


def keys_of(batch: Batch) -> tuple[str, ...]:
    """The keys of its samples; rows that only fill up the end of a pass have none."""
    return tuple(key for key in batch.keys if key)


def finite(value: float) -> float | None:
    """JSON knows no NaN and no infinity: None stands for both."""
    return value if math.isfinite(value) else None


def preview_rows(count: int) -> list[int]:
    """Two rows from either end of `count`, the first and the last first."""
    return list(dict.fromkeys(row % count for row in (0, -1, 1, -2))) if count else []


def draw_preview(batch: Batch, rows: Sequence[int], predicted_BHW: torch.Tensor) -> np.ndarray:
    """image | target | prediction | valid for `rows` of a batch, with titles and keys: uint8 [H, W, 3].

    Near is red; each panel spans its own range. `valid` is dark where the loss sees nothing, blue where CutMix pasted.
    Without a target there is none of it and no `valid`.
    """
    at = list(rows)
    target = _dense_target(batch)
    image_BCHW = batch.views["student"][at].float().cpu().numpy()
    region_BHW = batch.region_BHW[at].cpu().numpy()
    predicted_BHW = predicted_BHW.float().cpu()
    titles = ["image", "prediction"] if target is None else ["image", "target", "prediction", "valid"]
    strips = [np.zeros((0, 0, 3), np.uint8)]
    for place, row in enumerate(at):
        predicted_HW = predicted_BHW[place].numpy()
        panels = {
            "image": denormalise(image_BCHW[place]),
            "prediction": colorize(predicted_HW, np.ones(predicted_HW.shape, bool)),
        }
        if target is not None:
            region_HW = region_BHW[place]
            value_HW = target.value_BHW[row].float().cpu().numpy()
            if target.quantity == "depth_m":  # nearness, as a task's preview is
                value_HW = 1 / np.where(region_HW > 0, np.maximum(value_HW, 1e-6), 1)
            panels["target"] = colorize(value_HW, region_HW > 0)
            panels["valid"] = _REGION_COLOURS[np.minimum(region_HW, 2)]
        tiles = [_tile(panels[title], smooth=title == "image") for title in titles]
        strips += [_text_strip({4: batch.keys[row]}, sum(t.shape[1] for t in tiles)), np.concatenate(tiles, 1)]
    width = strips[-1].shape[1]
    strips[0] = _text_strip({4 + i * width // len(titles): title for i, title in enumerate(titles)}, width, "#dce3ea")
    return np.concatenate(strips, 0)


def _dense_target(batch: Batch) -> Target | None:
    return next((batch.targets[name] for name in ("disparity", "depth_m") if name in batch.targets), None)


def _tile(panel_HWC: np.ndarray, smooth: bool) -> np.ndarray:
    """At most `TILE` wide. Maps are not smoothed: a mix of a hole and a value would show what is not there."""
    height, width = panel_HWC.shape[:2]
    if width <= TILE:
        return panel_HWC
    how = Image.Resampling.LANCZOS if smooth else Image.Resampling.NEAREST
    return np.asarray(Image.fromarray(panel_HWC).resize((TILE, max(1, round(height * TILE / width))), how))


def _text_strip(texts: Mapping[int, str], width: int, background: str = "white") -> np.ndarray:
    """A line of texts, each from its own place (pixels) on: uint8 [_STRIP, width, 3]."""
    strip = Image.new("RGB", (width, _STRIP), background)
    for left, text in texts.items():
        ImageDraw.Draw(strip).text((left, 2), text.encode("ascii", "replace").decode(), fill="black")
    return np.asarray(strip)


def denormalise(image_CHW: np.ndarray) -> np.ndarray:
    """ImageNet-normalised [3, H, W] -> uint8 [H, W, 3]."""
    mean, std = (np.asarray(v, np.float32)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
    return (np.clip(image_CHW * std + mean, 0, 1) * 255).round().astype(np.uint8).transpose(1, 2, 0)
