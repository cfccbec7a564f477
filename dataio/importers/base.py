"""What every importer shares: where samples of somebody's layout come from, and how one becomes members of a shard.

An importer finds its entries (quick, in the parent process, in a fixed order) and reads one (in any process). Images
are passed on byte by byte where the layout has image files; depth as the file it has where that is a 16-bit PNG whose
codes are linear, else as a map, which is encoded here.

Shape suffixes: H W pixels.
"""

from __future__ import annotations

import abc
import importlib
import io
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import numpy.typing as npt
from PIL import Image
from pydantic import BaseModel, ConfigDict, ValidationError

from dataio import header
from dataio.codec import DEPTH_MM, encode_map, has_values
from dataio.png16 import decode_codes
from dataio.shards import Item
from dataio.spec import DataError
from dataio.types import AffineCode, Quantity, Sample

IMAGE_EXTENSIONS = {f".{name}": "jpg" if name == "jpeg" else name for name in header.EXTENSIONS}  # -> as packed
_UNUSABLE = {"bad_image": "unreadable_image"}  # reasons of the stream that have another name in a report

Map = npt.NDArray[np.float32]
SkyFinder = Callable[[npt.NDArray[np.uint8]], npt.NDArray[np.bool_]]


class BadItem(Exception):
    """An entry that cannot be used; `reason` is one word, counted in the report."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class Entry:
    """One sample that was found and not yet read.

    `files` are what it is made of, relative to the root, the image first: packing again compares their sizes. `extra`
    is whatever else the importer needs to read it, in plain JSON-able values.
    """

    key: str
    files: tuple[str, ...]
    extra: tuple[Any, ...] = ()

    @property
    def name(self) -> str:
        """For people."""
        return self.files[0] if self.key == as_key(self.files[0]) else f"{self.files[0]} {self.key}"


@dataclass(frozen=True, kw_only=True)
class Found:
    """One sample as read: the image's file, and its depth (or disparity) as a map, or as a file with its code.

    `value_HW` is in the importer's quantity, NaN where nothing was measured. `sky_HW` is True where sky is: no depth,
    disparity 0. `meta` goes into KEY.json; by convention focal_px, baseline_m.
    """

    image: bytes
    extension: str  # "jpg" | "png" | "webp"
    value_HW: Map | None = None
    coded: tuple[bytes, AffineCode] | None = None
    sky: bytes | npt.NDArray[np.bool_] | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)


class Options(BaseModel):
    """What an importer can be told. Fields are text, numbers, switches or a choice of words, with defaults."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Importer(abc.ABC):
    """One layout. Subclasses are small; what they cite as `definition` is where the layout is described.

    An instance is sent to other processes, so it holds its root and options and little else.
    """

    name: ClassVar[str]
    quantity: Quantity = "depth_m"
    definition: ClassVar[str]
    unverified: ClassVar[str] = ""  # what of the layout could not be checked against its definition
    code: AffineCode = DEPTH_MM  # the dataset's; samples with another one say so
    Options: ClassVar[type[Options]] = Options

    def __init__(self, root: str, options: Any = None) -> None:
        """`options` is an instance of `Options`. DataError when `root` is not there."""
        self.root = Path(root)
        self.options: Any = options if options is not None else self.Options()
        if not self.root.exists():
            raise DataError(f"{root}: no such folder: name the folder that holds the data")

    @property
    def labelled(self) -> bool:
        """Whether its samples have depth."""
        return True

    @abc.abstractmethod
    def entries(self) -> Iterator[Entry]:
        """Every sample, in a fixed order. DataError when the folder does not look like this layout."""

    @abc.abstractmethod
    def read(self, entry: Entry) -> Found:
        """One sample. Raises BadItem for what is wrong with it alone."""

    def bytes_of(self, path: str, missing: str = "missing_image") -> bytes:
        """A file's content. BadItem `missing` when there is none."""
        try:
            return (self.root / path).read_bytes()
        except (FileNotFoundError, IsADirectoryError) as error:
            raise BadItem(missing) from error


def parse_options(importer: type[Importer], given: Mapping[str, str]) -> Options:
    """The options of texts such as {"split": "train"}. DataError for unknown names and values that do not fit."""
    try:
        return importer.Options.model_validate(dict(given))
    except ValidationError as error:
        first = error.errors()[0]
        what = "is unknown" if first["type"] == "extra_forbidden" else f"is {first['input']!r}: {first['msg']}"
        # A rule about several options names none.
        said = f"option {first['loc'][0]!r} {what}" if first["loc"] else first["msg"].removeprefix("Value error, ")
        known = ", ".join(importer.Options.model_fields) or "none"
        raise DataError(f"{said}; the layout {importer.name!r} has the options {known}") from error


def image_extension(path: str) -> str:
    """The member's extension for an image file. BadItem for a format that shards do not hold."""
    try:
        return IMAGE_EXTENSIONS[Path(path).suffix.lower()]
    except KeyError as error:
        raise BadItem("unknown_image_format") from error


def as_key(path: str) -> str:
    """A key made of a relative path: without extension; letters, digits, - _ and / stay, the rest becomes _."""
    stem = path[: -len(suffix)] if (suffix := Path(path).suffix) else path
    return "".join(c if c.isalnum() or c in "-_/" else "_" for c in stem)


def look(data: bytes) -> tuple[tuple[int, int] | None, bool]:
    """((width, height) as displayed, whether EXIF turns it) of an image that a stream takes; else (None, False).

    All of it is decoded.
    """
    try:
        return _look(data)
    except BadItem:
        return None, False


