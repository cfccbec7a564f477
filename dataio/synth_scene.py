"""Geometry of the synthetic scenes: a camera, convex shapes and the nearest hit of every pixel.

World: metres, X right, Y up, Z ahead; the floor is Y = 0 and the camera stands above the origin. Camera: x right,
y down, z ahead. A ray is `position + t * direction` whose direction has camera z of exactly 1: so t *is* the planar
depth, not the distance along the ray. Depths are traced in float64 and exact to float32 rounding.

Shape suffixes: H W pixels, N any pixels, K shapes, 3 world or camera axes; `_` alone stands for broadcasting axes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.floating]
Window = tuple[slice, slice]
Vector = tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class Material:
    """A tile of `synth_paint.TEXTURES[texture]`, repeated every `tile_m` metres, mixing two linear colours."""

    texture: int
    low: Vector
    high: Vector
    tile_m: float = 1.0
    turn: float = 0.0  # radians, within the surface
    offset: tuple[float, float] = (0.0, 0.0)  # tiles


@dataclass(frozen=True, kw_only=True)
class Camera:
    """A pinhole with square pixels and its principal point at the centre of a `size` x `size` picture."""

    size: int
    focal_px: float
    position: Vector
    rotation_33: Array  # columns: the camera's x, y, z axes in the world

    @classmethod
    def standing(cls, *, size: int, fov_deg: float, pitch_deg: float, roll_deg: float, height_m: float) -> Camera:
        """`fov_deg` spans the width; positive pitch looks up; positive roll lowers the camera's own right side."""
        pitch, roll = math.radians(pitch_deg), math.radians(roll_deg)
        right = np.array([1.0, 0.0, 0.0])
        down = np.array([0.0, -math.cos(pitch), math.sin(pitch)])
        ahead = np.array([0.0, math.sin(pitch), math.cos(pitch)])
        x = math.cos(roll) * right + math.sin(roll) * down
        y = math.cos(roll) * down - math.sin(roll) * right
        focal_px = 0.5 * size / math.tan(math.radians(fov_deg) / 2)
        rotation_33 = np.stack([x, y, ahead], axis=1)
        return cls(size=size, focal_px=focal_px, position=(0.0, height_m, 0.0), rotation_33=rotation_33)

    def directions(self) -> Array:
        """World directions [3, H, W] through the pixel centres, with camera z of 1."""
        across_W = (np.arange(self.size) + 0.5 - self.size / 2) / self.focal_px
        axes = self.rotation_33
        # An outer sum is cheaper than a matrix product and does not depend on the BLAS.
        return axes[:, 0, None, None] * across_W + (axes[:, 1, None] * across_W + axes[:, 2, None])[:, :, None]

    def window(self, centre: Vector, reach_m: float) -> Window:
        """Rows and columns that a ball may cover: all when it reaches behind the camera, none when out of sight."""
        x, y, z = (float(v) for v in (np.subtract(centre, self.position)) @ self.rotation_33)
        if z - reach_m < 0.05:
            return (slice(0, self.size), slice(0, self.size)) if z + reach_m > 0 else (slice(0, 0), slice(0, 0))

        def span(offset: float) -> slice:
            low, high = offset - reach_m, offset + reach_m
            low /= z + reach_m if low > 0 else z - reach_m
            high /= z - reach_m if high > 0 else z + reach_m
            edges = (math.floor(low * self.focal_px + self.size / 2), math.ceil(high * self.focal_px + self.size / 2))
            start, stop = (min(max(edge, 0), self.size) for edge in edges)
            return slice(start, stop)

        return span(y), span(x)


class Shape(Protocol):
    """Something with a surface. A solid has a finite bounding ball; planes and walls surround the scene instead."""

    @property
    def material(self) -> Material: ...

    @property
    def ball(self) -> tuple[Vector, float] | None:
        """Centre and radius of a ball around a solid, which may cast a shadow; None when there is none."""

    def hit(self, origin_3_: Array, direction_3_: Array) -> Array:
        """The smallest t > 0 at which `origin + t * direction` meets the surface; inf where it never does."""

    def surface(self, point_3N: Array) -> tuple[Array, Array, Array]:
        """At points on the surface: unit normals [3, N] and two texture coordinates [N] in metres."""


def _turned(x: Array, z: Array, yaw: float) -> tuple[Array, Array]:
    """Horizontal coordinates in a frame turned by `yaw` radians about the vertical."""
    c, s = math.cos(yaw), math.sin(yaw)
    return c * x - s * z, s * x + c * z


