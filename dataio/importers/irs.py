"""IRS: rendered indoor stereo; the left pictures and their disparity."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from dataio.importers.base import Entry, Found, Importer, Options, as_key
from dataio.importers.formats import holes, read_exr
from dataio.spec import DataError
from dataio.types import Quantity

_CAMERA = {"baseline_m": 0.1, "focal_px": 480.0}  # of all scenes, 960 x 540
_ABOVE = ("", "*/", "*/*/", "*/*/*/")  # down to a scene: IRSDataset/Home/SCENE


class IrsOptions(Options):
    """`split_file` is one of the lists of the dataset's repository, such as IRSDataset_TRAIN.list: lines of left,
    right, disparity and normals, relative to the root. All by default.
    """

    split_file: str = ""


class Irs(Importer):
    """IRS indoor stereo: Home/SCENE/l_N.png and d_N.exr, disparity of the left picture in pixels."""

    name: ClassVar[str] = "irs"
    quantity: Quantity = "disparity"
    definition: ClassVar[str] = "https://github.com/HKBU-HPML/IRS"
    unverified: ClassVar[str] = (
        "which value a pixel without a surface has; that rows run from the top, as in the dataset's loader, "
        "dataloader/IRSLoader.py, whereas its script disp2pcd.py turns a map upside down"
    )
    Options: ClassVar[type[Options]] = IrsOptions

    def entries(self) -> Iterator[Entry]:
        if self.options.split_file:
            images = _listing(Path(self.options.split_file))
            if not any((self.root / image).exists() for image in images):
                raise DataError(
                    f"{self.root}: it has none of the pictures in {self.options.split_file}: name the folder from "
                    f"which paths such as {next(iter(images), 'Home/SCENE/l_1.png')!r} lead on"
                )
        else:
            found = [path for above in _ABOVE for path in self.root.glob(f"{above}l_*.png")]
            images = [path.relative_to(self.root).as_posix() for path in found]
            if not images:
                raise DataError(f"{self.root}: no Home/SCENE/l_N.png in it: name the folder of IRS, or of some scenes")
        for path in sorted(images):
            folder, _, name = path.rpartition("l_")
            yield Entry(as_key(path), (path, f"{folder}d_{name.removesuffix('.png')}.exr"))

    def read(self, entry: Entry) -> Found:
        image, disparity = entry.files
        # the dataset's loader reads the channel G, whether alone or one of three
        return Found(
            image=self.bytes_of(image),
            extension="png",
            value_HW=holes(read_exr(self.root / disparity, ("G",))),
            meta=_CAMERA,
        )


def _listing(path: Path) -> list[str]:
    try:
        return [line.split()[0] for line in path.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}): a list of the repository of IRS is needed") from error
