"""Hypersim: rendered indoor scenes. Its maps hold distances to the camera's centre, which become planar depth here.

The pictures are the tone-mapped previews, which the dataset ships as JPEG.

Shape suffixes: H W pixels.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from dataio.importers.base import BadItem, Entry, Found, Importer, Map, Options, as_key
from dataio.importers.formats import holes, read_hdf5
from dataio.spec import DataError

_TAN_HALF_FOV_X = math.tan(math.radians(60) / 2)  # of every nominal camera: 886.81 px at 1024 x 768
_IMAGES = "images/scene_cam_*_final_preview/frame.*.tonemap.jpg"

# M_cam_from_uv row by row: rays in camera space (x right, y up, -z forward) of (u, v, 1); u runs from -1 to 1 to the
# right, v from -1 to 1 upwards, over the image's edges
_Camera = tuple[float, ...]


class HypersimOptions(Options):
    """`split_file` is metadata_images_split_scene_v1.csv of ml-hypersim: only images that it calls publicly released
    are taken, of the `split` or of all three. `camera_parameters` is its metadata_camera_parameters.csv, which knows
    the lens shifts of some scenes; without it all have the nominal camera of 60 degrees.
    """

    split_file: str = ""
    split: Literal["train", "val", "test"] | None = None
    camera_parameters: str = ""


class Hypersim(Importer):
    """Hypersim: ai_VVV_NNN folders; tone-mapped JPEG, HDF5 of distances, turned into planar depth."""

    name: ClassVar[str] = "hypersim"
    definition: ClassVar[str] = "https://github.com/apple/ml-hypersim"
    Options: ClassVar[type[Options]] = HypersimOptions

    def entries(self) -> Iterator[Entry]:
        opt: HypersimOptions = self.options
        if opt.split and not opt.split_file:
            raise DataError(
                f"split={opt.split} needs split_file: name metadata_images_split_scene_v1.csv of ml-hypersim"
            )
        cameras = _cameras(Path(opt.camera_parameters)) if opt.camera_parameters else {}
        images = (
            self._listed() if opt.split_file else [p.relative_to(self.root) for p in self.root.glob(f"ai_*/{_IMAGES}")]
        )
        if not images:
            what = f" of {opt.split or opt.split_file}" if opt.split_file else ""
            raise DataError(f"{self.root}: no ai_VVV_NNN/{_IMAGES}{what} in it: name the folder of Hypersim's scenes")
        for path in sorted(images):
            folder = path.parent.name.replace("_final_preview", "_geometry_hdf5")
            depth = path.parent.parent / folder / path.name.replace(".tonemap.jpg", ".depth_meters.hdf5")
            camera = cameras.get(path.parts[0], ())
            yield Entry(as_key(path.as_posix()), (path.as_posix(), depth.as_posix()), camera)

    def read(self, entry: Entry) -> Found:
        image, depth = entry.files
        if self.options.camera_parameters and not entry.extra:
            raise BadItem("missing_camera")
        distance_HW = read_hdf5(self.root / depth, "dataset")
        if distance_HW.ndim != 2:
            raise BadItem("unreadable_depth")
        height, width = distance_HW.shape
        camera = entry.extra or _nominal(width, height)
        return Found(
            image=self.bytes_of(image),
            extension="jpg",
            value_HW=holes(_planar(distance_HW.astype(np.float32), camera)),
            meta={"focal_px": width / 2 * -camera[8] / camera[0]},
        )

    def _listed(self) -> list[Path]:
        """The released images of the split file, of the scenes that are there."""
        opt: HypersimOptions = self.options
        here = {path.name for path in self.root.glob("ai_*")}
        found = []
        for row in _rows(Path(opt.split_file), "split_partition_name"):
            released = row["included_in_public_release"] == "True"
            if released and row["scene_name"] in here and opt.split in (None, row["split_partition_name"]):
                folder = Path(row["scene_name"], "images", f"scene_{row['camera_name']}_final_preview")
                found.append(folder / f"frame.{int(row['frame_id']):04d}.tonemap.jpg")
        return found


def _planar(distance_HW: Map, camera: _Camera) -> Map:
    """Depth along the optical axis of distances to the camera's centre, metres."""
    height, width = distance_HW.shape
    u_W = (2 * np.arange(width) + 1) / width - 1
    v_H = 1 - (2 * np.arange(height) + 1) / height
    x_HW, y_HW, z_HW = (a * u_W + b * v_H[:, None] + c for a, b, c in np.reshape(camera, (3, 3)))
    return (distance_HW * -z_HW / np.sqrt(x_HW**2 + y_HW**2 + z_HW**2)).astype(np.float32)


def _nominal(width: int, height: int) -> _Camera:
    return (_TAN_HALF_FOV_X, 0, 0, 0, _TAN_HALF_FOV_X * height / width, 0, 0, 0, -1)


def _cameras(path: Path) -> dict[str, _Camera]:
    """M_cam_from_uv of each scene. DataError."""
    names = [f"M_cam_from_uv_{row}{column}" for row in range(3) for column in range(3)]
    try:
        return {row["scene_name"]: tuple(float(row[name]) for name in names) for row in _rows(path, names[-1])}
    except (TypeError, ValueError) as error:  # a line that is cut, or no number
        raise DataError(f"{path}: {names[0]} to {names[-1]} must be numbers ({error}): fetch the file again") from error


def _rows(path: Path, needed: str) -> list[dict[str, Any]]:
    try:
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}): it is in the repository ml-hypersim") from error
    if not rows or needed not in rows[0]:
        raise DataError(f"{path}: no column {needed!r}: take the file of that purpose from the repository ml-hypersim")
    return rows
