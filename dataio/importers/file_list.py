"""A text file that names an image and its depth file on each line, as published training code uses them.

Such lists come with Depth-Anything-V2 (`image depth`), BTS and ZoeDepth (`image depth focal`).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from pydantic import Field

from dataio.codec import DEPTH_MM, decode_png16, encode_png16
from dataio.importers.base import BadItem, Entry, Found, Importer, Options, as_key, image_extension
from dataio.importers.formats import holes, read_exr, read_hdf5, read_npy, read_pfm
from dataio.spec import DataError
from dataio.types import AffineCode

_HDF5 = (".h5", ".hdf5")


class FileListOptions(Options):
    """`base` is the folder that relative paths start from, by default the list's own. `image_base` and `depth_base`
    are folders in it, or anywhere, for lists whose images and depth files start from different ones. `depth_scale` is
    metres per code of PNGs; other files hold metres along the optical axis. `max_depth_m` makes larger values holes.
    """

    base: str = ""
    image_base: str = ""
    depth_base: str = ""
    depth_scale: float = Field(default=DEPTH_MM.scale, gt=0, allow_inf_nan=False)
    hdf5_dataset: str = "depth"
    max_depth_m: float | None = Field(default=None, gt=0, allow_inf_nan=False)


class FileList(Importer):
    """A text file with 'image depth [focal]' on each line; depth as PNG, npy, HDF5, EXR or PFM.

    Fields are separated by tabs or commas in lines that have any (their paths may hold spaces), else by white space.
    Empty lines and lines that start with # are passed over. Depth None is a missing depth map. A path that starts with
    / and does not exist is taken as relative, as BTS does. What follows the focal length (BTS: the right camera's pair)
    is not read. Holes are 0 and below, NaN and infinity.
    """

    name: ClassVar[str] = "file-list"
    definition: ClassVar[str] = (
        "https://github.com/cleinc/bts/blob/master/pytorch/bts_dataloader.py, "
        "https://github.com/DepthAnything/Depth-Anything-V2/tree/main/metric_depth/dataset"
    )
    Options: ClassVar[type[Options]] = FileListOptions

    def __init__(self, root: str, options: Any = None) -> None:
        super().__init__(root, options)
        self.opt: FileListOptions = self.options
        self.list_path = self.root
        if not self.list_path.is_file():
            raise DataError(f"{root}: a folder: name the text file that lists 'image depth' on each line")
        self.root = Path(self.opt.base) if self.opt.base else self.list_path.parent
        for folder in (self.root, self.root / self.opt.image_base, self.root / self.opt.depth_base):
            if not folder.is_dir():
                raise DataError(f"{folder}: no such folder: check base, image_base and depth_base")
        self.code = AffineCode(scale=self.opt.depth_scale)

    def entries(self) -> Iterator[Entry]:
        rows = list(dict.fromkeys(self._rows()))
        if not rows:
            raise DataError(f"{self.list_path}: no line in it names an image and its depth file")
        found = [(image, self._at(self.opt.image_base, image), depth, focal) for image, depth, focal in rows]
        if not any((self.root / path).exists() for _, path, _, _ in found):
            raise DataError(
                f"{self.list_path}: none of its {len(found)} images is there, the first would be "
                f"{self.root / found[0][1]}: name the folder that its paths start from as base or image_base"
            )
        for image, path, depth, focal in found:
            files = (path,) if depth == "None" else (path, self._at(self.opt.depth_base, depth))
            yield Entry(as_key(image.lstrip("/")), files, focal)

    def read(self, entry: Entry) -> Found:
        path, *depth = entry.files
        image, extension = self.bytes_of(path), image_extension(path)
        meta = {"focal_px": entry.extra[0]} if entry.extra else {}
        if not depth:
            raise BadItem("missing_depth")
        if depth[0].lower().endswith(".png"):
            return Found(image=image, extension=extension, coded=(self._png(depth[0]), self.code), meta=meta)
        value_HW = holes(_plane(self._map(depth[0])), high=self.opt.max_depth_m or np.inf)
        return Found(image=image, extension=extension, value_HW=value_HW, meta=meta)

    def _png(self, path: str) -> bytes:
        """The file as it is, unless it has values beyond max_depth_m; then the same codes without those."""
        png = self.bytes_of(path, "missing_depth")
        if self.opt.max_depth_m is None:
            return png
        try:
            value_HW = decode_png16(png, self.code)
        except DataError as error:
            raise BadItem("unreadable_depth") from error
        near_HW = holes(value_HW, high=self.opt.max_depth_m)
        return png if np.array_equal(near_HW, value_HW, equal_nan=True) else encode_png16(near_HW, self.code)[0]

    def _map(self, path: str) -> npt.NDArray[Any]:
        ending = Path(path).suffix.lower()
        if ending in _HDF5:
            return read_hdf5(self.root / path, self.opt.hdf5_dataset)
        if ending == ".exr":
            return read_exr(self.root / path)
        if ending == ".npy":
            return read_npy(self.bytes_of(path, "missing_depth"))
        if ending == ".pfm":
            return read_pfm(self.bytes_of(path, "missing_depth"))
        raise BadItem("unknown_depth_format")

    def _at(self, folder: str, path: str) -> str:
        """Where a path of the list is: relative to the root where it is in it."""
        if path.startswith("/") and Path(path).exists():
            return path
        return str(Path(folder) / path.lstrip("/"))

    def _rows(self) -> Iterator[tuple[str, str, tuple[float, ...]]]:
        """(image, depth, (focal,) or ()) of each line. DataError."""
        try:
            lines = self.list_path.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise DataError(f"{self.list_path}: no text: name the list of 'image depth' lines") from error
        for number, line in enumerate(lines, 1):
            if not line.strip() or line.startswith("#"):
                continue
            separator = next((mark for mark in "\t," if mark in line), None)
            fields = [text.strip() for text in line.strip().split(separator)]
            try:
                image, depth, *focal = fields
                row = image, depth, tuple(map(float, focal[:1]))
                if not (image and depth):
                    raise ValueError("an empty field")
            except ValueError as error:
                raise DataError(
                    f"{self.list_path}: line {number} is {line!r}: 'image depth' or 'image depth focal' is needed; "
                    "where paths hold spaces, separate them by tabs or commas"
                ) from error
            if depth.endswith(".depth_meters.hdf5"):
                raise DataError(
                    f"{self.list_path}: line {number} names a map of Hypersim, whose values are distances and no "
                    "depths: import it with the layout hypersim"
                )
            yield row


def _plane(value: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The array without axes of length 1, [H, W] numbers. BadItem unreadable_depth."""
    value = np.squeeze(value)
    if value.ndim != 2 or value.dtype.kind not in "fiu":
        raise BadItem("unreadable_depth")
    return value
