"""What is to be scraped: the entries that processes announce in the folders of runs and labels, as one `file_sd` file.

One file, since Prometheus' patterns go no further than one folder. An entry is passed over when nobody listens at its
address, or when its process has not touched it for a minute; a run that has ended has none.
"""

from __future__ import annotations

import errno
import json
import os
import selectors
import socket
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from cluster import storage
from cluster.announce import TOUCH_EVERY_S
from cluster.exporter import is_loopback

FOLDER = "telemetry"
SILENT_S = 6 * TOUCH_EVERY_S
_SUSPECT_S = 1.2 * TOUCH_EVERY_S
_FOLDERS_EVERY_S = 10.0
_SKEW_S = 600.0  # by which clocks may differ: an entry older than that at first sight is a dead process's
_CONNECT_S = 0.5
_DEEP = 4  # root/DATASET/labels/DIGEST/telemetry
# Large, or never with runs in them.
_NOT_INTO = frozenset(
    {"checkpoints", "claims", "drafts", "eval", "ledger", "previews", "shards", "tensorboard", "wandb", "weights"}
)


@dataclass(frozen=True, kw_only=True)
class Target:
    """An address to scrape, its labels, and the file that announced it."""

    address: str
    labels: Mapping[str, str]
    path: str


@dataclass(frozen=True, kw_only=True)
class Seen:
    """`targets`: to be scraped. `out_of_reach`: those that serve on another machine's loopback."""

    targets: Sequence[Target]
    out_of_reach: Sequence[Target]


@dataclass
class _Sign:
    """Of life: an entry's time stamp, and when it was first seen. Clocks of other machines do not matter then."""

    stamp: int
    at: float


class Targets:
    """Keeps `out`, if any, up to date with what is announced below `folders`; local paths, which need not exist."""

    def __init__(self, folders: Sequence[str], out: str | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._folders, self._out, self._clock = folders, out, clock
        self._announcing: list[str] = []
        self._searched = float("-inf")
        self._signs: dict[str, _Sign] = {}
        self._written: str | None = None

    def look(self) -> Seen:
        """One look; `out` is replaced when something has changed. StorageError when it cannot be written."""
        now = self._clock()
        if now - self._searched >= _FOLDERS_EVERY_S:
            self._searched = now
            self._announcing = [found for folder in self._folders for found in announcing(folder)]
        entries = [entry for folder in self._announcing for entry in self._entries(folder, now)]
        for path in self._signs.keys() - {target.path for target, _ in entries}:
            del self._signs[path]
        living = [(target, silent) for target, silent in entries if silent < SILENT_S]
        away = [target for target, _ in living if not _here(target)]
        near = [(target, silent) for target, silent in living if _here(target)]
        suspects = [t.address for t, silent in near if silent >= _SUSPECT_S or is_loopback(t.address)]
        refusing = refused(suspects)
        # two runs on one cluster announce the same nodes; a port taken over is its last announcer's
        found = {t.address: t for t, _ in sorted(near, key=lambda one: -one[1]) if t.address not in refusing}
        seen = Seen(targets=sorted(found.values(), key=_order), out_of_reach=sorted(away, key=_order))
        text = file_sd(seen.targets)
        if self._out is not None and (text != self._written or not os.path.exists(self._out)):
            storage.atomic_write(self._out, text)
            self._written = text
        return seen

    def _entries(self, folder: str, now: float) -> Iterator[tuple[Target, float]]:
        """What is announced in a folder, and for how many seconds each has been silent."""
        with suppress(OSError):
            for item in os.scandir(folder):
                if not item.name.endswith(".json"):
                    continue
                with suppress(OSError, ValueError, KeyError, TypeError, IndexError, AttributeError):
                    stamp = item.stat().st_mtime_ns
                    sign = self._signs.get(item.path)
                    if sign is None or sign.stamp != stamp:
                        age = time.time() - stamp / 1e9 if sign is None else 0.0
                        sign = self._signs[item.path] = _Sign(stamp, now - (age if age > _SKEW_S else 0.0))
                    yield _read(item.path), now - sign.at


def announcing(folder: str, deep: int = _DEEP) -> Iterator[str]:
    """The folders of entries in `folder` or up to `deep` levels below it."""
    names: list[str] = []
    with suppress(OSError), os.scandir(folder) as items:
        names = [item.name for item in items if not item.name.startswith(".") and item.is_dir()]
    for name in sorted(names):
        path = os.path.join(folder, name)
        if name == FOLDER:
            yield path
        elif deep and name not in _NOT_INTO:
            yield from announcing(path, deep - 1)


def file_sd(targets: Sequence[Target]) -> str:
    """The file's text."""
    return json.dumps([{"targets": [t.address], "labels": dict(t.labels)} for t in targets], indent=1) + "\n"


def refused(addresses: Collection[str]) -> set[str]:
    """Those at which nobody listens, asked all at once. What does not answer at all is not among them."""
    found: set[str] = set()
    with selectors.DefaultSelector() as waiting:
        for address in dict.fromkeys(addresses):
            host, _, port = address.rpartition(":")
            try:
                family, kind, protocol, _, where = socket.getaddrinfo(
                    host.strip("[]"), int(port), type=socket.SOCK_STREAM
                )[0]
                asking = socket.socket(family, kind | socket.SOCK_NONBLOCK, protocol)
            except (OSError, ValueError):  # a name that nobody has, or that is none
                continue
            if asking.connect_ex(where) == errno.ECONNREFUSED:
                found.add(address)
                asking.close()
            else:
                waiting.register(asking, selectors.EVENT_WRITE, address)
        ends = time.monotonic() + _CONNECT_S
        while waiting.get_map() and (left := ends - time.monotonic()) > 0:
            for key, _ in waiting.select(left):
                asked: Any = key.fileobj
                waiting.unregister(asked)
                if asked.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.ECONNREFUSED:
                    found.add(key.data)
                asked.close()
        for key in list(waiting.get_map().values()):
            asked = key.fileobj
            asked.close()
    return found


def _read(path: str) -> Target:
    """Raises what anybody's file may make it raise."""
    with open(path, "rb") as file:
        (group,) = json.load(file)
    (address,) = group["targets"]
    labels = {str(name): str(value) for name, value in group["labels"].items()}
    host, _, port = address.rpartition(":")
    if not labels.get("role") or not host or not (port.isdecimal() and len(port) <= 5 and 0 < int(port) < 1 << 16):
        raise ValueError(path)
    return Target(address=address, labels=labels, path=path)


def _here(target: Target) -> bool:
    return not is_loopback(target.address) or target.labels.get("node") == socket.gethostname()


def _order(target: Target) -> tuple[str, ...]:
    labels = target.labels
    who = labels.get("rank", "").zfill(6)
    return labels.get("run", ""), labels["role"], who, labels.get("worker", ""), target.address
