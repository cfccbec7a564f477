"""Compiles Triton kernels without a GPU and reads from the machine code what must hold in it.

    facts = compile_kernels([Build("kernels.triton_cosine", "_forward_kernel", {"student": "*bf16", "count": "i32"},
                                   {"D": 384, "BLOCK": 128}, capability=90)])
    assert facts[0].spills == 0 and facts[0].registers <= 128

A batch of builds is compiled in one fresh process, because Triton decides when it is imported whether it interprets
(TRITON_INTERPRET), and with a cache that ends with that process. The disassemblers are those of Triton's own wheel.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
CAPABILITIES = (80, 90, 100)  # A100; H100 and H200; B200
Constant = bool | int | float | str | None


@dataclass(frozen=True)
class Build:
    """One kernel with the types and constants to compile it for.

    arguments: Triton's type of every argument that is not a constant, as "*fp32", "*bf16", "*u8", "*i1", "i32", "fp32".
    constants: the value of every tl.constexpr argument; None also for a pointer that is not given.
    capability: 80, 90 or 100.
    divisible: integer arguments that are multiples of 16, which Triton finds out at launch. Pointers always count as
        aligned to 16 bytes, as torch allocates them.
    options: further options of Triton's compiler, such as {"num_stages": 1}.
    """

    module: str
    kernel: str
    arguments: Mapping[str, str]
    constants: Mapping[str, Constant]
    capability: int
    num_warps: int = 4
    divisible: tuple[str, ...] = ()
    options: Mapping[str, Constant] = field(default_factory=dict)


@dataclass(frozen=True)
class Facts:
    """What the machine code of one build holds.

    registers: per thread. stack_bytes: per thread; more than 0 means spills or an array in local memory.
    shared_bytes: per block, as launched. opcodes: how often each instruction stands in the code, by its full name.
    """

    registers: int
    stack_bytes: int
    shared_bytes: int
    opcodes: Mapping[str, int]

    def count(self, pattern: str) -> int:
        """How many instructions have a full name that begins with this regular expression, such as r"REDG"."""
        return sum(number for opcode, number in self.opcodes.items() if re.match(pattern, opcode))

    @property
    def spill_loads(self) -> int:
        return self.count(r"LDL\b")

    @property
    def spill_stores(self) -> int:
        return self.count(r"STL\b")

    @property
    def spills(self) -> int:
        """Loads from and stores to local memory."""
        return self.spill_loads + self.spill_stores

    @property
    def vector_loads(self) -> int:
        """Loads of 16 or more bytes per thread from global memory (LDG.E.128)."""
        return self.count(r"LDG\.E\b.*\.(128|256)\b")

    @property
    def vector_stores(self) -> int:
        """Stores of 16 or more bytes per thread to global memory (STG.E.128)."""
        return self.count(r"STG\.E\b.*\.(128|256)\b")

    @property
    def aggregated_atomics(self) -> int:
        """Shared-memory increments that a warp first adds up among its threads (ATOMS.POPC.INC)."""
        return self.count(r"ATOMS\.POPC\.INC")


def compile_kernels(builds: Sequence[Build], timeout_s: float = 240.0) -> list[Facts]:
    """The facts of each build, in order; RuntimeError with the compiler's message if one does not compile."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    with tempfile.TemporaryDirectory(prefix="aot-") as folder:
        environment |= {"TRITON_CACHE_DIR": folder, "TRITON_HOME": folder, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-m", "tests.kernels.aot"],
            input=json.dumps([asdict(build) for build in builds]),
            capture_output=True,
            text=True,
            cwd=REPOSITORY,
            env=environment,
            timeout=timeout_s,
        )
    if done.returncode:
        raise RuntimeError(f"a kernel does not compile:\n{done.stderr[-4000:]}")
    return [Facts(**facts) for facts in json.loads(done.stdout)]


def _compile(build: Build) -> Facts:
    """In the fresh process: one build."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(build.module), build.kernel)
    names = list(kernel.arg_names)
    if set(names) != {*build.arguments, *build.constants} or set(build.arguments) & set(build.constants):
        raise ValueError(f"{build.kernel} takes {names}, got {[*build.arguments]} and constants {[*build.constants]}")
    # A multiple of 16 is what the launcher finds for torch's pointers: without it loads would not be vectors.
    aligned = {*build.divisible, *(name for name, type_ in build.arguments.items() if type_.startswith("*"))}
    source = ASTSource(
        fn=kernel,
        signature={name: build.arguments.get(name, "constexpr") for name in names},
        constexprs=dict(build.constants),
        attrs={(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in aligned},
    )
    target = GPUTarget("cuda", build.capability, 32)
    compiled = triton.compile(source, target=target, options={"num_warps": build.num_warps, **build.options})
    return _facts(compiled.asm["cubin"], int(compiled.metadata.shared))


def _facts(cubin: bytes, shared_bytes: int) -> Facts:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        sass = _tool("nvdisasm", "-c", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump says nothing of registers:\n{usage}")
    # /*0010*/  @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;
    opcodes: dict[str, int] = {}
    for opcode in re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", sass, re.MULTILINE):
        opcodes[opcode] = opcodes.get(opcode, 0) + 1
    if not opcodes.get("EXIT"):
        raise RuntimeError(f"no instructions found in what nvdisasm printed:\n{sass[:2000]}")
    return Facts(int(found[1]), int(found[2]), shared_bytes, opcodes)


def _tool(name: str, *arguments: str) -> str:
    import triton

    binary = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([str(binary), *arguments], capture_output=True, text=True, check=True).stdout


def _main() -> None:
    """Builds on standard input, facts on standard output, both JSON."""
    builds: list[dict[str, Any]] = json.load(sys.stdin)
    facts = [asdict(_compile(Build(**{**build, "divisible": tuple(build["divisible"])}))) for build in builds]
    json.dump(facts, sys.stdout)


if __name__ == "__main__":
    _main()
