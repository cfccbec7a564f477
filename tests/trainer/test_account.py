"""What the driver serves of its run's files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.exporter import Exporter
from trainer.account import Folded, RunAccount, Tail
from trainer.folder import RunFolder
from trainer.goodput import goodput_of
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


@pytest.mark.parametrize("kept", [0, 150, 730, 1000])
def test_lines_are_folded_and_mean_the_same(kept: int) -> None:
    """Two attempts of 1,000 and 500 lines, of which the second goes on from step `kept`."""
    at, lines, journal = 0.0, [], [{"time": 0.0, "event": "started", "attempt": 1}]
    for attempt, count in ((1, 1000), (2, 500)):
        if attempt == 2:
            journal.append({"time": at + 5, "event": "failed", "kind": "died"})
            journal.append({"time": at + 9, "event": "started", "attempt": 2, "resume": f"step_{kept:08d}"})
            at += 9
        at += 20.0
        for number in range(1, count + 1):
            spent = {"step": 2.0 + number % 7, "data_wait": 0.5, "other": 0.1}
            if number % 50 == 0:
                spent["checkpoint"] = 3.0
            at += sum(spent.values())
            lines.append({"time": at, "step": number + (kept if attempt == 2 else 0), "spent": spent})
        lines.append({"time": at, "step": 0, "event": "validation", "values": {}})
    folded = Folded()
    for line in [*lines, {"time": at}, {"step": 3, "spent": {}}, {"time": "x", "step": 1, "spent": {}}]:
        folded.add(line, [one["time"] for one in journal if one["event"] == "started"])
    assert len(folded.lines) == 15
    exact, found = goodput_of(journal, lines, at), goodput_of(journal, folded.lines, at)
    assert found.elapsed_s == pytest.approx(exact.elapsed_s)
    assert found.productive_s == pytest.approx(exact.productive_s, rel=0.002)
    for cause, seconds in exact.badput_s.items():
        near = {"rel": 0.01} if cause == "lost_work" else {"rel": 1e-9}
        assert found.badput_s[cause] == pytest.approx(seconds, **near), cause
    assert (exact.badput_s["lost_work"] > 0) == (kept < 1000)
