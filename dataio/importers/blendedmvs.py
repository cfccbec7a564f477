"""BlendedMVS and BlendedMVG: photographs blended with renderings of reconstructed meshes.

The files of cameras are those of MVSNet, https://github.com/YoYo000/MVSNet#file-formats.

Depth is planar, in a unit of each project's own: reconstruction from photographs alone knows no metre. It is packed as
`depth_m` all the same, and KEY.json says {"unit": "scene"}. Training on inverse depth up to scale and shift does not
mind; metric training and metric evaluation must leave such data out.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from dataio.importers.base import BadItem, Entry, Found, Importer, Options, as_key
from dataio.importers.formats import holes, read_pfm
from dataio.spec import DataError


class BlendedmvsOptions(Options):
    """`split_file` lists projects, one a line, such as BlendedMVS_training.txt and validation_list.txt of the dataset's
    repository; of these, the ones that are there are taken. All by default.
    """

    split_file: str = ""


class Blendedmvs(Importer):
    """BlendedMVS and BlendedMVG: PID/blended_images, .pfm of depth in the scene's unit, not metres."""

    name: ClassVar[str] = "blendedmvs"
    definition: ClassVar[str] = "https://github.com/YoYo000/BlendedMVS"
    unverified: ClassVar[str] = (
        "that 0 is the value of pixels without a surface: the definition says only that some are"
    )
    Options: ClassVar[type[Options]] = BlendedmvsOptions

    def entries(self) -> Iterator[Entry]:
        projects = sorted(path.parent for path in self.root.glob("*/blended_images"))
        if not projects:
            raise DataError(f"{self.root}: no PID/blended_images in it: name the folder of BlendedMVS's projects")
        if self.options.split_file:
            listed = _listing(Path(self.options.split_file))
            projects = [project for project in projects if project.name in listed]
            if not projects:
                raise DataError(f"{self.root}: it has none of the projects in {self.options.split_file}")
        for project in projects:
            for image in sorted(path.name for path in project.glob("blended_images/*.jpg")):
                stem = image.removesuffix(".jpg")
                if not stem.endswith("_masked"):
                    path = f"{project.name}/blended_images/{image}"
                    depth = f"{project.name}/rendered_depth_maps/{stem}.pfm"
                    yield Entry(as_key(path), (path, depth, f"{project.name}/cams/{stem}_cam.txt"))

    def read(self, entry: Entry) -> Found:
        image, depth, camera = entry.files
        meta: dict[str, Any] = {"unit": "scene"}
        if (self.root / camera).exists():
            meta["focal_px"] = _focal(self.bytes_of(camera))
        return Found(
            image=self.bytes_of(image),
            extension="jpg",
            value_HW=holes(read_pfm(self.bytes_of(depth, "missing_depth"))),
            meta=meta,
        )


def _focal(text: bytes) -> float:
    """The horizontal focal length, pixels: the first number of the 3 x 3 matrix below the line `intrinsic`."""
    try:
        return float(text.split(b"intrinsic")[1].split()[0])
    except (IndexError, ValueError) as error:
        raise BadItem("unreadable_camera") from error


def _listing(path: Path) -> set[str]:
    try:
        return set(path.read_text().split())
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}): a text file with one project a line is needed") from error
