from __future__ import annotations

import json
import shutil
import subprocess
import threading
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from cluster.telemetry import METRICS, Exporter, make_metric


def scrape(address: str) -> str:
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=5) as answer:
        return str(answer.read().decode())


def test_a_scrape_sees_what_was_set_and_the_entry_lives_as_long(tmp_path: Path) -> None:
    threads = set(threading.enumerate())
    with Exporter("run-1", rank=3, discovery=str(tmp_path / "sd")) as exporter:
        exporter.metric("fathom_images_total").inc(32)
        exporter.metric("fathom_loss").labels(term="total").set(0.5)
        for _ in range(5):
            exporter.metric("fathom_step_duration_seconds").observe(0.3)
        text = scrape(exporter.address)
        assert "fathom_images_total 32.0" in text
        assert 'fathom_loss{term="total"} 0.5' in text
        assert "fathom_step_duration_seconds_sum 1.5" in text
        assert "fathom_build_info{" in text
        assert exporter.address.startswith("127.0.0.1:")
        [entry] = (tmp_path / "sd").iterdir()
        [target] = json.loads(entry.read_text())
        assert target == {"targets": [exporter.address], "labels": {"run": "run-1", "rank": "3", "role": "train"}}
        with Exporter("run-1", rank=4, discovery=str(tmp_path / "sd")) as other:
            assert other.address != exporter.address
            assert "fathom_images_total 32.0" not in scrape(other.address)
            assert len(list((tmp_path / "sd").iterdir())) == 2
        address = exporter.address
    assert list((tmp_path / "sd").iterdir()) == []
    with pytest.raises(urllib.error.URLError):
        scrape(address)
    assert {thread for thread in threading.enumerate() if thread.is_alive()} <= threads
    with Exporter("run-1", rank=3, port=int(address.split(":")[1])) as again:  # the port is free again
        assert again.address == address


def test_undeclared_names_and_labels_are_refused() -> None:
    with Exporter("run-1", rank=0) as exporter:
        with pytest.raises(KeyError):
            exporter.metric("fathom_steps")
        with pytest.raises(ValueError):
            exporter.metric("fathom_loss").labels(kind="total")


def everything() -> bytes:
    registry = CollectorRegistry()
    for name, declared in METRICS.items():
        metric = make_metric(name, registry)
        child = metric.labels(**dict.fromkeys(declared.labels, "x")) if declared.labels else metric
        {"counter": lambda c: c.inc(), "gauge": lambda c: c.set(1), "histogram": lambda c: c.observe(1)}[declared.kind](
            child
        )
    return generate_latest(registry)


def test_names_follow_the_conventions() -> None:
    text = everything().decode()
    for name, declared in METRICS.items():
        assert name.startswith("fathom_")
        assert (declared.kind == "counter") == name.endswith("_total")
        assert declared.help.endswith(".")
        assert (declared.kind == "histogram") == bool(declared.buckets)
        assert f"# HELP {name} " in text


def test_promtool_finds_nothing() -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed")
    checked = subprocess.run([promtool, "check", "metrics"], input=everything(), capture_output=True)
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, b"", b"")
