"""What must hold before and after every step; behind `--debug`, since it reads every weight twice a step.

A broken one ends the run and names all that are broken: it is a fault of fathom, of DeepSpeed or of the machine, never
of the configuration.

Shape suffixes: B batch, H W pixels.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from cluster.exchange import gathered
from dataio.types import Batch
from trainer.ema import Ema
from trainer.engine import Engine
from trainer.loop import StepRecord
from trainer.optim import rate_name


class InvariantBroken(RuntimeError):
    """Something that must hold around a step does not; says what, and at which step."""

    exit_status = 1


class Invariants:
    """Checks of one rank; all ranks call both methods at every step, which hold collectives."""

    def __init__(self, engine: Engine, ema: Ema | None) -> None:
        self._engine, self._ema = engine, ema
        self._frozen = self._frozen_sums()
        self._before: dict[str, int] = {}
        self._applied = engine.applied_steps
        self._step = 0

    def before_step(self, batch: Batch) -> None:
        """Raises InvariantBroken on every rank when any rank finds something."""
        self._before = self._sums()
        self._applied = self._engine.applied_steps
        self._report([*self._of_weights(), *self._of_gradients(), *of_batch(batch)], "before")

    def after_step(self, record: StepRecord) -> None:
        """Raises InvariantBroken on every rank when any rank finds something."""
        self._step = record.step
        self._report([*self._of_weights(), *self._of_gradients(), *self._of_update(record)], "after")

    def _of_weights(self) -> Iterator[str]:
        engine = self._engine
        for name in engine.trained:
            if not bool(engine.weight_part(name).isfinite().all()):
                yield f"{name} is not finite"
        if self._frozen_sums() != self._frozen:
            yield "a frozen tensor has changed"
        if engine.stage < 3 and dist.get_world_size() > 1:
            whole = [checksum(tensor) for tensor in engine.module.state_dict().values()]
            least, most = (torch.tensor(whole, dtype=torch.int64, device=engine.device) for _ in range(2))
            dist.all_reduce(least, dist.ReduceOp.MIN)
            dist.all_reduce(most, dist.ReduceOp.MAX)
            if not torch.equal(least, most):
                yield "the ranks' weights differ"
        if self._ema and not all(bool(part.isfinite().all()) for part in self._ema.parts.values()):
            yield "the moving average is not finite"

    def _of_gradients(self) -> Iterator[str]:
        for name, parameter in self._engine.module.named_parameters():
            if parameter.grad is not None and (not parameter.grad.numel() or bool(parameter.grad.any())):
                yield f"{name} has a gradient between steps"
                return

    def _of_update(self, record: StepRecord) -> Iterator[str]:
        engine = self._engine
        changed = self._sums() != self._before
        moves = record.result.grad_norm > 0 and all(rate > 0 for rate in record.learning_rates.values())
        if record.result.skipped and changed:
            yield "a skipped step has changed weights"
        if moves and not record.result.skipped and self._before and not changed:
            yield "an update has changed no weight"
        if engine.applied_steps != self._applied + (not record.result.skipped):
            yield f"applied_steps went from {self._applied} to {engine.applied_steps}"
        if engine.applied_steps and engine.optimizer_steps() != {engine.applied_steps}:
            yield f"the optimizer counts {engine.optimizer_steps()} updates, the engine {engine.applied_steps}"
        for entry in engine.param_groups:
            if entry["lr"] != record.learning_rates[rate_name(entry["name"])]:
                yield f"group {entry['name']} has learning rate {entry['lr']}"

    def _sums(self) -> dict[str, int]:
        parts = {name: self._engine.weight_part(name) for name in self._engine.trained}
        return {name: checksum(part) for name, part in parts.items() if part.numel()}

    def _frozen_sums(self) -> dict[str, int]:
        trained = self._engine.trained
        if self._engine.stage == 3:
            return {n: checksum(self._engine.weight_part(n)) for n in self._engine.spans if n not in trained}
        return {n: checksum(t) for n, t in self._engine.module.state_dict().items() if n not in trained}

    def _report(self, found: list[str], when: str) -> None:
        told = [f"rank {rank}: {'; '.join(lines[:5])}" for rank, lines in enumerate(gathered(found)) if lines]
        if told:
            raise InvariantBroken(f"{when} the step after {self._step}, --debug found: {' | '.join(told)}")


def of_batch(batch: Batch) -> Iterator[str]:
    """What is wrong with a batch, as text."""
    for name, view_BCHW in batch.views.items():
        if not bool(view_BCHW.isfinite().all()):
            yield f"view {name!r} is not finite"
    valid_BHW = batch.region_BHW > 0
    for name, target in batch.targets.items():
        if not bool(target.value_BHW[valid_BHW].isfinite().all()):
            yield f"target {name!r} is not finite at valid pixels"
    if not torch.equal(batch.weight_B > 0, valid_BHW.flatten(1).any(1)):
        yield "weights and valid pixels contradict each other"
    if sum(count for _, count in batch.roles) != len(batch):
        yield "the roles' rows are not the batch's"


def checksum(tensor: Tensor) -> int:
    """CRC-32 of a tensor's bytes."""
    return zlib.crc32(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
