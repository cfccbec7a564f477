"""A moving average of the weights, outside the engine: every rank averages the stretches that it answers for.

    average = d * average + (1 - d) * weights,  d = min(decay, (1 + n) / (10 + n)) after n updates

so the first steps do not remember the initial weights for thousands of steps (the warm-up of TensorFlow's
`ExponentialMovingAverage`). Under ZeRO this costs 1/ranks of a copy and no communication; it is made whole for a
checkpoint, a validation or the export only.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from trainer.engine import Engine


class Ema:
    """The average of an engine's trainable weights; starts as a copy of them."""

    def __init__(self, engine: Engine, decay: float) -> None:
        self._engine, self._decay = engine, decay
        self.parts = {name: engine.weight_part(name).clone() for name in engine.trained}

    @torch.no_grad()
    def update(self) -> None:
        """Follow the weights after an applied update."""
        n = self._engine.applied_steps
        decay = min(self._decay, (1 + n) / (10 + n))
        for name, part in self.parts.items():
            part.lerp_(self._engine.weight_part(name), 1 - decay)

    def whole(self, *, everywhere: bool = False) -> dict[str, Tensor]:
        """The average of every trainable parameter, whole, on rank 0 or everywhere. A collective."""
        return self._engine.whole(self.parts, everywhere=everywhere)

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Go on from whole tensors by name. Raises KeyError for a missing parameter."""
        for name, part in self.parts.items():
            span = self._engine.spans[name]
            part.copy_(weights[name].reshape(-1)[span.start : span.stop])
