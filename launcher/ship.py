"""What travels with a submitted verb: this checkout's rooms, the folder it was typed in, the resolved configuration.

    launcher/ trainer/ dataio/ model/ kernels/ cluster/     the code that runs there
    here/                                                   the folder, less what .gitignore and .fathomignore name,
                                                            and less the rooms where it is this checkout
    job.yaml                                                the configuration with overrides and absolute paths
    COMMIT                                                  of the code, where it is known

The code lies above the folder, so that a folder of the user's called `model` hides nothing of ours. Credentials never
travel, and what is chosen here does: Ray would apply a `.gitignore` in the parcel once more.
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathspec import GitIgnoreSpec

ROOMS = ("launcher", "trainer", "dataio", "model", "kernels", "cluster")
CHECKOUT = Path(__file__).resolve().parent.parent
HERE, CONFIG, COMMIT = "here", "job.yaml", "COMMIT"
MOST_MIB = 100.0  # of Ray's job server, whatever is asked for; the code included
MOST_FILES = 20_000  # more are a dataset, or somebody's home
IGNORE_FILES = (".gitignore", ".fathomignore")  # of the folder itself, later lines count more
# Never wanted there: what a machine makes for itself, what a run writes, and what datasets and weights weigh.
IGNORED = (
    ".git", ".venv/", "venv/", "__pycache__/", "*.pyc", ".mypy_cache/", ".ruff_cache/", ".pytest_cache/",
    "node_modules/", "runs/", "labels/", "quickstart/", "wandb/", "*.tar", "*.idx", "*.safetensors", "*.pth", "*.onnx",
)  # fmt: skip
# Whatever the folder's own files say. Credentials; and what Ray would read in the parcel as a second opinion on it.
NEVER = (
    ".ssh/", ".aws/", ".azure/", ".gnupg/", ".ray/", ".kube/", ".docker/", ".huggingface/", "**/.config/gcloud/",
    ".env*", ".netrc", "_netrc", ".git-credentials", ".pgpass", ".pypirc", ".npmrc", ".htpasswd", ".s3cfg", ".boto",
    ".vault-token", "*.pem", "*.key", "*.p12", "*.pfx", "id_rsa*", "id_dsa*", "id_ecdsa*", "id_ed25519*", "!id_*.pub",
    "kubeconfig", "*.kubeconfig", "application_default_credentials.json", "**/huggingface/token",
    "**/huggingface/stored_tokens", ".gitignore", ".rayignore",
)  # fmt: skip
FULL = (errno.ENOSPC, errno.EDQUOT)
ROOM = "free some there, or set TMPDIR to a folder with room"
RAY_LEAVES_OUT = ("RAY_OVERRIDE_RUNTIME_ENV_DEFAULT_EXCLUDES", "")  # a variable: nothing but what is left out here
IN_CODE = ("__pycache__", "*.pyc", ".*")  # not shipped of ours
REMEDY = (
    f"Name what is not needed there in {IGNORE_FILES[-1]} (patterns as in .gitignore), put large files where the "
    "cluster sees them too, or ship the code alone with --no-folder"
)


class ShipError(RuntimeError):
    """The folder cannot be shipped: which file of it, why, and what to do."""

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
    """The files of `folder` that nothing ignores. Raises ShipError when they are too large, naming the largest.

    `most_mib`: of all that travels, the code too; ShipError when that is more than Ray's job server takes.
    """
    if most_mib > MOST_MIB:
        raise ShipError(
            f"--max-size {most_mib:g}: Ray's job server takes {MOST_MIB:g} MiB at most, the code included; put large "
            "files where the cluster sees them too, or ship the code alone with --no-folder"
        )
    _refuse(folder)
    found = Parcel(folder, dict(islice(_files(folder), MOST_FILES + 1)))
    if len(found.files) > MOST_FILES:
        raise ShipError(f"{folder}: more than {MOST_FILES} files would be shipped. {REMEDY}")
    code_mib = zipped(code()) / (1 << 20)
    if zipped(found.files) / (1 << 20) + code_mib >= most_mib:
        largest = sorted(found.files.items(), key=lambda item: -item[1])[:3]
        names = ", ".join(f"{name} ({size / (1 << 20):.1f} MiB)" for name, size in largest)
        raise ShipError(
            f"{folder}: {found.mib:.0f} MiB in {len(found.files)} files, and {code_mib:.1f} MiB of code, would be "
            f"shipped, {most_mib:g} at most; the largest: {names}. {REMEDY}"
            + (", or give --max-size" if most_mib < MOST_MIB else "")
        )
    return found


def code() -> dict[str, int]:
    """The files of the rooms, by their paths in the checkout, with their sizes in bytes."""
    found = {}
    for room in ROOMS:
        for parent, folders, names in os.walk(CHECKOUT / room):
            folders[:] = [name for name in folders if not _matches(name, IN_CODE)]
            for name in (name for name in names if not _matches(name, IN_CODE)):
                path = os.path.join(parent, name)
                found[os.path.relpath(path, CHECKOUT)] = os.path.getsize(path)
    return found


def zipped(files: Mapping[str, int]) -> int:
    """Bytes of Ray's zip of these files, which compresses nothing and holds every path twice; not less than it has."""
    return sum(size + 2 * (len(os.fsencode(name)) + len(HERE) + 1) + 128 for name, size in files.items())


