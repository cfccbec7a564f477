"""Processes that are not there: all metrics of METRICS, and a few of Ray's, as two trainings and a labelling run would
serve them, with values that move; all at one address, each process under a path of its own.
"""

from __future__ import annotations

import contextlib
import http.server
import json
import math
import socket
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import yaml
from prometheus_client import CollectorRegistry, Gauge, generate_latest

from cluster.monitor.alerts import rules
from cluster.telemetry import (
    BADPUT,
    LABEL_PHASES,
    METRICS,
    PHASES,
    RUN_STATES,
    SHARDS,
    STAGES,
    STATES,
    Part,
    make_metric,
    served_by,
)
from cluster.tied import tied

ODD = 'a"b<i>`\\'  # a run may be called anything
RUNS = ("vits-indoor-2026-07", ODD)
LABELLING = "label-photos"
NODES = ("node-1", "node-2")
GONE = {"run": RUNS[0], "role": "train", "node": "node-2", "rank": "7"}  # announced, but does not answer
RATE = 25.0  # images a second of a rank
STEP_S = 0.32


def _shares(names: tuple[str, ...], *shares: float) -> dict[str, float]:
    return dict(zip(names, shares, strict=True))


# What a counter grows by in a second; by the value of its label, where it has one.
RATES: Mapping[str, float | Mapping[str, float]] = {
    "fathom_steps_total": 1 / STEP_S, "fathom_images_total": RATE, "fathom_steps_skipped_total": {"non_finite": 0.01},
    "fathom_phase_seconds_total": _shares(PHASES, 0.08, 0.24, 0.05, 0.38, 0.06, 0.02, 0.12),
    "fathom_samples_skipped_total": {"cannot be decoded": 0.05, "no valid depth": 0.02},
    "fathom_data_read_bytes_total": 4.6e6, "fathom_data_cache_hits_total": 2.5, "fathom_data_cache_misses_total": 0.2,
    "fathom_loader_seconds_total": _shares(STAGES, 0.12, 0.41, 0.08, 0.36),
    "fathom_checkpoint_stall_seconds_total": 0.004, "fathom_checkpoint_failures_total": 0.01,
    "fathom_record_failures_total": 0.002, "fathom_tracker_failures_total": {"tensorboard": 0.0, "wandb": 0.003},
    "fathom_restarts_total": {"died": 0.001, "preempted": 0.002}, "fathom_device_oom_total": 0.0005,
    "fathom_badput_seconds_total": _shares(BADPUT, 0.001, 0.02, 0.06, 0.01, 0.05, 0.01, 0.015, 0.004),
    "fathom_label_images_total": 41.0, "fathom_label_failures_total": {"cannot be decoded": 0.04},
    "fathom_label_phase_seconds_total": _shares(LABEL_PHASES, 0.11, 0.72, 0.14),
    "fathom_label_leases_expired_total": 0.002, "fathom_label_shards_speculated_total": 0.004,
    "fathom_label_shards_late_total": 0.002, "fathom_label_shards_differing_total": 0.0005,
    "fathom_label_worker_deaths_total": 0.001,
}  # fmt: skip


