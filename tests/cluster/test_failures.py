"""Which of all that ranks say is the cause."""

from __future__ import annotations

from pathlib import Path

import pytest
from ray.exceptions import ActorDiedError
from ray.train.v2.api.exceptions import WorkerGroupError

from cluster.control import About
from cluster.failures import MachineLost, WorkerDied, WorkerError, explain

ABOUT = {
    rank: About(pid=100 + rank, born=0.0, host=f"host{rank}", node=f"node{rank}", actor=None, shared_memory="")
    for rank in range(3)
}
EVERYWHERE = {"node0", "node1", "node2"}


def explained(folder: Path, alive: set[str], **ranks: Exception) -> BaseException:
    failures = {int(name[1:]): error for name, error in ranks.items()}
    log = folder / "run-failure.log"
    found = explain(WorkerGroupError("failed", failures), ABOUT, alive, str(folder), str(log))
    assert all(str(error) in log.read_text() for error in ranks.values())
    return found


@pytest.mark.parametrize(
    "said",
    [
        RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.0.0.2]:3321"),
        RuntimeError("[gloo/transport/tcp/pair.cc:534] Read error [10.0.0.2]:3321: Connection timed out"),
        RuntimeError("[gloo/transport/tcp/pair.cc:534] Application timeout caused pair closure"),
        RuntimeError("NCCL error in: NCCLUtils.cpp:94, remote process exited or there was a network error"),
        RuntimeError("ncclSystemError: System call (e.g. socket, malloc) or external library call failed"),
        WorkerError("DistBackendError: [Rank 0] Watchdog caught collective operation timeout"),
    ],
)
def test_a_death_is_the_cause_of_what_the_others_say_of_their_collectives(tmp_path: Path, said: Exception) -> None:
    found = explained(tmp_path, EVERYWHERE, r0=said, r1=ActorDiedError())
    assert isinstance(found, WorkerDied) and "rank 1 died (process 101 on host1)" in str(found)


def test_a_machine_that_is_gone_is_the_cause_of_everything(tmp_path: Path) -> None:
    found = explained(tmp_path, {"node0"}, r0=ValueError("whatever"), r1=ActorDiedError(), r2=ActorDiedError())
    assert isinstance(found, MachineLost) and "rank 1 was lost with its machine" in str(found)


def test_where_nobody_knows_which_are_there_none_is_lost(tmp_path: Path) -> None:
    assert isinstance(explained(tmp_path, set(), r1=ActorDiedError()), WorkerDied)


def test_an_exception_of_the_work_is_the_cause_of_a_death_elsewhere(tmp_path: Path) -> None:
    """Ray Train kills the others."""
    error = ValueError("a loss of 7 terms")
    assert explained(tmp_path, EVERYWHERE, r0=ActorDiedError(), r2=error) is error


def test_of_several_the_lowest_rank_s_counts_and_what_is_plainly_another_s_does_not(tmp_path: Path) -> None:
    first, second = ValueError("1"), ValueError("2")
    assert explained(tmp_path, EVERYWHERE, r2=second, r1=first, r0=RuntimeError("Connection reset by peer")) is first


def test_a_collective_s_error_is_one_where_nobody_died(tmp_path: Path) -> None:
    error = RuntimeError("NCCL error: unhandled cuda error")
    assert explained(tmp_path, EVERYWHERE, r0=error) is error
