"""Colour of the synthetic scenes: 16 procedural textures, light and shadow, air, lens and noise.

Colours are linear light; the picture is encoded with gamma 2. Textures are small periodic tiles in [0, 1], stored at
several degrees of blur, so that one look-up per pixel is both textured and free of aliasing.

Shape suffixes: H W pixels, N pixels that hit something, C colour channel (RGB), K shapes, 3 world axes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from dataio.synth_scene import Array, Camera, Shape, Traced, Vector

Floats = npt.NDArray[np.float32]

# The order is part of the domains: a domain uses the first so many.
TEXTURES = (
    "mottle", "checker", "stripes", "bricks", "plain", "dots", "planks", "tiles",
    "waves", "rings", "zigzag", "plaid", "marble", "cells", "speckle", "gradient",
)  # fmt: skip

_TILE = 128  # texels on a side
_LEVELS = 7  # blurred over 1, 2, 4 ... 64 texels
_SHADOW_BIAS_M = 1e-3
_CLOUD_BLUR = 2  # a level of the first texture
_HAZE_FROM = 0.65  # fraction of the farthest depth at which the haze begins


@dataclass(frozen=True, kw_only=True)
class Light:
    """A distant lamp and the light of the surroundings."""

    towards: Vector  # unit vector from the scene to the lamp
    colour: Vector
    ambient: Vector
    shadow: float = 0.8  # share of the lamp that a shadow takes


@dataclass(frozen=True, kw_only=True)
class Air:
    """Sky, fog and the end of the world: at `far_m` of depth the haze has hidden everything behind `horizon`."""

    horizon: Vector
    zenith: Vector
    far_m: float
    fog_per_m: float = 0.0
    clouds: float = 0.0


def _noise(cells: int, seed: int) -> Array:
    """Periodic value noise [tile, tile] in [0, 1] with `cells` lattice cells on a side."""
    words = np.random.Philox(key=seed).random_raw(cells * cells)
    lattice = (words >> np.uint64(40)).reshape(cells, cells) / float(1 << 24)
    position = np.arange(_TILE) * cells / _TILE
    low = position.astype(np.intp)
    part = position - low
    part = part * part * (3 - 2 * part)
    high = (low + 1) % cells
    rows = lattice[low] * (1 - part)[:, None] + lattice[high] * part[:, None]
    return np.asarray(rows[:, low] * (1 - part) + rows[:, high] * part)


def _tile(kind: str) -> Array:
    """One texture [tile, tile] in [0, 1], periodic in both directions."""
    u, v = np.meshgrid((np.arange(_TILE) + 0.5) / _TILE, (np.arange(_TILE) + 0.5) / _TILE)
    turn = 2 * np.pi
    cloud = 0.5 * _noise(4, 1) + 0.3 * _noise(8, 2) + 0.2 * _noise(16, 3)
    plank = np.floor(8 * v)
    course = np.floor(8 * v)
    brick = np.floor(4 * u + 0.5 * (course % 2)) % 4
    mortar = ((8 * v) % 1 < 0.14) | ((4 * u + 0.5 * (course % 2)) % 1 < 0.07)
    radius = np.hypot((4 * u) % 1 - 0.5, (4 * v) % 1 - 0.5)
    tiles = {
        "mottle": np.clip(2.2 * (cloud - 0.5) + 0.5, 0, 1),
        "checker": ((np.floor(4 * u) + np.floor(4 * v)) % 2),
        "stripes": ((5 * u) % 1 < 0.5) * 1.0,
        "bricks": np.where(mortar, 0.0, 0.6 + 0.4 * ((3 * brick + 5 * course) % 7) / 6),
        "plain": 0.5 + 0.25 * (_noise(16, 4) - 0.5),
        "dots": (radius < 0.28) * 1.0,
        "planks": np.where((8 * v) % 1 < 0.08, 0.0, 0.4 + 0.5 * ((5 * plank) % 8) / 7 + 0.1 * np.sin(turn * 6 * cloud)),
        "tiles": np.where(((3 * u) % 1 < 0.06) | ((3 * v) % 1 < 0.06), 0.0, 0.75 + 0.25 * _noise(8, 5)),
        "waves": 0.5 + 0.5 * np.sin(turn * (4 * v + 0.5 * np.sin(turn * 2 * u))),
        "rings": ((np.hypot((2 * u) % 1 - 0.5, (2 * v) % 1 - 0.5) * 8) % 1 < 0.5) * 1.0,
        "zigzag": ((6 * v + np.abs((4 * u) % 1 - 0.5) * 2) % 1 < 0.5) * 1.0,
        "plaid": 0.5 * ((4 * u) % 1 < 0.4) + 0.5 * ((4 * v) % 1 < 0.4),
        "marble": 0.5 + 0.5 * np.sin(turn * (3 * (u + v) + 2.5 * cloud)),
        "cells": np.round(5 * _noise(8, 6)) / 5,
        "speckle": (_noise(32, 7) > 0.68) * 1.0,
        "gradient": 0.5 + 0.5 * np.cos(turn * v),
    }
    return np.clip(np.asarray(tiles[kind], dtype=np.float64), 0, 1)


@lru_cache(maxsize=1)
def _atlas() -> Floats:
    """All tiles at all blurs, flat: index ((texture * levels + level) * tile + row) * tile + column."""
    levels = []
    for kind in TEXTURES:
        tile = _tile(kind)
        levels.append(tile)
        for level in range(1, _LEVELS):
            # A box over 2**level texels, by doubling: the mean of two halves, along each axis.
            half = 1 << (level - 1)
            for axis in (0, 1):
                tile = 0.5 * (tile + np.roll(tile, half, axis))
            levels.append(np.roll(tile, (-half, -half), (0, 1)))
    return np.stack(levels).astype(np.float32).ravel()


@dataclass(frozen=True, kw_only=True)
class _Seen:
    """Pixels that hit something, sorted by the shape they hit, so that every shape's pixels are one slice."""

    shapes: Sequence[Shape]
    count_K: npt.NDArray[np.intp]
    depth_N: Floats
    ray_3N: Floats
    point_3N: Floats

    def spread(self, value_xK: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Values per shape [..., K] to values per pixel [..., N]."""
        return np.repeat(value_xK, self.count_K, axis=-1)


def _dot(left_3: Floats | Array, right_3N: Floats) -> Floats:
    return np.asarray(left_3[0] * right_3N[0] + left_3[1] * right_3N[1] + left_3[2] * right_3N[2])


def _column(colour: Vector) -> Floats:
    return np.array(colour, dtype=np.float32)[:, None]


def _surfaces(seen: _Seen) -> tuple[Floats, Floats]:
    """Normals [3, N] and texture coordinates [2, N] in texels, shape by shape."""
    normal_3N = np.empty_like(seen.point_3N)
    uv_2N = np.empty_like(normal_3N[:2])
    start = 0
    for shape, count in zip(seen.shapes, seen.count_K.tolist(), strict=True):
        mine = slice(start, start + count)
        start += count
        if not count:
            continue
        normal_3N[:, mine], u_M, v_M = shape.surface(seen.point_3N[:, mine])
        material = shape.material
        c, s = (f * _TILE / material.tile_m for f in (math.cos(material.turn), math.sin(material.turn)))
        uv_2N[0, mine] = c * u_M - s * v_M + _TILE * material.offset[0]
        uv_2N[1, mine] = s * u_M + c * v_M + _TILE * material.offset[1]
    return normal_3N, uv_2N


def _texture(seen: _Seen, normal_3N: Floats, uv_2N: Floats, focal_px: float) -> Floats:
    """Texture values [N] at the blur that suits each pixel's footprint."""
    materials = [shape.material for shape in seen.shapes]
    texel_per_px_K = np.array([_TILE / (material.tile_m * focal_px) for material in materials], dtype=np.float32)
    base_K = np.array([material.texture * _LEVELS for material in materials], dtype=np.int32)
    # A footprint is longer by 1 / cos along the slope only: take the geometric mean of its sides.
    slant_N = np.maximum(np.abs(_dot(normal_3N, seen.ray_3N)), np.float32(0.02))
    footprint_N = seen.depth_N * seen.spread(texel_per_px_K) / np.sqrt(slant_N)
    level_N = np.clip(np.log2(footprint_N) + 0.5, 0, _LEVELS - 1).astype(np.int32)
    column_N, row_N = np.floor(uv_2N).astype(np.int32) & (_TILE - 1)
    return np.asarray(_atlas().take(((seen.spread(base_K) + level_N) * _TILE + row_N) * _TILE + column_N))


def _shadow(seen: _Seen, normal_3N: Floats, light_3: Floats) -> npt.NDArray[np.bool_]:
    """Which points another solid hides from the lamp."""
    point_3N = seen.point_3N
    shadow_N = np.zeros(point_3N.shape[1], dtype=bool)
    along_N = _dot(light_3, point_3N)
    off_origin_N = _dot(point_3N, point_3N) - along_N * along_N
    stop_K = np.cumsum(seen.count_K)
    for index, shape in enumerate(seen.shapes):
        if shape.ball is None:
            continue
        centre_3, reach_m = np.array(shape.ball[0], dtype=np.float32), shape.ball[1]
        # Only points inside the cylinder of shadow of the ball can be in that of the shape.
        ahead = float(light_3 @ centre_3)
        across_3 = centre_3 - ahead * light_3
        off_axis_N = off_origin_N - _dot(2.0 * across_3, point_3N)
        near_N = (off_axis_N < reach_m**2 - float(across_3 @ across_3)) & (along_N < ahead + reach_m)
        near_N[stop_K[index] - seen.count_K[index] : stop_K[index]] = False  # convex: no shadow on itself
        near_M = np.flatnonzero(near_N)
        if near_M.size:
            start_3M = point_3N.take(near_M, axis=1) + _SHADOW_BIAS_M * normal_3N.take(near_M, axis=1)
            shadow_N[near_M] |= np.isfinite(shape.hit(start_3M, light_3[:, None]))
    return shadow_N


def _solid_colour(seen: _Seen, light: Light, focal_px: float) -> Floats:
    """Reflected light [C, N] of the points seen: Lambert's lamp with shadows, and the surroundings."""
    normal_3N, uv_2N = _surfaces(seen)
    texture_N = _texture(seen, normal_3N, uv_2N, focal_px)
    low_CK = np.array([shape.material.low for shape in seen.shapes], dtype=np.float32).T
    high_CK = np.array([shape.material.high for shape in seen.shapes], dtype=np.float32).T
    albedo_CN = seen.spread(low_CK) + seen.spread(high_CK - low_CK) * texture_N
    light_3 = np.array(light.towards, dtype=np.float32)
    lit_N = np.maximum(_dot(light_3, normal_3N), 0)
    lit_N *= np.where(_shadow(seen, normal_3N, light_3), np.float32(1.0 - light.shadow), np.float32(1.0))
    open_N = 0.8 + 0.2 * normal_3N[1]  # more light comes from above
    return np.asarray(albedo_CN * (lit_N * _column(light.colour) + open_N * _column(light.ambient)))


def _sky_colour(ray_3N: Floats, air: Air) -> Floats:
    """Light [C, N] of rays that hit nothing: a gradient from the horizon up, with clouds from one of the tiles."""
    up_N = np.maximum(ray_3N[1] / np.sqrt(_dot(ray_3N, ray_3N)), 0)
    rise_N = 1.0 - np.square(1.0 - np.minimum(2.0 * up_N, 1))
    colour_CN = _column(air.horizon) + (_column(air.zenith) - _column(air.horizon)) * rise_N
    if air.clouds > 0:
        uv_2N = (ray_3N[::2] * (_TILE / 16 / np.maximum(ray_3N[1], 0.05))).astype(np.int32) & (_TILE - 1)
        cloud_N = _atlas().take((_CLOUD_BLUR * _TILE + uv_2N[1]) * _TILE + uv_2N[0])
        cloud_N *= np.float32(air.clouds) * np.minimum(4.0 * up_N, 1)
        colour_CN += (1.0 - colour_CN) * cloud_N
    return np.asarray(colour_CN)


def paint(shapes: Sequence[Shape], traced: Traced, camera: Camera, light: Light, air: Air) -> Floats:
    """The scene's light [C, H, W], linear: surfaces, shadows, fog, the haze at the end of the world, and sky."""
    hit = np.where(traced.depth_HW < air.far_m, traced.shape_HW, np.int16(len(shapes))).ravel()
    order = np.argsort(hit, kind="stable")
    counts = np.bincount(hit, minlength=len(shapes) + 1)
    solid = order.size - counts[-1]
    picture_CX = np.empty((3, order.size), dtype=np.float32)  # X: all pixels, sorted
    ray_3X = traced.direction_3HW.reshape(3, -1).astype(np.float32).take(order, axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        picture_CX[:, solid:] = _sky_colour(ray_3X[:, solid:], air)
        if solid:
            depth_N, ray_3N = traced.depth_HW.ravel().take(order[:solid]).astype(np.float32), ray_3X[:, :solid]
            point_3N = _column(camera.position) + ray_3N * depth_N
            seen = _Seen(shapes=shapes, count_K=counts[:-1], depth_N=depth_N, ray_3N=ray_3N, point_3N=point_3N)
            colour_CN = _solid_colour(seen, light, camera.focal_px)
            ramp_N = np.clip((depth_N * (1.0 / air.far_m) - _HAZE_FROM) * (1.0 / (1.0 - _HAZE_FROM)), 0, 1)
            through_N = 1.0 - ramp_N * ramp_N * (3.0 - 2.0 * ramp_N)
            if air.fog_per_m > 0:
                through_N *= np.exp(-air.fog_per_m * depth_N)
            # What hides a surface is the air's own colour in that direction, so that the world's end shows no seam.
            if through_N.min() < 1:
                haze_CN = _sky_colour(ray_3N, air)
                colour_CN = haze_CN + (colour_CN - haze_CN) * through_N
            picture_CX[:, :solid] = colour_CN
    light_CX = np.empty_like(picture_CX)
    light_CX[:, order] = picture_CX
    return light_CX.reshape(3, *traced.depth_HW.shape)


def expose(light_CHW: Floats, softness: float, grain_CHW: Floats) -> npt.NDArray[np.uint8]:
    """From light to a picture [H, W, C]: a blur (`softness` is each neighbour's weight), gamma 2, grain, 8 bits."""
    for axis in (1, 2):
        sharp = light_CHW.swapaxes(1, axis)
        soft = sharp * np.float32(1.0 - 2.0 * softness)
        soft[:, 1:] += softness * sharp[:, :-1]
        soft[:, :-1] += softness * sharp[:, 1:]
        soft[:, [0, -1]] += softness * sharp[:, [0, -1]]
        light_CHW = soft.swapaxes(1, axis)
    value_CHW = np.sqrt(np.maximum(light_CHW, 0)) + grain_CHW
    codes_CHW = (np.clip(value_CHW, 0, 1) * 255.0 + 0.5).astype(np.uint8)
    return np.ascontiguousarray(codes_CHW.transpose(1, 2, 0))
