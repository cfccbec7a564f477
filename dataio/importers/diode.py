"""DIODE: scans of rooms and streets; photograph, depth map and validity mask lie beside each other.

Shape suffixes: H W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

import numpy as np

from dataio.importers.base import BadItem, Entry, Found, Importer, Options, as_key
from dataio.importers.formats import holes, read_npy
from dataio.spec import DataError

# Of the virtual camera behind all crops, across the picture; down it is 927.06: the pixels are not square.
_FOCAL_PX = 886.81


class DiodeOptions(Options):
    """`domain` keeps the scenes of rooms (indoors) or of streets (outdoor) alone."""

    split: Literal["train", "val"] = "train"
    domain: Literal["all", "indoors", "outdoor"] = "all"


class Diode(Importer):
    """DIODE: 1024x768 PNG with NAME_depth.npy in metres and NAME_depth_mask.npy, indoors and outdoor.

    A pixel is measured where the mask is 1. Depth is along the optical axis already.
    """

    name: ClassVar[str] = "diode"
    definition: ClassVar[str] = "https://github.com/diode-dataset/diode-devkit"
    unverified: ClassVar[str] = (
        "that depth is along the optical axis, in metres: the devkit does not say; others found floors flat that way"
    )
    Options: ClassVar[type[Options]] = DiodeOptions

    def entries(self) -> Iterator[Entry]:
        split, domain = self.options.split, self.options.domain
        domains = ("indoors", "outdoor") if domain == "all" else (domain,)
        found = [path for name in domains for path in self.root.glob(f"{split}/{name}/scene_*/scan_*/*.png")]
        if not found:
            raise DataError(
                f"{self.root}: no {split}/{'|'.join(domains)}/scene_*/scan_*/*.png: name the folder that holds "
                "'train' and 'val', or choose another split or domain"
            )
        for path in sorted(str(path.relative_to(self.root)) for path in found):
            stem = path.removesuffix(".png")
            yield Entry(as_key(path), (path, f"{stem}_depth.npy", f"{stem}_depth_mask.npy"))

    def read(self, entry: Entry) -> Found:
        image, depth, mask = entry.files
        depth_HW = read_npy(self.bytes_of(depth, "missing_depth"))
        mask_HW = read_npy(self.bytes_of(mask, "missing_depth_mask"))
        if mask_HW.shape != depth_HW.shape:
            raise BadItem("depth_mask_size_differs")
        return Found(
            image=self.bytes_of(image),
            extension="png",
            value_HW=holes(np.where(mask_HW == 1, depth_HW, np.nan)),
            meta={"focal_px": _FOCAL_PX},
        )
