"""Building the small C++ operator that DeepSpeed needs for collectives on CPUs, once per environment and safely.

torch guards such a build by a file that stays when the builder is killed; every later start then waits for ever. Here
all processes of ours take turns by a lock that ends with the process, so a guard that is there while we hold it is
nobody's. Each environment has a build folder of its own: in a common one, two would rebuild each other's operator.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import sys
from importlib.metadata import version
from pathlib import Path

import torch

OPERATOR = "deepspeed_shm_comm"


class CompilerMissing(RuntimeError):
    """The operator cannot be built on this machine. Ends a command with status 2."""

    exit_status = 2


def build_folder() -> Path:
    """Where this environment's operators are built; TORCH_EXTENSIONS_DIR where the user has set it."""
    given = os.environ.get("TORCH_EXTENSIONS_DIR")
    if given:
        return Path(given)
    what = f"{sys.prefix} {torch.__version__} {version('deepspeed')}"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "fathom" / "operators" / hashlib.sha256(what.encode()).hexdigest()[:16]


def prepare_cpu_operator() -> None:
    """Build or load the operator in this process; half a minute the first time, others wait meanwhile.

    Call it before deepspeed.initialize, which then finds it loaded. Does nothing on accelerators other than the CPU.
    Raises CompilerMissing, naming the remedy, where it cannot be built.
    """
    folder = build_folder()
    os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)
    # DeepSpeed looks for `ninja` on PATH; it lies beside this environment's python, activated or not.
    own, path = str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)
    if own not in path.split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join([own, path])
    from deepspeed.accelerator import get_accelerator

    if get_accelerator().device_name() != "cpu":
        return
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "fathom.lock", "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        (folder / OPERATOR / "lock").unlink(missing_ok=True)
        try:
            get_accelerator().create_op_builder("ShareMemCommBuilder").load()
        except (RuntimeError, OSError, ImportError) as error:
            line = next((part for part in str(error).splitlines() if part.strip()), type(error).__name__)
            raise CompilerMissing(
                f"DeepSpeed's CPU operator cannot be built in {folder}: {line}; it needs a C++ compiler and ninja, "
                "see `fathom doctor`"
            ) from error
