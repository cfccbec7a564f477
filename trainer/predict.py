"""Photographs in, depth pictures out."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from cluster import storage
from dataio.codec import encode_label
from dataio.header import EXTENSIONS, displayed
from dataio.show import colorize
from dataio.spec import DataError
from model import DepthAnything
from model.presets import PositionMode

IMAGE_SUFFIXES = tuple(f".{name}" for name in EXTENSIONS)


@dataclass(kw_only=True)
class PredictOutcome:
    """Files written, and images that could not be read with the reason."""

    written: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)


def predict(
    inputs: Sequence[str],
    weights: str,
    out: str,
    *,
    preset: str | None = None,
    position_mode: PositionMode | None = None,
    input_size: int = 518,
    device: str = "cpu",
    on_progress: Callable[[int, int], None] | None = None,
) -> PredictOutcome:
    """For every image X write X.png (image | coloured prediction), X.depth.png and X.depth.json.

    X.depth.png has 16 bits over the prediction's own range: quantity = scale * (code - zero) + shift, with the
    numbers of X.depth.json, in metres (`depth_m`) or relative (`disparity`).

    A damaged image among several is skipped and named. Raises WeightsError; DataError when nothing is there to predict
    or no image is readable.
    """
    files = find_images(inputs, out)
    names = output_names(files)
    refuse_overwriting(files, names, out)
    storage.make_folder(out)
    network = DepthAnything.from_pretrained(weights, preset=preset, position_mode=position_mode).to(device).eval()
    outcome = PredictOutcome()
    for done, file in enumerate(files):
        if on_progress:
            on_progress(done, len(files))
        try:
            image_HWC = read_photograph(file)
        except DataError as error:
            outcome.skipped[file] = str(error)
            continue
        value_HW = network.infer_image(image_HWC, input_size=input_size)
        near_HW = 1 / np.maximum(value_HW, 1e-6) if network.preset.head == "metric" else value_HW
        picture = np.concatenate([image_HWC, colorize(near_HW, np.ones(near_HW.shape, bool))], 1)
        stem = os.path.join(out, names[file])
        with storage.atomic_writer(f"{stem}.png") as target:
            Image.fromarray(picture).save(target, format="PNG", compress_level=3)
        png, code = encode_label(value_HW)
        quantity = "depth_m" if network.preset.head == "metric" else "disparity"
        storage.atomic_write(f"{stem}.depth.png", png)
        storage.atomic_write(f"{stem}.depth.json", json.dumps({"quantity": quantity, **asdict(code)}) + "\n")
        outcome.written.append(f"{stem}.png")
    if on_progress:
        on_progress(len(files), len(files))
    if not outcome.written:
        file, reason = next(iter(outcome.skipped.items()))
        raise DataError(f"{file}: {reason}; none of {len(files)} images is readable")
    return outcome


def read_photograph(file: str) -> npt.NDArray[np.uint8]:
    """An image file as datasets show it: upright, uint8 RGB [H, W, 3]. DataError, without its name, when it is none."""
    try:
        return displayed(Path(file).read_bytes())
    except Exception as error:  # Pillow raises whatever the file provokes
        raise DataError(f"cannot be read ({error})") from error


def find_images(inputs: Sequence[str], out: str | None = None) -> list[str]:
    """Image files named, or inside the folders named but not in `out` below them: each once, a folder's sorted.

    Raises DataError for a missing path or no image at all.
    """
    files: list[str] = []
    for path in inputs:
        if os.path.isdir(path):
            files += sorted(
                os.path.join(base, name)
                for base, _, names in os.walk(path)
                for name in names
                if name.lower().endswith(IMAGE_SUFFIXES)
                and not name.endswith(".depth.png")
                and not (out and _inside(base, out) and not _inside(path, out))
            )
        elif os.path.isfile(path):
            files.append(path)
        else:
            raise DataError(f"{path}: no such image or folder")
    if not files:
        raise DataError(f"{', '.join(inputs)}: holds no image ({', '.join(IMAGE_SUFFIXES)})")
    return list({os.path.realpath(file): file for file in files}.values())


def output_names(files: Sequence[str]) -> dict[str, str]:
    """A file name for each input; equal stems get their folder's name in front, then a number."""
    names: dict[str, str] = {}
    taken: set[str] = set()
    for file in files:
        stem = os.path.splitext(os.path.basename(file))[0]
        candidates = [stem, f"{os.path.basename(os.path.dirname(os.path.abspath(file)))}_{stem}"]
        candidates += [f"{stem}_{n}" for n in range(2, 2 * len(files) + 3)]
        name = next(name for name in candidates if not {name, f"{name}.depth"} & taken)
        taken |= {name, f"{name}.depth"}  # NAME.png and NAME.depth.png
        names[file] = name
    return names


def refuse_overwriting(files: Sequence[str], names: Mapping[str, str], out: str) -> None:
    """Raises DataError when a picture to write is one of the photographs to read."""
    sources = {os.path.realpath(file): file for file in files}
    for name in names.values():
        for target in (f"{name}.png", f"{name}.depth.png"):
            source = sources.get(os.path.realpath(os.path.join(out, target)))
            if source:
                raise DataError(f"{source}: would be overwritten by a prediction; choose another folder than {out}")


def _inside(path: str, folder: str) -> bool:
    path, folder = os.path.realpath(path), os.path.realpath(folder)
    return path == folder or path.startswith(os.path.join(folder, ""))
