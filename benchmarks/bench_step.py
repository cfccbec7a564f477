"""A step of the whole trainer against a bare PyTorch loop: the same network, loss and batches, one rank.

    .venv/bin/python benchmarks/bench_step.py --preset v2-vits --size 252 --batch 2

The trainer is the one that `fathom train` runs on a rank: engine (DeepSpeed), loop, all-reduces, timers, metrics,
journal, TensorBoard; on one rank its ZeRO stage is 0, whatever is configured. Only the loader is replaced by batches in
memory, as data are not the question here. The bare loop
is what one would write by hand, with the same fused AdamW. They take turns, step by step, in one process, so that a
busy machine slows both; the ratio is of times that follow each other. Every tenth step is logged, as in recipes.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.common import command_line, hardware
from cluster.runtime import remove_shared_memory
from cluster.worker import WorkerContext
from dataio.pack_synth import pack_synth
from dataio.types import Batch, Target
from trainer.config import parse_config
from trainer.config_train import TrainConfig
from trainer.losses import regional_affine_invariant_loss
from trainer.tasks.base import encoder_decoder_groups
from trainer.timing import PhaseTimer

WARM_UP = 3
PHASES = ("forward", "loss", "backward", "optimizer")


def config_of(arguments: argparse.Namespace, folder: str) -> TrainConfig:
    """A teacher's run, long enough for all steps."""
    roles = {"labelled": {"datasets": [f"{folder}/data"], "batch": arguments.batch, "lanes": 1}}
    values: dict[str, Any] = {
        "name": "run",
        "runs": f"{folder}/runs",
        "steps": arguments.steps + WARM_UP + 1,
        "task": {"kind": "teacher"},
        "model": {"preset": arguments.preset},
        "data": {"input_size": arguments.size, "roles": roles},
        "engine": {"precision": arguments.precision},
        "checkpoint": {"every": 10**6, "keep": 1},
        "preview_every": 10**6,
    }
    return parse_config(TrainConfig, values)


def batches_of(arguments: argparse.Namespace, device: torch.device) -> list[Batch]:
    """Four batches, a tenth of their pixels without a measurement."""
    g, shape = torch.Generator().manual_seed(0), (arguments.batch, arguments.size, arguments.size)
    made = []
    for number in range(4):
        region_BHW = (torch.rand(shape, generator=g) > 0.1).to(torch.uint8).to(device)
        target = Target(value_BHW=torch.rand(shape, generator=g).to(device), quantity="disparity")
        made.append(
            Batch(
                views={"student": torch.randn(shape[0], 3, *shape[1:], generator=g).to(device)},
                targets={"disparity": target},
                region_BHW=region_BHW,
                weight_B=torch.ones(arguments.batch, device=device),
                roles=(("labelled", arguments.batch),),
                keys=tuple(f"{number}-{row}" for row in range(arguments.batch)),
                cursor={"labelled": 0},
            )
        )
    return made


class BareLoop:
    """What one would write by hand: network, AdamW with two rates, autocast, loss, update."""

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        from model import DepthAnything

        torch.manual_seed(0)
        self.network = DepthAnything.from_preset(config.model.preset).to(device).train()
        groups = encoder_decoder_groups(self.network)
        rates = {"encoder": config.optim.encoder_lr, "decoder": config.optim.decoder_lr}
        self.optimizer = torch.optim.AdamW(
            [{"params": [p for _, p in named], "lr": rates[name]} for name, named in groups.items()],
            weight_decay=0.01,
            fused=True,
        )
        self.device, self.low = device, config.engine.precision == "bf16"
        self.timer = PhaseTimer(device)

    def step(self, batch: Batch) -> None:
        with self.timer("loss"), torch.autocast(self.device.type, torch.bfloat16, enabled=self.low):
            with self.timer("forward"):
                pred_BHW = self.network(batch.views["student"]).disparity_BHW
            target_BHW = batch.targets["disparity"].value_BHW
            loss = regional_affine_invariant_loss(pred_BHW.float(), target_BHW, batch.region_BHW, 1).mean()
        with self.timer("backward"):
            loss.backward()
        with self.timer("optimizer"):
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)


