"""Virtual KITTI 2: rendered drives in several weathers and turns of the camera, with sky.

Shape suffixes: H W pixels.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from dataio.codec import encode_png16
from dataio.importers.base import BadItem, Entry, Found, Importer, Options, as_key, image_extension
from dataio.importers.formats import holes, read_codes
from dataio.spec import DataError
from dataio.types import AffineCode

_SKY = 65535  # the far plane, 655.35 m
_IMAGE = re.compile(r"rgb_(\d+)\.(jpg|png)")


class Vkitti2Options(Options):
    """`variants` are the ones to take, separated by commas ("clone,fog"), by default all. `max_depth_m` makes larger
    values holes; the sky stays sky.
    """

    camera: Literal["0", "1", "both"] = "both"
    variants: str = ""
    max_depth_m: float | None = Field(default=None, gt=0, allow_inf_nan=False)


class Vkitti2(Importer):
    """Virtual KITTI 2: rgb and depth downloads in one folder or side by side; sky from the depth maps.

    Depth is a 16-bit PNG of centimetres along the optical axis. Maps without sky are copied as they are.
    """

    name: ClassVar[str] = "vkitti2"
    definition: ClassVar[str] = "https://europe.naverlabs.com/research/computer-vision/proxy-virtual-worlds-vkitti-2/"
    unverified: ClassVar[str] = (
        "that the far plane holds nothing but sky: stated for Virtual KITTI 1.3.1, and by version 2 only in that "
        "clipping is said not to matter"
    )
    Options: ClassVar[type[Options]] = Vkitti2Options
    code = AffineCode(scale=0.01)

    def entries(self) -> Iterator[Entry]:
        tops = [self.root, *sorted(self.root.glob("*/"))]
        images = _cameras(tops, "rgb")
        depths = _cameras(tops, "depth")
        for what, folders in (("rgb", images), ("depth", depths)):
            if not folders:
                raise DataError(
                    f"{self.root}: no Scene01/clone/frames/{what}/Camera_0 in it or one folder below: "
                    f"name the folder in which vkitti_2.0.3_{what} is unpacked"
                )
        wanted = self._variants(images)
        for (scene, variant, camera), folder in images.items():
            if self.options.camera not in ("both", camera) or variant not in wanted:
                continue
            focals = _focals(tops, scene, variant)
            depth = depths.get((scene, variant, camera))
            for match in filter(None, map(_IMAGE.fullmatch, sorted(os.listdir(folder)))):
                files = [folder / match[0]]
                if depth:
                    files.append(depth / f"depth_{match[1]}.png")
                yield Entry(
                    as_key(f"{scene}/{variant}/Camera_{camera}/{match[0]}"),
                    tuple(file.relative_to(self.root).as_posix() for file in files),
                    focals.get((int(match[1]), camera), ()),
                )

    def read(self, entry: Entry) -> Found:
        path, *depth = entry.files
        image, extension = self.bytes_of(path), image_extension(path)
        if not depth:
            raise BadItem("missing_depth")
        png = self.bytes_of(depth[0], "missing_depth")
        code_HW = read_codes(png)
        sky_HW = code_HW == _SKY
        value_HW = holes(np.where(sky_HW, 0, code_HW * self.code.scale), high=self.options.max_depth_m or np.inf)
        if not np.array_equal(np.isfinite(value_HW), code_HW > 0):
            png, _ = encode_png16(value_HW, self.code)
        meta = {"focal_px": entry.extra[0]} if entry.extra else {}
        return Found(image=image, extension=extension, coded=(png, self.code), sky=sky_HW, meta=meta)

    def _variants(self, images: dict[tuple[str, str, str], Path]) -> set[str]:
        """Those to take. DataError for one that is not there."""
        there = {variant for _, variant, _ in images}
        wanted = {name.strip() for name in self.options.variants.split(",") if name.strip()} or there
        if missing := sorted(wanted - there):
            raise DataError(f"variants: {missing[0]!r} is not there, there are {', '.join(sorted(there))}")
        return wanted


def _cameras(tops: list[Path], what: str) -> dict[tuple[str, str, str], Path]:
    """Folders of images by (scene, variant, camera), sorted."""
    found: dict[tuple[str, str, str], Path] = {}
    for top in tops:
        for path in sorted(top.glob(f"Scene*/*/frames/{what}/Camera_[01]")):
            scene, variant = path.relative_to(top).parts[:2]
            found.setdefault((scene, variant, path.name[-1]), path)
    return dict(sorted(found.items()))


def _focals(tops: list[Path], scene: str, variant: str) -> dict[tuple[int, str], tuple[float]]:
    """(focal length in pixels,) by (frame, camera), from lines 'frame camera fx fy cx cy' of intrinsic.txt."""
    for top in tops:
        path = top / scene / variant / "intrinsic.txt"
        if path.is_file():
            rows = re.findall(r"^(\d+) ([01]) (\d+\.?\d*) ", path.read_text(errors="replace"), re.MULTILINE)
            return {(int(frame), camera): (float(focal),) for frame, camera, focal in rows}
    return {}
