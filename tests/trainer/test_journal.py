"""The journal survives whatever ends the process: torn lines are left out and never join the next one."""

from __future__ import annotations

import json
from pathlib import Path

from trainer.journal import Journal, logged_lines, read_json_lines


def test_what_is_written_is_read_in_order(tmp_path: Path) -> None:
    journal = Journal(str(tmp_path / "run"))
    assert journal.read() == []
    journal.write("started", resume=None, workers=2)
    journal.write("failed", error="a\nb \u2028 ü")
    first, second = journal.read()
    assert (first["event"], first["resume"], first["workers"]) == ("started", None, 2)
    assert (second["event"], second["error"]) == ("failed", "a\nb \u2028 ü")
    assert first["time"] <= second["time"]


def test_what_a_resume_left_behind_is_void_whatever_is_logged_after_it(tmp_path: Path) -> None:
    """A resumed run may log more seldom, and validations are lines too."""
    lines = [{"step": step, "loss": 1.0} for step in (1, 10, 20, 30)]
    lines += [{"step": 20, "event": "validation"}, {"step": 30, "event": "validation"}]
    lines += [{"step": 20, "event": "resumed"}, {"step": 40, "loss": 2.0}]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text)
    found = [(line["step"], line.get("event", line.get("loss"))) for line in logged_lines(str(tmp_path))]
    assert found == [(1, 1.0), (10, 1.0), (20, 1.0), (20, "validation"), (40, 2.0)]
    again = "".join(json.dumps({"step": step, "loss": 3.0}) + "\n" for step in (1, 10))
    (tmp_path / "metrics.jsonl").write_text(text + again)  # from the beginning: there was no checkpoint
    assert [line["loss"] for line in logged_lines(str(tmp_path))] == [3.0, 3.0]


def test_a_torn_last_line_is_left_out_and_closed(tmp_path: Path) -> None:
    journal = Journal(str(tmp_path))
    journal.write("started")
    journal.write("checkpoint", step=10)
    path = Path(journal.path)
    path.write_bytes(path.read_bytes()[:-8])
    assert [entry["event"] for entry in journal.read()] == ["started"]
    journal.write("stopped", step=12)
    assert [entry["event"] for entry in journal.read()] == ["started", "stopped"]


def test_lines_that_are_no_objects_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"a": 1}\n12\n[1]\n\n\xff\xfe\n{"b": 2}\n')
    assert read_json_lines(str(path)) == [{"a": 1}, {"b": 2}]
    assert read_json_lines(str(tmp_path / "absent")) == []
