"""The configuration of a training run. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, model_validator

from dataio.spec import DataSpec
from model.presets import PositionMode
from trainer.config import Finding, Section, complain
from trainer.config_cluster import ClusterSection
from trainer.schedule import Decay


class TaskSection(BaseModel):
    """`kind` names a module of trainer/tasks; every other key belongs to that task's own Options."""

    model_config = ConfigDict(extra="allow", frozen=True)
    kind: str

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class ModelSection(Section):
    """Which network, and what it starts from."""

    preset: str = "v2-vits"
    encoder_weights: str | None = Field(
        default=None, description="file of a pre-trained encoder, DINOv2's for instance"
    )
    weights: str | None = Field(default=None, description="file or folder of a whole network to start from")
    position_mode: PositionMode | None = Field(
        default=None, description="how position embeddings are resized; null: as the weights' file says, else official"
    )
    readout: Literal["ignore", "project"] | None = Field(
        default=None, description="the class token in the decoder (DPT eq. 3); null: as in the weights, else ignore"
    )
    fusion: Literal["interpolate", "even"] | None = Field(
        default=None, description="even: every rise of the decoder is x2, for grids of even sides"
    )
    activation_checkpointing: bool = Field(
        default=False, description="recompute the encoder's blocks in the backward pass: less memory, more time"
    )

    @property
    def files(self) -> dict[str, str]:
        """What is read, by configuration field."""
        named = {"model.weights": self.weights, "model.encoder_weights": self.encoder_weights}
        return {field: path for field, path in named.items() if path}


Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimSection(Section):
    """Two learning rates (arXiv 2401.10891, section 4: the decoder's is ten times the encoder's), one schedule.

    The schedule is a function of samples seen, so neither the batch size nor the number of ranks changes it.
    """

    optimizer: Literal["adamw", "adam"] = Field(
        default="adamw", description="adam adds weight_decay to the gradient, as torch.optim.Adam does"
    )
    encoder_lr: float = Field(default=5e-6, ge=0)
    decoder_lr: float = Field(default=5e-5, ge=0)
    weight_decay: float = Field(default=0.01, ge=0)
    decay_norms_and_biases: bool = Field(
        default=True, description="false: vectors (norms, biases, LayerScale) and embeddings are not decayed"
    )
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0)
    schedule: Decay = "linear"
    power: float = Field(default=0.9, gt=0, description="exponent of the poly schedule")
    warmup_samples: int = Field(default=0, ge=0)
    clip: float = Field(default=0.0, ge=0, description="largest gradient norm; 0 does not clip")
    ema_decay: float | None = Field(
        default=None, gt=0, lt=1, description="keep a moving average of the weights; the export and validation use it"
    )


class EngineSection(Section):
    """How the step is carried out; nothing here changes what is computed, but for rounding."""

    zero_stage: Literal[0, 1, 2, 3] = 2
    cpu_offload: bool = Field(default=False, description="optimizer states in main memory; needs zero_stage 1 to 3")
    precision: Literal["bf16", "fp32"] = "bf16"
    micro_batch: Annotated[int, Field(ge=1)] | Literal["auto"] | None = Field(
        default=None, description="rows per forward pass and rank; auto: the largest that fits; null: all at once"
    )
    max_skipped_steps: int = Field(default=20, ge=1, description="consecutive steps without an update before giving up")
    debug: bool = Field(default=False, description="check invariants before and after every step; slow")

    @model_validator(mode="after")
    def _offload_needs_zero(self, info: ValidationInfo) -> EngineSection:
        if self.cpu_offload and not self.zero_stage:
            says = "engine.cpu_offload: needs engine.zero_stage 1, 2 or 3, found 0"
            complain([Finding(says, ("engine.cpu_offload", "engine.zero_stage"))], info)
        return self


