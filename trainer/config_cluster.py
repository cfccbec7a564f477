"""Where a verb's work runs: the section `cluster` of every configuration. Imports no torch."""

from __future__ import annotations

from pydantic import Field

from trainer.config import Section


class ClusterSection(Section):
    """Where it runs: `address: null` is that of RAY_ADDRESS, as in a job, or else an embedded Ray."""

    address: str | None = None
    workers: int = Field(default=1, ge=1)
    threads: int = Field(default=1, ge=1, description="CPU threads of one worker")
    use_gpu: bool = False
    metrics_host: str = Field(
        default="127.0.0.1",
        description="where live metrics are served: 127.0.0.1 this machine alone, 0.0.0.0 all that reach it",
    )
