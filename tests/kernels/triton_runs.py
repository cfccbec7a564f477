"""Runs a file of Triton cases in a process of its own: Triton decides when it is imported whether it interprets."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.conftest import NESTED

REPOSITORY = Path(__file__).resolve().parents[2]


def run_cases(cases: str, at_least: int, *, interpret: bool) -> None:
    """Fails, showing what pytest printed, unless all cases of this file pass and at least so many did."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", f"tests/kernels/{cases}"],
        cwd=REPOSITORY,
        env={**os.environ, NESTED: "1", "TRITON_INTERPRET": "1" if interpret else "0"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    passed = re.search(r"(\d+) passed", done.stdout)
    assert done.returncode == 0 and passed and int(passed[1]) >= at_least, done.stdout[-8000:]
