"""The synthetic scenes: exact depth, a pure function, and two domains that differ as documented.

Shape suffixes: H W pixels, C channel, S steps along a ray, 3 world axes.
"""

from __future__ import annotations

import hashlib
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dataio import synth
from dataio.spec import DataError
from dataio.synth_layout import Layout
from dataio.synth_paint import TEXTURES, Air, Light, expose, paint
from dataio.synth_scene import Box, Camera, Cylinder, Material, Plane, Shape, Sphere, Walls, trace

SIZE = 56
GREY = Material(texture=TEXTURES.index("plain"), low=(0.5, 0.5, 0.5), high=(0.5, 0.5, 0.5))
LAMP = Light(towards=(0.0, 0.8, -0.6), colour=(0.8, 0.8, 0.8), ambient=(0.2, 0.2, 0.2))
CLEAR = Air(horizon=(0.5, 0.5, 0.5), zenith=(0.2, 0.3, 0.9), far_m=20.0)


def signed_distance(shape: Shape, point_3x: np.ndarray) -> np.ndarray:
    """Metres to the shape's surface, negative inside what is solid: written without the code under test."""
    if isinstance(shape, Plane):
        return (point_3x[1] - shape.height_m) * (1 if shape.up else -1)
    if isinstance(shape, Sphere):
        return (
            np.linalg.norm(point_3x - np.reshape(shape.centre, (3,) + (1,) * (point_3x.ndim - 1)), axis=0)
            - shape.radius_m
        )
    x, z = point_3x[0] - shape.centre[0], point_3x[2] - shape.centre[-1]
    if isinstance(shape, Cylinder):
        outside = [np.hypot(x, z) - shape.radius_m, np.abs(point_3x[1] - shape.centre[1]) - shape.half_height_m]
    else:
        assert isinstance(shape, Box | Walls)
        # As a complex number x + iz, the frame turned by yaw is a multiplication by exp(i yaw).
        local = (x + 1j * z) * np.exp(1j * shape.yaw)
        outside = [np.abs(local.real) - shape.half[0], np.abs(local.imag) - shape.half[-1]]
        if isinstance(shape, Walls):
            return -np.maximum(*outside)
        outside.append(np.abs(point_3x[1] - shape.centre[1]) - shape.half[1])
    return np.linalg.norm(np.maximum(outside, 0), axis=0) + np.minimum(np.max(outside, axis=0), 0)


def points(layout: Layout, depth_xHW: np.ndarray) -> np.ndarray:
    """World points [3, ..., H, W] at planar depths, by the pinhole's textbook formula."""
    camera = layout.camera
    row_HW, column_HW = np.mgrid[: camera.size, : camera.size] + 0.5 - camera.size / 2
    local = np.stack([column_HW * depth_xHW / camera.focal_px, row_HW * depth_xHW / camera.focal_px, depth_xHW])
    world = np.tensordot(camera.rotation_33, local, axes=1)
    return world + np.reshape(camera.position, (3,) + (1,) * depth_xHW.ndim)


def assert_exact(layout: Layout, scene: synth.Scene) -> None:
    """Every depth ends on a surface, with nothing before it; nothing lies before the sky up to the world's end."""
    depth_HW = scene.depth_m_HW.astype(np.float64)
    end_3HW = points(layout, depth_HW)
    to_surface_HW = np.min([np.abs(signed_distance(shape, end_3HW)) for shape in layout.shapes], axis=0)
    assert to_surface_HW[~scene.sky_HW].max(initial=0.0) < 1e-4
    reach_HW = np.where(scene.sky_HW, layout.air.far_m, depth_HW)
    way_3SHW = points(layout, np.linspace(0.0, 0.999, 40)[:, None, None] * reach_HW)
    for shape in layout.shapes:
        assert signed_distance(shape, way_3SHW).min() > -1e-4, type(shape).__name__


@pytest.mark.parametrize("domain", synth.DOMAINS)
@pytest.mark.parametrize("index", range(6))
def test_depth_lies_on_the_nearest_surface(domain: str, index: int) -> None:
    assert_exact(synth.layout(domain, 5, index, SIZE), synth.render(domain, 5, index, SIZE))


def along_the_ray(camera: Camera) -> np.ndarray:
    direction_3HW = DIRECTIONS(camera)
    return direction_3HW / np.linalg.norm(direction_3HW, axis=0)


def half_a_pixel_off(camera: Camera) -> np.ndarray:
    return DIRECTIONS(camera) + 0.5 / camera.focal_px * camera.rotation_33[:, 0, None, None]


def mirrored(camera: Camera) -> np.ndarray:
    return DIRECTIONS(camera)[:, :, ::-1]


DIRECTIONS = Camera.directions


