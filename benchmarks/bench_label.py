"""Pseudo-labelling beside the network alone, and beside transformers' depth-estimation pipeline: images/s.

    .venv/bin/python benchmarks/bench_label.py --preset v2-vits --photos ../shared/real/photos --repeats 5

Three contestants take turns, on the same photographs (JPEG files; without `--photos` synthetic scenes of 1536 x 1024):

* `labelling`: as `fathom label run` does it, on all processors: worker processes that read a shard, decode, predict,
  encode, write, read back and commit it. Ray is left out: it starts once per job.
* `bare`: the same processes run the same network on inputs that lie ready, in the same batches.
* `transformers`: pipeline("depth-estimation") on the same files with the same weights, in one process with as many
  threads, as it comes; and the same in as many processes as labelling has workers.

The processes of a phase begin together, and it ends with the slowest. Ratios are taken within a repetition. Weights are
random, which moves nothing but the encoding, a little: its maps have other detail. Every level of quality is timed
beside the forward passes that it states.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.common import command_line, hardware
from cluster.lease_actor import Worker
from cluster.leased_worker import Grip
from cluster.leases import Lease
from dataio.dataset import Dataset, DatasetInfo
from dataio.labels import LabelStore
from dataio.shards import ShardWriter
from trainer.config_label import LabelConfig
from trainer.label_worker import Labeller
from trainer.labelling import describe
from trainer.plan_label import passes

SPAWN = multiprocessing.get_context("spawn")
STORIES = ("labelling", "bare", "transformers", "transformers, one process per worker")


def main() -> None:
    options = arguments()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory(prefix="bench-label-") as folder:
        weights = save_weights(options, folder)
        photos = photographs(options, folder)
        print(f"# Labelling: {options.preset}, {options.device}, {hardware(options.device)}\n")
        print(
            f"{len(photos)} photographs, shorter side {options.size}, batch {options.batch or 'by default'}, "
            f"{options.workers} workers of {options.threads} threads, {options.repeats} repetitions.\n"
        )
        for precision in options.precision:
            compare(options, precision, weights, photos, folder)
        if not options.no_levels:
            levels(options, weights, photos, folder)


def arguments() -> argparse.Namespace:
    """The command line's."""
    parser = command_line(__doc__)
    parser.add_argument("--preset", default="v2-vits")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--size", type=int, default=518, help="shorter side of the network's input")
    parser.add_argument("--batch", type=int, help="images per forward pass; default: the command's")
    parser.add_argument("--workers", type=int, help="default: one per processor, or per GPU")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--photos", type=Path, help="a folder of JPEG files")
    parser.add_argument("--images", type=int, default=12, help="for each worker, in a phase")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-transformers", action="store_true")
    parser.add_argument("--no-levels", action="store_true")
    options = parser.parse_args()
    cpus = len(os.sched_getaffinity(0))
    found = torch.cuda.device_count() if options.device == "cuda" else max(1, cpus // options.threads)
    options.workers = options.workers or found
    return options


def compare(
    options: argparse.Namespace, precision: str, weights: dict[str, str], photos: list[bytes], folder: str
) -> None:
    """The table of one precision."""
    seconds: dict[str, list[float]] = {name: [] for name in STORIES}
    work = Work(options, precision, weights, photos, os.path.join(folder, precision))
    with contextlib.ExitStack() as stack:
        many = stack.enter_context(Processes(options.workers, many_of, work))
        one = stack.enter_context(Processes(1, one_of, work)) if not options.no_transformers else None
        crowd = (
            stack.enter_context(Processes(options.workers, crowd_of, work))
            if not options.no_transformers and options.workers > 1
            else None
        )
        for _ in range(options.repeats):
            seconds["labelling"].append(many.run("labelling"))
            seconds["bare"].append(many.run("bare"))
            if one is not None:
                seconds["transformers"].append(one.run("transformers"))
            if crowd is not None:
                seconds["transformers, one process per worker"].append(crowd.run("transformers"))
    images = options.workers * options.images
    print(f"## {precision}\n\n| | images/s, median [quartiles] | labelling takes of it |\n|---|---|---|")
    for name, values in seconds.items():
        if values:
            ratios = [other / own for other, own in zip(values, seconds["labelling"], strict=True)]
            print(f"| {name} | {spread([images / value for value in values])} | {spread(ratios)} |")
    print(flush=True)


def levels(options: argparse.Namespace, weights: dict[str, str], photos: list[bytes], folder: str) -> None:
    """What the levels of quality cost."""
    seconds: dict[str, list[float]] = {}
    found = {}
    with contextlib.ExitStack() as stack:
        crews = {}
        for quality in ("off", "flip", "flip+scale"):
            place = os.path.join(folder, f"quality-{quality}")
            work = Work(options, options.precision[0], weights, photos, place, quality)
            found[quality] = passes(work.config(0))
            crews[quality] = stack.enter_context(Processes(options.workers, many_of, work))
        for _ in range(max(1, options.repeats // 2)):
            for quality, crew in crews.items():
                seconds.setdefault(quality, []).append(crew.run("labelling"))
    print("## Levels of quality\n\n| | forward passes stated | time, of `off` |\n|---|---|---|")
    for quality, values in seconds.items():
        ratios = [value / off for value, off in zip(values, seconds["off"], strict=True)]
        print(f"| {quality} | {found[quality]:g} | {spread(ratios)} |")


class Work:
    """What a process has to do: picklable."""

    def __init__(
        self, options: argparse.Namespace, precision: str, weights: dict[str, str], photos: list[bytes], folder: str,
        quality: str = "off",
    ) -> None:  # fmt: skip
        self.options, self.precision, self.weights = options, precision, weights
        self.photos, self.folder, self.quality = photos, folder, quality

    def config(self, process: int) -> LabelConfig:
        """Of the labelling that one process does."""
        return LabelConfig.model_validate(
            {
                "dataset": os.path.join(self.folder, f"data-{process}"),
                "weights": self.weights["ours"],
                "input_size": self.options.size,
                "precision": self.precision,
                "batch": self.options.batch,
                "quality": self.quality,
                "cluster": {"threads": self.options.threads, "use_gpu": self.options.device == "cuda"},
            }
        )

    def shards(self, process: int) -> Dataset:
        """One shard of photographs for each repetition and for the warm-up."""
        config = self.config(process)
        picked = [self.photos[i % len(self.photos)] for i in range(self.options.images)]
        with ShardWriter(os.path.join(config.dataset, "shards"), shard_samples=len(picked)) as writer:
            for shard in range(self.options.repeats + 1):
                for number, photo in enumerate(picked):
                    writer.write(f"s{shard:03d}-{number:04d}", {"jpg": photo})
        count = len(picked) * (self.options.repeats + 1)
        DatasetInfo(name="photos", role="unlabelled", quantity=None, code=None, samples=count).write(config.dataset)
        return Dataset.open(config.dataset)

    def files(self, process: int, count: int) -> list[str]:
        """The same photographs as files."""
        folder = Path(self.folder) / f"files-{process}-{count}"
        folder.mkdir(parents=True)
        for number in range(count):
            (folder / f"{number:04d}.jpg").write_bytes(self.photos[number % len(self.photos)])
        return [str(path) for path in sorted(folder.iterdir())]


def many_of(work: Work, process: int) -> dict[str, Callable[[], None]]:
    """Labelling and the bare network, in one process of several."""
    dataset, config = work.shards(process), work.config(process)
    store = LabelStore.create(os.path.join(config.dataset, "labels"), describe(config, dataset))
    labeller = Labeller(config.model_dump(mode="json"), store.path, f"{process:08x}", dataset)
    stems = iter(shard.stem for shard in dataset.shards)
    inputs = [ready.image_BCHW for ready in labeller.inputs(dataset.shards[0]) if ready.image_BCHW is not None]

    def label() -> None:
        stem = next(stems)
        worker = Worker(owner=labeller.owner, node="", host="", pid=0, device=labeller.device)
        grip = Grip(Lease(item=stem, token=1, owner=labeller.owner), worker, lambda progress: True, 60.0)
        told = labeller.process(stem, grip)
        assert told["outcome"] == "written" and not told["failed"], told

    def bare() -> None:
        for image_BCHW in inputs:
            value_BHW, _ = labeller.predictor(image_BCHW)
        value_BHW[-1:].cpu()  # waits for a GPU

    label()
    bare()
    return {"labelling": label, "bare": bare}


def one_of(work: Work, process: int) -> dict[str, Callable[[], None]]:
    """transformers' pipeline in a single process, with every processor."""
    workers = work.options.workers
    return theirs(work, process, workers * work.options.images, workers * work.options.threads)


def crowd_of(work: Work, process: int) -> dict[str, Callable[[], None]]:
    """transformers' pipeline in one process of several."""
    return theirs(work, 1 + process, work.options.images, work.options.threads)


def theirs(work: Work, process: int, images: int, threads: int) -> dict[str, Callable[[], None]]:
    """transformers' pipeline on files."""
    from transformers import pipeline
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(threads)
    dtype = torch.bfloat16 if work.precision == "bf16" else torch.float32
    device = "cuda:0" if work.options.device == "cuda" else "cpu"
    made = pipeline("depth-estimation", model=work.weights["theirs"], device=device, dtype=dtype)
    if work.options.size != 518:
        made.image_processor.size = {"height": work.options.size, "width": work.options.size}
    made.model.register_forward_hook(as_float32)
    files = work.files(process, images)

    def run() -> None:
        for _ in made(files):
            pass

    made(files[0])
    return {"transformers": run}


def as_float32(model: torch.nn.Module, args: object, output: Any) -> Any:
    """The pipeline hands a bfloat16 network's depth to numpy, which has no such type: without this it raises."""
    output["predicted_depth"] = output["predicted_depth"].float()
    return output


class Processes:
    """Processes that do the same phase at once, from a barrier to the end of the slowest."""

    def __init__(self, count: int, make: Callable[[Work, int], dict[str, Callable[[], None]]], work: Work) -> None:
        self._pipes: list[Any] = []
        self._started: list[Any] = []
        for process in range(count):
            mine, other = SPAWN.Pipe()
            started = SPAWN.Process(target=obey, args=(make, work, process, other), daemon=True)
            started.start()
            other.close()
            self._pipes.append(mine)
            self._started.append(started)

    def __enter__(self) -> Processes:
        for pipe in self._pipes:
            assert pipe.recv() == "ready"
        return self

    def run(self, phase: str) -> float:
        """Seconds of one phase."""
        began = time.perf_counter()
        for pipe in self._pipes:
            pipe.send(phase)
        for pipe in self._pipes:
            assert pipe.recv() == "done"
        return time.perf_counter() - began

    def __exit__(self, *error: object) -> None:
        for started in self._started:
            started.kill()
            started.join()


def obey(make: Callable[[Work, int], dict[str, Callable[[], None]]], work: Work, process: int, pipe: Any) -> None:
    """In a process: do what is told."""
    phases = make(work, process)
    pipe.send("ready")
    while True:
        phases[pipe.recv()]()
        pipe.send("done")


def save_weights(options: argparse.Namespace, folder: str) -> dict[str, str]:
    """A network with random weights, for us and for transformers."""
    from model import DepthAnything

    places = {"ours": os.path.join(folder, "ours"), "theirs": os.path.join(folder, "theirs")}
    network = DepthAnything.from_preset(options.preset)
    network.save_pretrained(places["ours"])
    if not options.no_transformers:
        network.save_pretrained(places["theirs"], layout="huggingface")
    return places


def photographs(options: argparse.Namespace, folder: str) -> list[bytes]:
    """JPEG files."""
    if options.photos is not None:
        found = sorted(options.photos.glob("*.jpg"))
        if not found:
            raise SystemExit(f"error: --photos: {options.photos} holds no .jpg: name another folder, or leave it out")
        return [path.read_bytes() for path in found]
    import io

    from PIL import Image

    from dataio.synth import render

    images = []
    for seed in range(4):
        out = io.BytesIO()
        scene = Image.fromarray(render("wide", 0, seed, 256).image_HWC)
        scene.resize((1536, 1024)).save(out, "JPEG", quality=92)
        images.append(out.getvalue())
    return images


def spread(values: Sequence[float]) -> str:
    """Median and quartiles."""
    if len(values) < 2:
        return f"{values[0]:.3g}"
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{middle:.3g} [{low:.3g}, {high:.3g}]"


if __name__ == "__main__":
    main()
