"""What the declarations promise, and what Prometheus's own checker says of it."""

from __future__ import annotations

import itertools
import shutil
import subprocess
from typing import get_args

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from cluster.telemetry import METRICS, Part, make_metric, served_by

ENDINGS = {
    "seconds": "_seconds", "bytes": "_bytes", "ratio": ("_ratio", "_quality"), "timestamp": "_timestamp_seconds",
}  # fmt: skip


def everything() -> bytes:
    registry = CollectorRegistry()
    for name, declared in METRICS.items():
        metric = make_metric(name, registry)
        for values in itertools.product(*((known or ("x",)) for known in declared.labels.values())):
            child = metric.labels(*values) if values else metric
            {"counter": lambda c: c.inc(), "gauge": lambda c: c.set(1), "histogram": lambda c: c.observe(1)}[
                declared.kind
            ](child)
    return generate_latest(registry)


def test_names_follow_the_conventions() -> None:
    text = everything().decode()
    for name, declared in METRICS.items():
        assert name.startswith("fathom_")
        assert (declared.kind == "counter") == name.endswith("_total")
        assert declared.help.endswith(".")
        assert (declared.kind == "histogram") == bool(declared.buckets)
        assert declared.low <= declared.high
        assert not declared.unit or name.removesuffix("_total").endswith(ENDINGS[declared.unit]), name
        assert f"# HELP {name} " in text


def test_every_metric_is_somebody_s_and_every_process_serves_some() -> None:
    parts = get_args(Part)
    assert {name for part in parts for name in served_by([part])} == set(METRICS)
    assert all("fathom_build_info" in served_by([part]) and len(served_by([part])) > 4 for part in parts)


def test_known_label_values_start_at_zero() -> None:
    registry = CollectorRegistry()
    make_metric("fathom_label_shards", registry)
    make_metric("fathom_samples_skipped_total", registry)
    assert registry.get_sample_value("fathom_label_shards", {"state": "given_up"}) == 0
    assert b"fathom_samples_skipped_total{" not in generate_latest(registry)


def test_promtool_finds_nothing() -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed")
    checked = subprocess.run([promtool, "check", "metrics"], input=everything(), capture_output=True)
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, b"", b"")


def test_the_documentation_has_every_metric() -> None:
    from tools.metrics_table import PAGE, page

    text = PAGE.read_text(encoding="utf-8")
    assert text == page(text), "tools/metrics_table.py --write"
