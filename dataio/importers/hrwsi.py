"""HR-WSI (Xian et al., CVPR 2020): web stereo photographs with disparity from optical flow.

Shape suffixes: H W pixels.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from dataio.importers.base import BadItem, Entry, Found, Importer, Options, as_key
from dataio.spec import DataError
from dataio.types import Quantity

_GREY = ("1", "L", "I;16", "I")  # Pillow's names of grey of 1, 8 and, by its version, 16 bits


class HrWsiOptions(Options):
    """`split` is the folder to read."""

    split: Literal["train", "val"] = "train"


class HrWsi(Importer):
    """HR-WSI: SPLIT/imgs/*.jpg with disparity in gts/*.png and the pixels to use in valid_masks/*.png.

    Disparity is known up to scale and shift, larger is nearer; its numbers are kept as they stand. A pixel is a hole
    where the mask is 0; 0 in gts is a value. There are no masks of the sky: the authors corrected it with a
    segmentation that they did not release. The instance_masks are not read.
    """

    name: ClassVar[str] = "hrwsi"
    quantity: Quantity = "disparity"
    definition: ClassVar[str] = "https://github.com/KexianHust/Structure-Guided-Ranking-Loss"
    unverified: ClassVar[str] = (
        "the archive could not be opened: folders, names and mask > 0 are as in three public loaders, gts of 8 and of "
        "16 bits are both taken; which disparity the sky has, and whether the masks keep it"
    )
    Options: ClassVar[type[Options]] = HrWsiOptions

    def entries(self) -> Iterator[Entry]:
        folder = self.root / self.options.split
        names = sorted(path.name for path in folder.glob("imgs/*.jpg"))
        if not names:
            raise DataError(
                f"{folder}: no imgs/*.jpg in it: name the folder HR-WSI, which holds 'train' and 'val', or choose the "
                "other split"
            )
        for name in names:
            image, label = f"{self.options.split}/imgs/{name}", f"{Path(name).stem}.png"
            beside = (f"{self.options.split}/{kind}/{label}" for kind in ("gts", "valid_masks"))
            yield Entry(as_key(image), (image, *beside))

    def read(self, entry: Entry) -> Found:
        image, disparity, mask = entry.files
        disparity_HW = _grey(self.bytes_of(disparity, "missing_depth"))
        mask_HW = _grey(self.bytes_of(mask, "missing_valid_mask"))
        if mask_HW.shape != disparity_HW.shape:
            raise BadItem("valid_mask_size_differs")
        return Found(
            image=self.bytes_of(image),
            extension="jpg",
            value_HW=np.where(mask_HW > 0, disparity_HW.astype(np.float32), np.float32(np.nan)),
        )


def _grey(png: bytes) -> npt.NDArray[Any]:
    """The values of a grey PNG, [H, W]. BadItem unreadable_depth."""
    try:
        with Image.open(io.BytesIO(png)) as picture:
            mode, value = picture.mode, np.array(picture)
    except Exception as error:  # Pillow's plug-ins raise whatever they like on damaged files
        raise BadItem("unreadable_depth") from error
    if mode not in _GREY:
        raise BadItem("unreadable_depth")
    return value
