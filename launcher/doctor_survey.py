"""The verb `fathom doctor --cluster`: joins the cluster, has it looked over, and prints what that means."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from launcher import doctor
from launcher.doctor_cluster import MAY_DIFFER, MUST_AGREE, judge
from launcher.ship import ROOMS

NODE_CHECKS = (
    doctor.check_kernels_name,
    doctor.check_devices,
    doctor.check_dali,
    doctor.check_compiler,
    doctor.check_shared_memory,
)


class FolderError(ValueError):
    """--folder is none."""

    exit_status = 2


def cluster_command(
    address: str | None, folder: Path | None, timeout_s: float, every_pair: bool, as_json: bool
) -> int:
    """Prints every finding; returns 1 when something fails, else 0. A node has `timeout_s` to answer a question.

    ClusterAddressError (exit status 2) for an address that is missing, wrong, or not answered; FolderError (2).
    """
    from cluster.crew import require_member
    from cluster.runtime import ray_session
    from cluster.survey import survey

    where = resolve_address(address)
    shared = resolve_folder(folder)
    with _stages() as stages:
        stages.show("joining")
        require_member(where)
        with ray_session(where):
            found = survey(
                folder=str(shared),
                distributions=(*MUST_AGREE[1:], *MAY_DIFFER),
                rooms=ROOMS,
                check=check_node,
                timeout_s=timeout_s,
                every_pair=every_pair,
                on_stage=stages.show,
            )
    return doctor.report(judge(found, shared), as_json)


def resolve_address(address: str | None) -> str:
    """`address`, else that of RAY_ADDRESS. ClusterAddressError when there is neither, or it is no HOST:PORT."""
    from cluster.runtime import ClusterAddressError, usual_address

    found = address or usual_address()
    if found is None:
        raise ClusterAddressError(
            "--cluster: which one? --address HOST:PORT (as `ray start --head` printed it), or set RAY_ADDRESS; "
            "without --cluster this machine alone is checked"
        )
    if not re.fullmatch(r"[^/\s]+:\d+", found):
        raise ClusterAddressError(f"--address {found}: expected HOST:PORT of the cluster's Ray, such as 10.0.0.1:6379")
    return found


def resolve_folder(folder: Path | None) -> Path:
    """Absolute; by default `runs`, if it is here, else the current folder. FolderError for none that can be written."""
    found = folder or (Path("runs") if Path("runs").is_dir() else Path())
    if not found.is_dir() or not os.access(found, os.W_OK):
        raise FolderError(f"--folder {found}: a folder that can be written is expected; object stores are not tried")
    return Path(os.path.abspath(found))


def check_node() -> list[doctor.Finding]:
    """Runs on every node: the checks of `fathom doctor` that are about more than versions."""
    return doctor.run_checks(NODE_CHECKS)


class Stages:
    """What goes on, on one line of a terminal; nothing elsewhere."""

    def __init__(self) -> None:
        self._shown = sys.stderr.isatty()

    def show(self, stage: str) -> None:
        """In place of what was shown before; empty: nothing."""
        if self._shown:
            print(f"\r\033[K{stage}{'...' if stage else ''}", end="", file=sys.stderr, flush=True)


@contextmanager
def _stages() -> Iterator[Stages]:
    stages = Stages()
    try:
        yield stages
    finally:
        stages.show("")
