"""NYU Depth V2 as folders of files, in the two ways that are used for training and evaluation.

BTS projects the raw recordings with the official toolbox and writes SCENE/rgb_00045.jpg beside
SCENE/sync_depth_00045.png; Marigold's evaluation files are SCENE/rgb_0045.png beside SCENE/depth_0045.png.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from dataio.codec import DEPTH_MM, encode_png16
from dataio.importers.base import Entry, Found, Importer, Options, as_key, image_extension
from dataio.importers.folder import walk
from dataio.importers.formats import read_codes
from dataio.importers.nyu import CAP_M, FOCAL_PX
from dataio.spec import DataError
from dataio.types import AffineCode

_IMAGE = re.compile(r"rgb_(\d+)\.(?:jpg|png)")


class NyuFoldersOptions(Options):
    """`scale` is metres per code."""

    scale: float = Field(default=DEPTH_MM.scale, gt=0, allow_inf_nan=False)


class NyuFolders(Importer):
    """NYU Depth V2 in files: rgb_N.jpg|png beside sync_depth_N.png (BTS) or depth_N.png (Marigold)."""

    name: ClassVar[str] = "nyu-folders"
    definition: ClassVar[str] = "https://github.com/cleinc/bts/blob/master/utils/sync_project_frames_multi_threads.m"
    unverified: ClassVar[str] = "that Marigold's files, made from the labelled part, mark what lies beyond 10 m by 10 m"
    Options: ClassVar[type[Options]] = NyuFoldersOptions

    def __init__(self, root: str, options: Any = None) -> None:
        super().__init__(root, options)
        self.code = AffineCode(scale=self.options.scale)

    def entries(self) -> Iterator[Entry]:
        files = walk(str(self.root))
        found = 0
        for path in sorted(files):
            folder, name = posixpath.split(path)
            match = _IMAGE.fullmatch(name)
            if match is None:
                continue
            found += 1
            depths = (posixpath.join(folder, f"{kind}_{match[1]}.png") for kind in ("sync_depth", "depth"))
            yield Entry(as_key(path), (path, *[depth for depth in depths if depth in files][:1]))
        if not found:
            raise DataError(
                f"{self.root}: no rgb_*.jpg or rgb_*.png in it or below: name a scene with sync_depth_*.png or "
                "depth_*.png beside them, or the folder of the scenes"
            )

    def read(self, entry: Entry) -> Found:
        path, *depth = entry.files
        coded = None
        if depth:
            png = self.bytes_of(depth[0], "missing_depth")
            code_HW = read_codes(png)
            beyond_HW = code_HW * self.code.scale > CAP_M - self.code.scale / 2
            if beyond_HW.any():  # it was set to 10 m: the file is written again with holes there, codes unchanged
                png, _ = encode_png16(np.where(beyond_HW, 0, code_HW) * self.code.scale, self.code)
            coded = png, self.code
        return Found(
            image=self.bytes_of(path),
            extension=image_extension(path),
            coded=coded,
            meta={"focal_px": FOCAL_PX},
        )