def _slab(origin_: Array, direction_: Array, half_m: float) -> tuple[Array, Array]:
    """Where rays enter and leave -half_m .. half_m along one axis; infinities, not NaN, for rays across the axis."""
    inverse = 1.0 / direction_
    a, b = (-half_m - origin_) * inverse, (half_m - origin_) * inverse
    return np.minimum(a, b), np.maximum(a, b)


def _entry(near: Array, far: Array) -> Array:
    """First t > 0 of the interval [near, far] seen from outside; inf where it is empty or behind."""
    return np.where((near < far) & (near > 0), near, np.inf)


@dataclass(frozen=True, kw_only=True)
class Plane:
    """The horizontal plane Y = `height_m`: ground, floor (normal up) or ceiling (normal down)."""

    material: Material
    height_m: float = 0.0
    up: bool = True
    ball: None = None

    def hit(self, origin_3_: Array, direction_3_: Array) -> Array:
        t = (self.height_m - origin_3_[1]) / direction_3_[1]
        return np.where(t > 0, t, np.inf)

    def surface(self, point_3N: Array) -> tuple[Array, Array, Array]:
        normal_3N = np.zeros_like(point_3N)
        normal_3N[1] = 1.0 if self.up else -1.0
        return normal_3N, point_3N[0], point_3N[2]


@dataclass(frozen=True, kw_only=True)
class Walls:
    """Four vertical walls around the camera, seen from inside: a rectangle turned about the vertical."""

    material: Material
    centre: tuple[float, float]  # X, Z
    half: tuple[float, float]
    yaw: float = 0.0
    ball: None = None

    def inside(self, x: float, z: float, margin_m: float) -> tuple[float, float]:
        """The point nearest to (x, z) that keeps `margin_m` from the walls, or stays midway where they are too near."""
        c, s = math.cos(self.yaw), math.sin(self.yaw)
        x, z = x - self.centre[0], z - self.centre[1]
        limit_x, limit_z = (max(half - margin_m, 0.0) for half in self.half)
        a = min(max(c * x - s * z, -limit_x), limit_x)
        b = min(max(s * x + c * z, -limit_z), limit_z)
        return self.centre[0] + c * a + s * b, self.centre[1] - s * a + c * b

    def hit(self, origin_3_: Array, direction_3_: Array) -> Array:
        ox, oz = _turned(origin_3_[0] - self.centre[0], origin_3_[2] - self.centre[1], self.yaw)
        dx, dz = _turned(direction_3_[0], direction_3_[2], self.yaw)
        out: Array = np.minimum((np.copysign(self.half[0], dx) - ox) / dx, (np.copysign(self.half[1], dz) - oz) / dz)
        return out

    def surface(self, point_3N: Array) -> tuple[Array, Array, Array]:
        x, z = _turned(point_3N[0] - self.centre[0], point_3N[2] - self.centre[1], self.yaw)
        side = np.abs(x) * self.half[1] > np.abs(z) * self.half[0]
        nx, nz = np.where(side, -np.sign(x), 0.0), np.where(side, 0.0, -np.sign(z))
        back_x, back_z = _turned(nx, nz, -self.yaw)
        return np.stack([back_x, np.zeros_like(x), back_z]), np.where(side, z, x), point_3N[1]


@dataclass(frozen=True, kw_only=True)
class Box:
    """A solid box turned about the vertical by `yaw` radians."""

    material: Material
    centre: Vector
    half: Vector
    yaw: float = 0.0

    @property
    def ball(self) -> tuple[Vector, float]:
        return self.centre, math.hypot(*self.half)

    def hit(self, origin_3_: Array, direction_3_: Array) -> Array:
        ox, oz = _turned(origin_3_[0] - self.centre[0], origin_3_[2] - self.centre[2], self.yaw)
        dx, dz = _turned(direction_3_[0], direction_3_[2], self.yaw)
        oy, dy = origin_3_[1] - self.centre[1], direction_3_[1]
        near: Array | float = -np.inf
        far: Array | float = np.inf
        for o, d, half in ((ox, dx, self.half[0]), (oy, dy, self.half[1]), (oz, dz, self.half[2])):
            enter, leave = _slab(o, d, half)
            near, far = np.maximum(near, enter), np.minimum(far, leave)
        return _entry(np.asarray(near), np.asarray(far))

    def surface(self, point_3N: Array) -> tuple[Array, Array, Array]:
        x, z = _turned(point_3N[0] - self.centre[0], point_3N[2] - self.centre[2], self.yaw)
        y = point_3N[1] - self.centre[1]
        rx, ry, rz = (np.abs(v) / half for v, half in zip((x, y, z), self.half, strict=True))
        on_x, on_y = (rx >= ry) & (rx >= rz), (ry > rx) & (ry >= rz)
        on_z = ~(on_x | on_y)
        back_x, back_z = _turned(on_x * np.sign(x), on_z * np.sign(z), -self.yaw)
        return np.stack([back_x, on_y * np.sign(y), back_z]), np.where(on_x, z, x), np.where(on_y, z, y)


