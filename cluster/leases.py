"""Who works on which item, for how long, and what is left: a table in memory, told the time by its caller.

An item is leased to an owner until its lease ends, which every beat of the owner puts off. A lease that has ended
gives the item to the next who asks; whoever held it before finds at his next beat that he does not any more. Tokens
rise with every lease. What makes work happen once is not this table but the commit (dataio/labels.py): here it is only
made unlikely that two do the same.

`now` is any clock that goes evenly, in seconds.
"""

from __future__ import annotations

import heapq
import statistics
from collections import Counter, deque
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import count

_HOLDERS = 2  # of one item: the first, and one who was idle at the end
_DURATIONS = 256  # of the last items: enough for a median
_MEASURED = 3  # items before their median says anything
_UNMEASURED = 5  # times `ttl_s`: taken for usual before
_LOOKED_AT = 256  # items at the queue's head, for one that is claimed
_CLAIMING_S, _IDLE_S = 0.05, 0.5  # to wait
_AWAY_FIRST_S, _AWAY_LONGEST_S = 2.0, 60.0  # before an item whose store did not answer is tried again
_AWAY_MOST = 12  # times: some nine minutes


@dataclass(frozen=True, kw_only=True)
class Lease:
    """An item to work on. `token` is greater than that of any lease before it."""

    item: str
    token: int
    owner: str
    speculative: bool = False  # somebody else works on it too


@dataclass(frozen=True)
class Later:
    """Nothing to do now: ask again in so many seconds."""

    seconds: float


