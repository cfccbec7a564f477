"""Checkpoints: whole tensors by parameter name, free of the world size, verified by checksum.

    checkpoints/step_00001000/weights.safetensors     every tensor of the network, fp32
                              optimizer.safetensors   moment/parameter name
                              state.json              counters, parameter groups, what the data plan was
                              manifest.json           sha256 of every file, weights' fingerprint; written last
    checkpoints/latest                                name of the newest folder

The folder is written under a temporary name and renamed once, so a half-written one is never mistaken for a whole one.
Random numbers need no state: every draw is a function of (seed, step, rank) or (seed, epoch, key).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cluster import storage
from trainer.config import ConfigError

FORMAT = 1
FILES = ("weights.safetensors", "optimizer.safetensors", "state.json")
_NAME, _PARTIAL = re.compile(r"step_(\d{8,})"), ".partial"


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
    format: int = FORMAT


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A whole checkpoint, as read."""

    path: str
    weights: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    state: TrainState
    frozen: str | None = None  # fingerprint of the frozen networks it was trained with
    network: Mapping[str, Any] | None = None  # what the tensors cannot say: preset, taps, head, position mode


def save_checkpoint(
    root: str,
    state: TrainState,
    weights: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    *,
    keep: int,
    frozen: str | None = None,
    network: Mapping[str, Any] | None = None,
) -> str:
    """Write one checkpoint under `root` and drop all but the newest `keep`. Returns its folder.

    Raises StorageError when the disk is too full; the earlier checkpoints stay.
    """
    needed = sum(t.numel() * t.element_size() for t in (*weights.values(), *optimizer.values()))
    storage.require_free(root, int(needed * 1.05) + 2**20, "a checkpoint")
    final = os.path.join(root, f"step_{state.step:08d}")
    partial, replaced = f"{final}{_PARTIAL}", f"{final}.replaced{_PARTIAL}"
    _clean(root)
    try:
        os.makedirs(partial)
        tensors = {"weights.safetensors": weights, "optimizer.safetensors": optimizer}
        for name, named in tensors.items():
            save_file({k: v.contiguous() for k, v in named.items()}, os.path.join(partial, name))
            _sync(os.path.join(partial, name))
        storage.atomic_write(os.path.join(partial, "state.json"), json.dumps(asdict(state), indent=1))
        files = {name: storage.sha256_file(os.path.join(partial, name)) for name in FILES}
        manifest = {
            "format": FORMAT,
            "step": state.step,
            "files": files,
            "weights": fingerprint(weights),
            "frozen": frozen,
            "network": network,  # what the tensors cannot say: model/files.py reads it
        }
        storage.atomic_write(os.path.join(partial, "manifest.json"), json.dumps(manifest, indent=1))
        if os.path.isdir(final):  # a run that walked back writes the same step again
            os.rename(final, replaced)
        os.rename(partial, final)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise storage.StorageError(
            f"{final}: cannot write the checkpoint: {error}; earlier checkpoints are kept"
        ) from error
    storage.atomic_write(os.path.join(root, "latest"), os.path.basename(final))
    _clean(root)
    # Folders of later steps were not whole, else the run had gone on from them: they must not push out whole ones.
    for name in [n for n in list_checkpoints(root) if _step(n) <= state.step][:-keep]:
        shutil.rmtree(os.path.join(root, name), ignore_errors=True)
    return final


def list_checkpoints(root: str) -> list[str]:
    """Names of the checkpoint folders under `root`, oldest first; they may turn out not to be whole."""
    if not os.path.isdir(root):
        return []
    return sorted((n for n in os.listdir(root) if _NAME.fullmatch(n)), key=_step)


def find_checkpoint(root: str) -> tuple[str | None, list[str]]:
    """The newest whole checkpoint's folder, and a line for every newer one that was passed over."""
    passed: list[str] = []
    for name in reversed(list_checkpoints(root)):
        problem = verify_checkpoint(os.path.join(root, name))
        if problem is None:
            return os.path.join(root, name), passed
        passed.append(f"{name}: {problem}")
    return None, passed


def verify_checkpoint(path: str) -> str | None:
    """What is wrong with a checkpoint, or None: a manifest, every file there, every checksum right."""
    try:
        manifest = json.loads(storage.read_bytes(os.path.join(path, "manifest.json")))
        for name in FILES:
            if storage.sha256_file(os.path.join(path, name)) != manifest["files"][name]:
                return f"{name} does not match its checksum"
    except OSError as error:
        return str(error)
    except (ValueError, KeyError, TypeError) as error:
        return f"manifest.json is damaged ({type(error).__name__}: {error})"
    return None


def load_checkpoint(path: str) -> Checkpoint:
    """Read a checkpoint that `find_checkpoint` found. Raises CheckpointError when its format is not ours."""
    try:
        state = json.loads(storage.read_bytes(os.path.join(path, "state.json")))
        if state.get("format") != FORMAT:
            raise CheckpointError(f"{path}: format {state.get('format')}, this version reads {FORMAT}")
        manifest = json.loads(storage.read_bytes(os.path.join(path, "manifest.json")))
        return Checkpoint(
            path=path,
            weights=load_file(os.path.join(path, "weights.safetensors")),
            optimizer=load_file(os.path.join(path, "optimizer.safetensors")),
            state=TrainState(**state),
            frozen=manifest["frozen"],
            network=manifest.get("network"),
        )
    except (SafetensorError, TypeError, KeyError, AttributeError, json.JSONDecodeError) as error:
        raise CheckpointError(
            f"{path}: cannot be read: {error}; remove the folder to go on from the one before"
        ) from error


def load_weights(module: nn.Module, checkpoint: Checkpoint) -> None:
    """Put the weights into `module`, strictly. Raises CheckpointError naming what differs."""
    own = module.state_dict()
    missing, surplus = sorted(own.keys() - checkpoint.weights.keys()), sorted(checkpoint.weights.keys() - own.keys())
    shapes = sorted(k for k in own.keys() & checkpoint.weights.keys() if own[k].shape != checkpoint.weights[k].shape)
    if missing or surplus or shapes:
        raise CheckpointError(
            f"{checkpoint.path}: is of another network: {len(missing)} tensors missing, {len(surplus)} unknown, "
            f"{len(shapes)} of another shape (first: {(missing + surplus + shapes)[0]}); check task.kind, model.preset"
        )
    module.load_state_dict(dict(checkpoint.weights), strict=True)


def fingerprint(weights: Mapping[str, Tensor]) -> str:
    """sha256 over names, shapes, types and bytes of all tensors, frozen ones included."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _step(name: str) -> int:
    return int(name.removeprefix("step_"))


def _clean(root: str) -> None:
    """Remove what a killed process left half-written. A run's folder has one writer."""
    for name in os.listdir(root) if os.path.isdir(root) else ():
        if name.endswith(_PARTIAL):
            shutil.rmtree(os.path.join(root, name), ignore_errors=True)


def _sync(path: str) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
