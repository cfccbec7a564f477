"""What the machine code of the affine-invariant loss must hold, for every GPU: see `tests.kernels.aot`."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest

from kernels import triton_common, triton_radix
from tests.kernels.aot import CAPABILITIES, Build, Facts, compile_kernels

REGISTERS = 128
MORE_REGISTERS = {("*bf16", 8, "trimmed loss"): 136}  # 134 for sm_90, which no smaller step brings down
SIZES = {"*fp32": 4, "*bf16": 2, "*fp16": 2}
PASSES = (0, 1, 2)
KERNELS = (*(f"median {p}" for p in PASSES), *(f"trim {p}" for p in PASSES), "loss", "trimmed loss", "sign", "backward")
SOME = tuple(kernel for kernel in KERNELS if kernel not in ("sign", "backward"))
# Type of the maps, regions, and how many neighbouring pixels are aligned: P = 518 * 518 is a multiple of 4, not of 8.
CONFIGURATIONS = {
    ("*fp32", 1, 4): KERNELS,
    ("*fp32", 2, 4): SOME,
    ("*fp32", 8, 4): ("median 0", "median 2", "trim 1", "loss", "trimmed loss"),
    ("*fp32", 4, 4): ("loss", "trimmed loss"),
    ("*bf16", 8, 8): ("median 2", "loss", "trimmed loss"),
    ("*fp32", 1, 1): ("median 2", "loss"),
    ("*bf16", 1, 8): KERNELS,
    ("*bf16", 2, 8): SOME,
    ("*bf16", 1, 4): ("median 2", "loss"),
}
WARP, QUAD_BYTES, CTAS = 32, 16, 16
INTEGERS = dict.fromkeys(triton_radix.INTEGERS, "i32")
NORMS = {
    **dict.fromkeys(("pred_median", "pred_mad", "target_median", "target_mad"), "*fp32"),
    **dict.fromkeys(("pred_stride", "target_stride"), "i32"),
}


def select_build(capability: int, type_: str, regions: int, vector: int, kernel: str) -> Build:
    """A pass of the median or of trimming, as it is launched."""
    name, number = kernel.split()
    constants = {"VECTOR": vector, "BLOCK": triton_radix.block(regions), "PASS": int(number)}
    arguments = {"label": "*u8", "hist": "*i32", "ticket": "*i32", "state": "*i32", **INTEGERS}
    if name == "median":
        constants["CTAS"] = CTAS if number == "2" else 0
        arguments |= {"first": type_, "second": type_, "rest": "*fp32", "median": "*fp32", "mad": "*fp32"}
    else:
        arguments |= {"pred": type_, "target": type_, **NORMS, "cut": "*fp32", "units": "i32"}
    module = "kernels.triton_select" if name == "median" else "kernels.triton_trim"
    constants |= triton_radix.sizes(regions)
    options = {} if name == "median" else triton_common.EXACT
    warps = triton_radix.warps(regions)
    return Build(module, f"_{name}_pass", arguments, constants, capability, warps, options=options)


def pixel_build(capability: int, type_: str, regions: int, vector: int, kernel: str) -> Build:
    """A kernel that runs over pixels once, as it is launched."""
    tuning = triton_common.TUNING
    constants = {"VECTOR": vector, "G": regions}
    name, options = kernel, {}
    constants["BLOCK"] = tuning.loss_block if regions <= 2 else tuning.region_loss_block
    arguments = {"label": "*u8", "state": "*i32", "code": "*u8", **INTEGERS}
    if kernel != "backward":
        constants["FOLD"] = triton_common.fold(regions)
    else:
        arguments = {"grad_loss": "*fp32", "code": "*u8", "terms": "*fp32", "grad": type_}
        arguments |= {"blocks": "i32", "groups": "i32"}
        constants["BLOCK"] = tuning.backward_block
    if kernel == "sign":
        arguments |= {"x": type_, "ticket": "*i32"}
        arguments |= dict.fromkeys(("median", "mad", "median_out", "mad_out", "shares"), "*fp32")
    elif kernel != "backward":
        name, options = "loss", triton_common.EXACT
        arguments |= {"pred": type_, "target": type_, **NORMS, "state_stride": "i32"}
        arguments |= {"partial": "*fp32", "ticket": "*i32", "loss": "*fp32", "terms": "*fp32"}
        constants["CTAS"] = CTAS
        if kernel == "loss":
            constants["cut"] = None
        else:
            arguments["cut"] = "*fp32"
    module = "kernels.triton_stats" if kernel == "sign" else "kernels.triton_affine"
    return Build(module, f"_{name}_kernel", arguments, constants, capability, 8, options=options)


def selects(kernel: str) -> bool:
    return kernel.startswith(("median", "trim "))


def build(capability: int, type_: str, regions: int, vector: int, kernel: str) -> Build:
    make = select_build if selects(kernel) else pixel_build
    return make(capability, type_, regions, vector, kernel)


@cache
def facts(capability: int) -> dict[tuple[str, int, int], dict[str, Facts]]:
    """By type, regions and vector, of every kernel: all that is compiled for one GPU, in one process."""
    keys = [(key, kernel) for key, kernels in CONFIGURATIONS.items() for kernel in kernels]
    found = compile_kernels([build(capability, *key, kernel) for key, kernel in keys])
    sorted_out: dict[tuple[str, int, int], dict[str, Facts]] = {key: {} for key in CONFIGURATIONS}
    for (key, kernel), one in zip(keys, found, strict=True):
        sorted_out[key][kernel] = one
    return sorted_out


def loads_of_a_step(made: Build, type_: str) -> int:
    """Loads of 16 bytes by a thread: of a step's pixels of one map (median, sign) or two."""
    threads = WARP * made.num_warps
    loads = int(made.constants["BLOCK"] or 0) * SIZES[type_] // (threads * QUAD_BYTES)
    return loads if made.kernel in ("_median_pass", "_sign_kernel") else 2 * loads


