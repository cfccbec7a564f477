"""Weights against labelled datasets: both published protocols, per-image means, and the best constant as the floor.

Shape suffixes: B batch, C channel, H W pixels.
"""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch.nn.functional as F
from PIL import Image, ImageOps

from cluster import storage
from dataio.codec import decode_npy, decode_png16
from dataio.dali_frames import FramePipeline
from dataio.dataset import Dataset
from dataio.frames import Frame, batches_by_shape, decode_frames, read_frames
from dataio.show import colorize
from dataio.spec import DataError
from trainer.config_evaluate import EvaluateConfig
from trainer.inference import Predictor, sizer
from trainer.metrics import MetricMean, best_constant_metrics, depth_metrics, relative_depth_metrics

SPACES = ("depth", "disparity")


@dataclass(kw_only=True)
class DatasetResult:
    """Means over the images of one dataset: `means[protocol][metric]`; protocols depth, disparity (or metric)."""

    dataset: str
    images: int = 0
    means: dict[str, dict[str, float]] = field(default_factory=dict)
    skipped: dict[str, list[str]] = field(default_factory=dict)


def evaluate(
    config: EvaluateConfig, *, on_progress: Callable[[int, int], None] | None = None, predictor: Predictor | None = None
) -> list[DatasetResult]:
    """Evaluate and write `evaluation.json` and `sheet.png` (image | truth | prediction) under `config.out`.

    Raises WeightsError, DataError (not a labelled dataset) or StorageError. Samples that cannot be read are counted by
    reason and named in the result.
    """
    import torch

    torch.set_num_threads(config.threads)
    storage.make_folder(config.out)
    datasets = [Dataset.open(path) for path in config.datasets]
    for dataset in datasets:
        if dataset.info.quantity is None:
            raise DataError(f"{dataset.path}: has no depth to compare with; evaluate needs a labelled dataset")
    predictor = predictor or _predictor(config)
    total = sum(min(d.info.samples, config.limit or d.info.samples) for d in datasets)
    results: list[DatasetResult] = []
    sheet: list[np.ndarray] = []
    done = 0
    for dataset in datasets:
        result = DatasetResult(dataset=dataset.path)
        means = {protocol: MetricMean() for protocol in ("metric",) if predictor.metric} or {
            protocol: MetricMean() for protocol in (*SPACES, "constant")
        }
        for frame, prediction_HW in predictions(dataset, config, predictor):
            done += 1
            if on_progress:
                on_progress(done, total)
            truth = read_truth(frame)
            if not isinstance(truth, str) and config.max_depth:
                truth = within(truth, config.max_depth)
            if isinstance(truth, str) or prediction_HW is None:
                result.skipped.setdefault(str(truth), []).append(frame.sample.key)
                continue
            for protocol, values in measure(prediction_HW, *truth, config.max_depth, predictor.metric).items():
                means[protocol].add(values)
            result.images += 1
            if len(sheet) < 8:
                sheet.append(sheet_row(frame, truth, prediction_HW, predictor.metric))
        result.means = {protocol: mean.mean() for protocol, mean in means.items()}
        results.append(result)
    write_results(config, predictor, results, sheet)
    return results


def evaluated(config: EvaluateConfig) -> list[DatasetResult] | None:
    """What `evaluate` left in `config.out`, or None unless it was of these weights, datasets and settings."""
    path = os.path.join(config.out, "evaluation.json")
    if not storage.exists(path):
        return None
    content = json.loads(storage.read_bytes(path))
    same = content.get("settings") == settings(config)
    if not same or content["fingerprint"] != _predictor(config).network.fingerprint():
        return None
    return [from_plain(result) for result in content["datasets"]]


def _predictor(config: EvaluateConfig) -> Predictor:
    device = "cuda" if config.use_gpu else "cpu"
    return Predictor(config.weights, preset=config.preset, position_mode=config.position_mode, device=device)


def settings(config: EvaluateConfig) -> dict[str, Any]:
    """What the numbers depend on beside weights and data."""
    return config.model_dump(mode="json", include={"datasets", "input_size", "max_depth", "limit"})


def predictions(
    dataset: Dataset, config: EvaluateConfig, predictor: Predictor
) -> Iterator[tuple[Frame, np.ndarray | None]]:
    """Every sample with its prediction at the image's own resolution, or None when it has a problem."""
    pipeline = FramePipeline(config.batch, config.threads, str(predictor.device))
    aligned = predictor.network.preset.output_align_corners  # V1's and V2's own inference differ here
    frames = _first(dataset, config, predictor.network.preset.multiple)
    for group in batches_by_shape(frames, config.batch):
        if group[0].problem:
            yield group[0], None
            continue
        image_BCHW, good, bad = decode_frames(pipeline, group)
        yield from ((frame, None) for frame in bad)
        if image_BCHW is None:
            continue
        value_BHW, _ = predictor(image_BCHW)
        for row, frame in enumerate(good):
            value_HW = F.interpolate(value_BHW[row][None, None], frame.size_hw, mode="bilinear", align_corners=aligned)
            yield frame, value_HW[0, 0].cpu().numpy()


def _first(dataset: Dataset, config: EvaluateConfig, multiple: int) -> Iterator[Frame]:
    left = config.limit or dataset.info.samples
    for shard in dataset.shards:
        for frame in read_frames(dataset, shard, sizer(config.input_size, multiple)):
            if not left:
                return
            left -= 1
            yield frame


