"""When training goes astray: a row of steps without a finite gradient, or a loss that leaves its course. No torch here.

What PaLM did by hand (arXiv 2204.02311, 5.1) is a reaction to choose: go back to a checkpoint from before it began, and
pass over the batches around it. The order of samples is a function of their number, so that is exact.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Literal

from trainer.config_train import RecoverySection

MAD_TO_SIGMA = 1.4826  # of a normal distribution
LEAST_SPREAD = 0.02  # of the median: a loss that hardly moves is no reason to call a small step a spike
SHOWN = 20  # losses kept as evidence

What = Literal["non_finite", "spike"]


class TrainingDiverged(RuntimeError):
    """Training went astray at `first_step` or soon after, and it was noticed after `step`. `skip`: samples of the run's
    order, the stretch to pass over when it is tried again. `losses`: the last ones, by step."""

    exit_status = 1
    hopeless = True  # tried again in the same way, it would end in the same way
    what: What = "non_finite"
    first_step: int = 0
    step: int = 0
    skip: tuple[int, int] = (0, 0)
    losses: Mapping[int, float] = {}

    def about(
        self, what: What, first_step: int, step: int, skip: tuple[int, int], losses: Mapping[int, float]
    ) -> TrainingDiverged:
        """The error itself, with what the driver needs. (Constructor arguments would not survive the way to it.)"""
        self.what, self.first_step, self.step, self.skip, self.losses = what, first_step, step, skip, dict(losses)
        return self


@dataclass(kw_only=True)
class SpikeDetector:
    """Sees every step's loss; a spike is `steps` losses in a row far above the `window` before them.

    Far: above median + factor * sigma, sigma from the median absolute deviation, which a spike itself hardly moves.
    Deterministic: ranks that see the same losses decide alike. Quiet until a quarter of the window has been seen.
    """

    factor: float
    steps: int
    window: int
    high: list[tuple[int, float]] = field(default_factory=list)  # the row of high ones so far
    _before: deque[float] = field(default_factory=deque)
    _last: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=SHOWN))

    def see(self, step: int, loss: float) -> bool:
        """The loss of a step, in their order; whether it makes a spike, whose first step is `first`."""
        if not math.isfinite(loss):  # such a step is not applied, and is counted elsewhere
            return False
        self._last.append((step, loss))
        limit = self.limit()
        if limit is not None and loss > limit:
            self.high.append((step, loss))
            return len(self.high) >= self.steps
        for value in (*(value for _, value in self.high), loss):  # a few high ones were noise, and belong to it
            self._before.append(value)
        self.high.clear()
        while len(self._before) > self.window:
            self._before.popleft()
        return False

    def limit(self) -> float | None:
        """What counts as high now; None while too little is known."""
        if len(self._before) < max(4, self.window // 4):
            return None
        middle = median(self._before)
        spread = MAD_TO_SIGMA * median(abs(value - middle) for value in self._before)
        return middle + self.factor * max(spread, LEAST_SPREAD * abs(middle))

    @classmethod
    def of(cls, recovery: RecoverySection, seen: Mapping[str, Any] | None = None) -> SpikeDetector | None:
        """As configured; None where spikes are ignored. `seen`: the `record` of the one that a checkpoint was made
        with, so that a resume within a spike does not take it for the course."""
        if recovery.on_spike == "ignore":
            return None
        made = cls(factor=recovery.spike_factor, steps=recovery.spike_steps, window=recovery.spike_window)
        if seen:
            made._before.extend(seen["before"][-made.window :])
            made.high.extend((int(step), float(loss)) for step, loss in seen["high"])
        return made

    def record(self) -> dict[str, Any]:
        """What it has seen, for a checkpoint."""
        return {"before": [*self._before], "high": [list(one) for one in self.high]}

    @property
    def first(self) -> int:
        """The first step of the row of high ones."""
        return self.high[0][0]

    @property
    def losses(self) -> dict[int, float]:
        """The last ones, by step."""
        return dict(self._last)