def loads_of_counts(made: Build) -> int:
    """Those of the counts that the last program of a row adds up."""
    bins = {None: 0, 2: 1024}.get(made.constants.get("PASS"), 2048)
    return bins * 4 // (WARP * made.num_warps * QUAD_BYTES)


@pytest.mark.parametrize("key", CONFIGURATIONS, ids=str)
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_gates(capability: int, key: tuple[str, int, int]) -> None:
    type_, regions, vector = key
    for kernel, found in facts(capability)[key].items():
        assert found.spills == found.stack_bytes == 0, kernel
        assert found.registers <= MORE_REGISTERS.get((type_, regions, kernel), REGISTERS), kernel
        assert not selects(kernel) or found.aggregated_atomics > 0, kernel
        if kernel != "backward":
            # The ticket: all threads have written, the write is published, and no stale line is read behind it.
            assert found.count(r"BAR\.SYNC") >= 2 and found.count(r"ATOMG\.E\.ADD.*\.GPU") >= 1, kernel
            assert found.count(r"MEMBAR\.\w+\.GPU") >= 1 and found.count(r"CCTL\.IVALL") >= 1, kernel
        if vector * SIZES[type_] < QUAD_BYTES:
            continue  # rows are not aligned to 16 bytes
        made = build(capability, *key, kernel)
        if kernel == "backward":
            assert found.vector_stores > 0 and found.vector_stores == found.count("STG")
        elif loads_of_a_step(made, type_):
            assert found.vector_loads >= loads_of_a_step(made, type_) + loads_of_counts(made), kernel
        else:  # a thread takes two pixels of a step
            assert regions > 2
            assert type_ == "*bf16" or found.count(r"LDG\.E\.64\b") >= 2, kernel


def without(made: Build, *pointers: str, **constants: int) -> Build:
    """The build with some pointers not given, and other constants."""
    arguments = {name: type_ for name, type_ in made.arguments.items() if name not in pointers}
    return replace(made, arguments=arguments, constants={**made.constants, **dict.fromkeys(pointers), **constants})


def test_other_ways_to_launch_them() -> None:
    """No labels, one map, half precision, more programs a sample, odd numbers of regions: for one GPU."""
    builds = [
        without(build(90, "*fp32", 1, 4, "loss"), "label", CTAS=32),
        without(build(90, "*fp32", 1, 4, "median 2"), "label", "second", CTAS=64),
        without(build(90, "*fp32", 2, 4, "median 0"), "second"),
        without(build(90, "*fp32", 1, 4, "trim 0"), "label"),
        build(90, "*fp16", 1, 8, "trimmed loss"),
        build(90, "*fp16", 2, 4, "median 1"),
        build(90, "*fp32", 3, 4, "trimmed loss"),
        build(90, "*fp32", 5, 4, "median 2"),
        build(90, "*fp32", 7, 4, "loss"),
    ]
    for made, found in zip(builds, compile_kernels(builds), strict=True):
        assert found.spills == found.stack_bytes == 0 and found.registers <= REGISTERS, made
