"""MegaDepth v1: photographs of landmarks from the Internet with depth from structure from motion.

Shape suffixes: H W pixels.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from dataio.importers.base import IMAGE_EXTENSIONS, BadItem, Entry, Found, Importer, Options, as_key, image_extension
from dataio.importers.formats import holes, read_hdf5
from dataio.spec import DataError


class MegaDepthOptions(Options):
    """`list_file` is one of the official lists, imgs_MD.p: a pickled list of photographs; empty takes all."""

    list_file: str = ""


class MegaDepth(Importer):
    """MegaDepth v1: SCENE/denseN/imgs and depths/*.h5; depth up to one unknown scale per scene.

    KEY.json says {"unit": "scene"}: the numbers are no metres. 0 is a hole. Some files hold ordinal labels (negative
    and positive whole numbers) in place of depth; these are left out, counted as ordinal_depth.
    """

    name: ClassVar[str] = "megadepth"
    definition: ClassVar[str] = "https://www.cs.cornell.edu/projects/megadepth/dataset/Megadepth_v1/README.md"
    unverified: ClassVar[str] = (
        "the README could not be read: how ordinal files differ is as in the authors' issues 1 and 38 and in public "
        "loaders; that depth is along the optical axis and has the photograph's size everywhere"
    )
    Options: ClassVar[type[Options]] = MegaDepthOptions

    def entries(self) -> Iterator[Entry]:
        found = sorted(
            str(path.relative_to(self.root))
            for path in self.root.glob("*/dense*/imgs/*")
            if path.suffix.lower() in IMAGE_EXTENSIONS
        )
        if not found:
            raise DataError(
                f"{self.root}: no SCENE/dense*/imgs with photographs: name the folder MegaDepth_v1, which holds the "
                "scenes 0000, 0001 .. (the archive has it below phoenix/S6/zl548)"
            )
        if self.options.list_file:
            found = _listed(self.options.list_file)
        for image in found:
            scene, dense, _, name = image.split("/")
            yield Entry(as_key(image), (image, f"{scene}/{dense}/depths/{Path(name).stem}.h5"))

    def read(self, entry: Entry) -> Found:
        image_path, depth_path = entry.files
        image = self.bytes_of(image_path)
        depth_HW = read_hdf5(self.root / depth_path, "depth")
        if depth_HW.ndim != 2 or depth_HW.dtype.kind not in "fiu":
            raise BadItem("unreadable_depth")
        if (depth_HW < 0).any() or (depth_HW.any() and (depth_HW == np.rint(depth_HW)).all()):
            raise BadItem("ordinal_depth")  # its positive numbers are labels as well
        return Found(
            image=image,
            extension=image_extension(image_path),
            value_HW=holes(depth_HW),
            meta={"unit": "scene"},
        )


class _Plain(pickle.Unpickler):
    """Loads lists and texts alone, so that no file can run code."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        raise pickle.UnpicklingError(f"it holds {module_name}.{global_name}")


def _listed(path: str) -> list[str]:
    """The photographs SCENE/denseN/imgs/NAME of an official list, sorted. DataError."""
    try:
        with open(path, "rb") as file:
            listed = _Plain(file).load()
        parts = {tuple(name.split("/")[-4:]) for name in listed}
    except OSError as error:
        raise DataError(f"list_file: {path}: cannot be read ({error.strerror}): name a file imgs_MD.p") from error
    except Exception as error:  # damaged pickles raise whatever they like
        raise DataError(f"list_file: {path}: no pickled list of texts ({error}): name a file imgs_MD.p") from error
    if not parts or any(len(part) != 4 or part[2] != "imgs" for part in parts):
        raise DataError(f"list_file: {path}: it must list SCENE/denseN/imgs/NAME.jpg: name a file imgs_MD.p")
    return sorted("/".join(part) for part in parts)
