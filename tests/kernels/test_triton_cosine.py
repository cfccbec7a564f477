"""Runs the cases of triton_cosine_cases.py: interpreted, and on a GPU where there is one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[2]
CASES = "tests/kernels/triton_cosine_cases.py"
AT_LEAST = 100


def run_cases(interpret: str) -> None:
    """In a process of their own, because Triton decides when it is imported whether it interprets."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", CASES],
        cwd=REPOSITORY,
        env={**os.environ, "TRITON_INTERPRET": interpret},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    passed = re.search(r"(\d+) passed", done.stdout)
    assert done.returncode == 0 and passed and int(passed[1]) >= AT_LEAST, done.stdout[-8000:]


def test_interpreted() -> None:
    run_cases("1")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
def test_on_a_gpu() -> None:
    run_cases("0")
