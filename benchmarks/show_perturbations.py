"""Our perturbations beside torchvision's and Pillow's at the same strengths: the picture and table of
docs/perturbations.md.

    .venv/bin/python benchmarks/show_perturbations.py --out docs/images/perturbations.png
    .venv/bin/python benchmarks/show_perturbations.py --photos FOLDER    # the table for photographs of yours

The table's numbers are grey levels of 255, over all images: mean absolute difference, its 99th percentile, and the
difference of an image's mean grey. The picture shows one synthetic scene per row; its last column is the difference,
times 3, around mid-grey.

Shape suffixes: H W pixels, C colour channel (RGB).
"""

from __future__ import annotations

import argparse
import io
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import numpy.typing as npt
from nvidia.dali import fn, pipeline_def, types
from PIL import Image, ImageDraw, ImageFilter
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as tv

from dataio.dali_batch import MEAN, STD, DaliBatch, Row
from dataio.draws import Photometric
from dataio.spec import Perturbation
from dataio.synth import render

Pixels = npt.NDArray[np.uint8]
Theirs = Callable[[Image.Image, Photometric], Image.Image]

ORDER = ("brightness", "contrast", "saturation", "hue")  # torchvision's, where it does not shuffle
ALL = Photometric(brightness=0.7, contrast=1.4, saturation=1.3, hue_degrees=40.0)
COLUMNS = ("image", "clean view", "student view", "theirs", "student - theirs, x 3")
TILE, GAP, CAPTION, LABEL = 120, 4, 14, 140
AMPLIFIED = 3


def jitter(image: Image.Image, draw: Photometric, order: Sequence[str] = ORDER) -> Image.Image:
    """torchvision's ColorJitter with the numbers of a draw, on a PIL image as UniMatch uses it."""
    for name in order:
        if name == "hue":
            image = tv.adjust_hue(image, draw.hue_degrees / 360)
        else:
            image = getattr(tv, f"adjust_{name}")(image, getattr(draw, name))
    return image


def backwards(image: Image.Image, draw: Photometric) -> Image.Image:
    return jitter(image, draw, ORDER[::-1])


def unimatch(image: Image.Image, draw: Photometric) -> Image.Image:
    """Jitter in a shuffled order (the same every time for the same draw), grey, Pillow's blur."""
    image = jitter(image, draw, random.Random(repr(draw)).sample(ORDER, 4))
    if draw.grayscale:
        image = tv.rgb_to_grayscale(image, 3)
    return image.filter(ImageFilter.GaussianBlur(draw.blur_sigma)) if draw.blur_sigma else image


def torchvision_blur(image: Image.Image, draw: Photometric) -> Image.Image:
    return tv.gaussian_blur(image, 2 * int(np.ceil(3 * draw.blur_sigma)) + 1, draw.blur_sigma)


# label -> (draw, the other implementation); the table has all of them, the picture those of SHOWN
CASES: dict[str, tuple[Photometric, Theirs]] = {
    "brightness 0.5": (Photometric(brightness=0.5), jitter),
    "brightness 1.5": (Photometric(brightness=1.5), jitter),
    "contrast 0.5": (Photometric(contrast=0.5), jitter),
    "contrast 1.5": (Photometric(contrast=1.5), jitter),
    "saturation 0.5": (Photometric(saturation=0.5), jitter),
    "saturation 1.5": (Photometric(saturation=1.5), jitter),
    "hue 45 degrees": (Photometric(hue_degrees=45), jitter),
    "hue 90 degrees": (Photometric(hue_degrees=90), jitter),
    "hue -90 degrees": (Photometric(hue_degrees=-90), jitter),
    "grey": (Photometric(grayscale=True), unimatch),
    "blur 0.5": (Photometric(blur_sigma=0.5), torchvision_blur),
    "blur 2": (Photometric(blur_sigma=2.0), torchvision_blur),
    "blur 0.5, Pillow's": (Photometric(blur_sigma=0.5), unimatch),
    "blur 2, Pillow's": (Photometric(blur_sigma=2.0), unimatch),
    "all four colours": (ALL, jitter),
    "all four, reverse order": (ALL, backwards),
}
SHOWN = (
    "brightness 1.5", "contrast 0.5", "contrast 1.5", "saturation 1.5", "hue 90 degrees", "hue -90 degrees", "grey",
    "blur 2, Pillow's", "all four colours", "all four, reverse order",
)  # fmt: skip


def ours(images: Sequence[Image.Image], draws: Sequence[Photometric], size: int) -> tuple[list[Pixels], list[Pixels]]:
    """The clean and the student view of the whole of each image, normalisation undone."""
    rows = [Row(image=_png(image), photometric=draw) for image, draw in zip(images, draws, strict=True)]
    batch = DaliBatch(len(rows), size, views=("clean", "student"), targets=False, device="cpu", threads=1)
    views = batch.run(rows).views
    clean, student = (
        [np.rint((view.permute(1, 2, 0).numpy() * STD + MEAN) * 255).astype(np.uint8) for view in views[name]]
        for name in ("clean", "student")
    )
    return clean, student


