"""What an image's header tells before anything is decoded: size, and whether the sample can be used at all.

And, for who has read a whole image, whether and as what the stream's decoder shows it.

Shape suffixes: H W pixels, C channel.
"""

from __future__ import annotations

import io
import struct
import warnings
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from PIL import Image

from dataio.types import Sample

if TYPE_CHECKING:
    from dataio.dali_batch import Probe

MAX_PIXELS = 100_000_000  # more than any photograph; decoding would take gigabytes
# One side in terms of the other: the shorter is brought to the network's input, and the longer with it. Beyond this no
# panorama goes, and some way beyond it the resized picture has more pixels than 32 bits count.
MAX_ELONGATION = 10_000
EXTENSIONS = ("jpg", "jpeg", "png", "webp")  # of a sample's image, and of photographs that are looked for
FORMATS = ("JPEG", "PNG", "WEBP")  # what Pillow may open; by content, whatever the file is called
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_ORIENTATION = 0x0112
# EXIF orientations other than upright, which DALI undoes, and what undoes them here; the last four swap the sides
_UNDO = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SWAPPED = (5, 6, 7, 8)

# The limits above stand in its place, and it names no file.
warnings.simplefilter("ignore", Image.DecompressionBombWarning)


@dataclass(frozen=True, slots=True)
class ImageSize:
    """Pixels, as displayed."""

    height: int
    width: int


def look(sample: Sample, *, sidecar: bool) -> ImageSize | str:
    """The image's size, or the reason (of `dataio.quarantine.REASONS`) why the sample is unusable.

    The target must be a 16-bit grey PNG, of the image's size and of an image that EXIF leaves as it is, unless it comes
    from a `sidecar`. A float map (`Sample.target`) is not looked into: it tells its size only when it is read.
    """
    try:
        # lazy: only the header is parsed
        with Image.open(io.BytesIO(sample.image), formats=FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS or max(width, height) > MAX_ELONGATION * min(width, height):
                return "too_large"
            orientation = _orientation(image, sample.image)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        return "too_large"
    except Exception:  # noqa: BLE001  Pillow's plug-ins raise whatever they like on damaged files
        return "bad_image"
    size = ImageSize(width, height) if orientation in _SWAPPED else ImageSize(height, width)
    if sample.target is not None and not sidecar and orientation in _UNDO:
        return "rotated_by_exif"  # the decoder turns the picture, and nobody turns its map
    is_float = sample.code is None and sample.quantity is not None
    if sample.target is not None and not is_float:
        found = png_size(sample.target, "I;16")
        if found is None:
            return "bad_target"
        if found != size and not sidecar:
            return "size_mismatch"
    if sample.sky is not None:
        found = png_size(sample.sky, "L")
        if found is None:
            return "bad_target"
        if found != size:
            return "size_mismatch"
    return size


def is_turned(image: bytes) -> bool:
    """Whether EXIF has an image that `look` takes displayed otherwise than it is stored."""
    with Image.open(io.BytesIO(image), formats=FORMATS) as picture:
        return _orientation(picture, image) in _UNDO


def png_size(png: bytes, mode: str) -> ImageSize | None:
    """The size of a PNG of Pillow's `mode` "I;16" or "L"; None for any other, and for one that is too large."""
    try:
        with Image.open(io.BytesIO(png), formats=("PNG",)) as image:
            # older Pillow calls 16-bit grey "I"
            fits = image.mode == mode or (mode == "I;16" and image.mode in ("I", "I;16B"))
            return ImageSize(image.height, image.width) if fits and image.width * image.height <= MAX_PIXELS else None
    except Exception:  # noqa: BLE001
        return None


def is_png(image: bytes) -> bool:
    """Whether it begins like a PNG: of these Pillow shows more than DALI does, such as those that are cut."""
    return image[:8] == _PNG_SIGNATURE


def decodes(image: bytes) -> bool:
    """Whether the stream's decoder takes all of an image that `look` takes.

    DALI itself is asked about a PNG. On damaged JPEG and WebP files Pillow judges as it does, and is here in any case.
    """
    if is_png(image):
        return _probe().decodes(image)
    return _loads(image, FORMATS)


def mask_decodes(png: bytes) -> bool:
    """Whether the stream's decoder takes all of a sky mask."""
    return _loads(png, ("PNG",))


def displayed(image: bytes) -> npt.NDArray[np.uint8]:
    """An image that `look` takes as the stream shows it: turned as EXIF says, uint8 RGB [H, W, 3], writable.

    Raises whatever Pillow's plug-ins raise when it is damaged.
    """
    with Image.open(io.BytesIO(image), formats=FORMATS) as picture:
        turn = _UNDO.get(_orientation(picture, image))
        colours = in_colours(picture)
        return np.array(colours if turn is None else colours.transpose(turn))


def in_colours(picture: Image.Image) -> Image.Image:
    """RGB of 8 bits, of an image of any mode."""
    if picture.mode.startswith("I"):  # 16-bit grey, which Pillow clips where DALI divides
        return Image.fromarray((np.asarray(picture).astype(np.uint32) >> 8).astype(np.uint8)).convert("RGB")
    return picture.convert("RGB")


@cache
def _probe() -> Probe:
    from dataio.dali_batch import Probe  # seconds, and most datasets have no PNG

    return Probe()


def _loads(data: bytes, formats: tuple[str, ...]) -> bool:
    try:
        with Image.open(io.BytesIO(data), formats=formats) as image:
            image.draft("RGB", (1, 1))  # of a JPEG an eighth of the size: every byte is read still
            image.load()
    except Exception:  # noqa: BLE001
        return False
    return True


def _orientation(image: Image.Image, data: bytes) -> int:
    """The orientation that DALI sees: of EXIF wherever it stands, not that of XMP, which Pillow's getexif() also reads.

    A PNG's getexif() would decode all of it, besides.
    """
    raw = image.info.get("exif") or (_late_exif(data) if image.format == "PNG" else None)
    exif = Image.Exif()
    if raw:
        exif.load(raw)
    found: int = exif.get(_ORIENTATION, 1)
    return found


def _late_exif(png: bytes) -> bytes | None:
    """The eXIf chunk, which may stand behind the pixels: a step a chunk."""
    place = len(_PNG_SIGNATURE)
    while place + 8 <= len(png):
        (length,) = struct.unpack(">I", png[place : place + 4])
        if png[place + 4 : place + 8] == b"eXIf":
            return png[place + 8 : place + 8 + length]
        place += 12 + length
    return None
