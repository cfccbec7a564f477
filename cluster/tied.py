"""A program that ends with the process that started it, however that one ends."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

# Becomes the program in its arguments, which then gets SIGTERM when the process of the first argument ends: 1 is
# PR_SET_PDEATHSIG, which survives exec. That process may have ended before the call: then nothing is to be started.
_TIED = """
import os, signal, sys
try:
    import ctypes
    ctypes.CDLL(None).prctl(1, ctypes.c_ulong(signal.SIGTERM))
except (ImportError, AttributeError, OSError):
    pass  # no Linux
if os.getppid() != int(sys.argv[1]):
    sys.exit(128 + signal.SIGTERM)
os.execvp(sys.argv[2], sys.argv[2:])
"""


def tied(command: Sequence[str], parent: int | None = None) -> list[str]:
    """The command line to start `command` with: it gets SIGTERM when the thread that started it ends, and does not
    start at all when that happened before. `parent`: whose child it will be, this process if None."""
    return [sys.executable, "-I", "-S", "-c", _TIED, str(parent or os.getpid()), *command]
