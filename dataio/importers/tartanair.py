"""TartanAir, versions 1 and 2: flights through rendered environments, with planar depth in metres.

Version 2 is defined at https://tartanair.org/modalities.html and by its toolkit, castacks/tartanairpy.

Sky is a sphere far away, 10 000 m and more in most environments; `max_depth_m=10000` makes it a hole. In `amusement`
of version 1 the sphere is near, and no limit tells it from the scene: better leave that environment out.

Shape suffixes: H W pixels, C channel.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import ClassVar, Literal

import numpy as np
from PIL import Image
from pydantic import Field

from dataio.importers.base import BadItem, Entry, Found, Importer, Map, Options, as_key
from dataio.importers.formats import holes, read_npy
from dataio.spec import DataError

_FOCAL_PX = 320.0  # of both versions: 640 px wide, 90 degrees
_LEVELS = {"easy": ("Easy", "Data_easy"), "hard": ("Hard", "Data_hard")}  # names in version 1 and version 2
_ABOVE = ("", "*/", "*/*/")  # what lies above a level: nothing, the environment, or it twice as the archives unpack


class TartanairOptions(Options):
    """`camera` is the left, the right or both; of version 2 those that look ahead. `max_depth_m` is the depth beyond
    which values are holes, in metres; none is by default.
    """

    camera: Literal["left", "right", "both"] = "left"
    difficulty: Literal["easy", "hard", "both"] = "both"
    max_depth_m: float | None = Field(default=None, gt=0)


class Tartanair(Importer):
    """TartanAir: V1 Easy/P000/image_left and .npy; V2 Data_easy/P000/image_lcam_front and packed .png."""

    name: ClassVar[str] = "tartanair"
    definition: ClassVar[str] = "https://github.com/castacks/tartanair_tools"
    Options: ClassVar[type[Options]] = TartanairOptions

    def entries(self) -> Iterator[Entry]:
        opt: TartanairOptions = self.options
        levels = [name for level, names in _LEVELS.items() if opt.difficulty in (level, "both") for name in names]
        cameras = [side for side in ("left", "right") if opt.camera in (side, "both")]
        trajectories = sorted(p for above in _ABOVE for level in levels for p in self.root.glob(f"{above}{level}/P*"))
        empty = True
        for folder in trajectories:
            inside = folder.relative_to(self.root).as_posix()
            for side in cameras:
                for camera, ending in ((side, "npy"), (f"{side[0]}cam_front", "png")):
                    for image in sorted(path.name for path in folder.glob(f"image_{camera}/*_{camera}.png")):
                        empty = False
                        path = f"{inside}/image_{camera}/{image}"
                        depth = f"{inside}/depth_{camera}/{image.removesuffix('.png')}_depth.{ending}"
                        yield Entry(as_key(path), (path, depth))
        if empty:
            raise DataError(
                f"{self.root}: no {'|'.join(levels)}/P*/image_* of the camera {opt.camera!r} in it: name the folder of "
                "TartanAir's environments, or check the options"
            )

    def read(self, entry: Entry) -> Found:
        image, depth = entry.files
        data = self.bytes_of(depth, "missing_depth")
        value_HW = read_npy(data) if depth.endswith(".npy") else _read_packed(data)
        limit = self.options.max_depth_m
        return Found(
            image=self.bytes_of(image),
            extension="png",
            value_HW=holes(value_HW) if limit is None else holes(value_HW, high=limit),
            meta={"focal_px": _FOCAL_PX},
        )


def _read_packed(data: bytes) -> Map:
    """A PNG whose channels blue, green, red, alpha are the four bytes of a little-endian float32."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            mode, rgba_HWC = image.mode, np.array(image)
    except Exception as error:  # Pillow's plug-ins raise whatever they like on damaged files
        raise BadItem("unreadable_depth") from error
    if mode != "RGBA":
        raise BadItem("unreadable_depth")
    return np.ascontiguousarray(rgba_HWC[..., [2, 1, 0, 3]]).view("<f4")[..., 0].astype(np.float32)
