"""Every random number of the data room: a pure function of (seed, epoch, sample key) or (seed, epoch, position).

Raw words of a counter-based Philox generator are used, never numpy's distributions, which may change across versions.
Strengths are those of `dataio.spec.Perturbation`; the sequence is UniMatch's (dataset/semi.py, dataset/transform.py):
lower-bound resize, random crop, flip; colour jitter, greyscale, blur; CutMix.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dataio.spec import Perturbation

# At UniMatch's numbers 72 % of the boxes of area 0.02 fit, and 6 % of those of area 0.4: none of 256 fits once in 6
# million times at area 0.4, once in 300 million over all areas.
_BOX_ATTEMPTS = 256


def raw_words(count: int, *identity: int | str) -> NDArray[np.uint64]:
    """`count` 64-bit words that depend on `identity` alone; TypeError for anything but plain int and str."""
    # json, not repr: a numpy integer prints differently across versions, here it is refused
    digest = hashlib.blake2b(json.dumps(identity).encode(), digest_size=16).digest()
    words: NDArray[np.uint64] = np.random.Philox(key=int.from_bytes(digest, "little")).random_raw(count)
    return words


def uniforms(count: int, *identity: int | str) -> list[float]:
    """`count` numbers uniform in [0, 1), 53 bits each, that depend on `identity` alone."""
    values: list[float] = ((raw_words(count, *identity) >> np.uint64(11)) * 2.0**-53).tolist()
    return values


@dataclass(frozen=True, kw_only=True, slots=True)
class Geometry:
    """The square input: cut out at (top, left) of the image resized to height x width; then the flip."""

    height: int
    width: int
    top: int = 0
    left: int = 0
    flip: bool = False

    @classmethod
    def draw(
        cls, perturbation: Perturbation, size: int, height: int, width: int, identity: tuple[int | str, ...]
    ) -> Geometry:
        """A `size` x `size` random crop after resizing the short side of a height x width image to `size`.

        The crop starts at a whole pixel of the resized image, so a source of the right size is not resampled.
        """
        u_top, u_left, u_flip = uniforms(3, *identity, "geometry")
        scale = size / min(height, width)
        resized_h, resized_w = max(size, round(height * scale)), max(size, round(width * scale))
        return cls(
            height=resized_h,
            width=resized_w,
            top=int(u_top * (resized_h - size + 1)),
            left=int(u_left * (resized_w - size + 1)),
            flip=u_flip < perturbation.flip_p,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Photometric:
    """Colour and sharpness: factors around 1 (torchvision's ColorJitter), hue in degrees, sigma in pixels, 0 is off."""

    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0
    hue_degrees: float = 0.0
    grayscale: bool = False
    blur_sigma: float = 0.0

    @classmethod
    def draw(cls, perturbation: Perturbation, identity: tuple[int | str, ...]) -> Photometric:
        """The draws of one sample. Each number has its own word: a changed strength moves no other draw."""
        u = uniforms(8, *identity, "photometric")
        p = perturbation

        def factor(strength: float, uniform: float) -> float:
            low = max(0.0, 1.0 - strength)
            return low + (1.0 + strength - low) * uniform

        jittered = u[0] < p.jitter_p
        return cls(
            brightness=factor(p.brightness, u[1]) if jittered else 1.0,
            contrast=factor(p.contrast, u[2]) if jittered else 1.0,
            saturation=factor(p.saturation, u[3]) if jittered else 1.0,
            hue_degrees=360.0 * p.hue * (2.0 * u[4] - 1.0) if jittered else 0.0,
            grayscale=u[5] < p.grayscale_p,
            blur_sigma=p.blur_sigma[0] + (p.blur_sigma[1] - p.blur_sigma[0]) * u[7] if u[6] < p.blur_p else 0.0,
        )

    @property
    def recolours(self) -> bool:
        """Whether any colour changes."""
        return self.grayscale or (self.brightness, self.contrast, self.saturation, self.hue_degrees) != (1, 1, 1, 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Box:
    """Rows top:bottom and columns left:right, in pixels of the input."""

    top: int
    left: int
    bottom: int
    right: int


def cutmix_box(perturbation: Perturbation, size: int, identity: tuple[int | str, ...]) -> Box | None:
    """The rectangle another image is pasted into, or None when this sample is not mixed (UniMatch's rejection rule)."""
    p = perturbation
    if p.cutmix_p <= 0:
        return None
    u = uniforms(2 + 3 * _BOX_ATTEMPTS, *identity, "cutmix")
    if u[0] >= p.cutmix_p:
        return None
    area = (p.cutmix_area[0] + (p.cutmix_area[1] - p.cutmix_area[0]) * u[1]) * size * size
    for attempt in range(_BOX_ATTEMPTS):
        u_aspect, u_left, u_top = u[2 + 3 * attempt : 5 + 3 * attempt]
        aspect = p.cutmix_aspect[0] + (p.cutmix_aspect[1] - p.cutmix_aspect[0]) * u_aspect
        height, width = int(math.sqrt(area * aspect)), int(math.sqrt(area / aspect))
        top, left = int(u_top * size), int(u_left * size)
        if height and width and top + height <= size and left + width <= size:
            return Box(top=top, left=left, bottom=top + height, right=left + width)
    return None


def cutmix_partner(own: int, share: int, *identity: int | str) -> int:
    """Which of a lane's `share` >= 2 samples in a global batch is pasted into the `own`-th: any but itself."""
    if share < 2:
        raise ValueError(f"no partner among {share} sample")
    return (own + 1 + int(raw_words(1, *identity, "partner")[0]) % (share - 1)) % share