def measure(arguments: argparse.Namespace, folder: str) -> dict[str, np.ndarray]:
    """Seconds of each step after the warm-up: `trainer`, `bare`, `metrics` (the part of the trainer's in which it adds
    to its Prometheus metrics) and phases."""
    from trainer.worker import RankTrainer

    cuda = arguments.device == "cuda"
    device = torch.device("cuda:0" if cuda else "cpu")
    config = config_of(arguments, folder)
    bare, batches = BareLoop(config, device), batches_of(arguments, device)
    seconds: dict[str, list[float]] = {"trainer": [], "bare": [], "metrics": []}
    phases: list[dict[str, float]] = []
    bare_phases: list[dict[str, float]] = []

    def now() -> float:
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def turns() -> Iterator[Batch]:
        for number in range(config.steps):
            batch = batches[number % len(batches)]
            began = now()
            bare.step(batch)
            seconds["bare"].append(now() - began)
            bare_phases.append(bare.timer.take())
            began = now()
            yield batch
            seconds["trainer"].append(now() - began)

    with RankTrainer(config, WorkerContext(device=str(device)), None) as trainer:
        after_step = trainer.after_step

        def noted(record: Any, batch: Batch) -> None:
            after_step(record, batch)
            phases.append(dict(record.phases))

        feed = trainer.recorder._feed

        def fed(record: Any, batch: Batch) -> None:
            began = time.perf_counter()
            feed(record, batch)
            seconds["metrics"].append(time.perf_counter() - began)

        trainer.after_step = noted  # type: ignore[method-assign]
        trainer.recorder._feed = fed  # type: ignore[method-assign]
        trainer.checkpoint = lambda *, last: None  # type: ignore[method-assign]
        trainer.loop.run(turns(), trainer)
    kept = slice(WARM_UP, WARM_UP + arguments.steps)
    found = {name: np.array(values[kept]) for name, values in seconds.items()}
    for who, split in (("trainer", phases), ("bare", bare_phases)):
        found |= {f"{who} {phase}": np.array([one.get(phase, 0.0) for one in split[kept]]) for phase in PHASES}
    return found


def quartiles(values: np.ndarray, digits: int = 1) -> str:
    low, middle, high = np.percentile(values, (25, 50, 75))
    return f"{middle:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--preset", default="v2-vits")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--size", type=int, default=252)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.device == "cuda":
        os.environ["DS_ACCELERATOR"] = "cuda"
    with tempfile.TemporaryDirectory() as folder:
        os.environ.update(
            RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_SIZE="1", CROSS_RANK="0", CROSS_SIZE="1",
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(100_000 + os.getpid()),
        )  # fmt: skip
        backend = "nccl" if arguments.device == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=0, world_size=1)
        pack_synth("labelled", f"{folder}/data", seed=0, count=4, size=56, labelled=True, samples_per_shard=4)
        found = measure(arguments, folder)
        dist.destroy_process_group()
        remove_shared_memory(f"deepspeed_allreduce_buffer_{os.getuid()}_127.0.0.1_{os.environ['MASTER_PORT']}_")
    load = "" if arguments.device == "cuda" else f", {arguments.threads} threads, load {os.getloadavg()[0]:.1f}"
    print(
        f"{hardware(arguments.device)}; torch {torch.__version__}{load}; {arguments.preset}, {arguments.batch} x "
        f"{arguments.size} pixels, {arguments.precision}; {arguments.steps} steps; median [quartiles], ms\n"
    )
    print(f"| | step | {' | '.join(PHASES)} | trainer / bare |\n|---|---|{'---|' * len(PHASES)}---|")
    for who in ("trainer", "bare"):
        cells = [quartiles(1e3 * found[name]) for name in (who, *(f"{who} {phase}" for phase in PHASES))]
        ratio = quartiles(found["trainer"] / found["bare"], 3) if who == "trainer" else ""
        print(f"| {who} | {' | '.join(cells)} | {ratio} |")
    share = quartiles(1e2 * found["metrics"] / found["trainer"], 3)
    print(f"| metrics' updates | {quartiles(1e3 * found['metrics'], 3)} |{' |' * len(PHASES)} {share} % of the step |")


if __name__ == "__main__":
    main()
