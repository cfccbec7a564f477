"""DDAD: scenes in the DGP format, depth from the lidar's points.

Shape suffixes: H W pixels, N points.
"""

from __future__ import annotations

import io
import json
import posixpath
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from dataio.importers.base import BadItem, Entry, Found, Importer, Map, Options, as_key, image_extension
from dataio.spec import DataError

_SPLITS = {"train": "0", "val": "1"}  # dgp.proto.DatasetSplit
_ROTATION, _TRANSLATION = ("qw", "qx", "qy", "qz"), ("x", "y", "z")
_LIDAR = "lidar"  # names are compared without case, as DGP does


class DdadOptions(Options):
    """`camera` is the name of the camera's datum; CAMERA_01 looks ahead."""

    split: Literal["train", "val"] = "train"
    camera: Literal["CAMERA_01", "CAMERA_05", "CAMERA_06", "CAMERA_07", "CAMERA_08", "CAMERA_09"] = "CAMERA_01"


class Ddad(Importer):
    """DDAD in DGP format: ddad.json and its scenes; sparse depth by projecting the lidar's points.

    Name the folder with ddad.json, or the file. A point falls on the pixel of the integer part of its coordinates, as
    in DGP; of several the nearest counts, where DGP keeps the last.
    """

    name: ClassVar[str] = "ddad"
    definition: ClassVar[str] = "https://github.com/TRI-ML/DDAD, https://github.com/TRI-ML/dgp/tree/master/dgp/proto"
    unverified: ClassVar[str] = (
        "the download itself: read were DGP's schema, loader and example scenes, and DDAD's README"
    )
    Options: ClassVar[type[Options]] = DdadOptions

    def __init__(self, root: str, options: Any = None) -> None:
        super().__init__(root, options)
        self.given = self.root
        if self.root.is_file():
            self.root = self.root.parent

    def entries(self) -> Iterator[Entry]:
        path, splits = self._splits()
        scenes = splits.get(_SPLITS[self.options.split], {}).get("filenames", [])
        if not scenes:
            raise DataError(f"{path}: no scenes in the split {self.options.split!r}: choose another")
        for scene_path in scenes:
            scene = _read_json(self.root / scene_path)
            try:
                yield from self._samples(posixpath.dirname(scene_path), scene)
            except (KeyError, TypeError, AttributeError) as error:
                raise DataError(f"{self.root / scene_path}: no DGP scene ({error!r}): unpack it again") from error

    def read(self, entry: Entry) -> Found:
        path, calibration, *lidar = entry.files
        image, extension = self.bytes_of(path), image_extension(path)
        if not lidar:
            raise BadItem("missing_depth")
        size_wh, camera_pose, lidar_pose = entry.extra
        fx, fy, cx, cy = self._intrinsics(self.bytes_of(calibration, "missing_calibration"))
        xyz_N3 = _points(self.bytes_of(lidar[0], "missing_depth"))
        world_N3 = xyz_N3 @ _rotation(lidar_pose).T + lidar_pose[4:]
        xyz_N3 = (world_N3 - camera_pose[4:]) @ _rotation(camera_pose)
        value_HW = _project(xyz_N3, (fx, fy, cx, cy), size_wh)
        return Found(image=image, extension=extension, value_HW=value_HW, meta={"focal_px": fx})

    def _splits(self) -> tuple[Path, dict[str, Any]]:
        """The file that lists the scenes, and its lists by split. DataError."""
        paths = [self.given] if self.given.is_file() else sorted(self.root.glob("*.json"))
        found = [(path, content["scene_splits"]) for path in paths if "scene_splits" in (content := _read_json(path))]
        if not found:
            raise DataError(f"{self.given}: no DGP dataset such as ddad.json: name the folder that it is in")
        if len(found) > 1:
            raise DataError(f"{self.root}: {', '.join(path.name for path, _ in found)}: name one of these files")
        return found[0]

    def _samples(self, folder: str, scene: Mapping[str, Any]) -> Iterator[Entry]:
        datums = {datum["key"]: datum for datum in scene["data"]}
        for sample in scene["samples"]:
            named = {datums[key]["id"]["name"].lower(): datums[key]["datum"] for key in sample["datum_keys"]}
            if self.options.camera.lower() not in named:
                continue
            image = named[self.options.camera.lower()]["image"]
            files = [image["filename"], f"calibration/{sample['calibration_key']}.json"]
            extra: list[Any] = [[image["width"], image["height"]], _pose(image)]
            if _LIDAR in named:
                cloud = named[_LIDAR]["point_cloud"]
                files.append(cloud["filename"])
                extra.append(_pose(cloud))
            paths = [posixpath.join(folder, file) for file in files]
            yield Entry(as_key(paths[0]), tuple(paths), tuple(extra))

    def _intrinsics(self, data: bytes) -> tuple[float, ...]:
        """fx, fy, cx, cy of the camera, in pixels. BadItem unreadable_calibration."""
        try:
            content = json.loads(data)
            at = [name.lower() for name in content["names"]].index(self.options.camera.lower())
            return tuple(float(content["intrinsics"][at][name]) for name in ("fx", "fy", "cx", "cy"))
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise BadItem("unreadable_calibration") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: missing or no JSON ({error}): unpack it again") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: no JSON object: it is no part of a DGP dataset")
    return content