@pipeline_def(exec_dynamic=True, prefetch_queue_depth=1, num_threads=1, device_id=None)
def _resize(size: int) -> Any:
    image = fn.external_source(name="image", dtype=types.UINT8, ndim=3, layout="HWC")
    return fn.resize(image, interp_type=types.INTERP_CUBIC, antialias=False, size=[size, size])


def dali_resize(images: Sequence[Image.Image], size: int) -> list[Pixels]:
    """By the kernel that the pipeline has on a GPU."""
    pipeline = _resize(size, batch_size=len(images))
    (resized,) = pipeline.run(image=[np.asarray(image.convert("RGB")) for image in images])
    return list(resized.as_array())


def table(images: Sequence[Image.Image], size: int) -> list[str]:
    """Lines of Markdown. All but the first two rows compare what follows the resize: both start from our clean view."""
    lines = ["| | mean | 99 % | mean grey |", "|---|---|---|---|"]
    clean, _ = ours(images, [Photometric()] * len(images), size)
    sharp = [tv.resize(tv.pil_to_tensor(image), [size, size], InterpolationMode.BICUBIC) for image in images]
    lines.append(_line("resize, antialiased", clean, [image_CHW.permute(1, 2, 0).numpy() for image_CHW in sharp]))
    lines.append(_line("resize, as on a GPU", clean, dali_resize(images, size)))
    starts = [Image.fromarray(image_HWC) for image_HWC in clean]
    for label, (draw, theirs) in CASES.items():
        _, student = ours(starts, [draw] * len(starts), size)
        lines.append(_line(label, student, [np.asarray(theirs(start, draw)) for start in starts]))
    strong = Perturbation(jitter_p=0.8, grayscale_p=0.2, blur_p=0.5)
    draws = [Photometric.draw(strong, (0, 0, f"{i}")) for i in range(len(starts))]
    drawn = [np.asarray(unimatch(start, draw)) for start, draw in zip(starts, draws, strict=True)]
    lines.append(_line("as UniMatch draws", ours(starts, draws, size)[1], drawn))
    jittered = [replace(draw, blur_sigma=0.0, grayscale=False) for draw in draws]
    orders = [
        [np.asarray(jitter(start, draw, order)) for start, draw in zip(starts, jittered, strict=True)]
        for order in (ORDER, ORDER[::-1])
    ]
    lines.append(_line("torchvision's jitter, two orders", *orders))
    return lines


def _line(label: str, found: Sequence[Pixels], other: Sequence[Pixels]) -> str:
    errors = [a.astype(int) - b for a, b in zip(found, other, strict=True)]
    absolute = np.concatenate([np.abs(error_HWC).ravel() for error_HWC in errors])
    grey = np.mean([abs(error_HWC.mean()) for error_HWC in errors])
    return f"| {label} | {absolute.mean():.2f} | {np.percentile(absolute, 99):.0f} | {grey:.2f} |"


def picture(images: Sequence[Image.Image], size: int) -> Image.Image:
    """One row per case of SHOWN, one column each of COLUMNS; the images take turns."""
    chosen = [images[i % len(images)] for i in range(len(SHOWN))]
    cases = [CASES[label] for label in SHOWN]
    clean, student = ours(chosen, [draw for draw, _ in cases], size)
    step = TILE + GAP
    sheet = Image.new("RGB", (LABEL + len(COLUMNS) * step, CAPTION + len(SHOWN) * step), "white")
    pen = ImageDraw.Draw(sheet)
    for column, name in enumerate(COLUMNS):
        pen.text((LABEL + column * step, 1), name, "black")
    for row, (label, (draw, theirs)) in enumerate(zip(SHOWN, cases, strict=True)):
        other_HWC = np.asarray(theirs(Image.fromarray(clean[row]), draw))
        difference_HWC = np.clip(128 + AMPLIFIED * (student[row].astype(int) - other_HWC), 0, 255).astype(np.uint8)
        top = CAPTION + row * step
        pen.text((2, top + TILE // 2 - 6), label, "black")
        tiles = [chosen[row], *(Image.fromarray(x) for x in (clean[row], student[row], other_HWC, difference_HWC))]
        for column, tile in enumerate(tiles):
            sheet.paste(tile.resize((TILE, TILE), Image.Resampling.BOX), (LABEL + column * step, top))
    return sheet


def _png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where to write the picture")
    parser.add_argument("--photos", type=Path, help="a folder of images for the table, squeezed to squares")
    parser.add_argument("--size", type=int, default=280, help="pixels of the views")
    parser.add_argument("--images", type=int, default=16, help="how many")
    arguments = parser.parse_args()
    if arguments.photos:
        paths = sorted(path for path in arguments.photos.iterdir() if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
        images = [Image.open(path).convert("RGB") for path in paths[: arguments.images]]
    else:
        side = round(1.5 * arguments.size)
        images = [Image.fromarray(render("wide", 0, i, side).image_HWC) for i in range(arguments.images)]
    print("\n".join(table(images, arguments.size)))
    if arguments.out:
        sheet = picture(images, arguments.size)
        # 256 colours: a third of the bytes
        palette = sheet.quantize(256)
        sheet.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG).save(arguments.out, optimize=True)


if __name__ == "__main__":
    main()
