"""The student's batches beside torch DataLoader + webdataset + PIL + torchvision: images/s, stages, memory.

    .venv/bin/python benchmarks/bench_data.py --threads 2 --repeats 7

Both read the same shards: photograph-like JPEGs (4:2:0) of 640 x 480 to 1024 x 768 pixels, a third labelled with 16-bit
depth, two thirds with pseudo-labels beside them, and make batches of one labelled to two unlabelled images with the
perturbations of launcher/recipes/student-v1-vits.yaml: decode, shorter side to the input size by a cubic kernel, random
crop, flip, colour jitter, greyscale, blur, normalise; maps nearest, as disparity; CutMix within the batch. Theirs is
what one would write: torchvision's resize of Pillow images antialiases, Pillow's blur is three boxes.

Each repetition of each contestant is a process of its own, one after the other, taking turns in who begins; a ratio is
taken within its repetition. What is measured are whole passes after a warm-up, from when the batches come at the
loader's own pace. `--threads` are `data.threads` here (of DALI, and of the maps) and worker processes there, each of
which makes whole batches: as many as there are cores. PyTorch has one thread in either. Images per CPU second count the
time of all processes together, and depend less on what else the machine does. Peak memory is proportional (what
processes share counts once), sampled. Stages are those of our background thread, in the same runs; DALI works beside.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import PIL
import psutil
import torch
from PIL import Image, features

from benchmarks.common import command_line, hardware
from benchmarks.data_baseline import WINDOW, Arrays, perturbation, theirs
from dataio.codec import DEPTH_MM, encode_png16
from dataio.dataset import DatasetInfo
from dataio.labels import LabelSample, LabelStore
from dataio.shards import tar_writer
from dataio.spec import DataSpec, RoleNeeds, RoleSpec

OURS, THEIRS = "ours", "DataLoader, webdataset, PIL"
SIZES = ((480, 640), (576, 768), (600, 800), (768, 1024))
LABEL_SIDE = 518
SHARDS = 4  # of each role, at least: every worker needs one of its own
LANES = 2  # of each role, as one of the recipe's 16 ranks serves
SAMPLE_S = 0.5
MIB = 2**20
# The same data in the same proportions, drawn otherwise: means over all rows that are measured.
AGREEMENT = 0.15


# ---------------------------------------------------------------------------------------------------------- the data


def photograph(seed: int) -> tuple[bytes, np.ndarray]:
    """A JPEG with structure at all scales, about two bits a pixel, and a smooth depth in metres with steps at edges."""
    rng = np.random.default_rng(seed)
    height, width = SIZES[seed % len(SIZES)]

    def octave(cells_HWC: np.ndarray) -> np.ndarray:
        cells_HWC = cells_HWC.astype(np.float32)
        grown = [Image.fromarray(cells_HW).resize((width, height), Image.Resampling.BICUBIC)
                 for cells_HW in np.moveaxis(cells_HWC, -1, 0)]  # fmt: skip
        return np.stack([np.asarray(x) for x in grown], -1)

    field_HWC = np.zeros((height, width, 3), np.float32)
    depth_HW = np.full((height, width), 1.5, np.float32)
    for n in range(2, 9):
        cells_HWC = rng.normal(size=(2**n, 2**n, 3))
        cells_HWC = 0.4 * cells_HWC + 0.6 * cells_HWC.mean(-1, keepdims=True)  # colours change less than brightness
        grown_HWC = octave(cells_HWC)
        field_HWC += grown_HWC * 0.62**n
        if n < 5:  # objects: steps where the brightness steps, and shapes
            depth_HW *= np.where(grown_HWC[..., 0] > 0, 1.6, 1) * np.exp(0.2 * grown_HWC[..., 1])
    field_HWC += 0.02 * rng.normal(size=(height, width, 1)).astype(np.float32)  # the sensor's noise
    image_HWC = (128 + 160 * field_HWC).clip(0, 255).astype(np.uint8)
    out = io.BytesIO()
    Image.fromarray(image_HWC).save(out, "JPEG", quality=90)
    return out.getvalue(), depth_HW


def label(depth_HW: np.ndarray) -> np.ndarray:
    """A disparity as a teacher writes it: at the size of the network's output."""
    scale = LABEL_SIDE / min(depth_HW.shape)
    height, width = (round(side * scale / 14) * 14 for side in depth_HW.shape)
    return np.asarray(Image.fromarray(1 / depth_HW).resize((width, height), Image.Resampling.BILINEAR))