def gauges(t: float, place: int) -> dict[str, Any]:
    """The gauges' values at `t` seconds of a run: numbers, or dicts by the label's value (or values). `place`: of the
    process among those of its kind; it makes them differ."""
    wave = math.sin(t / 40 + 2 * place)
    fall = math.exp(-t / 3000)
    now = time.time()
    return {
        "fathom_step": t / STEP_S, "fathom_steps_planned": 40_000.0,
        "fathom_loss": {"total": 0.21 + 0.9 * fall + 0.02 * wave, "silog": 0.16 + 0.6 * fall + 0.02 * wave,
                        "gradient": 0.05 + 0.3 * fall},
        "fathom_grad_norm": 1.4 + fall + 0.3 * wave,
        "fathom_learning_rate": {"encoder": 5e-6 * (0.3 + fall), "head": 5e-5 * (0.3 + fall)},
        "fathom_event_result": {("validation", "absrel"): 0.09 + 0.2 * fall,
                                ("validation", "delta1"): 0.93 - 0.3 * fall},
        "fathom_last_step_timestamp_seconds": now,
        "fathom_rank_state": _one(STATES, "validation" if t % 600 < 40 else "step"),
        "fathom_rank_slowdown_ratio": 1.0 + 0.15 * place + 0.05 * wave,
        "fathom_model_flops_utilization_ratio": 0.38 + 0.02 * wave,
        "fathom_device_memory_bytes": {"allocated": 21.4e9 + 1e9 * wave, "reserved": 29e9, "peak": 27.5e9,
                                       "total": 80e9},
        "fathom_disk_free_bytes": 1.2e12 - 2e7 * t, "fathom_disk_size_bytes": 2e12,
        "fathom_checkpoint_last_success_timestamp_seconds": now - t % 900, "fathom_checkpoint_bytes": 412e6,
        "fathom_checkpoint_interval_seconds": 900.0, "fathom_world_size": 2.0,
        "fathom_run_state": _one(RUN_STATES, "RECOVERING" if t % 2400 < 60 else "RUNNING"), "fathom_run_attempts": 2.0,
        "fathom_run_elapsed_seconds": t, "fathom_goodput_ratio": 0.86 + 0.02 * wave,
        "fathom_label_shards": _shares(SHARDS, 900 - t / 12, 4.0, 20.0, t / 12, 1.0),
        "fathom_build_info": {("0.1.0", "2.9.1", "3.11.7"): 1.0},
        "ray_node_mem_used": 91e9 + 4e9 * wave, "ray_node_mem_total": 256e9, "ray_node_cpu_utilization": 61 + 8 * wave,
        "ray_node_gpus_utilization": {"0": 93 + 4 * wave, "1": 90 + 3 * wave},
        "ray_node_network_send_speed": 12e6 + 1e6 * wave, "ray_node_network_receive_speed": 98e6 + 9e6 * wave,
        "ray_actors": {"ALIVE": 6.0, "DEAD": 1.0}, "ray_component_rss_bytes": {"raylet": 0.4e9, "workers": 22e9},
    }  # fmt: skip


RAY_LABELS = {
    "ray_node_gpus_utilization": ["GpuIndex"], "ray_actors": ["State"], "ray_component_rss_bytes": ["Component"],
}


class Process:
    """One exporter's registry, and what it says at a time."""

    def __init__(self, labels: Mapping[str, str], parts: tuple[Part, ...], place: int) -> None:
        self.labels, self._place, self._at = dict(labels), place, 0.0
        self._registry = CollectorRegistry()
        self._metrics = {name: make_metric(name, self._registry) for name in served_by(parts)}
        if not parts:
            for name in (name for name in gauges(0.0, 0) if name.startswith("ray_")):
                self._metrics[name] = Gauge(name, "Ray's.", RAY_LABELS.get(name, []), registry=self._registry)

    def text(self, t: float) -> bytes:
        """As it is scraped at `t` seconds of its run, which must not run backwards."""
        passed, self._at = max(0.0, t - self._at), max(t, self._at)
        set_to = gauges(t, self._place)
        for name, metric in self._metrics.items():
            kind = METRICS[name].kind if name in METRICS else "gauge"
            if kind == "gauge":
                _each(metric, set_to[name], "set")
            elif kind == "counter":
                rate = RATES[name]
                scaled = {k: v * passed for k, v in rate.items()} if isinstance(rate, Mapping) else rate * passed
                _each(metric, scaled, "inc")
            else:
                self._observe(name, metric, t, passed)
        return generate_latest(self._registry)

    def _observe(self, name: str, metric: Any, t: float, passed: float) -> None:
        for number in range(min(40, math.ceil(passed))):
            wave = math.sin(1.7 * number + t) + 0.3 * self._place
            if name == "fathom_label_quality":
                metric.observe(min(1.0, 0.8 + 0.15 * wave))
            elif name == "fathom_checkpoint_duration_seconds":
                for op in ("save", "load"):
                    metric.labels(op=op).observe(2.0 + wave)
            else:
                metric.observe(STEP_S * (1 + 0.4 * wave))


