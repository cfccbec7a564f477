"""Weights against labelled datasets, on one process or many, under the protocols of trainer/protocols.py.

The units of all datasets are shared out to `cluster.workers` actors (cluster/pool.py); one worker runs here, without
Ray. What a unit gives does not depend on who measures it, and the means are exact sums: any number of workers gives the
same numbers to the last bit.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from cluster import storage
from cluster.stop import StopFlag
from dataio.dataset import Dataset
from trainer.config_evaluate import EvaluateConfig
from trainer.evaluate_baselines import MeanMap, mean_map
from trainer.evaluate_images import OUTSIDE, ImageResult, Measurement, in_order, mean_of
from trainer.evaluate_sheet import captioned, write_sheet
from trainer.evaluate_worker import (
    SHEET_ROWS,
    Examiner,
    Item,
    Outcome,
    Row,
    items_of,
    make_predictor,
    measurements,
    open_set,
    worst_first,
)
from trainer.evaluate_write import DatasetResult, from_plain, settings, write_results
from trainer.inference import Predictor

__all__ = ["DatasetResult", "evaluate", "evaluated"]

Progress = Callable[[int, int], None]


def evaluate(
    config: EvaluateConfig,
    *,
    on_progress: Progress | None = None,
    predictor: Predictor | None = None,
    stop: StopFlag | None = None,
) -> list[DatasetResult]:
    """Evaluate and write evaluation.json, evaluation.md, images.jsonl, sheet.png and worst.png under `config.out`.

    `on_progress(done, total)` counts images. A `predictor` given takes the place of the configured weights, in this
    process alone. Samples that cannot be used are counted by reason and named in the result.

    Raises WeightsError, DataError (not a labelled dataset), ConfigError (a protocol that does not go with the network
    or benchmark), StorageError; Stopped after a request in `stop`.
    """
    storage.make_folder(config.out)
    sets = [open_set(entry) for entry in config.datasets]
    predictor_given = predictor is not None
    several = config.cluster.workers > 1 and not predictor_given
    predictor = predictor or make_predictor(config, device="cpu" if several else None)
    what = measurements(config, predictor)
    baseline = _baseline(config)
    items = items_of(sets, config.limit)
    found = [Collected(config.worst) for _ in sets]
    if several:
        _on_pool(config, baseline, items, found, on_progress, stop or StopFlag())
    else:
        examiner = Examiner(config.model_dump(mode="json"), baseline, predictor, sets)
        _here(examiner, items, found, on_progress, stop)
    images = [in_order(of.images) for of in found]
    results = [summary(config, n, opened.path, what[n], images[n]) for n, opened in enumerate(sets)]
    write_results(config, predictor.network.fingerprint(), results, images)
    _write_sheets(config, found)
    return results


@dataclass
class Collected:
    """One dataset's images, and the rows of the sheets among them: the same whatever order outcomes come in."""

    keep: int  # worst rows; the others' pictures are let go as soon as they are beaten
    images: list[ImageResult] = field(default_factory=list)
    first: list[Row] = field(default_factory=list)
    worst: list[Row] = field(default_factory=list)

    def add(self, outcome: Outcome) -> None:
        self.images += outcome.images
        self.first = sorted([*self.first, *outcome.first], key=lambda row: row.place)[:SHEET_ROWS]
        self.worst = sorted([*self.worst, *outcome.worst], key=worst_first)[: self.keep]


def evaluated(config: EvaluateConfig) -> list[DatasetResult] | None:
    """What `evaluate` left in `config.out`, or None unless it was of these weights, datasets and settings."""
    path = os.path.join(config.out, "evaluation.json")
    if not storage.exists(path):
        return None
    content = json.loads(storage.read_bytes(path))
    same = content.get("settings") == settings(config)
    if not same or content["fingerprint"] != make_predictor(config, device="cpu").network.fingerprint():
        return None
    return [from_plain(result) for result in content["datasets"]]


def summary(
    config: EvaluateConfig, number: int, path: str, what: Measurement, images: Sequence[ImageResult]
) -> DatasetResult:
    """Means and what was left out of the `number`-th dataset, from its images in order."""
    result = DatasetResult(dataset=path, benchmark=config.datasets[number].benchmark)
    for image in images:
        if image.reason == OUTSIDE:
            result.outside += 1
        elif image.reason:
            result.skipped.setdefault(image.reason, []).append(image.key)
        else:
            result.images += 1
    names = [*what.protocols, *(["constant"] if what.constant else [])]
    result.means = {name: mean_of(images, name, config.average) for name in names}
    for name in {name: None for image in images for name in image.values if ": " in name}:
        baseline, protocol = name.split(": ")
        result.baselines.setdefault(baseline, {})[protocol] = mean_of(images, name, config.average)
    return result


def _baseline(config: EvaluateConfig) -> MeanMap | None:
    if config.baseline is None:
        return None
    return mean_map(Dataset.open(config.baseline.dataset), config.baseline.limit, config.max_depth)


def _here(
    examiner: Examiner,
    items: Sequence[Item],
    found: Sequence[Collected],
    on_progress: Progress | None,
    stop: StopFlag | None,
) -> None:
    total = sum(item.unit.end - item.unit.begin for item in items)
    done = 0

    def on_image() -> None:
        nonlocal done
        done += 1
        if on_progress:
            on_progress(done, total)
        if stop:
            stop.check()

    for item in items:
        found[item.dataset].add(examiner.process(item, on_image))


def _on_pool(
    config: EvaluateConfig,
    baseline: MeanMap | None,
    items: Sequence[Item],
    found: Sequence[Collected],
    on_progress: Progress | None,
    stop: StopFlag,
) -> None:
    from cluster.pool import run_pool

    cluster = config.cluster
    workers = min(cluster.workers, len(items))
    total = sum(item.unit.end - item.unit.begin for item in items)

    def on_result(item: Item, outcome: Outcome) -> None:
        found[item.dataset].add(outcome)
        if on_progress:
            on_progress(sum(len(of.images) for of in found), total)

    ended = run_pool(
        functools.partial(Examiner, config.model_dump(mode="json"), baseline),
        items,
        address=cluster.address,
        workers=workers,
        threads_per_worker=cluster.threads,
        use_gpu=cluster.use_gpu,
        on_result=on_result,
        stop=stop,
    )
    if not ended.complete:
        stop.check()


def _write_sheets(config: EvaluateConfig, found: Sequence[Collected]) -> None:
    """sheet.png: the first images; worst.png: those with the largest abs_rel of each dataset, named."""
    first = [row.picture for of in found for row in of.first if row.picture is not None]
    write_sheet(first[:SHEET_ROWS], os.path.join(config.out, "sheet.png"))
    worst = []
    for entry, of in zip(config.datasets, found, strict=True):
        name = os.path.basename(entry.path.rstrip("/"))
        for row in of.worst:
            assert row.picture is not None  # an Examiner draws what it keeps
            worst.append(captioned(row.picture, f"{name}: {row.key}   abs_rel {row.score:.4f}"))
    write_sheet(worst, os.path.join(config.out, "worst.png"))
