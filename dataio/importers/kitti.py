"""KITTI: raw recordings with the annotated depth of the depth benchmark, as the Eigen split uses them.

Shape suffixes: H W pixels, C channel.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from PIL import Image

from dataio.codec import encode_png16
from dataio.importers.base import BadItem, Entry, Found, Importer, Options, image_extension, png_of
from dataio.importers.formats import read_codes
from dataio.spec import DataError
from dataio.types import AffineCode

_DRIVE = r"(\d{4}_\d\d_\d\d_drive_\d{4}_sync)"
_BY_PATH = re.compile(rf"{_DRIVE}/image_0([23])/data/(\d+)\.\w+(\s|$)")  # BTS, ZoeDepth, Depth-Anything
_BY_NUMBER = re.compile(rf"{_DRIVE}\s+(\d+)\s+([lr])$")  # Monodepth2
_CROP_HEIGHT, _CROP_WIDTH = 352, 1216

_Frame = tuple[str, str, str]  # drive, camera, ten digits


class KittiOptions(Options):
    """`split_file` is a list of the Eigen split, as it comes with BTS, ZoeDepth, Depth-Anything or Monodepth2; without
    one, all frames are taken. `crop` kb is the 352 x 1216 crop of the benchmark, for PNG images only.
    """

    split_file: str = ""
    camera: Literal["2", "3", "both"] = "both"
    crop: Literal["none", "kb"] = "none"


class Kitti(Importer):
    """KITTI raw with annotated depth maps (Eigen split); 16-bit PNG, metres = code / 256.

    Dates (2011_09_26) and drives of the depth download lie in the root or up to two folders below it.
    """

    name: ClassVar[str] = "kitti"
    definition: ClassVar[str] = "https://www.cvlibs.net/datasets/kitti/eval_depth.php?benchmark=depth_prediction"
    unverified: ClassVar[str] = "the depth development kit itself: read as the Robust Vision Challenge quotes it"
    Options: ClassVar[type[Options]] = KittiOptions
    code = AffineCode(scale=1 / 256)

    def entries(self) -> Iterator[Entry]:
        images = self._folders("image_0[23]/data", drive=-3, camera=-2)
        depths = self._folders("proj_depth/groundtruth/image_0[23]", drive=-4, camera=-1)
        if not images:
            raise DataError(
                f"{self.root}: no DATE/DRIVE_sync/image_02/data in it: name the folder that holds the raw recordings"
            )
        if not depths:
            raise DataError(
                f"{self.root}: no DRIVE_sync/proj_depth/groundtruth in it: unpack data_depth_annotated.zip there"
            )
        names = {key: _by_stem(folder) for key, folder in images.items()}
        focals = {key: _focal(folder.parents[2] / "calib_cam_to_cam.txt", key[1]) for key, folder in images.items()}
        for drive, camera, number in self._listed() if self.options.split_file else _all(names):
            key = drive, camera
            if self.options.camera not in ("both", camera):
                continue
            folder = images.get(key, self.root / drive[:10] / drive / f"image_0{camera}" / "data")
            files = [folder / names.get(key, {}).get(number, f"{number}.png")]
            if self.options.crop == "kb" and files[0].suffix != ".png":
                raise DataError(f"{files[0]}: crop kb needs PNG images, JPEGs are never encoded again: use crop none")
            if key in depths:
                files.append(depths[key] / f"{number}.png")
            yield Entry(
                f"{drive}/image_0{camera}/{number}",
                tuple(file.relative_to(self.root).as_posix() for file in files),
                focals.get(key, ()),
            )

    def read(self, entry: Entry) -> Found:
        image_path, *depth_path = entry.files
        image = self.bytes_of(image_path)
        if not depth_path:
            raise BadItem("missing_depth")
        depth = self.bytes_of(depth_path[0], "missing_depth")
        if self.options.crop == "kb":
            image, depth = _kb_crop(image, depth, self.code)
        meta = {"focal_px": entry.extra[0]} if entry.extra else {}
        return Found(image=image, extension=image_extension(image_path), coded=(depth, self.code), meta=meta)

    def _folders(self, inside: str, *, drive: int, camera: int) -> dict[tuple[str, str], Path]:
        """Folders by (drive, camera), which are those parts of their paths; sorted."""
        found: dict[tuple[str, str], Path] = {}
        for above in ("", "*/", "*/*/"):
            for path in sorted(self.root.glob(f"{above}????_??_??_drive_????_sync/{inside}")):
                found.setdefault((path.parts[drive], path.parts[camera][-1]), path)
        return dict(sorted(found.items()))

    def _listed(self) -> Iterable[_Frame]:
        """The frames of the list, in its order, each once. DataError."""
        given = Path(self.options.split_file)
        path = given if given.exists() else self.root / given
        try:
            lines = path.read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"split_file {given}: no text file there, nor in {self.root}") from error
        return dict.fromkeys(_frame(path, line) for line in lines if line.strip())


def _frame(path: Path, line: str) -> _Frame:
    by_path, by_number = _BY_PATH.search(line), _BY_NUMBER.search(line.strip())
    if by_path:  # the first is the image; its depth map is known by the drive and the number
        return by_path[1], by_path[2], by_path[3].zfill(10)
    if by_number:
        return by_number[1], "2" if by_number[3] == "l" else "3", by_number[2].zfill(10)
    forms = "'DATE/DRIVE/image_02/data/FRAME.png ...' or 'DATE/DRIVE FRAME l'"
    raise DataError(f"{path}: {line!r} names no frame: lines are {forms}")


def _all(names: dict[tuple[str, str], dict[str, str]]) -> Iterator[_Frame]:
    for (drive, camera), stems in names.items():
        for stem in stems:
            yield drive, camera, stem


def _by_stem(folder: Path) -> dict[str, str]:
    """The file names of a folder by their stem, sorted; of a PNG and a JPEG the PNG."""
    return {Path(name).stem: name for name in sorted(os.listdir(folder)) if name.endswith((".jpg", ".png"))}


def _focal(path: Path, camera: str) -> tuple[float, ...]:
    """(focal length in pixels,) of a rectified camera, () where the file does not say."""
    try:
        found = re.search(rf"^P_rect_0{camera}: ([-+.\deE]+) ", path.read_text(), re.MULTILINE)
        return (float(found[1]),) if found else ()
    except (OSError, ValueError):
        return ()


def _kb_crop(image: bytes, depth: bytes, code: AffineCode) -> tuple[bytes, bytes]:
    """Both PNGs cut to 352 x 1216 pixels, at the bottom and in the middle, without loss."""
    try:
        with Image.open(io.BytesIO(image)) as opened:
            image_HWC = np.asarray(opened.convert("RGB"))
    except Exception as error:  # Pillow's plug-ins raise whatever they like on damaged files
        raise BadItem("unreadable_image") from error
    code_HW = read_codes(depth)
    height, width = code_HW.shape
    if image_HWC.shape[:2] != (height, width):
        raise BadItem("depth_size_differs")
    if height < _CROP_HEIGHT or width < _CROP_WIDTH:
        raise BadItem("smaller_than_crop")
    top, left = height - _CROP_HEIGHT, (width - _CROP_WIDTH) // 2
    part = np.s_[top:, left : left + _CROP_WIDTH]
    return png_of(image_HWC[part]), encode_png16(code_HW[part] * code.scale, code)[0]