class RecoverySection(Section):
    """What a run survives by itself: it starts its ranks again from the newest whole checkpoint."""

    max_failures: int | None = Field(
        default=3, ge=0, description="ends of ranks in a row without a new checkpoint; null: any number"
    )
    max_preemptions: int | None = Field(default=None, ge=0, description="the same of machines that go away")
    min_workers: int | None = Field(default=None, ge=1, description="null: cluster.workers, always")
    capacity_wait_s: float = Field(default=600.0, ge=0, description="for machines to come back, when too few are left")
    grace_s: float | None = Field(
        default=None, gt=0, description="from SIGTERM to the kill by what runs the driver; null: nobody knows"
    )
    grow_patience_s: float = Field(
        default=60.0, ge=0, description="how long there must be room for more before a smaller group is started anew"
    )
    silence_s: float = Field(default=30.0, gt=0, description="without a word of a rank before it counts as frozen")
    hang_factor: float = Field(default=10.0, gt=1, description="times the longest that a phase took before: it hangs")
    hang_shortest_s: float = Field(default=60.0, gt=0, description="no phase hangs before that")
    on_non_finite: Literal["stop", "roll_back"] = Field(
        default="stop", description="after engine.max_skipped_steps: end, or go back and pass over those samples"
    )
    on_spike: Literal["ignore", "stop", "roll_back"] = Field(
        default="ignore", description="when the loss leaves its course; roll_back passes over the samples around it"
    )
    spike_factor: float = Field(default=8.0, gt=0, description="sigmas above the median of the losses before")
    spike_steps: int = Field(default=10, ge=1, description="in a row above that: a spike")
    spike_window: int = Field(default=200, ge=4, description="losses before, to compare with")
    spike_lead_steps: int = Field(default=10, ge=0, description="passed over before the spike, too")
    max_rollbacks: int = Field(default=3, ge=0, description="in a row, without getting past; then the run ends")


class CheckpointSection(Section):
    """When to save, and what stays. A run also saves at its end and when it is stopped."""

    every: int | None = Field(default=1000, ge=1, description="steps; null: by the clock alone")
    every_minutes: float | None = Field(default=None, gt=0)
    keep: int = Field(default=2, ge=1, description="newest checkpoints that stay")
    keep_best: int = Field(default=0, ge=0, description="checkpoints with the best validation score that stay as well")


class ValidationSection(Section):
    """Held-out labelled datasets, measured while training; needs a task whose network predicts depth."""

    datasets: tuple[str, ...] = ()
    every: int = Field(default=1000, ge=1, description="steps")
    limit: int | None = Field(default=None, ge=1, description="only the first N samples of each dataset")
    protocol: str | None = Field(default=None, description="docs/evaluation.md; null: disparity or metric, by the head")
    metric: str = Field(default="abs_rel", description="what checkpoint.keep_best goes by")
    max_depth: float | None = Field(default=None, gt=0, description="metres; what is as far or farther is left out")
    input_size: int | None = Field(default=None, multiple_of=14, gt=0, description="null: data.input_size")
    batch: int = Field(default=8, ge=1)


class WandbSection(Section):
    """Weights & Biases, where it is installed."""

    project: str
    entity: str | None = None
    mode: Literal["online", "offline"] = "online"


class TrackSection(Section):
    """Where else the logged numbers go, beside metrics.jsonl and Prometheus."""

    tensorboard: bool = True
    wandb: WandbSection | None = None


