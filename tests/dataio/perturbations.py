"""NumPy reference of docs/perturbations.md, section by section, in double precision.

Written from that text alone: no DALI, no torch, no Pillow, and of `dataio` only the dataclasses that carry the draws.
Steps return what they are before rounding; `quantise` rounds. `clean` and `student` are whole views.

Shape suffixes: H W pixels of any image, S those of the square output, C channel.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from dataio.draws import Box, Geometry, Photometric
from dataio.spec import Perturbation

Floats = npt.NDArray[np.float64]

MEAN = np.array([0.485, 0.456, 0.406])
STD = np.array([0.229, 0.224, 0.225])
RGB_TO_YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.321], [0.211, -0.523, 0.311]])
MID_GREY = 128.0
NODES_PER_PIXEL = 32  # of the tabulated cubic kernel
BOX_ATTEMPTS = 256

_MASK = (1 << 64) - 1
_MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
_WEYL = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)


# ---- section 2: draws


def words(count: int, *identity: int | str) -> list[int]:
    """Philox4x64-10 (Salmon et al. 2011), keyed by a hash of the identity; the first block has counter 1."""
    key = int.from_bytes(hashlib.blake2b(json.dumps(identity).encode(), digest_size=16).digest(), "little")
    found: list[int] = []
    for counter in range(1, -(-count // 4) + 1):
        block, (k0, k1) = (counter, 0, 0, 0), (key & _MASK, key >> 64)
        for _ in range(10):
            high0, low0 = divmod(_MULTIPLIERS[0] * block[0], 1 << 64)
            high1, low1 = divmod(_MULTIPLIERS[1] * block[2], 1 << 64)
            block = (high1 ^ block[1] ^ k0, low1, high0 ^ block[3] ^ k1, low0)
            k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
        found += block
    return found[:count]


def uniforms(count: int, *identity: int | str) -> list[float]:
    return [(word >> 11) / 2**53 for word in words(count, *identity)]


def geometry(strengths: Perturbation, size: int, height: int, width: int, identity: tuple[int | str, ...]) -> Geometry:
    u_top, u_left, u_flip = uniforms(3, *identity, "geometry")
    short = min(height, width)
    resized_h, resized_w = (max(size, round(side * (size / short))) for side in (height, width))
    top, left = math.floor(u_top * (resized_h - size + 1)), math.floor(u_left * (resized_w - size + 1))
    return Geometry(
        top=top / resized_h,
        bottom=(top + size) / resized_h,
        left=left / resized_w,
        right=(left + size) / resized_w,
        flip=u_flip < strengths.flip_p,
    )


def photometric(strengths: Perturbation, identity: tuple[int | str, ...]) -> Photometric:
    u = uniforms(8, *identity, "photometric")
    factors: Mapping[str, Any] = {}
    if u[0] < strengths.jitter_p:
        names = ("brightness", "contrast", "saturation")
        limits = [(max(0.0, 1 - getattr(strengths, name)), 1 + getattr(strengths, name)) for name in names]
        factors = {name: low + (high - low) * v for name, (low, high), v in zip(names, limits, u[1:4], strict=True)}
        factors = {**factors, "hue_degrees": 360 * strengths.hue * (2 * u[4] - 1)}
    low, high = strengths.blur_sigma
    sigma = low + (high - low) * u[7] if u[6] < strengths.blur_p else 0.0
    return Photometric(**factors, grayscale=u[5] < strengths.grayscale_p, blur_sigma=sigma)


def cutmix_box(strengths: Perturbation, size: int, identity: tuple[int | str, ...]) -> Box | None:
    u = uniforms(2 + 3 * BOX_ATTEMPTS, *identity, "cutmix")
    if u[0] >= strengths.cutmix_p:
        return None
    smallest, largest = strengths.cutmix_area
    area = (smallest + (largest - smallest) * u[1]) * size**2
    low, high = strengths.cutmix_aspect
    for attempt in range(BOX_ATTEMPTS):
        aspect = low + (high - low) * u[2 + 3 * attempt]
        height, width = math.floor(math.sqrt(area * aspect)), math.floor(math.sqrt(area / aspect))
        left, top = math.floor(u[3 + 3 * attempt] * size), math.floor(u[4 + 3 * attempt] * size)
        if min(height, width) > 0 and max(top + height, left + width) <= size:
            return Box(top=top, left=left, bottom=top + height, right=left + width)
    return None


def cutmix_partner(own: int, share: int, seed: int, role: str, epoch: int, position: int) -> int:
    (word,) = words(1, seed, role, epoch, position, "partner")
    others = [*range(own + 1, share), *range(own)]
    return others[word % len(others)]


# ---- section 3: geometry


def resize(image_HWC: npt.NDArray[Any], window: Geometry, size: int) -> Floats:
    """The window of the image, `size` x `size`, by the cubic kernel; neither rounded nor clipped."""
    height, width = image_HWC.shape[:2]
    rows_SH = _cubic_weights(height, window.top, window.bottom, size)
    columns_SW = _cubic_weights(width, window.left, window.right, size)
    return np.einsum("ih,hjc->ijc", rows_SH, np.einsum("jw,hwc->hjc", columns_SW, image_HWC.astype(np.float64)))


def source_places(side: int, start: float, end: float, size: int) -> Floats:
    """Where the centres of the output's pixels lie in the source: pixel i covers [i, i + 1)."""
    begin, stop = float(np.float32(start)) * side, float(np.float32(end)) * side
    return begin + (np.arange(size) + 0.5) * (stop - begin) / size


