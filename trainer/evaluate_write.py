"""What an evaluation leaves in words: evaluation.json, images.jsonl, evaluation.md."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cluster import storage
from trainer.benchmarks import get_benchmark
from trainer.config_evaluate import EvaluateConfig
from trainer.evaluate_images import ImageResult
from trainer.protocols import PROTOCOLS
from trainer.published import INFERRED, Published, beside

LOWER = ("abs_rel", "sq_rel", "rmse", "rmse_log", "log10", "silog", "bad_pixel")
HIGHER = ("delta1", "delta2", "delta3", "accuracy")
NAMED = 20  # keys of skipped images in the Markdown
VERSION = 2  # of what is measured; 1 had a cap that counts itself, and as "constant" an image's median disparity


@dataclass(kw_only=True)
class DatasetResult:
    """Means over the images of one dataset: `means[protocol][metric]`, and `baselines[name][protocol][metric]`.

    Beside the protocols `means` has "constant", the best constant of each image in metres, metric by metric. `skipped`
    names the images that could not be used, by reason; `outside` counts those that the benchmark does not ask for.
    """

    dataset: str
    benchmark: str | None = None
    images: int = 0
    means: dict[str, dict[str, float]] = field(default_factory=dict)
    baselines: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    skipped: dict[str, list[str]] = field(default_factory=dict)
    outside: int = 0


def settings(config: EvaluateConfig) -> dict[str, Any]:
    """What the numbers depend on beside the weights; batch, threads and workers change at most a last bit."""
    names = {
        "datasets", "protocols", "average", "input_size", "flip", "precision", "max_depth", "limit", "baseline",
    }  # fmt: skip
    return config.model_dump(mode="json", include=names) | {"version": VERSION}


def plain(values: Any) -> Any:
    """For JSON, which knows no NaN: a number that is none becomes null, at any depth."""
    if isinstance(values, Mapping):
        return {key: plain(value) for key, value in values.items()}
    return None if isinstance(values, float) and not math.isfinite(values) else values


def from_plain(content: dict[str, Any]) -> DatasetResult:
    """What `plain` made a dictionary of; every null below `means` and `baselines` was a NaN."""

    def restored(values: Any) -> Any:
        if isinstance(values, dict):
            return {key: restored(value) for key, value in values.items()}
        return math.nan if values is None else values

    numbers = {name: restored(content[name]) for name in ("means", "baselines")}
    return DatasetResult(**{**content, **numbers})


def write_results(
    config: EvaluateConfig,
    fingerprint: str,
    results: Sequence[DatasetResult],
    images: Sequence[Sequence[ImageResult]],
) -> None:
    """Write the three texts; `images` per dataset, in order. Raises StorageError."""
    lines = [
        json.dumps({"dataset": result.dataset, **_record(image)}, ensure_ascii=False) + "\n"
        for result, found in zip(results, images, strict=True)
        for image in found
    ]
    storage.atomic_write(os.path.join(config.out, "images.jsonl"), "".join(lines))
    storage.atomic_write(os.path.join(config.out, "evaluation.md"), markdown(config, fingerprint, results))
    content = {
        "weights": config.weights,
        "fingerprint": fingerprint,
        "settings": settings(config),
        "datasets": [plain(vars(result)) for result in results],
    }
    storage.atomic_write(os.path.join(config.out, "evaluation.json"), json.dumps(content, indent=1))


def _record(image: ImageResult) -> dict[str, Any]:
    if image.reason:
        return {"key": image.key, "reason": image.reason}
    pixels = {name: int(found["pixels"]) for name, found in image.values.items() if found}
    return {"key": image.key, "pixels": max(pixels.values(), default=0), "metrics": plain(image.metrics)}


def markdown(config: EvaluateConfig, fingerprint: str, results: Sequence[DatasetResult]) -> str:
    """A table per dataset and protocol; published numbers stand only beside the same protocol and benchmark."""
    average = "valid pixel" if config.average == "pixels" else "image"
    lines = [
        "# Evaluation", "",
        f"Weights `{config.weights}`, fingerprint `{fingerprint}`; shorter side {config.input_size} pixels, "
        f"{'mean of image and mirror image' if config.flip else 'no flip'}, {config.precision}. "
        f"Every {average} counts the same. Numbers of different protocols or benchmarks cannot be compared.",
    ]  # fmt: skip
    for result in results:
        lines += ["", *_dataset_lines(config, result)]
    return "\n".join(lines) + "\n"


def _dataset_lines(config: EvaluateConfig, result: DatasetResult) -> list[str]:
    benchmark = get_benchmark(result.benchmark)
    of = f" of {benchmark.images} in the published split" if benchmark.images else ""
    lines = [f"## {benchmark.title or _cell(result.dataset)}", "", f"`{result.dataset}`: {result.images} images{of}."]
    if result.outside:
        lines.append(f"{result.outside} samples are not part of this benchmark.")
    for reason, keys in result.skipped.items():
        named = ", ".join(f"`{key}`" for key in keys[:NAMED])
        lines.append(f"Left out, {reason}: {len(keys)} ({named}{', ...' if len(keys) > NAMED else ''}).")
    if result.benchmark:
        lines += ["", f"Benchmark `{result.benchmark}`: {benchmark.source}."]
        lines += [f"Our choice {benchmark.choice}." if benchmark.choice else ""]
    for protocol, means in result.means.items():
        if protocol == "constant" or not means:
            continue
        rows: list[tuple[str, str, Mapping[str, float]]] = [("**these weights**", "", means)]
        rows += [(name, "baseline", by[protocol]) for name, by in result.baselines.items() if protocol in by]
        if "constant" in result.means and PROTOCOLS[protocol].compare == "depth":
            rows.append(("each image's best constant, by metric", "baseline", result.means["constant"]))
        published, note = _published(config, protocol, result)
        rows += [(row.network, row.source, row.values) for row in published]
        lines += ["", f"### {protocol}", "", f"{PROTOCOLS[protocol].summary}. Source: {PROTOCOLS[protocol].source}."]
        lines += [f"Our choice: {PROTOCOLS[protocol].choice}."] if PROTOCOLS[protocol].choice else []
        lines += [note] if note else []
        lines += ["", *_table(rows)]
    return lines


def _published(config: EvaluateConfig, protocol: str, result: DatasetResult) -> tuple[list[Published], str]:
    """The rows that may stand beside ours, and what is to be said of them, or of their absence."""
    rows, split = beside(protocol, result.benchmark), get_benchmark(result.benchmark).images
    if not rows:
        return [], ""
    if PROTOCOLS[protocol].flip != config.flip:
        how = ("are of the image alone", "false") if config.flip else ("average image and mirror image", "true")
        return [], f"The published numbers {how[0]}; `flip: {how[1]}` makes them comparable."
    if config.limit is not None or config.max_depth is not None or config.average != "images":
        return [], "No published numbers: `limit`, `max_depth` or `average` make this another measurement."
    inferred = INFERRED.get((protocol, result.benchmark or ""))
    notes = [inferred] if inferred else []
    if not inferred and split not in (None, result.images):
        notes.append(f"The published numbers are of {split} images.")
    if config.input_size != 518:
        notes.append(f"Here the shorter side is {config.input_size} pixels; the released networks' default is 518.")
    return rows, " ".join(notes)


def _table(rows: Sequence[tuple[str, str, Mapping[str, float]]]) -> list[str]:
    names = [name for name in (*LOWER, *HIGHER) if name in rows[0][2]]
    marks = [f"{name} {'↓' if name in LOWER else '↑'}" for name in names]
    lines = ["| network | " + " | ".join(marks) + " | source |", "|---" * (len(names) + 2) + "|"]
    for network, source, values in rows:
        cells = [f"{values[name]:.4g}" if name in values else "" for name in names]
        lines.append(f"| {_cell(network)} | " + " | ".join(cells) + f" | {_cell(source)} |")
    return lines


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
