"""The resize of the training views on a CPU: OpenCV's cubic kernel (a = -0.75), not widened where the image shrinks.

PyTorch's resize of bytes: the whole image width first, then height, each rounded and clipped to bytes, in vector
instructions. DALI's CPU operator takes some ten times as long (docs/log.md). Shape suffixes: C channel, H W pixels.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

_ELONGATED = 16  # times the window's side: beyond it, only what the window needs is resized
_MARGIN = 3  # source pixels beside the window that the kernel reads, and one more


def resized_window(image_HWC: NDArray[np.uint8], window: NDArray[np.int32], size: int) -> NDArray[np.uint8]:
    """The `size` x `size` pixels at (top, left) of the image resized; `window` is (height, width, top, left)."""
    height, width, top, left = window.tolist()
    if max(height, width) > _ELONGATED * size:
        return _sampled(image_HWC, height, width, top, left, size)
    # a batch of one made in front: made behind the permutation, PyTorch no longer sees bytes in order of pixels
    image_1CHW = torch.from_numpy(image_HWC)[None].permute(0, 3, 1, 2)
    resized_1CHW = F.interpolate(image_1CHW, (height, width), mode="bicubic", align_corners=False)
    cut: NDArray[np.uint8] = resized_1CHW[0, :, top : top + size, left : left + size].permute(1, 2, 0).numpy()
    return cut


def _sampled(
    image_HWC: NDArray[np.uint8], height: int, width: int, top: int, left: int, size: int
) -> NDArray[np.uint8]:
    """The same kernel at the window's places alone, rounded once: resized whole, such an image would take gigabytes."""
    places = []
    for start, side, resized in ((top, image_HWC.shape[0], height), (left, image_HWC.shape[1], width)):
        place_S = (np.arange(start, start + size) + 0.5) * (side / resized)
        low, high = max(0, int(place_S[0]) - _MARGIN), min(side, int(place_S[-1]) + _MARGIN + 1)
        places.append((low, high, torch.from_numpy(2 * (place_S - low) / (high - low) - 1)))
    (y0, y1, y_S), (x0, x1, x_S) = places
    part_1CHW = torch.from_numpy(image_HWC[y0:y1, x0:x1]).permute(2, 0, 1)[None].to(torch.float64)
    grid_1SS2 = torch.stack(torch.meshgrid(x_S, y_S, indexing="xy"), -1)[None]
    sampled_1CSS = F.grid_sample(part_1CHW, grid_1SS2, mode="bicubic", padding_mode="border", align_corners=False)
    found: NDArray[np.uint8] = sampled_1CSS[0].permute(1, 2, 0).round().clamp(0, 255).to(torch.uint8).numpy()
    return found