def nearest_rows_columns(height: int, width: int, window: Geometry, size: int) -> tuple[Floats, Floats]:
    """For each row and column of the output, its place in the source: its whole part is the pixel that is taken."""
    rows = source_places(height, window.top, window.bottom, size)
    columns = source_places(width, window.left, window.right, size)
    return rows, columns[::-1] if window.flip else columns


def _cubic(distance: Floats) -> Floats:
    t = np.abs(distance)
    near, far = 1.5 * t**3 - 2.5 * t**2 + 1, -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2
    return np.where(t < 1, near, np.where(t < 2, far, 0.0))


def _cubic_weights(side: int, start: float, end: float, size: int) -> Floats:
    nodes = np.linspace(-2, 2, 4 * NODES_PER_PIXEL + 1)
    centres = source_places(side, start, end, size) - 0.5
    first = np.floor(centres).astype(int) - 1
    weights_SW = np.zeros((size, side))
    for tap in range(4):
        weight = np.interp(centres - (first + tap), nodes, _cubic(nodes))
        np.add.at(weights_SW, (np.arange(size), np.clip(first + tap, 0, side - 1)), weight)
    return weights_SW


# ---- section 4: colour and blur


def colour_matrix(draw: Photometric) -> tuple[Floats, float]:
    """(A, b) of the one affine map A x + b that all colour operations of a draw are."""
    angle = math.radians(draw.hue_degrees)
    saturation = 0.0 if draw.grayscale else draw.saturation
    turn = np.array([[1, 0, 0], [0, math.cos(angle), math.sin(angle)], [0, -math.sin(angle), math.cos(angle)]])
    chroma = np.linalg.inv(RGB_TO_YIQ) @ turn @ np.diag([1, saturation, saturation]) @ RGB_TO_YIQ
    gain = draw.brightness * draw.contrast
    return gain * chroma, draw.brightness * (1 - draw.contrast) * MID_GREY


def recolour(image_HWC: npt.NDArray[Any], draw: Photometric) -> Floats:
    matrix, offset = colour_matrix(draw)
    return image_HWC.astype(np.float64) @ matrix.T + offset


def blur(image_HWC: npt.NDArray[Any], sigma: float) -> Floats:
    radius = math.ceil(3 * sigma)
    if radius == 0:
        return image_HWC.astype(np.float64)
    kernel = np.exp(-(np.arange(-radius, radius + 1) ** 2) / (2 * sigma**2))
    kernel /= kernel.sum()
    blurred = image_HWC.astype(np.float64)
    for axis in (0, 1):
        side = blurred.shape[axis]
        there = np.abs(np.arange(-radius, side + radius))  # mirrored about the centre of the first pixel ...
        there = side - 1 - np.abs(side - 1 - there)  # ... and of the last
        padded = np.take(blurred, there, axis=axis)
        shifted = (np.take(padded, range(i, i + side), axis=axis) for i in range(2 * radius + 1))
        blurred = np.sum([k * part for k, part in zip(kernel, shifted, strict=True)], axis=0)
    return blurred


# ---- section 5: rounding, flip, normalisation


def quantise(values: Floats) -> npt.NDArray[np.uint8]:
    return np.clip(np.floor(values + 0.5), 0, 255).astype(np.uint8)


def flip(image: npt.NDArray[Any], window: Geometry) -> npt.NDArray[Any]:
    return image[:, ::-1] if window.flip else image


def normalise(image_HWC: npt.NDArray[Any]) -> Floats:
    return ((image_HWC / 255 - MEAN) / STD).transpose(2, 0, 1)


def clean(image_HWC: npt.NDArray[Any], window: Geometry, size: int) -> npt.NDArray[np.uint8]:
    """The clean view before normalisation."""
    return flip(quantise(resize(image_HWC, window, size)), window)


def student(image_HWC: npt.NDArray[Any], window: Geometry, draw: Photometric, size: int) -> npt.NDArray[np.uint8]:
    """The student view before normalisation and CutMix."""
    image = quantise(resize(image_HWC, window, size))
    image = quantise(recolour(image, draw))
    image = quantise(blur(image, draw.blur_sigma))
    return flip(image, window)
