"""Says in a folder where metrics are served: Prometheus' `file_sd` entries, one file each.

A file is touched as long as its process lives, and gone when it has left; those of killed processes are for whoever
reads the folder to pass over (cluster/monitor/targets.py).
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress

from cluster import storage
from cluster.background import Background

TOUCH_EVERY_S = 10.0


def write_entry(folder: str, address: str, labels: Mapping[str, str]) -> str:
    """Announce what is served at `address` (`host:port`); returns the file's path. `labels` hold a `role`.

    StorageError when it cannot be written.
    """
    who = labels.get("rank") or labels.get("worker") or "0"
    name = f"{labels['role']}-{who}-{os.getpid()}-{secrets.token_hex(4)}.json".replace("/", "_")
    path = storage.join(folder, name)
    storage.atomic_write(path, json.dumps([{"targets": [address], "labels": dict(labels)}]) + "\n")
    return path


class Entry(Background):
    """The entry of one process, from now until it is closed."""

    def __init__(self, folder: str, address: str, labels: Mapping[str, str]) -> None:
        self.path = write_entry(folder, address, labels)
        super().__init__("fathom-entry", join_s=5.0)
        self.__enter__()

    def _run(self) -> None:
        while not self._closed.wait(TOUCH_EVERY_S):
            with suppress(OSError):
                os.utime(self.path)

    def close(self) -> None:
        """Take the entry away. Again is nothing."""
        self.__exit__(None, None, None)
        with suppress(OSError):
            os.unlink(self.path)


@contextmanager
def announced_nodes(folder: str | None) -> Iterator[None]:
    """For the time of a block inside a ray_session: announce where Ray's nodes serve their metrics, those of the nodes
    that come as well. None: nowhere."""
    if folder is None:
        yield
        return
    with _Nodes(folder):
        yield


class _Nodes(Background):
    """What it cannot do, it tries again: nobody's work depends on it."""

    def __init__(self, folder: str) -> None:
        super().__init__("fathom-ray-nodes", join_s=2.0)
        self._folder = folder
        self._paths: dict[str, str] = {}  # by address

    def _run(self) -> None:
        while True:
            with suppress(Exception):  # Ray raises this and that while its control store is away
                self._look()
            if self._closed.wait(TOUCH_EVERY_S):
                break
        for path in self._paths.values():
            with suppress(OSError):
                os.unlink(path)

    def _look(self) -> None:
        import ray

        nodes = {
            f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}": str(node["NodeManagerHostname"])
            for node in ray.nodes()
            if node.get("Alive") and node.get("MetricsExportPort")
        }
        for address in self._paths.keys() - nodes.keys():
            with suppress(OSError):
                os.unlink(self._paths[address])
            del self._paths[address]
        for address, host in nodes.items():
            path = self._paths.get(address)
            if path is not None and os.path.exists(path):
                os.utime(path)
            elif not self._closed.is_set():
                self._paths[address] = write_entry(self._folder, address, {"role": "ray", "node": host})
