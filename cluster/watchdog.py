"""Finds a group that no longer moves, and the rank at fault. Pure: it is told what came when, and asked.

Every rank says again and again where it is: the step, the phase of it, how many phases it has gone through. Two things
can go wrong. A rank falls silent: its process is frozen, or its machine cannot be reached. Or it speaks, and does not
move: it waits, as a rule for others in a collective. Ranks run in step, so the ones furthest behind are those that the
others wait for, and only their time counts.

How long a phase may take is learned from how long it took, so that one rule serves a tiny network and a giant; before
anything is known there is a generous limit. Times are the observer's own, so clocks of machines may differ.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

SILENCE_S = 30.0  # between two words of a rank
FACTOR = 10.0  # times the longest seen so far
SHORTEST_S = 60.0  # whatever was seen: a collector, a cold disk, a neighbour may hold anything up for a while
UNKNOWN_S: Mapping[str, float] = {"start": 900.0, "checkpoint": 1800.0, "validation": 3600.0, "export": 1800.0}
OTHER_UNKNOWN_S = 600.0
FORGET = 0.98  # of the longest, at each new one: what was slow once is not slow for ever


@dataclass(frozen=True, kw_only=True)
class Beat:
    """Where a rank is: it has gone through `count` phases, and is in `phase` of step `step`."""

    step: int
    phase: str
    count: int


@dataclass(frozen=True, kw_only=True)
class Stuck:
    """A group that does not move. `ranks` are those at fault, as far as can be told."""

    ranks: tuple[int, ...]
    silent: bool
    step: int
    phase: str
    waited_s: float
    limit_s: float

    def __str__(self) -> str:
        who = f"rank {', '.join(map(str, self.ranks[:8]))}{' ...' if len(self.ranks) > 8 else ''}"
        what = "has not been heard of" if self.silent else f"has been in the phase {self.phase!r} of step {self.step}"
        return f"{who} {what} for {self.waited_s:.0f} s; the limit is {self.limit_s:.0f} s"


@dataclass
class _Rank:
    beat: Beat
    moved: float  # when the beat was a new one
    heard: float


@dataclass(kw_only=True)
class Watchdog:
    """One group's. `silence_s`, `factor` and `shortest_s` may be set smaller for tests and larger for odd machines."""

    silence_s: float = SILENCE_S
    factor: float = FACTOR
    shortest_s: float = SHORTEST_S
    longest_s: dict[str, float] = field(default_factory=dict)  # by phase; worth keeping from one attempt to the next
    _ranks: dict[int, _Rank] = field(default_factory=dict)
    _asked: float | None = None

    def hear(self, rank: int, beat: Beat, now: float, took_s: Mapping[str, float] | None = None) -> None:
        """A rank's word arrived.

        `took_s`: the longest that it was in each phase since its last word, by its own clock.
        """
        for phase, seconds in (took_s or {}).items():
            self._learn(phase, seconds)
        known = self._ranks.get(rank)
        if known is None:
            self._ranks[rank] = _Rank(beat, now, now)
            return
        known.heard = now
        if beat.count != known.beat.count:
            known.beat, known.moved = beat, now

    def forget(self, rank: int) -> None:
        """The rank has ended its work: it may be as silent as it likes."""
        self._ranks.pop(rank, None)

    def limit_s(self, phase: str) -> float:
        """How long a rank may be in a phase."""
        seen = self.longest_s.get(phase)
        if seen is None:
            return UNKNOWN_S.get(phase, OTHER_UNKNOWN_S)
        return max(self.shortest_s, self.factor * seen)

    def stuck(self, now: float) -> Stuck | None:
        """Whether the group is stuck. To be asked every second or so: a longer pause between two questions means that
        the observer itself stood still, and what it did not hear meanwhile counts against nobody."""
        if self._asked is not None and now - self._asked > self.silence_s / 2:
            self._pardon(now - self._asked)
        self._asked = now
        silent = [rank for rank, known in self._ranks.items() if now - known.heard > self.silence_s]
        if silent:
            longest = min(silent, key=lambda rank: self._ranks[rank].heard)
            return self._found(silent, longest, True, now - self._ranks[longest].heard, self.silence_s)
        behind = self._behind()
        late = [rank for rank in behind if now - self._ranks[rank].moved > self.limit_s(self._ranks[rank].beat.phase)]
        if not late:
            return None
        first = min(late, key=lambda rank: self._ranks[rank].moved)
        limit_s = self.limit_s(self._ranks[first].beat.phase)
        return self._found(behind, first, False, now - self._ranks[first].moved, limit_s)

    def _behind(self) -> list[int]:
        """Those that have gone through fewest phases."""
        least = min((known.beat.count for known in self._ranks.values()), default=0)
        return [rank for rank, known in self._ranks.items() if known.beat.count == least]

    def _found(self, ranks: Iterable[int], about: int, silent: bool, waited_s: float, limit_s: float) -> Stuck:
        beat = self._ranks[about].beat
        return Stuck(
            ranks=tuple(sorted(ranks)),
            silent=silent,
            step=beat.step,
            phase=beat.phase,
            waited_s=waited_s,
            limit_s=limit_s,
        )

    def _learn(self, phase: str, seconds: float) -> None:
        seen = self.longest_s.get(phase)
        self.longest_s[phase] = seconds if seen is None else max(seconds, FORGET * seen)

    def _pardon(self, pause_s: float) -> None:
        for known in self._ranks.values():
            known.heard += pause_s
            known.moved += pause_s
