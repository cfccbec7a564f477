"""The configuration of an evaluation. Imports no torch."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from model.presets import PositionMode
from trainer.benchmarks import PAIRS, get_benchmark
from trainer.config import Finding, Section, complain
from trainer.config_cluster import ClusterSection
from trainer.protocols import get_protocol


class DatasetEntry(Section):
    """One dataset; a plain path means every valid pixel of all its images."""

    path: str = Field(min_length=1)
    benchmark: str | None = Field(default=None, description="a name of trainer/benchmarks.py: crops, caps, split")
    protocols: tuple[str, ...] | None = Field(default=None, description="null: the evaluation's")

    @field_validator("benchmark")
    @classmethod
    def _benchmark(cls, name: str | None) -> str | None:
        get_benchmark(name)
        return name

    @field_validator("protocols")
    @classmethod
    def _protocols(cls, names: tuple[str, ...] | None) -> tuple[str, ...] | None:
        return _known(names)

    @model_validator(mode="after")
    def _pairs(self, info: ValidationInfo) -> DatasetEntry:
        if self.benchmark == PAIRS and self.protocols not in (None, ("pairs",)):
            says = f"protocols: {PAIRS} has pairs of points, found {self.protocols}; leave protocols out"
            complain([Finding(f"datasets: {self.path}: {says}" if isinstance(info.context, list) else says, ())], info)
        return self


class EvaluateCluster(ClusterSection):
    """Where it runs; one worker needs no Ray."""

    threads: int = Field(default=2, ge=1, description="CPU threads of one worker")


class BaselineSection(Section):
    """A labelled training set whose mean depth map and typical depth are measured beside the network."""

    dataset: str = Field(min_length=1)
    limit: int | None = Field(default=None, ge=1, description="only its first N samples")


class EvaluateConfig(Section):
    """Weights against labelled datasets, under the protocols of trainer/protocols.py."""

    weights: str
    preset: str | None = None
    position_mode: PositionMode | None = None
    datasets: tuple[DatasetEntry, ...]
    protocols: tuple[str, ...] | None = Field(default=None, description="null: depth and disparity, or metric")
    average: Literal["images", "pixels"] = Field(default="images", description="what counts the same in a mean")
    input_size: int = Field(default=518, multiple_of=14, gt=0)
    flip: bool = Field(default=False, description="average the predictions of the image and its mirror image")
    precision: Literal["bf16", "fp32"] = "fp32"
    max_depth: float | None = Field(default=None, gt=0, description="metres; only nearer pixels count")
    limit: int | None = Field(default=None, ge=1, description="only the first N samples of each dataset")
    batch: int = Field(default=8, ge=1)
    worst: int = Field(default=8, ge=0, description="rows of worst.png, per dataset")
    baseline: BaselineSection | None = None
    cluster: EvaluateCluster = EvaluateCluster()
    out: str = "evaluation"

    @field_validator("datasets", mode="before")
    @classmethod
    def _entries(cls, entries: Any) -> Any:
        if not isinstance(entries, list | tuple):
            return entries
        return tuple({"path": entry} if isinstance(entry, str) else entry for entry in entries)

    @field_validator("datasets")
    @classmethod
    def _some(cls, entries: tuple[DatasetEntry, ...], info: ValidationInfo) -> tuple[DatasetEntry, ...]:
        if not entries:  # as min_length, pydantic would add it to every mistake inside an entry
            if not isinstance(info.context, list):
                raise ValueError("name at least one dataset")
            complain([Finding("datasets: found []; name at least one dataset", ("datasets",))], info)
        return entries

    @field_validator("protocols")
    @classmethod
    def _protocols(cls, names: tuple[str, ...] | None) -> tuple[str, ...] | None:
        return _known(names)


def _known(names: tuple[str, ...] | None) -> tuple[str, ...] | None:
    if names is not None and not names:
        raise ValueError("name at least one, or leave it out")
    for name in names or ():
        get_protocol(name)
        if name == "pairs":
            raise ValueError(f"pairs goes with benchmark {PAIRS} alone, and needs no naming")
    return names
