"""Saving while training goes on: a step waits for one copy to main memory; threads of the ranks write the files.

    all ranks    begin     copy own stretches of the moments (rank 0: the weights too), start the writing
    each rank    (thread)  files into step_NNNNNNNN.partial, synced, with their checksums
    all ranks    settle    at a later step, when every rank has said in the step's own all-reduce that it is done:
                           rank 0 gets the checksums, writes the manifest, renames the folder, removes old ones

A checkpoint that cannot be written (a full disk) is told, counted and dropped; the run goes on, the old ones stand.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cluster import storage
from cluster.exchange import first_rank_s, gathered
from trainer.checkpoint import (
    EMA,
    WEIGHTS,
    About,
    TrainState,
    checkpoint_bytes,
    commit,
    fingerprint,
    part_name,
    partial_folder,
    prune,
    write_moments,
    write_tensors,
)
from trainer.ema import Ema
from trainer.engine import Engine

Files = dict[str, str]  # sha256 by file name


@dataclass(frozen=True, kw_only=True)
class Keep:
    """Which checkpoints stay."""

    newest: int
    best: int = 0
    metric: str | None = None  # what the best is the best by
    lower_is_better: bool = True


@dataclass(frozen=True, kw_only=True)
class Saved:
    """How a save ended; `error` is None when the checkpoint is whole. `stall_s`: what the training waited for it."""

    step: int
    stall_s: float
    seconds: float
    error: str | None = None


@dataclass(kw_only=True)
class _Pending:
    state: TrainState
    about: About
    writing: Future[Files]
    began: float
    stall_s: float
    prune: bool
    announced: bool = False  # whether the ranks' last sum was of this save


class Saver:
    """One rank's part. `begin`, `settle` and `finish` are called by all ranks at the same step.

    `on_saved` is told the outcome of every save, on every rank.
    """

    def __init__(
        self, root: str, engine: Engine, ema: Ema | None, keep: Keep, on_saved: Callable[[Saved], None]
    ) -> None:
        self._root, self._engine, self._ema, self._keep, self._on_saved = root, engine, ema, keep, on_saved
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="fathom-checkpoint")
        self._buffers: dict[str, Tensor] = {}
        self._pending: _Pending | None = None

    def begin(self, state: TrainState, about: About, *, prune: bool = True) -> None:
        """Copy what the checkpoint needs and start to write it. Waits for an earlier one that is still under way.

        Once it is whole, what `keep` does not hold goes; unless `prune` is False.
        """
        self.finish()
        began = time.perf_counter()
        tensors = self._copies()
        places = {
            f"{moment}/{name}": (self._engine.spans[name].start, self._engine.shape_of(name))
            for moment, name in (key.split("/", 1) for key in tensors["moments"])
        }
        stall_s = time.perf_counter() - began
        writing = self._thread.submit(self._write, state.step, tensors, places)
        self._pending = _Pending(state=state, about=about, writing=writing, began=began, stall_s=stall_s, prune=prune)

    @property
    def busy(self) -> bool:
        """Whether a save is under way; the same on all ranks."""
        return self._pending is not None

    def flags(self) -> tuple[float, float]:
        """(written, failed) of a save under way on this rank, for the step's all-reduce."""
        if self._pending is None:
            return 0.0, 0.0
        self._pending.announced = True
        if not self._pending.writing.done():
            return 0.0, 0.0
        failed = self._pending.writing.exception() is not None
        return float(not failed), float(failed)

    def settle(self, written: int, failed: int) -> None:
        """Complete the save under way once the ranks' sum of `flags` says that all are done."""
        # what the ranks last summed may still be of the save before
        if self._pending is not None and self._pending.announced and written + failed == self._world_size:
            self.finish()

    def finish(self) -> None:
        """Wait for the save under way and complete it. A collective; nothing when there is none."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        began = time.perf_counter()
        error, files = self._outcomes(pending.writing)
        if self._rank == 0:
            error = self._complete(pending, files) if error is None else self._abandon(pending.state.step, error)
        error = first_rank_s(error)
        ended = time.perf_counter()
        stall_s = pending.stall_s + ended - began
        self._on_saved(Saved(step=pending.state.step, stall_s=stall_s, seconds=ended - pending.began, error=error))

    def close(self) -> None:
        """End the thread, after what it is writing."""
        self._thread.shutdown(wait=True)
        self._buffers.clear()

    def _copies(self) -> dict[str, dict[str, Tensor]]:
        """One copy of everything this rank writes, in memory that the next save uses again."""
        weights = self._engine.whole_weights()
        ema = self._ema.whole() if self._ema else {}
        first = self._rank == 0
        named = {
            "weights": weights if first else {},
            "ema": {name: ema.get(name, weights[name]) for name in weights} if first and ema else {},
            "moments": self._engine.moment_parts(),
        }
        copied = {
            kind: {name: self._copy(f"{kind}/{name}", tensor) for name, tensor in tensors.items()}
            for kind, tensors in named.items()
        }
        if self._engine.device.type == "cuda":
            torch.cuda.current_stream().synchronize()
        return copied

    def _copy(self, key: str, tensor: Tensor) -> Tensor:
        tensor, buffer = tensor.detach(), self._buffers.get(key)
        if buffer is None or buffer.shape != tensor.shape:
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._buffers[key] = buffer
        buffer.copy_(tensor, non_blocking=True)
        return buffer

    def _write(
        self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], places: Mapping[str, tuple[int, Any]]
    ) -> Files:
        folder = partial_folder(self._root, step)
        files: Files = {}
        if self._rank == 0:
            files[WEIGHTS] = write_tensors(folder, WEIGHTS, tensors["weights"])
            files["fingerprint"] = fingerprint(tensors["weights"])
            if tensors["ema"]:
                files[EMA] = write_tensors(folder, EMA, tensors["ema"])
        name = part_name(self._rank, self._world_size)
        files[name] = write_moments(folder, name, tensors["moments"], places)
        return files

    def _outcomes(self, writing: Future[Files]) -> tuple[str | None, Files]:
        """The first error of any rank, and all ranks' files."""
        try:
            mine: tuple[str | None, Files] = (None, writing.result())
        except (storage.StorageError, MemoryError) as error:
            mine = (str(error) or type(error).__name__, {})
        outcomes = gathered(mine)
        files = {name: digest for _, written in outcomes for name, digest in written.items()}
        return next((error for error, _ in outcomes if error is not None), None), files

    def _complete(self, pending: _Pending, files: Files) -> str | None:
        try:
            commit(self._root, pending.state, files, files.pop("fingerprint"), pending.about)
        except storage.StorageError as error:
            return self._abandon(pending.state.step, str(error))
        if not pending.prune:
            return None
        keep = self._keep
        self._thread.submit(  # before the next one is written; removing gigabytes takes a while
            prune, self._root, pending.state.step,
            keep=keep.newest, keep_best=keep.best, metric=keep.metric, lower_is_better=keep.lower_is_better,
        )  # fmt: skip
        return None

    def _abandon(self, step: int, error: str) -> str:
        shutil.rmtree(partial_folder(self._root, step), ignore_errors=True)
        return error


def require_space(root: str, engine: Engine, keep: Keep, existing: int, averaged: bool = False) -> None:
    """Refuse before the first step what the disk cannot hold: the checkpoints that stay and the next one.

    `averaged`: each holds a moving average too. Raises StorageError naming what is needed and what is free.
    """
    trained = sum(shape.numel() for shape in map(engine.shape_of, engine.trained))
    weights = sum(engine.shape_of(name).numel() for name in dict(engine.module.named_parameters()))
    missing = keep.newest + keep.best + 1 - existing
    os.makedirs(root, exist_ok=True)
    each = checkpoint_bytes(weights, trained, averaged=averaged)
    storage.require_free(root, max(1, missing) * each, f"a run that keeps {keep.newest + keep.best} checkpoints")
