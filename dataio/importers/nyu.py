"""The labelled part of NYU Depth V2: one MATLAB file (v7.3, which is HDF5) with 1449 pairs.

Shape suffixes: N samples, H W pixels, C channel; the file holds MATLAB's axes in reverse.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from dataio.importers.base import BadItem, Entry, Found, Importer, Options, png_of
from dataio.importers.formats import holes, module, read_hdf5
from dataio.spec import DataError

FOCAL_PX = 518.8579  # fx_rgb of the toolbox's camera_params.m, rounded
CAP_M = 10.0  # maxDepth there: what lies beyond was set to it, and the toolbox counts it as noise

_BELOW_CAP = float(np.nextafter(np.float32(CAP_M), np.float32(0)))
_FILE = "nyu_depth_v2_labeled.mat"
_SPLITS = "splits.mat"


class NyuOptions(Options):
    """`depth`: the maps whose holes the authors filled, or what the Kinect measured. `split` other than all needs
    splits.mat, a download of its own, beside the file.
    """

    depth: Literal["filled", "raw"] = "filled"
    split: Literal["all", "train", "test"] = "all"


class Nyu(Importer):
    """NYU Depth V2, labelled: nyu_depth_v2_labeled.mat, or the folder that holds it."""

    name: ClassVar[str] = "nyu"
    definition: ClassVar[str] = "https://cs.nyu.edu/~silberman/datasets/nyu_depth_v2.html"
    unverified: ClassVar[str] = (
        "checked against copies of the page's text and of its toolbox, and against public readers, not the data itself"
    )
    Options: ClassVar[type[Options]] = NyuOptions

    def __init__(self, root: str, options: Any = None) -> None:
        """`root` is the file or its folder."""
        super().__init__(root, options)
        self._file = _FILE
        if self.root.is_file():
            self.root, self._file = self.root.parent, self.root.name

    def entries(self) -> Iterator[Entry]:
        count = _count(self.root / self._file)
        numbers = range(1, count + 1) if self.options.split == "all" else self._split(count)
        for number in numbers:
            yield Entry(f"{number:04d}", (self._file,), (number - 1,))

    def read(self, entry: Entry) -> Found:
        # the file is opened for each sample: a millisecond, and nothing that could not be sent to another process
        path, (index,) = self.root / self._file, entry.extra
        try:
            image_CWH = read_hdf5(path, "images", index)
        except BadItem as bad:
            raise BadItem("unreadable_image") from bad
        depth_WH = read_hdf5(path, "depths" if self.options.depth == "filled" else "rawDepths", index)
        return Found(
            image=png_of(np.ascontiguousarray(image_CWH.transpose(2, 1, 0))),
            extension="png",
            value_HW=holes(depth_WH.T, high=_BELOW_CAP),
            meta={"focal_px": FOCAL_PX},
        )

    def _split(self, count: int) -> list[int]:
        """The numbers of the split's samples, from 1."""
        path, name = self.root / _SPLITS, {"train": "trainNdxs", "test": "testNdxs"}[self.options.split]
        if not path.exists():
            raise DataError(
                f"{path}: missing: the split {self.options.split!r} is in it; get it from the dataset's page"
            )
        loadmat = module("scipy.io").loadmat
        try:
            numbers = sorted(int(number) for number in np.ravel(loadmat(path)[name]))
        except Exception as error:  # scipy raises whatever it likes on damaged files
            raise DataError(f"{path}: no {name} can be read from it: get it again from the dataset's page") from error
        if not numbers or numbers[0] < 1 or numbers[-1] > count:
            raise DataError(f"{path}: {name} does not fit {self._file}, which has {count} samples")
        return numbers


def _count(path: Path) -> int:
    """The number of samples. DataError unless the file has the arrays in their shapes."""
    if not path.exists():
        raise DataError(f"{path}: missing: name {_FILE} or the folder that holds it")
    h5py = module("h5py")
    try:
        with h5py.File(path, "r") as file:
            images, *depths = (file[name].shape for name in ("images", "depths", "rawDepths"))
    except (OSError, KeyError, AttributeError) as error:
        raise DataError(f"{path}: not the labelled file of NYU Depth V2 ({error}): download {_FILE} again") from error
    if len(images) != 4 or images[1] != 3 or any(shape != (images[0], *images[2:]) for shape in depths):
        raise DataError(
            f"{path}: images has the shape {images}, depths {depths[0]}: NYU Depth V2 has N 3 W H and N W H"
        )
    return int(images[0])
