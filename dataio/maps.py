"""Targets and sky masks of a batch: PNG -> the window's pixels, nearest, flipped; by threads, in main memory.

DALI decodes 16-bit PNGs on the CPU in either placement, in more than twice the time (docs/log.md). What this program
writes (`dataio.codec`) is undone here, by rows; anything else by Pillow. Shape suffixes: B batch, H W pixels.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from isal import isal_zlib
from PIL import Image

from dataio.draws import Geometry
from dataio.header import MAX_PIXELS

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_HEADER_END = 33  # signature, then IHDR with its length, name and checksum
_GREY_16 = bytes((16, 0, 0, 0, 0))  # depth, colour, compression, filter, interlace: the last five bytes of IHDR
_NONE, _UP = 0, 2  # row filters

Codes = npt.NDArray[np.uint16]


@dataclass(frozen=True, kw_only=True, slots=True)
class Maps:
    """One sample's encoded maps, and the window of its image."""

    target: bytes | None  # 16-bit grey PNG
    sky: bytes | None  # 8-bit grey PNG
    geometry: Geometry


@dataclass(frozen=True, slots=True)
class Started:
    """A batch that threads work on."""

    _code_BHW: torch.Tensor
    _sky_BHW: torch.Tensor | None
    _rows: Sequence[Future[None] | None]

    def result(self) -> tuple[torch.Tensor, torch.Tensor | None, list[int]]:
        """uint16 codes and uint8 sky masks [B, H, W], 0 where a row has none; and the rows that did not decode.

        Raises MemoryError, which no row is to blame for.
        """
        bad = []
        for i, row in enumerate(self._rows):
            error = None if row is None else row.exception()
            if error is not None:
                if isinstance(error, MemoryError):
                    raise error
                bad.append(i)
                self._code_BHW[i].zero_()
                if self._sky_BHW is not None:
                    self._sky_BHW[i].zero_()
        return self._code_BHW, self._sky_BHW, bad


class MapDecoder:
    """Decodes `size` x `size` windows on `threads` threads; `pinned` memory is what a GPU copies without waiting."""

    def __init__(self, size: int, threads: int, *, pinned: bool) -> None:
        self._size, self._pinned = size, pinned
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="fathom-maps")

    def start(self, rows: Sequence[Maps | None]) -> Started:
        """Begin to decode; sky masks only where a row has one."""
        shape = (len(rows), self._size, self._size)
        code_BHW = torch.zeros(shape, dtype=torch.uint16, pin_memory=self._pinned)
        sky_BHW = None
        if any(row is not None and row.sky is not None for row in rows):
            sky_BHW = torch.zeros(shape, dtype=torch.uint8, pin_memory=self._pinned)
        work: list[Future[None] | None] = [
            None if row is None else self._pool.submit(self._decode, i, row, code_BHW, sky_BHW)
            for i, row in enumerate(rows)
        ]
        return Started(code_BHW, sky_BHW, work)

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(cancel_futures=True)

    def _decode(self, i: int, row: Maps, code_BHW: torch.Tensor, sky_BHW: torch.Tensor | None) -> None:
        if row.target is not None:
            cut(decode_codes(row.target), row.geometry, code_BHW[i].numpy())
        if row.sky is not None and sky_BHW is not None:
            with Image.open(io.BytesIO(row.sky), formats=("PNG",)) as image:
                cut(np.asarray(image), row.geometry, sky_BHW[i].numpy())


def cut(map_HW: npt.NDArray[np.generic], window: Geometry, out_HW: npt.NDArray[np.generic]) -> None:
    """The window's pixels: of output pixel i, the one that holds its centre. In whole numbers, so exact."""
    size = len(out_HW)
    rows, columns = (
        (2 * (start + np.arange(size)) + 1) * side // (2 * resized)
        for start, side, resized in (
            (window.top, map_HW.shape[0], window.height),
            (window.left, map_HW.shape[1], window.width),
        )
    )
    out_HW[...] = map_HW[rows][:, columns[::-1] if window.flip else columns]


def decode_codes(png: bytes) -> Codes:
    """uint16 [H, W] of a 16-bit grey PNG. Raises what the decoders raise where it is damaged."""
    codes = _decode_plain(png)
    if codes is None:
        with Image.open(io.BytesIO(png), formats=("PNG",)) as image:
            codes = np.asarray(image).astype(np.uint16)
    return codes


def _decode_plain(png: bytes) -> Codes | None:
    """None unless every row is stored as it is or as the difference from the row above. ValueError when cut short."""
    if png[:8] != _SIGNATURE or png[24:29] != _GREY_16:
        return None
    width, height = struct.unpack(">II", png[16:24])
    if width * height > MAX_PIXELS:  # the header that Pillow read before may have been another
        raise ValueError(f"{width} x {height} pixels")
    expected = height * (1 + 2 * width)
    inflate = isal_zlib.decompressobj()
    data = inflate.decompress(b"".join(_image_data(png)), expected + 1)
    if len(data) != expected or not inflate.eof:
        raise ValueError(f"{len(data)} bytes of pixels, not {expected}")
    rows_HN = np.frombuffer(data, np.uint8).reshape(height, 1 + 2 * width)
    is_up_H = rows_HN[:, 0] == _UP
    if not np.all(is_up_H | (rows_HN[:, 0] == _NONE)):
        return None
    plain_HN = rows_HN[:, 1:].copy()
    for i in np.flatnonzero(is_up_H[1:]).tolist():  # above the first row lie zeros
        plain_HN[i + 1] += plain_HN[i]  # modulo 256, as PNG has it
    return plain_HN.view(">u2").astype(np.uint16)


def _image_data(png: bytes) -> list[bytes]:
    """The contents of the IDAT chunks; their checksums are left to the stream's own."""
    found, place = [], _HEADER_END
    while png[place + 4 : place + 8] != b"IEND":
        (length,) = struct.unpack(">I", png[place : place + 4])
        if png[place + 4 : place + 8] == b"IDAT":
            found.append(png[place + 8 : place + 8 + length])
        place += 12 + length
    return found
