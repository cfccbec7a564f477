"""The order of samples as a pure function of (seed, samples consumed); the state is one counter per role.

A pass: the shards permuted by (seed, epoch), their samples concatenated, shuffled within fixed windows, and cut by
index into L contiguous lanes whose sizes differ by at most one. Every global batch takes batch / L samples of every
lane, so its content does not depend on how many ranks, threads or restarts there were. Rank r of R <= L serves the
lanes l with l mod R = r. Only the last batch of a pass is partial. Nothing of the size of the dataset is ever built:
one window's permutation at a time.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from dataio.draws import raw_words
from dataio.spec import DataError, DataSpec

T = TypeVar("T")

PLAN_VERSION = 1  # raise it when the order changes: a checkpoint of another version is then refused


@dataclass(frozen=True, slots=True)
class Slot:
    """One sample's place: pass, shard (counted over the role's datasets), index in the shard, position in the pass."""

    epoch: int
    shard: int
    index: int
    position: int


class RolePlan:
    """The order of one role's samples.

    `shard_sizes` are samples per shard, in the datasets' order; `batch` is the role's part of every global batch;
    `first_shard` is the number of the first shard, where other plans of the role have shards before it.
    Raises DataError when the lanes do not divide the batch or there is no sample.
    """

    def __init__(
        self,
        role: str,
        shard_sizes: Sequence[int],
        *,
        batch: int,
        lanes: int,
        window: int,
        seed: int,
        first_shard: int = 0,
    ) -> None:
        check_lanes(role, batch, lanes)
        if window < 1:
            raise DataError(f"shuffle_window is {window}: it must be at least 1")
        self.role, self.batch, self.lanes, self.window, self.seed = role, batch, lanes, window, seed
        self.share, self._first_shard = batch // lanes, first_shard
        self._sizes = np.asarray(shard_sizes, dtype=np.int64)
        if self._sizes.size and self._sizes.min() < 0:
            raise ValueError("a shard cannot have a negative number of samples")
        self.samples = int(self._sizes.sum())
        if not self.samples:
            raise DataError(f"role {role!r} has no samples: its datasets are empty")
        self._batches = pass_batches(self.samples, batch, lanes)
        self._passes: Recent[tuple[NDArray[np.int64], NDArray[np.int64]]] = Recent(2)  # lanes leave a pass together
        self._windows: Recent[NDArray[np.int64]] = Recent(lanes + 2)  # each lane is in a window of its own

    def epoch(self, consumed: int) -> int:
        """The pass, from 0, that the next batch belongs to."""
        return consumed // self.samples

    def lane_span(self, lane: int) -> tuple[int, int]:
        """The positions [start, stop) of a pass that lane `lane` serves."""
        return lane * self.samples // self.lanes, (lane + 1) * self.samples // self.lanes

    def slots(self, consumed: int, lane: int) -> list[Slot | None]:
        """The lane's batch / L slots of the global batch that follows `consumed` samples; None where a pass ends."""
        start, stop = self.lane_span(lane)
        first = start + self._offset(consumed)
        found = self.order(self.epoch(consumed), first, min(first + self.share, stop)) if first < stop else []
        return [*found, *[None] * (self.share - len(found))]

    def drawn(self, consumed: int, lane: int) -> list[tuple[int, Slot | None]]:
        """The slots, each with the number of the plan it is from: as in `dataio.mix.MixedPlan`."""
        return [(0, slot) for slot in self.slots(consumed, lane)]

    @property
    def shards(self) -> int:
        """How many."""
        return len(self._sizes)

    def advance(self, consumed: int) -> int:
        """The counter after one more global batch."""
        offset = self._offset(consumed)
        spans = (self.lane_span(lane) for lane in range(self.lanes))
        return consumed + sum(max(0, min(self.share, stop - start - offset)) for start, stop in spans)

    def number(self, consumed: int) -> int:
        """How many global batches lie before the counter."""
        return self.epoch(consumed) * self._batches + self._offset(consumed) // self.share

    def after(self, number: int) -> int:
        """The counter behind the first `number` global batches."""
        epoch, batches = divmod(number, self._batches)
        return epoch * self.samples + batches * self.batch

    def ends_pass(self, consumed: int) -> bool:
        """Whether a pass over all samples ends at the counter."""
        return consumed % self.samples == 0

    def order(self, epoch: int, start: int, stop: int) -> list[Slot]:
        """The slots of positions [start, stop) of a pass, in order."""
        slots: list[Slot] = []
        shards, ends = self._pass(epoch)
        while start < stop:
            window = start // self.window
            shuffled = self._shuffled(epoch, window)
            until = min(stop, (window + 1) * self.window)
            for position in range(start, until):
                place = int(shuffled[position - window * self.window])
                which = bisect_right(ends, place)
                before = int(ends[which - 1]) if which else 0
                slots.append(Slot(epoch, self._first_shard + int(shards[which]), place - before, position))
            start = until
        return slots

    def _offset(self, consumed: int) -> int:
        """How many samples every lane has served in this pass."""
        within = consumed % self.samples
        if consumed < 0 or within % self.lanes:
            raise DataError(
                f"role {self.role!r}: {consumed} samples consumed is no state of a plan with {self.lanes} lanes over "
                f"{self.samples} samples: restore it with the lanes and datasets that it was saved with"
            )
        return within // self.lanes

    def _pass(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The permuted shards of a pass and, for each, the place behind its last sample."""

        def make() -> tuple[NDArray[np.int64], NDArray[np.int64]]:
            shards = self._permutation(len(self._sizes), epoch, "shards")
            return shards, np.cumsum(self._sizes[shards])

        return self._passes.get(epoch, make)

    def _shuffled(self, epoch: int, window: int) -> NDArray[np.int64]:
        """Places in the concatenated shards, one per position of the window."""

        def make() -> NDArray[np.int64]:
            start = window * self.window
            return start + self._permutation(min(self.window, self.samples - start), epoch, window)

        return self._windows.get((epoch, window), make)

    def _permutation(self, count: int, epoch: int, what: int | str) -> NDArray[np.int64]:
        words = raw_words(count, "order", PLAN_VERSION, self.seed, self.role, epoch, what)
        return np.argsort(words, kind="stable")


def pass_batches(samples: int, batch: int, lanes: int) -> int:
    """How many global batches show every sample once, the last and partial one included."""
    longest_lane = -(-samples // lanes)
    return -(-longest_lane // (batch // lanes))


def check_lanes(role: str, batch: int, lanes: int, per_lane: int = 1) -> None:
    """DataError, naming the lane counts that would do, unless `lanes` divides `batch` into >= `per_lane` samples."""
    if batch < 1:
        raise DataError(f"role {role!r}: batch is {batch}: it must be at least 1")
    allowed = [count for count in range(1, batch + 1) if batch % count == 0 and batch // count >= per_lane]
    if lanes in allowed:
        return
    if not allowed:
        raise DataError(f"role {role!r}: batch is {batch}: CutMix needs at least {per_lane} samples per lane")
    why = "lanes must divide batch" if lanes < 1 or batch % lanes else "CutMix needs at least 2 samples per lane"
    raise DataError(
        f"role {role!r}: lanes is {lanes} and batch {batch}: {why}; lanes may be {', '.join(map(str, allowed))}"
    )


def lanes_of(role: str, lanes: int, rank: int, world_size: int) -> range:
    """The lanes that rank `rank` serves. DataError when there are more ranks than lanes."""
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} of {world_size}")
    if world_size > lanes:
        raise DataError(
            f"role {role!r}: lanes is {lanes} but there are {world_size} ranks: "
            f"set data.roles.{role}.lanes to at least {world_size}, or run fewer ranks"
        )
    return range(rank, lanes, world_size)


def skipped_batches(data: DataSpec) -> list[tuple[int, int]]:
    """The stretches to pass over, in whole global batches that hold them. DataError for a stretch that is none."""
    size = sum(role.batch for role in data.roles.values())
    for start, stop in data.skip_samples:
        if not 0 <= start < stop:
            raise DataError(f"data.skip_samples: {start}:{stop} is no stretch of samples: FROM must be below TO")
    return sorted((start // size, -(-stop // size)) for start, stop in data.skip_samples)


class Recent(Generic[T]):
    """The `size` values used last."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._values: OrderedDict[Hashable, T] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        if key not in self._values:
            self._values[key] = make()
        self._values.move_to_end(key)
        while len(self._values) > self._size:
            self._values.popitem(last=False)
        return self._values[key]
