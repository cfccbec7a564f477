"""A dataset's images, each measured once, by any number of ranks or workers: evaluation and validation share it.

The samples are cut into units of consecutive ones, and a unit is the smallest thing that is shared out. Which images a
network sees together therefore depends on the dataset alone, and so does every last bit of an image's metrics: not on
how many ranks there are. No sample is repeated to fill a rank or a batch.

Shape suffixes: B batch, C channel, H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dataio.dali_frames import FramePipeline
from dataio.dataset import Dataset
from dataio.frames import Frame, batches_by_shape, decode_frames, read_frames
from dataio.spec import DataError
from model.presets import Preset
from trainer.benchmarks import Benchmark, get_benchmark
from trainer.config import ConfigError
from trainer.evaluate_measure import check, constant, measure
from trainer.evaluate_truth import Truth, read_truth
from trainer.inference import sizer
from trainer.metrics import Moments, mean_over_images, mean_over_pixels, metrics_of
from trainer.protocols import METRIC_DEFAULT, PROTOCOLS, RELATIVE_DEFAULT, get_protocol

OUTSIDE = "outside_the_split"  # the reason of a sample that the benchmark does not ask for
Predict = Callable[[Tensor], Tensor]
Average = Literal["images", "pixels"]


@dataclass(frozen=True, kw_only=True)
class ImageResult:
    """What one image gave: moments by protocol, or the reason why there are none. Picklable."""

    key: str
    place: int  # in the dataset
    values: Mapping[str, Moments] = field(default_factory=dict)
    reason: str | None = None

    @property
    def metrics(self) -> dict[str, dict[str, float]]:
        """`metrics[protocol][metric]`."""
        return {protocol: metrics_of(found) for protocol, found in self.values.items()}


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What is measured, and how the network sees an image; `measurement` makes one. Picklable."""

    protocols: tuple[str, ...]
    benchmark: str | None = None
    metric: bool = False  # the network predicts metres
    align_corners: bool = True  # of the resize back to the image, as its authors do
    input_size: int = 518
    multiple: int = 14
    batch: int = 8
    limit: int | None = None  # only the first samples
    max_depth: float | None = None  # metres; only nearer pixels count
    constant: bool = False  # measure each image's best constant too, as "constant"

    @property
    def limits_m(self) -> tuple[float, float | None]:
        """Smallest and largest depth that counts, metres."""
        found = get_benchmark(self.benchmark)
        caps = [cap for cap in (found.max_depth_m, self.max_depth) if cap is not None]
        return found.min_depth_m, min(caps) if caps else None


@dataclass(frozen=True)
class Unit:
    """The samples [begin, end) of one shard; `place` is the dataset's number of the first."""

    shard: int
    begin: int
    end: int
    place: int


@dataclass(frozen=True, kw_only=True)
class Seen:
    """An image's result with what it was made of; `truth` and `prediction_HW` are those of `frame.box`."""

    result: ImageResult
    frame: Frame
    truth: Truth | None = None
    prediction_HW: np.ndarray | None = None


def measurement(
    preset: Preset,
    *,
    protocol: str | Sequence[str] | None = None,
    benchmark: str | None = None,
    max_depth: float | None = None,
    **rest: Any,
) -> Measurement:
    """A Measurement for a network of this preset; protocol None: `disparity` and `depth`, or `metric`, by its head.

    `rest` are fields of Measurement: input_size, batch, limit, constant. Raises ConfigError for an unknown name, and
    for a protocol that this network or benchmark does not go with.
    """
    metric = preset.head == "metric"
    if protocol is None:
        protocols: tuple[str, ...] = METRIC_DEFAULT if metric else RELATIVE_DEFAULT
    else:
        protocols = (protocol,) if isinstance(protocol, str) else tuple(protocol)
    made = Measurement(
        protocols=protocols,
        benchmark=benchmark,
        metric=metric,
        align_corners=preset.output_align_corners,
        multiple=preset.multiple,
        max_depth=max_depth,
        **rest,
    )
    try:
        get_benchmark(benchmark)
    except ValueError as error:
        raise ConfigError(f"benchmark: found {benchmark!r}; {error}") from None
    for name in protocols:
        try:
            check(get_protocol(name), metric=metric, max_depth_m=made.limits_m[1])
        except ValueError as error:
            raise ConfigError(f"protocol: found {name!r}; {error}") from None
    return made


