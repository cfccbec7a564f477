"""Checkpoints on disk: tensors by parameter name, free of the number of ranks and the ZeRO stage, with checksums.

    checkpoints/step_00001000/weights.safetensors                    every tensor of the network, whole, fp32
                              ema.safetensors                        the moving average, where the run keeps one
                              optimizer-00000-of-00002.safetensors   moment/parameter name: rank 0's stretches of them
                              state.json                             counters, parameter groups, what the data plan was
                              manifest.json                          sha256 of every file, fingerprints; written last
    checkpoints/latest                                               name of the newest folder

A moment is stored as one flat stretch [start, stop) per rank that held one; a reader on any other number of ranks, at
any stage, takes from the files what overlaps its own stretch. The folder is written under a temporary name and renamed
once, so a half-written one is never mistaken for a whole one. Random numbers need no state: every draw is a function of
(seed, step, rank) or (seed, epoch, key).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cluster import storage
from trainer.config import ConfigError
from trainer.engine_state import Span

FORMAT = 2
WEIGHTS, EMA, STATE, MANIFEST = "weights.safetensors", "ema.safetensors", "state.json", "manifest.json"
PARTIAL = ".partial"
PATIENCE_S = 20.0  # for other machines' files to appear
REPLACED = f".replaced{PARTIAL}"
_NAME = re.compile(r"step_(\d{8,})")
_PART = re.compile(r"optimizer-(\d{5})-of-(\d{5})\.safetensors")


class CheckpointError(ConfigError):
    """A checkpoint does not fit this run, or none is whole."""


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """What a run must know to go on, on any number of ranks."""

    step: int
    applied_steps: int  # optimizer updates: steps less the skipped ones
    cursor: Mapping[str, int]  # samples consumed per role
    data: Mapping[str, Any] = field(default_factory=dict)  # plan version and fingerprints, to refuse another data set
    groups: Mapping[str, Any] = field(default_factory=dict)  # parameter names per group
    micro_batches: int = 1  # forward passes per step
    measured: Mapping[str, Any] | None = None  # under what `micro_batch: auto` found them; None: they were configured
    workers: int = 1
    skipped_in_a_row: int = 0  # steps without an update just before
    spikes: Mapping[str, Any] | None = None  # what the spike detector has seen
    losses: Sequence[float | None] = field(default_factory=list)  # of the last two steps, where it has not
    began: Sequence[Sequence[Any]] = field(default_factory=list)  # (step, cursor) where the last steps began
    format: int = FORMAT


@dataclass(frozen=True, kw_only=True)
class About:
    """What a manifest says beside checksums."""

    frozen: str | None = None  # fingerprint of the frozen networks it was trained with
    network: Mapping[str, Any] | None = None  # what the tensors cannot say: preset, taps, head, position mode
    score: float | None = None  # the validation metric at this step, where it was measured
    metric: str | None = None


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A whole checkpoint, as read. `optimizer` reads from the files when asked."""

    path: str
    weights: Mapping[str, Tensor]
    optimizer: Moments
    state: TrainState
    about: About
    fingerprint: str  # of the weights when they were saved
    ema: Mapping[str, Tensor] | None = None


