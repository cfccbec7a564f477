"""The task protocol: what is particular to one way of training. The loop, engine and checkpoints know no task.

A task module defines one class named `TrainingTask`. Adding a task is one file here, its test and a recipe.

Shape suffixes: B batch, C channel, H W pixels.
"""

from __future__ import annotations

import abc
import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from dataio.spec import RoleNeeds
from dataio.types import Batch
from model import DepthAnything, get_preset
from model.presets import Preset
from model.save import record_of
from model.types import WeightsError
from trainer.config import ConfigError, Section, parse_config
from trainer.config_train import ModelSection, TrainConfig
from trainer.salvage import salvage

Forward = Callable[..., Any]  # the trainable network as the engine wraps it


class Task(abc.ABC):
    """One way of training.

    Every loss term is a *sum* over images; its denominator is a *count* of images that is known before the forward
    pass. The loop adds the counts of all ranks, so the gradient does not depend on how the batch was cut.
    """

    Options: ClassVar[type[Section]] = Section

    def __init__(self, options: BaseModel, model: ModelSection) -> None:
        self.options = options
        self.model = model

    @property
    @abc.abstractmethod
    def needs(self) -> Mapping[str, RoleNeeds]:
        """The roles that must be configured, no more and no less, and what each requires of its data."""

    @property
    def files(self) -> dict[str, str]:
        """What this task reads beside its data, by configuration field: looked for before a worker starts."""
        return self.model.files

    @property
    def views(self) -> tuple[str, ...]:
        """The views of `Batch` that this task reads."""
        return ("student",)

    @abc.abstractmethod
    def build(self) -> nn.Module:
        """The trainable network, fp32, on the CPU, initialised. Raises WeightsError when a named file does not fit."""

    def prepare(self, device: torch.device) -> None:  # noqa: B027  most tasks have nothing frozen
        """Build what is frozen: it stays outside the engine, so that no optimizer or checkpoint mangles it."""

    @abc.abstractmethod
    def parameter_groups(self, module: nn.Module) -> dict[str, list[tuple[str, nn.Parameter]]]:
        """Named trainable parameters per group; group names are those of `Loop.learning_rates`."""

    @property
    @abc.abstractmethod
    def term_weights(self) -> dict[str, float]:
        """Weight of every loss term; its keys are the terms."""

    @abc.abstractmethod
    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Images with weight per term in this rank's share of the batch: scalars on the device."""

    @abc.abstractmethod
    def sums(self, forward: Forward, batch: Batch) -> dict[str, Tensor]:
        """Sum over the images of a micro-batch of each term's per-image loss: differentiable scalars."""

    @abc.abstractmethod
    def export(self, module: nn.Module, folder: str) -> None:
        """Write the trained network in the format that other commands load."""

    @abc.abstractmethod
    def preview(self, module: nn.Module, image_BCHW: Tensor) -> Tensor:
        """A picture of what the network says: [B, H, W], larger is nearer (or brighter)."""

    def network_record(self, module: nn.Module) -> dict[str, Any] | None:
        """What a checkpoint's tensors cannot say about the network (preset, taps, head), for its manifest."""
        return None

    def frozen_parameters(self) -> int:
        """How many numbers the frozen networks have, before they are built."""
        return 0

    def frozen_rows(self, rows: Mapping[str, int]) -> list[tuple[nn.Module, int]]:
        """The frozen networks, once prepared, each with how many images of so many by role go through it."""
        return []

    def frozen_fingerprint(self) -> str | None:
        """Fingerprint of frozen networks, for the checkpoint manifest."""
        return None