def measure_part(
    dataset: Dataset,
    predict: Predict,
    what: Measurement,
    *,
    part: int = 0,
    of: int = 1,
    device: str | torch.device = "cpu",
    threads: int = 1,
    stopped: Callable[[], bool] | None = None,
) -> list[ImageResult] | None:
    """This part's share of a dataset's images; all parts together hold every sample exactly once. None: stopped.

    Args:
        dataset: labelled.
        predict: [B, 3, H, W] ImageNet-normalised on `device` -> float [B, H, W], as `what.metric` says. Parts may call
            it a different number of times, so it must not communicate.
        part, of: rank and world size, or worker and number of workers.
        threads: of the decoder, CPU.
        stopped: asked before every batch.

    Raises:
        DataError: a shard is missing, or the dataset has no depth. Bad samples have a `reason`.
    """
    if dataset.info.quantity is None:
        raise DataError(f"{dataset.path}: has no depth to compare with; validation needs a labelled dataset")
    pipeline = FramePipeline(what.batch, threads, str(device))
    found: list[ImageResult] = []
    for unit in cut_units(dataset, what.limit, what.batch)[part::of]:
        if stopped is not None and stopped():
            return None
        found += [seen.result for seen in examine(dataset, unit, predict, what, pipeline)]
    return found


def mean_of(
    results: Iterable[ImageResult], protocol: str | None = None, average: Average = "images"
) -> dict[str, float]:
    """Means of one protocol's metrics, None: the first one's; {} when nothing was measured.

    `average` "images": each image counts the same; "pixels": each valid pixel does. The order of `results` and how they
    were shared out change nothing, not even a last bit.
    """
    usable = [result for result in results if result.values]
    if not usable:
        return {}
    name = protocol or next(iter(usable[0].values))
    values = [result.values.get(name, {}) for result in usable]
    if average == "pixels" or name == "pairs":  # of DA-2K, pairs count the same
        return mean_over_pixels(values)
    return mean_over_images(map(metrics_of, values))


def in_order(results: Iterable[ImageResult]) -> list[ImageResult]:
    """By key, then by place: however they were shared out, one list."""
    return sorted(results, key=lambda result: (result.key, result.place))


def cut_units(dataset: Dataset, limit: int | None, size: int) -> list[Unit]:
    """The first `limit` samples (None: all) in units of at most `size` consecutive ones of a shard."""
    units = []
    for number, (shard, place) in enumerate(zip(dataset.shards, dataset.starts, strict=False)):
        samples = shard.samples if limit is None else min(shard.samples, max(0, limit - place))
        for begin in range(0, samples, size):
            units.append(Unit(number, begin, min(begin + size, samples), place + begin))
    return units


def examine(
    dataset: Dataset,
    unit: Unit,
    predict: Predict,
    what: Measurement,
    pipeline: FramePipeline,
    fixed: Mapping[str, Callable[[int, int], np.ndarray]] | None = None,
) -> Iterator[Seen]:
    """Every sample of a unit, in the order of their batches. `fixed` predictions (of a whole image's h, w) are measured
    beside, cut as the image is.

    Raises DataError when the shard is missing.
    """
    benchmark = get_benchmark(what.benchmark)
    sized = sizer(what.input_size, what.multiple)
    frames = read_frames(dataset, dataset.shards[unit.shard], sized, unit.begin, unit.end)
    boxed = (_boxed(frame, benchmark, what) for frame in frames)
    for frame, prediction_HW in predict_frames(boxed, predict, what, pipeline):
        key, place = frame.sample.key, unit.place + frame.index - unit.begin
        truth = frame.problem or _truth(frame, benchmark, what.max_depth)
        if isinstance(truth, str) or prediction_HW is None:
            yield Seen(result=ImageResult(key=key, place=place, reason=str(truth)), frame=frame)
            continue
        maps = {name: make(*frame.size_hw)[box_slices(frame)] for name, make in (fixed or {}).items()}
        values = _values(prediction_HW, truth, what, maps)
        result = ImageResult(key=key, place=place, values=values)
        yield Seen(result=result, frame=frame, truth=truth, prediction_HW=prediction_HW)


