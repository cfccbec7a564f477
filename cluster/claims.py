"""What each of several runs on one folder works on: one small file per run, so that they share the work.

    leases/OWNER.json    {owner, host, space, pid, born, beat, written, ends, items: {item: since},
                          leased: {item: {...}}, done: {item: when}}

Whoever wants an item writes it into its own file first and then reads the others': of two that want the same, at least
one sees both, and the earlier claim counts (the smaller name, where they are equal). A file that does not change for
as long as it says its leases last, by the reader's own clock, is of a run that is gone; on the same machine a dead
process tells at once. Clocks that differ, or a store that shows files late, cost double work and never wrong work: the
commit settles that.
"""

from __future__ import annotations

import functools
import json
import os
import socket
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from cluster import storage

FOLDER = "leases"
_KEPT = 10  # times `ttl_s` that the file of a run which is gone stays, for people to see
_LOOK_EVERY_S = 0.25


@dataclass(frozen=True, kw_only=True)
class Claim:
    """The file of one run. Times are seconds since the epoch, by its machine's clock; `ends`: without another beat."""

    owner: str
    host: str
    space: str  # of which `pid` is a number
    pid: int
    born: float
    beat: int
    written: float
    ends: float
    items: Mapping[str, float]  # item -> since when
    leased: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # item -> who has it, how far he is
    done: Mapping[str, float] = field(default_factory=dict)  # what it has done lately, and when

    def gone(self) -> bool:
        """Whether its process is known to be dead: only on its own machine, and not in another container of that."""
        return self.space == _space() and not _lives(self.pid, self.born)


@dataclass(frozen=True, kw_only=True)
class Others:
    """What other runs say: `claimed` (item -> since when), what they have `done` lately, and whether a run has `left`,
    whose last items only the ledger tells of."""

    claimed: Mapping[str, float]
    done: frozenset[str]
    left: bool


class Claims:
    """The run `owner` among others in `folder` (a path or URL)."""

    def __init__(self, folder: str, owner: str, ttl_s: float) -> None:
        self._folder, self._ttl_s = folder, ttl_s
        self.owner = owner
        self._items: dict[str, float] = {}
        self._done: dict[str, float] = {}
        self._beat = 0
        self._written = False
        self._there: set[str] = set()  # other runs, as last seen
        self._seen: dict[str, tuple[int, float]] = {}  # owner -> (beat, when it was new, by this process's clock)

    @property
    def items(self) -> Collection[str]:
        """What this run claims."""
        return self._items.keys()

    def claim(
        self,
        items: Collection[str],
        leased: Mapping[str, Mapping[str, Any]] | None = None,
        done: Collection[str] = (),
    ) -> Others:
        """Claim exactly `items` from now on, less what others have claimed before; what the others do.

        `leased` and `done` are told: who works on what, and what has been done since the last call. Called at least
        every third of `ttl_s`. Raises StorageError.
        """
        now = time.time()
        self._items = {item: self._items.get(item, now) for item in items}
        self._done = {item: at for item, at in self._done.items() if now - at < self._ttl_s} | dict.fromkeys(done, now)
        self._write(leased or {})
        others = self._others()
        found: dict[str, float] = {}
        for claim in others:
            for item, since in claim.items.items():
                mine = self._items.get(item)
                if mine is not None and (mine, self.owner) < (since, claim.owner):
                    continue
                self._items.pop(item, None)
                found[item] = min(since, found.get(item, since))
        there = {claim.owner for claim in others}
        left, self._there = bool(self._there - there), there
        return Others(claimed=found, done=frozenset(item for claim in others for item in claim.done), left=left)

    @property
    def others(self) -> int:
        """How many other runs there were at the last `claim`."""
        return len(self._there)

    @property
    def written(self) -> bool:
        """Whether the file has been written once: then it can be."""
        return self._written

    def withdraw(self) -> None:
        """This run ends: its file goes."""
        with suppress(storage.StorageError):
            storage.remove(self._path(self.owner))

    def _write(self, leased: Mapping[str, Mapping[str, Any]]) -> None:
        self._beat += 1
        now = time.time()
        content = {
            "owner": self.owner,
            "host": socket.gethostname(),
            "space": _space(),
            "pid": os.getpid(),
            "born": _born(os.getpid()),
            "beat": self._beat,
            "written": now,
            "ends": now + self._ttl_s,
            "items": self._items,
            "leased": leased,
            "done": self._done,
        }
        storage.atomic_write(self._path(self.owner), json.dumps(content) + "\n")
        self._written = True

    def _others(self) -> list[Claim]:
        """Claims of runs that are there."""
        now, found = time.monotonic(), []
        for claim in read_claims(self._folder):
            if claim.owner == self.owner:
                continue
            beat, since = self._seen.get(claim.owner, (-1, 0.0))
            if claim.beat != beat:
                since = now
                self._seen[claim.owner] = (claim.beat, now)
            lasts_s = max(self._ttl_s, claim.ends - claim.written)
            if now - since > lasts_s or claim.gone():
                if time.time() - claim.written > _KEPT * lasts_s or claim.gone():
                    with suppress(storage.StorageError):
                        storage.remove(self._path(claim.owner))
                continue
            found.append(claim)
        return found

    def _path(self, owner: str) -> str:
        return storage.join(self._folder, f"{owner}.json")


