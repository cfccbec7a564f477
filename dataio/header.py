"""What an image's header tells before anything is decoded: size, and whether the sample can be used at all."""

from __future__ import annotations

import io
from dataclasses import dataclass

from PIL import Image

from dataio.types import Sample

MAX_PIXELS = 100_000_000  # more than any photograph; decoding would take gigabytes
_ROTATED = (5, 6, 7, 8)  # EXIF orientations that swap height and width; DALI applies them
_ORIENTATION = 0x0112


@dataclass(frozen=True, slots=True)
class ImageSize:
    """Pixels, as displayed."""

    height: int
    width: int


def look(sample: Sample, *, sidecar: bool) -> ImageSize | str:
    """The image's size, or the reason (of `dataio.quarantine.REASONS`) why the sample is unusable.

    The target must be a 16-bit grey PNG, of the image's size unless it comes from a `sidecar`.
    """
    try:
        # lazy: only the header is parsed
        with Image.open(io.BytesIO(sample.image), formats=("JPEG", "PNG", "WEBP")) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                return "too_large"
            exif = image.getexif() if image.format != "PNG" else _png_exif(image)
            if exif.get(_ORIENTATION) in _ROTATED:
                width, height = height, width
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        return "too_large"
    except Exception:  # noqa: BLE001  Pillow's plug-ins raise whatever they like on damaged files
        return "bad_image"
    size = ImageSize(height, width)
    if sample.target is not None:
        found = _png_size(sample.target, "I;16")
        if found is None:
            return "bad_target"
        if found != size and not sidecar:
            return "size_mismatch"
    if sample.sky is not None:
        found = _png_size(sample.sky, "L")
        if found is None:
            return "bad_target"
        if found != size:
            return "size_mismatch"
    return size


def _png_exif(image: Image.Image) -> Image.Exif:
    """What stands before the pixels: a PNG's getexif() would decode all of it."""
    exif = Image.Exif()
    if image.info.get("exif"):
        exif.load(image.info["exif"])
    return exif


def _png_size(png: bytes, mode: str) -> ImageSize | None:
    try:
        with Image.open(io.BytesIO(png), formats=("PNG",)) as image:
            # older Pillow calls 16-bit grey "I"
            fits = image.mode == mode or (mode == "I;16" and image.mode in ("I", "I;16B"))
            return ImageSize(image.height, image.width) if fits and image.width * image.height <= MAX_PIXELS else None
    except Exception:  # noqa: BLE001
        return None
