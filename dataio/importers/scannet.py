"""ScanNet: the official .sens streams, or the frames that the official Python reader exports from them.

Shape suffixes: H W pixels.
"""

from __future__ import annotations

import math
import posixpath
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import Field

from dataio.codec import DEPTH_MM, encode_png16
from dataio.importers.base import BadItem, Entry, Found, Importer, Options, as_key, image_extension, look
from dataio.importers.folder import walk
from dataio.importers.formats import read_codes, resize_nearest
from dataio.spec import DataError
from dataio.types import AffineCode

_JPEG, _ZLIB_USHORT = 2, 1
_FRAME = struct.Struct("<64x16xQQ")  # pose, two timestamps; bytes of the photograph and of the depth map
# of a scene, exported by the reader or as in the download scannet_frames_25k
_INTRINSICS = ("intrinsic/intrinsic_color.txt", "intrinsics_color.txt")


class ScannetOptions(Options):
    """`every` takes each N-th frame of a scene, from the first one on."""

    every: int = Field(default=1, ge=1)


class Scannet(Importer):
    """ScanNet: SCENE/SCENE.sens streams, or exported SCENE/color/N.jpg with SCENE/depth/N.png."""

    name: ClassVar[str] = "scannet"
    definition: ClassVar[str] = "https://github.com/ScanNet/ScanNet/tree/master/SensReader"
    unverified: ClassVar[str] = "not tried on the data itself; that photograph and depth map differ in size alone"
    Options: ClassVar[type[Options]] = ScannetOptions

    def entries(self) -> Iterator[Entry]:
        files = walk(str(self.root))
        scenes: dict[str, list[str]] = {}
        for path in files:
            folder, name = posixpath.split(path)
            stem, extension = posixpath.splitext(name)
            if posixpath.basename(folder) == "color" and stem.isdecimal() and extension in (".jpg", ".png"):
                scenes.setdefault(posixpath.dirname(folder), []).append(path)
        # a scene that was exported is not read twice
        streams = {path for path in files if path.endswith(".sens") and posixpath.dirname(path) not in scenes}
        if not scenes and not streams:
            raise DataError(f"{self.root}: no .sens and no color/N.jpg below: name a scene of ScanNet, or their folder")
        for place in sorted([*scenes, *streams]):
            yield from self._stream(place) if place in streams else self._exported(place, scenes[place])

    def read(self, entry: Entry) -> Found:
        return self._read_stream(entry) if entry.files[0].endswith(".sens") else self._read_exported(entry)

    def _exported(self, scene: str, images: list[str]) -> Iterator[Entry]:
        images.sort(key=lambda path: int(posixpath.splitext(posixpath.basename(path))[0]))
        for path in images[:: self.options.every]:
            depth = posixpath.join(scene, "depth", posixpath.splitext(posixpath.basename(path))[0] + ".png")
            yield Entry(as_key(path), (path, depth))

    def _read_exported(self, entry: Entry) -> Found:
        path, depth = entry.files
        image, png = self.bytes_of(path), self.bytes_of(depth, "missing_depth")
        code_HW = read_codes(png)
        fitted_HW = _fit(code_HW, image)
        if fitted_HW is not code_HW:
            png, _ = encode_png16(fitted_HW * DEPTH_MM.scale, DEPTH_MM)
        focal = self._focal(posixpath.dirname(posixpath.dirname(path)))
        meta = {} if focal is None else {"focal_px": focal}
        return Found(image=image, extension=image_extension(path), coded=(png, DEPTH_MM), meta=meta)

    def _focal(self, scene: str) -> float | None:
        """From the photographs' matrix [4, 4], where there is one."""
        for name in _INTRINSICS:
            try:
                return _positive(float((self.root / scene / name).read_text().split()[0]))
            except (OSError, ValueError, IndexError):
                continue
        return None

    def _stream(self, path: str) -> Iterator[Entry]:
        """The frames of a stream; what comes after the place where it breaks is one entry, which cannot be read."""
        try:
            for number, at in enumerate(_scan(self.root / path)):
                if number % self.options.every == 0:
                    yield Entry(f"{as_key(path)}/{number:06d}", (path,), at)
        except BadItem:
            yield Entry(f"{as_key(path)}/rest", (path,))

    def _read_stream(self, entry: Entry) -> Found:
        if not entry.extra:
            raise BadItem("unreadable_stream")
        offset, image_bytes, depth_bytes = entry.extra
        with (self.root / entry.files[0]).open("rb") as file:
            header = _read_header(file)
            file.seek(offset)
            image, packed = file.read(image_bytes), file.read(depth_bytes)
        if header.image_code != _JPEG or header.depth_code != _ZLIB_USHORT:
            raise BadItem("unknown_compression")
        width, height = header.depth_wh
        try:
            code_HW = np.frombuffer(zlib.decompress(packed), "<u2").reshape(height, width)
        except (zlib.error, ValueError) as error:
            raise BadItem("unreadable_depth") from error
        code = AffineCode(scale=1 / header.depth_shift)
        png, _ = encode_png16(_fit(code_HW, image) * code.scale, code)
        meta = {} if header.focal is None else {"focal_px": header.focal}
        return Found(image=image, extension="jpg", coded=(png, code), meta=meta)


