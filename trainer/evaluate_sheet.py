"""Contact sheets: image | truth | prediction, near is warm.

Shape suffixes: H W pixels, C channel.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from cluster import storage
from dataio.header import displayed
from dataio.show import colorize
from trainer.evaluate_images import Seen, box_slices

HEIGHT = 240  # of a row at most, pixels
_CAPTION = 16
_GAP = 4


def sheet_row(seen: Seen, metric: bool) -> np.ndarray:
    """image | truth | prediction as one strip, uint8 [H, W, 3]; `metric`: the prediction is a depth."""
    assert seen.truth is not None and seen.prediction_HW is not None
    step = max(1, seen.prediction_HW.shape[0] // HEIGHT)  # of 24 megapixels, a row shows few
    thin = np.s_[::step, ::step]
    depth_HW, valid_HW = (map_HW[thin] for map_HW in seen.truth)
    image_HWC = displayed(seen.frame.sample.image)[box_slices(seen.frame)][thin]
    near_HW = 1 / np.where(valid_HW, depth_HW, 1)
    prediction_HW = seen.prediction_HW[thin]
    shown_HW = 1 / np.maximum(prediction_HW, 1e-6) if metric else prediction_HW
    strip = np.concatenate([image_HWC, colorize(near_HW, valid_HW), colorize(shown_HW, np.ones_like(valid_HW))], 1)
    height = min(HEIGHT, strip.shape[0])
    return np.asarray(Image.fromarray(strip).resize((round(strip.shape[1] * height / strip.shape[0]), height)))


def captioned(row: np.ndarray, text: str) -> np.ndarray:
    """The row below a line of text, as wide as the wider of the two."""
    font = ImageFont.load_default(size=11)
    width = max(row.shape[1], int(font.getlength(text)) + 4)
    line = Image.new("RGB", (width, _CAPTION), "white")
    ImageDraw.Draw(line).text((2, 1), text, fill="black", font=font)
    padded = np.pad(row, ((0, 0), (0, width - row.shape[1]), (0, 0)), constant_values=255)
    return np.concatenate([np.asarray(line), padded], 0)


def write_sheet(rows: Sequence[np.ndarray], path: str) -> None:
    """The rows below each other as PNG; without rows a sheet that an earlier evaluation left is removed."""
    if not rows:
        Path(path).unlink(missing_ok=True)
        return
    width = max(row.shape[1] for row in rows)
    padded = [np.pad(row, ((0, _GAP), (0, width - row.shape[1]), (0, 0)), constant_values=255) for row in rows]
    with storage.atomic_writer(path) as file:
        Image.fromarray(np.concatenate(padded, 0)).save(file, format="PNG")