class DepthTask(Task):
    """A task whose network is a DepthAnything; it starts from the files of `model:`."""

    head: ClassVar[Literal["relative", "metric"]] = "relative"  # of the network: disparity, or metres

    def __init__(self, options: BaseModel, model: ModelSection) -> None:
        super().__init__(options, model)
        chosen = model.model_dump(include={"position_mode", "readout", "fusion"}, exclude_none=True)
        # Of the network; `build` puts that of the weights here. A frozen encoder beside it is of the same.
        self.preset = replace(preset_of(model), **chosen)
        if self.preset.head != self.head:
            what, wanted = ("metres", "v2-vits-metric-indoor") if self.head == "metric" else ("disparity", "v2-vits")
            raise ConfigError(
                f"model.preset: found {model.preset!r}, but this task learns {what}; take one such as {wanted!r}"
            )

    def build(self) -> nn.Module:
        if self.model.weights:
            network = DepthAnything.from_pretrained(
                self.model.weights, self.model.preset, position_mode=self.model.position_mode, fusion=self.model.fusion
            )
            if self.model.readout not in (None, network.preset.readout):
                raise ConfigError(
                    f"model.readout: is {self.model.readout!r}, but {self.model.weights} has "
                    f"{network.preset.readout!r}; leave it out"
                )
        else:
            network = DepthAnything.from_preset(self.preset, encoder_weights=self.model.encoder_weights)
        network.set_activation_checkpointing(self.model.activation_checkpointing)
        self.preset = network.preset
        return network

    def network_record(self, module: nn.Module) -> dict[str, Any] | None:
        assert isinstance(module, DepthAnything)
        return record_of(module.preset)

    def parameter_groups(self, module: nn.Module) -> dict[str, list[tuple[str, nn.Parameter]]]:
        return encoder_decoder_groups(module)

    def export(self, module: nn.Module, folder: str) -> None:
        assert isinstance(module, DepthAnything)
        module.save_pretrained(folder)

    def preview(self, module: nn.Module, image_BCHW: Tensor) -> Tensor:
        disparity_BHW: Tensor = module(image_BCHW).disparity_BHW
        return disparity_BHW


def preset_of(model: ModelSection) -> Preset:
    """The preset that the section names. Raises WeightsError."""
    try:
        return get_preset(model.preset)
    except WeightsError as error:
        raise WeightsError(f"model.preset: {error}") from None


def task_names() -> list[str]:
    """Names of all tasks: the modules beside this one."""
    package = importlib.import_module("trainer.tasks")
    return sorted(m.name for m in pkgutil.iter_modules(package.__path__) if m.name != "base")


def make_task(config: TrainConfig) -> Task:
    """Import the task named by `config.task.kind`, check its options and that the configured roles are those it needs.

    Raises ConfigError naming the field otherwise.
    """
    cls = _class_of(config)
    kind = config.task.kind
    task = cls(parse_config(cls.Options, config.task.options, source=f"task {kind!r}", prefix="task."), config.model)
    for problem in _role_problems(config, task):
        raise problem
    return task


def look_at_task(config: TrainConfig) -> tuple[Task | None, list[ConfigError | WeightsError]]:
    """(the task, with stand-ins for wrong options, or None; everything that is wrong with it and its preset)."""
    problems: list[ConfigError | WeightsError] = []
    try:
        preset_of(config.model)
    except WeightsError as error:
        problems.append(error)
    try:
        cls = _class_of(config)
    except ConfigError as error:
        return None, [error, *problems]
    read = salvage(cls.Options, config.task.options, prefix="task.")
    problems = [*(ConfigError(line) for line in read.problems), *problems]
    if read.config is None or len(problems) > len(read.problems):
        return None, problems
    try:
        task = cls(read.config, config.model)
    except (ConfigError, WeightsError) as error:
        return None, [*problems, error]
    # which roles it needs hangs on its options
    return task, problems if read.wrong else [*problems, *_role_problems(config, task)]


def _class_of(config: TrainConfig) -> type[Task]:
    kind = config.task.kind
    if kind not in task_names():
        raise ConfigError(f"task.kind: found {kind!r}; known tasks: {', '.join(task_names())}")
    cls: type[Task] = importlib.import_module(f"trainer.tasks.{kind}").TrainingTask
    return cls


def _role_problems(config: TrainConfig, task: Task) -> Iterator[ConfigError]:
    kind, given, needed = config.task.kind, set(config.data.roles), set(task.needs)
    if given != needed:
        yield ConfigError(f"data.roles: task {kind!r} needs {sorted(needed)}, found {sorted(given)}")
    for role, need in task.needs.items():
        if role not in given:
            continue
        labels = config.data.roles[role].labels
        if need.sidecar and not labels:
            yield ConfigError(f"data.roles.{role}.labels: missing; name the sidecar that `fathom label run` wrote")
        if not need.sidecar and labels:
            yield ConfigError(f"data.roles.{role}.labels: task {kind!r} reads no sidecar for this role; remove it")


def weight_of(batch: Batch, role: str) -> Tensor:
    """Number of images with weight among the rows of `role`: a scalar on the device."""
    return batch.weight_B[batch.rows(role)].sum()


def encoder_decoder_groups(module: nn.Module) -> dict[str, list[tuple[str, nn.Parameter]]]:
    """Trainable parameters by the originals' two learning rates; every network calls its encoder `pretrained`."""
    trainable = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    return {
        "encoder": [(name, p) for name, p in trainable if name.startswith("pretrained.")],
        "decoder": [(name, p) for name, p in trainable if not name.startswith("pretrained.")],
    }
