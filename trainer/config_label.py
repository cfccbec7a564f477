"""The configuration of a pseudo-labelling job. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from model.presets import PositionMode
from trainer.config import Section
from trainer.config_cluster import ClusterSection


class LabelConfig(Section):
    """One pseudo-labelling job: a teacher over an unlabelled dataset."""

    dataset: str
    weights: str
    preset: str | None = None
    position_mode: PositionMode | None = None
    out: str | None = Field(default=None, description="folder of sidecars; default: labels/ inside the dataset")
    input_size: int = Field(default=518, multiple_of=14, gt=0)
    flip: bool = Field(default=True, description="average the predictions of the image and its mirror image")
    precision: Literal["bf16", "fp32"] = "fp32"
    batch: int = Field(default=8, ge=1)
    cluster: ClusterSection = ClusterSection()