@pytest.mark.parametrize("mutant", [along_the_ray, half_a_pixel_off, mirrored])
def test_a_wrong_camera_is_noticed(mutant: Callable[[Camera], np.ndarray], monkeypatch: pytest.MonkeyPatch) -> None:
    layout = synth.layout("wide", 5, 0, SIZE)
    monkeypatch.setattr(Camera, "directions", mutant)
    with pytest.raises(AssertionError):
        assert_exact(layout, synth.render("wide", 5, 0, SIZE))


@pytest.mark.parametrize("missing", [Plane, Box, Sphere, Cylinder])
def test_a_wrong_shape_is_noticed(missing: type, monkeypatch: pytest.MonkeyPatch) -> None:
    index = next(i for i in range(99) if any(isinstance(s, missing) for s in synth.layout("labelled", 5, i).shapes[1:]))
    right = missing.hit
    monkeypatch.setattr(missing, "hit", lambda self, o, d: right(self, o, d) * 1.01)
    with pytest.raises(AssertionError):
        assert_exact(synth.layout("labelled", 5, index, SIZE), synth.render("labelled", 5, index, SIZE))


def level_camera(size: int = 64, fov_deg: float = 60.0) -> Camera:
    return Camera.standing(size=size, fov_deg=fov_deg, pitch_deg=0, roll_deg=0, height_m=1.5)


def test_planar_depth_in_closed_form() -> None:
    camera = level_camera()
    assert camera.focal_px == pytest.approx(32 / math.tan(math.radians(30)))
    wall = trace(camera, [Walls(material=GREY, centre=(0.0, 0.0), half=(50.0, 7.0))])
    np.testing.assert_allclose(wall.depth_HW, 7.0, rtol=1e-12)  # a wall square to the camera: the same z everywhere
    ground = trace(camera, [Plane(material=GREY)])
    below_H = np.arange(64) + 0.5 - 32
    expected_H = np.where(below_H > 0, 1.5 * camera.focal_px / below_H, np.inf)
    np.testing.assert_allclose(ground.depth_HW, np.broadcast_to(expected_H[:, None], (64, 64)), rtol=1e-12)
    odd = level_camera(size=65)  # with a pixel centre on the axis
    ball = trace(odd, [Sphere(material=GREY, centre=(0.0, 1.5, 4.0), radius_m=0.5)])
    assert ball.depth_HW[32, 32] == pytest.approx(3.5, abs=1e-12)
    assert np.isinf(ball.depth_HW[0, 0])


@pytest.mark.parametrize(
    "solid",
    [
        Box(material=GREY, centre=(0.0, 1.5, 4.0), half=(1.0, 1.0, 1.0)),
        Cylinder(material=GREY, centre=(0.0, 1.5, 4.0), radius_m=1.0, half_height_m=1.0),
    ],
)
def test_rays_along_the_axes_meet_solids(solid: Shape) -> None:
    """Zeros in a ray's direction make no NaN: not dead ahead, not straight down."""
    assert trace(level_camera(size=65), [solid]).depth_HW[32, 32] == pytest.approx(3.0, abs=1e-12)
    down = Camera.standing(size=65, fov_deg=60, pitch_deg=-90, roll_deg=0, height_m=9.5)
    below = replace(solid, centre=(0.0, 1.5, 0.0))
    seen = trace(down, [below])
    assert seen.depth_HW[32, 32] == pytest.approx(7.0, abs=1e-12)
    with np.errstate(divide="ignore"):
        vertical = below.hit(np.array([[0.5], [9.5], [0.0]]), np.array([[0.0], [-1.0], [0.0]]))
        beside = below.hit(np.array([[1.5], [9.5], [0.0]]), np.array([[0.0], [-1.0], [0.0]]))
    assert vertical == pytest.approx(7.0)
    assert np.isinf(beside).all()


def test_the_camera_turns_the_right_way() -> None:
    """Right is right in the picture, looking down shows more floor, and so does the side that a roll lowers."""
    right_ball = trace(level_camera(), [Sphere(material=GREY, centre=(1.0, 1.5, 4.0), radius_m=0.3)])
    assert np.isfinite(right_ball.depth_HW[:, 32:]).any()
    assert not np.isfinite(right_ball.depth_HW[:, :32]).any()

    def floor_rows(pitch: float, roll: float) -> np.ndarray:
        camera = Camera.standing(size=64, fov_deg=60, pitch_deg=pitch, roll_deg=roll, height_m=1.5)
        return np.isfinite(trace(camera, [Plane(material=GREY)]).depth_HW).sum(axis=0)

    assert (floor_rows(-10, 0) > floor_rows(0, 0)).all()
    assert floor_rows(0, 8)[-1] > floor_rows(0, 0)[-1] > floor_rows(0, -8)[-1]


