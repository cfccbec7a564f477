"""Prometheus: its configuration, and a server of our own on loopback where the machine has the program."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import yaml

from cluster import storage
from cluster.monitor import grafana
from cluster.monitor.alerts import rules
from cluster.runtime import ClusterError
from cluster.tied import tied

PROGRAM = "prometheus"
LOOPBACK = "127.0.0.1"
DIRECTLY = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # the environment's proxy knows no loopback
_RAY_EVERY_S = 10.0  # Ray's agents look no more often
# Of Ray's thousand lines a node, those about nodes, actors and processes.
_OF_RAY = "ray_(node|component|actors|tasks|resources|object_store|cluster_active_nodes|running_jobs).*"
_READY_S = 60.0
_STOP_S = 20.0


class MonitorError(ClusterError):
    """The monitor cannot do what was asked: what is in the way, and the remedy, in one line."""

    exit_status = 2


@dataclass(frozen=True, kw_only=True)
class Settings:
    """`interval_s`: between two scrapes. `keep`: how long samples stay, as Prometheus writes it (90d).
    `alertmanagers`: `host:port` of those that are to be told of alerts."""

    interval_s: float = 5.0
    keep: str = "90d"
    alertmanagers: tuple[str, ...] = ()


def configuration(targets: str, rule_file: str, settings: Settings) -> str:
    """prometheus.yml for the `file_sd` file `targets`; both paths absolute."""
    return yaml.safe_dump(
        {
            "global": {
                "scrape_interval": _duration(settings.interval_s),
                "scrape_timeout": _duration(settings.interval_s),
                "evaluation_interval": _duration(settings.interval_s),
            },
            "rule_files": [rule_file],
            **(
                {"alerting": {"alertmanagers": [{"static_configs": [{"targets": list(settings.alertmanagers)}]}]}}
                if settings.alertmanagers
                else {}
            ),
            "scrape_configs": [
                _job("fathom", targets, "drop", {}),
                _job(
                    "ray",
                    targets,
                    "keep",
                    {
                        "scrape_interval": _duration(max(_RAY_EVERY_S, settings.interval_s)),
                        "scrape_timeout": _duration(max(_RAY_EVERY_S, settings.interval_s)),
                        "metric_relabel_configs": [
                            {"source_labels": ["__name__"], "regex": _OF_RAY, "action": "keep"},
                            {"regex": "otel_scope_.*|SessionName|Version", "action": "labeldrop"},
                        ],
                    },
                ),
            ],
        },
        sort_keys=False,
        width=1000,
    )


def write_files(folder: str, targets: str, settings: Settings) -> dict[str, str]:
    """Configuration, rules and Grafana's dashboards in `folder`; returns their paths by what they are."""
    paths = {name: os.path.join(folder, name) for name in ("prometheus.yml", "rules.yml", "grafana")}
    storage.atomic_write(paths["rules.yml"], rules())
    storage.atomic_write(paths["prometheus.yml"], configuration(targets, paths["rules.yml"], settings))
    grafana.write(paths["grafana"])
    return paths


class Server:
    """A Prometheus of this process, from `start` until `stop`; it ends with the process as well. Data and its output
    (prometheus.log) are in `folder`."""

    def __init__(self, folder: str, configuration: str, keep: str, port: int | None = None) -> None:
        self._folder, self._configuration, self._keep = folder, configuration, keep
        self._port = port
        self._process: subprocess.Popen[bytes] | None = None
        self.address = ""

    def start(self) -> None:
        """Returns when it answers. MonitorError where there is no such program, or it does not come up."""
        port = self._port = self._port or free_port()  # the same one again, if it is started again
        self.address = f"{LOOPBACK}:{port}"
        try:  # another server there would answer for ours
            socket.create_server((LOOPBACK, port)).close()
        except OSError as error:
            what = f"{PROGRAM} cannot listen at {self.address} ({error.strerror}); choose another port"
            raise MonitorError(what) from None
        command = [
            program(),
            f"--config.file={self._configuration}",
            f"--storage.tsdb.path={os.path.join(self._folder, 'data')}",
            f"--storage.tsdb.retention.time={self._keep}",
            f"--web.listen-address={self.address}",
        ]
        log = os.path.join(self._folder, "prometheus.log")
        with open(log, "ab") as output:
            self._process = subprocess.Popen(
                tied(command), stdin=subprocess.DEVNULL, stdout=output, stderr=output, process_group=0
            )
        ends = time.monotonic() + _READY_S
        while time.monotonic() < ends:
            if not self.runs():
                raise MonitorError(f"{PROGRAM} ended at once: {_last_line(log)} ({log})")
            with suppress(OSError), DIRECTLY.open(f"http://{self.address}/-/ready", timeout=5) as answer:
                if answer.status == 200:
                    return
            time.sleep(0.1)
        self.stop()
        raise MonitorError(f"{PROGRAM} was not ready within {_READY_S:.0f} s; look at {log}")

    def runs(self) -> bool:
        """Whether it is there."""
        return self._process is not None and self._process.poll() is None

    def stop(self) -> None:
        """Let it write what it holds, and end. Again is nothing."""
        process, self._process = self._process, None
        if process is None:
            return
        with suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def program() -> str:
    """The path of Prometheus. MonitorError where there is none."""
    found = shutil.which(PROGRAM)
    if found is None:
        raise MonitorError(
            f"no program `{PROGRAM}` on PATH: install it (Debian and Ubuntu: apt install prometheus), or have a site's "
            "own take over what `fathom monitor config` prints"
        )
    return found


def free_port(host: str = LOOPBACK) -> int:
    """One that nobody uses now."""
    with socket.socket() as asking:
        asking.bind((host, 0))
        return int(asking.getsockname()[1])


def _job(name: str, targets: str, ray: str, more: dict[str, Any]) -> dict[str, Any]:
    return {
        "job_name": name,
        "file_sd_configs": [{"files": [targets], "refresh_interval": "5s"}],
        "relabel_configs": [{"source_labels": ["role"], "regex": "ray", "action": ray}],
        **more,
    }


def _duration(seconds: float) -> str:
    return f"{round(seconds * 1000)}ms" if seconds % 1 else f"{round(seconds)}s"


def _last_line(log: str) -> str:
    """The last that speaks of an error, or the last."""
    with suppress(OSError), open(log, encoding="utf-8", errors="replace") as file:
        lines = [line.strip() for line in file if line.strip()]
        told = [line for line in lines if "err=" in line or "rror" in line]
        if lines:
            return (told or lines)[-1]
    return "it said nothing"
