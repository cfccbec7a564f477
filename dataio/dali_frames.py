"""Whole images for a network: decoded by DALI, resized as the originals do, normalised.

The originals resize with OpenCV's cubic kernel (a = -0.75) without antialiasing. DALI's cubic has a = -0.5 and differs
by a few grey levels, so the resize is torch's, which has OpenCV's kernel and runs on the device too.

Shape suffixes: B batch, C channel, H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dataio.dali_batch import MEAN, STD, Probe, as_arrays, define_decoder

Box = tuple[int, int, int, int]  # top, left, height, width; pixels


class FramePipeline:
    """One DALI pipeline, rebuilt after a corrupt image: DALI gives up a pipeline object for good on one."""

    def __init__(self, batch: int, threads: int, device: str) -> None:
        self._batch, self._threads = batch, threads
        self._device = torch.device(device)
        self._pipeline: Any = None
        self._probe = Probe(self._device)

    def run(
        self, images: list[bytes], size_hw: tuple[int, int], boxes: Sequence[Box | None] | None = None
    ) -> tuple[Tensor | None, list[bool]]:
        """(normalised [B', 3, H, W] of those that decode, on the device, or None; which ones did).

        `boxes` (top, left, height, width) cut the upright images before they are resized. RuntimeError only for what
        no single image is to blame for, such as too little memory.
        """
        good = [True] * len(images)
        try:
            whole = self._decode(images)
        except RuntimeError:
            good = [self._probe.decodes(image) for image in images]
            if all(good):
                raise
            whole = self._decode([image for image, decodes in zip(images, good, strict=True) if decodes])
        kept = [box for box, decodes in zip(boxes or [None] * len(images), good, strict=True) if decodes]
        prepared = [_prepare(_cut(image_HWC, box), size_hw) for image_HWC, box in zip(whole, kept, strict=True)]
        if self._device.type == "cuda":  # DALI takes its buffers back as soon as they are let go of here
            torch.cuda.current_stream(self._device).synchronize()
        return (torch.cat(prepared) if prepared else None), good

    def _decode(self, images: Sequence[bytes]) -> list[Tensor]:
        """uint8 RGB [H, W, 3] each, in DALI's own memory."""
        if not images:
            return []
        if self._pipeline is None:
            gpu = self._device.type == "cuda"
            self._pipeline = define_decoder(
                gpu,
                batch_size=self._batch,
                num_threads=self._threads,
                device_id=(self._device.index or 0) if gpu else None,
            )
            self._pipeline.build()
        try:
            self._pipeline.feed_input("image", as_arrays(images))
            (images_HWC,) = self._pipeline.run()
        except RuntimeError:
            self._pipeline = None
            raise
        return [torch.from_dlpack(image_HWC) for image_HWC in images_HWC]


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
