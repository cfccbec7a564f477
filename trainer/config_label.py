"""The configuration of a pseudo-labelling job. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from model.presets import PositionMode
from trainer.config import Section
from trainer.config_cluster import ClusterSection

Quality = Literal["off", "flip", "flip+scale"]
Encoding = Literal["png", "npy", "jxl"]
CPU_BATCH, GPU_BATCH = 1, 16


class LabelCluster(ClusterSection):
    """Where labelling runs: `workers: null` is as many as there is room for, one on each GPU, or on `threads` CPUs."""

    workers: int | None = Field(default=None, ge=1)  # type: ignore[assignment]
    lease_s: float = Field(default=60.0, ge=1, description="a worker that says nothing for so long has lost its shard")
    telemetry: str | None = Field(
        default=None,
        description="folder that says where live metrics are served; default: telemetry/ beside local labels",
    )

    @field_validator("telemetry")
    @classmethod
    def _on_a_disk(cls, value: str | None) -> str | None:
        if value is not None and "://" in value:
            raise ValueError("must be a folder on a disk")
        return value


class LabelConfig(Section):
    """One pseudo-labelling job: a teacher over an unlabelled dataset."""

    dataset: str
    weights: str
    preset: str | None = None
    position_mode: PositionMode | None = None
    out: str | None = Field(default=None, description="folder of sidecars; default: labels/ inside the dataset")
    input_size: int = Field(default=518, multiple_of=14, gt=0)
    flip: bool = Field(default=False, description="average the predictions of the image and its mirror image")
    quality: Quality = Field(default="off", description="how well predictions of one image agree, stored per label")
    precision: Literal["bf16", "fp32"] = "fp32"
    encoding: Encoding = Field(default="png", description="how labels are stored")
    batch: int | None = Field(default=None, ge=1, description="images per forward pass; default: 1 on CPUs, 16 on GPUs")
    compile: bool = Field(default=False, description="torch.compile for the usual aspect ratios")
    cluster: LabelCluster = LabelCluster()

    @property
    def rows(self) -> int:
        """Images per forward pass, at most."""
        return self.batch or (GPU_BATCH if self.cluster.use_gpu else CPU_BATCH)
