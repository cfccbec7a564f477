"""Synthetic photographs with exact depth: two domains of ray-cast rooms and landscapes.

The *labelled* domain, tame and narrow, stands for the sets with measured depth; the *wide* one for photographs from
anywhere. A scene is a pure function of (domain, seed, index, size): neither the process nor the order matters. (Between
CPUs a pixel may differ by a grey level, and a depth by its last bit.)

The world ends at `Domain.far_m` of planar depth. Haze hides what is near that end and everything behind it, in the
colour of the sky in that direction; so such pixels *are* sky: marked in `sky_HW`, with depth 0. No depth is clipped:
every positive one is that of a surface. Depths are planar (along the optical axis) and taken at pixel centres, while
the picture's lens mixes in a little of the neighbours.

Shape suffixes: H W pixels, C colour channel (RGB).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dataio.spec import DataError
from dataio.synth_layout import Domain, Draws, Layout, compose
from dataio.synth_paint import Light, expose, paint
from dataio.synth_scene import trace

_NOON = Light(towards=(-0.48, 0.78, -0.40), colour=(0.85, 0.83, 0.78), ambient=(0.36, 0.38, 0.42))

DOMAINS: dict[str, Domain] = {
    "labelled": Domain(
        outdoor=0.4, textures=4, fov_deg=(65, 65), pitch_deg=(-15, -5), roll_deg=(0, 0), camera_m=(1.2, 1.8),
        solids=(3, 6), saturation=(0.0, 0.3), brightness=(0.55, 0.9), contrast=(0.65, 0.85), second_hue=0.0,
        light=_NOON, fog=0.0, fog_per_m=(0, 0), clouds=(0, 0), grain=(0.002, 0.010), softness=(0.10, 0.10),
    ),
    "wide": Domain(
        outdoor=0.6, textures=16, fov_deg=(45, 95), pitch_deg=(-35, 8), roll_deg=(-8, 8), camera_m=(0.8, 2.2),
        solids=(2, 9), saturation=(0.0, 0.9), brightness=(0.25, 1.0), contrast=(0.3, 0.9), second_hue=0.4,
        light=None, fog=0.35, fog_per_m=(0.02, 0.09), clouds=(0.0, 0.8), grain=(0.0, 0.04), softness=(0.02, 0.18),
    ),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A picture and what is true of it.

    `image_HWC` is uint8 RGB. `depth_m_HW` is float32, planar depth in metres at pixel centres, 0 exactly where `sky_HW`
    (bool) is true. The camera is a pinhole of `focal_px` pixels whose principal point is the picture's centre.
    """

    image_HWC: npt.NDArray[np.uint8]
    depth_m_HW: npt.NDArray[np.float32]
    sky_HW: npt.NDArray[np.bool_]
    focal_px: float


def layout(domain: str, seed: int, index: int, size: int = 112) -> Layout:
    """What `render` draws with the same arguments: camera, shapes, light and air. Raises DataError on bad arguments."""
    return _drawn(domain, seed, index, size)[0]


def render(domain: str, seed: int, index: int, size: int = 112) -> Scene:
    """Scene number `index` of a domain (a key of DOMAINS), `size` pixels square: a pure function of its arguments.

    Raises DataError for an unknown domain, a negative index or a size below 8.
    """
    plan, draws = _drawn(domain, seed, index, size)
    traced = trace(plan.camera, plan.shapes)
    sky_HW = ~(traced.depth_HW < plan.air.far_m)
    light_CHW = paint(plan.shapes, traced, plan.camera, plan.light, plan.air)
    return Scene(
        image_HWC=expose(light_CHW, plan.softness, draws.grain(plan.grain, light_CHW.shape)),
        depth_m_HW=np.where(sky_HW, 0.0, traced.depth_HW).astype(np.float32),
        sky_HW=sky_HW,
        focal_px=plan.camera.focal_px,
    )


def iter_scenes(domain: str, seed: int, count: int, size: int = 112) -> Iterator[Scene]:
    """Scenes 0 to `count` - 1 of `render`, in order, one at a time."""
    for index in range(count):
        yield render(domain, seed, index, size)


def _drawn(domain: str, seed: int, index: int, size: int) -> tuple[Layout, Draws]:
    if domain not in DOMAINS:
        raise DataError(f"domain: found {domain!r}, must be one of {', '.join(DOMAINS)}")
    if index < 0 or size < 8:
        raise DataError(f"synthetic scene: found index {index} and size {size}; index must be >= 0, size >= 8")
    draws = Draws(domain, seed, index)
    return compose(DOMAINS[domain], draws, size), draws