class Moments(Mapping[str, Tensor]):
    """The optimizer's moments by `moment/parameter name`, out of every rank's file: whole, or a stretch of one."""

    def __init__(self, files: Iterable[str]) -> None:
        self._pieces: dict[str, list[tuple[Span, Any]]] = {}
        self._shapes: dict[str, list[int]] = {}
        for path in files:
            file = safe_open(path, framework="pt")
            table = json.loads((file.metadata() or {})["spans"])
            for name, (start, shape) in table.items():
                stop = start + file.get_slice(name).get_shape()[0]
                self._pieces.setdefault(name, []).append((Span(start=start, stop=stop), file))
                self._shapes[name] = shape

    def __getitem__(self, name: str) -> Tensor:
        size = torch.Size(self._shapes[name])
        return self.part(name, 0, size.numel()).reshape(size)

    def __iter__(self) -> Iterator[str]:
        return iter(self._pieces)

    def __len__(self) -> int:
        return len(self._pieces)

    def part(self, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the flat moment. KeyError for an unknown name or elements that no file has."""
        found = torch.empty(stop - start)
        missing = stop - start
        for span, file in self._pieces[name]:
            first, last = max(start, span.start), min(stop, span.stop)
            if first < last:
                found[first - start : last - start] = file.get_slice(name)[first - span.start : last - span.start]
                missing -= last - first
        if missing:
            raise KeyError(f"{name}: {missing} of elements {start} to {stop} are in no file")
        return found


def checkpoint_bytes(parameters: int, trained: int, *, averaged: bool) -> int:
    """On disk: the weights, two moments of the trained ones and, where the run keeps one, the moving average."""
    return 4 * (parameters * (1 + averaged) + 2 * trained)


def part_name(rank: int, world_size: int) -> str:
    """The file of one rank's moments."""
    return f"optimizer-{rank:05d}-of-{world_size:05d}.safetensors"


def partial_folder(root: str, step: int) -> str:
    """Where the ranks put a checkpoint's files until it is whole."""
    return os.path.join(root, f"step_{step:08d}{PARTIAL}")


def write_tensors(folder: str, name: str, tensors: Mapping[str, Tensor]) -> str:
    """Write whole tensors as a safetensors file, synced; returns its sha256. Raises StorageError."""
    return _write(folder, name, tensors, None)


def write_moments(folder: str, name: str, parts: Mapping[str, Tensor], places: Mapping[str, tuple[int, Any]]) -> str:
    """Write flat stretches of moments; `places`: (start, shape of the whole) by name. Returns the file's sha256."""
    spans = {key: [places[key][0], list(places[key][1])] for key in parts}
    return _write(folder, name, parts, {"spans": json.dumps(spans)})


def _write(folder: str, name: str, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None) -> str:
    path = os.path.join(folder, name)
    needed = sum(t.numel() * t.element_size() for t in tensors.values())
    storage.require_free(os.path.dirname(folder), needed + 2**20, "a checkpoint")
    try:
        os.makedirs(folder, exist_ok=True)
        save_file(dict(tensors), path, metadata=metadata)
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        return storage.sha256_file(path)
    except (OSError, SafetensorError) as error:
        raise storage.StorageError(f"{path}: cannot be written: {error}") from error


def commit(root: str, state: TrainState, files: Mapping[str, str], fingerprint: str, about: About) -> str:
    """Make the partial folder of `state.step`, whose `files` (name: sha256) are written, a checkpoint.

    Returns its folder. Raises StorageError; the earlier checkpoints stay.
    """
    final, partial = os.path.join(root, f"step_{state.step:08d}"), partial_folder(root, state.step)
    replaced = f"{final}{REPLACED}"
    try:
        storage.atomic_write(os.path.join(partial, STATE), json.dumps(asdict(state), indent=1))
        listed = {**files, STATE: storage.sha256_file(os.path.join(partial, STATE))}
        manifest = {"format": FORMAT, "step": state.step, "files": listed, "weights": fingerprint, **asdict(about)}
        manifest["digest"] = _digest(manifest)
        _await_files(partial, listed)
        for name in set(os.listdir(partial)) - set(listed):  # of an attempt with other ranks that was killed
            os.unlink(os.path.join(partial, name))
        storage.atomic_write(os.path.join(partial, MANIFEST), json.dumps(manifest, indent=1))
        if os.path.isdir(final):  # a run that walked back writes the same step again
            shutil.rmtree(replaced, ignore_errors=True)
            os.rename(final, replaced)
        os.rename(partial, final)
    except OSError as error:
        if os.path.isdir(replaced) and not os.path.isdir(final):
            os.rename(replaced, final)
        raise storage.StorageError(f"{final}: cannot be completed: {error}; earlier checkpoints are kept") from error
    shutil.rmtree(replaced, ignore_errors=True)
    with contextlib.suppress(storage.StorageError):  # for people; a resume looks at the folders themselves
        storage.atomic_write(os.path.join(root, "latest"), os.path.basename(final))
    return final


def _await_files(folder: str, names: Iterable[str]) -> None:
    """Wait until this machine sees all files; a network file system may take a while. FileNotFoundError when not."""
    deadline = time.monotonic() + PATIENCE_S
    while missing := sorted(set(names) - set(os.listdir(folder))):
        if time.monotonic() > deadline:
            raise FileNotFoundError(
                f"{', '.join(missing)} of other ranks cannot be seen from rank 0's machine; `runs` must be a folder "
                "that all machines share"
            )
        time.sleep(0.2)


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def remove(root: str, names: Sequence[str]) -> None:
    """Remove checkpoints, the newest ones as a rule; `latest` names the newest of those that stay."""
    for name in names:
        shutil.rmtree(os.path.join(root, name))
    left = list_checkpoints(root)
    if left:
        storage.atomic_write(os.path.join(root, "latest"), left[-1])
    else:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(root, "latest"))


