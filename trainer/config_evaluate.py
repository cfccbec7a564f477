"""The configuration of an evaluation. Imports no torch."""

from __future__ import annotations

from pydantic import Field

from model.presets import PositionMode
from trainer.config import Section


class EvaluateConfig(Section):
    """Weights against labelled datasets, under both published protocols (recipes of MoGe and of the V2 paper)."""

    weights: str
    preset: str | None = None
    position_mode: PositionMode | None = None
    datasets: tuple[str, ...] = Field(min_length=1)
    input_size: int = Field(default=518, multiple_of=14, gt=0)
    max_depth: float | None = Field(default=None, gt=0, description="metres; farther pixels are left out")
    limit: int | None = Field(default=None, ge=1, description="only the first N samples of each dataset")
    batch: int = Field(default=8, ge=1)
    threads: int = Field(default=2, ge=1)
    use_gpu: bool = False
    out: str = "evaluation"
