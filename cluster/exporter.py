"""Serves a process's metrics over HTTP, and says in a folder where: one registry, one port and one entry a process."""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from types import TracebackType
from typing import Any, Literal
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, disable_created_metrics, start_http_server

from cluster.announce import Entry
from cluster.telemetry import METRICS, Part, make_metric, served_by

disable_created_metrics()  # a second series for every counter, which says when its process began

_ANYWHERE = "192.0.2.1"  # for documentation (RFC 5737): nobody's, and so behind the default route

LAST_WORD_S = 20.0  # longer than most scrape intervals

Role = Literal["train", "driver", "label", "label-driver"]


class Exporter:
    """Serves while its block runs, on loopback unless `host` says otherwise (0.0.0.0: every interface).

    It serves what METRICS declares for the process's part: a rank (`role` "train", with its `rank`), a labelling worker
    (with its `worker`'s name) or a driver. `discovery`: the folder of the entries (a local path), or None.
    StorageError when the folder cannot be written; OSError when the port is taken or the host is not this machine's.
    """

    def __init__(
        self,
        run: str,
        role: Role,
        *,
        rank: int = 0,
        worker: str | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
        discovery: str | None = None,
    ) -> None:
        self.registry = _Registry()
        own = {"rank": str(rank)} if role == "train" else {"worker": worker} if worker else {}
        self.labels = {"run": run, "role": role, "node": socket.gethostname(), **own}
        self._host, self._port, self._discovery = host, port, discovery
        parts: list[Part] = ["rank", *(["first-rank"] if rank == 0 else [])] if role == "train" else [role]  # type: ignore[list-item]
        self._metrics = {name: make_metric(name, self.registry) for name in served_by(parts) if always(name)}
        self._late = {name for name in served_by(parts) if name not in self._metrics}
        self._lock = threading.Lock()
        self._server: WSGIServer | None = None
        self._thread: threading.Thread | None = None
        self._entry: Entry | None = None

    def __enter__(self) -> Exporter:
        self._server, self._thread = start_http_server(self._port, self._host, self.registry)
        try:
            self.metric("fathom_build_info").labels(**_build()).set(1)
            if self._discovery is not None:
                self._entry = Entry(self._discovery, self.address, self.labels)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def address(self) -> str:
        """`host:port` to scrape; the host others reach when it listens on all addresses."""
        if self._server is None:
            raise RuntimeError("the exporter is not running")
        host = reachable() if self._host in ("0.0.0.0", "::", "") else self._host
        return f"[{host}]:{self._server.server_port}" if ":" in host else f"{host}:{self._server.server_port}"

    def metric(self, name: str) -> Any:
        """The Counter, Gauge or Histogram declared as `name`. KeyError when it is not this process's to serve."""
        found = self._metrics.get(name)
        if found is not None:
            return found
        with self._lock:
            if name in self._late:
                self._metrics[name] = make_metric(name, self.registry)
                self._late.discard(name)
            return self._metrics[name]

    def before_scrape(self, look: Callable[[], None]) -> None:
        """Have `look` called when somebody scrapes, to set what changes by itself; what it raises is passed over."""
        self.registry.looks.append(look)

    def last_word(self, most_s: float = LAST_WORD_S) -> None:
        """Wait until whoever scrapes has seen what is served now: how it ended, the last counts. At once where nobody
        scrapes; no longer than `most_s`."""
        gap, silent = self.registry.rhythm()
        if silent <= gap + 2.0:
            self.registry.scraped_again(min(most_s, 1.5 * gap + 1.0))

    def close(self) -> None:
        """Remove the entry, stop the server and its threads, free the port. Again is nothing."""
        if self._entry is not None:
            self._entry.close()
            self._entry = None
        if self._server is not None and self._thread is not None:
            self._server.shutdown()
            self._server.server_close()
            self._thread.join(timeout=5)
            self._server = self._thread = None


class _Registry(CollectorRegistry):
    """Calls `looks` before it is read."""

    def __init__(self) -> None:
        super().__init__()
        self.looks: list[Callable[[], None]] = []
        self._looking = threading.Condition()
        self._scraped = [-math.inf, -math.inf]  # when, the last two times

    def rhythm(self) -> tuple[float, float]:
        """Seconds between the last two scrapes, and since the last."""
        with self._looking:
            before, last = self._scraped
            return (last - before if math.isfinite(before) else 0.0), time.monotonic() - last

    def scraped_again(self, patience_s: float) -> bool:
        """Whether there is a scrape, from now on, within so many seconds."""
        with self._looking:
            last = self._scraped[-1]
            return self._looking.wait_for(lambda: self._scraped[-1] > last, patience_s)

    def collect(self) -> Iterable[Any]:
        found = self._collect()
        with self._looking:
            self._scraped = [self._scraped[-1], time.monotonic()]
            self._looking.notify_all()
        return found

    def _collect(self) -> Iterable[Any]:
        with self._looking:
            for look in self.looks:
                with suppress(Exception):  # a full disk, a folder that is gone: the rest is still worth having
                    look()
        return list(super().collect())


def always(name: str) -> bool:
    """Whether a metric is served from the start; others from their first value on: 0 would be a wrong one."""
    declared = METRICS[name]
    return declared.kind != "gauge" or (bool(declared.labels) and all(declared.labels.values()))


def reachable() -> str:
    """This machine's address for others: the one Ray knows it by, else that of its way to Ray's head, or to anywhere.
    Loopback where there is none of these."""
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        address = str(ray.util.get_node_ip_address())
        if not is_loopback(address):
            return address
    head = os.environ.get("RAY_ADDRESS", "").rpartition("://")[2].rpartition(":")[0].strip("[]")
    for peer in (head, _ANYWHERE):
        address = _way_to(peer) if peer else ""
        if address and not is_loopback(address):
            return address
    return "127.0.0.1"


def is_loopback(host: str) -> bool:
    """Whether only processes of the same machine reach an address, with a port or without."""
    return host.startswith(("127.", "::1", "[::1]", "localhost"))


def _way_to(peer: str) -> str:
    """Of this machine's addresses, the one from which it would ask `peer`; "" where there is none. Nothing is sent."""
    with suppress(OSError):
        family, kind, protocol, _, where = socket.getaddrinfo(peer, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as asking:
            asking.connect(where)
            return str(asking.getsockname()[0])
    return ""


def _build() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for label, distribution in (("version", "fathom-depth"), ("torch", "torch")):
        try:
            versions[label] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            versions[label] = "unknown"
    return versions
