"""ETH3D, the high-resolution multi-view training scenes: photographs and depth rendered from laser scans.

Shape suffixes: H W pixels.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np
from PIL import Image

from dataio.importers.base import IMAGE_EXTENSIONS, BadItem, Entry, Found, Importer, as_key, image_extension
from dataio.importers.formats import holes
from dataio.spec import DataError

_IMAGES = "images/dslr_images"
_DEPTHS = "ground_truth_depth/dslr_images"
_CALIBRATION = "dslr_calibration_jpg"
_FIELDS_OF_AN_IMAGE = 10  # in COLMAP's images.txt; the lines of its points have a multiple of three


class Eth3d(Importer):
    """ETH3D high-res multi-view: distorted DSLR JPEGs with raw float32 depth of their size, in metres.

    Reads one scene or a folder of them. A depth file has the photograph's name, .JPG too, but holds bare numbers row by
    row; infinity is a hole. It belongs to the distorted photographs alone: dslr_images_undistorted have another size
    and are passed over. The focal length (fx) comes from dslr_calibration_jpg where that is there. A photograph that
    EXIF turns is left out, as in every labelled set: nobody turns its depth map.
    """

    name: ClassVar[str] = "eth3d"
    definition: ClassVar[str] = "https://www.eth3d.net/documentation"
    unverified: ClassVar[str] = (
        "the page's section on depth could not be read: paths, float32, holes and planar depth are as several public "
        "loaders have them; whether any photograph is turned by EXIF"
    )

    def entries(self) -> Iterator[Entry]:
        scenes = sorted(path.parents[1] for path in self.root.glob(f"**/{_IMAGES}"))
        if not any((scene / _DEPTHS).is_dir() for scene in scenes):
            raise DataError(
                f"{self.root}: no SCENE/{_IMAGES} with SCENE/{_DEPTHS}: unpack X_dslr_jpg.7z and X_dslr_depth.7z of "
                "each scene into one folder, and name that"
            )
        for scene in scenes:
            focals = _focals(scene / _CALIBRATION)
            names = sorted(path.name for path in (scene / _IMAGES).iterdir() if path.suffix.lower() in IMAGE_EXTENSIONS)
            for name in names:
                image, depth = (str((scene / folder / name).relative_to(self.root)) for folder in (_IMAGES, _DEPTHS))
                yield Entry(as_key(image), (image, depth), (focals[name],) if name in focals else ())

    def read(self, entry: Entry) -> Found:
        image_path, depth_path = entry.files
        image, depth = self.bytes_of(image_path), self.bytes_of(depth_path, "missing_depth")
        try:
            width, height = Image.open(io.BytesIO(image)).size
        except OSError as error:
            raise BadItem("unreadable_image") from error
        if len(depth) != 4 * width * height:  # a cut file, or another image's: there is no header to tell
            raise BadItem("depth_size_differs")
        return Found(
            image=image,
            extension=image_extension(image_path),
            value_HW=holes(np.frombuffer(depth, "<f4").reshape(height, width)),
            meta={"focal_px": entry.extra[0]} if entry.extra else {},
        )


def _focals(folder: Path) -> dict[str, float]:
    """fx in pixels per photograph's name, from COLMAP's cameras.txt and images.txt; {} without them. DataError."""
    cameras, images = folder / "cameras.txt", folder / "images.txt"
    if not (cameras.is_file() and images.is_file()):
        return {}
    try:
        # CAMERA_ID MODEL WIDTH HEIGHT fx fy ..; IMAGE_ID QW QX QY QZ TX TY TZ CAMERA_ID NAME
        fx = {fields[0]: float(fields[4]) for fields in _lines(cameras) if fields}
        shots = (fields for fields in _lines(images) if len(fields) == _FIELDS_OF_AN_IMAGE)
        return {fields[9].rsplit("/", 1)[-1]: fx[fields[8]] for fields in shots}
    except (ValueError, IndexError, KeyError) as error:
        raise DataError(f"{folder}: cameras.txt and images.txt are not COLMAP's ({error}): unpack again") from error


def _lines(path: Path) -> Iterator[list[str]]:
    """The fields of each line that is no comment."""
    with path.open() as file:
        yield from (line.split() for line in file if not line.startswith("#"))