def read_claims(folder: str) -> list[Claim]:
    """The files of all runs in a folder, whether they are there or not. Raises StorageError."""
    try:
        names = storage.listdir(folder)
    except storage.FileMissing:  # behind a URL a folder goes with its last file
        return []
    found = []
    for name in names:
        if not name.endswith(".json"):
            continue
        try:
            content = json.loads(storage.read_bytes(storage.join(folder, name)))
            claim = Claim(**{key: content[key] for key in Claim.__dataclass_fields__})
        except (storage.FileMissing, ValueError, KeyError, TypeError):
            continue  # it has just gone, or is none of ours
        if claim.owner == name.removesuffix(".json") and _is_sound(claim):
            found.append(claim)
    return found


def _is_sound(claim: Claim) -> bool:
    numbers = [claim.pid, claim.born, claim.beat, claim.written, claim.ends]
    tables = (claim.items, claim.leased, claim.done)
    if not all(isinstance(each, Mapping) for each in tables):
        return False
    if not all(isinstance(each, Mapping) for each in claim.leased.values()):
        return False
    return all(isinstance(each, int | float) for each in [*numbers, *claim.items.values()]) and claim.pid > 0


def alone(folder: str, ttl_s: float, stopped: Callable[[], bool] = lambda: False) -> bool:
    """Whether no run is at work in a folder: asked by one that is not, or not any more.

    Of a file that is there either its run goes on and changes it, or it was killed: which of the two is known after
    `ttl_s` at the latest, or as long as that run's own leases last. False also when `stopped()`. Raises StorageError.
    """
    began, beats = time.monotonic(), dict[str, int]()
    while not stopped():
        there = [claim for claim in read_claims(folder) if not claim.gone() and claim.ends + ttl_s >= time.time()]
        if any(beats.setdefault(claim.owner, claim.beat) != claim.beat for claim in there):
            return False
        silence_s = max((claim.ends - claim.written for claim in there), default=0.0)
        if not there or time.monotonic() - began > max(ttl_s, silence_s):
            return True
        time.sleep(min(_LOOK_EVERY_S, ttl_s / 10))
    return False


@functools.cache
def _space() -> str:
    """Names what process numbers are unique in: this start of the machine, and the container. Two machines may have one
    name, and two containers the machine's."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            boot = file.read().strip()
        return f"{boot}-{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:  # no Linux
        return socket.gethostname()


def _born(pid: int) -> float:
    import psutil

    return float(psutil.Process(pid).create_time())


def _lives(pid: int, born: float) -> bool:
    import psutil

    with suppress(psutil.Error):
        return abs(float(psutil.Process(pid).create_time()) - born) < 1.0
    return False
