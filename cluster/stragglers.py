"""Ranks that are slower than the others by themselves: a hot or shared GPU, a bad disk. Pure: told, and asked.

Ranks run in step, so all take as long as the slowest; what tells them apart is the time that a rank spends on its own
work for a sample, where nobody holds it up: some ranks have more samples than others, and are not to blame. Compared
with the median rank's, which a few slow ones do not move; the faster one of two in the middle.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

FACTOR = 1.5  # times the median
PATIENCE_S = 60.0  # a collector, a checkpoint, a neighbour may hold a rank up for a while
_WEIGHT = 0.3  # of the newest word in a rank's average


def slowdowns(seconds: Mapping[int, float]) -> dict[int, float]:
    """Each rank's time over the median rank's."""
    ordered = sorted(seconds.values())
    if not ordered:
        return {}
    median = ordered[(len(ordered) - 1) // 2]
    return {rank: value / median if median > 0 else 1.0 for rank, value in seconds.items()}


@dataclass(kw_only=True)
class Stragglers:
    """One group's. A rank is named when it has been `factor` times as slow as the median for `patience_s` seconds."""

    factor: float = FACTOR
    patience_s: float = PATIENCE_S
    _average: dict[int, float] = field(default_factory=dict)
    _since: dict[int, float] = field(default_factory=dict)  # when it became slow
    _ratios: dict[int, float] = field(default_factory=dict)  # of the last look: 1000 ranks ask for theirs

    def hear(self, rank: int, own_s: float) -> None:
        """A rank's own work for a sample took it so long, on average since its last word."""
        before = self._average.get(rank)
        self._average[rank] = own_s if before is None else before + _WEIGHT * (own_s - before)

    def slowdown(self, rank: int) -> float | None:
        """The rank's time over the median's at the last look; None until it has said something, or is alone."""
        return self._ratios.get(rank)

    def named(self, now: float) -> dict[int, float]:
        """The slow ranks and how slow they are, the same ones for as long as they are. To be asked again and again."""
        self._ratios = slowdowns(self._average) if len(self._average) > 1 else {}
        slow = {rank: ratio for rank, ratio in self._ratios.items() if ratio >= self.factor}
        self._since = {rank: self._since.get(rank, now) for rank in slow}
        return {rank: ratio for rank, ratio in slow.items() if now - self._since[rank] >= self.patience_s}
