"""SUN RGB-D: one folder per frame, of four kinds of sensors.

Shape suffixes: H W pixels.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import numpy as np

from dataio.codec import DEPTH_MM, encode_png16
from dataio.importers.base import BadItem, Entry, Found, Importer, Options, as_key, image_extension
from dataio.importers.folder import walk
from dataio.importers.formats import read_codes
from dataio.spec import DataError

_CAP_MM = 8000  # the toolbox's read3dPoints.m trusts nothing beyond 8 m: it sets it to 8 m


class SunRgbdOptions(Options):
    """`depth`: the maps whose holes the authors filled from neighbouring frames (depth_bfx/), or the raw ones."""

    depth: Literal["bfx", "raw"] = "bfx"


class SunRgbd(Importer):
    """SUN RGB-D: SUNRGBD/ or any part of it; depth beyond 8 m becomes holes."""

    name: ClassVar[str] = "sunrgbd"
    definition: ClassVar[str] = "https://rgbd.cs.princeton.edu/"
    unverified: ClassVar[str] = (
        "checked against copies of the toolbox (SUNRGBDtoolbox) and its README, not the data itself; that holes are 0"
    )
    Options: ClassVar[type[Options]] = SunRgbdOptions

    def entries(self) -> Iterator[Entry]:
        depth = {"bfx": "depth_bfx", "raw": "depth"}[self.options.depth]
        images: dict[str, str] = {}
        depths: dict[str, str] = {}
        for path in sorted(walk(str(self.root))):
            folder, kind = posixpath.split(posixpath.dirname(path))
            # names differ between the two, and the toolbox too takes the first file of each folder
            if kind == "image" and path.endswith(".jpg"):
                images.setdefault(folder, path)
            elif kind == depth and path.endswith(".png"):
                depths.setdefault(folder, path)
        if not images or not depths:
            raise DataError(f"{self.root}: no image/*.jpg with {depth}/*.png below: name SUNRGBD or a part of it")
        for folder, path in images.items():
            yield Entry(as_key(path), (path, depths[folder]) if folder in depths else (path,))

    def read(self, entry: Entry) -> Found:
        path, *depth = entry.files
        image = self.bytes_of(path)
        if not depth:
            raise BadItem("missing_depth")
        rotated_HW = read_codes(self.bytes_of(depth[0], "missing_depth"))
        code_HW = (rotated_HW >> 3) | (rotated_HW << 13)  # in 16 bits: what is shifted out is gone
        png, _ = encode_png16(np.where(code_HW > _CAP_MM, 0, code_HW) * DEPTH_MM.scale, DEPTH_MM)
        meta = self._meta(posixpath.dirname(posixpath.dirname(path)))
        return Found(image=image, extension=image_extension(path), coded=(png, DEPTH_MM), meta=meta)

    def _meta(self, folder: str) -> dict[str, Any]:
        """The focal length, where the frame's matrix [3, 3] can be read."""
        try:
            numbers = [float(word) for word in (self.root / folder / "intrinsics.txt").read_text().split()]
        except (OSError, ValueError):
            return {}
        return {"focal_px": numbers[0]} if len(numbers) == 9 and numbers[0] > 0 else {}
