"""The originals' preprocessing numbers, without torch.

Source: Depth-Anything `depth_anything/util/transform.py` (Resize with keep_aspect_ratio, lower_bound) and `run.py`.
"""

from __future__ import annotations

import math

PATCH = 14
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def lower_bound_size(height: int, width: int, input_size: int = 518, multiple: int = PATCH) -> tuple[int, int]:
    """The size an image is resized to: aspect kept, the shorter side about `input_size`, both sides multiples of 14.

    Args:
        height, width: the image's size in pixels.
        input_size: lower bound of both sides in pixels.
        multiple: of which both sides are multiples, in pixels.

    Returns:
        (height, width) in pixels: scale = max(input_size / h, input_size / w), each side rounded to the nearest
        multiple (halves to even, as numpy rounds), upwards where that would fall below `input_size`.

    Raises:
        ValueError: a size that is not positive.
    """
    if not isinstance(input_size, int):
        raise ValueError(f"input_size must be a whole number of pixels, got {input_size!r}")
    if height < 1 or width < 1 or input_size < 1:
        raise ValueError(f"sizes must be positive, got image {height} x {width} and input_size {input_size}")
    scale = max(input_size / height, input_size / width)

    def side(pixels: int) -> int:
        exact = scale * pixels / multiple
        rounded = round(exact) * multiple
        return rounded if rounded >= input_size else math.ceil(exact) * multiple

    return side(height), side(width)
