"""Files of depth that published datasets come in.

h5py and OpenEXR are in the extra `import`: `pip install 'fathom-depth[import]'`.

Shape suffixes: H W pixels, C channel.
"""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dataio.codec import read_png16
from dataio.importers.base import BadItem, Map, look
from dataio.spec import DataError


def holes(value_HW: npt.ArrayLike, low: float = 0.0, high: float = float("inf")) -> Map:
    """The map with NaN where a value is not finite, or not in (low, high]."""
    value_HW = np.asarray(value_HW, np.float32)
    with np.errstate(invalid="ignore"):
        valid_HW = np.isfinite(value_HW) & (value_HW > low) & (value_HW <= high)
    return np.where(valid_HW, value_HW, np.float32(np.nan))


def read_npy(data: bytes) -> npt.NDArray[Any]:
    """A `.npy`, [H, W] or [H, W, 1]. BadItem unreadable_depth."""
    try:
        value = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise BadItem("unreadable_depth") from error
    return _plane(value)


def read_codes(png: bytes) -> npt.NDArray[np.uint16]:
    """The codes of a 16-bit grey PNG, [H, W]. BadItem unreadable_depth, depth_not_16_bit."""
    try:
        return read_png16(png)
    except DataError as error:
        raise BadItem("unreadable_depth" if look(png)[0] is None else "depth_not_16_bit") from error


def read_pfm(data: bytes) -> npt.NDArray[np.float32]:
    """A portable float map with one channel: rows from the bottom up, the sign of the scale is the byte order.

    Definition: P. Debevec's PFM page; used by Middlebury and BlendedMVS. BadItem unreadable_depth.
    """
    head = re.match(rb"Pf\s+(\d+)\s+(\d+)\s+([-+0-9.eE]+)[ \t\r]*\n", data)
    if head is None:
        raise BadItem("unreadable_depth")
    width, height, order = int(head[1]), int(head[2]), "<" if float(head[3]) < 0 else ">"
    pixels = data[head.end() :]
    if len(pixels) != 4 * width * height:
        raise BadItem("unreadable_depth")
    return np.frombuffer(pixels, f"{order}f4").reshape(height, width)[::-1].astype(np.float32)


def read_hdf5(path: Path, dataset: str, index: int | None = None) -> npt.NDArray[Any]:
    """One array of an HDF5 file, or one entry of its first axis. BadItem unreadable_depth, missing_depth."""
    h5py = module("h5py")
    try:
        with h5py.File(path, "r") as file:
            found = file[dataset]
            return np.asarray(found if index is None else found[index])
    except FileNotFoundError as error:
        raise BadItem("missing_depth") from error
    except (OSError, KeyError, IndexError, ValueError) as error:
        raise BadItem("unreadable_depth") from error


def read_exr(path: Path, channels: tuple[str, ...] = ("Y", "Z", "R", "V", "depth.V")) -> npt.NDArray[np.float32]:
    """The first of these channels that an OpenEXR file has. BadItem unreadable_depth, missing_depth."""
    exr = module("OpenEXR")
    if not path.exists():
        raise BadItem("missing_depth")
    try:
        with exr.File(str(path), separate_channels=True) as file:
            found = file.channels()
            name = next(name for name in (*channels, *found) if name in found)
            return np.asarray(found[name].pixels, np.float32)
    except (RuntimeError, OSError, ValueError, StopIteration) as error:
        raise BadItem("unreadable_depth") from error


def resize_nearest(value_HW: npt.NDArray[Any], size_wh: tuple[int, int]) -> npt.NDArray[Any]:
    """The map at another size: the value under each pixel's centre."""
    width, height = size_wh
    rows = ((np.arange(height) + 0.5) * value_HW.shape[0] / height).astype(int)
    columns = ((np.arange(width) + 0.5) * value_HW.shape[1] / width).astype(int)
    return value_HW[rows[:, None], columns]


def _plane(value: npt.NDArray[Any]) -> npt.NDArray[Any]:
    if value.ndim == 3 and value.shape[-1] == 1:
        value = value[..., 0]
    if value.ndim != 2:
        raise BadItem("unreadable_depth")
    return value


def module(name: str) -> Any:
    """A library of the extra `import`. DataError when it is not installed."""
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise DataError(f"this layout needs {name}: pip install 'fathom-depth[import]'") from error
