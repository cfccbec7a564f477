"""What a command would take, before any of it is spent: ranks, batches, memory, disk, time; and all that is wrong.

Numbers are numbers, with their unit in the key (bytes, seconds, samples); launcher/verbs_plan.py shows them to people.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cluster import storage
from dataio.plan import pass_batches
from model.types import WeightsError
from trainer.config import ConfigError
from trainer.config_train import TrainConfig, length_findings
from trainer.folder import RunFolder
from trainer.inputs import look_at_inputs, steps_of
from trainer.journal import logged_lines
from trainer.salvage import without_consequences

if TYPE_CHECKING:
    from trainer.footprint import Footprint

NO_RATE = "the time is not known, since nothing was measured: give --rate, in images a second of all {} together"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Sections of a table: title -> name -> value; and what is wrong, a line each."""

    sections: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def plan_train(
    config: TrainConfig, rate: float | None = None, *, problems: Sequence[str] = (), wrong: Sequence[str] = ()
) -> Plan:
    """A training run. `rate`: images a second of all ranks together, measured; else that of the run so far, if any.

    `problems` were found when the configuration was read, and it has stand-ins for the fields `wrong` (salvage.py).
    """
    from trainer.autobatch import share_of

    samples, errors = look_at_inputs(config)
    lines = [line for error in errors for line in str(error).splitlines()]
    config, more = _with_steps(config, samples)
    workers = config.cluster.workers
    share = share_of(config, workers)
    auto = config.engine.micro_batch == "auto"
    rows = share if auto or config.engine.micro_batch is None else min(int(config.engine.micro_batch), share)
    done = steps_done(config)
    sections: dict[str, dict[str, Any]] = {
        "run": {
            "folder": config.folder,
            "ranks": workers,
            "global_batch_samples": config.global_batch,
            "rows_of_a_rank": share,
            "rows_of_a_forward_pass": None if auto else rows,
            "forward_passes_of_a_step": None if auto or not rows else -(-share // rows),
            "steps": config.steps or None,
            "steps_done": done,
            "samples": config.steps * config.global_batch or None,
            "roles": role_facts(config, samples),
        }
    }
    notes = _notes(config, wrong)
    memory = _memory(config)
    if memory is not None:
        sections["memory_of_a_rank"] = memory_section(config, memory, rows)
        sections["disk"] = disk = disk_section(config, memory)
        free, needed = disk["free_bytes"], disk["to_come_bytes"]
        if free is not None and free < needed:
            more.append(
                f"runs: {config.runs} has {gib(free)} free, and the checkpoints to come take {gib(needed)}; lower "
                "checkpoint.keep or choose another disk"
            )
        notes.append(
            "memory is counted from shapes, without the libraries' own (1 to 2 GiB on a GPU), the losses and holes"
        )
    sections["time"] = time_section(config, rate, done)
    if sections["time"]["images_per_second"] is None:
        notes.append(NO_RATE.format("ranks"))
    found = [*problems, *without_consequences([*lines, *more], wrong)]
    return Plan(sections=sections, problems=tuple(dict.fromkeys(found)), notes=tuple(notes))


def _with_steps(config: TrainConfig, samples: Mapping[str, int]) -> tuple[TrainConfig, list[str]]:
    """`passes` put into steps as far as they and the data go, and what is wrong with that many."""
    roles = {role for role in config.passes if role in config.data.roles}
    known = [samples[role] > 0 and not config.data.roles[role].batch % config.data.roles[role].lanes for role in roles]
    if config.steps or len(config.passes) != 1 or known != [True]:
        return config, []
    try:
        steps, source = steps_of(config, samples)
    except ConfigError as error:
        return config, [str(error)]
    config = config.model_copy(update={"steps": steps, "passes": {}})
    return config, [f"{finding.says} ({source})" for finding in length_findings(config)]


def _notes(config: TrainConfig, wrong: Sequence[str]) -> list[str]:
    notes = []
    if wrong:
        notes.append(f"counted with the defaults, or without, where a value is wrong: {', '.join(wrong)}")
    if config.engine.micro_batch == "auto":
        notes.append("engine.micro_batch: auto: the ranks measure how many rows a forward pass takes when they start")
    if not config.steps and config.passes:
        notes.append("as many steps as the passes are, once the datasets can be opened")
    return notes


def _memory(config: TrainConfig) -> Footprint | None:
    """None where the task cannot be made: `look_at_inputs` says why."""
    from trainer.footprint import footprint
    from trainer.tasks.base import look_at_task

    task, _ = look_at_task(config)
    try:
        return footprint(config, config.cluster.workers, task) if task else None
    except (ConfigError, WeightsError):
        return None


def role_facts(config: TrainConfig, samples: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    """Of each role: samples of a step and of a pass, and how many passes the steps are; None: not known."""
    found = {}
    for role, spec in config.data.roles.items():
        passes = None
        if config.steps and samples[role] and not spec.weights and not spec.batch % spec.lanes:
            passes = config.steps / pass_batches(samples[role], spec.batch, spec.lanes)
        found[role] = {"step_samples": spec.batch, "pass_samples": samples[role] or None, "passes": passes}
    return found


def memory_section(config: TrainConfig, memory: Footprint, rows: int) -> dict[str, Any]:
    """Of one rank, by what it is for; `in_all_bytes` by rows of a forward pass."""
    found = {
        "parameters": memory.parameters,
        "weights_bytes": memory.weights,
        "gathered_weights_bytes": memory.gathered,
        "gradients_bytes": memory.gradients,
        "optimizer_and_its_copies_bytes": memory.optimizer,
        "moving_average_bytes": memory.average,
        "frozen_bytes": memory.frozen,
        "low_precision_weights_bytes": memory.transient,
        "activations_of_a_row_bytes": memory.activations,
    }
    shown = sorted({n for n in (1, 8, rows) if n <= rows}) if config.engine.micro_batch == "auto" else [rows]
    totals = {f"rows_{n}_in_all_bytes": memory.total(n) for n in shown}
    host = {"main_memory_of_the_optimizer_bytes": memory.main_memory}
    return {name: size for name, size in (found | totals | host).items() if size}


def disk_section(config: TrainConfig, memory: Footprint) -> dict[str, Any]:
    """What the run writes; `to_come`: what must be free for it, as the run itself asks for at its start."""
    from trainer.checkpoint import checkpoint_bytes, list_checkpoints

    each = checkpoint_bytes(memory.parameters, memory.trained, averaged=config.optim.ema_decay is not None)
    most = config.checkpoint.keep + config.checkpoint.keep_best + 1  # those kept and the one being written
    there = len(list_checkpoints(RunFolder(config.folder).checkpoints))
    return {
        "checkpoint_bytes": each,
        "checkpoints_at_once": most,
        "checkpoints_in_all_bytes": each * most,
        "checkpoints_there": there,
        "to_come_bytes": each * max(1, most - there),
        "exported_weights_bytes": 4 * memory.parameters,
        "free_bytes": free_bytes(config.runs),
    }


def steps_done(config: TrainConfig) -> int:
    """By the run's folder: the last that was logged, or the newest checkpoint's."""
    from trainer.checkpoint import list_checkpoints, step_of

    logged = [int(line["step"]) for line in logged_lines(config.folder) if "step" in line]
    saved = [step_of(name) for name in list_checkpoints(RunFolder(config.folder).checkpoints)]
    return max([0, *logged[-1:], *saved[-1:]])


def time_section(config: TrainConfig, rate: float | None, done: int) -> dict[str, Any]:
    """How long the rest takes, by a measured rate."""
    source = "--rate"
    if rate is None:
        rates = [line["images_per_second"] for line in logged_lines(config.folder) if line.get("images_per_second")]
        rate = statistics.median(rates[-20:]) if rates else None
        source = RunFolder(config.folder).metrics
    if rate is None:
        return {"images_per_second": None, "left_seconds": None}
    left = max(0, config.steps - done) * config.global_batch / rate if config.steps else None
    return {"images_per_second": rate, "measured_by": source, "left_seconds": left}


def free_bytes(folder: str) -> int | None:
    """Of the disk that a local folder is or will be on; None behind a URL."""
    if storage.is_url(folder):
        return None
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize


def gib(size: float) -> str:
    """Bytes for people."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**27 else f"{size / 2**20:.1f} MiB"


def duration(seconds: float) -> str:
    """Seconds for people."""
    minutes = max(0, round(seconds / 60))
    days, hours = divmod(minutes // 60, 24)
    return f"{days} d {hours} h {minutes % 60} min" if days else f"{hours} h {minutes % 60} min"
