"""One worker of an evaluation: the network is loaded once, `process` measures one unit of one dataset."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import Tensor

from dataio.dali_frames import FramePipeline
from dataio.dataset import Dataset
from dataio.spec import DataError
from model.presets import Preset
from trainer.benchmarks import PAIRS
from trainer.config import ConfigError
from trainer.config_evaluate import DatasetEntry, EvaluateConfig
from trainer.evaluate_baselines import MeanMap
from trainer.evaluate_images import ImageResult, Measurement, Seen, Unit, cut_units, examine, measurement
from trainer.evaluate_pairs import PairSet
from trainer.evaluate_sheet import sheet_row
from trainer.inference import Predictor

UNIT = 64  # samples that are shared out together
SHEET_ROWS = 8


@dataclass(frozen=True)
class Item:
    """A unit of the `dataset`-th dataset, and how many of its first images are wanted as rows of the sheet."""

    dataset: int
    unit: Unit
    first: int = 0


@dataclass(frozen=True)
class Row:
    """A row of a sheet. `score` is what it was chosen by, larger is worse."""

    score: float
    key: str
    place: int
    picture: np.ndarray | None = field(default=None, compare=False)


@dataclass(kw_only=True)
class Outcome:
    """What one unit gave; picklable."""

    images: list[ImageResult] = field(default_factory=list)
    first: list[Row] = field(default_factory=list)
    worst: list[Row] = field(default_factory=list)


def open_set(entry: DatasetEntry) -> Dataset | PairSet:
    """DataError when it cannot be opened, or has no depth."""
    if entry.benchmark == PAIRS:
        return PairSet.open(entry.path)
    dataset = Dataset.open(entry.path)
    if dataset.info.quantity is None:
        raise DataError(f"{dataset.path}: has no depth to compare with; evaluate needs a labelled dataset")
    return dataset


def make_predictor(config: EvaluateConfig, *, device: str | None = None) -> Predictor:
    """Raises WeightsError."""
    return Predictor(
        config.weights,
        preset=config.preset,
        position_mode=config.position_mode,
        device=device or ("cuda" if config.cluster.use_gpu else "cpu"),
        precision=config.precision,
        flip=config.flip,
    )


def measurements(config: EvaluateConfig, predictor: Predictor) -> list[Measurement]:
    """What is measured of each dataset. ConfigError: a protocol does not go with this network or benchmark."""
    return [measurement_of(config, number, predictor.network.preset) for number in range(len(config.datasets))]


def measurement_of(config: EvaluateConfig, number: int, preset: Preset) -> Measurement:
    """What is measured of the `number`-th dataset with a network of this preset. Raises ConfigError."""
    entry = config.datasets[number]
    protocols = ("pairs",) if entry.benchmark == PAIRS else entry.protocols or config.protocols
    try:
        return measurement(
            preset,
            protocol=protocols,
            benchmark=entry.benchmark,
            max_depth=config.max_depth,
            input_size=config.input_size,
            batch=config.batch,
            limit=config.limit,
            constant=entry.benchmark != PAIRS,
        )
    except ConfigError as error:
        raise ConfigError(f"datasets.{number}: {error}") from None


def items_of(sets: list[Dataset | PairSet], limit: int | None) -> list[Item]:
    """Every sample of every dataset, once."""
    items = []
    for number, opened in enumerate(sets):
        units = opened.units(limit, UNIT) if isinstance(opened, PairSet) else cut_units(opened, limit, UNIT)
        pictured = isinstance(opened, Dataset)
        items += [Item(number, unit, max(0, SHEET_ROWS - unit.place) if pictured else 0) for unit in units]
    return items


class Examiner:
    """Holds the network, the decoder and the datasets; what it returns depends on the item alone."""

    def __init__(
        self,
        config: dict[str, Any],
        baseline: MeanMap | None = None,
        predictor: Predictor | None = None,
        sets: list[Dataset | PairSet] | None = None,
    ) -> None:
        import torch

        self.config = EvaluateConfig.model_validate(config)
        torch.set_num_threads(self.config.cluster.threads)
        self.predictor = predictor or make_predictor(self.config)
        self.sets = sets or [open_set(entry) for entry in self.config.datasets]
        self.what = measurements(self.config, self.predictor)
        self.fixed = baseline.predictions(self.predictor.metric) if baseline else {}
        self.pipeline = FramePipeline(self.config.batch, self.config.cluster.threads, str(self.predictor.device))

    def process(self, item: Item, on_image: Callable[[], None] | None = None) -> Outcome:
        """Measure one unit. DataError when a shard is missing; a bad sample has its reason."""
        outcome = Outcome()
        for seen in self._seen(item):
            outcome.images.append(seen.result)
            if on_image:
                on_image()
            if seen.truth is not None:
                self._picture(seen, item.first, outcome)
        return outcome

    def _picture(self, seen: Seen, wanted: int, outcome: Outcome) -> None:
        """Keep the image as a row where it is among the first or among the worst of its unit, so far."""
        result = seen.result
        row = Row(score_of(result), result.key, result.place)
        first = sorted([*outcome.first, row], key=lambda one: one.place)[:wanted]
        worst = sorted([*outcome.worst, row], key=worst_first)[: self.config.worst]
        if row in first or row in worst:
            drawn = replace(row, picture=sheet_row(seen, self.predictor.metric))
            outcome.first, outcome.worst = ([drawn if one is row else one for one in rows] for rows in (first, worst))

    def _seen(self, item: Item) -> Iterator[Seen]:
        opened, what = self.sets[item.dataset], self.what[item.dataset]
        if isinstance(opened, PairSet):
            return opened.examine(item.unit, self._predict, what, self.pipeline)
        return examine(opened, item.unit, self._predict, what, self.pipeline, self.fixed)

    def _predict(self, image_BCHW: Tensor) -> Tensor:
        return self.predictor(image_BCHW)[0]


def score_of(result: ImageResult) -> float:
    """abs_rel under the first protocol; what is no number is the worst."""
    values: Mapping[str, float] = next(iter(result.values.values()))
    score = values["abs_rel"]
    return score if math.isfinite(score) else math.inf


def worst_first(row: Row) -> tuple[float, str, int]:
    """To sort by."""
    return -row.score, row.key, row.place