def predict_frames(
    frames: Iterable[Frame], predict: Predict, what: Measurement, pipeline: FramePipeline
) -> Iterator[tuple[Frame, np.ndarray | None]]:
    """Every frame with its prediction [H, W] at the resolution of its box, or None when it has a problem."""
    for group in batches_by_shape(frames, what.batch):
        if group[0].problem:
            yield group[0], None
            continue
        image_BCHW, good, bad = decode_frames(pipeline, group)
        yield from ((frame, None) for frame in bad)
        if image_BCHW is None:
            continue
        value_BHW = predict(image_BCHW).detach().float()
        for row, frame in enumerate(good):
            size_hw = frame.box[2:] if frame.box else frame.size_hw
            value_11HW = value_BHW[row][None, None]
            if value_11HW.shape[2:] != size_hw:
                value_11HW = F.interpolate(value_11HW, size_hw, mode="bilinear", align_corners=what.align_corners)
            yield frame, value_11HW[0, 0].cpu().numpy()


def _boxed(frame: Frame, benchmark: Benchmark, what: Measurement) -> Frame:
    """The frame cut as the benchmark cuts images, or with the problem that it is not one of them."""
    if benchmark.keys not in frame.sample.key:
        return replace(frame, problem=OUTSIDE)
    if frame.problem:
        return frame
    box = benchmark.image_box(*frame.size_hw)
    if box is None:
        return replace(frame, problem="not_the_benchmarks_size")
    if box[2:] == frame.size_hw:
        return frame
    return replace(frame, box=box, input_hw=sizer(what.input_size, what.multiple)(*box[2:]))


def _truth(frame: Frame, benchmark: Benchmark, max_depth: float | None) -> Truth | str:
    """The truth inside the frame's box with the pixels that count, or the reason why nothing is left."""
    truth = read_truth(frame)
    if isinstance(truth, str):
        return truth
    depth_HW, valid_HW = (map_HW[box_slices(frame)] for map_HW in truth)
    valid_HW = benchmark.counts(depth_HW, valid_HW)
    if max_depth is not None:
        with np.errstate(invalid="ignore"):
            valid_HW = valid_HW & (depth_HW < max_depth)
    return (depth_HW, valid_HW) if valid_HW.any() else "no_valid_pixels"


def box_slices(frame: Frame) -> tuple[slice, slice]:
    """Rows and columns of the whole image that the network saw."""
    top, left, height, width = frame.box or (0, 0, *frame.size_hw)
    return slice(top, top + height), slice(left, left + width)


def _values(
    prediction_HW: np.ndarray, truth: Truth, what: Measurement, fixed: Mapping[str, np.ndarray]
) -> dict[str, Moments]:
    """Moments by protocol, then "constant", then "NAME: PROTOCOL" of every fixed prediction [H, W]."""
    low, high = what.limits_m
    values = {}
    maps = {"": prediction_HW, **{f"{name}: ": map_HW for name, map_HW in fixed.items()}}
    for prefix, map_HW in maps.items():
        for name in what.protocols:
            values[prefix + name] = measure(
                PROTOCOLS[name], map_HW, *truth, metric=what.metric, min_depth_m=low, max_depth_m=high
            )
        if not prefix and what.constant:
            values["constant"] = constant(*truth)
    return values
