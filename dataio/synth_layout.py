"""What stands where in a synthetic scene: draws a layout (camera, shapes, materials, light) from a domain's ranges.

Numbers come from the raw words of a Philox generator, because numpy promises nothing else across versions.
"""

from __future__ import annotations

import colorsys
import hashlib
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dataio.synth_paint import Air, Light
from dataio.synth_scene import Box, Camera, Cylinder, Material, Plane, Shape, Sphere, Vector, Walls

Range = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Domain:
    """What scenes of one kind may look like; ranges are inclusive and drawn from evenly unless said otherwise."""

    outdoor: float  # fraction of scenes under the sky; the others are rooms
    textures: int  # the first so many of TEXTURES
    fov_deg: Range
    pitch_deg: Range  # negative looks down
    roll_deg: Range
    camera_m: Range  # height above the floor
    solids: tuple[int, int]  # number of groups of solids (a tree or a stack is one)
    saturation: Range  # of the two colours of a material
    brightness: Range
    contrast: Range  # brightness of a material's second colour relative to its first
    second_hue: float  # probability that the second colour is drawn anew
    light: Light | None  # None: a random lamp
    fog: float  # probability
    fog_per_m: Range  # share of the light lost per metre (exponential)
    clouds: Range  # opacity of the densest
    grain: Range  # standard deviation, of a full scale of 1
    softness: Range  # weight of each neighbour in the lens
    far_m: float = 20.0  # with 40 m, training at this size learnt nothing


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A scene before it is rendered: everything that was drawn but for the grain."""

    camera: Camera
    shapes: tuple[Shape, ...]
    light: Light
    air: Air
    grain: float
    softness: float


class Draws:
    """Random numbers of one scene, from raw Philox words."""

    def __init__(self, domain: str, seed: int, index: int) -> None:
        digest = hashlib.blake2b(f"{domain}/{seed}/{index}".encode(), digest_size=16).digest()
        self._bits = np.random.Philox(key=int.from_bytes(digest, "little"))
        self._words: list[int] = []

    def between(self, span: Range) -> float:
        if not self._words:
            self._words = self._bits.random_raw(64).tolist()
        return span[0] + (span[1] - span[0]) * (self._words.pop() >> 11) * 2.0**-53

    def log_between(self, low: float, high: float) -> float:
        return math.exp(self.between((math.log(low), math.log(max(low, high)))))

    def below(self, count: int) -> int:
        return min(int(self.between((0.0, count))), count - 1)

    def chance(self, probability: float) -> bool:
        return self.between((0.0, 1.0)) < probability

    def grain(self, sigma: float, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
        """Nearly Gaussian noise: the sum of four bytes, centred and scaled."""
        count = math.prod(shape)
        parts = self._bits.random_raw((count + 1) // 2).astype("<u8", copy=False).view(np.uint8)[: 4 * count]
        sums = parts.reshape(4, count).sum(axis=0, dtype=np.float32)
        noise: npt.NDArray[np.float32] = (sums - np.float32(510.0)) * np.float32(sigma / math.sqrt((256**2 - 1) / 3))
        return noise.reshape(shape)


def _colour(domain: Domain, draws: Draws) -> Vector:
    hue, saturation = draws.between((0.0, 1.0)), draws.between(domain.saturation)
    return _linear(colorsys.hsv_to_rgb(hue, saturation, draws.between(domain.brightness)))


def _linear(colour: Vector) -> Vector:
    """From a picture's values to light, undoing the gamma of `synth_paint.expose`."""
    return colour[0] ** 2, colour[1] ** 2, colour[2] ** 2


def _mixed(a: Vector, b: Vector, share_of_b: float) -> Vector:
    red, green, blue = (x + (y - x) * share_of_b for x, y in zip(a, b, strict=True))
    return red, green, blue


def _material(domain: Domain, draws: Draws, tile_m: Range) -> Material:
    high = _colour(domain, draws)
    again = _colour(domain, draws)
    dark = 1.0 - draws.between(domain.contrast) ** 2
    return Material(
        texture=draws.below(domain.textures),
        low=again if draws.chance(domain.second_hue) else _mixed(high, (0.0, 0.0, 0.0), dark),
        high=high,
        tile_m=draws.log_between(*tile_m),
        turn=draws.below(4) * math.pi / 2 if draws.chance(0.6) else draws.between((0.0, math.tau)),
        offset=(draws.between((0.0, 1.0)), draws.between((0.0, 1.0))),
    )


