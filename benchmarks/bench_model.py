"""One forward pass of a network beside transformers' Depth Anything with the same weights: time, memory, difference.

    .venv/bin/python benchmarks/bench_model.py --preset v2-vits --size 518 --repeats 25

float32 and bfloat16 autocast. The networks take turns within every repetition, and change who begins, so that whatever
else the machine does meets all of them; a ratio is taken within its repetition. On a CPU, memory is the rise of the
resident set's peak over a fresh process that holds the network (each has one of its own); on CUDA, the peak allocated.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import platform
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from torch import Tensor

from model import DepthAnything
from tests.model import huggingface

OURS, THEIRS = "ours", "transformers"
DTYPES = {"float32": None, "bfloat16": torch.bfloat16}
WARM_UP = 3
MIB = 2**20

Forward = Callable[[Tensor], Tensor]


def our_map(net: DepthAnything, image_BCHW: Tensor) -> Tensor:
    """Ours, relative or metric."""
    prediction = net(image_BCHW)
    map_BHW = prediction.disparity_BHW if prediction.depth_m_BHW is None else prediction.depth_m_BHW
    assert map_BHW is not None
    return map_BHW


def contestants(arguments: argparse.Namespace) -> dict[str, Forward]:
    """Both networks with the same weights, and on CUDA both compiled."""
    net = huggingface.in_mode(huggingface.loud_network(arguments.preset).to(arguments.device), "exact")
    theirs = huggingface.twin(net)
    forwards: dict[str, Forward] = {
        OURS: lambda x: our_map(net, x),
        THEIRS: lambda x: theirs(x).predicted_depth,
    }
    if arguments.device == "cuda":
        forwards |= {f"{name}, compiled": torch.compile(forward) for name, forward in list(forwards.items())}
    return forwards


def image_of(arguments: argparse.Namespace) -> Tensor:
    """Noise of variance 1."""
    height, width = arguments.size
    return torch.randn(arguments.batch, 3, height, width, generator=torch.Generator().manual_seed(1)).to(
        arguments.device
    )


def once(forward: Forward, image_BCHW: Tensor, dtype: torch.dtype | None) -> Tensor:
    """One pass without gradients, finished when this returns."""
    device = image_BCHW.device.type
    with torch.inference_mode(), torch.autocast(device, dtype or torch.bfloat16, enabled=dtype is not None):
        map_BHW = forward(image_BCHW)
    if device == "cuda":
        torch.cuda.synchronize()
    return map_BHW


def take_turns(forwards: dict[str, Forward], image_BCHW: Tensor, dtype: torch.dtype | None, repeats: int) -> np.ndarray:
    """Seconds [repeats, networks]."""
    for forward in forwards.values():
        for _ in range(WARM_UP):
            once(forward, image_BCHW, dtype)
    seconds = np.zeros((repeats, len(forwards)))
    numbered = list(enumerate(forwards.values()))
    for r in range(repeats):
        for k, forward in numbered if r % 2 else numbered[::-1]:
            begun = time.perf_counter()
            once(forward, image_BCHW, dtype)
            seconds[r, k] = time.perf_counter() - begun
    return seconds


def peak_bytes(arguments: argparse.Namespace, name: str, dtype: torch.dtype | None) -> int:
    """What passes of one network need beyond its weights at most. On a CPU, call it in a process of its own."""
    torch.set_num_threads(arguments.threads)
    forwards, image_BCHW = contestants(arguments), image_of(arguments)
    gc.collect()
    if arguments.device == "cuda":
        once(forwards[name], image_BCHW, dtype)  # compiles
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        once(forwards[name], image_BCHW, dtype)
        return torch.cuda.max_memory_allocated() - before
    # Loads what the first call of any network loads, on one patch; then 5 resets the peak (man 5 proc_pid_clear_refs).
    once(forwards[name], image_BCHW[:1, :, :14, :14], dtype)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident_bytes("VmRSS")
    for _ in range(2):
        once(forwards[name], image_BCHW, dtype)
    return resident_bytes("VmHWM") - before


def resident_bytes(field: str) -> int:
    """VmRSS, the resident set, or VmHWM, its peak."""
    status = Path("/proc/self/status").read_text()
    found = re.search(rf"^{field}:\s+(\d+) kB", status, re.MULTILINE)
    assert found
    return int(found[1]) * 1024


def quartiles(values: np.ndarray, unit: str) -> str:
    """Median [first quartile, third quartile]."""
    first, median, third = np.percentile(values, (25, 50, 75))
    return f"{median:{unit}} [{first:{unit}}, {third:{unit}}]"


def report(arguments: argparse.Namespace, memory: dict[tuple[str, str], int]) -> None:
    """Prints the table."""
    forwards, image_BCHW = contestants(arguments), image_of(arguments)
    print(f"{'':<10}{'network':<24}{'ms a pass':>28}{'transformers / it':>26}{'peak MiB':>12}")
    differences = []
    for label, dtype in DTYPES.items():
        seconds = take_turns(forwards, image_BCHW, dtype, arguments.repeats)
        theirs = seconds[:, list(forwards).index(THEIRS)]
        for k, name in enumerate(forwards):
            ratio = "" if name == THEIRS else quartiles(theirs / seconds[:, k], ".2f")
            peak = f"{memory[label, name] / MIB:.0f}" if (label, name) in memory else "-"
            print(f"{label:<10}{name:<24}{quartiles(1e3 * seconds[:, k], '.1f'):>28}{ratio:>26}{peak:>12}", flush=True)
        expected_BHW = once(forwards[THEIRS], image_BCHW, dtype).float()
        for name in forwards:
            if name != THEIRS:
                apart = (once(forwards[name], image_BCHW, dtype).float() - expected_BHW).abs().max().item()
                differences.append(f"{label} {name} {apart:.1e}")
    mean = once(forwards[THEIRS], image_BCHW, None).mean().item()
    print(f"largest difference from transformers, of a mean of {mean:.2f}: {'; '.join(differences)}")


def parse() -> argparse.Namespace:
    """Command line."""
    description, example, *_ = (__doc__ or "").split("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=f"Example:\n{example}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="v2-vits")
    parser.add_argument("--size", type=int, nargs="+", default=[518], help="one side, or height and width, in pixels")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=25, help="25 take about two minutes with v2-vits on two cores")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--no-memory", action="store_true", help="time only")
    arguments = parser.parse_args()
    arguments.size = (arguments.size * 2)[:2]
    return arguments


def main() -> None:
    """Measures and prints."""
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    cuda = arguments.device == "cuda"
    where = torch.cuda.get_device_name() if cuda else f"{platform.processor() or platform.machine()}, CPU"
    print(
        f"{arguments.preset}, {arguments.size[0]} x {arguments.size[1]}, batch {arguments.batch}, "
        f"{arguments.repeats} repetitions; {where}, {arguments.threads} threads, torch {torch.__version__}, "
        f"load {os.getloadavg()[0]:.1f}; median [quartiles]",
        flush=True,
    )
    names = [OURS, THEIRS, *([f"{OURS}, compiled", f"{THEIRS}, compiled"] if cuda else [])]
    memory = {}
    for label, dtype in {} if arguments.no_memory else DTYPES.items():
        for name in names:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                memory[label, name] = pool.apply(peak_bytes, (arguments, name, dtype))
    report(arguments, memory)


if __name__ == "__main__":
    main()
