"""Formats of pseudo-labels: size, time and error on real teacher output, and whether a student can tell them apart.

    .venv/bin/python benchmarks/bench_labels.py --out labels

The teacher is the quickstart's, trained here (a folder of `fathom quickstart --out` serves as well, and what it holds
is not made again), and labels the photographs of ../shared/real/photos, where they are there, at 518 pixels, and
synthetic scenes at 112. Then students of the quickstart's recipe learn from its labels: at several stages the loss and
its gradient with each format are compared with those with float32 labels, on the same batches; and whole trainings with
the same seed are compared. Labels of 10 and 8 bits show that the comparison sees coarse labels; labels whose last bit
in float32 is moved up or down show how far apart trainings drift of which nothing can be told.

`--quick` shrinks everything (2 minutes, the figures of trainings mean nothing); `--weights` names another teacher and
leaves the students out.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import numpy as np
import torch
import yaml

from benchmarks.common import command_line, hardware
from benchmarks.label_students import (
    COARSE,
    FLOAT32,
    FORMATS,
    LAST_BIT,
    Addressed,
    Compared,
    Map,
    label_maps,
    photographs,
    train_student,
)
from cluster.stop import StopFlag, Stopped, exit_status
from dataio import header, synth
from dataio.dataset import Dataset
from dataio.label_codec import EncodedLabel, as_png16, decode, encode
from dataio.png16 import decode_codes
from launcher import recipes
from model import DepthAnything
from model.preprocess import lower_bound_size
from trainer.config import ConfigError
from trainer.quickstart import Request, Sizes, begin, evaluate_stage, make_data, train_stage

PHOTOGRAPHS = Path(__file__).resolve().parent.parent.parent / "shared" / "real" / "photos"
SCENES = 200  # synthetic ones, for sizes and times
INPUT_SIZE = 518
MEASURED = 16  # batches on which losses are compared, at each stage
TRAINED = (FLOAT32, LAST_BIT, "png", "8 bits")
NAMES = {FLOAT32: "float32", LAST_BIT: "float32, last bit moved", "png": "png, 12 bits"}
QUICK = 0.02


def make_request(out: Path, seed: int, scale: float) -> Request:
    """The quickstart's, with `scale` times its images and steps."""
    plain = {name: yaml.safe_load(recipes.read(f"quickstart-{name}")) for name in ("encoder", "teacher", "student")}
    full = Sizes()
    counts = {name: max(48, round(getattr(full, name) * scale)) for name in ("labelled", "wide", "evaluation")}
    sizes = full if scale == 1.0 else Sizes(steps=scale, **counts)
    return Request(out=str(out), recipes=plain, seed=seed, sizes=sizes)


def make_teacher(request: Request, stop: StopFlag) -> str:
    """Scenes, stand-in encoder and teacher, as `fathom quickstart` makes them. The teacher's weights."""
    from cluster.runtime import ray_session
    from trainer.folder import RunFolder

    begin(request)
    make_data(request, stop)
    folders = [RunFolder(os.path.join(request.out, "runs", name)) for name in ("encoder", "teacher")]
    if any(folder.finished_step() is None for folder in folders):
        with ray_session(cpus=2):
            for name in ("encoder", "teacher"):
                train_stage(request, name, stop)
    return folders[-1].weights


def photograph_maps(network: DepthAnything, folder: Path, size: int) -> list[Map]:
    """Labels of the photographs in a folder, at the size that labelling gives the network."""
    images = [header.displayed(path.read_bytes()) for path in sorted(folder.glob("*.jpg"))]
    return label_maps(network, images, [lower_bound_size(*image.shape[:2], size) for image in images])


def scene_maps(network: DepthAnything, count: int, size: int) -> list[Map]:
    """Labels of scenes that no training has seen."""
    images = [scene.image_HWC for scene in synth.iter_scenes("wide", 8_000_009, count, size)]
    return label_maps(network, images, [(size, size)] * count)


def seconds(function: Callable[[], object], repeats: int) -> list[float]:
    """Of each call."""
    found = []
    for _ in range(repeats):
        began = time.perf_counter()
        function()
        found.append(time.perf_counter() - began)
    return found