class World:
    """Serves while its block runs. `ages`: how long the runs have been on when it begins, in seconds."""

    def __init__(self, age_s: float = 4000.0) -> None:
        self.processes = {f"/p{number}": process for number, process in enumerate(_processes())}
        self._age_s, self._began = age_s, time.time()
        lock = threading.Lock()
        world = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                with lock:
                    body = world.processes[self.path].text(world.age())
                self.send_response(200)
                self.send_header("Content-Type", "text/plain; version=0.0.4")
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def age(self) -> float:
        """Of the runs now."""
        return self._age_s + time.time() - self._began

    def configuration(self, rules: str, closed_port: int) -> str:
        """prometheus.yml. Nobody may listen at `closed_port`."""
        at = f"127.0.0.1:{self._server.server_address[1]}"
        found = [
            {"targets": [at], "labels": {**process.labels, "__metrics_path__": path}}
            for path, process in self.processes.items()
        ]
        found.append({"targets": [f"127.0.0.1:{closed_port}"], "labels": GONE})
        return yaml.safe_dump(
            {
                "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"},
                "rule_files": [rules],
                "scrape_configs": [{"job_name": "fathom", "static_configs": found}],
            }
        )


def _processes() -> list[Process]:
    found = []
    for number, run in enumerate(RUNS):
        found.append(Process({"run": run, "role": "driver", "node": NODES[0]}, ("driver",), number))
        for rank in range(2):
            parts: tuple[Part, ...] = ("rank", "first-rank") if rank == 0 else ("rank",)
            labels = {"run": run, "role": "train", "node": NODES[rank], "rank": str(rank)}
            found.append(Process(labels, parts, 2 * number + rank))
    found.append(Process({"run": LABELLING, "role": "label-driver", "node": NODES[0]}, ("label-driver",), 0))
    for number, node in enumerate(NODES):
        found.append(
            Process({"run": LABELLING, "role": "label", "node": node, "worker": f"{node}/{number}"}, ("label",), number)
        )
        found.append(Process({"role": "ray", "node": node, "ip": f"10.0.0.{number + 1}"}, (), number))
    return found


def _one(names: tuple[str, ...], which: str) -> dict[str, float]:
    return {name: float(name == which) for name in names}


def _each(metric: Any, values: Any, verb: str) -> None:
    if not isinstance(values, Mapping):
        getattr(metric, verb)(values)
        return
    for labels, value in values.items():
        getattr(metric.labels(*(labels if isinstance(labels, tuple) else (labels,))), verb)(value)


class Prometheus:
    """The one on PATH, on a world, in a folder that is empty; `address` has no "http://"."""

    def __init__(self, world: World, folder: Path) -> None:
        with socket.socket() as own:
            own.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{own.getsockname()[1]}"
        self._nobody = socket.socket()  # has its port, and does not listen
        self._nobody.bind(("127.0.0.1", 0))
        closed_port = self._nobody.getsockname()[1]
        (folder / "rules.yml").write_text(rules())
        (folder / "prometheus.yml").write_text(world.configuration(str(folder / "rules.yml"), closed_port))
        self._command = [
            "prometheus", f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address={self.address}",
        ]  # fmt: skip
        self._log = folder / "prometheus.log"

    def __enter__(self) -> Self:
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                tied(self._command), stdin=subprocess.DEVNULL, stdout=log, stderr=log, process_group=0
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Again is nothing."""
        self._nobody.close()
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def until(self, query: str, patience_s: float = 60.0) -> None:
        """Waits for an expression to have a result."""
        ends = time.monotonic() + patience_s
        words = urllib.parse.urlencode({"query": query})
        while time.monotonic() < ends:
            assert self._process.poll() is None, self._log.read_text()
            with (
                contextlib.suppress(OSError, ValueError),
                urllib.request.urlopen(f"http://{self.address}/api/v1/query?{words}", timeout=10) as answer,
            ):
                if json.load(answer)["data"]["result"]:
                    return
            time.sleep(0.1)
        raise AssertionError(f"{query}: no result within {patience_s:.0f} s; {self._log.read_text()[-2000:]}")
