"""How a run's folder says that the run stands, and what it counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trainer.folder import RunFolder, last_end
from trainer.journal import Journal

STARTED, FINISHED = {"event": "started"}, {"event": "finished", "step": 4}


@pytest.mark.parametrize(
    ("journal", "step"),
    [
        ([], None),
        ([STARTED], None),
        ([STARTED, FINISHED], 4),
        ([STARTED, FINISHED, {"event": "checkpoint_passed_over"}], 4),  # a later look at it changes nothing
        ([STARTED, FINISHED, STARTED], None),  # longer now, and that is not done
        ([STARTED, FINISHED, STARTED, {"event": "failed"}], None),
        ([STARTED, {"event": "stopped", "step": 2}], None),
    ],
)
def test_whether_the_last_attempt_finished(tmp_path: Path, journal: list[dict[str, Any]], step: int | None) -> None:
    for line in journal:
        Journal(str(tmp_path)).write(**line)
    assert RunFolder(str(tmp_path)).finished_step() == step


def test_an_attempt_that_ended_without_a_word_has_no_end() -> None:
    assert last_end([STARTED, {"event": "failed", "error": "x"}]) == {"event": "failed", "error": "x"}
    assert last_end([FINISHED, STARTED, {"event": "checkpoint"}]) is None


def test_a_bad_sample_counts_once_however_many_met_it(tmp_path: Path) -> None:
    found = (("a", "bad_image"), ("b", "bad_target"))
    bad = [{"key": key, "shard": "0.tar", "reason": reason} for key, reason in found]
    folder = RunFolder(str(tmp_path))
    for rank, lines in enumerate((bad, [*bad, {"key": "a", "shard": "1.tar", "reason": "bad_image"}])):
        Path(folder.quarantine(rank)).write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert folder.quarantined() == {"bad_image": 2, "bad_target": 1}
