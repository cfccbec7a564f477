"""DIML/CVL RGB-D: depth from a Kinect v2 (indoor) or from stereo matching (outdoor), 16-bit PNG in millimetres.

The sample downloads and the full ones name their folders differently.

Shape suffixes: H W pixels.
"""

from __future__ import annotations

import io
import posixpath
from collections.abc import Iterator
from typing import ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image
from pydantic import Field

from dataio.codec import DEPTH_MM, encode_png16
from dataio.importers.base import BadItem, Entry, Found, Importer, Options, as_key, image_extension
from dataio.importers.folder import walk
from dataio.importers.formats import read_codes
from dataio.spec import DataError


class _Form(NamedTuple):
    """Folders that lie beside each other and how their files' names end, after what they share."""

    image: tuple[str, str]
    depth: tuple[str, str]
    confidence: tuple[str, str] | None = None


_ANY = "_*.png"  # the name shares all before its last "_"

_FORMS = (
    _Form(("color", "_c.png"), ("depth_filled", "_depth_filled.png")),  # indoor, sample
    _Form(("col", "_c.png"), ("up_png", _ANY)),  # indoor, full
    _Form(("outleft", ".png"), ("depthmap", ".png"), ("confidencemap", ".png")),  # outdoor, sample
    _Form(("left", "_left.png"), ("depth", "_depth.png"), ("conf", "_conf.png")),  # outdoor, full
)


class DimlOptions(Options):
    """`confidence`: outdoor pixels whose confidence is not above it become holes; public loaders take 0.4 to 0.6. 0
    keeps every pixel.
    """

    confidence: float = Field(default=0.0, ge=0, lt=1)


class Diml(Importer):
    """DIML/CVL RGB-D: indoor (color/ or col/) and outdoor (outleft/ or left/), with depth beside them."""

    name: ClassVar[str] = "diml"
    definition: ClassVar[str] = "https://dimlrgbd.github.io/"
    unverified: ClassVar[str] = (
        "names of folders and files, which are those of public loaders: the page names only the kinds of files, their "
        "units and bits; that 0 is a hole; that confidence 255 is 1; what depth the outdoor sky has"
    )
    Options: ClassVar[type[Options]] = DimlOptions

    def entries(self) -> Iterator[Entry]:
        files = walk(str(self.root))
        found: dict[str, Entry] = {}
        depths = 0
        for form in _FORMS:
            needs = {"missing_depth": _listing(files, form.depth)}
            if form.confidence is not None and self.options.confidence > 0:
                needs["missing_confidence"] = _listing(files, form.confidence)
            for shared, path in _listing(files, form.image).items():
                beside = [listing[shared] for listing in needs.values() if shared in listing]
                missing = [reason for reason, listing in needs.items() if shared not in listing]
                found[path] = Entry(as_key(path), (path, *beside), tuple(missing))
                depths += "missing_depth" not in missing
        if not depths:
            folders = ", ".join(f"{form.image[0]}/ with {form.depth[0]}/" for form in _FORMS)
            raise DataError(f"{self.root}: no photographs and depth maps as in {folders}: name a folder of DIML")
        for path in sorted(found):
            yield found[path]

    def read(self, entry: Entry) -> Found:
        if entry.extra:
            raise BadItem(entry.extra[0])
        path, depth, *confidence = entry.files
        image, png = self.bytes_of(path), self.bytes_of(depth, "missing_depth")
        if confidence:
            code_HW = read_codes(png)
            keep_HW = self._confident(confidence[0], code_HW.shape)
            png, _ = encode_png16(np.where(keep_HW, code_HW, 0) * DEPTH_MM.scale, DEPTH_MM)
        return Found(image=image, extension=image_extension(path), coded=(png, DEPTH_MM))

    def _confident(self, path: str, shape: tuple[int, ...]) -> npt.NDArray[np.bool_]:
        """Where an 8-bit grey map of confidence is above the option's value, [H, W]."""
        data = self.bytes_of(path, "missing_confidence")
        try:
            with Image.open(io.BytesIO(data)) as image:
                level_HW = np.asarray(image.convert("L"))
        except Exception as error:  # Pillow's plug-ins raise whatever they like on damaged files
            raise BadItem("unreadable_confidence") from error
        if level_HW.shape != shape:
            raise BadItem("confidence_size_differs")
        return level_HW > 255 * self.options.confidence


def _listing(files: set[str], where: tuple[str, str]) -> dict[tuple[str, str], str]:
    """Files in folders of one name, by what siblings share: (the folder above, the name without its ending)."""
    wanted, ending = where
    found: dict[tuple[str, str], str] = {}
    for path in sorted(files):
        folder, name = posixpath.split(path)
        above, own = posixpath.split(folder)
        if own == wanted and name.endswith(".png" if ending == _ANY else ending):
            shared = name.rpartition("_")[0] if ending == _ANY else name.removesuffix(ending)
            found.setdefault((above, shared), path)
    return found
