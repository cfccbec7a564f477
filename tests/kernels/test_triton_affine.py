"""Runs the Triton cases of the affine-invariant loss and of the public operators: interpreted, and on a GPU.

Each file is a test of its own, so that they compile side by side where several processes run tests.
"""

from __future__ import annotations

import pytest
import torch

from tests.kernels.triton_runs import run_cases

CASES = {"triton_stats_cases.py": 30, "triton_affine_cases.py": 60, "triton_api_cases.py": 13}  # at least so many pass


@pytest.mark.parametrize("cases", CASES)
def test_interpreted(cases: str) -> None:
    run_cases(cases, CASES[cases], interpret=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
@pytest.mark.parametrize("cases", CASES)
def test_on_a_gpu(cases: str) -> None:
    run_cases(cases, CASES[cases], interpret=False)