class TrainConfig(Section):
    """A whole training run."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    runs: str = Field(default_factory=lambda: os.path.abspath("runs"))  # workers stand in another folder
    seed: int = Field(default=0, ge=0)
    steps: int = Field(default=0, ge=1, description="optimizer steps; or say passes")  # 0: not known yet
    passes: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict, description="instead of steps: how often the run goes through one role, {unlabelled: 1}"
    )
    task: TaskSection
    model: ModelSection
    data: DataSpec
    optim: OptimSection = OptimSection()
    engine: EngineSection = EngineSection()
    cluster: ClusterSection = ClusterSection()
    recovery: RecoverySection = RecoverySection()
    checkpoint: CheckpointSection = CheckpointSection()
    validation: ValidationSection = ValidationSection()
    track: TrackSection = TrackSection()
    log_every: int = Field(default=10, ge=1)
    preview_every: int = Field(default=500, ge=1)

    @model_validator(mode="after")
    def _check(self, info: ValidationInfo) -> TrainConfig:
        complain([*_role_findings(self), *length_findings(self), *_other_findings(self)], info)
        return self

    @property
    def global_batch(self) -> int:
        return sum(spec.batch for spec in self.data.roles.values())

    @property
    def folder(self) -> str:
        return os.path.join(self.runs, self.name)


def length_findings(config: TrainConfig) -> Iterator[Finding]:
    """How long the run is; with `passes` that is known once the datasets are open."""
    if bool(config.steps) == bool(config.passes):
        found = "both are given" if config.steps else "neither is given"
        yield Finding(f"steps: give steps or passes; {found}", ("steps", "passes"))
    if config.passes and (len(config.passes) > 1 or not config.passes.keys() <= config.data.roles.keys()):
        says = f"passes: found {config.passes}; name one of the roles {sorted(config.data.roles)}"
        yield Finding(says, ("passes", "data.roles"))
    total = config.steps * config.global_batch
    if config.steps and config.data.roles and config.optim.warmup_samples >= total:
        batches = [f"data.roles.{role}.batch" for role in config.data.roles]
        yield Finding(
            f"optim.warmup_samples: {config.optim.warmup_samples} must be less than the run's {total} samples",
            ("optim.warmup_samples", "steps", "passes", "data.roles", *batches),
        )


def _role_findings(config: TrainConfig) -> Iterator[Finding]:
    """What no single field of a role can tell."""
    from dataio.mix import quotas
    from dataio.plan import check_lanes

    for role, spec in config.data.roles.items():
        at = f"data.roles.{role}"
        datasets, labels, weights, lanes = (f"{at}.{name}" for name in ("datasets", "labels", "weights", "lanes"))
        if not spec.datasets:
            yield Finding(f"{datasets}: is empty; name at least one dataset folder", (datasets,))
        if spec.labels and len(spec.labels) != len(spec.datasets):
            says = f"{labels}: {len(spec.labels)} folders for {len(spec.datasets)} datasets; name one each"
            yield Finding(says, (labels, datasets))
        if spec.weights and spec.datasets:
            try:
                quotas(role, spec.weights, len(spec.datasets))
            except ValueError as error:
                says = f"{weights}: {str(error).removeprefix(f'role {role!r}: ')}"
                yield Finding(says, (weights, datasets))
        try:
            check_lanes(role, spec.batch, spec.lanes, per_lane=2 if spec.perturbation.cutmix_p > 0 else 1)
        except ValueError as error:
            says = f"{lanes}: {str(error).removeprefix(f'role {role!r}: ')}"
            yield Finding(says, (lanes, f"{at}.batch", f"{at}.perturbation.cutmix_p"))
        if config.cluster.workers > spec.lanes:
            says = f"{lanes}: {spec.lanes} cannot feed {config.cluster.workers} cluster.workers; raise the lanes"
            yield Finding(says, (lanes, "cluster.workers"))


def _other_findings(config: TrainConfig) -> Iterator[Finding]:
    for start, stop in config.data.skip_samples:
        if not 0 <= start < stop:
            says = f"data.skip_samples: {start}:{stop} is no stretch of samples; from must be below to"
            yield Finding(says, ("data.skip_samples",))
    if not config.data.roles:
        yield Finding("data.roles: is empty; name at least one role and its datasets", ("data.roles",))
    if config.checkpoint.every is None and config.checkpoint.every_minutes is None:
        says = "checkpoint.every: null needs checkpoint.every_minutes"
        yield Finding(says, ("checkpoint.every", "checkpoint.every_minutes"))
    workers = config.cluster.workers
    if (config.recovery.min_workers or 0) > workers:
        says = f"recovery.min_workers: {config.recovery.min_workers} are more than cluster.workers, {workers}"
        yield Finding(says, ("recovery.min_workers", "cluster.workers"))
    if config.checkpoint.keep_best and not config.validation.datasets:
        says = "checkpoint.keep_best: needs validation.datasets to tell which checkpoint is best"
        yield Finding(says, ("checkpoint.keep_best", "validation.datasets"))