def _light(domain: Domain, draws: Draws) -> Light:
    if domain.light is not None:
        return domain.light
    height, around = math.radians(draws.between((20, 75))), draws.between((0.0, math.tau))
    level, warmth = draws.log_between(0.5, 1.3), draws.between((-0.25, 0.25))
    fill, tint = draws.log_between(0.15, 0.5), draws.between((-0.25, 0.25))
    flat = math.cos(height)
    return Light(
        towards=(flat * math.cos(around), math.sin(height), flat * math.sin(around)),
        colour=(level * (1 + warmth), level, level * (1 - warmth)),
        ambient=(fill * (1 + tint), fill, fill * (1 - tint)),
        shadow=draws.between((0.4, 0.95)),
    )


def _air(domain: Domain, draws: Draws, outdoor: bool) -> Air:
    fog_per_m = draws.between(domain.fog_per_m) if draws.chance(domain.fog) else 0.0
    if domain.light is not None:
        horizon, zenith = (0.74, 0.80, 0.86), (0.26, 0.42, 0.70)
    else:
        hue, bright = draws.between((0.0, 1.0)), draws.between((0.45, 1.0))
        hue = draws.between((0.53, 0.66)) if draws.chance(0.6) else hue
        high = colorsys.hsv_to_rgb(hue, draws.between((0.1, 0.8)), bright * draws.between((0.4, 1.0)))
        low = colorsys.hsv_to_rgb(draws.between((0.0, 1.0)), draws.between((0.0, 0.2)), bright)
        horizon, zenith = _linear(low), _linear(high)
    if fog_per_m > 0:  # fog whitens the whole sky
        zenith = _mixed(horizon, zenith, 0.2)
    clouds = draws.between(domain.clouds) if outdoor else 0.0
    return Air(horizon=horizon, zenith=zenith, far_m=domain.far_m, fog_per_m=fog_per_m, clouds=clouds)


@dataclass(frozen=True, kw_only=True)
class _Floor:
    """Where solids may stand: in sight, clear of the camera and, indoors, between the walls."""

    fov_deg: float
    pitch_deg: float
    camera_m: float
    far_m: float
    walls: Walls | None = None
    ceiling_m: float = math.inf

    def spot(self, draws: Draws, reach_m: float, nearest_m: float = 1.5) -> tuple[float, float]:
        """X, Z of a solid whose footprint has the radius `reach_m`: evenly over the width, log-evenly in depth."""
        half = self.fov_deg / 2
        edges = (half - self.pitch_deg, -half - self.pitch_deg)  # degrees below the horizon: picture's bottom, top
        below, above = (math.tan(math.radians(max(edge, 1.0))) for edge in edges)
        first = max(nearest_m, self.camera_m / below)
        last = min(0.75 * self.far_m, max(self.camera_m / above, first + 1.0))
        z = draws.log_between(first, max(last, first))
        x = z * math.tan(math.radians(half)) * draws.between((-0.85, 0.85))
        if self.walls is not None:
            x, z = self.walls.inside(x, z, reach_m)
        away = math.hypot(x, z)
        push = max(1.0, (reach_m + 0.8) / max(away, 0.01))
        return x * push, z * push


def _prism(domain: Domain, draws: Draws, spot: tuple[float, float], base_m: float, size_m: float) -> Box | Cylinder:
    """A box or, one time in four, a cylinder standing on `base_m`; the footprint's radius is at most `size_m`."""
    material = _material(domain, draws, (0.8 * size_m, 3.0 * size_m))
    half_height_m = size_m * draws.log_between(0.35, 1.3)
    centre = (spot[0], base_m + half_height_m, spot[1])
    if draws.chance(0.3):
        radius_m = size_m * draws.between((0.45, 0.9))
        return Cylinder(material=material, centre=centre, radius_m=radius_m, half_height_m=half_height_m)
    half = (0.7 * size_m * draws.between((0.5, 1.0)), half_height_m, 0.7 * size_m * draws.between((0.5, 1.0)))
    return Box(material=material, centre=centre, half=half, yaw=draws.between((0.0, math.pi)))


def _ball(domain: Domain, draws: Draws, spot: tuple[float, float], base_m: float, radius_m: float) -> Sphere:
    material = _material(domain, draws, (1.0 * radius_m, 4.0 * radius_m))
    return Sphere(material=material, centre=(spot[0], base_m + radius_m, spot[1]), radius_m=radius_m)


def _tree(domain: Domain, draws: Draws, floor: _Floor) -> list[Shape]:
    crown_m, trunk_m = draws.log_between(0.7, 1.8), draws.between((0.8, 2.0))
    spot = floor.spot(draws, crown_m, nearest_m=4.0)
    centre = (spot[0], trunk_m / 2, spot[1])
    bark = _material(domain, draws, (0.3, 1.0))
    trunk = Cylinder(material=bark, centre=centre, radius_m=0.12 * crown_m + 0.05, half_height_m=trunk_m / 2)
    return [trunk, _ball(domain, draws, spot, 0.9 * trunk_m, crown_m)]


