"""Whole images for a network: decoded by DALI, resized as the originals do, normalised.

The originals resize with OpenCV's cubic kernel (a = -0.75) without antialiasing. DALI's cubic has a = -0.5 and differs
by a few grey levels, so the resize is torch's, which has OpenCV's kernel and runs on the device too.

Shape suffixes: B batch, C channel, H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from nvidia.dali import fn, pipeline_def, types
from torch import Tensor

from dataio.dali_batch import MEAN, STD

Box = tuple[int, int, int, int]  # top, left, height, width; pixels


@pipeline_def(prefetch_queue_depth=1, exec_dynamic=True)
def _define(gpu: bool) -> Any:
    encoded = fn.external_source(name="image", dtype=types.UINT8, ndim=1)
    return fn.decoders.image(encoded, device="mixed" if gpu else "cpu", output_type=types.RGB)


class FramePipeline:
    """One DALI pipeline, rebuilt after a corrupt image: DALI gives up a pipeline object for good on one."""

    def __init__(self, batch: int, threads: int, device: str) -> None:
        self._batch, self._threads = batch, threads
        self._device = torch.device(device)
        self._pipeline: Any = None

    def run(
        self, images: list[bytes], size_hw: tuple[int, int], boxes: Sequence[Box | None] | None = None
    ) -> tuple[Tensor | None, list[bool]]:
        """(normalised [B', 3, H, W] of those that decode, on the device, or None; which ones did).

        `boxes` (top, left, height, width) cut the upright images before they are resized.
        """
        boxes = boxes or [None] * len(images)
        decoded = self._try(images, size_hw, boxes)
        if decoded is not None:
            return decoded, [True] * len(images)
        singles = [self._try([image], size_hw, [box]) for image, box in zip(images, boxes, strict=True)]
        good = [single for single in singles if single is not None]
        return (torch.cat(good) if good else None), [single is not None for single in singles]

    def _try(self, images: list[bytes], size_hw: tuple[int, int], boxes: Sequence[Box | None]) -> Tensor | None:
        if self._pipeline is None:
            gpu = self._device.type == "cuda"
            self._pipeline = _define(
                gpu,
                batch_size=self._batch,
                num_threads=self._threads,
                device_id=(self._device.index or 0) if gpu else None,
            )
            self._pipeline.build()
        try:
            self._pipeline.feed_input("image", [np.frombuffer(image, np.uint8) for image in images])
            (images_HWC,) = self._pipeline.run()
            whole = [torch.from_dlpack(image_HWC) for image_HWC in images_HWC]
            return torch.cat([_prepare(_cut(x_HWC, box), size_hw) for x_HWC, box in zip(whole, boxes, strict=True)])
        except RuntimeError:
            self._pipeline = None
            return None


def _cut(image_HWC: Tensor, box: Box | None) -> Tensor:
    if box is None:
        return image_HWC
    top, left, height, width = box
    return image_HWC[top : top + height, left : left + width]


def _prepare(image_HWC: Tensor, size_hw: tuple[int, int]) -> Tensor:
    """uint8 RGB -> normalised float32 [1, 3, *size_hw]; cubic may leave 0..1, as in the originals."""
    image_1CHW = image_HWC.permute(2, 0, 1)[None].float() / 255
    if image_1CHW.shape[2:] != size_hw:
        image_1CHW = F.interpolate(image_1CHW, size_hw, mode="bicubic", align_corners=False, antialias=False)
    mean, std = (image_1CHW.new_tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
    return (image_1CHW - mean) / std