@contextmanager
def packed(shipped: Parcel | None, config: str | None) -> Iterator[Path]:
    """A temporary folder with all that travels. Raises ShipError."""
    try:
        made = tempfile.TemporaryDirectory(prefix="fathom-submit-")
    except OSError as error:
        raise ShipError(f"no temporary folder can be made: {error.strerror}; {ROOM}") from None
    with made as folder:
        try:
            pack(Path(folder), shipped, config)
        except OSError as error:
            raise ShipError(f"{folder}: what travels cannot be copied there: {error.strerror}; {ROOM}") from None
        yield Path(folder)


def pack(into: Path, shipped: Parcel | None, config: str | None) -> None:
    """Lay everything out in the empty folder `into`. Links to files become files, those to folders stay behind."""
    for name in code():
        _copy(CHECKOUT / name, into / name)
    (into / HERE).mkdir()
    for name in shipped.files if shipped else ():
        assert shipped is not None
        _copy(shipped.folder / name, into / HERE / name)
    with suppress(FileNotFoundError):  # a machine without git
        commit = subprocess.run(["git", "-C", str(CHECKOUT), "rev-parse", "HEAD"], capture_output=True, text=True)
        if commit.returncode == 0:
            (into / COMMIT).write_text(commit.stdout, encoding="utf-8")
    if config is not None:
        (into / CONFIG).write_text(config, encoding="utf-8")


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        shutil.copy2(source, target)
    except OSError as error:
        if error.errno in FULL:
            raise
        if source.exists():  # else it was deleted since it was listed
            raise _unreadable(source, error) from None


def _unreadable(path: str | Path, error: OSError) -> ShipError:
    return ShipError(
        f"{path}: cannot be read: {error.strerror or error}; make it readable, or name it in {IGNORE_FILES[-1]}"
    )


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _refuse(folder: Path) -> None:
    """The home folder, and what lies above it, or is credentials."""
    real = folder.resolve()
    if Path.home().resolve().is_relative_to(real):
        raise ShipError(
            f"{folder}: is your home folder, or above it, and is not shipped; type the command in a folder of its "
            "own, or ship the code alone with --no-folder"
        )
    if _spec(line for line in NEVER if line.endswith("/")).match_file(f"{real}/".lstrip("/")):
        raise ShipError(
            f"{folder}: is a folder of credentials, and is not shipped; type the command elsewhere, or give --no-folder"
        )


def _spec(lines: Iterable[str]) -> GitIgnoreSpec:
    from pathspec import GitIgnoreSpec

    return GitIgnoreSpec.from_lines(lines)


def _ignored(folder: Path) -> list[str]:
    lines = list(IGNORED)
    for name in IGNORE_FILES:
        if (folder / name).is_file():
            lines += _lines(folder / name)
    return lines + [f"/{room}/" for room in ROOMS if folder.resolve() == CHECKOUT]  # they travel as code


def _lines(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError as error:
        raise ShipError(f"{path}: cannot be read: {error.strerror}; make it readable") from None
    for number, line in enumerate(lines, 1):
        try:
            _spec([line])
        except ValueError:
            raise ShipError(f"{path}, line {number}: {line!r} is no pattern; mend or remove the line") from None
    return lines


def _unlisted(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):  # deleted since its own folder was listed
        raise _unreadable(error.filename, error)


def _files(folder: Path) -> Iterator[tuple[str, int]]:
    """Ignored folders are not looked into: a dataset beside the configuration may have millions of files."""
    ignored, never = _spec(_ignored(folder)), _spec(NEVER)
    for parent, folders, names in os.walk(folder, onerror=_unlisted):
        place = os.path.relpath(parent, folder)
        inside = "" if place == "." else f"{place}/"
        folders[:] = sorted(
            name for name in folders if not any(spec.match_file(f"{inside}{name}/") for spec in (ignored, never))
        )
        for name in sorted(names):
            path = f"{inside}{name}"
            full = os.path.join(parent, name)
            if not os.path.isfile(full) or ignored.match_file(path) or never.match_file(path):
                continue  # no pipes, no sockets, no dangling links
            if os.path.islink(full) and never.match_file(os.path.relpath(os.path.realpath(full), folder.resolve())):
                continue
            if any("\ud800" <= letter <= "\udfff" for letter in path):  # what Python makes of other bytes
                raise ShipError(
                    f"{folder}: the file name {path!a} is not UTF-8, and Ray ships no other; rename it, or name it in "
                    f"{IGNORE_FILES[-1]}"
                )
            with suppress(FileNotFoundError):  # deleted since it was listed
                yield path, os.path.getsize(full)
