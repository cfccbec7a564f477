"""Damaged and odd samples, and tars, for all that reads shards: the loader, and labelling.

Shape suffixes: H W pixels.
"""

from __future__ import annotations

import io
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from .fakes import Shards, jpeg, labelled, metadata, png, shards_of, smooth, write_dataset

H, W = 28, 42
VICTIM = "s0_002"


def good(seed: int) -> dict[str, bytes]:
    return labelled(seed, H, W)


def clean_shards() -> list[dict[str, dict[str, bytes]]]:
    return shards_of([6, 6], good)


def with_victim(members: Mapping[str, bytes]) -> Shards:
    first, second = clean_shards()
    return [{key: members if key == VICTIM else value for key, value in first.items()}, second]


def everything() -> set[str]:
    return {key for shard in clean_shards() for key in shard}


def npy(value_HW: Any) -> bytes:
    out = io.BytesIO()
    np.save(out, value_HW)
    return out.getvalue()


def npz(value_HW: Any) -> bytes:
    out = io.BytesIO()
    np.savez(out, value_HW)
    return out.getvalue()


def claimed_npy(shape: str) -> bytes:
    """A `.npy` whose header states a shape that its data do not have."""
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + bytes(64)


def huge_png(width: int = 20_000, height: int = 20_000) -> bytes:
    """A sound PNG of one bit per pixel: 50 kB that decode to 1.2 GB of colours."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    ihdr = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes(height * (1 + (width + 7) // 8)), 1)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", ihdr) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def huge_jpeg(side: int = 20_000) -> bytes:
    """A JPEG whose header states `side` x `side`; the data are those of a small one."""
    data = bytearray(good(0)["jpg"])
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", side, side)
    return bytes(data)


def depth(value_HW: Any) -> dict[str, bytes]:
    return {"jpg": good(2)["jpg"], "depth.npy": npy(value_HW)}


def changed(**members: bytes) -> dict[str, bytes]:
    """A good sample with these members in place of its own."""
    return {**good(2), **{name.replace("_", "."): data for name, data in members.items()}}


ONES_HW = np.ones((H, W), np.float32)
HOLES_HW = np.full((H, W), np.nan, np.float32)
FAULTS: dict[str, tuple[str, Callable[[], dict[str, bytes]]]] = {
    "truncated JPEG": ("bad_image", lambda: changed(jpg=good(2)["jpg"][: len(good(2)["jpg"]) // 2])),
    "JPEG without an end": ("bad_image", lambda: changed(jpg=good(2)["jpg"][:-2])),
    "no image at all": ("bad_image", lambda: changed(jpg=b"<html>404</html>")),
    "zero-byte image": ("bad_image", lambda: changed(jpg=b"")),
    "zero-byte depth": ("bad_target", lambda: changed(depth_png=b"")),
    "zero-byte metadata": ("bad_metadata", lambda: changed(json=b"")),
    "missing image": ("missing_image", lambda: {"depth.png": good(2)["depth.png"]}),
    "missing depth": ("missing_target", lambda: {"jpg": good(2)["jpg"]}),
    "only something else": ("missing_image", lambda: {"txt": b"a note"}),
    "20000 x 20000 PNG": ("too_large", lambda: {"png": huge_png(), "depth.png": good(2)["depth.png"]}),
    "20000 x 20000 JPEG": ("too_large", lambda: changed(jpg=huge_jpeg())),
    "1 x 5000000 PNG": ("too_large", lambda: {"png": huge_png(1, 5_000_000), "depth.png": good(2)["depth.png"]}),
    "5000000 x 1 PNG": ("too_large", lambda: {"png": huge_png(5_000_000, 1), "depth.png": good(2)["depth.png"]}),
    "20000 x 20000 depth": ("bad_target", lambda: changed(depth_png=huge_png())),
    "JPEG turned by EXIF 2": ("rotated_by_exif", lambda: changed(jpg=turned_jpeg(2))),
    "JPEG turned by EXIF 3": ("rotated_by_exif", lambda: changed(jpg=turned_jpeg(3))),
    "JPEG turned by EXIF 6": ("rotated_by_exif", lambda: changed(jpg=turned_jpeg(6))),
    "PNG turned by EXIF": (
        "rotated_by_exif",
        lambda: {"png": encoded(photograph(), "PNG", exif=turned(3)), "depth.png": good(2)["depth.png"]},
    ),
    "JPEG turned by EXIF with a float depth": (
        "rotated_by_exif", lambda: {"jpg": turned_jpeg(3), "depth.npy": npy(ONES_HW)}
    ),
    "wrong depth size": ("size_mismatch", lambda: changed(depth_png=png(np.ones((H, W + 1), np.uint16)))),
    "transposed depth": ("size_mismatch", lambda: changed(depth_png=png(np.ones((W, H), np.uint16)))),
    "wrong size of .npy": ("size_mismatch", lambda: depth(np.ones((H + 1, W), np.float32))),
    "8-bit depth": ("bad_target", lambda: changed(depth_png=png(np.ones((H, W), np.uint8)))),
    "truncated depth": ("bad_target", lambda: changed(depth_png=good(2)["depth.png"][:-600])),
    "NaN depth (.npy)": ("no_valid_pixels", lambda: depth(HOLES_HW)),
    "infinite depth (.npy)": ("no_valid_pixels", lambda: depth(np.full((H, W), np.inf, np.float32))),
    "negative depth (.npy)": ("no_valid_pixels", lambda: depth(-ONES_HW)),
    "all-hole depth": ("no_valid_pixels", lambda: changed(depth_png=png(np.zeros((H, W), np.uint16)))),
    "codes of depths below 0": ("no_valid_pixels", lambda: changed(json=metadata(scale=1, zero=65535))),
    "truncated .npy": ("bad_target", lambda: {"jpg": good(2)["jpg"], "depth.npy": npy(ONES_HW)[:-9]}),
    ".npy of three dimensions": ("bad_target", lambda: depth(ONES_HW[None])),
    ".npy of no pixels": ("bad_target", lambda: depth(ONES_HW[:0])),
    ".npy of integers": ("bad_target", lambda: depth(ONES_HW.astype(np.int32))),
    ".npy that holds an archive": ("bad_target", lambda: {"jpg": good(2)["jpg"], "depth.npy": npz(ONES_HW)}),
    ".npy that holds half an archive": (
        "bad_target", lambda: {"jpg": good(2)["jpg"], "depth.npy": npz(ONES_HW)[:300]}
    ),
    ".npy that claims terabytes": (
        "bad_target", lambda: {"jpg": good(2)["jpg"], "depth.npy": claimed_npy("(4000000, 4000000)")}
    ),
    ".npy whose header is cut open": (
        "bad_target", lambda: {"jpg": good(2)["jpg"], "depth.npy": claimed_npy("(28, [[")}
    ),
    "metadata that nest too deep": ("bad_metadata", lambda: changed(json=b"[" * 100_000)),
    "metadata with a number of 5000 digits": ("bad_metadata", lambda: changed(json=b'{"scale": ' + b"9" * 5000 + b"}")),
    "metadata with a number of 400 digits": ("bad_metadata", lambda: changed(json=b'{"scale": ' + b"9" * 400 + b"}")),
    "metadata with a number of 200 bits": ("bad_metadata", lambda: changed(json=metadata(zero=2**200))),
    "metadata with a scale beyond float32": ("bad_metadata", lambda: changed(json=metadata(scale=1e300))),
    "metadata with a scale whose codes are": ("bad_metadata", lambda: changed(json=metadata(scale=1e37))),
    "metadata with a shift beyond float32": ("bad_metadata", lambda: changed(json=metadata(scale=1, shift=-1e39))),
    "metadata with a NaN": ("bad_metadata", lambda: changed(json=b'{"scale": NaN}')),
    "metadata that are no object": ("bad_metadata", lambda: changed(json=b"[1]")),
    "metadata in another encoding": ("bad_metadata", lambda: changed(json=b'{"\xff\xfe": 1}')),
}  # fmt: skip


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def turned_jpeg(orientation: int) -> bytes:
    """A picture that is displayed H x W."""
    return jpeg(smooth(2, *((W, H) if orientation > 4 else (H, W))), exif=turned(orientation))


def photograph(height: int = H, width: int = W) -> Image.Image:
    return Image.fromarray(smooth(2, height, width))


def four_inks() -> Image.Image:
    """Cyan, magenta, yellow and a black that is not 0 everywhere."""
    return Image.fromarray(np.concatenate([smooth(2, H, W), smooth(3, H, W)[..., :1]], axis=-1), "CMYK")


def sixteen_bits() -> bytes:
    grey_HW = smooth(2, H, W)[..., 0].astype(np.uint16) * 257
    return png(grey_HW)


def by_pillow(data: bytes) -> np.ndarray:
    """The picture as displayed, RGB [H, W, C], by another decoder."""
    with Image.open(io.BytesIO(data)) as image:
        if image.mode.startswith("I"):
            return np.repeat((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8)[..., None], 3, axis=-1)
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


EXACT, BY_DCT = 1.01, 4.01  # grey levels; the second where two JPEG decoders round in their own ways
ODDITIES: dict[str, tuple[str, float, Callable[[], bytes]]] = {
    "CMYK JPEG": ("jpg", BY_DCT, lambda: encoded(four_inks(), "JPEG", quality=98)),
    "greyscale JPEG": ("jpg", BY_DCT, lambda: encoded(photograph().convert("L"), "JPEG", quality=95)),
    "progressive JPEG": ("jpg", BY_DCT, lambda: jpeg(smooth(2, H, W), progressive=True)),
    "JPEG called png": ("png", BY_DCT, lambda: jpeg(smooth(2, H, W))),
    "greyscale PNG": ("png", EXACT, lambda: encoded(photograph().convert("L"), "PNG")),
    "black and white PNG": ("png", EXACT, lambda: encoded(photograph().convert("1"), "PNG")),
    "16-bit grey PNG": ("png", EXACT, sixteen_bits),
    "palette PNG": ("png", EXACT, lambda: encoded(photograph().quantize(64), "PNG")),
    "RGBA PNG": ("png", EXACT, lambda: encoded(photograph().convert("RGBA"), "PNG")),
    "WebP": ("webp", EXACT, lambda: encoded(photograph(), "WEBP", lossless=True)),
    **{f"JPEG with EXIF {n}, upright": ("jpg", BY_DCT, partial(turned_jpeg, n)) for n in (0, 1)},
}
TURNED: dict[str, tuple[str, float, Callable[[], bytes]]] = {  # their maps are labels: of what was displayed
    **{f"JPEG turned by EXIF {n}": ("jpg", BY_DCT, partial(turned_jpeg, n)) for n in range(2, 9)},
    "PNG turned by EXIF": ("png", EXACT, lambda: encoded(photograph(W, H), "PNG", exif=turned(6))),
    "WebP turned by EXIF": ("webp", EXACT, lambda: encoded(photograph(W, H), "WEBP", lossless=True, exif=turned(8))),
}


@dataclass(frozen=True)
class Entry:
    """A member to write: any name, any type."""

    name: str
    data: bytes = b""
    type: bytes = tarfile.REGTYPE
    link: str = ""


def entries_of(samples: Mapping[str, Mapping[str, bytes]]) -> list[Entry]:
    return [
        Entry(f"{key}.{extension}", data) for key, members in samples.items() for extension, data in members.items()
    ]


def write_tar(path: Path, entries: Iterable[Entry]) -> None:
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT, encoding="utf-8", errors="surrogateescape") as tar:
        for entry in entries:
            info = tarfile.TarInfo(entry.name)
            info.size, info.type, info.linkname = len(entry.data), entry.type, entry.link
            tar.addfile(info, io.BytesIO(entry.data))


def dataset_of(folder: Path, first: Sequence[Entry], samples: int = 12) -> str:
    """The clean dataset with another first shard."""
    write_dataset(folder, clean_shards(), samples=samples)
    write_tar(folder / "shards" / "000000.tar", first)
    return str(folder)
