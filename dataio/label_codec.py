"""The three ways a pseudo-label may stand in its shard, and what is noted of it while it is encoded.

    KEY.disparity.png   16-bit grey, code 0 a hole, 16, 32 .. 65520 a value: disparity = scale * (code - 16) + shift
    KEY.disparity.npy   float16 in 0 .. 1, NaN a hole: disparity = scale * value + shift
    KEY.disparity.jxl   lossless JPEG XL, 12 bits, the PNG's codes divided by 16: 0 a hole, 1 .. 4095

`scale` and `shift` stand in KEY.json, with two shares (`EncodedLabel`) and, where the format has no checksum of its
own, the member's `crc32`: of 60 flipped bits a JPEG XL decoder let 6 pass for another map, and a `.npy` lets all.

The bytes are a function of the map and of the libraries' versions alone: of png and npy on any x86 processor with
SSE4.2, of jxl on those with AVX2, whether or not they have AVX-512 (docs/log.md, 2026-11-30, says what was tried, and
why JPEG XL's effort is 2 and not 1).

Shape suffixes: H W pixels.
"""

from __future__ import annotations

import hashlib
import io
import zlib
from collections.abc import Container, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from dataio.codec import LABEL_SPAN, LABEL_STEP, label_code, label_steps, read_png16
from dataio.header import MAX_PIXELS
from dataio.png16 import Codes, check_sums, decode_plain, write_dense_png16, write_png16
from dataio.spec import DataError
from dataio.types import AffineCode

LabelEncoding = Literal["png", "npy", "jxl"]

EXTENSIONS: Mapping[LabelEncoding, str] = {enc: f"disparity.{enc}" for enc in ("png", "npy", "jxl")}

_STEPS = LABEL_SPAN // LABEL_STEP + 1  # the greatest code of 12 bits
_HALF_ONE, _HALF_NAN = np.uint16(0x3C00), np.uint16(0x7E00)  # bits of float16; of many NaNs one, to be the same always
_JXL_BITS = 12
_JXL_EFFORT = 2  # effort 1 writes other bytes where there is AVX-512
_NPY_SPAN = 65534  # of the 16-bit codes that a decoder of PNGs gets in place of a float map


@dataclass(frozen=True, slots=True)
class EncodedLabel:
    """A label's member (`extension`, `data`) and what its KEY.json says of it.

    `meta` holds `scale`, `shift`, for some formats `crc32`, and two shares that tell of a map gone wrong, taken from
    the 12-bit codes whatever the format: `saturated`, of the valid pixels those with the least or the greatest code;
    `constant`, of the valid pixels that have a neighbour on the right and one below those with the code of both.
    """

    extension: str
    data: bytes
    meta: Mapping[str, float | int]


def encode(disparity_HW: npt.ArrayLike, encoding: LabelEncoding) -> EncodedLabel:
    """Encode a disparity map over its own range; NaN and infinities are holes.

    With R = max - min, the error is at most R / 8188 for png and jxl; for npy 2^-11 of the distance from the minimum
    (or R * 2^-25, whatever is more), so R / 4096 at the far end. The minimum is exact up to float32. A range
    that float32 does not tell from nothing becomes one value.

    DataError when no pixel is finite, when float32 does not hold the range, or when jxl's library is not installed;
    ValueError unless the map is [H, W].
    """
    if encoding == "jxl":
        check_available(EXTENSIONS[encoding])
    step_HW, code = label_steps(disparity_HW)
    meta: dict[str, float | int] = {"scale": code.scale, "shift": code.shift}
    if encoding == "png":
        data = write_dense_png16(step_HW * np.uint16(LABEL_STEP))
    elif encoding == "npy":
        meta["scale"] = code.scale * LABEL_SPAN
        data = _write_npy(disparity_HW, step_HW, meta)
    else:
        data = _write_jxl(step_HW)
    if encoding != "png":
        meta["crc32"] = zlib.crc32(data)
    label_code(meta)  # what no reader would take is not written
    return EncodedLabel(EXTENSIONS[encoding], data, meta | shares(step_HW))


