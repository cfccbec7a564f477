"""Metrics: each declared once in METRICS, served by one HTTP port per process, found through a file_sd folder.

Not `ray.util.metrics`: its histogram sums are bucket mid-points, and series of dead actors linger. One process has
one registry and one port (0: any free one), and one JSON file in the discovery folder, gone when the process leaves.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import secrets
import socket
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from cluster import storage

# From a millisecond (a tiny network on a CPU) to ten minutes (a step that waits for a checkpoint or for data).
_STEP_BUCKETS_S = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 600.0)

_QUALITY_BUCKETS = tuple(round(0.05 * number, 2) for number in range(1, 21))


@dataclass(frozen=True)
class Metric:
    """One declaration. Base units only; a counter's name ends in `_total`, a time in `_seconds`."""

    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


METRICS: Mapping[str, Metric] = {
    "fathom_images_total": Metric("counter", "Images in optimizer steps, without rows that fill up a pass."),
    "fathom_samples_skipped_total": Metric("counter", "Samples with weight 0, by reason.", ("reason",)),
    "fathom_data_read_bytes_total": Metric("counter", "Bytes of shards asked for, prefetched batches included."),
    "fathom_data_cache_hits_total": Metric("counter", "Reads of shards behind a URL from a local copy."),
    "fathom_data_cache_misses_total": Metric("counter", "Local copies of shards that had to be made."),
    "fathom_steps_total": Metric("counter", "Optimizer steps taken."),
    "fathom_steps_skipped_total": Metric("counter", "Steps whose update was not applied, by reason.", ("reason",)),
    "fathom_step_duration_seconds": Metric("histogram", "Wall time of one optimizer step.", buckets=_STEP_BUCKETS_S),
    "fathom_phase_seconds_total": Metric("counter", "Wall time by phase of a step and of the run.", ("phase",)),
    "fathom_rank_slowdown_ratio": Metric("gauge", "Time of this rank's own work in a step, over the median rank's."),
    "fathom_last_step_timestamp_seconds": Metric("gauge", "When the last optimizer step ended, since the epoch."),
    "fathom_loss": Metric("gauge", "The last step's loss over the global batch, by term.", ("term",)),
    "fathom_grad_norm": Metric("gauge", "The last step's gradient norm before clipping."),
    "fathom_learning_rate": Metric("gauge", "The last step's learning rate, by parameter group.", ("group",)),
    "fathom_event_result": Metric(
        "gauge", "Results that are measured now and then, such as a validation's.", ("event", "name")
    ),
    "fathom_tracker_failures_total": Metric(
        "counter", "Calls to TensorBoard or Weights & Biases that were lost, by tracker.", ("tracker",)
    ),
    "fathom_checkpoint_duration_seconds": Metric(
        "histogram", "Wall time of one checkpoint operation (save, load).", ("op",), _STEP_BUCKETS_S
    ),
    "fathom_checkpoint_stall_seconds_total": Metric("counter", "Time that training waited for checkpoints."),
    "fathom_record_failures_total": Metric("counter", "Log lines and previews that could not be written."),
    "fathom_checkpoint_failures_total": Metric("counter", "Checkpoints that could not be written; the run went on."),
    "fathom_checkpoint_last_success_timestamp_seconds": Metric(
        "gauge", "When the last checkpoint was complete, since the epoch."
    ),
    "fathom_world_size": Metric("gauge", "Ranks in the worker group."),
    "fathom_build_info": Metric("gauge", "Always 1; the labels say what runs.", ("version", "torch")),
    "fathom_label_images_total": Metric("counter", "Images pseudo-labelled and committed."),
    "fathom_label_failures_total": Metric("counter", "Images without a label, by reason.", ("reason",)),
    "fathom_label_quality": Metric("histogram", "Agreement of the predictions of an image.", buckets=_QUALITY_BUCKETS),
    "fathom_label_shards": Metric("gauge", "Label shards, by state.", ("state",)),
    "fathom_label_leases_expired_total": Metric("counter", "Leases of shards that ended without a word."),
    "fathom_label_shards_speculated_total": Metric("counter", "Shards given to a second worker at the end."),
    "fathom_label_shards_late_total": Metric("counter", "Shards done by somebody else when they were done."),
    "fathom_label_shards_differing_total": Metric("counter", "Late shards of other bytes: hardware is mixed."),
    "fathom_label_worker_deaths_total": Metric("counter", "Shards whose worker died."),
}


def make_metric(name: str, registry: CollectorRegistry) -> Any:
    """The prometheus_client object for a declared name. KeyError for any other."""
    declared = METRICS[name]
    if declared.kind == "histogram":
        return Histogram(name, declared.help, declared.labels, buckets=declared.buckets, registry=registry)
    kind = {"counter": Counter, "gauge": Gauge}[declared.kind]
    return kind(name, declared.help, declared.labels, registry=registry)


class Exporter:
    """Serves this process's metrics over HTTP while its block runs, on loopback unless `host` says otherwise.

    `discovery`: the folder of the file_sd entries (a local path), or None. A process that is killed leaves its entry
    behind; whoever started it removes the folder. StorageError when the folder cannot be written; OSError when
    the port is taken.
    """

    def __init__(
        self,
        run: str,
        rank: int,
        role: str = "train",
        host: str = "127.0.0.1",
        port: int = 0,
        discovery: str | None = None,
    ) -> None:
        self.registry = CollectorRegistry()
        self._labels = {"run": run, "rank": str(rank), "role": role}
        self._host, self._port, self._discovery = host, port, discovery
        self._metrics: dict[str, Any] = {}
        self._lock = threading.Lock()
        self._server: WSGIServer | None = None
        self._thread: threading.Thread | None = None
        self._entry: str | None = None

    def __enter__(self) -> Exporter:
        self._server, self._thread = start_http_server(self._port, self._host, self.registry)
        try:
            self.metric("fathom_build_info").labels(**_build()).set(1)
            if self._discovery is not None:
                name = f"{self._labels['role']}-{self._labels['rank']}-{os.getpid()}-{secrets.token_hex(4)}.json"
                entry = storage.join(self._discovery, name)
                storage.atomic_write(entry, json.dumps([{"targets": [self.address], "labels": self._labels}]) + "\n")
                self._entry = entry
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
        host = socket.gethostname() if self._host in ("0.0.0.0", "::", "") else self._host
        return f"{host}:{self._server.server_port}"

    def metric(self, name: str) -> Any:
        """The Counter, Gauge or Histogram declared as `name`, made at first use. KeyError when it is not declared."""
        with self._lock:
            if name not in self._metrics:
                self._metrics[name] = make_metric(name, self.registry)
            return self._metrics[name]

    def close(self) -> None:
        """Remove the entry, stop the server and its thread, free the port. Again is nothing."""
        if self._entry is not None:
            with suppress(OSError):
                os.unlink(self._entry)
            self._entry = None
        if self._server is not None and self._thread is not None:
            self._server.shutdown()
            self._server.server_close()
            self._thread.join(timeout=5)
            self._server = self._thread = None


def _build() -> dict[str, str]:
    versions = {}
    for label, distribution in (("version", "fathom-depth"), ("torch", "torch")):
        try:
            versions[label] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            versions[label] = "unknown"
    return versions