def write_data(folder: Path, images: int, shards: int = SHARDS) -> None:
    """`images` / 3 labelled, 2 / 3 unlabelled with labels beside them."""
    store = LabelStore.create(str(folder / "labels"), {"teacher": "benchmark"})
    third = images // 3
    for role, seeds in (("labelled", range(third)), ("unlabelled", range(third, 3 * third))):
        (folder / role / "shards").mkdir(parents=True)
        for shard in range(shards):
            labels: list[LabelSample] = []
            path = folder / role / "shards" / f"{shard:06d}.tar"
            with path.open("wb") as file, tar_writer(file) as tar:
                for seed in seeds[shard::shards]:
                    jpeg, depth_HW = photograph(seed)
                    members: dict[str, Any] = {"__key__": f"{role}_{seed:06d}", "jpg": jpeg}
                    if role == "labelled":
                        depth_HW[: len(depth_HW) // 8] = np.nan  # a hole
                        members["depth.png"] = encode_png16(depth_HW, DEPTH_MM)[0]
                    else:
                        labels.append(LabelSample.encoded(members["__key__"], label(depth_HW), {"quality": 1.0}))
                    tar.write(members)
            if labels:
                store.commit(f"{shard:06d}", labels, keys=[sample.key for sample in labels])
        known = {"quantity": "depth_m", "code": DEPTH_MM} if role == "labelled" else {"quantity": None, "code": None}
        DatasetInfo(name=role, role=role, samples=len(seeds), **known).write(str(folder / role))  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------------- ours


class Stages:
    """Seconds by stage, each without what is a stage of its own inside it; one thread."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._inside = [0.0]

    def watch(self, owner: Any, name: str, stage: str) -> None:
        """Count the time in `owner.name`."""
        function = getattr(owner, name)
        self.seconds[stage] = 0.0

        @wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            begun = time.perf_counter()
            self._inside.append(0.0)
            try:
                return function(*args, **kwargs)
            finally:
                whole = time.perf_counter() - begun
                self.seconds[stage] += whole - self._inside.pop()
                self._inside[-1] += whole

        setattr(owner, name, timed)


def ours(arguments: argparse.Namespace, folder: Path) -> Iterator[Arrays]:
    """Batches of the loader."""
    from dataio.loader import Loader

    third = arguments.batch // 3
    data = DataSpec(
        roles={
            "labelled": RoleSpec(datasets=(str(folder / "labelled"),), batch=third, lanes=LANES),
            "unlabelled": RoleSpec(
                datasets=(str(folder / "unlabelled"),),
                labels=(str(folder / "labels"),),
                batch=2 * third,
                lanes=LANES,
                perturbation=perturbation(),
            ),
        },
        input_size=arguments.size,
        shuffle_window=WINDOW,
        threads=arguments.threads,
    )
    needs = {"labelled": RoleNeeds(), "unlabelled": RoleNeeds(sidecar=True)}
    with Loader(data, needs, views=("student",), seed=0, device=arguments.device) as loader:
        for batch in loader:
            yield batch.views["student"], batch.targets["disparity"].value_BHW, batch.region_BHW


def watched() -> Stages:
    """Stages of the loader's thread. The names are the data room's own: a renamed one fails here."""
    from nvidia import dali

    from dataio.assemble import BatchBuilder
    from dataio.dali_batch import DaliBatch
    from dataio.loader import Loader
    from dataio.stream import RoleStream

    stages = Stages()
    stages.watch(RoleStream, "read", "read")
    stages.watch(BatchBuilder, "_look", "headers, draws")
    stages.watch(dali.Pipeline, "feed_input", "copy to DALI")
    stages.watch(DaliBatch, "finish", "waiting for DALI")
    stages.watch(BatchBuilder, "finish", "disparity, CutMix")
    stages.watch(Loader, "_put", "waiting for the consumer")
    return stages


# ---------------------------------------------------------------------------------------------------------- measuring

CONTESTANTS: dict[str, Callable[[argparse.Namespace, Path], Iterator[Arrays]]] = {OURS: ours, THEIRS: theirs}


def run(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One repetition of one contestant, in this process."""
    torch.set_num_threads(1)  # as DataLoader does in its workers
    stages = watched() if arguments.run == OURS else Stages()
    batches = CONTESTANTS[arguments.run](arguments, folder)
    passes = max(1, arguments.images // arguments.batch)
    sums, first = np.zeros(4), None
    for _ in range(2 * arguments.threads + 4):  # beyond what is prefetched
        first = next(batches)
    begun, cpu, before = time.perf_counter(), cpu_seconds(), stages.seconds.copy()
    for _ in range(passes):
        arrays = next(batches)
    if arguments.device == "cuda":
        torch.cuda.synchronize()
    wall, cpu = time.perf_counter() - begun, cpu_seconds() - cpu
    spent = {stage: (seconds - before[stage]) / passes for stage, seconds in stages.seconds.items()}
    assert first is not None
    for arrays in (first, *(next(batches) for _ in range(min(passes, 8)))):
        sums += facts(arrays) / (1 + min(passes, 8))
    done = passes * arguments.batch
    return {"wall": done / wall, "cpu": done / cpu, "stages": spent, "facts": sums.tolist()}


def cpu_seconds() -> float:
    """Of this process and its workers, so far."""
    me = psutil.Process()
    return sum(times.user + times.system for times in (p.cpu_times() for p in (me, *me.children(recursive=True))))


def facts(arrays: Arrays) -> np.ndarray:
    """What must be alike: mean and spread of the labelled rows' pixels, their mean disparity and valid share."""
    view_BCHW, value_BHW, region_BHW = (x[: len(x) // 3].float().cpu() for x in arrays)
    return np.array([view_BCHW.mean(), view_BCHW.std(), value_BHW.mean(), (region_BHW > 0).float().mean()])


def repetition(arguments: argparse.Namespace, name: str, folder: Path) -> dict[str, Any]:
    """One in a process of its own, with its peak memory."""
    command = [sys.executable, __file__, "--run", name, "--data", str(folder)]
    for option in ("device", "threads", "size", "batch", "images"):
        command += [f"--{option}", str(getattr(arguments, option))]
    peak = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        while True:
            try:
                out, _ = process.communicate(timeout=SAMPLE_S)
                break
            except subprocess.TimeoutExpired:
                peak = max(peak, memory(process.pid))
    if process.returncode:
        raise SystemExit(f"{name}: ended with status {process.returncode}")
    return {**json.loads(out.splitlines()[-1]), "memory": peak}


def memory(pid: int) -> int:
    """Proportional resident bytes of a process and its children."""
    total = 0
    try:
        parent = psutil.Process(pid)
        for process in (parent, *parent.children(recursive=True)):
            total += process.memory_full_info().pss
    except psutil.Error:  # it has just ended
        pass
    return total


def agree(rounds: Sequence[dict[str, dict[str, Any]]]) -> None:
    """Both make the same batches but for the draws: a benchmark of something else is worth nothing."""
    mine, other = (np.mean([r[name]["facts"] for r in rounds], axis=0) for name in CONTESTANTS)
    if np.abs(mine - other).max() > AGREEMENT:
        raise SystemExit(f"the contestants do not make the same batches: {mine} and {other}")


# ---------------------------------------------------------------------------------------------------------- printing


def quartiles(values: Sequence[float], digits: int = 1) -> str:
    """Median [first quartile, third quartile]."""
    first, median, third = np.percentile(values, (25, 50, 75))
    return f"{median:.{digits}f} [{first:.{digits}f}, {third:.{digits}f}]"


def tables(rounds: Sequence[dict[str, dict[str, Any]]]) -> str:
    """Two Markdown tables."""
    lines = [
        "| | images/s | images per CPU second | ours / this, images/s | ours / this, CPU | peak MiB |",
        "|---|---|---|---|---|---|",
    ]
    for name in CONTESTANTS:
        column = {key: [r[name][key] for r in rounds] for key in ("wall", "cpu", "memory")}
        ratio = {key: [r[OURS][key] / r[name][key] for r in rounds] for key in ("wall", "cpu")}
        cells = [name, quartiles(column["wall"]), quartiles(column["cpu"])]
        cells += [quartiles(ratio["wall"], 2), quartiles(ratio["cpu"], 2), f"{max(column['memory']) / MIB:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| stage of ours | ms a batch | share, % |", "|---|---|---|"]
    stages = list(rounds[0][OURS]["stages"])
    whole = [sum(r[OURS]["stages"].values()) for r in rounds]
    for stage in stages:
        seconds = [r[OURS]["stages"][stage] for r in rounds]
        share = np.median(np.array(seconds) / whole)
        lines.append(f"| {stage} | {quartiles([1e3 * s for s in seconds])} | {100 * share:.1f} |")
    return "\n".join(lines)


def pillow() -> str:
    """Which one this is: pillow-simd calls itself 12.1.1.post0 where Pillow is 12.1.1."""
    name = "pillow-simd" if ".post" in PIL.__version__ else "Pillow"
    return f"{name} {PIL.__version__} with libjpeg-turbo {features.version('libjpeg_turbo')}"


def parse() -> argparse.Namespace:
    """Command line."""
    parser = command_line(__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=2, help="DALI's threads, and worker processes")
    parser.add_argument("--size", type=int, default=518, help="pixels of the input's side")
    parser.add_argument("--batch", type=int, default=12, help="a multiple of 6; one third labelled")
    parser.add_argument("--images", type=int, default=384, help="in the data, and measured in each repetition")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--run", choices=list(CONTESTANTS), help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.batch < 6 or arguments.batch % 6:
        parser.error("--batch must be a multiple of 6: two lanes, one labelled to two unlabelled")
    if arguments.threads < 1 or arguments.images < 3 * max(SHARDS, arguments.threads):
        parser.error(f"--threads must be at least 1, --images at least {3 * SHARDS} and 3 a thread")
    return arguments


def main() -> None:
    """Measures and prints."""
    arguments = parse()
    if arguments.run:
        print(json.dumps(run(arguments, arguments.data)), flush=True)
        return
    with tempfile.TemporaryDirectory(prefix="bench_data_") as name:
        folder = Path(name)
        write_data(folder, arguments.images, max(SHARDS, arguments.threads))
        rounds = []
        for number in range(arguments.repeats):
            order = list(CONTESTANTS) if number % 2 else list(CONTESTANTS)[::-1]
            rounds.append({contestant: repetition(arguments, contestant, folder) for contestant in order})
    agree(rounds)
    print(
        f"{hardware(arguments.device)}; {arguments.threads} threads or workers, load {os.getloadavg()[0]:.1f}; "
        f"torch {torch.__version__}, {pillow()}; B={arguments.batch}, {arguments.size} pixels a side, "
        f"{arguments.images} images; {arguments.repeats} repetitions; median [quartiles]\n\n{tables(rounds)}",
        flush=True,
    )


if __name__ == "__main__":
    main()
