"""The worker group on real Ray: one embedded session for all tests of this file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.group import GroupResult, WorkerDied, WorkerError, run_group
from cluster.runtime import ClusterAddressError, Session, ray_session
from cluster.stop import StopFlag
from tests.cluster import work


@pytest.fixture(scope="module", autouse=True)
def session() -> Iterator[Session]:
    with ray_session(cpus=2) as session:
        yield session


def run(fn: Any, payload: dict[str, Any], folder: Path, **options: Any) -> GroupResult:
    return run_group(fn, payload, workers=2, name="test", storage_path=str(folder / ".ray"), stop=StopFlag(), **options)


def test_two_ranks_see_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # the workers import the checkout from anywhere
    reports: list[dict[str, Any]] = []
    before = dict(os.environ)
    result = run(work.add_ranks, {"steps": 5, "sleep_s": 0.3}, tmp_path, env={"EXTRA": "1"}, on_progress=reports.append)
    assert result.stop_reason is None
    assert result.value["sum"] == 3.0
    assert result.value["context"] == (0, 2, 0, "cpu")
    assert result.value["threads"] == 1
    assert result.value["environment"] == {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "CROSS_RANK": "0",
        "CROSS_SIZE": "1",
        "LOCAL_SIZE": "2",
        "OMP_NUM_THREADS": "1",
        "EXTRA": "1",
    }
    assert [report["rank"] for report in reports] == [0] * len(reports)
    assert reports[-1]["step"] == 4
    assert len(reports) >= 3
    assert dict(os.environ) == before
    assert list((tmp_path / ".ray").iterdir()) == []


def test_the_rank_s_own_exception_is_raised(tmp_path: Path) -> None:
    with pytest.raises(work.UserError) as caught:
        run(work.fail, {"rank": 1, "how": "raise"}, tmp_path)
    assert str(caught.value) == "field x: found 1, allowed 2"
    assert caught.value.exit_status == 2
    assert "rank 1:" in caught.value.__notes__[0]
    assert 'raise UserError("field x' in caught.value.__notes__[0]
    assert "UserError: field x" in (tmp_path / ".ray" / "test-failure.log").read_text()


def test_what_cannot_travel_is_told(tmp_path: Path) -> None:
    with pytest.raises(WorkerError) as caught:
        run(work.fail, {"rank": 1, "how": "odd"}, tmp_path)
    assert caught.value.exit_status == 2
    assert str(caught.value) == "OddError: this and that"
    assert "raise OddError" in caught.value.__notes__[0]


def test_a_killed_rank_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(WorkerDied, match=r"rank 1 died \(process \d+ on .*\): killed") as caught:
        run(work.fail, {"rank": 1, "how": "kill"}, tmp_path)
    assert caught.value.exit_status == 1
    assert "\n" not in str(caught.value)
    assert "rank 1" in (tmp_path / ".ray" / "test-failure.log").read_text()
    assert capfd.readouterr() == ("", "")


def test_more_workers_than_the_cluster_holds_are_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ClusterAddressError, match=r"999 workers need 999 CPUs, the cluster has \d+: use fewer"):
        run_group(work.add_ranks, {}, workers=999, name="x", storage_path=str(tmp_path), stop=StopFlag())
