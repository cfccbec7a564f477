"""Targets and sky masks of a batch: PNG -> the window's pixels, nearest, flipped; by threads, in main memory.

DALI decodes 16-bit PNGs on the CPU in either placement, in more than twice the time that `dataio.png16` takes
(docs/log.md). Shape suffixes: B batch, H W pixels.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from dataio.draws import Geometry
from dataio.png16 import decode_codes


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
