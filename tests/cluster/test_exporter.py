"""Serving metrics, and saying where."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

import cluster.announce
import cluster.exporter
from cluster.exporter import Exporter, is_loopback, reachable


def scrape(address: str) -> str:
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=5) as answer:
        return str(answer.read().decode())


def test_a_scrape_sees_what_was_set_and_the_entry_lives_as_long(tmp_path: Path) -> None:
    threads = set(threading.enumerate())
    with Exporter("run-1", "train", rank=3, discovery=str(tmp_path / "sd")) as exporter:
        exporter.metric("fathom_images_total").inc(32)
        exporter.metric("fathom_phase_seconds_total").labels(phase="forward").inc(0.5)
        for _ in range(5):
            exporter.metric("fathom_step_duration_seconds").observe(0.3)
        text = scrape(exporter.address)
        assert "fathom_images_total 32.0" in text
        assert 'fathom_phase_seconds_total{phase="forward"} 0.5' in text
        assert "fathom_step_duration_seconds_sum 1.5" in text
        assert "fathom_build_info{" in text
        assert exporter.address.startswith("127.0.0.1:")
        [entry] = (tmp_path / "sd").iterdir()
        [target] = json.loads(entry.read_text())
        node = os.uname().nodename
        labels = {"run": "run-1", "rank": "3", "role": "train", "node": node}
        assert target == {"targets": [exporter.address], "labels": labels}
        with Exporter("run-1", "train", rank=4, discovery=str(tmp_path / "sd")) as other:
            assert other.address != exporter.address
            assert "fathom_images_total 32.0" not in scrape(other.address)
            assert len(list((tmp_path / "sd").iterdir())) == 2
        address = exporter.address
    assert list((tmp_path / "sd").iterdir()) == []
    with pytest.raises(urllib.error.URLError):
        scrape(address)
    assert {thread for thread in threading.enumerate() if thread.is_alive()} <= threads
    with Exporter("run-1", "train", rank=3, port=int(address.split(":")[1])) as again:  # the port is free again
        assert again.address == address


def test_counters_are_there_before_they_count_and_gauges_are_not() -> None:
    """A counter that appears at 1 has no increase that anybody could see; a gauge of 0 would be a value."""
    with Exporter("run-1", "train") as exporter:
        text = scrape(exporter.address)
        assert 'fathom_steps_skipped_total{reason="non_finite"} 0.0' in text
        assert "fathom_checkpoint_failures_total 0.0" in text
        assert 'fathom_rank_state{state="step"} 0.0' in text
        assert "\nfathom_grad_norm" not in text and "\nfathom_checkpoint_bytes" not in text
        exporter.metric("fathom_grad_norm").set(2.5)
        assert "\nfathom_grad_norm 2.5" in scrape(exporter.address)


@pytest.mark.parametrize(
    ("role", "rank", "name"),
    [
        ("train", 0, "fathom_steps"),
        ("train", 1, "fathom_loss"),  # rank 0 says it
        ("train", 0, "fathom_goodput_ratio"),
        ("driver", 0, "fathom_loss"),
        ("label", 0, "fathom_label_shards"),
    ],
)
def test_what_is_not_declared_for_a_process_is_refused(role: Any, rank: int, name: str) -> None:
    with pytest.raises(KeyError):
        Exporter("run-1", role, rank=rank).metric(name)


def test_undeclared_labels_are_refused() -> None:
    with pytest.raises(ValueError):
        Exporter("run-1", "train").metric("fathom_loss").labels(kind="total")


def test_what_changes_by_itself_is_looked_up_at_a_scrape() -> None:
    seen: list[int] = []

    def look() -> None:
        seen.append(len(seen) + 1)
        exporter.metric("fathom_world_size").set(seen[-1])

    def fail() -> None:
        raise OSError("the disk is gone")

    with Exporter("run-1", "train") as exporter:
        exporter.before_scrape(fail)
        exporter.before_scrape(look)
        assert seen == []
        assert "\nfathom_world_size 1.0" in scrape(exporter.address)
        assert "\nfathom_world_size 2.0" in scrape(exporter.address)


def test_an_entry_is_touched_while_its_process_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster.announce, "TOUCH_EVERY_S", 0.05)
    with Exporter("label-x", "label", worker="node-1/7", discovery=str(tmp_path)):
        [entry] = tmp_path.iterdir()
        assert entry.name.startswith("label-node-1_7-")
        os.utime(entry, (1, 1))
        ends = time.monotonic() + 20
        while entry.stat().st_mtime < 2:
            assert time.monotonic() < ends
            time.sleep(0.02)


def test_it_listens_on_loopback_unless_told_otherwise() -> None:
    def listens(exporter: Exporter) -> set[str]:
        port = int(exporter.address.rpartition(":")[2])
        sockets = psutil.Process().net_connections("inet")
        return {s.laddr.ip for s in sockets if s.status == psutil.CONN_LISTEN and s.laddr.port == port}

    with Exporter("run-1", "train") as exporter:
        assert listens(exporter) == {"127.0.0.1"}
    with Exporter("run-1", "train", host="0.0.0.0") as exporter:
        assert listens(exporter) == {"0.0.0.0"}
        assert not exporter.address.startswith("0.0.0.0")
        assert "fathom_build_info" in scrape(exporter.address)


def test_loopback() -> None:
    assert all(map(is_loopback, ("127.0.0.1:1", "127.1.2.3", "[::1]:1", "::1", "localhost:1")))
    assert not any(map(is_loopback, ("10.0.0.127:1", "[fe80::1]:1", "gpu-127:1")))


def test_the_address_for_others_is_never_this_machine_s_own_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names resolve to loopback on many a machine, or not at all."""
    ways = {"10.0.0.9": "10.0.0.1", cluster.exporter._ANYWHERE: "192.168.1.2"}
    monkeypatch.setattr(cluster.exporter, "_way_to", lambda peer: ways.get(peer, ""))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setitem(sys.modules, "ray", None)
    assert reachable() == "192.168.1.2"
    for head in ("10.0.0.9:6379", "ray://10.0.0.9:10001"):
        monkeypatch.setenv("RAY_ADDRESS", head)
        assert reachable() == "10.0.0.1"
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert reachable() == "192.168.1.2"
    ways[cluster.exporter._ANYWHERE] = ""
    assert reachable() == "127.0.0.1"
    ray = SimpleNamespace(is_initialized=lambda: True, util=SimpleNamespace(get_node_ip_address=lambda: "10.0.0.7"))
    monkeypatch.setitem(sys.modules, "ray", ray)
    assert reachable() == "10.0.0.7"
    ray.util.get_node_ip_address = lambda: "127.0.0.1"  # an embedded one
    assert reachable() == "127.0.0.1"


