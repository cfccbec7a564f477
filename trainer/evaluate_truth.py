"""The ground truth of a frame.

Shape suffixes: H W pixels.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from dataio.codec import decode_npy, decode_png16
from dataio.frames import Frame
from dataio.spec import DataError

Truth = tuple[np.ndarray, np.ndarray]  # depth in metres [H, W], valid bool [H, W]


def read_truth(frame: Frame) -> Truth | str:
    """(depth in metres [H, W], valid [H, W]) of the whole image, or the reason why there is none. Sky has no depth."""
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
