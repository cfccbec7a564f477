"""The fused losses beside other ways to compute them: time of forward, backward and both, memory, and the floor.

    .venv/bin/python benchmarks/bench_kernels.py --batch 8 32 64 --device cuda --plot kernels.png

The contestants of a case take turns within every repetition, and change who begins; a ratio is taken within its
repetition. The floor is a copy on the device that moves as many bytes as the pass must move. Forward is timed as
training runs it, with what backward needs kept. On CUDA the times are the device's, by events, with a cold L2 cache;
the device is kept busy for about a millisecond first, so that what launches cost the host does not count up to that (in
a training step they wait for nothing either). What waits for the device, as boolean indexing does, pays for it.

Saved bytes are those that autograd keeps for backward beyond the inputs, per pixel (K1) or token (K2); the peak is that
of CUDA's allocator, above the inputs, over forward and backward.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from torch import Tensor

from benchmarks.common import command_line, hardware
from benchmarks.kernel_providers import FLOOR, OURS, Case, Outputs, Provider, cases, floors, providers

PASSES = ("forward", "backward", "both")
WARM_UP = 3
MIB = 2**20
L2_BYTES = 256 * MIB  # more than any L2 cache
BUSY_CYCLES = 2_000_000  # about a millisecond
# Contestants that do arithmetic in bfloat16 are right to some 1e-3; what only rounds differently is far nearer.
AGREEMENT = {torch.float32: 1e-4, torch.bfloat16: 1e-2}

Seconds = np.ndarray
Times = dict[str, dict[str, Seconds]]  # by contestant and pass


class Clock:
    """Times one action; what `prepare` does before it does not count."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        self.cache = torch.empty(L2_BYTES, dtype=torch.uint8, device=device) if self.cuda else None

    def __call__(self, prepare: Callable[[], Any], act: Callable[[Any], Any]) -> float:
        prepared = prepare()
        if self.cache is None:
            begun = time.perf_counter()
            act(prepared)
            return time.perf_counter() - begun
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.cache.zero_()
        torch.cuda._sleep(BUSY_CYCLES)
        begin.record()
        act(prepared)
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3


def gradient(outputs: Outputs, leaf: Tensor, upstream: list[Tensor]) -> Tensor:
    """With an upstream gradient made beforehand, so that no kernel of a reduction is timed."""
    return torch.autograd.grad(outputs, leaf, upstream)[0]


def actions(leaf: Tensor, provider: Provider) -> dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]]:
    """For each pass what to prepare and what to time."""
    upstream = [torch.full_like(output, 0.5) for output in provider()]
    return {
        "forward": (lambda: None, lambda _: provider()),
        "backward": (provider, lambda outputs: gradient(outputs, leaf, upstream)),
        "both": (lambda: None, lambda _: gradient(provider(), leaf, upstream)),
    }


def measure(case: Case, arguments: argparse.Namespace, clock: Clock) -> tuple[Times, dict, dict]:
    """Seconds by contestant and pass, one per repetition; saved bytes per element; peak bytes."""
    leaf, contestants = providers(case, arguments.device, arguments.compile)
    agree(case, contestants)
    saved = {name: saved_bytes(provider) / case.elements for name, provider in contestants.items()}
    todo = {name: actions(leaf, provider) for name, provider in contestants.items()}
    copies = floors(case, arguments.device)
    todo[FLOOR] = {name: (lambda: None, lambda _, copy=copy: copy()) for name, copy in copies.items()}
    for passes in todo.values():
        for _ in range(WARM_UP):
            begun = time.perf_counter()
            clock(*passes["both"])
            if time.perf_counter() - begun > 2:  # it compiled, or it is so slow that it needs no more
                break
    begun = time.perf_counter()
    one_round(todo, clock, 0)
    repeats = max(5, min(arguments.repeats, int(arguments.case_s / (time.perf_counter() - begun))))
    rounds = [one_round(todo, clock, r) for r in range(repeats)]
    seconds = {name: {p: np.array([r[name, p] for r in rounds]) for p in PASSES} for name in todo}
    peak = {} if arguments.device == "cpu" else {name: peak_bytes(todo[name]["both"][1]) for name in contestants}
    return seconds, saved, peak


def one_round(todo: dict[str, dict], clock: Clock, number: int) -> dict[tuple[str, str], float]:
    """Every contestant's every pass once."""
    order = list(todo) if number % 2 else list(todo)[::-1]
    return {(name, p): clock(*todo[name][p]) for p in PASSES for name in order}


def agree(case: Case, contestants: dict[str, Provider]) -> None:
    """All compute the same number: a benchmark of something else is worth nothing."""
    values = {name: sum(output.double().sum().item() for output in run()) for name, run in contestants.items()}
    for name, value in values.items():
        if abs(value / values["reference"] - 1) > AGREEMENT[case.dtype]:
            raise SystemExit(f"{case.title}: {name} computes {value}, the reference {values['reference']}")


