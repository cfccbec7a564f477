"""What a command would take, before any of it is spent: ranks, batches, memory, disk, time; and all that is wrong."""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cluster import storage
from trainer.config import ConfigError
from trainer.config_train import TrainConfig
from trainer.folder import RunFolder
from trainer.inputs import look_at_inputs, order_facts, with_steps
from trainer.journal import logged_lines

if TYPE_CHECKING:
    from trainer.footprint import Footprint


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Sections of a table: title -> name -> value; and what is wrong, a line each."""

    sections: Mapping[str, Mapping[str, Any]]
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default=())


def plan_train(config: TrainConfig, rate: float | None = None) -> Plan:
    """A training run. `rate`: images a second of all ranks together, measured; else that of the run so far, if any."""
    from trainer.autobatch import share_of
    from trainer.footprint import footprint

    samples, found = look_at_inputs(config)
    problems = [line for error in found for line in str(error).splitlines()]
    try:
        config = with_steps(config, samples) if all(samples.values()) else config
    except ConfigError as error:
        problems.append(str(error))
    workers = config.cluster.workers
    share = share_of(config, workers)
    rows = share if config.engine.micro_batch in (None, "auto") else min(int(config.engine.micro_batch), share)
    sections: dict[str, dict[str, Any]] = {
        "run": {
            "folder": config.folder,
            "ranks": workers,
            "global batch": config.global_batch,
            "rows of a rank": share,
            "rows of a forward pass": "auto" if config.engine.micro_batch == "auto" else rows,
            "forward passes of a step": "auto" if config.engine.micro_batch == "auto" else -(-share // rows),
            "steps": config.steps or "as many as the passes are, once the datasets can be opened",
            "samples": config.steps * config.global_batch or None,
        }
    }
    notes: list[str] = []
    if config.steps:
        passes = order_facts(config, samples)["passes"]
        for role, spec in config.data.roles.items():
            sections["run"][f"{role}: a step, samples, passes"] = (
                f"{spec.batch}, {samples[role] or '?'}, "
                + (f"{config.steps / passes[role]['steps']:.2f}" if samples[role] and role in passes else "?")
            )
    try:
        memory = footprint(config, workers)
    except ConfigError as error:
        if str(error) not in problems:
            problems.append(str(error))
    else:
        sections["memory of a rank"] = memory_section(config, memory, rows)
        sections["disk"] = disk_section(config, memory)
        free = free_bytes(config.runs)
        sections["disk"]["free"] = "?" if free is None else gib(free)
        needed = checkpoint_bytes(config, memory) * checkpoints(config)
        if free is not None and free < needed:
            problems.append(
                f"runs: {config.runs} has {gib(free)} free, and the checkpoints take {gib(needed)}; lower "
                "checkpoint.keep or choose another disk"
            )
        notes.append(
            "memory is counted from shapes, without the libraries' own (1 to 2 GiB on a GPU), the losses and holes"
        )
    sections["time"] = time_section(config, rate)
    return Plan(sections=sections, problems=tuple(problems), notes=tuple(notes))


def memory_section(config: TrainConfig, memory: Footprint, rows: int) -> dict[str, Any]:
    """Bytes of one rank, by what they are for."""
    found = {
        "parameters": f"{memory.parameters / 1e6:.1f} M",
        "weights": gib(memory.weights),
        "gradients": gib(memory.gradients),
        "optimizer and its copies": gib(memory.optimizer),
    }
    for name, size in (("moving average", memory.average), ("frozen", memory.frozen)):
        if size:
            found[name] = gib(size)
    if memory.transient:
        found["low-precision weights"] = gib(memory.transient)
    found["activations of a row"] = gib(memory.activations)
    if config.engine.micro_batch == "auto":
        once = memory.total(0)
        found |= {f"in all, {n} rows at once": gib(once + n * memory.activations) for n in (1, 8, rows) if n <= rows}
    else:
        found[f"in all, {rows} rows at once"] = gib(memory.total(rows))
    return found


def checkpoints(config: TrainConfig) -> int:
    """How many are on disk at most: those kept and the one being written."""
    return config.checkpoint.keep + config.checkpoint.keep_best + 1


def checkpoint_bytes(config: TrainConfig, memory: Footprint) -> int:
    """Weights, two moments and the moving average of one checkpoint."""
    return 4 * memory.parameters * (3 + (config.optim.ema_decay is not None))


def disk_section(config: TrainConfig, memory: Footprint) -> dict[str, Any]:
    """What the run writes."""
    each = checkpoint_bytes(config, memory)
    return {
        "a checkpoint": gib(each),
        "checkpoints at once": checkpoints(config),
        "checkpoints in all": gib(each * checkpoints(config)),
        "exported weights": gib(4 * memory.parameters),
    }


def time_section(config: TrainConfig, rate: float | None) -> dict[str, Any]:
    """How long the rest takes, by a measured rate."""
    images, done = config.steps * config.global_batch, 0
    source = "--rate"
    if rate is None:
        lines = [line for line in logged_lines(config.folder) if line.get("images_per_second")]
        rate = statistics.median(line["images_per_second"] for line in lines[-20:]) if lines else None
        done = int(lines[-1]["step"]) if lines else 0
        source = f"{RunFolder(config.folder).metrics}, at step {done}"
    if rate is None or not images:
        return {"left": "not known: nothing was measured; give --rate, in images a second of all ranks together"}
    seconds = (images - done * config.global_batch) / rate
    return {"images a second": f"{rate:.4g} ({source})", "left": duration(seconds)}


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
