"""MPI Sintel: frames of an animated film, with planar depth of the left camera.

Sky is geometry very far away, about 100 000 in the maps' unit. Evaluations usually leave out what lies beyond 70 m:
`max_depth_m=70`.

Shape suffixes: H W pixels.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from dataio.importers.base import BadItem, Entry, Found, Importer, Map, Options, as_key
from dataio.importers.formats import holes
from dataio.spec import DataError

_TAG = struct.pack("<f", 202021.25)  # begins every file of Sintel's, b"PIEH"


class SintelOptions(Options):
    """`render` is the pass that the pictures come from: `final` has motion blur, defocus and haze, `clean` has none.
    `max_depth_m` is the depth beyond which values are holes; none is by default.
    """

    render: Literal["final", "clean"] = "final"
    max_depth_m: float | None = Field(default=None, gt=0)


class Sintel(Importer):
    """MPI Sintel: training/final or clean with training/depth/*.dpt and camdata_left/*.cam."""

    name: ClassVar[str] = "sintel"
    definition: ClassVar[str] = "http://sintel.is.tue.mpg.de/depth"
    unverified: ClassVar[str] = (
        "that the unit is the metre, which all take it for; that sky is about 100 000, which others report. What was "
        "checked are copies of sintel_io.py in other repositories"
    )
    Options: ClassVar[type[Options]] = SintelOptions

    def entries(self) -> Iterator[Entry]:
        training = "training/" if (self.root / "training").is_dir() else ""
        render = self.options.render
        images = sorted(
            path.relative_to(self.root).as_posix() for path in self.root.glob(f"{training}{render}/*/*.png")
        )
        if not images or not (self.root / f"{training}depth").is_dir():
            raise DataError(
                f"{self.root}: needs training/{render}/SCENE/frame_NNNN.png and training/depth: unpack "
                "MPI-Sintel-complete and MPI-Sintel-depth-training into one folder, and name it"
            )
        for path in images:
            frame = path.removeprefix(f"{training}{render}/").removesuffix(".png")
            depth, camera = f"{training}depth/{frame}.dpt", f"{training}camdata_left/{frame}.cam"
            yield Entry(as_key(path), (path, depth, camera))

    def read(self, entry: Entry) -> Found:
        image, depth, camera = entry.files
        value_HW, limit = _read_dpt(self.bytes_of(depth, "missing_depth")), self.options.max_depth_m
        meta: dict[str, Any] = {}
        if (self.root / camera).exists():
            meta["focal_px"] = _focal(self.bytes_of(camera))
        return Found(
            image=self.bytes_of(image),
            extension="png",
            value_HW=holes(value_HW) if limit is None else holes(value_HW, high=limit),
            meta=meta,
        )


def _read_dpt(data: bytes) -> Map:
    """A `.dpt`: tag, int32 width, int32 height, float32 row by row from the top; all little-endian."""
    if len(data) < 12 or data[:4] != _TAG:
        raise BadItem("unreadable_depth")
    width, height = struct.unpack("<ii", data[4:12])
    if width <= 0 or height <= 0 or len(data) != 12 + 4 * width * height:
        raise BadItem("unreadable_depth")
    return np.frombuffer(data, "<f4", offset=12).reshape(height, width).astype(np.float32)


def _focal(data: bytes) -> float:
    """The horizontal focal length, pixels, of a `.cam`: tag, float64 3 x 3 of intrinsics, 3 x 4 of extrinsics."""
    if len(data) != 4 + 8 * (9 + 12) or data[:4] != _TAG:
        raise BadItem("unreadable_camera")
    (focal,) = struct.unpack_from("<d", data, 4)
    return float(focal)
