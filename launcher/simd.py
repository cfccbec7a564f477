"""pillow-simd: whether this machine can build it. Used by tools/install.sh and `fathom doctor`; standard library only.

pillow-simd is Pillow with AVX2 resampling and filters; it exists as source only and takes Pillow's place on disk.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

DEBIAN = {"zlib.h": "zlib1g-dev", "jpeglib.h": "libjpeg-dev"}
REQUIRED = {"zlib.h": "-lz", "jpeglib.h": "-ljpeg"}
# WebP and TrueType need no headers here: built over Pillow of the same version, pillow-simd goes on using its modules.


def cpu_flags() -> set[str]:
    """The processor's feature flags, empty where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return set()
    return next((set(line.split(":", 1)[1].split()) for line in lines if line.startswith("flags")), set())


def _compiler() -> list[str]:
    return os.environ.get("CC", "cc").split()


def compiles(header: str, library: str) -> bool:
    """Whether a small program with `header` compiles and links with `library`."""
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch, "probe.c")
        # jpeglib.h wants the two before it.
        program = f"#include <stddef.h>\n#include <stdio.h>\n#include <{header}>\nint main(void) {{ return 0; }}\n"
        source.write_text(program, encoding="utf-8")
        command = [*_compiler(), str(source), "-o", str(Path(scratch, "probe")), library]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _packages(headers: list[str]) -> str:
    return " ".join(DEBIAN[header] for header in headers)


def obstacle() -> str | None:
    """Why pillow-simd cannot be built here, with what to do about it; None when it can."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return f"it needs x86-64, this is {platform.machine()}"
    if "avx2" not in cpu_flags():
        return "it needs a processor with AVX2"
    if shutil.which(_compiler()[0]) is None:
        return f"no C compiler '{_compiler()[0]}' (Debian: apt-get install gcc libc6-dev {_packages(list(REQUIRED))})"
    if not compiles("string.h", "-lc"):
        return f"the C compiler '{_compiler()[0]}' cannot build a program (Debian: apt-get install gcc libc6-dev)"
    missing = [header for header, library in REQUIRED.items() if not compiles(header, library)]
    if missing:
        return f"no headers {', '.join(missing)} (Debian: apt-get install {_packages(missing)})"
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not header.exists():
        return f"no {header} (Debian: apt-get install python3-dev)"
    return None


def main() -> int:
    """Prints the obstacle, if any, and returns 1 for it."""
    reason = obstacle()
    print(reason or "none")
    return 1 if reason else 0


if __name__ == "__main__":
    sys.exit(main())
