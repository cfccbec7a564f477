"""Offline pseudo-labelling: one image shard in, one label shard out, committed or not there.

Actors (cluster/pool.py) take shards as they become free. A run that was stopped, or joined later, skips what the ledger
says is done. Labels are disparities at the resolution of the network's output.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from cluster import storage
from cluster.stop import StopFlag
from cluster.telemetry import Exporter
from dataio.dataset import Dataset
from dataio.frames import Frame, batches_by_shape, decode_frames, read_frames
from dataio.labels import LabelSample, LabelStore, LedgerEntry, plan_digest
from trainer.config import ConfigError
from trainer.config_label import LabelConfig


@dataclass(frozen=True, kw_only=True)
class LabelOutcome:
    """`folder` is the sidecar to name in a training configuration; `stopped` the reason of an early stop."""

    folder: str
    shards: int
    images: int
    failed: int
    seconds: float
    stopped: str | None = None


def run_labelling(
    config: LabelConfig,
    *,
    on_shard: Callable[[int, int, LedgerEntry], None] | None = None,
    stop: StopFlag | None = None,
) -> LabelOutcome:
    """Label every shard that has no ledger entry yet; `on_shard(done, total, entry)` after each.

    Raises WeightsError, DataError, StorageError or ConfigError for what the user can mend.
    """
    from cluster.pool import run_pool

    dataset = Dataset.open(config.dataset)
    description = describe(config, dataset)
    root = config.out or storage.join(config.dataset, "labels")
    store = LabelStore.create(storage.join(root, plan_digest(description)), description)
    finished = store.done_stems()
    todo = [shard.stem for shard in dataset.shards if shard.stem not in finished]
    done, images, failed, began = len(dataset.shards) - len(todo), 0, 0, time.monotonic()

    def on_result(stem: str, entry: LedgerEntry) -> None:
        nonlocal done, images, failed
        done, images, failed = done + 1, images + entry.samples, failed + entry.failed
        exporter.metric("fathom_label_images_total").inc(entry.samples - entry.failed)
        show_shards()
        if on_shard:
            on_shard(done, len(dataset.shards), entry)

    def show_shards() -> None:
        for state, count in (("done", done), ("open", len(dataset.shards) - done)):
            exporter.metric("fathom_label_shards").labels(state=state).set(count)

    stop = stop or StopFlag()
    if todo:
        discovery = None if storage.is_url(store.path) else storage.join(store.path, "telemetry")
        exporter = Exporter(f"label-{store.digest}", 0, role="label", discovery=discovery)
        workers = min(config.cluster.workers, len(todo))
        with exporter:
            show_shards()
            run_pool(
                functools.partial(Labeller, config.model_dump(mode="json"), store.path),
                todo,
                address=config.cluster.address,
                workers=workers,
                threads_per_worker=config.cluster.threads,
                use_gpu=config.cluster.use_gpu,
                on_result=on_result,
                stop=stop,
            )
    return LabelOutcome(
        folder=store.path,
        shards=done,
        images=images,
        failed=failed,
        seconds=round(time.monotonic() - began, 3),
        stopped=stop.reason if done < len(dataset.shards) else None,
    )


def describe(config: LabelConfig, dataset: Dataset) -> dict[str, Any]:
    """What decides the labels, in words and numbers: the digest of this names the folder.

    Raises WeightsError when the teacher cannot be read, ConfigError when it predicts metres.
    """
    from model import DepthAnything

    teacher = DepthAnything.from_pretrained(config.weights, preset=config.preset, position_mode=config.position_mode)
    if teacher.preset.head == "metric":
        raise ConfigError(
            f"weights: {config.weights} predicts metres; pseudo-labels are disparities, name a relative network"
        )
    return {
        "teacher": {"fingerprint": teacher.fingerprint(), "position_mode": teacher.preset.position_mode},
        "dataset": {"name": dataset.info.name, "fingerprint": dataset.fingerprint, "samples": dataset.info.samples},
        "preprocessing": {
            "resize": "shorter side to input_size (lower bound), multiples of 14, cubic (a = -0.75), no antialias",
            "input_size": config.input_size,
            "normalisation": "ImageNet mean and deviation",
            "orientation": "EXIF orientation applied",
            "flip_average": config.flip,
        },
        "precision": config.precision,
        "batch": config.batch,  # changes the last bits; so do threads and the kind of processor, which is not recorded
        "quantity": "disparity, relative: scale and shift are the teacher's own",
        "resolution": "the network's input",
    }


class Labeller:
    """One actor: teacher and decoder are loaded once, `process` commits one shard."""

    def __init__(self, config: dict[str, Any], store: str) -> None:
        import torch

        from dataio.dali_frames import FramePipeline
        from trainer.inference import Predictor, sizer

        self.config = LabelConfig.model_validate(config)
        cluster = self.config.cluster
        device = "cuda" if cluster.use_gpu else "cpu"
        torch.set_num_threads(cluster.threads)
        self.dataset = Dataset.open(self.config.dataset)
        self.store = LabelStore.open(store)
        self.pipeline = FramePipeline(self.config.batch, cluster.threads, device)
        self.predictor = Predictor(
            self.config.weights,
            preset=self.config.preset,
            position_mode=self.config.position_mode,
            device=device,
            precision=self.config.precision,
            flip=self.config.flip,
        )
        self.sizer = sizer(self.config.input_size, self.predictor.network.preset.multiple)

    def process(self, stem: str) -> LedgerEntry:
        """Label one shard; order and keys are the source's. Raises StorageError or DataError for the whole shard."""
        shard = next(s for s in self.dataset.shards if s.stem == stem)
        keys = [entry.key for entry in shard.index.samples]
        samples = in_order(self._labels(read_frames(self.dataset, shard, self.sizer)))
        entry = self.store.commit(stem, samples, keys=keys).entry
        assert entry is not None  # nobody asked to be fenced
        return entry

    def _labels(self, frames: Iterator[Frame]) -> Iterator[tuple[int, LabelSample]]:
        for group in batches_by_shape(frames, self.config.batch):
            if group[0].problem:
                yield group[0].index, LabelSample.failed(group[0].sample.key, group[0].problem)
                continue
            image_BCHW, good, bad = decode_frames(self.pipeline, group)
            for frame in bad:
                yield frame.index, LabelSample.failed(frame.sample.key, frame.problem or "bad_image")
            if image_BCHW is None:
                continue
            disparity_BHW, agreement_B = self.predictor(pad_batch(image_BCHW, self.config.batch))
            for row, frame in enumerate(good):
                disparity_HW = disparity_BHW[row].cpu().numpy().astype(np.float32)
                quality = {"quality": round(float(agreement_B[row]), 4)} if agreement_B is not None else {}
                yield frame.index, LabelSample.encoded(frame.sample.key, disparity_HW, quality)


def pad_batch(image_BCHW: Any, batch: int) -> Any:
    """Repeat the last image up to a fixed batch: rounding depends on the batch a network runs, and hardly on the place
    in it, so an image's neighbours move its label by a last bit at most."""
    missing = batch - len(image_BCHW)
    if missing <= 0:
        return image_BCHW
    import torch

    return torch.cat([image_BCHW, image_BCHW[-1:].expand(missing, -1, -1, -1)])


def in_order(numbered: Iterator[tuple[int, LabelSample]]) -> Iterator[LabelSample]:
    """Samples by rising number: batches by shape come out of order, shards are written in it."""
    waiting: dict[int, LabelSample] = {}
    next_index = 0
    for index, sample in numbered:
        waiting[index] = sample
        while next_index in waiting:
            yield waiting.pop(next_index)
            next_index += 1
    assert not waiting, f"sample {next_index} was never labelled"
