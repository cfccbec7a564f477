"""From a configuration to a trained network: the driver's part (`train`) and each rank's part (`train_worker`)."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from cluster import storage
from cluster.lock import locked_folder
from cluster.progress import Progress
from cluster.stop import StopFlag
from dataio.dataset import Dataset
from dataio.labels import LabelStore
from dataio.plan import pass_batches, skipped_batches
from dataio.spec import DataError
from trainer.changes import refuse_changes, say_changes
from trainer.checkpoint import CheckpointError, clean, find_checkpoint, step_of
from trainer.config import ConfigError, dump_config, parse_config, read_config
from trainer.config_train import TrainConfig
from trainer.journal import Journal, read_json_lines

PACKAGES = (
    "torch",
    "deepspeed",
    "ray",
    "timm",
    "webdataset",
    "nvidia-dali-cuda130",
    "nvidia-dali-cuda120",
    "pillow-simd",
)
TELEMETRY = "telemetry"  # folder of a run, while it runs: where its ranks can be scraped


@dataclass(frozen=True, kw_only=True)
class TrainOutcome:
    """How a run ended: `stopped` is the reason of an early stop (SIGINT, SIGTERM) or None when it is complete."""

    folder: str
    step: int
    stopped: str | None = None

    @property
    def weights(self) -> str:
        """Folder of the exported network."""
        return os.path.join(self.folder, "weights")

    @property
    def quarantined(self) -> int:
        """How many bad samples the run's quarantine.RANK.jsonl files name, those of earlier attempts included."""
        names = [name for name in storage.listdir(self.folder) if name.startswith("quarantine.")]
        return sum(len(read_json_lines(os.path.join(self.folder, name))) for name in names)


def train(
    config: TrainConfig,
    *,
    resume: bool = False,
    on_progress: Callable[[Mapping[str, Any]], None] | None = None,
    stop: StopFlag | None = None,
    say: Callable[[str], None] | None = None,
) -> TrainOutcome:
    """Train on `config.cluster.workers` ranks of an embedded or a given Ray cluster; returns when done or stopped.

    `say` gets what is worth knowing before the first step.

    Raises ConfigError, DataError, WeightsError or StorageError for what the user can mend; whatever a rank raised
    otherwise.
    """
    samples = check_inputs(config)
    config = with_steps(config, samples)
    if resume and not os.path.exists(os.path.join(config.folder, "config.yaml")):
        raise ConfigError(f"{config.folder}: no run to resume; start it without --resume")
    with locked_folder(config.folder, "this run"):
        config = with_earlier_skips(config) if resume else config
        before, journal = settings_of(config.folder), Journal(config.folder)
        done = finished_step(journal)  # before the resume itself writes to the journal
        checkpoint = prepare_folder(config, resume)
        forget_ranks(config.folder)
        if checkpoint and done is not None and done >= config.steps:
            return TrainOutcome(folder=config.folder, step=done)
        facts = order_facts(config, samples)
        journal.write("started", resume=checkpoint, workers=config.cluster.workers, **facts)
        if say and (lines := order_lines(facts)):
            say("\n".join(lines))
        try:
            outcome = run_ranks(config, checkpoint, on_progress, stop or StopFlag())
        except BaseException as error:
            if isinstance(error, CheckpointError):  # the ranks have refused to go on: as if nobody had asked
                put_back(config.folder, before)
            with contextlib.suppress(storage.StorageError):  # a full disk must not hide what happened
                journal.write("failed", error=f"{type(error).__name__}: {error}"[:2000])
            raise
        finally:
            forget_ranks(config.folder)
        journal.write("stopped" if outcome.stopped else "finished", step=outcome.step, reason=outcome.stopped)
    return outcome


class OutOfMemory(RuntimeError):
    """A step did not fit into a device's memory."""

    exit_status = 1


SETTINGS = ("config.yaml", "environment.json")


def settings_of(folder: str) -> dict[str, bytes]:
    """What a run's folder says of its configuration and environment."""
    paths = {name: os.path.join(folder, name) for name in SETTINGS}
    return {name: storage.read_bytes(path) for name, path in paths.items() if os.path.exists(path)}