def read_truth(frame: Frame) -> tuple[np.ndarray, np.ndarray] | str:
    """(depth in metres [H, W], valid [H, W]) or the reason why there is none. Sky has no depth."""
    sample = frame.sample
    if frame.problem:
        return frame.problem
    if sample.target is None or sample.quantity is None:
        return "missing_target"
    try:
        if sample.code is None:
            value_HW = decode_npy(sample.target, sample.quantity)
        else:
            value_HW = decode_png16(sample.target, sample.code)
        sky_HW = decode_sky(sample.sky, value_HW)
    except DataError:
        return "bad_target"
    if value_HW.shape != frame.size_hw:
        return "size_mismatch"
    with np.errstate(divide="ignore", invalid="ignore"):
        depth_HW = value_HW if sample.quantity == "depth_m" else 1 / value_HW
    valid_HW = np.isfinite(depth_HW) & (depth_HW > 0) & ~sky_HW
    return (depth_HW, valid_HW) if valid_HW.any() else "no_valid_pixels"


def decode_sky(png: bytes | None, like_HW: np.ndarray) -> np.ndarray:
    """Where there is sky, bool [H, W] of the truth's size. Raises DataError for an unreadable mask."""
    if png is None:
        return np.zeros(like_HW.shape, bool)
    try:
        with Image.open(io.BytesIO(png)) as image:
            sky_HW = np.asarray(image) > 127
    except Exception as error:  # Pillow's plug-ins raise whatever they like on damaged files
        raise DataError(f"unreadable sky mask ({error})") from error
    if sky_HW.shape != like_HW.shape:
        raise DataError(f"the sky mask is {sky_HW.shape}, the depth {like_HW.shape}")
    return sky_HW


def within(truth: tuple[np.ndarray, np.ndarray], max_depth: float) -> tuple[np.ndarray, np.ndarray] | str:
    """The truth without what is farther than `max_depth` metres, or the reason why nothing is left."""
    depth_HW, valid_HW = truth
    valid_HW = valid_HW & (depth_HW <= max_depth)
    return (depth_HW, valid_HW) if valid_HW.any() else "no_valid_pixels"


def measure(
    prediction_HW: np.ndarray, depth_HW: np.ndarray, valid_HW: np.ndarray, max_depth: float | None, metric: bool
) -> dict[str, dict[str, float]]:
    """Metrics of one image by protocol."""
    if metric:
        return {"metric": depth_metrics(prediction_HW, depth_HW, valid_HW)}
    values = {
        space: relative_depth_metrics(prediction_HW, depth_HW, valid_HW, max_depth, space=space)  # type: ignore[arg-type]
        for space in SPACES
    }
    return {**values, "constant": best_constant_metrics(depth_HW, valid_HW, max_depth)}


def sheet_row(
    frame: Frame, truth: tuple[np.ndarray, np.ndarray], prediction_HW: np.ndarray, metric: bool
) -> np.ndarray:
    """image | truth | prediction as one strip, nearer is warmer."""
    depth_HW, valid_HW = truth
    image = open_rgb(frame)
    near_HW = 1 / np.where(valid_HW, depth_HW, 1)
    shown_HW = 1 / np.maximum(prediction_HW, 1e-6) if metric else prediction_HW
    strip = np.concatenate([image, colorize(near_HW, valid_HW), colorize(shown_HW, np.ones_like(valid_HW))], 1)
    height = min(240, strip.shape[0])
    return np.asarray(Image.fromarray(strip).resize((round(strip.shape[1] * height / strip.shape[0]), height)))


def open_rgb(frame: Frame) -> np.ndarray:
    """The frame's image upright, uint8 [H, W, 3]."""
    with Image.open(io.BytesIO(frame.sample.image)) as image:
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


def plain(result: DatasetResult) -> dict[str, Any]:
    """For JSON, which knows no NaN: the mean over an image whose prediction is not finite becomes null."""
    means = {
        protocol: {name: value if math.isfinite(value) else None for name, value in values.items()}
        for protocol, values in result.means.items()
    }
    return {**vars(result), "means": means}


def from_plain(content: dict[str, Any]) -> DatasetResult:
    """What `plain` made a dictionary of."""
    means = {
        protocol: {name: math.nan if value is None else value for name, value in values.items()}
        for protocol, values in content["means"].items()
    }
    return DatasetResult(**{**content, "means": means})


def write_results(
    config: EvaluateConfig, predictor: Predictor, results: list[DatasetResult], sheet: list[np.ndarray]
) -> None:
    content: dict[str, Any] = {
        "weights": config.weights,
        "fingerprint": predictor.network.fingerprint(),
        "settings": settings(config),
        "datasets": [plain(result) for result in results],
    }
    storage.atomic_write(os.path.join(config.out, "evaluation.json"), json.dumps(content, indent=1))
    path = os.path.join(config.out, "sheet.png")
    if not sheet:  # an earlier evaluation's would be taken for this one's
        Path(path).unlink(missing_ok=True)
    else:
        width = max(row.shape[1] for row in sheet)
        padded = [np.pad(row, ((0, 4), (0, width - row.shape[1]), (0, 0)), constant_values=255) for row in sheet]
        with storage.atomic_writer(path) as file:
            Image.fromarray(np.concatenate(padded, 0)).save(file, format="PNG")
