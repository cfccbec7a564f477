"""Held-out datasets, measured while training: every rank takes its share of the images, none is measured twice."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor, nn

from cluster.exchange import gathered
from dataio.dataset import Dataset
from model import DepthAnything
from model.presets import Preset
from trainer.config import ConfigError
from trainer.config_train import TrainConfig
from trainer.evaluate_images import ImageResult, Measurement, mean_of, measure_part, measurement
from trainer.evaluate_write import HIGHER, LOWER
from trainer.protocols import nearest


@dataclass(kw_only=True)
class Validator:
    """One rank's part of the validation of a run."""

    config: TrainConfig
    datasets: list[Dataset]
    what: Measurement
    rank: int
    world_size: int
    device: torch.device
    skipped: int = field(default=0, init=False)  # images that gave nothing, the last time

    @classmethod
    def of(
        cls, config: TrainConfig, module: nn.Module, rank: int, world_size: int, device: torch.device
    ) -> Validator | None:
        """None when the run has no validation datasets. Raises ConfigError for a task or protocol that does not fit."""
        if not config.validation.datasets:
            return None
        what = validation_of(config, module.preset if isinstance(module, DepthAnything) else None)
        datasets = [Dataset.open(path) for path in config.validation.datasets]
        return cls(config=config, datasets=datasets, what=what, rank=rank, world_size=world_size, device=device)

    @property
    def lower_is_better(self) -> bool:
        return self.config.validation.metric not in HIGHER

    def due(self, step: int) -> bool:
        """Whether to validate after this step."""
        return step % self.config.validation.every == 0 or step == self.config.steps

    def run(self, module: nn.Module, stopped: Callable[[], bool] | None = None) -> dict[str, float] | None:
        """`NAME/METRIC` of every dataset, and METRIC, the mean over datasets. The same on every rank; a collective.

        None once any rank's `stopped`, asked before every batch, says so: a machine that goes away does not wait.
        Raises DataError when a dataset's files are gone.
        """
        assert isinstance(module, DepthAnything)
        values: dict[str, float] = {}
        self.skipped = 0
        means = []
        for path, dataset in zip(self.config.validation.datasets, self.datasets, strict=True):
            results = self._all_results(module, dataset, stopped)
            if results is None:
                return None
            self.skipped += sum(not result.values for result in results)
            means.append(mean_of(results))
            name = short_name(path, self.config.validation.datasets)
            values |= {f"{name}/{metric}": value for metric, value in means[-1].items()}
        for metric in means[0] if all(means) else ():
            values[metric] = sum(mean[metric] for mean in means) / len(means)
        return values

    def _all_results(
        self, module: DepthAnything, dataset: Dataset, stopped: Callable[[], bool] | None
    ) -> list[ImageResult] | None:
        @torch.no_grad()
        def predict(image_BCHW: Tensor) -> Tensor:
            prediction = module(image_BCHW)
            value_BHW = prediction.depth_m_BHW if self.what.metric else prediction.disparity_BHW
            assert value_BHW is not None
            return value_BHW.float()

        own = measure_part(
            dataset, predict, self.what, part=self.rank, of=self.world_size, device=self.device,
            threads=self.config.data.threads, stopped=stopped,
        )  # fmt: skip
        told = gathered(None if own is None else [asdict(result) for result in own])
        if None in told:
            return None
        return [ImageResult(**result) for results in told for result in results]

    def score(self, values: dict[str, float]) -> float | None:
        """What `checkpoint.keep_best` goes by; None when nothing could be measured, or a prediction was not finite."""
        value = values.get(self.config.validation.metric, math.nan)
        return value if math.isfinite(value) else None


def validation_of(config: TrainConfig, preset: Preset | None) -> Measurement:
    """What `validation:` measures of a network of this preset; None: of one that predicts no depth.

    Raises ConfigError for a task, protocol or metric that does not fit.
    """
    section = config.validation
    if preset is None:
        raise ConfigError(f"validation.datasets: task {config.task.kind!r} predicts no depth; remove them")
    known = {*LOWER, *HIGHER}
    if section.metric not in known:
        raise ConfigError(f"validation.metric: found {section.metric!r}; {nearest(section.metric, sorted(known))}")
    try:
        return measurement(
            preset,
            protocol=section.protocol or ("metric" if preset.head == "metric" else "disparity"),
            max_depth=section.max_depth,
            input_size=section.input_size or config.data.input_size,
            batch=section.batch,
            limit=section.limit,
        )
    except ConfigError as error:
        raise ConfigError(f"validation.{error}") from None


def short_name(path: str, among: Sequence[str]) -> str:
    """The last folders of a dataset's path, as many as tell it from the others."""
    parts = [other.rstrip("/").split("/") for other in among]
    own = path.rstrip("/").split("/")
    for length in range(1, len(own) + 1):
        if sum(other[-length:] == own[-length:] for other in parts) == 1:
            return "/".join(own[-length:])
    return path