@dataclass(frozen=True, kw_only=True)
class Sphere:
    """A ball."""

    material: Material
    centre: Vector
    radius_m: float

    @property
    def ball(self) -> tuple[Vector, float]:
        return self.centre, self.radius_m

    def hit(self, origin_3_: Array, direction_3_: Array) -> Array:
        ox, oy, oz = (origin_3_[i] - self.centre[i] for i in range(3))
        dx, dy, dz = direction_3_
        a = dx * dx + dy * dy + dz * dz
        b = (ox * dx + oy * dy + oz * dz) / a
        root = b * b - (ox * ox + oy * oy + oz * oz - self.radius_m**2) / a
        t = -b - np.sqrt(np.maximum(root, 0.0))
        return np.where((root > 0) & (t > 0), t, np.inf)

    def surface(self, point_3N: Array) -> tuple[Array, Array, Array]:
        normal_3N = (point_3N - np.reshape(self.centre, (3, 1))) / self.radius_m
        across = np.arctan2(normal_3N[0], -normal_3N[2]) * self.radius_m
        return normal_3N, across, np.arcsin(np.clip(normal_3N[1], -1.0, 1.0)) * self.radius_m


@dataclass(frozen=True, kw_only=True)
class Cylinder:
    """An upright solid cylinder with flat ends."""

    material: Material
    centre: Vector
    radius_m: float
    half_height_m: float

    @property
    def ball(self) -> tuple[Vector, float]:
        return self.centre, math.hypot(self.radius_m, self.half_height_m)

    def hit(self, origin_3_: Array, direction_3_: Array) -> Array:
        ox, oy, oz = (origin_3_[i] - self.centre[i] for i in range(3))
        dx, dy, dz = direction_3_
        a = np.maximum(dx * dx + dz * dz, 1e-30)  # a vertical ray is for ever inside or outside
        b = (ox * dx + oz * dz) / a
        root = b * b - (ox * ox + oz * oz - self.radius_m**2) / a
        half_chord = np.sqrt(np.maximum(root, 0.0))
        enter, leave = _slab(oy, dy, self.half_height_m)
        near, far = np.maximum(-b - half_chord, enter), np.minimum(-b + half_chord, leave)
        return np.where(root > 0, _entry(near, far), np.inf)

    def surface(self, point_3N: Array) -> tuple[Array, Array, Array]:
        x, y, z = (point_3N[i] - self.centre[i] for i in range(3))
        end = self.half_height_m - np.abs(y) < self.radius_m - np.hypot(x, z)
        normal_3N = np.stack([x / self.radius_m, np.zeros_like(x), z / self.radius_m])
        normal_3N = np.where(end, np.stack([np.zeros_like(x), np.sign(y), np.zeros_like(x)]), normal_3N)
        return normal_3N, np.where(end, x, np.arctan2(x, -z) * self.radius_m), np.where(end, z, y)


@dataclass(frozen=True, kw_only=True)
class Traced:
    """What every pixel centre sees: planar depth in metres (inf: nothing), the shape's index (K: none), its ray."""

    depth_HW: npt.NDArray[np.float64]
    shape_HW: npt.NDArray[np.int16]
    direction_3HW: Array


def trace(camera: Camera, shapes: Sequence[Shape]) -> Traced:
    """Cast one ray through every pixel's centre and keep its nearest hit."""
    direction_3HW = camera.directions()
    origin_311 = np.reshape(camera.position, (3, 1, 1))
    depth_HW = np.full(direction_3HW.shape[1:], np.inf)
    shape_HW = np.full(depth_HW.shape, len(shapes), dtype=np.int16)
    everywhere = (slice(0, camera.size), slice(0, camera.size))
    with np.errstate(divide="ignore", invalid="ignore"):
        for index, shape in enumerate(shapes):
            window = camera.window(*shape.ball) if shape.ball else everywhere
            if window[0].start == window[0].stop or window[1].start == window[1].stop:
                continue
            t_HW = shape.hit(origin_311, direction_3HW[:, window[0], window[1]])
            closer_HW = t_HW < depth_HW[window]
            np.copyto(depth_HW[window], t_HW, where=closer_HW)
            np.copyto(shape_HW[window], np.int16(index), where=closer_HW)
    return Traced(depth_HW=depth_HW, shape_HW=shape_HW, direction_3HW=direction_3HW)
