"""What labelling a dataset would take: forward passes, memory of an actor, disk, time; and all that is wrong."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from cluster import storage
from dataio.dataset import Dataset
from dataio.labels import LabelStore, plan_digest
from model import DepthAnything
from model.presets import Preset
from model.weights import WeightsError
from trainer.config import ConfigError
from trainer.config_label import LabelConfig
from trainer.labelling import describe
from trainer.plan import NO_RATE, Plan, free_bytes, gib
from trainer.salvage import without_consequences


def plan_label(
    config: LabelConfig, rate: float | None = None, *, problems: Sequence[str] = (), wrong: Sequence[str] = ()
) -> Plan:
    """A `label run`. `rate`: images a second of all actors together, measured; else that of the shards labelled so far.

    The teacher is read, since its fingerprint names the folder. `problems` and `wrong` as in `plan_train`.
    """
    found: list[str] = []
    dataset = teacher = None
    try:
        dataset = Dataset.open(config.dataset)
    except (RuntimeError, ValueError, OSError) as error:
        found.append(str(error))
    try:
        teacher = DepthAnything.from_pretrained(
            config.weights, preset=config.preset, position_mode=config.position_mode
        )
    except (WeightsError, RuntimeError, ValueError, OSError) as error:
        found.append(str(error))
    actors = config.cluster.workers
    work: dict[str, Any] = {
        "actors": actors,
        "forward_pass_images": config.batch,
        "forward_passes_of_an_image": 2 if config.flip else 1,
    }
    sections: dict[str, dict[str, Any]] = {"work": work}
    if teacher is not None:
        low = config.precision == "bf16"
        sections["memory_of_an_actor"] = inference_section(teacher.preset, config.batch, config.input_size, low=low)
    if dataset is not None:
        work |= {"shards": len(dataset.shards), "samples": dataset.info.samples}
        if actors > len(dataset.shards):
            found.append(
                f"workers: is {actors}, but the dataset has {len(dataset.shards)} shards, and an actor takes a whole "
                "one; use as many at most, or pack smaller shards"
            )
    if dataset is not None and teacher is not None:
        try:
            sections |= _so_far(config, dataset, rate, found)
        except (ConfigError, RuntimeError) as error:
            found.append(str(error))
    found = [*problems, *without_consequences(found, wrong)]
    notes = () if sections.get("time", {}).get("images_per_second") else (NO_RATE.format("actors"),)
    return Plan(sections=sections, problems=tuple(found), notes=notes)


def inference_section(preset: Preset, rows: int, size: int, *, low: bool) -> dict[str, Any]:
    """Memory of a worker that runs a network on square images. Weights stay fp32, and are cast layer by layer."""
    from trainer.footprint import forward_peak

    with torch.device("meta"):
        network = DepthAnything(preset)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    activations = forward_peak(network, rows=rows, size=size, low=low)
    return {
        "parameters": parameters,
        "weights_bytes": 4 * parameters,
        "activations_of_a_forward_pass_bytes": activations,
        "in_all_bytes": 4 * parameters + activations,
    }


def _so_far(config: LabelConfig, dataset: Dataset, rate: float | None, found: list[str]) -> dict[str, dict[str, Any]]:
    """What is labelled already tells what the rest takes."""
    description = describe(config, dataset)
    folder = storage.join(config.out or storage.join(config.dataset, "labels"), plan_digest(description))
    done = labelled = stored = timed = 0
    seconds = 0.0
    if storage.exists(storage.join(folder, "labels.json")):
        status = LabelStore.open(folder).status(None)
        done, labelled, stored, seconds = status.shards, status.samples, status.bytes, status.seconds
        timed = status.timed_samples
    left = dataset.info.samples - labelled
    # what a label takes depends on the images
    needed = int(stored / labelled * left) if labelled else None
    free = free_bytes(folder)
    disk = {
        "folder": folder,
        "shards_done": done,
        "samples_done": labelled,
        "labels_there_bytes": stored,
        "labels_to_come_bytes": needed,
        "free_bytes": free,
    }
    if free is not None and needed is not None and free < needed:
        found.append(f"out: {folder} has {gib(free)} free, and the labels to come take {gib(needed)}")
    source = "--rate"
    if rate is None and seconds:
        rate, source = timed / seconds * config.cluster.workers, f"{done} shards labelled so far"
    if rate is None:
        return {"disk": disk, "time": {"images_per_second": None, "left_seconds": None}}
    return {
        "disk": disk,
        "time": {"images_per_second": rate, "measured_by": source, "left_seconds": left / rate},
    }
