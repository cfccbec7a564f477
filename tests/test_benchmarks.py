"""The benchmarks run, at sizes that measure nothing: whoever has a GPU for an hour should not mend them first."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
COMMANDS = {
    "bench_kernels.py --device cpu --batch 1 --operators K1 K2 --repeats 1 --no-compile --case-s 0.01": (
        "### K1 affine-invariant, B=1, 518 x 518, 2 regions, float32",
        "### K2 cosine margin, B=1, 1369 tokens, D=1024, 100% kept, float32",
        "| ours, one call a region |",
        "| copy of the same bytes |",
    ),
    "bench_step.py --device cpu --preset tiny --batch 2 --size 70 --repeats 1": ("| frozen encoder |", "| SiLog |"),
    "bench_data.py --device cpu --threads 1 --size 56 --batch 6 --images 12 --repeats 1": (
        "| ours |",
        "| DataLoader, webdataset, PIL |",
        "| waiting for DALI |",
        "| disparity, CutMix |",
    ),
    "bench_model.py --device cpu --preset tiny --size 70 --repeats 1": ("float32", "bfloat16", "transformers"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_benchmark_prints_its_table(command: str) -> None:
    script, *arguments = command.split()
    done = subprocess.run(
        [sys.executable, f"benchmarks/{script}", *arguments],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for line in COMMANDS[command]:
        assert line in done.stdout


def test_without_a_gpu_the_gpu_script_says_so_and_runs_nothing() -> None:
    blind = os.environ | {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(["bash", "benchmarks/gpu.sh"], cwd=REPOSITORY, capture_output=True, text=True, env=blind)
    assert done.returncode == 3
    assert "no NVIDIA GPU" in done.stdout
