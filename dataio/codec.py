"""16-bit codes <-> maps: how depth and disparity stand in PNG files.

A map is float32 [H, W], NaN where nothing was measured. Its file is a 16-bit grey PNG whose values are codes:
quantity = scale * (code - zero) + shift, and code 0 is a hole whatever `zero` is (`AffineCode`).

Shape suffixes: H W pixels.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from dataio.png16 import Codes, write_dense_png16, write_png16
from dataio.spec import DataError
from dataio.types import AffineCode, Quantity

DEPTH_MM = AffineCode(scale=0.001)  # what RGB-D cameras write; reaches 65.535 m
LABEL_ZERO = 16  # the smallest valid code of a label: disparity `shift`, so that 0, the sky, is a value and no hole
LABEL_STEP = 16  # the low 4 bits stay zero: 12 bits are below a teacher's noise and halve the file
LABEL_SPAN = 65504  # 4094 steps: the largest multiple of 16 whose code, span + zero, fits into 16 bits
HALF_PRECISION_RANGE = 64  # max / min up to which a linear 16-bit code is nowhere coarser than float16

_MAX_CODE = 65535
MIN_SCALE = float(np.finfo(np.float32).tiny)  # below, 1 / depth is infinite in float32
_MAX_FLOAT32 = float(np.finfo(np.float32).max)


def encode_png16(value_HW: npt.ArrayLike, code: AffineCode, *, level: int = 1) -> tuple[bytes, int]:
    """Encode a map by a given code; returns the PNG and how many pixels lay above the code's range.

    `level` is zlib's: 1 is four times faster than 6 and a third larger, 0 stores, for what is decoded at once.

    Holes are NaN and infinities, and, for a code that starts at zero (`zero` = `shift` = 0: depths), values <= 0.
    The error is at most scale / 2 inside the range [quantity of code 1, quantity of code 65535]; values outside are
    clipped to its ends. ValueError unless the map is [H, W] and scale > 0.
    """
    value_HW = np.asarray(value_HW, np.float64)
    if value_HW.ndim != 2 or not value_HW.size or not code.scale > 0:
        raise ValueError(f"needs a map [H, W] and a positive scale, got shape {value_HW.shape}, scale {code.scale}")
    valid_HW = np.isfinite(value_HW)
    if code.zero == 0 and code.shift == 0:
        valid_HW &= value_HW > 0
    code_HW = np.rint((np.where(valid_HW, value_HW, 0) - code.shift) / code.scale + code.zero)
    clipped = int(np.count_nonzero(valid_HW & (code_HW > _MAX_CODE)))
    return write_png16(np.where(valid_HW, np.clip(code_HW, 1, _MAX_CODE), 0).astype(np.uint16), level), clipped


def encode_map(value_HW: npt.ArrayLike, quantity: Quantity) -> tuple[str, bytes, AffineCode | None]:
    """Encode a map in the way that keeps it best: (extension of the member, its content, its code or None).

    Holes are NaN and infinities, for depths also values <= 0. A depth map whose largest value is at most 64 times its
    smallest becomes a 16-bit PNG (scale = max / 65535, error at most scale / 2): nowhere worse than half precision,
    relative to the value. Any other becomes a `.npy` of float16 (error at most 2^-11 of the value), or of float32 where
    float16 does not reach. A disparity becomes a 16-bit PNG over its own range, error at most (max - min) / 131068.
    DataError when no pixel is valid, ValueError unless [H, W].
    """
    value_HW = np.asarray(value_HW, np.float64)
    if value_HW.ndim != 2:
        raise ValueError(f"needs a map [H, W], got shape {value_HW.shape}")
    if not has_values(value_HW, quantity):
        raise DataError("the map has no valid value")
    valid_HW = _valid(value_HW, quantity)
    low, high = float(value_HW[valid_HW].min()), float(value_HW[valid_HW].max())
    value_HW = np.where(valid_HW, value_HW, np.nan)
    if quantity == "disparity":
        code = AffineCode(scale=(high - low) / (_MAX_CODE - 1) or 1.0, shift=low, zero=1)
        return "depth.png", encode_png16(value_HW, code)[0], code
    if high <= HALF_PRECISION_RANGE * low:
        code = AffineCode(scale=high / _MAX_CODE)
        return "depth.png", encode_png16(value_HW, code)[0], code
    half = np.finfo(np.float16)
    out = io.BytesIO()
    fits = high <= float(half.max) and low >= float(half.smallest_normal)
    np.save(out, value_HW.astype(np.float16 if fits else np.float32))
    return "depth.npy", out.getvalue(), None


def has_values(value_HW: npt.ArrayLike, quantity: Quantity) -> bool:
    """Whether a map has any pixel that is no hole, as `encode_map` judges."""
    return bool(_valid(np.asarray(value_HW), quantity).any())


def _valid(value_HW: npt.NDArray[Any], quantity: Quantity) -> npt.NDArray[np.bool_]:
    finite_HW = np.isfinite(value_HW)
    if quantity == "disparity":
        return finite_HW
    with np.errstate(invalid="ignore"):
        return finite_HW & (value_HW > 0)


def encode_label(disparity_HW: npt.ArrayLike) -> tuple[bytes, AffineCode]:
    """Encode a disparity map over its own range; returns the PNG and the code that reads it.

    The codes of valid pixels are 16, 32 .. 65520, holes (NaN, infinities) 0. The error is at most
    (max - min) / 8188, the minimum is exact up to float32. DataError when no pixel is valid, ValueError unless
    [H, W].
    """
    step_HW, code = label_steps(disparity_HW)
    return write_dense_png16(step_HW * np.uint16(LABEL_STEP)), code


def label_steps(disparity_HW: npt.ArrayLike) -> tuple[Codes, AffineCode]:
    """A disparity map in 4095 steps of its own range: uint16 [H, W], 1 the least, 0 a hole; 16 of them are a code.

    A map whose range float32 does not tell from nothing is 1 everywhere. DataError when no pixel is finite or float32
    does not hold what the codes mean, ValueError unless [H, W].
    """
    value_HW = np.array(disparity_HW, np.float64)
    if value_HW.ndim != 2:
        raise ValueError(f"needs a map [H, W], got shape {value_HW.shape}")
    valid_HW = np.isfinite(value_HW)
    whole = bool(valid_HW.all())
    finite = value_HW if whole else value_HW[valid_HW]
    if not finite.size:
        raise DataError("the disparity map has no finite value: it cannot be a label")
    low, high = float(finite.min()) + 0.0, float(finite.max())  # of -0 and 0 the least is either, by the processor
    scale = (high - low) / LABEL_SPAN
    if not scale >= MIN_SCALE:
        scale = 1.0
    _check_float32(AffineCode(scale=scale, shift=low, zero=LABEL_ZERO))
    if not whole:
        value_HW[~valid_HW] = low
    value_HW -= low
    value_HW /= scale * LABEL_STEP
    step_HW = np.rint(value_HW, out=value_HW).astype(np.uint16)
    step_HW += 1
    if not whole:
        step_HW[~valid_HW] = 0
    return step_HW, AffineCode(scale=scale, shift=low, zero=LABEL_ZERO)


def read_png16(png: bytes) -> npt.NDArray[np.uint16]:
    """The codes of a 16-bit grey PNG, [H, W]. DataError when it is unreadable, cut or anything else."""
    try:
        with Image.open(io.BytesIO(png)) as image:
            mode = image.mode
            code_HW = np.array(image)
    except Exception as error:  # Pillow's plug-ins raise whatever they like on damaged files
        raise DataError(f"unreadable PNG ({error})") from error
    if not mode.startswith("I;16") and not (mode == "I" and code_HW.min() >= 0 and code_HW.max() <= _MAX_CODE):
        raise DataError(f"a 16-bit grey PNG is needed, this one has mode {mode}")
    return code_HW.astype(np.uint16)


def decode_png16(png: bytes, code: AffineCode) -> npt.NDArray[np.float32]:
    """The map of a 16-bit grey PNG, [H, W] in the code's unit, NaN at holes. DataError as `read_png16`."""
    code_HW = read_png16(png)
    value_HW = code.scale * (code_HW.astype(np.float64) - code.zero) + code.shift
    return np.where(code_HW > 0, value_HW, np.nan).astype(np.float32)