def shares(step_HW: Codes) -> dict[str, float]:
    """`saturated` and `constant` of 12-bit codes (see `EncodedLabel`), to six digits; 0 where nothing can be counted.

    A good map has two saturated pixels, its least and its greatest.
    """
    valid = int(np.count_nonzero(step_HW))
    ends = int(np.count_nonzero(step_HW == 1)) + int(np.count_nonzero(step_HW == _STEPS))
    inner_HW = step_HW[:-1, :-1]
    same_HW = (inner_HW == step_HW[:-1, 1:]) & (inner_HW == step_HW[1:, :-1]) & (inner_HW > 0)
    inner, same = int(np.count_nonzero(inner_HW)), int(np.count_nonzero(same_HW))
    return {
        "saturated": round(ends / valid, 6) if valid else 0.0,
        "constant": round(same / inner, 6) if inner else 0.0,
    }


def decode(extension: str, data: bytes, meta: Mapping[str, Any]) -> npt.NDArray[np.float32]:
    """The disparity of a label, [H, W], NaN at holes; `meta` is its KEY.json.

    DataError when the member is damaged or of another kind, when KEY.json lacks or garbles what decodes it, or when
    jxl's library is not installed.
    """
    code = label_code(meta)
    if extension == EXTENSIONS["npy"]:
        value_HW = _read_npy(data, meta).astype(np.float64)
    else:
        code_HW = _codes(extension, data, meta)
        value_HW = code_HW.astype(np.float64)
        value_HW[code_HW == 0] = np.nan
        value_HW -= code.zero
    value_HW *= code.scale
    value_HW += code.shift
    return value_HW.astype(np.float32)


def as_png16(extension: str, data: bytes, meta: Mapping[str, Any]) -> tuple[bytes, AffineCode]:
    """A label as training's decoder takes it: a 16-bit grey PNG and its code. A PNG is handed on unread.

    A jxl keeps its codes; an npy becomes 65,535 steps of its range, an error of at most R / 131068. DataError as
    `decode`.
    """
    code = label_code(meta)
    if extension == EXTENSIONS["png"]:
        return data, code
    if extension == EXTENSIONS["npy"]:
        value_HW = _read_npy(data, meta).astype(np.float32)
        hole_HW = np.isnan(value_HW)
        value_HW *= _NPY_SPAN
        np.rint(value_HW, out=value_HW)
        value_HW += 1
        value_HW[hole_HW] = 0
        code = AffineCode(scale=code.scale / _NPY_SPAN, shift=code.shift, zero=1)
        return write_png16(value_HW.astype(np.uint16), level=0), code
    return write_png16(_codes(extension, data, meta), level=0), code


def member_of(members: Container[str]) -> str | None:
    """The extension of the label among a sample's members; None when it has none."""
    return next((extension for extension in EXTENSIONS.values() if extension in members), None)


def check_available(extension: str) -> None:
    """DataError when a package that is needed to read or write this kind of member is not installed."""
    if extension == EXTENSIONS["jxl"]:
        _jpegxl()


@cache
def fingerprint(encoding: LabelEncoding) -> str:
    """16 hexadecimal digits of how this machine encodes a fixed map.

    Where they differ, another version of a library or another processor writes other bytes for the same label.
    """
    y_HW, x_HW = np.mgrid[:97, :131]
    map_HW = (y_HW * y_HW + 3 * x_HW * y_HW + (x_HW * 7919 + y_HW * 104729) % 257).astype(np.float64)  # exact
    map_HW[40:50, 60:90] = np.nan
    map_HW[70:, 100:] = 5.0
    return hashlib.sha256(encode(map_HW, encoding).data).hexdigest()[:16]


def _codes(extension: str, data: bytes, meta: Mapping[str, Any]) -> Codes:
    """The 16-bit codes of a png or jxl."""
    if extension == EXTENSIONS["png"]:
        try:
            check_sums(data)
            code_HW = decode_plain(data)
        except Exception as error:  # besides its own, it raises what two libraries of zlib do
            raise DataError(f"unreadable PNG ({error})") from error
        return read_png16(data) if code_HW is None else code_HW
    if extension == EXTENSIONS["jxl"]:
        return _read_jxl(data, meta) * np.uint16(LABEL_STEP)
    raise DataError(f"a label is {', '.join(EXTENSIONS.values())}; found {extension}")


def _check_crc32(data: bytes, meta: Mapping[str, Any]) -> None:
    if zlib.crc32(data) != meta.get("crc32"):
        raise DataError(f"damaged: its CRC-32 is {zlib.crc32(data)}, KEY.json says {meta.get('crc32')!r}")


