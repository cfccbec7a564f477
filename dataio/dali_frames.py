"""DALI for whole images: decode, resize to the network's input as the originals do (cubic, no antialias), normalise.

Shape suffixes: B batch, C channel, H W pixels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types
from torch import Tensor

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet


@pipeline_def(prefetch_queue_depth=1, exec_dynamic=True)
def _frames(device: str) -> Any:
    encoded = fn.external_source(name="image", dtype=types.UINT8, ndim=1)
    size_hw = fn.external_source(name="size", dtype=types.FLOAT, ndim=1)
    image = fn.decoders.image(encoded, device="mixed" if device == "gpu" else "cpu", output_type=types.RGB)
    image = fn.resize(image, size=size_hw, interp_type=types.INTERP_CUBIC, antialias=False, dtype=types.FLOAT)
    scale = [255.0 * s for s in STD]
    shift = [255.0 * m for m in MEAN]
    return fn.crop_mirror_normalize(image, mean=shift, std=scale, dtype=types.FLOAT, output_layout="CHW")


class FramePipeline:
    """One DALI pipeline, rebuilt after a corrupt image: DALI gives up a pipeline object for good on one."""

    def __init__(self, batch: int, threads: int, device: str) -> None:
        self._batch, self._threads = batch, threads
        self._device = torch.device(device)
        self._pipeline: Any = None

    def run(self, images: list[bytes], size_hw: tuple[int, int]) -> tuple[Tensor | None, list[bool]]:
        """(normalised [B', 3, H, W] of those that decode, on the device, or None; which ones did)."""
        decoded = self._try(images, size_hw)
        if decoded is not None:
            return decoded, [True] * len(images)
        singles = [self._try([image], size_hw) for image in images]
        good = [single for single in singles if single is not None]
        return (torch.cat(good) if good else None), [single is not None for single in singles]

    def _try(self, images: list[bytes], size_hw: tuple[int, int]) -> Tensor | None:
        if self._pipeline is None:
            gpu = self._device.type == "cuda"
            self._pipeline = _frames(
                "gpu" if gpu else "cpu",
                batch_size=self._batch,
                num_threads=self._threads,
                device_id=(self._device.index or 0) if gpu else None,
            )
            self._pipeline.build()
        try:
            self._pipeline.feed_input("image", [np.frombuffer(image, np.uint8) for image in images])
            self._pipeline.feed_input("size", [np.asarray(size_hw, np.float32)] * len(images))
            (output,) = self._pipeline.run()
            return torch.from_dlpack(output.as_tensor()).clone()
        except RuntimeError:
            self._pipeline = None
            return None
