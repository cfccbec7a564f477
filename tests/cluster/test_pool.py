"""The actor pool on real Ray: one embedded session for all tests of this file."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.failures import WorkerDied
from cluster.pool import PoolResult, run_pool
from cluster.runtime import ray_session
from cluster.stop import StopFlag
from tests.cluster import work


@pytest.fixture(scope="module", autouse=True)
def session() -> Iterator[None]:
    with ray_session(cpus=2):
        yield


def run(items: Any, folder: Path, stop: StopFlag | None = None, make: Any = None) -> tuple[PoolResult, list[Any]]:
    results: list[Any] = []
    result = run_pool(
        make or functools.partial(work.Worker, str(folder)),
        items,
        workers=2,
        on_result=lambda item, value: results.append((item, value)),
        stop=StopFlag() if stop is None else stop,
    )
    return result, results


def test_results_come_in_any_order_and_a_dead_actor_is_replaced(tmp_path: Path) -> None:
    result, results = run([1, 2.0, 3, "die once", 4, 5], tmp_path)
    assert result == PoolResult(done=6, complete=True)
    assert dict(results) == {1: 2, 2.0: 4.0, 3: 6, "die once": "survived", 4: 8, 5: 10}


def test_an_item_that_kills_its_actor_every_time_ends_the_pool(tmp_path: Path) -> None:
    with pytest.raises(WorkerDied, match="died 3 times on item 'die'") as caught:
        run(["die"], tmp_path)
    assert "\n" not in str(caught.value)


def test_an_exception_ends_the_pool_as_itself(tmp_path: Path) -> None:
    with pytest.raises(work.UserError, match="item bad: found 1, allowed 2") as caught:
        run([1, "bad", 3], tmp_path)
    assert caught.value.exit_status == 2
    assert "raise UserError" in caught.value.__notes__[0]
    with pytest.raises(work.UserError, match="weights: no such file"):
        run([1], tmp_path, make=work.broken_worker)


def test_a_stop_finishes_what_is_in_flight(tmp_path: Path) -> None:
    stop, taken = StopFlag(), []

    def items() -> Iterator[float]:
        for number in range(100):
            taken.append(number)
            if number == 3:
                stop.set("SIGTERM")
            yield 0.2 + number / 1e6

    result, results = run(items(), tmp_path, stop)
    assert not result.complete
    assert taken == [0, 1, 2, 3]
    assert result.done == len(results) == 4