def test_the_way_to_a_machine_is_asked_of_the_kernel() -> None:
    assert cluster.exporter._way_to("127.0.0.1") == "127.0.0.1"
    assert cluster.exporter._way_to("no-such-host.invalid") == ""


def test_the_last_word_is_heard_by_who_listens() -> None:
    with Exporter("run-1", "driver") as exporter:
        began = time.monotonic()
        exporter.last_word()  # to nobody
        assert time.monotonic() - began < 5
        pages = [scrape(exporter.address) for _ in range(2)]
        last = exporter.registry._scraped[-1]
        exporter.registry._scraped = [last - 10.0, last]  # every ten seconds
        exporter.metric("fathom_device_oom_total").inc()

        def again() -> None:
            time.sleep(0.3)
            pages.append(scrape(exporter.address))

        thread = threading.Thread(target=again)
        thread.start()
        exporter.last_word()
        assert exporter.registry._scraped[-1] > last
        thread.join()
    assert ["fathom_device_oom_total 1.0" in page for page in pages] == [False, False, True]


def test_who_has_left_is_not_waited_for() -> None:
    with Exporter("run-1", "driver") as exporter:
        for _ in range(2):
            scrape(exporter.address)
        exporter.registry._scraped = [now - 60.0 for now in exporter.registry._scraped]
        began = time.monotonic()
        exporter.last_word()
        assert time.monotonic() - began < 5
        scrape(exporter.address)  # a person with curl, once in a while: one gap is not much of a rhythm
        exporter.last_word(most_s=0.2)
        assert time.monotonic() - began < 5
