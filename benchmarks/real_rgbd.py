"""Real RGB-D frames: `tiny` fine-tuned on some of them, against two baselines on one that it has not seen.

    .venv/bin/python benchmarks/real_rgbd.py ../shared/real/rgbd --weights quickstart/runs/teacher/weights --out real

Packs the frames as `fathom data pack` does, trains on them as `fathom train` does, and compares the held-out frame with
the network it started from and with two floors: the best that one number everywhere could score (of each metric and
space by itself, so no single number scores all of it), and the mean disparity of the training frames pixel by pixel,
aligned to the frame by least squares as a network's is. Depths are compared under the protocols `moge` and `disparity`.
Writes table.md, results.json and sheet.png (image | truth | prediction | mean map). The default frames are views of one
room a few centimetres apart: they show that real input goes through, no more.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from PIL import Image

from benchmarks.common import command_line
from cluster import storage
from cluster.progress import Progress
from cluster.stop import StopFlag, exit_status
from dataio.codec import DEPTH_MM, decode_png16
from dataio.importers.folder import Folder, FolderOptions
from dataio.pack import pack
from dataio.show import colorize
from launcher import recipes
from model import DepthAnything
from trainer.config import absolute_paths, parse_config
from trainer.config_train import TrainConfig
from trainer.evaluate_measure import measure as measure_image
from trainer.metrics import align_scale_shift, best_constant, metrics_of
from trainer.protocols import PROTOCOLS
from trainer.run import commit, show_step, train

REPOSITORY = Path(__file__).resolve().parent.parent
SPACES = {"depth": PROTOCOLS["moge"], "disparity": PROTOCOLS["disparity"]}
COPIES = 8  # of a frame: as many crops of it in every step


def frame_files(folder: Path, name: str) -> tuple[Path, Path]:
    """A frame's image and depth map."""
    images = [path for path in (folder / f"{name}.jpg", folder / f"{name}.png") if path.is_file()]
    depth = folder / f"{name}.depth.png"
    if len(images) != 1 or not depth.is_file():
        sys.exit(f"error: {folder}: needs {name}.jpg (or .png) and {name}.depth.png")
    return images[0], depth


def pack_frames(folder: Path, names: Sequence[str], scale: float, out: Path) -> str:
    """The training frames, each COPIES times, as a dataset; returns its folder."""
    chosen = out / "frames"
    shutil.rmtree(chosen, ignore_errors=True)
    chosen.mkdir(parents=True)
    for name in names:
        photo, depth = frame_files(folder, name)
        for copy in range(COPIES):
            shutil.copy(photo, chosen / f"{name}_{copy}{photo.suffix}")
            shutil.copy(depth, chosen / f"{name}_{copy}.depth.png")
    importer = Folder(str(chosen), FolderOptions(role="labelled", depth_scale=scale))
    report = pack(importer, str(out / "data"), name="real-rgbd", restart=True)
    print(f"packed {report}")
    return str(out / "data")