def quartiles(values: Sequence[float], digits: int = 2) -> str:
    """Median and quartiles."""
    low, middle, high = np.percentile(values, (25, 50, 75))
    return f"{middle:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def of_format(maps: Sequence[Map], encoding: str, repeats: int) -> str:
    """A row of the table of formats."""
    times: dict[str, list[float]] = {"encode": [], "decode": [], "training": []}
    sizes, worst, mean = [], [], []
    for map_HW in maps:
        label: EncodedLabel = encode(map_HW, encoding)  # type: ignore[arg-type]
        member = (label.extension, label.data, label.meta)
        for name, function in {
            "encode": lambda: encode(map_HW, encoding),  # type: ignore[arg-type]  # noqa: B023
            "decode": lambda: decode(*member),  # noqa: B023
            "training": lambda: decode_codes(as_png16(*member)[0]),  # noqa: B023
        }.items():
            times[name] += seconds(function, repeats)
        off_HW = np.abs(decode(*member).astype(np.float64) - map_HW) / float(map_HW.max() - map_HW.min())
        sizes.append(len(label.data) / 1024)
        worst.append(off_HW.max())
        mean.append(off_HW.mean())
    cells = [f"{np.mean(sizes):.1f}", *(quartiles(1e3 * np.array(values)) for values in times.values())]
    cells += [f"{1e6 * np.max(worst):.1f}", f"{1e6 * np.mean(mean):.1f}"]
    return f"| {encoding} | {' | '.join(cells)} |"


def print_formats(title: str, maps: Sequence[Map], repeats: int) -> None:
    """Size, time and error of every format."""
    sides = sorted({map_HW.shape for map_HW in maps})
    shown = ", ".join(f"{height} x {width}" for height, width in sides)
    raw = np.mean([map_HW.nbytes for map_HW in maps]) / 1024
    print(f"\n### {title}: {len(maps)} maps of {shown}; {raw:.0f} KiB as float32\n")
    print("| format | KiB | encode, ms | decode, ms | for training, ms | largest error, 1e-6 | mean error, 1e-6 |")
    print("|---|---|---|---|---|---|---|")
    for encoding in FORMATS:
        print(of_format(maps, encoding, repeats), flush=True)


def percent(value: float) -> str:
    """With three digits, however small."""
    return f"{100 * value:.3g} %"


def print_compared(rows: Sequence[Compared]) -> None:
    """The student's loss and gradient by stage."""
    kinds = [LAST_BIT, *FORMATS, *COARSE]
    heads = [NAMES.get(kind, kind) for kind in kinds]
    for title, spread, of in (
        ("loss on pseudo-labels: mean of |difference| / loss", "loss_spread", "loss_off"),
        ("gradient of that loss: mean of |difference| / length", "gradient_spread", "gradient_off"),
    ):
        print(f"\n### The student's {title}, against float32 labels\n")
        print(f"| after steps | loss | from batch to batch | {' | '.join(heads)} |\n|{'---|' * (3 + len(kinds))}")
        for row in rows:
            cells = [percent(getattr(row, of)[kind]) for kind in kinds]
            print(f"| {row.step} | {row.loss:.4f} | {percent(getattr(row, spread))} | {' | '.join(cells)} |")


def train_students(
    request: Request, addressed: Addressed, maps: Path, out: Path, stages: Sequence[int], measured: int
) -> list[Compared]:
    """One student a kind of label, two at a time on a thread each; losses are compared in the first."""
    compared: list[Compared] = []
    with ProcessPoolExecutor(min(2, os.cpu_count() or 1), multiprocessing.get_context("spawn")) as pool:
        waiting = {
            kind: pool.submit(
                train_student, request, str(addressed.folder), str(maps), kind, str(out / kind),
                stages if kind == FLOAT32 else (), measured,
            )
            for kind in TRAINED
        }  # fmt: skip
        for kind, future in waiting.items():
            found, spent = future.result()
            compared += found
            print(f"student of {NAMES.get(kind, kind)} labels: {spent:.0f} s", file=sys.stderr, flush=True)
    return compared