class _Header(NamedTuple):
    """What is needed of a stream's start; `frames_at` is where it ends."""

    focal: float | None
    image_code: int
    depth_code: int
    depth_wh: tuple[int, int]
    depth_shift: float
    frames: int
    frames_at: int


def _read_header(file: BinaryIO) -> _Header:
    """BadItem unreadable_stream unless it is a stream of version 4."""
    try:
        version, name_bytes = struct.unpack("<IQ", file.read(12))
        if version != 4:
            raise BadItem("unreadable_stream")
        file.seek(name_bytes, 1)
        # intrinsics and extrinsics of the photographs, then of the depth maps: four matrices [4, 4], row by row
        matrices = struct.unpack("<64f", file.read(256))
        image_code, depth_code, _, _, width, height, shift, frames = struct.unpack("<ii4IfQ", file.read(36))
    except (struct.error, OSError, OverflowError) as error:
        raise BadItem("unreadable_stream") from error
    if not (math.isfinite(shift) and shift > 0):
        raise BadItem("unreadable_stream")
    return _Header(_positive(matrices[0]), image_code, depth_code, (width, height), shift, frames, file.tell())


def _scan(path: Path) -> Iterator[tuple[int, int, int]]:
    """(where the photograph starts, its bytes, the depth map's bytes right after it) of each frame.

    BadItem unreadable_stream where the file breaks.
    """
    size = path.stat().st_size
    with path.open("rb", buffering=0) as file:  # a frame's head is 96 bytes, frames lie 100 kB apart
        header = _read_header(file)
        at = header.frames_at
        for _ in range(header.frames):
            file.seek(at)
            try:
                image_bytes, depth_bytes = _FRAME.unpack(file.read(_FRAME.size))
            except struct.error as error:
                raise BadItem("unreadable_stream") from error
            at += _FRAME.size
            if at + image_bytes + depth_bytes > size:
                raise BadItem("unreadable_stream")
            yield at, image_bytes, depth_bytes
            at += image_bytes + depth_bytes


def _fit(code_HW: npt.NDArray[np.uint16], image: bytes) -> npt.NDArray[np.uint16]:
    """At the photograph's size: 1296x968 against 640x480. Unchanged where the shapes have nothing in common."""
    size, _ = look(image)
    if size is None or size == code_HW.shape[::-1]:
        return code_HW
    stretch = size[0] * code_HW.shape[0] / (size[1] * code_HW.shape[1])
    return resize_nearest(code_HW, size) if abs(stretch - 1) < 0.02 else code_HW


def _positive(focal: float) -> float | None:
    return focal if math.isfinite(focal) and focal > 0 else None
