"""Whole images in order, for labelling and evaluation: no plan, no crop, no perturbation.

Shape suffixes: B batch, C channel, H W pixels.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from dataio.dataset import Dataset, Shard
from dataio.header import look
from dataio.quarantine import OF_THE_TARGET
from dataio.reader import ShardSource, read_samples
from dataio.spec import RoleNeeds
from dataio.types import Sample

if TYPE_CHECKING:
    from torch import Tensor

    from dataio.dali_frames import FramePipeline

# One side of a network's input in terms of the other: attention over a whole image takes time with the square of it.
# Training sees windows, and takes longer ones.
MAX_ELONGATION = 8
_CHUNK = 64  # samples read at a time


@dataclass(frozen=True, kw_only=True)
class Frame:
    """One whole image as read. `size_hw` is its own, `input_hw` the network's; zero when `problem` is set."""

    index: int  # place in the shard
    sample: Sample
    size_hw: tuple[int, int] = (0, 0)
    input_hw: tuple[int, int] = (0, 0)
    box: tuple[int, int, int, int] | None = None  # top, left, height, width: all that the network sees; None: the whole
    problem: str | None = None


Sizer = Callable[[int, int], tuple[int, int]]  # (h, w) of an image -> (H, W) of the network's input


def read_frames(
    dataset: Dataset, shard: Shard, sizer: Sizer, begin: int = 0, end: int | None = None, *, targets: bool = True
) -> Iterator[Frame]:
    """The samples [begin, end) of a shard of a dataset, by default all, in order, read once from front to back.

    Without `targets` a labelled dataset's depth is neither read nor missed: a sample is as good as its image is, and so
    is one that is quarantined for its depth. Raises DataError when the shard is missing; a bad sample is a frame with
    a `problem`.
    """
    info = dataset.info
    quarantined = dataset.quarantined.get(shard.stem, {})
    if not targets:
        quarantined = {key: reason for key, reason in quarantined.items() if reason not in OF_THE_TARGET}
    source = ShardSource(
        tar=shard.tar,
        quantity=info.quantity,
        code=info.code,
        shard=shard,
        quarantined=quarantined,
    )
    needs = RoleNeeds(target="disparity" if targets and info.quantity is not None else "none")
    end = shard.samples if end is None else min(end, shard.samples)
    for start in range(begin, end, _CHUNK):
        indices = range(start, min(start + _CHUNK, end))
        for index, sample in zip(indices, read_samples(source, indices, needs, exact=True), strict=True):
            yield make_frame(index, sample, sizer)


def make_frame(index: int, sample: Sample, sizer: Sizer) -> Frame:
    """Look at the headers only; a problem is one of `dataio.quarantine.REASONS`."""
    found = sample.problem or look(sample, sidecar=False)
    if isinstance(found, str):
        return Frame(index=index, sample=sample, problem=found)
    size_hw = (found.height, found.width)
    input_hw = sizer(*size_hw)
    if max(input_hw) > MAX_ELONGATION * min(input_hw):
        return Frame(index=index, sample=sample, problem="too_large")
    return Frame(index=index, sample=sample, size_hw=size_hw, input_hw=input_hw)


def batches_by_shape(frames: Iterable[Frame], batch: int, hold: int = 256) -> Iterator[list[Frame]]:
    """Lists of at most `batch` frames of one input size, so that aspect is kept without padding.

    No frame waits for more than `hold` later ones, so a rare shape does not make what follows it pile up. Frames with
    a problem come alone, at once. Within one input size order is kept.
    """
    waiting: dict[tuple[int, int], list[Frame]] = defaultdict(list)
    since: dict[tuple[int, int], int] = {}  # place of each shape's first waiting frame, rising
    for place, frame in enumerate(frames):
        if frame.problem:
            yield [frame]
            continue
        group = waiting[frame.input_hw]
        group.append(frame)
        since.setdefault(frame.input_hw, place)
        if len(group) == batch:
            yield waiting.pop(frame.input_hw)
            del since[frame.input_hw]
        while since and place - next(iter(since.values())) >= hold:
            shape = next(iter(since))
            del since[shape]
            yield waiting.pop(shape)
    yield from waiting.values()


def decode_frames(pipeline: FramePipeline, frames: list[Frame]) -> tuple[Tensor | None, list[Frame], list[Frame]]:
    """Network input of frames of one `input_hw`: (image_BCHW of the good ones or None, the good ones, the bad ones).

    The images are ImageNet-normalised, on the pipeline's device.
    """
    boxes = [frame.box for frame in frames]
    image_BCHW, decoded = pipeline.run([frame.sample.image for frame in frames], frames[0].input_hw, boxes)
    good = [frame for frame, ok in zip(frames, decoded, strict=True) if ok]
    bad = [replace(frame, problem="bad_image") for frame, ok in zip(frames, decoded, strict=True) if not ok]
    return image_BCHW, good, bad
