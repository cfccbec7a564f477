"""What knows a training set but not the image: its mean depth map, and its typical depth.

Street scenes are near below and far above, whatever is in them, and a mean map knows it. A network that is no better
has learned no more than where the camera hangs.
Shape suffixes: H W pixels of an image, R C rows and columns of the stored map, K valid pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from dataio.dataset import Dataset
from dataio.frames import read_frames
from dataio.spec import DataError
from trainer.evaluate_truth import Truth, read_truth

GRID = (48, 64)  # rows, columns of the stored map; images of all sizes are averaged on it


@dataclass(frozen=True)
class MeanMap:
    """Mean depth (metres) and mean disparity (1 / metres) by place, and the typical depth; picklable."""

    depth_m_RC: np.ndarray
    disparity_RC: np.ndarray
    typical_m: float  # median over images of their median depth
    images: int

    def predictions(self, metric: bool) -> Mapping[str, Callable[[int, int], np.ndarray]]:
        """Name -> (height, width) -> what it says of every image of that size: metres, or disparity."""
        map_RC = self.depth_m_RC if metric else self.disparity_RC
        level = self.typical_m if metric else 1 / self.typical_m
        return {
            "mean-map": lambda height, width: _resized(map_RC, height, width),
            "training-constant": lambda height, width: np.full((height, width), level),
        }


def mean_map(dataset: Dataset, limit: int | None = None, max_depth: float | None = None) -> MeanMap:
    """Over the first `limit` samples (None: all); only depths below `max_depth` metres count.

    A sample without a usable truth is passed over. Raises DataError when the dataset has no depth, or none is usable.
    """
    if dataset.info.quantity is None:
        raise DataError(f"{dataset.path}: has no depth to average; baseline.dataset needs a labelled dataset")
    sums = np.zeros((3, *GRID))
    medians: list[float] = []
    left = dataset.info.samples if limit is None else limit
    for shard in dataset.shards:
        for frame in read_frames(dataset, shard, lambda height, width: (height, width), 0, left):
            truth = read_truth(frame)
            if not isinstance(truth, str):
                middle = _add(sums, truth, max_depth)
                medians += [] if middle is None else [middle]
        left -= min(left, shard.samples)
    if not medians:
        raise DataError(f"{dataset.path}: none of its samples has a usable depth; see `fathom data check`")
    means = sums[:2] / np.maximum(sums[2], 1)
    overall = sums[:2].sum((1, 2)) / sums[2].sum()
    depth_m_RC, disparity_RC = (np.where(sums[2] > 0, mean, level) for mean, level in zip(means, overall, strict=True))
    return MeanMap(depth_m_RC, disparity_RC, float(np.median(medians)), len(medians))


def _add(sums: np.ndarray, truth: Truth, max_depth: float | None) -> float | None:
    """Add one truth to the sums of depth, disparity and pixels by cell; returns its median depth."""
    depth_HW, valid_HW = truth
    if max_depth is not None:
        valid_HW = valid_HW & (depth_HW < max_depth)
    if not valid_HW.any():
        return None
    row_K, column_K = np.nonzero(valid_HW)
    depth_K = depth_HW[valid_HW].astype(np.float64)
    cell_K = (row_K * GRID[0] // valid_HW.shape[0]) * GRID[1] + column_K * GRID[1] // valid_HW.shape[1]
    for place, value_K in enumerate((depth_K, 1 / depth_K, np.ones_like(depth_K))):
        sums[place] += np.bincount(cell_K, value_K, GRID[0] * GRID[1]).reshape(GRID)
    return float(np.median(depth_K))


def _resized(map_RC: np.ndarray, height: int, width: int) -> np.ndarray:
    map_11RC = torch.from_numpy(map_RC)[None, None]
    return F.interpolate(map_11RC, (height, width), mode="bilinear", align_corners=False)[0, 0].numpy()
