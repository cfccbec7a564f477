"""From a configuration to a trained network, the driver's part; each rank's is `trainer.worker`."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from typing import Any

from cluster import storage
from cluster.exporter import Exporter
from cluster.lock import locked_folder
from cluster.progress import Progress
from cluster.stop import StopFlag
from trainer.account import RunAccount
from trainer.attempts import TrainOutcome, newest_checkpoint, passing_over, run_attempts
from trainer.changes import refuse_changes, say_changes
from trainer.checkpoint import CheckpointError, clean, list_checkpoints, step_of
from trainer.config import ConfigError, dump_config, read_config
from trainer.config_train import TrainConfig
from trainer.folder import RunFolder
from trainer.inputs import check_inputs, order_facts, order_lines, with_steps
from trainer.journal import Journal
from trainer.vitals import watch_disk

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


def train(
    config: TrainConfig,
    *,
    resume: bool | None = False,
    on_progress: Callable[[Mapping[str, Any]], None] | None = None,
    stop: StopFlag | None = None,
    say: Callable[[str], None] | None = None,
) -> TrainOutcome:
    """Train on `config.cluster.workers` ranks of an embedded or a given Ray cluster; returns when done or stopped.

    `resume`: whether to go on with a run, which must be there; None goes on where there is one, and begins it
    otherwise. `say` gets what is worth knowing before the first step.

    Raises ConfigError, DataError, WeightsError or StorageError for what the user can mend; whatever a rank raised
    otherwise.
    """
    samples = check_inputs(config)
    config = with_steps(config, samples)
    folder = RunFolder(config.folder)
    if resume and not os.path.exists(folder.config):
        raise ConfigError(f"{config.folder}: no run to resume; start it without --resume")
    with locked_folder(config.folder, "this run"):
        resume = os.path.exists(folder.config) if resume is None else resume
        config = with_earlier_skips(config) if resume else config
        before = settings_of(folder)
        checkpoint = prepare_folder(config, resume)
        prepared = settings_of(folder).get(folder.config)
        forget_ranks(folder)
        if is_done(config, checkpoint):
            return TrainOutcome(folder=config.folder, step=folder.finished_step() or 0)
        tell_submitted(folder)
        facts = order_facts(config, samples)
        if say and (lines := order_lines(facts)):
            say("\n".join(lines))
        try:
            with exporter(config, folder) as served:
                outcome = run_attempts(config, checkpoint, facts, on_progress, stop or StopFlag(), say or print_line)
                if outcome.stopped is None:
                    served.last_word()
                return outcome
        except CheckpointError:  # the ranks have refused to go on: as if nobody had asked
            if settings_of(folder).get(folder.config) == prepared:  # a roll-back's samples stay passed over
                put_back(before)
            raise
        finally:
            forget_ranks(folder)


def exporter(config: TrainConfig, folder: RunFolder) -> Exporter:
    """The driver's own metrics."""
    served = Exporter(config.name, "driver", host=config.cluster.metrics_host, discovery=folder.telemetry)
    RunAccount(served, folder)
    watch_disk(served, folder.path)
    return served


def tell_submitted(folder: RunFolder) -> None:
    """In a job: which, and when it was submitted. Its second driver has nothing to add."""
    job, at, journal = os.environ.get("FATHOM_JOB"), os.environ.get("FATHOM_SUBMITTED"), Journal(folder.path)
    if job and not any(line.get("event") == "submitted" and line.get("job") == job for line in journal.read()):
        journal.write("submitted", job=job, at=float(at) if at else None)


def print_line(line: str) -> None:
    """To stderr."""
    print(line, file=sys.stderr, flush=True)


def settings_of(folder: RunFolder) -> dict[str, bytes]:
    """What a run's folder says of its configuration and environment, by path."""
    paths = (folder.config, folder.environment)
    return {path: storage.read_bytes(path) for path in paths if os.path.exists(path)}


def put_back(settings: Mapping[str, bytes]) -> None:
    """Undo what a refused resume has written."""
    for path, content in settings.items():
        with contextlib.suppress(storage.StorageError):
            storage.atomic_write(path, content)


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


def forget_ranks(folder: RunFolder) -> None:
    """With nobody at work: what a killed process announced must not be scraped for ever."""
    shutil.rmtree(folder.telemetry, ignore_errors=True)


def with_earlier_skips(config: TrainConfig) -> TrainConfig:
    """The configuration with the stretches of samples that earlier attempts passed over: going back keeps them out."""
    return passing_over(config, read_config(TrainConfig, RunFolder(config.folder).config).data.skip_samples)


def prepare_folder(config: TrainConfig, resume: bool) -> str | None:
    """Make or check the run's folder; returns the checkpoint to go on from. A finished run's is left as it is."""
    run = RunFolder(config.folder)
    clean(run.checkpoints)
    checkpoint = None
    if os.path.exists(run.config):
        if not resume:
            raise ConfigError(
                f"{run.path}: this run exists; go on with --resume or choose another name (--set name=...)"
            )
        before = read_config(TrainConfig, run.config)
        if list_checkpoints(run.checkpoints) or storage.exists(run.metrics):  # it has taken a step
            refuse_changes(before, config)
        checkpoint = newest_checkpoint(run)
        done = step_of(os.path.basename(checkpoint)) if checkpoint else 0
        if done > config.steps:
            raise ConfigError(f"steps: is {config.steps}, but the run has done {done}; give as many or more")
        if is_done(config, checkpoint):
            return checkpoint
        say_changes(run.path, before, config)
    storage.atomic_write(run.config, dump_config(config))
    storage.atomic_write(run.environment, json.dumps(environment(config), indent=1))
    return checkpoint


def is_done(config: TrainConfig, checkpoint: str | None) -> bool:
    """Whether the run has finished with as many steps as it shall have, weights and all."""
    done = RunFolder(config.folder).finished_step()
    return checkpoint is not None and done is not None and done >= config.steps


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
        "attempt": secrets.token_hex(8),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "workers": config.cluster.workers,
        "commit": commit(),
        "packages": versions,
    }


def commit() -> str | None:
    """The checkout's commit, or that of a checkout which a job's code was copied from; None where neither is known."""
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    with contextlib.suppress(OSError), open(os.path.join(root, "COMMIT"), encoding="utf-8") as file:
        return file.read().strip() or None
    try:
        done = subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
