"""What labelling a dataset would take: forward passes, memory of an actor, disk, time; and all that is wrong."""

from __future__ import annotations

from typing import Any

from cluster import storage
from dataio.dataset import Dataset
from dataio.labels import LabelStore, plan_digest
from model import DepthAnything
from model.weights import WeightsError
from trainer.config import ConfigError
from trainer.config_label import LabelConfig
from trainer.labelling import describe
from trainer.plan import Plan, duration, free_bytes, gib


def plan_label(config: LabelConfig, rate: float | None = None) -> Plan:
    """A `label run`. `rate`: images a second of all actors together, measured; else that of the shards labelled so far.

    The teacher is read, since its fingerprint names the folder.
    """
    problems: list[str] = []
    try:
        dataset = Dataset.open(config.dataset)
    except (RuntimeError, ValueError, OSError) as error:
        dataset = None
        problems.append(str(error))
    teacher = None
    try:
        teacher = DepthAnything.from_pretrained(
            config.weights, preset=config.preset, position_mode=config.position_mode
        )
    except (WeightsError, RuntimeError, ValueError, OSError) as error:
        problems.append(str(error))
    actors = config.cluster.workers
    work: dict[str, Any] = {
        "actors": actors,
        "images of a forward pass": config.batch,
        "forward passes of an image": 2 if config.flip else 1,
    }
    sections: dict[str, dict[str, Any]] = {"work": work}
    if teacher is not None:
        parameters = sum(parameter.numel() for parameter in teacher.parameters())
        each = 2 if config.precision == "bf16" and config.cluster.use_gpu else 4
        sections["memory of an actor"] = {"parameters": f"{parameters / 1e6:.1f} M", "weights": gib(each * parameters)}
    if dataset is not None:
        work |= {"shards": len(dataset.shards), "images": dataset.info.samples}
        if actors > len(dataset.shards):
            problems.append(
                f"workers: is {actors}, but the dataset has {len(dataset.shards)} shards, and an actor takes a whole "
                "one; use as many at most, or pack smaller shards"
            )
    if dataset is not None and teacher is not None:
        try:
            sections |= _so_far(config, dataset, rate, problems)
        except (ConfigError, RuntimeError) as error:
            problems.append(str(error))
    return Plan(sections=sections, problems=tuple(problems))


def _so_far(
    config: LabelConfig, dataset: Dataset, rate: float | None, problems: list[str]
) -> dict[str, dict[str, Any]]:
    """What is labelled already tells what the rest takes."""
    description = describe(config, dataset)
    folder = storage.join(config.out or storage.join(config.dataset, "labels"), plan_digest(description))
    disk: dict[str, Any] = {"folder": folder}
    done = labelled = stored = 0
    seconds = 0.0
    if storage.exists(storage.join(folder, "labels.json")):
        status = LabelStore.open(folder).status(None)
        done, labelled, stored, seconds = status.shards, status.samples, status.bytes, status.seconds
        disk |= {"shards done": done, "images done": labelled}
    left = dataset.info.samples - labelled
    if labelled:
        needed = int(stored / labelled * left)
        disk |= {"labels so far": gib(stored), "labels to come": gib(needed)}
        free = free_bytes(folder)
        if free is not None:
            disk["free"] = gib(free)
            if free < needed:
                problems.append(f"out: {folder} has {gib(free)} free, and the labels to come take {gib(needed)}")
    else:
        disk["labels"] = "not known before the first shard: it depends on the images"
    source = "--rate"
    if rate is None and seconds:
        rate, source = labelled / seconds * config.cluster.workers, f"{done} shards labelled so far"
    if rate is None:
        left_for = "not known: nothing was measured; give --rate, in images a second of all actors together"
        return {"disk": disk, "time": {"left": left_for}}
    return {"disk": disk, "time": {"images a second": f"{rate:.4g} ({source})", "left": duration(left / rate)}}