def _pose(datum: Mapping[str, Any]) -> list[float]:
    """qw, qx, qy, qz, x, y, z of a sensor in the world; zeros may be left out, as in all JSON of protocol buffers."""
    pose = datum["pose"]
    rotation, translation = pose.get("rotation", {}), pose.get("translation", {})
    return [*(rotation.get(name, 0.0) for name in _ROTATION), *(translation.get(name, 0.0) for name in _TRANSLATION)]


def _rotation(pose: list[float]) -> npt.NDArray[np.float64]:
    """The rotation matrix from the sensor to the world, [3, 3]; none for an empty pose, as in DGP."""
    quaternion = np.array(pose[:4])
    length = np.linalg.norm(quaternion)
    if length == 0:
        return np.eye(3)
    w, x, y, z = quaternion / length
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )


def _points(data: bytes) -> npt.NDArray[np.float64]:
    """Points in the lidar's frame, metres, [N, 3], of rows x, y, z, .. or records with fields X, Y, Z."""
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            points = file["data"]
        if points.dtype.names:
            points = np.stack([points[name].ravel() for name in "XYZ"], axis=1)
        xyz_N3 = points[:, :3].astype(np.float64)
    except Exception as error:  # a damaged archive makes NumPy, zipfile and zlib raise what they like
        raise BadItem("unreadable_depth") from error
    if xyz_N3.shape[1] != 3:
        raise BadItem("unreadable_depth")
    return xyz_N3[np.isfinite(xyz_N3).all(axis=1)]


def _project(xyz_N3: npt.NDArray[np.float64], intrinsics: tuple[float, ...], size_wh: tuple[int, int]) -> Map:
    """Points in the camera's frame to depths z in metres, [H, W], NaN where none falls."""
    fx, fy, cx, cy = intrinsics
    width, height = size_wh
    x_N, y_N, z_N = xyz_N3[xyz_N3[:, 2] > 0].T
    column_N, row_N = np.floor(fx * x_N / z_N + cx), np.floor(fy * y_N / z_N + cy)
    inside_N = (column_N >= 0) & (column_N < width) & (row_N >= 0) & (row_N < height)
    depth_HW = np.full((height, width), np.inf, np.float32)
    at = row_N[inside_N].astype(int), column_N[inside_N].astype(int)
    np.minimum.at(depth_HW, at, z_N[inside_N].astype(np.float32))
    return np.where(np.isfinite(depth_HW), depth_HW, np.float32(np.nan))