def _look(data: bytes) -> tuple[tuple[int, int], bool]:
    """As `look`; BadItem unreadable_image (or of another format, whatever its name), too_large."""
    found = header.look(Sample(key="", image=data), sidecar=False)
    if isinstance(found, str):
        raise BadItem(_UNUSABLE.get(found, found))
    if not header.decodes(data):
        raise BadItem("unreadable_image")
    return (found.width, found.height), header.is_turned(data)


def png_of(image_HWC: npt.NDArray[np.uint8]) -> bytes:
    """Pixels that come in no file of their own, without loss."""
    out = io.BytesIO()
    Image.fromarray(image_HWC).save(out, format="PNG", compress_level=1)
    return out.getvalue()


def make_item(importer: Importer, sky: str | None, entry: Entry) -> Item:
    """Read an entry and turn it into the members of a sample, or the problem it has. `sky`: as for `sky_finder`."""
    try:
        members = _members(importer.read(entry), importer)
        if sky is not None and "sky.png" not in members:
            members["sky.png"] = _found_sky(members, sky, entry.name)
    except BadItem as bad:
        return Item(name=entry.name, problem=bad.reason)
    return Item(name=entry.name, key=entry.key, members=members)


def _members(found: Found, importer: Importer) -> dict[str, bytes]:
    size, turned = _look(found.image)
    members = {found.extension: found.image}
    meta = dict(found.meta)
    if importer.labelled:
        if turned:  # decoders turn such a picture, and nobody turns its depth map
            raise BadItem("rotated_by_exif")
        meta |= _add_target(members, found, importer, size)
    _add_sky(members, found, size)
    if meta:
        members["json"] = json.dumps(meta, sort_keys=True).encode()
    return members


def sky_finder(name: str) -> SkyFinder:
    """The function called `name`, "package.module:function": from an image, uint8 [H, W, 3], to where its sky is, bool
    [H, W]. Any segmentation model can stand behind it. DataError when there is none.
    """
    module, colon, function = name.partition(":")
    here = os.getcwd()
    if here not in sys.path:  # a file beside the user's command is found, as by `python -m`
        sys.path.insert(0, here)
    try:
        found = getattr(importlib.import_module(module), function) if colon else None
    except (ImportError, AttributeError) as error:
        raise DataError(f"sky is {name!r}: {error}; name a function as package.module:function") from error
    if not callable(found):
        raise DataError(f"sky is {name!r}: name a function as package.module:function")
    return cast("SkyFinder", found)


def _found_sky(members: Mapping[str, bytes], name: str, photograph: str) -> bytes:
    """The mask of the image as displayed, which is how streams show it. DataError when the function fails."""
    data = next(members[extension] for extension in IMAGE_EXTENSIONS.values() if extension in members)
    try:
        image_HWC = header.displayed(data)
    except Exception as error:  # of a PNG that DALI takes and Pillow does not
        raise BadItem("unreadable_image") from error
    finder = sky_finder(name)
    try:
        sky_HW = np.asarray(finder(image_HWC))
    except Exception as error:
        raise DataError(
            f"{photograph}: {name} failed with {type(error).__name__}: {error}; mend the function, or leave this "
            "photograph out"
        ) from error
    if sky_HW.shape != image_HWC.shape[:2] or sky_HW.dtype != np.bool_:
        raise DataError(
            f"{photograph}: {name} returned {sky_HW.dtype} {sky_HW.shape} for an image of {image_HWC.shape[:2]}: a "
            "bool array of the image's height and width is needed"
        )
    return png_of(sky_HW.astype(np.uint8) * 255)


def _add_target(members: dict[str, bytes], found: Found, importer: Importer, size: tuple[int, int]) -> dict[str, Any]:
    """Add the target; returns what KEY.json has to say of its code."""
    if found.coded is not None:
        png, code = found.coded
        code_HW = _codes(png)
        depth_size, valid = code_HW.shape[::-1], bool(code_HW.any())
        extension = "depth.png"
    else:
        if found.value_HW is None:
            raise BadItem("missing_depth")
        if found.value_HW.ndim != 2:
            raise BadItem("unreadable_depth")
        depth_size = found.value_HW.shape[::-1]
        valid = has_values(found.value_HW, importer.quantity)
        if valid:
            extension, png, encoded = encode_map(found.value_HW, importer.quantity)
            code = encoded or importer.code
    if depth_size != size:
        raise BadItem("depth_size_differs")
    if not valid:
        raise BadItem("no_valid_depth")
    members[extension] = png
    own, common = asdict(code), asdict(importer.code)
    return {name: value for name, value in own.items() if value != common[name]}


def _codes(png: bytes) -> npt.NDArray[np.uint16]:
    """The codes of a depth map, [H, W], by the stream's decoder. BadItem unreadable_depth, depth_not_16_bit."""
    if header.png_size(png, "I;16") is None:
        raise BadItem("unreadable_depth" if look(png)[0] is None else "depth_not_16_bit")
    try:
        return decode_codes(png)
    except Exception as error:  # besides its own, it raises what Pillow and two libraries of zlib do
        raise BadItem("unreadable_depth") from error


def _add_sky(members: dict[str, bytes], found: Found, size: tuple[int, int]) -> None:
    """Add the mask, which has the image's size as displayed. BadItem unusable_sky unless it is an 8-bit grey PNG."""
    if found.sky is None:
        return
    sky = found.sky if isinstance(found.sky, bytes) else png_of(found.sky.astype(np.uint8) * 255)
    sky_size = header.png_size(sky, "L")
    if sky_size is None or (sky_size.width, sky_size.height) != size or not header.mask_decodes(sky):
        raise BadItem("unusable_sky")
    members["sky.png"] = sky
