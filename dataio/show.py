"""Looking at a dataset: a sheet of samples, each as picture, coloured target and histogram.

Shape suffixes: H W pixels, C colour channel (RGB).
"""

from __future__ import annotations

import bisect
import io
import json
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from cluster import storage
from dataio import label_codec
from dataio.codec import code_of, decode_npy, decode_png16
from dataio.dataset import Dataset
from dataio.header import EXTENSIONS, displayed
from dataio.index import SampleEntry, read_member
from dataio.labels import LabelStore
from dataio.spec import DataError
from dataio.types import Quantity

# ColorBrewer's Spectral, far to near
_SPECTRAL = "5e4fa2 3288bd 66c2a5 abdda4 e6f598 ffffbf fee08b fdae61 f46d43 d53e4f 9e0142"
_STOPS = np.array([list(bytes.fromhex(stop)) for stop in _SPECTRAL.split()], np.float64)
_HOLE = 48  # grey of invalid pixels
_TILE = 240  # width of a picture, pixels
_CAPTION = 16
_GAP = 6
_BINS = 40

Map = npt.NDArray[np.float32]


def colorize(
    map_HW: npt.ArrayLike, valid_HW: npt.NDArray[np.bool_] | None = None, *, quantity: Quantity = "disparity"
) -> npt.NDArray[np.uint8]:
    """A map as a picture, uint8 [H, W, C]: near is red, far is blue, invalid is dark grey.

    The colours span percentiles 2 to 98 of the valid pixels. `valid_HW` None takes the finite ones. ValueError unless
    both are [H, W].
    """
    map_HW = np.asarray(map_HW, np.float64)
    valid_HW = np.ones(map_HW.shape, bool) if valid_HW is None else valid_HW
    if map_HW.ndim != 2 or valid_HW.shape != map_HW.shape:
        raise ValueError(f"needs maps [H, W] of one shape, got {map_HW.shape} and {valid_HW.shape}")
    valid_HW = valid_HW & np.isfinite(map_HW)
    picture_HWC = np.full((*map_HW.shape, 3), _HOLE, np.uint8)
    if valid_HW.any():
        low, high = np.percentile(map_HW[valid_HW], (2, 98))
        picture_HWC[valid_HW] = _colours(map_HW[valid_HW], low, high, quantity)
    return picture_HWC


def contact_sheet(dataset: str, count: int = 8, seed: int = 0, labels: str | None = None) -> Image.Image:
    """A picture of `count` samples drawn by `seed`, one per row: photograph, target, histogram.

    `dataset` and `labels` are folders or URLs; `labels` shows the sidecar's disparity in place of the dataset's own
    target. Without a target the histogram is that of the colours. A bad sample has a row that says what is wrong.
    Raises DataError when the dataset or the labels cannot be opened, or `count` is below 1.
    """
    if count < 1:
        raise DataError(f"count is {count}: it must be at least 1")
    opened = Dataset.open(dataset)
    store = LabelStore.open(labels) if labels is not None else None
    total = opened.info.samples
    chosen = sorted(random.Random(seed).sample(range(total), min(count, total)))
    rows = [_row(opened, place, store) for place in chosen]
    width = max(row.width for row in rows)
    sheet = Image.new("RGB", (width, sum(row.height + _GAP for row in rows) - _GAP), "white")
    top = 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height + _GAP
    return sheet


def save(sheet: Image.Image, path: str) -> None:
    """Write a sheet as PNG or JPEG, by the ending of `path`, atomically. DataError for another ending."""
    formats = {"png": "PNG", "jpg": "JPEG", "jpeg": "JPEG"}
    ending = path.rpartition(".")[2].lower()
    if ending not in formats:
        raise DataError(f"{path}: cannot write .{ending}: name it .png or .jpg")
    out = io.BytesIO()
    sheet.save(out, format=formats[ending])
    storage.atomic_write(path, out.getvalue())


def _row(dataset: Dataset, place: int, store: LabelStore | None) -> Image.Image:
    which = bisect.bisect_right(dataset.starts, place) - 1
    shard = dataset.shards[which]
    entry = shard.index.samples[place - dataset.starts[which]]
    try:
        picture = _picture(dataset, which, entry)
    except DataError as error:
        return _text_row(f"{shard.stem}/{entry.key}: {error}")
    scaled = picture.resize((_TILE, max(1, round(_TILE * picture.height / picture.width))))
    tiles = [scaled]
    caption = f"{entry.key}   {picture.width} x {picture.height}"
    try:
        target = _target(dataset, which, entry, store)
        if target is None:
            tiles.append(_histogram_of_colours(scaled))
        else:
            map_HW, quantity = target
            # without smoothing: mixing the two sides of an edge, or a hole with a value, would show what is not there
            coloured = Image.fromarray(colorize(map_HW, quantity=quantity))
            tiles.append(coloured.resize(scaled.size, Image.Resampling.NEAREST))
            tiles.append(_histogram(map_HW, quantity, scaled.height))
            caption += "   " + _range(map_HW, quantity)
    except DataError as error:
        caption += f"   {error}"
    return _beside(tiles, caption)


def _picture(dataset: Dataset, which: int, entry: SampleEntry) -> Image.Image:
    extension = next((name for name in EXTENSIONS if name in entry.members), None)
    if extension is None:
        raise DataError(f"no image among {', '.join(entry.members)}")
    data = dataset.shards[which].read(entry, extension)
    try:
        return Image.fromarray(displayed(data or b""))
    except Exception as error:  # Pillow's plug-ins raise whatever they like on damaged files
        raise DataError(f"unreadable image ({error})") from error


