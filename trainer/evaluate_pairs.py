"""DA-2K: pairs of points of which one is nearer.

A folder with `annotations.json`: {image path: [{"point1": [row, column], "point2": [row, column], "closer_point":
"point1"}]}, paths below the folder. Source: DepthAnything/Depth-Anything-V2, DA-2K.md.
Shape suffixes: H W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cluster import storage
from dataio.dali_frames import FramePipeline
from dataio.dataset import read_json
from dataio.frames import Frame, Sizer, make_frame
from dataio.spec import DataError
from dataio.types import Sample
from trainer.evaluate_images import ImageResult, Measurement, Predict, Seen, Unit, predict_frames
from trainer.inference import sizer
from trainer.metrics import Moments

ANNOTATIONS = "annotations.json"
_SHOWN = 80  # characters of a wrong annotation in a message


@dataclass(frozen=True)
class Pair:
    """Two points (row, column) in pixels, and whether the first is the nearer one."""

    first: tuple[int, int]
    second: tuple[int, int]
    first_is_nearer: bool


@dataclass(frozen=True)
class PairSet:
    """A folder's images, in the order of their paths, and their pairs."""

    path: str
    images: Sequence[tuple[str, tuple[Pair, ...]]]

    @classmethod
    def open(cls, path: str) -> PairSet:
        """Read the annotations. DataError in one line: no such file, not of this form, or no pairs."""
        name = storage.join(path, ANNOTATIONS)
        if not storage.exists(name):
            raise DataError(f"{name}: no such file; name the unpacked folder of DA-2K, which holds it and the images")
        content = read_json(name)
        images = [(image, tuple(_pair(name, image, item) for item in _list(name, image, content[image])))
                  for image in sorted(content)]  # fmt: skip
        if not any(pairs for _, pairs in images):
            raise DataError(f"{name}: holds no pairs; unpack the benchmark again")
        return cls(path, images)

    def units(self, limit: int | None, size: int) -> list[Unit]:
        """The first `limit` images (None: all) in units of at most `size`."""
        count = len(self.images) if limit is None else min(limit, len(self.images))
        return [Unit(0, begin, min(begin + size, count), begin) for begin in range(0, count, size)]

    def examine(self, unit: Unit, predict: Predict, what: Measurement, pipeline: FramePipeline) -> Iterator[Seen]:
        """Every image of a unit, in the order of their batches."""
        sized = sizer(what.input_size, what.multiple)
        frames = (self._frame(place, sized) for place in range(unit.begin, unit.end))
        for frame, prediction_HW in predict_frames(frames, predict, what, pipeline):
            pairs = self.images[frame.index][1]
            found: Moments | str
            if prediction_HW is None:
                found = str(frame.problem)
            else:
                found = judge(prediction_HW, pairs, metric=what.metric)
            values: Mapping[str, Moments] = {} if isinstance(found, str) else {"pairs": found}
            reason = found if isinstance(found, str) else None
            key = frame.sample.key
            yield Seen(
                result=ImageResult(key=key, place=frame.index, values=values, reason=reason), frame=frame,
                prediction_HW=prediction_HW,
            )  # fmt: skip

    def _frame(self, place: int, sized: Sizer) -> Frame:
        image = self.images[place][0]
        file = storage.join(self.path, image)
        if not storage.exists(file):
            return Frame(index=place, sample=Sample(key=image), problem="missing_image")
        return make_frame(place, Sample(key=image, image=storage.read_bytes(file)), sized)


def judge(prediction_HW: np.ndarray, pairs: Sequence[Pair], *, metric: bool) -> Moments | str:
    """{"accuracy", "pixels": the number of pairs}, or the reason why there is none.

    A disparity is larger at the nearer point, a depth (`metric`) smaller. Equal values are in no order: an error.
    """
    if not pairs:
        return "no_pairs"
    height, width = prediction_HW.shape
    right = 0
    for pair in pairs:
        if not all(0 <= row < height and 0 <= column < width for row, column in (pair.first, pair.second)):
            return "point_outside_the_image"
        near, far = (pair.first, pair.second) if pair.first_is_nearer else (pair.second, pair.first)
        lead = float(prediction_HW[near]) - float(prediction_HW[far])
        if math.isnan(lead):
            return {"accuracy": math.nan, "pixels": float(len(pairs))}
        right += (lead < 0) if metric else (lead > 0)
    return {"accuracy": right / len(pairs), "pixels": float(len(pairs))}


def _list(name: str, image: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise DataError(f"{name}: {image}: found {str(value)[:_SHOWN]!r}; a list of pairs is needed")
    return value


def _pair(name: str, image: str, item: Any) -> Pair:
    try:
        points = [(int(item[key][0]), int(item[key][1])) for key in ("point1", "point2")]
        nearer = ("point1", "point2").index(item["closer_point"])
    except (KeyError, TypeError, ValueError, IndexError):
        raise DataError(
            f"{name}: {image}: found {str(item)[:_SHOWN]!r}; a pair is "
            '{"point1": [row, column], "point2": [row, column], "closer_point": "point1"}'
        ) from None
    return Pair(points[0], points[1], nearer == 0)
