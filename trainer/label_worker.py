"""One worker of a labelling job: a shard of images in, a committed shard of labels out.

Reading and decoding, forward passes, and encoding go on beside each other: a thread is some batches ahead, the network
runs in the caller's, and threads encode. What a label is depends on its image, on the size of the batch and on the
place in it, never on what else is in the batch, and the places are a function of the shard alone.

Shape suffixes: B batch, C channel, H W pixels.
"""

from __future__ import annotations

import functools
import platform
import socket
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cluster import storage
from cluster.leased_worker import Grip, LeaseLost
from cluster.machine import keep_freed_memory
from cluster.storage import StorageError, Unreachable
from dataio.dali_frames import FramePipeline
from dataio.dataset import INFO_NAME, Dataset, Shard
from dataio.frames import Frame, batches_by_shape, decode_frames, read_frames
from dataio.label_codec import EXTENSIONS, check_available, fingerprint
from dataio.labels import Commit, LabelSample, LabelStore
from dataio.spec import DataError
from trainer.config_label import LabelConfig
from trainer.inference import Predictor, sizer, usual_shapes
from trainer.labelling import exporter
from trainer.overlap import ahead, mapped
from trainer.step_metrics import Spent

_BATCHES_AHEAD = 2
_ENCODED_AHEAD = 2  # batches whose labels are being encoded


@dataclass(frozen=True)
class Ready:
    """A batch for the network; without `image_BCHW` its frames have all failed. `rows` of `frames` in the batch."""

    frames: list[Frame]
    image_BCHW: Tensor | None = None
    rows: tuple[int, ...] = ()


@dataclass(frozen=True)
class _Predicted:
    """One image's prediction on its way to the disk: `value_HW` in main memory once `arrived` returns."""

    frame: Frame
    value_HW: Tensor | None = None
    quality: Tensor | None = None
    arrived: Callable[[], None] = lambda: None


