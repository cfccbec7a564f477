"""What the driver serves of its run's files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.exporter import Exporter
from trainer.account import RunAccount, Tail
from trainer.folder import RunFolder
from trainer.journal import Journal


def log(folder: Path, **line: Any) -> None:
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


def value(exporter: Exporter, name: str, **labels: str) -> float | None:
    list(exporter.registry.collect())  # as a scrape does
    return exporter.registry.get_sample_value(name, labels)


def test_files_are_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("time.time", lambda: now[0])
    journal, exporter = Journal(str(tmp_path)), Exporter("a", "driver")
    RunAccount(exporter, RunFolder(str(tmp_path)))
    assert value(exporter, "fathom_run_attempts") == 0
    assert value(exporter, "fathom_goodput_ratio") is None
    journal.write("started", attempt=1, resume=None)
    now[0] = 1010.0
    assert value(exporter, "fathom_run_state", state="STARTING") == 1
    assert value(exporter, "fathom_badput_seconds_total", cause="startup") == 10
    journal.write("running", attempt=1)
    log(tmp_path, time=1040.0, step=10, loss=1.0, spent={"step": 20.0, "data_wait": 10.0})
    assert value(exporter, "fathom_run_state", state="RUNNING") == 1
    assert value(exporter, "fathom_run_state", state="STARTING") == 0
    assert value(exporter, "fathom_goodput_ratio") == 0.5
    assert value(exporter, "fathom_run_elapsed_seconds") == 40
    now[0] = 1050.0
    journal.write("failed", attempt=1, kind="failed", error="OutOfMemory: rank 0", step=0)
    journal.write("started", attempt=2, resume=None)
    assert value(exporter, "fathom_restarts_total", reason="failed") == 1
    assert value(exporter, "fathom_device_oom_total") == 1
    assert value(exporter, "fathom_badput_seconds_total", cause="lost_work") == 20
    assert value(exporter, "fathom_goodput_ratio") == 0
    # another driver finds the same
    other = Exporter("a", "driver")
    RunAccount(other, RunFolder(str(tmp_path)))
    assert value(other, "fathom_restarts_total", reason="failed") == 1
    assert value(other, "fathom_badput_seconds_total", cause="lost_work") == 20


def test_a_tail_gives_whole_lines_once(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    tail = Tail(str(path))
    assert tail.new() == []
    path.write_text('{"a": 1}\n{"a"')
    assert tail.new() == [{"a": 1}]
    with path.open("a") as file:
        file.write(': 2}\n[3]\nnonsense\n{"a": 4}\n')
    assert tail.new() == [{"a": 2}, {"a": 4}]
    assert tail.new() == []
    path.write_text('{"a": 5}\n')  # another file
    assert tail.new() == [{"a": 5}]