def _write_npy(disparity_HW: npt.ArrayLike, step_HW: Codes, meta: Mapping[str, float | int]) -> bytes:
    with np.errstate(invalid="ignore", over="ignore"):  # of holes
        value_HW = np.abs((np.asarray(disparity_HW, np.float64) - meta["shift"]) / meta["scale"])  # no -0
        half_HW = value_HW.astype("<f2", order="C")
    half_HW.view("<u2")[step_HW == 0] = _HALF_NAN
    out = io.BytesIO()
    np.lib.format.write_array(out, half_HW, version=(1, 0), allow_pickle=False)
    return out.getvalue()


def _read_npy(data: bytes, meta: Mapping[str, Any]) -> npt.NDArray[np.float16]:
    _check_crc32(data, meta)
    stream = io.BytesIO(data)
    try:
        if np.lib.format.read_magic(stream) != (1, 0):
            raise ValueError("another version than 1.0")
        shape, by_column, dtype = np.lib.format.read_array_header_1_0(stream)
    except Exception as error:  # besides ValueError, what tokenize and ast raise
        raise DataError(f"unreadable .npy ({error})") from error
    if len(shape) != 2 or by_column or dtype != np.float16 or not 0 < shape[0] * shape[1] <= MAX_PIXELS:
        raise DataError(f"a .npy of float16 [H, W] is needed, got {dtype} {shape}")
    rest = data[stream.tell() :]
    if len(rest) != 2 * shape[0] * shape[1]:  # before anything is allocated for what the header claims
        raise DataError(f"a .npy of {shape} has {2 * shape[0] * shape[1]} bytes of values, this one {len(rest)}")
    bits_HW = np.frombuffer(rest, "<u2").reshape(shape)  # numpy compares halves one by one
    if not np.all((bits_HW <= _HALF_ONE) | (bits_HW & _HALF_NAN == _HALF_NAN)):
        raise DataError("a .npy label holds 0 to 1 and NaN, this one other values")
    return bits_HW.view("<f2")


def _write_jxl(step_HW: Codes) -> bytes:
    packed = _jpegxl().jpegxl_encode(
        step_HW, level=0, effort=_JXL_EFFORT, lossless=True, bitspersample=_JXL_BITS, usecontainer=False, numthreads=1
    )
    return bytes(packed)


def _read_jxl(data: bytes, meta: Mapping[str, Any]) -> Codes:
    library = _jpegxl()
    _check_crc32(data, meta)
    height, width = _jxl_size(data)
    if not 0 < height * width <= MAX_PIXELS:
        raise DataError(f"unreadable JPEG XL ({width} x {height} pixels)")
    try:
        step_HW = np.asarray(library.jpegxl_decode(data, numthreads=1))
    except Exception as error:  # its own kinds, one per function, and RuntimeError
        raise DataError(f"unreadable JPEG XL ({error})") from error
    if step_HW.shape != (height, width) or step_HW.dtype != np.uint16 or step_HW.max() > _STEPS:
        raise DataError(f"a JPEG XL of 12-bit grey is needed, got {step_HW.dtype} {step_HW.shape}")
    return step_HW


def _jxl_size(data: bytes) -> tuple[int, int]:
    """(height, width) that a bare codestream states (ISO/IEC 18181-1, SizeHeader), before room is made for it."""
    if data[:2] != b"\xff\x0a" or len(data) < 14:
        raise DataError("unreadable JPEG XL (no codestream)")
    bits = int.from_bytes(data[2:14], "little")

    def take(count: int) -> int:
        nonlocal bits
        value, bits = bits & (1 << count) - 1, bits >> count
        return value

    small = take(1)

    def side() -> int:
        return 8 * (take(5) + 1) if small else take((9, 13, 18, 30)[take(2)]) + 1

    height, ratio = side(), take(3)
    if ratio == 0:
        return height, side()
    above, below = ((1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))[ratio - 1]
    return height, height * above // below


def _jpegxl() -> Any:
    try:
        import imagecodecs

        if imagecodecs.JPEGXL.available:
            return imagecodecs
        raise ImportError("imagecodecs was built without JPEG XL")
    except ImportError as error:
        raise DataError(
            f"JPEG XL labels need imagecodecs ({error}): pip install 'fathom-depth[labels]', or choose png or npy"
        ) from error