def saved_bytes(provider: Provider) -> int:
    """What autograd keeps for backward, but for what existed before the pass."""
    before = {x.untyped_storage().data_ptr() for x in gc.get_objects() if type(x) is Tensor}
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in before:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        outputs = provider()
    del outputs
    return sum(kept.values())


def peak_bytes(act: Callable[[Any], Any]) -> int:
    """What forward and backward allocate at most."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    act(None)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def milliseconds(seconds: Seconds) -> str:
    """Median [first quartile, third quartile]."""
    first, median, third = np.percentile(1e3 * seconds, (25, 50, 75))
    digits = 3 if median < 1 else 2 if median < 10 else 1
    return f"{median:.{digits}f} [{first:.{digits}f}, {third:.{digits}f}]"


def table(case: Case, seconds: Times, saved: dict, peak: dict) -> str:
    """A Markdown table of one case."""
    moved = [f"{size / 1e6:.1f}" for size in case.floor_bytes]
    lines = [
        f"### {case.title}",
        "",
        f"At least {moved[0]} MB forward and {moved[1]} MB backward; {len(seconds[OURS]['both'])} repetitions; ms.",
        "",
        "| | forward | backward | both | times the floor: forward, backward, both | both / ours "
        f"| saved B a {'pixel' if case.operator == 'K1' else 'token'} | peak MiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, passes in seconds.items():
        floor = [f"{np.median(passes[p] / seconds[FLOOR][p]):.2f}" for p in PASSES]
        cells = [
            name,
            *(milliseconds(passes[p]) for p in PASSES),
            "" if name == FLOOR else ", ".join(floor),
            f"{np.median(passes['both'] / seconds[OURS]['both']):.2f}",
            f"{saved[name]:.2f}" if name in saved else "",
            f"{peak[name] / MIB:.0f}" if name in peak else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot(path: Path, results: dict[Case, Times]) -> None:
    """Bars of forward and backward together, one group per case, logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(name for seconds in results.values() for name in seconds if name != FLOOR))
    names.append(FLOOR)
    figure, axes = pyplot.subplots(figsize=(8, 1.5 + 0.14 * len(results) * (len(names) + 1)), layout="constrained")
    for k, name in enumerate(names):
        here = [(i, seconds[name]["both"]) for i, seconds in enumerate(results.values()) if name in seconds]
        median, *ends = (np.array([1e3 * np.percentile(x, q) for _, x in here]) for q in (50, 25, 75))
        places = [i + 0.8 * (k / len(names) - 0.5) for i, _ in here]
        whiskers = np.array([median - ends[0], ends[1] - median])
        axes.barh(places, median, 0.75 / len(names), xerr=whiskers, error_kw={"linewidth": 0.6}, label=name)
    axes.set_yticks(range(len(results)), [case.title.replace(", ", ",\n", 1) for case in results], fontsize=7)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("forward and backward, ms: median and quartiles")
    figure.legend(loc="outside upper center", ncols=4, fontsize=7)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def parse() -> argparse.Namespace:
    """Command line."""
    parser = command_line(__doc__)
    cuda = torch.cuda.is_available()
    parser.add_argument("--operators", nargs="+", choices=["K1", "K2"], default=["K1", "K2"])
    parser.add_argument("--batch", type=int, nargs="+", help="32 8 64 on CUDA, 8 on a CPU")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if cuda else "cpu")
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--case-s", type=float, default=30.0, help="fewer repetitions (5 at least) if they take longer")
    parser.add_argument("--limit-s", type=float, default=float("inf"), help="begin no case after this time")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave out torch.compile")
    parser.add_argument("--plot", type=Path, metavar="FILE.png")
    arguments = parser.parse_args()
    arguments.batch = arguments.batch or ([32, 8, 64] if arguments.device == "cuda" else [8])
    return arguments


def main() -> None:
    """Measures and prints."""
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    print(
        f"{hardware(arguments.device)}; torch {torch.__version__}, {arguments.threads} CPU threads, "
        f"load {os.getloadavg()[0]:.1f}; median [quartiles], contestants interleaved\n",
        flush=True,
    )
    begun, clock = time.perf_counter(), Clock(arguments.device)
    results, skipped = {}, []
    for case in cases(arguments.operators, arguments.batch, arguments.device):
        if time.perf_counter() - begun > arguments.limit_s:
            skipped.append(case.title)
            continue
        torch._dynamo.reset()  # each case is compiled for its own shapes
        seconds, saved, peak = measure(case, arguments, clock)
        results[case] = seconds
        print(table(case, seconds, saved, peak), flush=True)
        if arguments.plot:  # after each: whoever is cut off has those before
            plot(arguments.plot, results)
        gc.collect()
    if skipped:
        print(f"Not measured, for lack of time: {'; '.join(skipped)}.")


if __name__ == "__main__":
    main()
