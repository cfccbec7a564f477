"""NumPy reference of docs/perturbations.md, section by section, in double precision.

Written from that text alone: no DALI, no torch, no Pillow, and of `dataio` only the dataclasses that carry the draws.
Colour and blur are neither rounded nor clipped; `quantise` rounds. `clean` and `student` are whole views.

Shape suffixes: H W pixels of any image, S those of the square output, C channel.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from fractions import Fraction
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
CPU_SHARPNESS, GPU_SHARPNESS = -0.75, -0.5  # Keys' a: OpenCV's, DALI's
LONG = 16  # resized sides of so many outputs
NODES_PER_PIXEL = 32  # of DALI's tabulated kernel
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
    return Geometry(
        height=resized_h,
        width=resized_w,
        top=math.floor(u_top * (resized_h - size + 1)),
        left=math.floor(u_left * (resized_w - size + 1)),
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


def resize(image_HWC: npt.NDArray[Any], window: Geometry, size: int) -> npt.NDArray[np.uint8]:
    """The window of the resized image, as on a CPU: width, then height, each rounded; a long image once."""
    rows_SH = _cubic_weights(image_HWC.shape[0], window.top, window.height, size, CPU_SHARPNESS)
    columns_SW = _cubic_weights(image_HWC.shape[1], window.left, window.width, size, CPU_SHARPNESS)
    resized = _along(1, columns_SW, image_HWC)
    if max(window.height, window.width) <= LONG * size:
        resized = quantise(resized).astype(np.float64)
    return quantise(_along(0, rows_SH, resized))


def resize_gpu(image_HWC: npt.NDArray[Any], window: Geometry, size: int) -> Floats:
    """As on a GPU: another kernel, tabulated, neither rounded nor clipped."""
    rows_SH = _cubic_weights(image_HWC.shape[0], window.top, window.height, size, GPU_SHARPNESS, NODES_PER_PIXEL)
    columns_SW = _cubic_weights(image_HWC.shape[1], window.left, window.width, size, GPU_SHARPNESS, NODES_PER_PIXEL)
    return _along(0, rows_SH, _along(1, columns_SW, image_HWC))


def _along(axis: int, weights: Floats, image_HWC: npt.NDArray[Any]) -> Floats:
    return np.moveaxis(np.tensordot(weights, image_HWC.astype(np.float64), (1, axis)), 0, axis)


def nearest_rows_columns(
    height: int, width: int, window: Geometry, size: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """For each row and column of the output, the one of the source that is taken."""
    rows = np.array([_holding(window.top + i, height, window.height) for i in range(size)])
    columns = np.array([_holding(window.left + i, width, window.width) for i in range(size)])
    return rows, columns[::-1] if window.flip else columns


def _holding(pixel: int, side: int, resized: int) -> int:
    """Pixel i of a side covers [i, i + 1): the one that holds the centre, on a border the one behind it."""
    return math.floor(Fraction(2 * pixel + 1, 2) * Fraction(side, resized))


def _cubic(distance: Floats, a: float) -> Floats:
    """Keys (1981), equation 15 with his a free."""
    t = np.abs(distance)
    near, far = (a + 2) * t**3 - (a + 3) * t**2 + 1, a * (t**3 - 5 * t**2 + 8 * t - 4)
    return np.where(t < 1, near, np.where(t < 2, far, 0.0))


def _cubic_weights(side: int, start: int, resized: int, size: int, a: float, nodes_per_pixel: int = 0) -> Floats:
    centres = (start + np.arange(size) + 0.5) * side / resized - 0.5
    first = np.floor(centres).astype(int) - 1
    weights_SW = np.zeros((size, side))
    for tap in range(4):
        distance = centres - (first + tap)
        if nodes_per_pixel:
            nodes = np.linspace(-2, 2, 4 * nodes_per_pixel + 1)
            weight = np.interp(distance, nodes, _cubic(nodes, a))
        else:
            weight = _cubic(distance, a)
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
    return flip(resize(image_HWC, window, size), window)


def student(image_HWC: npt.NDArray[Any], window: Geometry, draw: Photometric, size: int) -> Floats:
    """The student view before normalisation and CutMix."""
    return flip(perturb(resize(image_HWC, window, size), draw), window)


def perturb(image_HWC: npt.NDArray[Any], draw: Photometric) -> Floats:
    return np.clip(blur(recolour(image_HWC, draw), draw.blur_sigma), 0, 255)