def _target(dataset: Dataset, which: int, entry: SampleEntry, store: LabelStore | None) -> tuple[Map, Quantity] | None:
    """The map, NaN at holes, and its quantity; None when unlabelled."""
    shard, info = dataset.shards[which], dataset.info
    if store is not None:
        found = next((label for label in store.index(shard.stem).samples if label.key == entry.key), None)
        if found is None:
            raise DataError(f"not in label shard {shard.stem}")
        meta = _meta(read_member(store.tar(shard.stem), found, "json"))
        extension = label_codec.member_of(found.members)
        label = read_member(store.tar(shard.stem), found, extension) if extension else None
        if extension is None or label is None:
            raise DataError(f"no label: {meta.get('failure', 'reason unknown')}")
        return label_codec.decode(extension, label, meta), "disparity"
    if info.quantity is None:
        return None
    array = shard.read(entry, "depth.npy")
    if array is not None:
        return decode_npy(array, info.quantity), info.quantity
    png = shard.read(entry, "depth.png")
    code = code_of(_meta(shard.read(entry, "json")), info.code)
    if png is None or code is None:
        raise DataError("no target")
    return decode_png16(png, code), info.quantity


def _meta(data: bytes | None) -> Mapping[str, Any]:
    if data is None:
        return {}
    try:
        content = json.loads(data)
    except ValueError as error:
        raise DataError(f"unreadable JSON ({error})") from error
    return content if isinstance(content, dict) else {}


def _range(map_HW: Map, quantity: Quantity) -> str:
    valid_N = map_HW[np.isfinite(map_HW)]
    if not valid_N.size:
        return "no valid pixel"
    unit = " m" if quantity == "depth_m" else ""
    low, middle, high = valid_N.min(), np.median(valid_N), valid_N.max()
    holes = 100 * (1 - valid_N.size / map_HW.size)
    return f"{quantity.removesuffix('_m')} {low:.3g} .. {middle:.3g} .. {high:.3g}{unit}, {holes:.0f} % holes"


def _colours(value_N: npt.NDArray[Any], low: float, high: float, quantity: Quantity) -> npt.NDArray[np.uint8]:
    """uint8 [N, C], for values between `low` and `high`."""
    near_N = np.clip((value_N - low) / max(high - low, 1e-12), 0, 1)
    at_N = (1 - near_N if quantity == "depth_m" else near_N) * (len(_STOPS) - 1)
    colour_NC = np.stack([np.interp(at_N, np.arange(len(_STOPS)), _STOPS[:, c]) for c in range(3)], axis=-1)
    return np.rint(colour_NC).astype(np.uint8)


def _histogram(map_HW: Map, quantity: Quantity, height: int) -> Image.Image:
    """Bars in the colours of `colorize`."""
    tile = Image.new("RGB", (_TILE, height), "white")
    valid_N = map_HW[np.isfinite(map_HW)]
    if not valid_N.size:
        return tile
    counts, edges = np.histogram(valid_N, bins=_BINS)
    low, high = np.percentile(valid_N, (2, 98))
    colours_NC = _colours((edges[:-1] + edges[1:]) / 2, low, high, quantity)
    draw, font = ImageDraw.Draw(tile), ImageFont.load_default(size=10)
    floor, step = height - 14, (_TILE - 4) / _BINS
    for i, count in enumerate(counts):
        top = min(floor - 1, floor - (floor - 4) * count / counts.max())
        draw.rectangle((2 + i * step, top, 1 + (i + 1) * step, floor), fill=tuple(colours_NC[i].tolist()))
    draw.text((2, height - 12), f"{edges[0]:.3g}", fill="black", font=font)
    draw.text((_TILE - 2, height - 12), f"{edges[-1]:.3g}", fill="black", font=font, anchor="ra")
    return tile


def _histogram_of_colours(picture: Image.Image) -> Image.Image:
    tile = Image.new("RGB", (_TILE, picture.height), "white")
    counts = np.array(picture.histogram(), np.float64).reshape(3, 64, 4).sum(-1)
    top = counts[:, 1:-1].max() or 1.0  # clipped shadows and lights would flatten the rest
    for channel, colour in enumerate(("#d02020", "#20a020", "#2040d0")):
        scaled = np.clip(counts[channel] / top, 0, 1) * (picture.height - 6)
        points = [(2 + i * (_TILE - 4) / 63, picture.height - 2 - float(v)) for i, v in enumerate(scaled)]
        ImageDraw.Draw(tile).line(points, fill=colour, width=2)
    return tile


def _beside(tiles: list[Image.Image], caption: str) -> Image.Image:
    height = max(tile.height for tile in tiles) + _CAPTION
    row = Image.new("RGB", (max(2, len(tiles)) * (_TILE + _GAP) - _GAP, height), "white")
    ImageDraw.Draw(row).text((2, 1), caption, fill="black", font=ImageFont.load_default(size=11))
    for i, tile in enumerate(tiles):
        row.paste(tile, (i * (_TILE + _GAP), _CAPTION))
    return row


def _text_row(text: str) -> Image.Image:
    row = Image.new("RGB", (3 * _TILE + 2 * _GAP, 2 * _CAPTION), "#ffe0e0")
    ImageDraw.Draw(row).text((4, 8), text, fill="black", font=ImageFont.load_default(size=11))
    return row