def put_back(folder: str, settings: Mapping[str, bytes]) -> None:
    """Undo what a refused resume has written."""
    for name, content in settings.items():
        with contextlib.suppress(storage.StorageError):
            storage.atomic_write(os.path.join(folder, name), content)


def finished_step(journal: Journal) -> int | None:
    """The step at which the last attempt finished, weights and all; None when it did not."""
    last = journal.read()[-1:]
    return int(last[0]["step"]) if last and last[0]["event"] == "finished" else None


def run_ranks(
    config: TrainConfig,
    checkpoint: str | None,
    on_progress: Callable[[Mapping[str, Any]], None] | None,
    stop: StopFlag,
) -> TrainOutcome:
    """Start the worker group and wait for its end."""
    from cluster.group import run_group
    from cluster.runtime import ray_session

    cluster = config.cluster
    with ray_session(cluster.address, cpus=cluster.workers * cluster.threads):
        result = run_group(
            train_worker,
            {"config": config.model_dump(mode="json"), "checkpoint": checkpoint},
            workers=cluster.workers,
            use_gpu=cluster.use_gpu,
            threads_per_worker=cluster.threads,
            name=config.name,
            storage_path=config.folder,
            on_progress=on_progress,
            stop=stop,
        )
    # rank 0 may have stopped by another's vote, before it was told the reason
    stopped = stop.reason or result.value["stopped"] if result.value["stopped"] else None
    return TrainOutcome(folder=config.folder, step=result.value["step"], stopped=stopped)


def show_step(bar: Progress) -> Callable[[Mapping[str, Any]], None]:
    """An `on_progress` for `train` that draws on `bar`, and says once where the live metrics are served."""
    told: int | None = None  # notes

    def on_progress(report: Mapping[str, Any]) -> None:
        nonlocal told
        if told is None:
            bar.set_total(report["total"])
            bar.note(f"live metrics: http://{report['metrics']}/metrics")
            told = 0
        for note in report["notes"][told:]:
            bar.note(note)
        told = len(report["notes"])
        bar.update(report["done"], **report["shown"])

    return on_progress


def forget_ranks(folder: str) -> None:
    """With no rank running: what a killed one announced must not be scraped for ever."""
    shutil.rmtree(os.path.join(folder, TELEMETRY), ignore_errors=True)


def check_inputs(config: TrainConfig) -> dict[str, int]:
    """Everything that can be known to be wrong before a worker starts, cheapest first. Returns each role's samples."""
    from trainer.tasks.base import make_task
    from trainer.trackers import check_trackers

    task = make_task(config)
    check_trackers(config)
    samples = dict.fromkeys(config.data.roles, 0)
    for role, spec in config.data.roles.items():
        for index, path in enumerate(spec.datasets):
            dataset = Dataset.open(path)
            samples[role] += dataset.info.samples
            check_cut(dataset, config.data.max_bad_fraction)
            if spec.labels:
                check_labels(role, spec.labels[index], dataset)
            elif role == "labelled" and dataset.info.role != "labelled":
                raise ConfigError(
                    f"data.roles.{role}.datasets: {path} has no depth; it is packed as {dataset.info.role}"
                )
    if config.validation.datasets:
        from trainer.validation import validation_of

        validation_of(config, getattr(task, "preset", None))
    for path in config.validation.datasets:
        if Dataset.open(path).info.quantity is None:
            raise ConfigError(f"validation.datasets: {path} has no depth to compare with")
    for name, file in task.files.items():
        if not storage.exists(file):
            raise ConfigError(f"{name}: {file}: no such file or folder")
    return samples