def training_config(arguments: argparse.Namespace, dataset: str) -> TrainConfig:
    """The quickstart's teacher's recipe on these frames, never flipped: the camera does not mirror its room."""
    import yaml

    values: dict[str, Any] = yaml.safe_load(recipes.read("quickstart-teacher"))
    batch = COPIES * len(arguments.train)
    values |= {"name": "tiny", "runs": str(arguments.out / "runs"), "seed": arguments.seed, "steps": arguments.steps}
    weights = str(arguments.weights.resolve()) if arguments.weights else None
    values["model"] = {"preset": "tiny", "weights": weights}
    role = {"datasets": [dataset], "batch": batch, "lanes": 1, "perturbation": {"flip_p": 0.0}}
    values["data"] |= {"input_size": arguments.size, "roles": {"labelled": role}}
    values["optim"]["warmup_samples"] = min(50, arguments.steps // 4) * batch
    values["cluster"] = {"workers": 1, "threads": arguments.threads}
    values["checkpoint"] = {"every": 200}
    return parse_config(TrainConfig, absolute_paths(values), source="quickstart-teacher on real frames")


def fine_tune(arguments: argparse.Namespace) -> str:
    """Train; returns the weights' folder."""
    dataset = pack_frames(arguments.folder, arguments.train, arguments.depth_scale, arguments.out)
    config = training_config(arguments, dataset)
    shutil.rmtree(config.folder, ignore_errors=True)  # the frames or the steps may be others now
    with StopFlag() as stop, Progress("tiny", config.steps, "steps") as bar:
        outcome = train(config, on_progress=show_step(bar), stop=stop)
    if outcome.stopped:
        sys.exit(exit_status(outcome.stopped))
    return outcome.weights


def read_depth(path: Path, scale: float) -> np.ndarray:
    """Depth in metres [H, W], NaN where there is none."""
    code = type(DEPTH_MM)(scale=scale)
    depth_HW = decode_png16(path.read_bytes(), code)
    return np.where(depth_HW > 0, depth_HW, np.nan)


def mean_disparity(depths: Sequence[np.ndarray]) -> np.ndarray:
    """Mean of 1 / depth over the frames that have one there; where none has, the mean over all pixels."""
    near_NHW = 1 / np.stack(depths)
    valid_NHW = np.isfinite(near_NHW)
    count_HW = valid_NHW.sum(0)
    sum_HW = np.where(valid_NHW, near_NHW, 0).sum(0)
    return np.where(count_HW > 0, sum_HW / np.maximum(count_HW, 1), near_NHW[valid_NHW].mean())


def aligned(disparity_HW: np.ndarray, depth_HW: np.ndarray) -> np.ndarray:
    """A disparity of any scale and shift, fitted to 1 / depth where there is one."""
    valid_HW = np.isfinite(depth_HW)
    scale, shift = align_scale_shift(disparity_HW, 1 / depth_HW, valid_HW)
    return scale * disparity_HW + shift


def score(disparity_HW: np.ndarray, depth_HW: np.ndarray) -> dict[str, dict[str, float]]:
    """A disparity of any scale and shift, measured in both spaces."""
    valid_HW = np.isfinite(depth_HW)
    return {
        space: metrics_of(measure_image(protocol, disparity_HW, depth_HW, valid_HW))
        for space, protocol in SPACES.items()
    }


def floor(depth_HW: np.ndarray) -> dict[str, dict[str, float]]:
    """The best that one number could score in either space."""
    depth_K = depth_HW[np.isfinite(depth_HW)]
    return {"depth": metrics_of(best_constant(depth_K)), "disparity": metrics_of(best_constant(1 / depth_K))}


def table(rows: Mapping[str, Mapping[str, Mapping[str, float]]]) -> list[str]:
    """AbsRel is better low, delta1 better high."""
    lines = ["| | AbsRel | delta1 | AbsRel, disparity space | delta1, disparity space |", "|---|---|---|---|---|"]
    for name, row in rows.items():
        cells = [f"{row[space][metric]:.4f}" for space in SPACES for metric in ("abs_rel", "delta1")]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def verdict(rows: Mapping[str, Mapping[str, Mapping[str, float]]], trained: str) -> str:
    """Which baselines the network beats, in AbsRel and delta1 of both protocols; and what that is worth."""
    said = []
    for name in ("best constant", "mean depth map"):
        won = [
            rows[trained][space]["abs_rel"] < rows[name][space]["abs_rel"]
            and rows[trained][space]["delta1"] > rows[name][space]["delta1"]
            for space in SPACES
        ]
        said.append(f"{'beats' if all(won) else 'does not beat'} the {name}")
    return f"The network {' and '.join(said)} on this frame. A handful of frames proves plumbing, not science."


def sheet(image: Image.Image, depth_HW: np.ndarray, maps: Sequence[np.ndarray]) -> Image.Image:
    """image | truth | maps, coloured alike; warm is near, grey has no truth."""
    valid_HW = np.isfinite(depth_HW)
    tiles = [np.asarray(image), colorize(1 / np.where(valid_HW, depth_HW, 1), valid_HW)]
    tiles += [colorize(map_HW, np.ones_like(valid_HW)) for map_HW in maps]
    return Image.fromarray(np.concatenate(tiles, 1))


def measure(arguments: argparse.Namespace, weights: str) -> tuple[dict[str, Any], Image.Image]:
    """The held-out frame's rows and picture."""
    photo, depth = frame_files(arguments.folder, arguments.held_out)
    depth_HW = read_depth(depth, arguments.depth_scale)
    seen = [frame_files(arguments.folder, name)[1] for name in arguments.train]
    mean_HW = mean_disparity([read_depth(path, arguments.depth_scale) for path in seen])
    with Image.open(photo) as file:
        image = file.convert("RGB")
    starts = {"before fine-tuning": str(arguments.weights)} if arguments.weights else {}
    maps = {
        name: DepthAnything.from_pretrained(path).infer_image(np.asarray(image), input_size=arguments.size)
        for name, path in {**starts, "tiny, fine-tuned": weights}.items()
    }
    rows = {
        "best constant": floor(depth_HW),
        **{name: score(map_HW, depth_HW) for name, map_HW in {"mean depth map": mean_HW, **maps}.items()},
    }
    return rows, sheet(image, depth_HW, [aligned(maps["tiny, fine-tuned"], depth_HW), aligned(mean_HW, depth_HW)])


def parse() -> argparse.Namespace:
    """The command line."""
    parser = command_line(__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=REPOSITORY.parent / "shared" / "real" / "rgbd")
    parser.add_argument("--train", nargs="+", default=["livingroom_0", "livingroom_1"], metavar="FRAME")
    parser.add_argument("--held-out", default="livingroom_2", metavar="FRAME")
    parser.add_argument("--depth-scale", type=float, default=0.001, help="metres per code of the depth maps")
    parser.add_argument("--weights", type=Path, help="of a tiny network to start from; default: a random one")
    parser.add_argument("--size", type=int, default=252, help="the network's input, pixels")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--threads", type=int, default=2, help="of the processor; another number changes the last bits")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("real_rgbd"))
    arguments = parser.parse_args()
    if arguments.held_out in arguments.train:
        parser.error(f"--held-out: {arguments.held_out} is trained on; hold out another")
    arguments.out = arguments.out.resolve()
    return arguments


def main() -> None:
    """Train, compare, write."""
    arguments = parse()
    rows, picture = measure(arguments, fine_tune(arguments))
    lines = [*table(rows), "", verdict(rows, "tiny, fine-tuned")]
    print("\n".join(lines))
    with storage.atomic_writer(str(arguments.out / "sheet.png")) as file:
        picture.save(file, format="PNG")
    storage.atomic_write(os.path.join(arguments.out, "table.md"), "\n".join([*lines, ""]))
    kept = {key: value and str(value) for key, value in vars(arguments).items() if key not in ("folder", "out")}
    content = {"commit": commit(), "settings": kept, "rows": rows}
    storage.atomic_write(os.path.join(arguments.out, "results.json"), json.dumps(content, indent=1))


if __name__ == "__main__":
    main()