class Labeller:
    """Teacher and decoder are loaded once; `process` commits one shard. Made by cluster/leased_worker.py."""

    def __init__(self, config: dict[str, Any], store: str, owner: str, dataset: Dataset) -> None:
        self.config = LabelConfig.model_validate(config)
        try:
            check_available(EXTENSIONS[self.config.encoding])
        except DataError as error:
            raise DataError(f"{socket.gethostname()}: {error}") from None
        require(dataset)
        cluster = self.config.cluster
        device = "cuda" if cluster.use_gpu else "cpu"
        torch.set_num_threads(cluster.threads)
        if cluster.use_gpu:
            same_bits_on_gpus(self.config.precision)
        else:
            keep_freed_memory()
        self.owner = owner
        self.dataset = dataset  # as the driver has opened it: a shard that has changed since is refused when it is read
        self._shards = {shard.stem: shard for shard in dataset.shards}
        self.store = LabelStore.open(store)
        self.store.heeds_condition()
        self.device = device_name(device, cluster.threads)
        self._pipeline = FramePipeline(self.config.rows, cluster.threads, device)
        self.predictor = Predictor(
            self.config.weights,
            preset=self.config.preset,
            position_mode=self.config.position_mode,
            device=device,
            precision=self.config.precision,
            flip=self.config.flip,
            quality=self.config.quality,
            compiled=usual_shapes(self.config.input_size) if self.config.compile else (),
        )
        self._sizer = sizer(self.config.input_size, self.predictor.network.preset.multiple)
        self._open = ExitStack()
        self._encoders = self._open.enter_context(ThreadPoolExecutor(cluster.threads, "encode"))
        self._exporter = self._open.enter_context(exporter(self.store, "label", cluster, owner))

        self._spent = Spent(self._exporter.metric("fathom_label_phase_seconds_total"))

    def close(self) -> None:
        """Ends its threads and its metrics."""
        self._open.close()

    def process(self, stem: str, grip: Grip) -> dict[str, Any]:
        """Label and commit one shard.

        Raises LeaseLost; DataError for what is wrong with the shard as a whole; Unreachable for what is not its fault;
        StorageError.
        """
        try:
            with self._spent("write"):  # what is neither of the others
                return self.label(stem, grip)
        except DataError:
            require(self.dataset)
            raise

    def label(self, stem: str, grip: Grip) -> dict[str, Any]:
        """What `process` does, where the dataset is there."""
        shard = self.shard(stem)
        keys = keys_of(shard)
        labels = self.labels(shard, grip)
        commit = self.store.commit(
            stem, labels, keys=keys, by=self.by(grip), still_mine=grip.still_mine, tag=self.owner
        )
        return self.told(commit, stem, () if commit.outcome == "duplicate" else None)  # another run's work

    def by(self, grip: Grip) -> Callable[[], dict[str, Any]]:
        """Who has done it, for the ledger, which asks once it is done."""
        encoder = fingerprint(self.config.encoding)
        who = {"node": socket.gethostname(), "token": grip.token, "device": self.device, "encoder": encoder}
        return lambda: {**who, "finished": round(time.time(), 3)}

    def told(self, commit: Commit, stem: str, tried: Collection[str] | None = None) -> dict[str, Any]:
        """What the driver is told of a commit, and of which only the samples `tried` (None: all) are this work's.

        Raises LeaseLost when it was dropped.
        """
        if commit.entry is None:
            raise LeaseLost(stem)
        samples = commit.entry.samples if tried is None else len(tried)
        failed = {
            reason: sum(tried is None or key in tried for key in keys) for reason, keys in commit.entry.failures.items()
        }
        if commit.outcome == "written":
            self._exporter.metric("fathom_label_images_total").inc(samples - sum(failed.values()))
            for reason, number in failed.items():
                self._exporter.metric("fathom_label_failures_total").labels(reason=reason).inc(number)
        return {
            "outcome": commit.outcome,
            "differs": commit.differs,
            "samples": samples,
            "failed": sum(failed.values()),
        }

    def labels(self, shard: Shard, grip: Grip, only: Collection[int] | None = None) -> Iterator[LabelSample]:
        """The labels of a shard's samples in their order; of those at the places `only`, as all of them would be."""
        with ahead(self.inputs(shard, only), _BATCHES_AHEAD, "decode") as ready:
            predicted = watched(self._predicted(self._spent.each("read_wait", ready)), shard.samples, grip)
            encoded = mapped(self._encode, predicted, self._encoders, _ENCODED_AHEAD * self.config.rows)
            if only is not None:
                yield from (sample for index, sample in sorted(encoded, key=lambda pair: pair[0]) if index in only)
                return
            yield from in_order(encoded)

    def inputs(self, shard: Shard, only: Collection[int] | None = None) -> Iterator[Ready]:
        """The batches of a shard as the network takes them; of those alone that hold one of the places `only`."""
        frames = read_frames(self.dataset, shard, self._sizer, targets=False)
        for group in batches_by_shape(frames, self.config.rows):
            if only is not None and not any(frame.index in only for frame in group):
                continue
            if group[0].problem:
                yield Ready(group)
                continue
            image_BCHW, good, bad = decode_frames(self._pipeline, group)
            if bad:
                yield Ready(bad)
            if image_BCHW is None:
                continue
            places = {frame.index: row for row, frame in enumerate(group)}
            rows = tuple(places[frame.index] for frame in good)
            yield Ready(good, in_places(image_BCHW, rows, batch_size(len(group), self.config.rows)), rows)

    def shard(self, stem: str) -> Shard:
        """The source shard of that stem. DataError when there is none."""
        found = self._shards.get(stem)
        if found is None:
            raise DataError(f"{self.store.tar(stem)}: {self.dataset.path} has no shard {stem!r}: move it away")
        return found

    def _predicted(self, ready: Iterable[Ready]) -> Iterator[_Predicted]:
        for batch in ready:
            if batch.image_BCHW is None:
                yield from map(_Predicted, batch.frames)
                continue
            with self._spent("forward"):
                value_BHW, quality_B = self.predictor(batch.image_BCHW)
            (value_BHW, quality_B), arrived = to_main_memory(value_BHW, quality_B)
            for row, frame in zip(batch.rows, batch.frames, strict=True):
                quality = None if quality_B is None else quality_B[row]
                yield _Predicted(frame, value_BHW[row], quality, arrived)

    def _encode(self, predicted: _Predicted) -> tuple[int, LabelSample]:
        frame = predicted.frame
        if predicted.value_HW is None:
            assert frame.problem is not None
            return frame.index, LabelSample.failed(frame.sample.key, frame.problem)
        predicted.arrived()
        value_HW = predicted.value_HW.numpy().astype(np.float32, copy=False)
        meta: dict[str, Any] = {}
        if predicted.quality is not None:
            meta["quality"] = round(float(predicted.quality.nan_to_num(0.0)), 4)  # a map with holes agrees with none
            self._exporter.metric("fathom_label_quality").observe(meta["quality"])
        return frame.index, LabelSample.encoded(frame.sample.key, value_HW, meta, self.config.encoding)