def _building(domain: Domain, draws: Draws, floor: _Floor) -> list[Shape]:
    half = (draws.between((1.0, 3.5)), draws.between((1.0, 3.0)), draws.between((1.0, 3.0)))
    spot = floor.spot(draws, math.hypot(half[0], half[2]), nearest_m=7.0)
    material = _material(domain, draws, (2.0, 6.0))
    return [Box(material=material, centre=(spot[0], half[1], spot[1]), half=half, yaw=draws.between((0.0, math.pi)))]


def _lamp(domain: Domain, draws: Draws, floor: _Floor) -> list[Shape]:
    radius_m, cord_m = draws.between((0.12, 0.3)), draws.between((0.2, 0.5))
    spot = floor.spot(draws, radius_m, nearest_m=2.0)
    top_m = floor.ceiling_m - cord_m
    centre = (spot[0], floor.ceiling_m - cord_m / 2, spot[1])
    silk = _material(domain, draws, (1.0, 2.0))
    cord = Cylinder(material=silk, centre=centre, radius_m=0.02, half_height_m=cord_m / 2)
    return [cord, _ball(domain, draws, spot, top_m - 2 * radius_m, radius_m)]


def _group(domain: Domain, draws: Draws, floor: _Floor) -> list[Shape]:
    """One solid, or a few that belong together."""
    outdoor = floor.walls is None
    if draws.chance(0.35 if outdoor else 0.15):
        if not outdoor:
            return _lamp(domain, draws, floor)
        return _tree(domain, draws, floor) if draws.chance(0.5) else _building(domain, draws, floor)
    size_m = draws.log_between(0.3, 1.3 if outdoor else 0.8)
    spot = floor.spot(draws, size_m)
    if draws.chance(0.3):
        return [_ball(domain, draws, spot, 0.0, 0.8 * size_m)]
    lower = _prism(domain, draws, spot, 0.0, size_m)
    if not draws.chance(0.35):
        return [lower]
    top_m = 2.0 * lower.centre[1]
    upper_m = size_m * draws.between((0.3, 0.55))
    upper = _ball if draws.chance(0.4) else _prism
    return [lower, upper(domain, draws, spot, top_m, upper_m)]


def _room(domain: Domain, draws: Draws, camera_m: float) -> tuple[list[Shape], Walls, float]:
    """Floor, ceiling and walls around the camera, which stands in the back half and looks across."""
    half = (draws.between((1.6, 3.5)), draws.between((2.2, 5.5)))
    yaw = math.radians(draws.between((-35.0, 35.0)))
    x, z = half[0] * draws.between((-0.5, 0.5)), -half[1] * draws.between((0.3, 0.8))
    centre = (-(math.cos(yaw) * x + math.sin(yaw) * z), -(-math.sin(yaw) * x + math.cos(yaw) * z))
    ceiling_m = max(draws.between((2.3, 3.4)), camera_m + 0.5)
    walls = Walls(material=_material(domain, draws, (1.5, 5.0)), centre=centre, half=half, yaw=yaw)
    ground = Plane(material=_material(domain, draws, (1.5, 5.0)))
    ceiling = Plane(material=_material(domain, draws, (1.5, 6.0)), height_m=ceiling_m, up=False)
    return [ground, walls, ceiling], walls, ceiling_m


def compose(domain: Domain, draws: Draws, size: int) -> Layout:
    """Draw a scene. The draws do not depend on `size`: the same scene is seen at any resolution."""
    outdoor = draws.chance(domain.outdoor)
    fov_deg, pitch_deg = draws.between(domain.fov_deg), draws.between(domain.pitch_deg)
    roll_deg, camera_m = draws.between(domain.roll_deg), draws.between(domain.camera_m)
    shapes: list[Shape]
    if outdoor:
        walls, ceiling_m = None, math.inf
        shapes = [Plane(material=_material(domain, draws, (2.0, 8.0)))]
    else:
        shapes, walls, ceiling_m = _room(domain, draws, camera_m)
    floor = _Floor(
        fov_deg=fov_deg, pitch_deg=pitch_deg, camera_m=camera_m, far_m=domain.far_m, walls=walls, ceiling_m=ceiling_m
    )
    for _ in range(domain.solids[0] + draws.below(domain.solids[1] - domain.solids[0] + 1)):
        shapes.extend(_group(domain, draws, floor))
    camera = Camera.standing(size=size, fov_deg=fov_deg, pitch_deg=pitch_deg, roll_deg=roll_deg, height_m=camera_m)
    return Layout(
        camera=camera,
        shapes=tuple(shapes),
        light=_light(domain, draws),
        air=_air(domain, draws, outdoor),
        grain=draws.between(domain.grain),
        softness=draws.between(domain.softness),
    )
