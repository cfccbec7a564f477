"""16-bit grey PNGs: what this program writes, and the fast way to read it.

Rows are stored as they are or as differences from the row above, which numpy undoes by rows. Pillow's own are nearly
all of filter 4 (Paeth), which decoders undo byte by byte: longer than inflating takes. Anything that is not written
here is read by Pillow. Shape suffixes: H W pixels, N bytes of a row.
"""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import numpy.typing as npt
from isal import isal_zlib
from PIL import Image

from dataio.header import MAX_PIXELS

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_HEADER_END = 33  # signature, then IHDR with its length, name and checksum
_GREY_16 = bytes((16, 0, 0, 0, 0))  # depth, colour, compression, filter, interlace: the last five bytes of IHDR
_NONE, _UP = 0, 2  # row filters (ISO/IEC 15948, section 9)
# ISA-L's. Up to 2 it writes the same bytes on every x86 processor that has SSE4.2, which numpy needs by now; level 3
# has other bytes with AVX2 and others again with AVX-512 (docs/log.md, 2026-11-30).
_ISAL_LEVEL = 2

Codes = npt.NDArray[np.uint16]


def write_png16(code_HW: Codes, level: int = 1) -> bytes:
    """A 16-bit grey PNG, packed by zlib at `level`; 0 stores, for what is decoded at once.

    Each row is stored as it is or as the difference from the row above, by the smaller sum of absolute values, as
    libpng would choose: maps with many holes do better as they are.
    """
    plain_HN = code_HW.astype(">u2", order="C").view(np.uint8)
    if not level:
        return _png(code_HW.shape, zlib.compress(_rows(plain_HN, _NONE), 0))
    up_HN = plain_HN.copy()
    up_HN[1:] -= plain_HN[:-1]  # modulo 256, as PNG has it
    cost_2H = [np.abs(rows_HN.view(np.int8), dtype=np.int16).sum(1) for rows_HN in (plain_HN, up_HN)]
    is_up_H = cost_2H[1] < cost_2H[0]
    rows = _rows(np.where(is_up_H[:, None], up_HN, plain_HN), np.where(is_up_H, _UP, _NONE))
    return _png(code_HW.shape, zlib.compress(rows, level))


def write_dense_png16(code_HW: Codes) -> bytes:
    """A 16-bit grey PNG of a map that is smooth and has few holes, in a fifth of the time and a tenth smaller.

    All rows are differences: one that is not, though shorter by itself, repeats nothing of its neighbours.
    """
    up_HN = code_HW.astype(">u2", order="C").view(np.uint8)
    up_HN[1:] -= up_HN[:-1].copy()
    return _png(code_HW.shape, isal_zlib.compress(_rows(up_HN, _UP), _ISAL_LEVEL))


def decode_codes(png: bytes) -> Codes:
    """uint16 [H, W] of a 16-bit grey PNG. Raises what the decoders raise where it is damaged."""
    codes = decode_plain(png)
    if codes is None:
        with Image.open(io.BytesIO(png), formats=("PNG",)) as image:
            codes = np.asarray(image).astype(np.uint16)
    return codes


def decode_plain(png: bytes) -> Codes | None:
    """None unless every row is stored as it is or as the difference from the row above. ValueError when cut short."""
    if png[:8] != SIGNATURE or png[24:29] != _GREY_16:
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


def check_sums(png: bytes) -> None:
    """ValueError unless every chunk up to the end has the checksum that it states."""
    place, name = len(SIGNATURE), b""
    while name != b"IEND":
        if place + 12 > len(png):
            raise ValueError("it is cut short")
        (length,) = struct.unpack(">I", png[place : place + 4])
        name, end = png[place + 4 : place + 8], place + 8 + length
        if png[end : end + 4] != struct.pack(">I", zlib.crc32(png[place + 4 : end])):
            raise ValueError(f"its chunk {name!r} does not fit its checksum")
        place = end + 4


def _rows(data_HN: npt.NDArray[np.uint8], kind_H: npt.ArrayLike) -> bytes:
    """The rows, each behind its filter's number."""
    height, width = data_HN.shape
    rows_HN = np.empty((height, 1 + width), np.uint8)
    rows_HN[:, 0] = kind_H
    rows_HN[:, 1:] = data_HN
    return rows_HN.tobytes()


def _png(shape_HW: tuple[int, ...], packed: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", shape_HW[1], shape_HW[0], 16, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", packed), (b"IEND", b""))
    return SIGNATURE + b"".join(_chunk(name, content) for name, content in chunks)


def _chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(content, zlib.crc32(name)))


def _image_data(png: bytes) -> list[bytes]:
    """The contents of the IDAT chunks; their checksums are left to the stream's own."""
    found, place = [], _HEADER_END
    while png[place + 4 : place + 8] != b"IEND":
        (length,) = struct.unpack(">I", png[place : place + 4])
        if png[place + 4 : place + 8] == b"IDAT":
            found.append(png[place + 8 : place + 8 + length])
        place += 12 + length
    return found
