"""What an evaluation would take: images, forward passes, memory of a worker, time; and all that is wrong."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dataio.dataset import Dataset
from model import DepthAnything
from model.weights import WeightsError
from trainer.config import ConfigError
from trainer.config_evaluate import EvaluateConfig
from trainer.evaluate_pairs import PairSet
from trainer.evaluate_worker import items_of, measurement_of, open_set
from trainer.plan import NO_RATE, Plan
from trainer.plan_label import inference_section
from trainer.salvage import without_consequences


def plan_evaluate(
    config: EvaluateConfig, rate: float | None = None, *, problems: Sequence[str] = (), wrong: Sequence[str] = ()
) -> Plan:
    """An `evaluate`. `rate`: images a second of all workers together, measured. The weights are read.

    `problems` and `wrong` as in `plan_train`.
    """
    found: list[str] = []
    network = _network(config, found)
    datasets: dict[str, dict[str, Any]] = {}
    sets: list[Dataset | PairSet] = []
    for number, entry in enumerate(config.datasets):
        facts: dict[str, Any] = {"benchmark": entry.benchmark, "protocols": None, "samples": None}
        datasets[f"{number} {entry.path}"] = facts
        if network is not None:
            try:
                facts["protocols"] = list(measurement_of(config, number, network.preset).protocols)
            except ConfigError as error:
                found.append(str(error))
        try:
            opened = open_set(entry)
        except (RuntimeError, ValueError, OSError) as error:
            found.append(str(error))
            continue
        facts["samples"] = sum(item.unit.end - item.unit.begin for item in items_of([opened], config.limit))
        sets.append(opened)
    _look_at_baseline(config, found)
    items = items_of(sets, config.limit)
    samples = sum(item.unit.end - item.unit.begin for item in items)
    passes = 2 if config.flip else 1
    sections: dict[str, dict[str, Any]] = {
        "work": {
            "out": config.out,
            "workers": min(config.cluster.workers, max(1, len(items))),  # a unit is one worker's
            "samples": samples,
            "forward_pass_images": config.batch,
            "forward_passes_of_an_image": passes,
            "forward_passes_at_least": -(-samples // config.batch) * passes,  # images of one shape go together
        },
        "datasets": datasets,
    }
    if network is not None:
        low = config.precision == "bf16"
        memory = inference_section(network.preset, config.batch, config.input_size, low=low)
        sections["memory_of_a_worker"] = memory
    sections["time"] = {"images_per_second": rate, "left_seconds": samples / rate if rate else None}
    found = [*problems, *without_consequences(found, wrong)]
    return Plan(
        sections=sections,
        problems=tuple(dict.fromkeys(found)),
        notes=("activations are those of square images",) if rate else (NO_RATE.format("workers"),),
    )


def _network(config: EvaluateConfig, found: list[str]) -> DepthAnything | None:
    if not config.weights:  # said when the configuration was read
        return None
    try:
        return DepthAnything.from_pretrained(config.weights, preset=config.preset, position_mode=config.position_mode)
    except (WeightsError, RuntimeError, ValueError, OSError) as error:
        found.append(str(error))
        return None


def _look_at_baseline(config: EvaluateConfig, found: list[str]) -> None:
    if config.baseline is None:
        return
    try:
        dataset = Dataset.open(config.baseline.dataset)
    except (RuntimeError, ValueError, OSError) as error:
        found.append(str(error))
        return
    if dataset.info.quantity is None:
        found.append(f"baseline.dataset: {dataset.path} has no depth; name a labelled dataset")
