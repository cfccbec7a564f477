"""Several datasets in one role at stated weights: which of them gives the next sample of a lane, by a seeded draw.

A lane's rows are drawn in blocks of BLOCK. Every block holds each dataset the same number of times, its share of BLOCK
rounded to a whole number, in an order drawn from (seed, role, lane, block). So how often a dataset was drawn before any
row is known without going through the rows before it, and the shares are exact over every block. Each dataset has a
plan of its own (`dataio.plan.RolePlan`) and is gone through at its own pace: in the n-th pass over it every sample is
shown once.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dataio.draws import raw_words
from dataio.plan import PLAN_VERSION, Recent, RolePlan, Slot
from dataio.spec import DataError

BLOCK = 4096  # rows; a share is off by at most 1 / 8192


class MixedPlan:
    """The order of one role's samples, drawn from several datasets. The interface is that of `RolePlan`.

    `parts` are the plans of the datasets, with the same role, batch, lanes and seed. There is no pass over all of them:
    `consumed` counts slots and rises by the batch each time. DataError for weights that cannot be.
    """

    def __init__(self, parts: Sequence[RolePlan], weights: Sequence[float]) -> None:
        first = parts[0]
        self.role, self.batch, self.lanes, self.share = first.role, first.batch, first.lanes, first.share
        self.seed, self.parts = first.seed, list(parts)
        self.quotas = quotas(first.role, weights, len(parts))
        for number, part in enumerate(parts):
            if part.samples < part.lanes:
                raise DataError(
                    f"role {self.role!r}: dataset {number} has {part.samples} samples, fewer than the {part.lanes} "
                    f"lanes: set lanes to at most {part.samples}, or leave out the weights"
                )
        # Rows of a lane in one pass; where a lane is a sample short its last slot stays empty.
        self._rows = [-(-part.samples // part.lanes) for part in parts]
        self._drawn: Recent[NDArray[np.int64]] = Recent(2 * self.lanes)

    def draws(self, row: int, lane: int) -> tuple[int, int]:
        """(which dataset the lane's row is from, how many rows of it the lane had before)."""
        block, place = divmod(row, BLOCK)
        order = self._order(block, lane)
        part = int(order[place])
        return part, block * self.quotas[part] + int(np.count_nonzero(order[:place] == part))

    def drawn(self, consumed: int, lane: int) -> list[tuple[int, Slot | None]]:
        """The lane's slots of the global batch that follows `consumed` slots, each with the number of its dataset."""
        first = self._row(consumed)
        found: list[tuple[int, Slot | None]] = []
        for row in range(first, first + self.share):
            part, before = self.draws(row, lane)
            epoch, offset = divmod(before, self._rows[part])
            plan = self.parts[part]
            start, stop = plan.lane_span(lane)
            here = start + offset
            found.append((part, plan.order(epoch, here, here + 1)[0] if here < stop else None))
        return found

    @property
    def samples(self) -> int:
        """Of all datasets together."""
        return sum(part.samples for part in self.parts)

    def advance(self, consumed: int) -> int:
        """The counter after one more global batch."""
        return self._row(consumed) * self.lanes + self.batch

    def number(self, consumed: int) -> int:
        """How many global batches lie before the counter."""
        return consumed // self.batch

    def after(self, number: int) -> int:
        """The counter behind the first `number` global batches."""
        return number * self.batch

    def ends_pass(self, consumed: int) -> bool:
        """Never: every dataset has passes of its own."""
        return False

    def _row(self, consumed: int) -> int:
        if consumed < 0 or consumed % self.lanes:
            raise DataError(
                f"role {self.role!r}: {consumed} samples consumed is no state of a plan with {self.lanes} lanes: "
                "restore it with the lanes that it was saved with"
            )
        return consumed // self.lanes

    def _order(self, block: int, lane: int) -> NDArray[np.int64]:
        def make() -> NDArray[np.int64]:
            words = raw_words(BLOCK, "mix", PLAN_VERSION, self.seed, self.role, lane, block)
            return np.repeat(np.arange(len(self.quotas)), self.quotas)[np.argsort(words, kind="stable")]

        return self._drawn.get((block, lane), make)


def quotas(role: str, weights: Sequence[float], count: int) -> list[int]:
    """Rows of each dataset in a block: BLOCK shared out by weights, the largest remainders rounded up."""
    if len(weights) != count:
        raise DataError(f"role {role!r}: {len(weights)} weights for {count} datasets: give one each, or none")
    if not all(0 < weight < float("inf") for weight in weights):
        raise DataError(f"role {role!r}: weights are {list(weights)}: numbers above 0 are needed")
    exact = [weight / sum(weights) * BLOCK for weight in weights]
    found = [int(x) for x in exact]
    by_remainder = sorted(range(count), key=lambda i: (found[i] - exact[i], i))
    for i in by_remainder[: BLOCK - sum(found)]:
        found[i] += 1
    for number, quota in enumerate(found):
        if not quota:
            raise DataError(
                f"role {role!r}: weight {weights[number]} of dataset {number} is below 1/{BLOCK} of their sum: "
                "raise it, or leave the dataset out"
            )
    return found