def require(dataset: Dataset) -> None:
    """Unreachable when the dataset is not on this machine: of that no shard of it is to blame."""
    if not storage.exists(storage.join(dataset.path, INFO_NAME)):
        raise Unreachable(
            f"{dataset.path}: not there on {socket.gethostname()}: mount it on every machine that labels, or keep this "
            "one out of the cluster"
        )


def watched(predicted: Iterable[_Predicted], total: int, grip: Grip) -> Iterator[_Predicted]:
    """Says how far it is at every image that has been through the network: until a shape that is rare has filled its
    batch, labels wait. LeaseLost once the shard is somebody else's."""
    for done, each in enumerate(predicted):
        grip.progress(done / total)
        yield each


def keys_of(shard: Shard) -> list[str]:
    """The keys of a source shard, in order. DataError when it cannot be read: of that the others are not to blame."""
    try:
        return [entry.key for entry in shard.index.samples]
    except Unreachable:
        raise
    except StorageError as error:
        raise DataError(str(error)) from error


def batch_size(frames: int, most: int) -> int:
    """The rows of the batch that so many frames of one shape run in: the next power of two, `most` at most.

    Few sizes, so that code is compiled and tuned for few; more than the frames by less than twice.
    """
    return min(most, 1 << (frames - 1).bit_length())


def in_places(image_BCHW: Tensor, rows: Collection[int], size: int) -> Tensor:
    """Images in these rows of a batch of `size`, the rest zeros: bits depend on the row that an image is in, so those
    of an image that cannot be decoded stay empty, and no other moves."""
    if len(image_BCHW) == size:
        return image_BCHW
    batch_BCHW = image_BCHW.new_zeros((size, *image_BCHW.shape[1:]))
    batch_BCHW[list(rows)] = image_BCHW
    return batch_BCHW


def in_order(numbered: Iterable[tuple[int, LabelSample]]) -> Iterator[LabelSample]:
    """Samples by rising number: batches by shape come out of order, shards are written in it."""
    waiting: dict[int, LabelSample] = {}
    next_index = 0
    for index, sample in numbered:
        waiting[index] = sample
        while next_index in waiting:
            yield waiting.pop(next_index)
            next_index += 1
    assert not waiting, f"sample {next_index} was never labelled"


def to_main_memory(
    value_BHW: Tensor, quality_B: Tensor | None
) -> tuple[tuple[Tensor, Tensor | None], Callable[[], None]]:
    """Both in main memory once the function returned has returned; from a GPU without waiting for it here."""
    if value_BHW.device.type != "cuda":
        return (value_BHW, quality_B), lambda: None
    copies = []
    for tensor in (value_BHW, quality_B):
        copy = None if tensor is None else torch.empty_like(tensor, device="cpu", pin_memory=True)
        if copy is not None and tensor is not None:
            copy.copy_(tensor, non_blocking=True)
        copies.append(copy)
    event = torch.cuda.Event()
    event.record()
    assert copies[0] is not None
    return (copies[0], copies[1]), event.synchronize


def same_bits_on_gpus(precision: str) -> None:
    """What on a GPU would make the bits of one run differ from another's: choices by timing, and TF32 for fp32."""
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    if precision == "fp32":
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_tf32 = False


@functools.cache
def device_name(device: str, threads: int) -> str:
    """What a label's last bits depend on beside the program: the GPU, or the processor and the number of threads."""
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    kind = torch.backends.cpu.get_cpu_capability()
    return f"{platform.machine()} {kind}, {threads} thread{'' if threads == 1 else 's'}"
