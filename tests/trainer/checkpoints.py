"""Checkpoints written at once, without an engine: what the ranks of a run would have left."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from trainer.checkpoint import (
    EMA,
    WEIGHTS,
    About,
    TrainState,
    commit,
    fingerprint,
    part_name,
    partial_folder,
    prune,
    write_moments,
    write_tensors,
)


def save_checkpoint(
    root: str | Path,
    state: TrainState,
    weights: Mapping[str, Tensor],
    moments: Mapping[str, Tensor],
    *,
    keep: int = 5,
    keep_best: int = 0,
    ranks: int = 2,
    ema: Mapping[str, Tensor] | None = None,
    **about: Any,
) -> str:
    """A whole checkpoint, its moments cut into stretches of `ranks` ranks; returns its folder."""
    folder = partial_folder(str(root), state.step)
    files = {WEIGHTS: write_tensors(folder, WEIGHTS, weights)}
    if ema:
        files[EMA] = write_tensors(folder, EMA, ema)
    for rank in range(ranks):
        parts, places = {}, {}
        for name, moment in moments.items():
            flat = moment.reshape(-1)
            start, stop = (len(flat) * r // ranks for r in (rank, rank + 1))
            if start < stop:
                parts[name], places[name] = flat[start:stop].clone(), (start, moment.shape)
        name = part_name(rank, ranks)
        files[name] = write_moments(folder, name, parts, places)
    path = commit(str(root), state, files, fingerprint(weights), About(**about))
    prune(str(root), state.step, keep=keep, keep_best=keep_best, metric="abs_rel")
    return path
