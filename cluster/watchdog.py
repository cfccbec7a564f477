"""Finds a group that no longer moves, and the rank at fault. Pure: it is told what came when, and asked.

Every rank says again and again where it is: the step, the phase of it, how many phases it has gone through. Two things
can go wrong. A rank falls silent: its process is frozen, or its machine cannot be reached. Or it speaks, and does not
move: it waits, as a rule for others in a collective. Ranks run in step, so the ones furthest behind are those that the
others wait for, and only their time counts.

How long a phase may take is learned from how long it took, so that one rule serves a tiny network and a giant. The
first time that a rank enters a phase there is a generous limit: it compiles, loads, fills caches. Some phases keep it:
they come once, or wait for disks. Times are the observer's own, so clocks of machines may differ.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import dataclass, field

SILENCE_S = 30.0  # between two words of a rank
FACTOR = 10.0  # times the longest seen so far
SHORTEST_S = 60.0  # whatever was seen: a collector, a cold disk, a neighbour may hold anything up for a while
FIRST_S: Mapping[str, float] = {"validation": 3600.0}  # the first time
OTHER_FIRST_S = 600.0
ALWAYS_S: Mapping[str, float] = {"start": 900.0, "saving": 1800.0, "export": 1800.0}  # whatever was seen, and longer
HALF_LIFE_S = 1800.0  # of the longest time seen: what was slow once is not slow for ever


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
    been: set[str] = field(default_factory=set)  # phases that it has gone through


@dataclass(kw_only=True)
class Watchdog:
    """One group's. `silence_s`, `factor` and `shortest_s` may be set smaller for tests and larger for odd machines."""

    silence_s: float = SILENCE_S
    factor: float = FACTOR
    shortest_s: float = SHORTEST_S
    longest_s: MutableMapping[str, float] = field(default_factory=dict)  # by phase; an attempt's are worth the next's
    _at: dict[str, float] = field(default_factory=dict)  # when `longest_s` was so
    _ranks: dict[int, _Rank] = field(default_factory=dict)
    _asked: float | None = None

    def hear(self, rank: int, beat: Beat, now: float, took_s: Mapping[str, float] | None = None) -> None:
        """A rank's word arrived.

        `took_s`: the longest that it was in each phase since its last word, by its own clock.
        """
        for phase, seconds in (took_s or {}).items():
            self._learn(phase, seconds, now)
        known = self._ranks.setdefault(rank, _Rank(beat, now, now))
        known.heard = now
        known.been.update(took_s or ())
        if beat.count != known.beat.count:
            known.beat, known.moved = beat, now

    def forget(self, rank: int) -> None:
        """The rank has ended its work: it may be as silent as it likes."""
        self._ranks.pop(rank, None)

    def limit_s(self, phase: str, *, first: bool = False) -> float:
        """How long a rank may be in a phase; `first`: which it has not gone through yet."""
        least = FIRST_S.get(phase, OTHER_FIRST_S) if first else self.shortest_s
        return max(ALWAYS_S.get(phase, 0.0), least, self.factor * self.longest_s.get(phase, 0.0))

    def stuck(self, now: float) -> Stuck | None:
        """Whether the group is stuck. To be asked every second or so: a longer pause between two questions means that
        the observer itself stood still, and what it did not hear meanwhile counts against nobody."""
        if self._asked is not None and now - self._asked > self.silence_s / 2:
            self._pardon(now, now - self._asked)
        self._asked = now
        silent = [rank for rank, known in self._ranks.items() if now - known.heard > self.silence_s]
        if silent:
            longest = min(silent, key=lambda rank: self._ranks[rank].heard)
            return self._found(silent, longest, True, now - self._ranks[longest].heard, self.silence_s)
        behind = self._behind()
        late = [rank for rank in behind if now - self._ranks[rank].moved > self._limit_of(rank)]
        if not late:
            return None
        first = min(late, key=lambda rank: self._ranks[rank].moved)
        return self._found(behind, first, False, now - self._ranks[first].moved, self._limit_of(first))

    def _limit_of(self, rank: int) -> float:
        known = self._ranks[rank]
        return self.limit_s(known.beat.phase, first=known.beat.phase not in known.been)

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

    def _learn(self, phase: str, seconds: float, now: float) -> None:
        age_s = now - self._at.setdefault(phase, now)
        self.longest_s[phase] = max(seconds, self.longest_s.get(phase, 0.0) * 0.5 ** (age_s / HALF_LIFE_S))
        self._at[phase] = now

    def _pardon(self, now: float, pause_s: float) -> None:
        for known in self._ranks.values():  # what came during the pause counts as it is
            known.heard = min(now, known.heard + pause_s)
            known.moved = min(now, known.moved + pause_s)
