"""Entries say where metrics are served, for as long as they are; Ray's nodes among them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import cluster.announce
from cluster.announce import announced_nodes, write_entry


def node(address: str, port: int = 9, alive: bool = True) -> dict[str, Any]:
    return {
        "NodeManagerAddress": address, "MetricsExportPort": port, "NodeManagerHostname": f"host-{address}",
        "Alive": alive,
    }  # fmt: skip


def announced(folder: Path) -> dict[str, dict[str, str]]:
    found = {}
    for path in folder.glob("*.json"):
        with suppress(FileNotFoundError):  # it has just gone
            (group,) = json.loads(path.read_text())
            found[group["targets"][0]] = group["labels"]
    return found


def until(condition: Callable[[], bool]) -> None:
    ends = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.01)


def test_two_entries_of_one_process_are_two(tmp_path: Path) -> None:
    paths = {write_entry(str(tmp_path), f"127.0.0.1:{port}", {"role": "label", "worker": "a/b"}) for port in (1, 2)}
    assert len(paths) == 2 and all(Path(path).parent == tmp_path for path in paths)
    assert announced(tmp_path).keys() == {"127.0.0.1:1", "127.0.0.1:2"}


def test_nodes_that_come_and_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    now: list[Any] = [node("10.0.0.2", alive=False), node("10.0.0.3", port=0), node("10.0.0.1")]

    def nodes() -> list[dict[str, Any]]:
        if now and isinstance(now[0], Exception):
            raise now[0]
        return now

    monkeypatch.setattr(ray, "nodes", nodes)
    monkeypatch.setattr(cluster.announce, "TOUCH_EVERY_S", 0.02)
    folder = tmp_path / "telemetry"
    with announced_nodes(str(folder)):
        until(lambda: folder.exists() and announced(folder) == {"10.0.0.1:9": {"role": "ray", "node": "host-10.0.0.1"}})
        (path,) = folder.glob("*.json")
        before = path.stat().st_mtime_ns
        until(lambda: path.stat().st_mtime_ns > before)
        now[:] = [node("10.0.0.4")]
        until(lambda: announced(folder).keys() == {"10.0.0.4:9"})
        now[:] = [ConnectionError("the control store is away")]
        time.sleep(0.1)
        assert announced(folder).keys() == {"10.0.0.4:9"}
        now[:] = [node("10.0.0.4"), node("10.0.0.5")]
        until(lambda: announced(folder).keys() == {"10.0.0.4:9", "10.0.0.5:9"})
        for path in folder.glob("*.json"):  # as the folder's owner may, who clears up
            path.unlink()
        until(lambda: announced(folder).keys() == {"10.0.0.4:9", "10.0.0.5:9"})
    assert list(folder.iterdir()) == []


def test_nowhere() -> None:
    with announced_nodes(None):
        pass
