"""What the machine code of kernels/triton_cosine.py must hold, for every GPU, type and width that a recipe uses."""

from __future__ import annotations

import itertools

import pytest

from kernels import triton_cosine
from tests.kernels.aot import CAPABILITIES, Build, Facts, compile_kernels

TYPES = ("*fp32", "*bf16")
WIDTHS = (384, 768, 1024)
STRIDES = ("student_stride_b", "student_stride_n", "frozen_stride_b", "frozen_stride_n")
REGISTERS = 128


def build(kernel: str, capability: int, type_: str, width: int) -> Build:
    """As `triton_cosine` launches it for contiguous features."""
    features = {"student": type_, "frozen": type_, "coef": "*fp32"}
    sizes = {"tokens": "i32", **dict.fromkeys(STRIDES, "i32")}
    rest = {
        "_forward_kernel": {"token_mask": "*u8", "partial": "*fp32", "alpha": "fp32"},
        "_backward_kernel": {"grad_sum": "*fp32", "grad_student": type_},
    }
    arguments = {**features, **sizes, **rest[kernel]}
    constants = {"D": width, "TILE": triton_cosine.TILE, "CHUNK": triton_cosine.CHUNK}
    return Build(
        "kernels.triton_cosine", kernel, arguments, constants, capability, triton_cosine.WARPS, divisible=STRIDES
    )


@pytest.fixture(scope="module")
def facts() -> dict[tuple[str, int, str, int], Facts]:
    keys = list(itertools.product(("_forward_kernel", "_backward_kernel"), CAPABILITIES, TYPES, WIDTHS))
    return dict(zip(keys, compile_kernels([build(*key) for key in keys]), strict=True))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("type_", TYPES)
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("kernel", ["_forward_kernel", "_backward_kernel"])
def test_gates(facts: dict, kernel: str, capability: int, type_: str, width: int) -> None:
    found = facts[kernel, capability, type_, width]
    assert found.spills == 0 and found.stack_bytes == 0
    assert found.registers <= REGISTERS
    assert found.vector_loads > 0
    # All features come in vectors: what is left are the mask, or the coefficients and the gradient of the sum.
    assert found.count("LDG") - found.vector_loads <= 5
    if kernel == "_backward_kernel":
        assert found.vector_stores == found.count("STG") > 0


def test_the_sum_over_tiles_compiles() -> None:
    arguments = {"partial": "*fp32", "sum": "*fp32", "count": "*fp32", "tiles": "i32"}
    constants = {"BLOCK": triton_cosine.TOTAL_BLOCK}
    found = compile_kernels([Build("kernels.triton_cosine", "_total_kernel", arguments, constants, 90)])[0]
    assert found.spills == 0 and found.stack_bytes == 0 and found.registers <= REGISTERS
