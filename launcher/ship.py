"""What travels with a submitted verb: this checkout's rooms, the folder it was typed in, the resolved configuration.

    launcher/ trainer/ dataio/ model/ kernels/ cluster/     the code that runs there
    here/                                                   the folder, less what .gitignore and .fathomignore name
    job.yaml                                                the configuration with overrides and absolute paths
    COMMIT                                                  of the code, where it is known

The code lies above the folder, so that a folder of the user's called `model` hides nothing of ours.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

ROOMS = ("launcher", "trainer", "dataio", "model", "kernels", "cluster")
CHECKOUT = Path(__file__).resolve().parent.parent
HERE, CONFIG, COMMIT = "here", "job.yaml", "COMMIT"
MOST_MIB = 100.0
MOST_FILES = 20_000  # more are a dataset, or somebody's home
IGNORE_FILES = (".gitignore", ".fathomignore")  # of the folder itself, later lines count more
# Never wanted there: what a machine makes for itself, what a run writes, and what datasets and weights weigh.
IGNORED = (
    ".git/", ".venv/", "__pycache__/", "*.pyc", ".mypy_cache/", ".ruff_cache/", ".pytest_cache/", "node_modules/",
    "runs/", "labels/", "quickstart/", "wandb/", "*.tar", "*.idx", "*.safetensors", "*.pth", "*.onnx", ".env",
)  # fmt: skip
REMEDY = (
    f"Name what is not needed there in {IGNORE_FILES[-1]} (patterns as in .gitignore), or ship the code alone with "
    "--no-folder"
)


class ShipError(RuntimeError):
    """The folder cannot be shipped: why, and what to do."""

    exit_status = 2


@dataclass(frozen=True)
class Parcel:
    """The files of a folder that travel, by their paths in it, with their sizes in bytes."""

    folder: Path
    files: dict[str, int]

    @property
    def mib(self) -> float:
        """Size of all."""
        return sum(self.files.values()) / (1 << 20)


def parcel(folder: Path, most_mib: float = MOST_MIB) -> Parcel:
    """The files of `folder` that nothing ignores. Raises ShipError when they are too large, naming the largest."""
    found = Parcel(folder, dict(islice(_files(folder, _patterns(folder)), MOST_FILES + 1)))
    if len(found.files) > MOST_FILES:
        raise ShipError(f"{folder}: more than {MOST_FILES} files would be shipped. {REMEDY}")
    if found.mib > most_mib:
        largest = sorted(found.files.items(), key=lambda item: -item[1])[:3]
        names = ", ".join(f"{name} ({size / (1 << 20):.1f} MiB)" for name, size in largest)
        raise ShipError(
            f"{folder}: {found.mib:.0f} MiB in {len(found.files)} files would be shipped, {most_mib:g} at most; the "
            f"largest: {names}. {REMEDY}, or give --max-size"
        )
    return found


def is_checkout(folder: Path) -> bool:
    """Whether the folder is this program's own checkout: it travels anyway."""
    return folder.resolve() == CHECKOUT


def pack(into: Path, shipped: Parcel | None, config: str | None) -> None:
    """Lay everything out in the empty folder `into`. Links to files become files, those to folders stay behind."""
    for room in ROOMS:
        shutil.copytree(CHECKOUT / room, into / room, ignore=shutil.ignore_patterns("__pycache__", "*.pyc", ".*"))
    (into / HERE).mkdir()
    for name in shipped.files if shipped else ():
        assert shipped is not None
        target = into / HERE / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(shipped.folder / name, target)
    commit = subprocess.run(["git", "-C", str(CHECKOUT), "rev-parse", "HEAD"], capture_output=True, text=True)
    if commit.returncode == 0:
        (into / COMMIT).write_text(commit.stdout, encoding="utf-8")
    if config is not None:
        (into / CONFIG).write_text(config, encoding="utf-8")


def _patterns(folder: Path) -> list[str]:
    lines = list(IGNORED)
    for name in IGNORE_FILES:
        if (folder / name).is_file():
            lines += (folder / name).read_text(encoding="utf-8", errors="replace").splitlines()
    return lines


def _files(folder: Path, patterns: list[str]) -> Iterator[tuple[str, int]]:
    """Ignored folders are not looked into: a dataset beside the configuration may have millions of files."""
    from pathspec import GitIgnoreSpec

    spec = GitIgnoreSpec.from_lines(patterns)
    for parent, folders, names in os.walk(folder):
        place = os.path.relpath(parent, folder)
        inside = "" if place == "." else f"{place}/"
        folders[:] = sorted(name for name in folders if not spec.match_file(f"{inside}{name}/"))
        for name in sorted(names):
            path = f"{inside}{name}"
            full = os.path.join(parent, name)
            if os.path.isfile(full) and not spec.match_file(path):  # no pipes, no sockets, no dangling links
                yield path, os.path.getsize(full)
