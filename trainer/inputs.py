"""What a training run is going to read, looked at before a worker starts: is it there, does it fit, how long is it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from cluster import storage
from cluster.storage import StorageError
from dataio.dataset import Dataset
from dataio.label_quality import check_filter
from dataio.labels import INFO_NAME, LabelStore
from dataio.plan import pass_batches, skipped_batches
from dataio.spec import DataError, RoleSpec
from model.types import WeightsError
from trainer.config import ConfigError, parse_config
from trainer.config_train import TrainConfig

T = TypeVar("T")

Problem = ConfigError | DataError | StorageError | WeightsError


def check_inputs(config: TrainConfig) -> dict[str, int]:
    """Everything that can be known to be wrong before a worker starts. Returns each role's samples.

    Raises ConfigError, DataError, StorageError or WeightsError; ConfigError, a line each, when there are several.
    """
    samples, problems = look_at_inputs(config)
    if len(problems) > 1:
        raise ConfigError("\n".join(map(str, problems)))
    if problems:
        raise problems[0]
    return samples


def look_at_inputs(config: TrainConfig) -> tuple[dict[str, int], list[Problem]]:
    """(samples of each role, as far as its datasets can be opened; everything that is wrong)."""
    from trainer.tasks.base import look_at_task
    from trainer.trackers import check_trackers

    samples = dict.fromkeys(config.data.roles, 0)
    task, found = look_at_task(config)
    problems: list[Problem] = [*found]

    def attempt(action: Callable[..., T], *arguments: Any) -> T | None:
        try:
            return action(*arguments)
        except (ConfigError, DataError, StorageError, WeightsError) as error:
            problems.append(error)
            return None

    attempt(check_trackers, config)
    for role, spec in config.data.roles.items():
        for index, path in enumerate(spec.datasets):
            dataset = attempt(open_dataset, f"data.roles.{role}.datasets", path)
            if dataset is None:
                continue
            samples[role] += dataset.info.samples
            attempt(check_cut, dataset, config.data.max_bad_fraction)
            if index < len(spec.labels):
                attempt(check_labels, role, spec.labels[index], dataset)
            elif not spec.labels:
                attempt(check_role, role, dataset)
        needs = task.needs.get(role) if task else None
        attempt(check_quality, role, spec, needs is None or needs.sidecar)
    if config.validation.datasets and task is not None:
        from trainer.validation import validation_of

        attempt(validation_of, config, getattr(task, "preset", None))
    for path in config.validation.datasets:
        attempt(check_depth, path)
    for name, file in (task.files if task else config.model.files).items():
        attempt(check_file, name, file)
    return samples, problems


def open_dataset(field: str, path: str) -> Dataset:
    """The dataset that a field names. Raises DataError or StorageError, which begin with the field."""
    try:
        return Dataset.open(path)
    except (DataError, StorageError) as error:
        raise type(error)(f"{field}: {error}") from None


def check_role(role: str, dataset: Dataset) -> None:
    """ConfigError when photographs without depth are to serve as labelled ones."""
    if role == "labelled" and dataset.info.role != "labelled":
        raise ConfigError(
            f"data.roles.{role}.datasets: {dataset.path} has no depth; it is packed as {dataset.info.role}"
        )


def check_depth(path: str) -> None:
    """ConfigError when a dataset to validate on has no depth."""
    if open_dataset("validation.datasets", path).info.quantity is None:
        raise ConfigError(f"validation.datasets: {path} has no depth to compare with")


def check_file(name: str, file: str) -> None:
    """ConfigError when what a field names is not there."""
    if not storage.exists(file):
        raise ConfigError(f"{name}: {file}: no such file or folder")


def with_steps(config: TrainConfig, samples: Mapping[str, int]) -> TrainConfig:
    """The configuration with `passes` put into steps. Raises ConfigError when that is less than the warm-up, or when
    the role is mixed by weights."""
    if not config.passes:
        return config
    steps, source = steps_of(config, samples)
    values = config.model_dump(mode="json") | {"steps": steps, "passes": {}}
    return parse_config(TrainConfig, values, source=source)


def steps_of(config: TrainConfig, samples: Mapping[str, int]) -> tuple[int, str]:
    """The steps that the `passes` are, and a line that says so: the whole passes, their partial batches included, and
    the part of one that is left. Raises ConfigError when the role is mixed by weights."""
    ((role, passes),) = config.passes.items()
    spec = config.data.roles[role]
    if spec.weights:
        raise ConfigError(f"passes.{role}: its datasets are mixed by weights, which has no pass; give steps")
    steps = max(1, round(passes * pass_batches(samples[role], spec.batch, spec.lanes)))
    return steps, f"passes: {passes:g} of {role} are {steps} steps"


def order_facts(config: TrainConfig, samples: Mapping[str, int]) -> dict[str, Any]:
    """How long a pass over each role is, and what of the order is passed over: `passes` and `passed_over`."""
    roles = config.data.roles
    passes = {
        role: {"samples": samples[role], "steps": pass_batches(samples[role], spec.batch, spec.lanes)}
        for role, spec in roles.items()
        if not spec.weights and not spec.batch % spec.lanes
    }
    size = sum(spec.batch for spec in roles.values())
    passed_over = [
        {"steps": [first, stop], "samples": [first * size, stop * size]} for first, stop in skipped_batches(config.data)
    ]
    return {"passes": passes, "passed_over": passed_over}


def order_lines(facts: Mapping[str, Any]) -> list[str]:
    """`order_facts` for people."""
    lines = [
        f"{role}: {one['samples']} samples, a pass is {one['steps']} steps" for role, one in facts["passes"].items()
    ]
    for stretch in facts["passed_over"]:
        (first, stop), (start, end) = stretch["steps"], stretch["samples"]
        lines.append(f"passes over {stop - first} global batches, samples {start}:{end} of the order")
    return lines


def check_cut(dataset: Dataset, max_bad_fraction: float) -> None:
    """DataError when tars that were cut have lost more samples than may be bad; a warning when they have lost fewer."""
    lost = {shard.tar: shard.lost for shard in dataset.shards if shard.lost}
    if not lost:
        return
    total = sum(lost.values())
    found = (
        f"{next(iter(lost))}{' and others' if len(lost) > 1 else ''} was cut in half while copied or written: {total} "
        f"of {dataset.info.samples} samples of {dataset.path} are lost; copy it again"
    )
    if total > max_bad_fraction * dataset.info.samples:
        raise DataError(f"{found}, or raise data.max_bad_fraction ({max_bad_fraction})")
    print(f"warning: {found}", file=sys.stderr)


def check_quality(role: str, spec: RoleSpec, reads_labels: bool) -> None:
    """DataError when a role filters by a quality that its labels, as far as there are any, do not have."""
    if spec.min_quality is None:
        return
    labels = {}
    for folder in spec.labels if reads_labels else ():
        if not storage.exists(storage.join(folder, INFO_NAME)):
            return  # `check_labels` tells of it
        labels[folder] = LabelStore.open(folder).description
    check_filter(f"data.roles.{role}.min_quality", spec.min_quality, labels)


def check_labels(role: str, folder: str, dataset: Dataset) -> None:
    """DataError unless the labels are complete; ConfigError unless they were made of this very dataset."""
    store = LabelStore.open(folder)
    made_of = store.description.get("dataset", {})
    if made_of.get("fingerprint") not in (None, dataset.fingerprint):
        raise ConfigError(
            f"data.roles.{role}.labels: {folder} labels another dataset ({made_of.get('name')}, "
            f"{made_of.get('samples')} samples), not {dataset.path} ({dataset.info.name}, {dataset.info.samples} "
            "samples) as it is now; name its own labels, or label it again"
        )
    store.complete_for(dataset)
