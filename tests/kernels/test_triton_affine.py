"""Runs the cases of triton_affine_cases.py: interpreted, and on a GPU where there is one."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.triton_runs import run_cases

CASES = "triton_affine_cases.py"
AT_LEAST = 90


def test_interpreted() -> None:
    run_cases(CASES, AT_LEAST, interpret=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
def test_on_a_gpu() -> None:
    run_cases(CASES, AT_LEAST, interpret=False)
