"""The worker group on real Ray: one embedded session for all tests of this file."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from socket import SOCK_DGRAM
from typing import Any

import psutil
import pytest

from cluster.direction import Watch
from cluster.failures import WorkerDied, WorkerError, WorkerHung
from cluster.group import GroupResult, run_group
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


def test_nothing_listens_on_anything_but_loopback(tmp_path: Path) -> None:
    """Ray's processes, the ranks' store, gloo: who reaches one of them from elsewhere may run what he likes."""
    found: dict[str, str] = {}

    def look(report: dict[str, Any]) -> None:
        own = {process.pid: process for process in (psutil.Process(), *psutil.Process().children(recursive=True))}
        for socket in psutil.net_connections("inet"):
            if socket.pid in own and (socket.status == psutil.CONN_LISTEN or socket.type == SOCK_DGRAM):
                found[f"{socket.laddr.ip} {socket.laddr.port}"] = " ".join(own[socket.pid].cmdline())

    run(work.add_ranks, {"steps": 4, "sleep_s": 0.5}, tmp_path, on_progress=look)
    assert any("RayTrainWorker" in command for command in found.values()), found
    assert {where for where in found if not where.removeprefix("::ffff:").startswith("127.")} == set()


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


def watched(folder: Path, **settings: float) -> Watch:
    return Watch(stacks=str(folder / "stacks"), **settings)  # type: ignore[arg-type]


def test_a_rank_that_sleeps_is_named_and_all_are_ended(tmp_path: Path) -> None:
    """The other waits for it in a collective, which has no end of its own."""
    watch = watched(tmp_path, shortest_s=2.0, factor=10.0)
    with pytest.raises(WorkerHung) as caught:
        run(work.hang, {"rank": 1, "how": "sleep", "folder": str(tmp_path)}, tmp_path, watch=watch)
    said = str(caught.value)
    assert said.startswith("rank 1 has been in the phase 'data' of step 6 for ")
    assert f"(process {pid_of(tmp_path, 1)} on " in said
    stacks = {path.name: path.read_text() for path in (tmp_path / "stacks").iterdir()}
    assert stacks.keys() == {"rank-0.txt", "rank-1.txt"}
    assert "in lie_down" in stacks["rank-1.txt"] and "in all_reduce" in stacks["rank-0.txt"]
    assert watch.learned["step"] < 2
    assert not [rank for rank in (0, 1) if psutil.pid_exists(pid_of(tmp_path, rank))]


def test_a_stopped_process_is_found_by_its_silence_and_killed(tmp_path: Path) -> None:
    watch = watched(tmp_path, silence_s=4.0)
    (tmp_path / "stacks").mkdir()
    for rank in (0, 1):
        (tmp_path / "stacks" / f"rank-{rank}.txt").write_text("of an earlier attempt of this number")
    with pytest.raises(WorkerHung) as caught:
        run(work.hang, {"rank": 1, "how": "stop", "folder": str(tmp_path)}, tmp_path, watch=watch)
    said = str(caught.value)
    assert said.startswith("rank 1 has not been heard of for ") and ", stopped); stacks in " in said
    assert [path.name for path in (tmp_path / "stacks").iterdir()] == ["rank-0.txt"]
    assert "in all_reduce" in (tmp_path / "stacks" / "rank-0.txt").read_text()
    assert not psutil.pid_exists(pid_of(tmp_path, 1))


def test_without_the_actor_between_driver_and_ranks_the_group_is_ended(tmp_path: Path) -> None:
    """Nobody would watch it, nor could anybody stop it."""

    def kill_the_actor() -> None:
        ends = time.monotonic() + 120
        while not all((tmp_path / f"pid-{rank}").exists() for rank in (0, 1)) and time.monotonic() < ends:
            time.sleep(0.1)
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if "ray::Control" in " ".join(process.cmdline()):
                    process.kill()

    thread = threading.Thread(target=kill_the_actor)
    thread.start()
    with pytest.raises(WorkerDied, match="the actor between the driver and the ranks has died"):
        run(work.hang, {"rank": 1, "how": "sleep", "folder": str(tmp_path)}, tmp_path, watch=watched(tmp_path))
    thread.join()
    ends = time.monotonic() + 30  # those that the driver had not heard of yet go with what they were placed on
    while any(psutil.pid_exists(pid_of(tmp_path, rank)) for rank in (0, 1)):
        assert time.monotonic() < ends, "a rank is left"
        time.sleep(0.1)


def test_a_group_that_moves_is_left_alone(tmp_path: Path) -> None:
    watch = watched(tmp_path, shortest_s=2.0)
    result = run(work.hang, {"rank": -1, "how": "", "folder": str(tmp_path)}, tmp_path, watch=watch)
    assert result.value == "done" and not (tmp_path / "stacks").exists()


def pid_of(folder: Path, rank: int) -> int:
    return int((folder / f"pid-{rank}").read_text())


def test_more_workers_than_the_cluster_holds_are_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ClusterAddressError, match=r"999 workers need 999 CPUs, the cluster has \d+: use fewer"):
        run_group(work.add_ranks, {}, workers=999, name="x", storage_path=str(tmp_path), stop=StopFlag())