def print_students(request: Request, out: Path, stop: StopFlag) -> None:
    """Figures of the trained students, and how far their maps are from those of the one with float32 labels."""
    steps = round(800 * request.sizes.steps)
    print(f"\n### Students of {steps} steps, seed {request.seed}, {request.sizes.evaluation} scenes of each domain\n")
    print("| labels | AbsRel | delta1 | delta1, labelled domain | distance of its maps, of their mean deviation |")
    print("|---|---|---|---|---|")
    scenes = [scene.image_HWC for scene in synth.iter_scenes("wide", 8_000_009, 64, request.sizes.image)]
    sizes = [scene.shape[:2] for scene in scenes]
    first: np.ndarray | None = None
    for kind in TRAINED:
        name = kind.replace(", ", "-").replace(" ", "-")
        rows = evaluate_stage(request, f"labels-{name}", str(out / kind), stop)
        maps_NHW = np.stack([normalised(m) for m in label_maps(load(str(out / kind / "weights")), scenes, sizes)])
        first = maps_NHW if first is None else first
        off = float(np.abs(maps_NHW - first).mean())  # of maps whose mean deviation is 1
        wide, labelled = rows["wide"], rows["labelled domain"]
        cells = [f"{wide['abs_rel']:.4f}", f"{wide['delta1']:.4f}", f"{labelled['delta1']:.4f}", percent(off)]
        print(f"| {NAMES.get(kind, kind)} | {' | '.join(cells)} |", flush=True)


def normalised(map_HW: Map) -> Map:
    """Without the scale and shift that the loss leaves open: median 0, mean absolute deviation 1."""
    centred_HW = map_HW - np.median(map_HW)
    return centred_HW / max(float(np.abs(centred_HW).mean()), 1e-9)


def load(weights: str) -> DepthAnything:
    """A network to label with."""
    return DepthAnything.from_pretrained(weights).eval().requires_grad_(False)


def run(arguments: argparse.Namespace, out: Path, stop: StopFlag) -> None:
    """Everything, in order."""
    scale = QUICK if arguments.quick else arguments.scale
    request = make_request(out, arguments.seed, scale)
    weights = arguments.weights or make_teacher(request, stop)
    network = load(weights)
    print(f"{hardware('cpu')}, load {os.getloadavg()[0]:.1f}; torch {torch.__version__}; one thread, medians")
    teacher = f"the weights in {arguments.weights}" if arguments.weights else f"the quickstart's, seed {request.seed}"
    print(f"teacher: {teacher}{'' if scale == 1.0 else f'; {scale:g} of its images and steps'}")
    small = scale < 0.1
    if arguments.photos.is_dir():
        maps = photograph_maps(network, arguments.photos, arguments.input_size)
        print_formats("Photographs", maps[:2] if small else maps, 3)
    else:
        print(f"\nskipped: the photographs, which are not in {arguments.photos}")
    print_formats("Synthetic scenes", scene_maps(network, 20 if small else SCENES, request.sizes.image), 3)
    if arguments.weights:
        return
    addressed = Addressed(request, out / "addressed")
    addressed.write()
    images = [header.displayed(data) for _, data in photographs(Dataset.open(str(out / "data" / "wide")))]
    np.save(out / "maps.npy", np.stack(label_maps(network, images, [image.shape[:2] for image in images])))
    steps = round(800 * request.sizes.steps)
    stages = sorted({0, steps // 16, steps // 4})
    students = out / "students"
    compared = train_students(request, addressed, out / "maps.npy", students, stages, 2 if small else MEASURED)
    print_compared(compared)
    print_students(request, students, stop)


def main() -> None:
    """Measure, and print tables."""
    parser = command_line(__doc__)
    parser.add_argument("--out", type=Path, help="where scenes and networks go; default: a folder that is then removed")
    parser.add_argument("--photos", type=Path, default=PHOTOGRAPHS)
    parser.add_argument("--weights", help="a trained network; then no student is trained")
    parser.add_argument("--input-size", type=int, default=INPUT_SIZE, help="shorter side of the photographs' labels")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--scale", type=float, default=1.0, help="times all images and steps")
    parser.add_argument("--quick", action="store_true", help=f"--scale {QUICK} and fewer repetitions")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder, StopFlag() as stop:
            run(arguments, (arguments.out or Path(folder)).resolve(), stop)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
    except Stopped as stopped:
        print("stopped; with --out the same command goes on from here", file=sys.stderr)
        sys.exit(exit_status(stopped.reason))


if __name__ == "__main__":
    main()
