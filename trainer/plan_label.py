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
from trainer.inference import OTHER_SCALE
from trainer.labelling import describe, need_of, workers_here
from trainer.plan import NO_RATE, Plan, free_bytes, gib
from trainer.salvage import without_consequences

_PROCESS_BYTES = 700 << 20  # Python, torch, DALI, and the images in hand


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
    if actors is None and teacher is not None:
        actors = workers_here(config, need_of(config, teacher.preset))
    work: dict[str, Any] = {
        "actors": actors or "as many as the cluster has room for",
        "forward_pass_images": config.rows,
        "forward_passes_of_an_image": passes(config),
    }
    sections: dict[str, dict[str, Any]] = {"work": work}
    if teacher is not None:
        low = config.precision == "bf16"
        sections["memory_of_an_actor"] = inference_section(teacher.preset, config.rows, config.input_size, low=low)
    if dataset is not None:
        work |= {"shards": len(dataset.shards), "samples": dataset.info.samples}
        if (config.cluster.workers or 0) > len(dataset.shards):
            found.append(
                f"workers: is {config.cluster.workers}, but the dataset has {len(dataset.shards)} shards, and an actor "
                "takes a whole one; use as many at most, or pack smaller shards"
            )
    if dataset is not None and teacher is not None:
        try:
            sections |= _so_far(config, dataset, actors or 1, rate, found)
        except (ConfigError, RuntimeError) as error:
            found.append(str(error))
    found = [*problems, *without_consequences(found, wrong)]
    notes: tuple[str, ...] = () if sections.get("time", {}).get("images_per_second") else (NO_RATE.format("actors"),)
    if actors is None:
        notes += ("one worker is counted: how many the cluster has room for shows when the job runs",)
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


def passes(config: LabelConfig) -> float:
    """Forward passes of an image at full size that its label costs; a pass at a smaller size counts by its pixels."""
    mirrored = config.flip or config.quality != "off"
    return 1 + mirrored + (round(OTHER_SCALE**2, 2) if config.quality == "flip+scale" else 0)


def worker_bytes(config: LabelConfig, preset: Preset) -> int:
    """Main memory of a worker, at least: a process with its libraries, the weights, and on CPUs the activations of
    images as wide as 16:9. Without running anything."""
    section = inference_section(preset, config.rows, config.input_size, low=config.precision == "bf16")
    at_work = 0 if config.cluster.use_gpu else section["activations_of_a_forward_pass_bytes"] * 16 // 9
    return int(_PROCESS_BYTES + section["weights_bytes"] + at_work)


def _so_far(
    config: LabelConfig, dataset: Dataset, actors: int, rate: float | None, found: list[str]
) -> dict[str, dict[str, Any]]:
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
        rate, source = timed / seconds * actors, f"{done} shards labelled so far"
    if rate is None:
        return {"disk": disk, "time": {"images_per_second": None, "left_seconds": None}}
    return {
        "disk": disk,
        "time": {"images_per_second": rate, "measured_by": source, "left_seconds": left / rate},
    }