def with_steps(config: TrainConfig, samples: Mapping[str, int]) -> TrainConfig:
    """The configuration with `passes` put into steps: the whole passes, their partial batches included, and the part of
    one that is left. Raises ConfigError when that is less than the warm-up, or when the role is mixed by weights."""
    if not config.passes:
        return config
    ((role, passes),) = config.passes.items()
    spec = config.data.roles[role]
    if spec.weights:
        raise ConfigError(f"passes.{role}: its datasets are mixed by weights, which has no pass; give steps")
    each = pass_batches(samples[role], spec.batch, spec.lanes)
    steps = max(1, round(passes * each))
    values = config.model_dump(mode="json") | {"steps": steps, "passes": {}}
    return parse_config(TrainConfig, values, source=f"passes: {passes:g} of {role} are {steps} steps")


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


def with_earlier_skips(config: TrainConfig) -> TrainConfig:
    """The configuration with the stretches of samples that earlier attempts passed over: going back keeps them out."""
    before = read_config(TrainConfig, os.path.join(config.folder, "config.yaml")).data.skip_samples
    skip = tuple(sorted({*before, *config.data.skip_samples}))
    return config.model_copy(update={"data": dataclasses.replace(config.data, skip_samples=skip)})


def prepare_folder(config: TrainConfig, resume: bool) -> str | None:
    """Make or check the run's folder; returns the checkpoint to go on from."""
    folder, saved = config.folder, os.path.join(config.folder, "config.yaml")
    checkpoint = None
    clean(os.path.join(folder, "checkpoints"))
    if os.path.exists(saved):
        if not resume:
            raise ConfigError(f"{folder}: this run exists; go on with --resume or choose another name (--set name=...)")
        before = read_config(TrainConfig, saved)
        checkpoint, passed = find_checkpoint(os.path.join(folder, "checkpoints"))
        if checkpoint or passed or storage.exists(os.path.join(folder, "metrics.jsonl")):  # it has taken a step
            refuse_changes(before, config)
        say_changes(folder, before, config)
        for line in passed:
            Journal(folder).write("checkpoint_passed_over", problem=line)
            print(f"passed over {line}", file=sys.stderr)
        if passed and not checkpoint:
            raise CheckpointError(
                f"{folder}/checkpoints: none of {len(passed)} is whole ({passed[0]}); restore one, or move them away "
                "to start from step 0"
            )
        done = step_of(os.path.basename(checkpoint)) if checkpoint else 0
        if done > config.steps:
            raise ConfigError(f"steps: is {config.steps}, but the run has done {done}; give as many or more")
    storage.atomic_write(saved, dump_config(config))
    storage.atomic_write(os.path.join(folder, "environment.json"), json.dumps(environment(config), indent=1))
    return checkpoint


def environment(config: TrainConfig) -> dict[str, Any]:
    """Versions, commit, world size: what a result depends on beside its configuration."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "workers": config.cluster.workers,
        "commit": commit(),
        "packages": versions,
    }


def commit() -> str | None:
    """The checkout's commit, or None outside one."""
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    try:
        done = subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def train_worker(context: Any, payload: Mapping[str, Any]) -> dict[str, Any]:
    """One rank: build the network, engine and loader, restore, run the loop, export. Runs inside the process group."""
    import torch

    from trainer.worker import RankTrainer

    config = parse_config(TrainConfig, payload["config"])
    require_shared(config)
    try:
        with RankTrainer(config, context, payload["checkpoint"]) as rank:
            rank.record_devices()
            stopped = rank.run()
            return {"step": rank.loop.step, "stopped": stopped}
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(
            f"rank {context.rank}: out of memory: {str(error).splitlines()[0]} Use engine.micro_batch: auto, "
            "model.activation_checkpointing, a higher engine.zero_stage, engine.cpu_offload or more ranks"
        ) from None


def require_shared(config: TrainConfig) -> None:
    """StorageError unless this rank sees what the driver has just written: its checkpoints must go to one folder."""
    path = os.path.join(config.folder, "config.yaml")
    if not storage.exists(path) or storage.read_bytes(path).decode() != dump_config(config):
        raise storage.StorageError(
            f"{path}: is not there, or another one, on {platform.node()}; runs ({config.runs}) must be a folder that "
            "all machines of the cluster share"
        )