@pytest.mark.parametrize("index", range(8))
def test_windows_cut_nothing_off(index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = synth.layout("wide", 11, index, SIZE)
    quick = trace(layout.camera, layout.shapes)
    whole = (slice(0, SIZE), slice(0, SIZE))
    monkeypatch.setattr(Camera, "window", lambda *_: whole)
    slow = trace(layout.camera, layout.shapes)
    np.testing.assert_array_equal(quick.depth_HW, slow.depth_HW)
    np.testing.assert_array_equal(quick.shape_HW, slow.shape_HW)


def digest(scene: synth.Scene) -> str:
    parts = scene.image_HWC, scene.depth_m_HW, scene.sky_HW, np.float64(scene.focal_px)
    return hashlib.sha256(b"".join(np.ascontiguousarray(part).tobytes() for part in parts)).hexdigest()


def test_a_scene_is_a_pure_function_of_its_arguments() -> None:
    names = [(domain, seed, index) for domain in synth.DOMAINS for seed in (0, 1) for index in (0, 1, 7)]
    forwards = {name: digest(synth.render(*name, SIZE)) for name in names}
    assert {name: digest(synth.render(*name, SIZE)) for name in reversed(names)} == forwards
    assert len(set(forwards.values())) == len(names)
    assert [digest(s) for s in synth.iter_scenes("wide", 1, 2, SIZE)] == [forwards["wide", 1, i] for i in (0, 1)]
    code = f"from tests.dataio.test_synth import digest, synth\nprint(digest(synth.render('wide', 1, 7, {SIZE})))"
    root = Path(synth.__file__).parents[1]
    other = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert other.stdout.strip() == forwards["wide", 1, 7]


def test_the_same_scene_at_any_size() -> None:
    small, large = (synth.layout("wide", 2, 3, size) for size in (28, 112))
    assert small.shapes == large.shapes
    assert large.camera.focal_px == pytest.approx(4 * small.camera.focal_px)


@pytest.mark.parametrize("domain", synth.DOMAINS)
def test_ranges_and_sky(domain: str) -> None:
    far_m = synth.DOMAINS[domain].far_m
    skies = 0
    for scene in synth.iter_scenes(domain, 3, 30, SIZE):
        assert scene.image_HWC.dtype == np.uint8
        assert scene.image_HWC.shape == (SIZE, SIZE, 3)
        assert scene.image_HWC.std() > 4
        assert scene.depth_m_HW.dtype == np.float32
        assert scene.sky_HW.dtype == bool
        assert (scene.depth_m_HW[scene.sky_HW] == 0).all()
        seen = scene.depth_m_HW[~scene.sky_HW]
        assert seen.size > 0.1 * SIZE * SIZE
        assert seen.min() > 0.1
        assert seen.max() <= far_m
        skies += bool(scene.sky_HW.any())
    assert 0 < skies < 30


@pytest.mark.parametrize("domain", synth.DOMAINS)
def test_draws_follow_the_domain(domain: str) -> None:
    table = synth.DOMAINS[domain]
    layouts = [synth.layout(domain, 4, index) for index in range(250)]
    cameras = [layout.camera for layout in layouts]
    fov = np.degrees([2 * math.atan(c.size / 2 / c.focal_px) for c in cameras])
    pitch = np.degrees([math.asin(c.rotation_33[1, 2]) for c in cameras])
    roll = np.degrees([math.atan2(-c.rotation_33[1, 0], -c.rotation_33[1, 1]) for c in cameras])
    height = np.array([c.position[1] for c in cameras])
    for drawn, (low, high) in (
        (fov, table.fov_deg), (pitch, table.pitch_deg), (roll, table.roll_deg), (height, table.camera_m),
    ):  # fmt: skip
        assert drawn.min() >= low - 1e-6
        assert drawn.max() <= high + 1e-6
        assert np.ptp(drawn) >= 0.9 * (high - low)
        assert drawn.mean() == pytest.approx((low + high) / 2, abs=0.1 * (high - low) + 1e-6)
    for camera in cameras:
        np.testing.assert_allclose(camera.rotation_33.T @ camera.rotation_33, np.eye(3), atol=1e-12)
    outdoor = np.mean([not any(isinstance(s, Walls) for s in layout.shapes) for layout in layouts])
    assert outdoor == pytest.approx(table.outdoor, abs=0.1)
    textures = {shape.material.texture for layout in layouts for shape in layout.shapes}
    assert textures == set(range(table.textures))
    kinds = {type(shape) for layout in layouts for shape in layout.shapes}
    assert kinds == {Plane, Walls, Box, Sphere, Cylinder}
    lights = {layout.light for layout in layouts}
    assert len(lights) == (1 if table.light else len(layouts))
    foggy = np.mean([layout.air.fog_per_m > 0 for layout in layouts])
    assert foggy == pytest.approx(table.fog, abs=0.1)


def test_the_documented_domains() -> None:
    tame, wide = synth.DOMAINS["labelled"], synth.DOMAINS["wide"]
    assert (tame.outdoor, tame.textures, tame.fov_deg, tame.pitch_deg) == (0.4, 4, (65, 65), (-15, -5))
    assert (wide.outdoor, wide.textures, wide.fov_deg, wide.pitch_deg) == (0.6, 16, (45, 95), (-35, 8))
    assert wide.roll_deg == (-8, 8)
    assert tame.far_m == wide.far_m == 20.0
    assert len(TEXTURES) == len(set(TEXTURES)) == 16


def test_wide_looks_wider() -> None:
    def spread(domain: str) -> tuple[float, float]:
        images = [s.image_HWC.astype(np.float64) for s in synth.iter_scenes(domain, 6, 60, SIZE)]
        saturation = np.mean([np.ptp(image, axis=2).mean() for image in images])
        return float(saturation), float(np.std([image.mean() for image in images]))

    (tame_colour, tame_light), (wide_colour, wide_light) = spread("labelled"), spread("wide")
    assert wide_colour > 1.5 * tame_colour
    assert wide_light > 1.1 * tame_light


def picture(camera: Camera, shapes: list[Shape], air: Air = CLEAR) -> np.ndarray:
    light_CHW = paint(shapes, trace(camera, shapes), camera, LAMP, air)
    return expose(light_CHW, 0.0, np.zeros_like(light_CHW)).astype(int)


def test_light_and_shadow() -> None:
    camera = Camera.standing(size=65, fov_deg=60, pitch_deg=-20, roll_deg=0, height_m=1.5)
    bare, ball = Plane(material=GREY), Sphere(material=GREY, centre=(0.0, 0.9, 4.0), radius_m=0.5)
    without, with_ball = picture(camera, [bare]), picture(camera, [bare, ball])
    on_floor_HW = trace(camera, [bare, ball]).shape_HW == 0
    darker_HW = on_floor_HW & (with_ball[..., 0] < without[..., 0] - 20)
    # The lamp is up and behind the camera: the shadow falls straight beyond the ball. Its exact place, from geometry:
    point_3HW = points(Layout(camera=camera, shapes=(), light=LAMP, air=CLEAR, grain=0, softness=0),
                       np.where(on_floor_HW, trace(camera, [bare]).depth_HW, 0.0))  # fmt: skip
    to_ball_3HW = np.reshape(ball.centre, (3, 1, 1)) - point_3HW
    towards_311 = np.reshape(LAMP.towards, (3, 1, 1))
    beside_HW = np.linalg.norm(to_ball_3HW - (to_ball_3HW * towards_311).sum(0) * towards_311, axis=0)
    assert darker_HW.sum() > 20
    assert ((beside_HW < ball.radius_m) == darker_HW)[on_floor_HW].mean() > 0.995
    column = with_ball[:, 32, 0][trace(camera, [bare, ball]).shape_HW[:, 32] == 1]
    assert column[0] > column[-1] + 20  # lit from above


def test_every_texture_is_its_own() -> None:
    def wall(texture: int) -> bytes:
        paper = Material(texture=texture, low=(0.1, 0.1, 0.1), high=(0.9, 0.9, 0.9), tile_m=3.0)
        return picture(level_camera(), [Walls(material=paper, centre=(0.0, 0.0), half=(9.0, 4.0))]).tobytes()

    assert len({wall(texture) for texture in range(len(TEXTURES))}) == len(TEXTURES)


def test_the_world_ends_in_the_sky() -> None:
    """Behind the last depth a picture shows sky alone, and no edge where it begins."""
    camera = level_camera()
    far = Box(material=GREY, centre=(0.0, 5.0, 24.0), half=(3.0, 5.0, 2.0))
    np.testing.assert_array_equal(picture(camera, [far]), picture(camera, []))
    ground = picture(camera, [Plane(material=GREY)])[:, 0]
    rows = trace(camera, [Plane(material=GREY)]).depth_HW[:, 0]
    last = int(np.flatnonzero(rows < 20.0)[0])
    assert np.abs(ground[last] - ground[last - 1]).max() <= 12


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(("lunar", 0, 0), "labelled, wide"), (("wide", 0, -1), "index -1"), (("wide", 0, 0, 4), "size 4")],
)
def test_wrong_arguments_are_refused(arguments: tuple, words: str) -> None:
    with pytest.raises(DataError, match=words) as refusal:
        synth.render(*arguments)
    assert refusal.value.exit_status == 2