@dataclass(kw_only=True)
class _Held:
    lease: Lease
    since: float
    until: float
    progress: float = 0.0
    moved: float = 0.0  # when progress last rose


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Items by state (they add up to all), and what happened so far. `away` are part of `todo`."""

    todo: int
    leased: int
    foreign: int  # claimed by another run on the same folder
    done: int
    given_up: int
    expired: int = 0  # leases that ended without a word
    speculated: int = 0
    deaths: int = 0
    late: int = 0  # completions of what somebody else had completed


@dataclass
class LeaseTable:
    """`items` in the order in which they are given out, `done` those of them that need no work.

    `ttl_s`: how long a lease lasts without a beat. `still_s`: how long a holder may beat without any progress before he
    is taken for stuck. `max_deaths`: owners that may die on an item before it is given up.
    """

    items: Iterable[str]
    done: Iterable[str] = ()
    ttl_s: float = 60.0
    still_s: float = 900.0
    max_deaths: int = 5
    first_token: int = 1
    given_up: dict[str, str] = field(default_factory=dict)  # item -> reason

    def __post_init__(self) -> None:
        self._all = dict.fromkeys(self.items)
        self._done = {item for item in self.done if item in self._all}
        self._queue = deque(item for item in self._all if item not in self._done)
        self._queued = set(self._queue)  # what of the queue counts: taking out of its middle would be slow
        self._away: list[tuple[float, int, str]] = []  # a heap: (not before, turn, item)
        self._turn: dict[str, int] = {}  # what of that heap counts
        self._tries: Counter[str] = Counter()  # of an item whose store did not answer
        self._deaths: Counter[str] = Counter()
        self._held: dict[int, _Held] = {}
        self._holders: dict[str, set[int]] = {}
        self._ends: list[tuple[float, int]] = []  # a heap: (when to look at it, token)
        self._foreign: dict[str, float] = {}  # item -> since when another run claims it
        self._tokens, self._turns = count(self.first_token), count()
        self._took: deque[float] = deque(maxlen=_DURATIONS)
        self._expired = self._speculated = self._late = 0

    @property
    def finished(self) -> bool:
        """Whether every item is done or given up."""
        return len(self._done) + len(self.given_up) == len(self._all)

    @property
    def leased(self) -> int:
        """Items in somebody's hands."""
        return len(self._holders)

    def counts(self) -> Counts:
        """Items by state."""
        leased = self.leased
        settled = len(self._done) + len(self.given_up)
        return Counts(
            todo=len(self._all) - settled - leased - len(self._foreign),
            leased=leased,
            foreign=len(self._foreign),
            done=len(self._done),
            given_up=len(self.given_up),
            expired=self._expired,
            speculated=self._speculated,
            deaths=self._deaths.total(),
            late=self._late,
        )

    def held(self) -> list[Lease]:
        """Leases that have not ended."""
        return [held.lease for held in self._held.values()]

    def waiting(self, number: int, now: float) -> list[str]:
        """The next items, at most `number`, that `take` would give out: for whoever has to claim them first."""
        self._expire(now)
        found: list[str] = []
        for item in self._queue:
            if len(found) >= number:
                break
            if item in self._queued:
                found.append(item)
        return found

    def take(self, owner: str, now: float, *, allowed: Collection[str] | None = None) -> Lease | Later | None:
        """An item for `owner`; Later while others still work on the rest; None when nothing is left for anybody.

        `allowed`: no other item is begun. At the end a second owner gets what takes longer than most did.
        """
        self._expire(now)
        item = self._next(allowed)
        if item is not None:
            return self._give(item, owner, now)
        if self._queued:
            return Later(_CLAIMING_S)
        if self.finished:
            return None
        late = self._slowest(owner, now)
        if late is not None:
            self._speculated += 1
            return self._give(late, owner, now, speculative=True)
        return Later(_IDLE_S)

    def beat(self, owner: str, token: int, item: str, progress: float, now: float) -> bool:
        """Whether the lease still holds, and then for `ttl_s` from now. `progress` rises while work goes on.

        A lease of an earlier table, which was lost with its process, is taken up where nobody else has the item.
        """
        self._expire(now)
        held = self._held.get(token)
        if held is None:
            lost = token >= self.first_token  # else it is of a table before this one
            if lost or self._settled(item) or item not in self._all or self._holders.get(item):
                return False
            self._dequeue(item)
            self._foreign.pop(item, None)
            held = self._hold(Lease(item=item, token=token, owner=owner), now)
        if held.lease.owner != owner:
            return False
        if progress > held.progress:
            held.progress, held.moved = progress, now
        if now - held.moved > self.still_s:
            return True  # it beats but does not move: the lease runs out
        held.until = now + self.ttl_s
        return True

    def complete(self, item: str, token: int, now: float) -> bool:
        """The item is done, whoever asks; whether this is news."""
        held = self._held.get(token)
        if held is not None and held.lease.item == item and not held.lease.speculative:
            self._took.append(now - held.since)
        if item in self._done or item not in self._all:
            self._late += 1
            return False
        self.settle([item])
        return True

    def settle(self, items: Iterable[str]) -> list[str]:
        """Items that turn out to be done; those of them that were not known to be."""
        new = [item for item in dict.fromkeys(items) if item in self._all and item not in self._done]
        for item in new:
            self._done.add(item)
            self.given_up.pop(item, None)
            self._foreign.pop(item, None)
            self._dequeue(item)
            for token in self._holders.pop(item, set()):
                del self._held[token]
        return new

    def drop(self, token: int, now: float) -> None:
        """The holder gives an item back, and nothing is wrong with it."""
        self._let_go(token, again_at=now)

    def away(self, token: int, reason: str, now: float) -> bool:
        """The item's store did not answer: it is tried again, later each time, and given up at last. Whether the lease
        still held."""
        held = self._held.get(token)
        if held is None:
            return False
        item = held.lease.item
        self._tries[item] += 1
        wait_s = min(_AWAY_LONGEST_S, _AWAY_FIRST_S * 2.0 ** (self._tries[item] - 1))
        self._let_go(token, again_at=now + wait_s)
        if self._tries[item] >= _AWAY_MOST and not self._holders.get(item):
            self.give_up(item, f"tried {self._tries[item]} times: {reason}")
        return True

    def give_up(self, item: str, reason: str) -> None:
        """The item cannot be done."""
        if item in self._all and not self._settled(item):
            for token in self._holders.pop(item, set()):
                del self._held[token]
            self._dequeue(item)
            self._foreign.pop(item, None)
            self.given_up[item] = reason

    def bury(self, owner: str, now: float) -> list[str]:
        """The owner is dead: what he held is free again. Items that too many have died on are given up."""
        items = []
        for token in [token for token, held in self._held.items() if held.lease.owner == owner]:
            item = self._held[token].lease.item
            items.append(item)
            self._deaths[item] += 1
            # last in the queue: what kills its owner should not keep killing
            self._let_go(token, again_at=now, front=False)
            if self._deaths[item] >= self.max_deaths and not self._holders.get(item):
                self.give_up(item, f"{self._deaths[item]} workers died on it: killed, out of memory or crashed")
        return items

    def stuck(self, now: float) -> list[Lease]:
        """Leases whose holders beat and do not move."""
        return [held.lease for held in self._held.values() if now - held.moved > self.still_s]

    def set_foreign(self, claims: Mapping[str, float]) -> None:
        """What other runs claim (item -> since when): not given out, but for the end, until they do no more."""
        claims = {item: since for item, since in claims.items() if item in self._all and not self._settled(item)}
        for item in [item for item in self._foreign if item not in claims]:
            del self._foreign[item]
            if not self._holders.get(item):
                self._enqueue(item, front=True)
        for item, since in claims.items():
            if not self._holders.get(item):
                self._dequeue(item)
                self._foreign.setdefault(item, since)

    def _settled(self, item: str) -> bool:
        return item in self._done or item in self.given_up

    def _give(self, item: str, owner: str, now: float, *, speculative: bool = False) -> Lease:
        lease = Lease(item=item, token=next(self._tokens), owner=owner, speculative=speculative)
        self._foreign.pop(item, None)
        self._hold(lease, now)
        return lease

    def _hold(self, lease: Lease, now: float) -> _Held:
        held = _Held(lease=lease, since=now, until=now + self.ttl_s, moved=now)
        self._held[lease.token] = held
        self._holders.setdefault(lease.item, set()).add(lease.token)
        heapq.heappush(self._ends, (held.until, lease.token))
        return held

    def _slowest(self, owner: str, now: float) -> str | None:
        """The item to do twice: of those that take longer than most did, the one begun first."""
        usual_s = statistics.median(self._took) if len(self._took) >= _MEASURED else _UNMEASURED * self.ttl_s
        begun: dict[str, float] = dict(self._foreign)
        for item, tokens in self._holders.items():
            leases = [self._held[token] for token in tokens]
            if len(leases) < _HOLDERS and all(held.lease.owner != owner for held in leases):
                begun[item] = min(held.since for held in leases)
        slowest = min(begun, key=lambda item: begun[item], default=None)
        return slowest if slowest is not None and now - begun[slowest] > usual_s else None

    def _expire(self, now: float) -> None:
        while self._ends and self._ends[0][0] <= now:
            _, token = heapq.heappop(self._ends)
            held = self._held.get(token)
            if held is None:
                continue
            if held.until > now:
                heapq.heappush(self._ends, (held.until, token))
                continue
            self._expired += 1
            self._let_go(token, again_at=now)
        while self._away and self._away[0][0] <= now:
            _, turn, item = heapq.heappop(self._away)
            if self._turn.get(item) == turn:
                del self._turn[item]
                self._enqueue(item, front=True)

    def _let_go(self, token: int, again_at: float, front: bool = True) -> None:
        held = self._held.pop(token, None)
        if held is None:
            return
        item = held.lease.item
        tokens = self._holders[item]
        tokens.discard(token)
        if tokens:
            return
        del self._holders[item]
        if self._settled(item):
            return
        if front:
            self._turn[item] = next(self._turns)
            heapq.heappush(self._away, (again_at, self._turn[item], item))
        else:
            self._enqueue(item, front=False)

    def _enqueue(self, item: str, *, front: bool) -> None:
        if item in self._queued or self._settled(item) or self._holders.get(item) or item in self._foreign:
            return
        self._queued.add(item)
        (self._queue.appendleft if front else self._queue.append)(item)

    def _dequeue(self, item: str) -> None:
        self._queued.discard(item)
        self._turn.pop(item, None)

    def _next(self, allowed: Collection[str] | None) -> str | None:
        """Take the first item of the queue that may be begun out of it."""
        passed: list[str] = []
        found = None
        while self._queue and found is None and len(passed) < _LOOKED_AT:
            item = self._queue.popleft()
            if item not in self._queued:
                continue
            if allowed is None or item in allowed:
                found = item
                self._queued.discard(item)
            else:
                passed.append(item)
        self._queue.extendleft(reversed(passed))
        return found
