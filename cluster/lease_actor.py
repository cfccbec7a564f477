"""The actor that leases items to workers: a LeaseTable, its claims among other runs, and what workers report.

Its calls touch memory alone. What a store has to be asked for, the claims of this run and of others and what the ledger
on disk says is done, is done by a thread beside. Ray starts the actor again when its process dies: it then knows what
is done from the ledger, and what is leased from the next beat of each worker.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from cluster.claims import Claims
from cluster.failures import portable
from cluster.leases import Counts, Later, Lease, LeaseTable
from cluster.storage import StorageError, Unreachable

_AHEAD = 2  # items claimed for every worker, beside what it has in hand
_AHEAD_LEAST = 4
_CLAIM_LEAST_S = 0.05  # between two claims
_SILENT = 3  # times `ttl_s`: a worker that has said nothing for so long is taken for stuck


@dataclass(frozen=True, kw_only=True)
class Settings:
    """`claims`: the folder of the runs' files. `listed` returns every item that the ledger on disk says is done: asked
    at the start, and again while other runs work too. `ttl_s`, `still_s`, `max_deaths`: as of LeaseTable."""

    run: str
    items: Collection[str]
    listed: Callable[[], Collection[str]]
    claims: str
    ttl_s: float = 60.0
    still_s: float = 900.0
    max_deaths: int = 5


@dataclass(frozen=True, kw_only=True)
class Worker:
    """Who asks: `owner` is his name in leases."""

    owner: str
    node: str
    host: str
    pid: int
    device: str


@dataclass(frozen=True, kw_only=True)
class View:
    """What the driver sees: `results` of items completed since it looked last, and of those that somebody else had
    completed before (`late`), `given_up` (item -> reason) in all,
    `fatal` what no other item would escape either, `stuck` the owners that do not move or
    say nothing, `others` runs on the folder."""

    counts: Counts
    finished: bool
    results: list[tuple[str, Any]] = field(default_factory=list)
    late: list[tuple[str, Any]] = field(default_factory=list)
    given_up: Mapping[str, str] = field(default_factory=dict)
    fatal: BaseException | None = None
    stuck: frozenset[str] = frozenset()
    others: int = 0
    trouble: str | None = None  # what a store said last when it did not answer


class LeaseActor:
    """One per run (`fathom label run`)."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._table = LeaseTable(
            items=settings.items,
            done=settings.listed(),
            ttl_s=settings.ttl_s,
            still_s=settings.still_s,
            max_deaths=settings.max_deaths,
            first_token=time.time_ns() // 1000,  # so that they rise over a restart, too
        )
        self._lock = threading.Lock()
        self._claims = Claims(settings.claims, settings.run, settings.ttl_s)
        self._claimed: set[str] = set()
        self._workers: dict[str, Worker] = {}
        self._heard: dict[str, float] = {}  # owner -> when he said something last
        self._progress: dict[int, float] = {}
        self._results: list[tuple[str, Any]] = []
        self._late: list[tuple[str, Any]] = []
        self._fatal: BaseException | None = None
        self._trouble: str | None = None
        self._away: dict[str, str] = {}  # items whose store did not answer, and what it said
        self._done: list[str] = []  # since the last claim
        self._stopped = False
        self._closed, self._wake = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._keep_claims, name="claims", daemon=True)
        self._thread.start()

    def ready(self) -> None:
        """Returns when the actor is up."""

    def take(self, worker: Worker) -> Lease | Later | None:
        """The next item of a worker; Later to ask again; None when he may go."""
        with self._lock:
            self._workers[worker.owner] = worker
            self._heard[worker.owner] = time.monotonic()
            if self._stopped or self._fatal is not None:
                return None
            got = self._table.take(worker.owner, time.monotonic(), allowed=self._claimed)
            if self._spare() < (len(self._workers) if isinstance(got, Lease) else 1):
                self._wake.set()
            return got

    def beat(self, owner: str, token: int, item: str, progress: float) -> bool:
        """A worker is at work; whether the item is still his."""
        with self._lock:
            self._heard[owner] = time.monotonic()
            self._progress[token] = progress
            return self._table.beat(owner, token, item, progress, time.monotonic())

    def complete(self, item: str, token: int, result: Any) -> bool:
        """An item is in the ledger; whether that is news."""
        with self._lock:
            self._progress.pop(token, None)
            self._away.pop(item, None)
            new = self._table.complete(item, token, time.monotonic())
            if new:
                self._done.append(item)
                self._claimed.discard(item)
            (self._results if new else self._late).append((item, result))
            return new

    def drop(self, item: str, token: int, *, away: str | None = None) -> None:
        """A worker gives his item back; `away`: what its store said, so not at once again."""
        with self._lock:
            self._progress.pop(token, None)
            if away is None:
                self._table.drop(token, time.monotonic())
            elif self._table.away(token, away, time.monotonic()):
                self._away[item] = away
                self._disclaim(item)

    def give_up(self, item: str, reason: str) -> None:
        """An item cannot be done."""
        with self._lock:
            self._away.pop(item, None)
            self._table.give_up(item, reason)
            self._disclaim(item)

    def fail(self, error: BaseException) -> None:
        """What ends the whole run: nobody gets an item any more."""
        with self._lock:
            self._fatal = self._fatal or error

    def bury(self, owner: str) -> list[str]:
        """A worker is dead; the items he held."""
        with self._lock:
            self._workers.pop(owner, None)
            self._heard.pop(owner, None)
            return self._table.bury(owner, time.monotonic())

    def stop(self) -> None:
        """Nobody gets an item any more; what is in hand goes on."""
        with self._lock:
            self._stopped = True

    def look(self, owners: Collection[str] = (), stopped: bool = False) -> View:
        """To be called every second or so. `owners` are at work, and `stopped` as by `stop`: what this actor would not
        know any more where Ray has just started it again."""
        with self._lock:
            results, self._results = self._results, []
            late, self._late = self._late, []
            now = time.monotonic()
            self._stopped = self._stopped or stopped
            for owner in owners:
                self._heard.setdefault(owner, now)
            return View(
                counts=self._table.counts(),
                finished=self._table.finished,
                results=results,
                late=late,
                given_up=dict(self._table.given_up),
                fatal=self._fatal,
                stuck=frozenset([*(lease.owner for lease in self._table.stuck(now)), *self._silent(now)]),
                others=self._claims.others,
                trouble=self._trouble or next(iter(self._away.values()), None),
            )

    def close(self) -> None:
        """The run ends: its claims are taken back."""
        self._closed.set()
        self._wake.set()
        self._thread.join(timeout=self._settings.ttl_s)
        self._claims.withdraw()

    def _silent(self, now: float) -> list[str]:
        return [owner for owner, at in self._heard.items() if now - at > _SILENT * self._settings.ttl_s]

    def _spare(self) -> int:
        """About how many items are claimed that nobody has in hand."""
        return len(self._claimed) - self._table.leased

    def _disclaim(self, item: str) -> None:
        """Nobody begins it now: another one is to be claimed in its place, at once where none is left."""
        self._claimed.discard(item)
        if self._spare() < 1:
            self._wake.set()

    def _keep_claims(self) -> None:
        every_s = self._settings.ttl_s / 4
        while not self._closed.is_set():
            self._wake.clear()
            try:
                self._renew_claims()
                self._trouble = None
            except StorageError as error:
                refused = isinstance(error.__cause__, PermissionError) or not isinstance(error, Unreachable)
                if refused and not self._claims.written:
                    self.fail(error)  # a folder that cannot be written: nobody would ever get an item
                    return
                self._trouble = str(error)  # of a store that is away for a while; claims only spare double work
                self._closed.wait(1.0)
            except Exception as error:  # noqa: BLE001  without this thread nobody would get an item, and nobody be told
                self.fail(portable(error, "the lease actor"))
            self._closed.wait(_CLAIM_LEAST_S)
            self._wake.wait(timeout=min(every_s, 1.0) if self._claims.others else every_s)

    def _renew_claims(self) -> None:
        now = time.monotonic()
        with self._lock:
            held = self._table.held()
            ahead = max(_AHEAD_LEAST, _AHEAD * max(1, len(self._workers)))
            wanted = [lease.item for lease in held] + ([] if self._stopped else self._table.waiting(ahead, now))
            leased = {lease.item: self._describe(lease) for lease in held}
            done, self._done = self._done, []
        others = self._claims.claim(dict.fromkeys(wanted), leased, done)
        committed = self._settings.listed() if others.left else ()
        lag = time.time() - now  # the files' clock, and the table's
        with self._lock:
            self._table.settle([*others.done, *committed])
            self._table.set_foreign({item: since - lag for item, since in others.claimed.items()})
            self._claimed = set(self._claims.items)

    def _describe(self, lease: Lease) -> dict[str, Any]:
        worker = self._workers.get(lease.owner)
        return {
            "worker": lease.owner,
            "node": worker.host if worker else "",
            "token": lease.token,
            "progress": round(self._progress.get(lease.token, 0.0), 4),
        }
