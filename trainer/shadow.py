"""The network as it would be exported: averaged where the run averages, whole where ZeRO has cut it."""

from __future__ import annotations

import copy

from torch import nn

from trainer.ema import Ema
from trainer.engine import Engine


class Shadow:
    """Gives a plain module for validation and export.

    Without an average and below stage 3 that is the engine's own; otherwise a copy, on the CPU until it is needed,
    whose weights are brought up to date when asked for.

    Args:
        module: the network before the engine took it.
        copied: whether a copy is needed: a moving average, or ZeRO stage 3.
    """

    def __init__(self, module: nn.Module, copied: bool) -> None:
        self._copy = copy.deepcopy(module).eval().requires_grad_(False) if copied else None

    def current(self, engine: Engine, ema: Ema | None, *, everywhere: bool) -> nn.Module | None:
        """The network with today's weights, in evaluation mode, on rank 0 or everywhere; None elsewhere. A collective.

        It may be the engine's own module: put it back into training mode.
        """
        if self._copy is None:
            return engine.module.eval()
        weights = engine.whole_weights(everywhere=everywhere)
        weights |= ema.whole(everywhere=everywhere) if ema else {}
        if not (everywhere or engine.rank == 0):
            return None
        self._copy.load_state_dict(weights, strict=True)
        return self._copy.to(engine.device)

    def put_away(self) -> None:
        """Take the copy off the device again."""
        if self._copy is not None:
            self._copy.cpu()
