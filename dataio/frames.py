"""Whole images in order, for labelling, evaluation and prediction: no plan, no crop, no perturbation.

Shape suffixes: B batch, C channel, H W pixels.
"""

from __future__ import annotations

import io
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import webdataset as wds
from PIL import Image

from cluster import storage
from dataio.dataset import DatasetInfo, Shard
from dataio.types import AffineCode, Sample

if TYPE_CHECKING:
    from torch import Tensor

    from dataio.dali_frames import FramePipeline

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
MAX_PIXELS = 100_000_000  # more is a decompression bomb, or a mistake


@dataclass(frozen=True, kw_only=True)
class Frame:
    """One whole image as read. `size_hw` is its own; `input_hw` what the network is to see. Zero when `problem` is set."""

    index: int  # place in the shard
    sample: Sample
    size_hw: tuple[int, int] = (0, 0)
    input_hw: tuple[int, int] = (0, 0)
    problem: str | None = None


Sizer = Callable[[int, int], tuple[int, int]]  # (h, w) of an image -> (H, W) of the network's input


def read_frames(shard: Shard, info: DatasetInfo, sizer: Sizer) -> Iterator[Frame]:
    """All samples of a shard in order, read once from front to back through webdataset.

    Raises StorageError or DataError when the shard itself cannot be read; a bad sample is a frame with a `problem`.
    """
    with storage.open_range(shard.tar, 0) as stream:
        members = wds.tariterators.tar_file_iterator(stream)
        for index, group in enumerate(wds.tariterators.group_by_keys(members)):
            yield make_frame(index, _sample(group, info), sizer)


def make_frame(index: int, sample: Sample, sizer: Sizer) -> Frame:
    """Look at the image's header only. Problems: missing_image, bad_image, too_large."""
    if not sample.image:
        return Frame(index=index, sample=sample, problem="missing_image")
    try:
        with Image.open(io.BytesIO(sample.image)) as image:
            width, height = image.size
    except Exception:  # noqa: BLE001  Pillow raises whatever the file provokes
        return Frame(index=index, sample=sample, problem="bad_image")
    if width * height > MAX_PIXELS:
        return Frame(index=index, sample=sample, problem="too_large")
    return Frame(index=index, sample=sample, size_hw=(height, width), input_hw=sizer(height, width))


def batches_by_shape(frames: Iterable[Frame], batch: int, hold: int = 256) -> Iterator[list[Frame]]:
    """Lists of at most `batch` frames of one input size, so that aspect is kept without padding.

    Holds back at most `hold` frames. Frames with a problem come alone, at once. The order within one input size is kept.
    """
    waiting: dict[tuple[int, int], list[Frame]] = defaultdict(list)
    held = 0
    for frame in frames:
        if frame.problem:
            yield [frame]
            continue
        group = waiting[frame.input_hw]
        group.append(frame)
        held += 1
        if len(group) == batch:
            held -= len(group)
            yield waiting.pop(frame.input_hw)
        elif held >= hold:
            largest = max(waiting, key=lambda shape: len(waiting[shape]))
            held -= len(waiting[largest])
            yield waiting.pop(largest)
    yield from waiting.values()


def _sample(group: dict[str, Any], info: DatasetInfo) -> Sample:
    image = next((group[extension] for extension in IMAGE_EXTENSIONS if extension in group), b"")
    meta = json.loads(group["json"]) if "json" in group else {}
    code = info.code
    if code is not None and "scale" in meta:
        code = AffineCode(scale=meta["scale"], shift=meta.get("shift", 0.0), zero=meta.get("zero", 0))
    return Sample(
        key=group["__key__"],
        image=image,
        target=group.get("depth.png") or group.get("disparity.png"),
        code=code,
        quantity=info.quantity,
        sky=group.get("sky.png"),
        meta=meta,
    )


def decode_frames(pipeline: FramePipeline, frames: list[Frame]) -> tuple[Tensor | None, list[Frame], list[Frame]]:
    """Network input of frames of one `input_hw`: (image_BCHW of the good ones or None, the good ones, the bad ones).

    The images are ImageNet-normalised, on the pipeline's device.
    """
    image_BCHW, decoded = pipeline.run([frame.sample.image for frame in frames], frames[0].input_hw)
    good = [frame for frame, ok in zip(frames, decoded, strict=True) if ok]
    bad = [replace(frame, problem="bad_image") for frame, ok in zip(frames, decoded, strict=True) if not ok]
    return image_BCHW, good, bad