def decode_npy(data: bytes, quantity: Quantity) -> npt.NDArray[np.float32]:
    """The map of a `.npy` of float16 or float32, [H, W], NaN at holes; for depths so is <= 0. DataError otherwise."""
    try:
        value_HW = np.load(io.BytesIO(data), allow_pickle=False)
    except Exception as error:  # besides its own, numpy raises what zipfile, tokenize and the allocator do
        raise DataError(f"unreadable .npy ({error})") from error
    if not isinstance(value_HW, np.ndarray):
        raise DataError("a .npy of one array is needed, this is an archive (.npz)")
    if value_HW.ndim != 2 or not value_HW.size or value_HW.dtype not in (np.float16, np.float32):
        raise DataError(f"a .npy of float16 or float32 [H, W] is needed, got {value_HW.dtype} {value_HW.shape}")
    value_HW = value_HW.astype(np.float32)
    hole_HW = ~np.isfinite(value_HW) if quantity == "disparity" else ~(np.isfinite(value_HW) & (value_HW > 0))
    return np.where(hole_HW, np.float32(np.nan), value_HW)


def code_of(meta: Mapping[str, Any], default: AffineCode | None) -> AffineCode | None:
    """The code of one sample: what its `KEY.json` states (scale, shift, zero; any subset) over the dataset's own.

    DataError when a value is no finite number, scale is not above 0, shift or zero come without any scale, or float32
    does not hold what some code would mean.
    """
    found = {name: meta[name] for name in ("scale", "shift", "zero") if name in meta}
    if not found:
        return default
    for name, value in found.items():
        # compared, not converted: a JSON integer may have any number of digits; NaN compares as false
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= _MAX_FLOAT32:
            raise DataError(f"{name} is {value!r}: a number is needed")
    if default is None and "scale" not in found:
        raise DataError(f"{', '.join(found)} without scale, and the dataset states no code")
    base = default if default is not None else AffineCode(scale=1.0)
    code = AffineCode(
        scale=float(found.get("scale", base.scale)),
        shift=float(found.get("shift", base.shift)),
        zero=int(found.get("zero", base.zero)),
    )
    if not code.scale >= MIN_SCALE:
        raise DataError(f"scale is {code.scale!r}: a number above 0, at least {MIN_SCALE}, is needed")
    _check_float32(code)
    return code


def label_code(meta: Mapping[str, Any]) -> AffineCode:
    """The code of a label from its `KEY.json` {scale, shift, quality}. DataError when scale or shift is missing."""
    code = code_of(meta, None)
    if code is None or "shift" not in meta:
        raise DataError("a label's KEY.json needs scale and shift")
    return AffineCode(scale=code.scale, shift=code.shift, zero=LABEL_ZERO)


def _check_float32(code: AffineCode) -> None:
    if not code.scale * (_MAX_CODE + abs(code.zero)) + abs(code.shift) <= _MAX_FLOAT32:
        raise DataError(f"scale {code.scale!r}, shift {code.shift!r}, zero {code.zero!r}: too large for float32")