def prune(
    root: str, newest: int, *, keep: int, keep_best: int = 0, metric: str | None = None, lower_is_better: bool = True
) -> list[int]:
    """Remove all checkpoints up to step `newest` but the `keep` newest and the `keep_best` with the best `metric`.

    Returns the steps that went. Folders of later steps stay: they were not whole, else the run had gone on from them,
    and must not push out whole ones.
    """
    steps = [step_of(name) for name in list_checkpoints(root)]
    steps = [step for step in steps if step <= newest]
    scores = scores_of(root, metric, steps) if metric else {}
    best = sorted(scores, key=lambda step: (scores[step] if lower_is_better else -scores[step], -step))[:keep_best]
    gone = sorted(set(steps) - set(steps[-keep:]) - set(best))
    for step in gone:
        shutil.rmtree(os.path.join(root, f"step_{step:08d}"), ignore_errors=True)
    return gone


def scores_of(root: str, metric: str, steps: Iterable[int]) -> dict[int, float]:
    """The validation scores in these checkpoints' manifests, by step; those of another metric are no match."""
    found = {}
    for step in steps:
        try:
            manifest = json.loads(storage.read_bytes(os.path.join(root, f"step_{step:08d}", MANIFEST)))
            if manifest["metric"] == metric and math.isfinite(manifest["score"]):
                found[step] = float(manifest["score"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return found


def among_the_best(root: str, metric: str, lower_is_better: bool, score: float, count: int) -> bool:
    """Whether a score is better than the `count`-th best of the checkpoints that are there, or these are fewer."""
    scores = scores_of(root, metric, [step_of(name) for name in list_checkpoints(root)]).values()
    worst = sorted(scores, reverse=not lower_is_better)[count - 1 : count]
    return not worst or (score < worst[0] if lower_is_better else score > worst[0])


def list_checkpoints(root: str) -> list[str]:
    """Names of the checkpoint folders under `root`, oldest first; they may turn out not to be whole."""
    if not os.path.isdir(root):
        return []
    found = (n for n in os.listdir(root) if _NAME.fullmatch(n) and os.path.isdir(os.path.join(root, n)))
    return sorted(found, key=step_of)


def find_checkpoint(root: str) -> tuple[str | None, list[str]]:
    """The newest whole checkpoint's folder, and a line for every newer one that was passed over.

    Raises CheckpointError and StorageError as `verify_checkpoint` does.
    """
    passed: list[str] = []
    for name in reversed(list_checkpoints(root)):
        problem = verify_checkpoint(os.path.join(root, name))
        if problem is None:
            return os.path.join(root, name), passed
        passed.append(f"{name}: {problem}")
    return None, passed


def verify_checkpoint(path: str) -> str | None:
    """What is wrong with a checkpoint, or None: a manifest, every file there, every checksum right.

    What is no damage is no reason to go back to an older one: CheckpointError for another version's format,
    StorageError when the place cannot be read (permissions, a failing disk or mount).
    """
    try:
        manifest = json.loads(storage.read_bytes(os.path.join(path, MANIFEST)))
        digest = manifest.pop("digest", None)
        whole = digest == _digest(manifest)
        if (whole or digest is None) and (found := manifest.get("format", FORMAT)) != FORMAT:
            raise CheckpointError(
                f"{path}: was written in format {found}, this version reads {FORMAT}; go on with the version that "
                "environment.json names, or start a new run from its weights with model.weights"
            )
        if not whole:
            return f"{MANIFEST} does not match its checksum"
        files = manifest["files"]
        for name in required(files):
            if storage.sha256_file(os.path.join(path, name)) != files[name]:
                return f"{name} does not match its checksum"
    except FileNotFoundError as error:
        return str(error)
    except storage.StorageError as error:
        raise storage.StorageError(f"{error}; or move {path} away to go on from the checkpoint before it") from error
    except ConfigError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} is damaged ({type(error).__name__}: {error})"
    return None


def required(files: Mapping[str, str]) -> list[str]:
    """Every file that a manifest with these `files` stands for: those listed and the other ranks' moments."""
    names = {WEIGHTS, STATE, *files}
    for name in files:
        if match := _PART.fullmatch(name):
            names |= {part_name(rank, int(match[2])) for rank in range(int(match[2]))}
    return sorted(names)


def load_checkpoint(path: str) -> Checkpoint:
    """Read a checkpoint that `find_checkpoint` found. Raises CheckpointError when its format is not ours."""
    try:
        state = json.loads(storage.read_bytes(os.path.join(path, STATE)))
        if state.get("format") != FORMAT:
            raise CheckpointError(f"{path}: format {state.get('format')}, this version reads {FORMAT}")
        manifest = json.loads(storage.read_bytes(os.path.join(path, MANIFEST)))
        parts = [os.path.join(path, name) for name in manifest["files"] if _PART.fullmatch(name)]
        return Checkpoint(
            path=path,
            weights=load_file(os.path.join(path, WEIGHTS)),
            optimizer=Moments(parts),
            state=TrainState(**state),
            about=About(**{name: manifest[name] for name in About.__dataclass_fields__}),
            fingerprint=manifest["weights"],
            ema=load_file(os.path.join(path, EMA)) if EMA in manifest["files"] else None,
        )
    except (SafetensorError, TypeError, KeyError, AttributeError, json.JSONDecodeError) as error:
        raise CheckpointError(
            f"{path}: cannot be read: {error}; remove the folder to go on from the one before"
        ) from error


def load_weights(module: nn.Module, checkpoint: Checkpoint) -> None:
    """Put the weights into `module`, strictly. Raises CheckpointError listing what differs."""
    own, saved = module.state_dict(), checkpoint.weights
    shapes = {
        name: f"{name} is {list(saved[name].shape)} there and {list(own[name].shape)} here"
        for name in own.keys() & saved.keys()
        if own[name].shape != saved[name].shape
    }
    found = {
        "missing": sorted(own.keys() - saved.keys()),
        "unknown": sorted(saved.keys() - own.keys()),
        "of another shape": [shapes[name] for name in sorted(shapes)],
    }
    if any(found.values()):
        listed = "; ".join(f"{len(names)} tensors {what}: {_some(names)}" for what, names in found.items() if names)
        raise CheckpointError(f"{checkpoint.path}: is of another network: {listed}; check task.kind, model.preset")
    module.load_state_dict(dict(saved), strict=True)


def _some(names: list[str], limit: int = 4) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return f"{', '.join(names[:limit])}{more}"


def fingerprint(weights: Mapping[str, Tensor]) -> str:
    """sha256 over names, shapes, types and bytes of all tensors, frozen ones included."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def clean(root: str) -> None:
    """Remove what a killed run left half-written; call it before the ranks start."""
    for name in os.listdir(root) if os.path.isdir(root) else ():
        whole = os.path.join(root, name.removesuffix(REPLACED))
        if name.endswith(REPLACED) and not os.path.isdir(whole):  # killed between two renames
            os.rename(os.path.join(root, name), whole)
        elif name.endswith(PARTIAL):
            shutil.rmtree(os.path.join(root, name), ignore_errors=True)


def step_of(name: str) -> int:
    """The step in a checkpoint folder's name."""
    return int(name.removeprefix("step_"))
