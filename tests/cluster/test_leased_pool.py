"""The leased pool on real Ray: one embedded session for all tests of this file."""

from __future__ import annotations

import functools
import json
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from cluster.claims import Claims, read_claims
from cluster.failures import WorkerDied
from cluster.lease_actor import _AHEAD_LEAST, LeaseActor, Settings, View, Worker
from cluster.leased_pool import LeasedResult, Need, run_leased
from cluster.leases import Lease
from cluster.runtime import ClusterAddressError, ray_session
from cluster.stop import StopFlag
from cluster.storage import StorageError
from tests.cluster import leased_work
from tests.cluster.work import UserError


@pytest.fixture(scope="module", autouse=True)
def session() -> Iterator[None]:
    with ray_session(cpus=4):
        yield


class Run:
    """One call, and what it showed."""

    def __init__(self, folder: Path, items: Sequence[str], **options: Any) -> None:
        self.folder, self.items, self.options = folder, items, options
        self.results: list[tuple[str, Any]] = []
        self.views: list[View] = []
        self.result: LeasedResult | None = None

    def __call__(self) -> Run:
        options: dict[str, Any] = {
            "make": functools.partial(leased_work.Processor, str(self.folder)),
            "listed": functools.partial(leased_work.listed, str(self.folder)),
            "claims": str(self.folder / "leases"),
            "need": Need(),
            "workers": 2,
            "stop": StopFlag(),
            "ttl_s": 4.0,
            **self.options,
        }
        self.result = run_leased(items=self.items, on_look=self.look, **options)
        return self

    def look(self, view: View) -> None:
        self.views.append(view)
        self.results += view.results

    def began(self) -> Counter[str]:
        return Counter(line.split()[0] for line in (self.folder / "began").read_text().splitlines())


def names(count: int, what: str = "plain") -> list[str]:
    return [f"{what}-{number:03d}" for number in range(count)]


def test_every_item_once_and_nothing_left_behind(tmp_path: Path) -> None:
    run = Run(tmp_path, names(30, "slow8"))()
    assert run.result is not None and run.result.complete
    assert sorted(item for item, _ in run.results) == names(30, "slow8")
    assert set(run.began().values()) == {1}
    tokens = [result["token"] for _, result in run.results]
    assert len(set(tokens)) == 30
    assert len({line.split()[1] for line in (tmp_path / "began").read_text().splitlines()}) == 2
    assert read_claims(str(tmp_path / "leases")) == []
    again = Run(tmp_path, names(32, "slow8"))()
    assert sorted(item for item, _ in again.results) == names(32, "slow8")[30:]


def test_who_dies_is_replaced_and_his_item_done_by_another(tmp_path: Path) -> None:
    run = Run(tmp_path, ["dieonce-0", *names(6), "dieonce-1"])()
    assert run.result is not None and run.result.complete
    assert {item for item, _ in run.results} == {"dieonce-0", "dieonce-1", *names(6)}
    assert run.began()["dieonce-0"] == run.began()["dieonce-1"] == 2
    assert run.result.view.counts.deaths == 2 and not run.result.view.given_up


def test_an_item_that_kills_everybody_is_given_up_and_the_others_are_done(tmp_path: Path) -> None:
    run = Run(tmp_path, ["die-0", *names(12, "slow5")])()
    assert run.result is not None and run.result.complete
    assert list(run.result.view.given_up) == ["die-0"]
    assert "5 workers died on it" in run.result.view.given_up["die-0"]
    assert len(run.results) == 12


def test_items_with_wrong_data_are_named_and_a_store_that_is_away_is_asked_again(tmp_path: Path) -> None:
    run = Run(tmp_path, ["wrong-0", "away-0", *names(3)])()
    assert run.result is not None and run.result.complete
    assert dict(run.result.view.given_up) == {"wrong-0": "wrong-0: found 1, allowed 2"}
    assert {item for item, _ in run.results} == {"away-0", *names(3)}
    assert any(view.trouble == "away-0: no answer" for view in run.views)


def test_a_file_that_another_run_has_swept_away_is_no_full_disk(tmp_path: Path) -> None:
    run = Run(tmp_path, ["swept-0", *names(3)])()
    assert run.result is not None and run.result.complete and not run.result.view.given_up
    assert {item for item, _ in run.results} == {"swept-0", *names(3)}
    assert 2 <= run.began()["swept-0"] <= 2 + run.result.view.counts.speculated  # an idle worker may take it as well


def test_a_ledger_that_cannot_be_read_any_more_ends_the_run(tmp_path: Path) -> None:
    """It is read again in a thread, once another run has left, and nobody would get an item without that thread."""
    other = Claims(str(tmp_path / "leases"), "0badc0de", 60.0)
    other.claim([])
    options: dict[str, Any] = {"listed": functools.partial(leased_work.listed_once, str(tmp_path))}
    run = Run(tmp_path, names(200, "slow10"), workers=1, **options)
    run.look = lambda view: other.withdraw() if view.others else None  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"labels\.json is gone"):
        run()


def test_a_full_disk_ends_the_run_as_itself(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="the disk is full"):
        Run(tmp_path, ["full-0", *names(3, "slow100")])()


def test_workers_that_fail_one_after_the_other_end_the_run(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="of no item in particular"):
        Run(tmp_path, names(40, "broken"))()


def test_a_processor_that_cannot_be_made_ends_the_run_as_itself(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="weights: no such file") as caught:
        Run(tmp_path, names(3), make=leased_work.no_processor)()
    assert caught.value.exit_status == 2
    with pytest.raises(WorkerDied, match="5 workers in a row died while starting"):
        Run(tmp_path, names(3), make=leased_work.stillborn)()


def test_a_lost_machine_takes_all_its_workers_along_while_they_start(tmp_path: Path) -> None:
    make = functools.partial(leased_work.stillborn_at_first, str(tmp_path), 6)
    run = Run(tmp_path, names(8), workers=4, make=make)()
    assert run.result is not None and run.result.complete and len(run.results) == 8


def test_a_lease_actor_that_starts_again_learns_what_its_driver_knows(tmp_path: Path) -> None:
    """Who is at work but stopped, so that nobody hears of him, and that no item is to be begun any more."""
    listed = functools.partial(leased_work.listed, str(tmp_path))
    actor = LeaseActor(Settings(run="0badcafe", items=names(3), listed=listed, claims=str(tmp_path / "l"), ttl_s=0.2))
    try:
        assert actor.look(["0000000a"]).stuck == frozenset()
        time.sleep(0.7)  # three times as long as a lease
        assert actor.look(["0000000a", "0000000b"]).stuck == {"0000000a"}
        worker = Worker(owner="0000000b", node="n", host="h", pid=1, device="test")
        assert actor.take(worker) is not None
        actor.look(["0000000b"], stopped=True)
        actor.look(["0000000b"])
        assert actor.take(worker) is None
    finally:
        actor.close()


@pytest.fixture
def actor(tmp_path: Path) -> Iterator[Callable[..., LeaseActor]]:
    made: list[LeaseActor] = []

    def make(items: Sequence[str], **options: Any) -> LeaseActor:
        listed = functools.partial(leased_work.listed, str(tmp_path))
        given = {"run": "0badcafe", "claims": str(tmp_path / "l"), "ttl_s": 60.0, **options}
        made.append(LeaseActor(Settings(items=items, listed=listed, **given)))
        return made[-1]

    yield make
    for each in made:
        each.close()


def taken(actor: LeaseActor, worker: Worker) -> Lease:
    ends = time.monotonic() + 10
    while not isinstance(got := actor.take(worker), Lease):
        assert time.monotonic() < ends, "nothing to do"
        time.sleep(0.01)
    return got


ANN = Worker(owner="0000000a", node="n", host="h", pid=1, device="test")
BOB = Worker(owner="0000000b", node="n", host="h", pid=2, device="test")


def test_items_that_are_given_up_keep_nobody_waiting(actor: Any) -> None:
    """Others are claimed in their place at once, not at the next beat."""
    it = actor(names(40))
    for turn in range(40):
        lease = taken(it, ANN)
        if turn % 2:
            it.give_up(lease.item, "broken")
        else:
            it.drop(lease.item, lease.token, away="no answer")
            it.give_up(lease.item, "no answer")
    assert it.look().finished


def test_who_comes_late_is_heard(actor: Any) -> None:
    """What he found out of the one before him: here, that their bytes differ."""
    it = actor(names(1))
    lease = taken(it, ANN)
    assert it.complete(lease.item, lease.token, "first") and not it.complete(lease.item, 99, "second")
    view = it.look()
    assert (view.results, view.late) == ([(lease.item, "first")], [(lease.item, "second")])
    assert it.look().late == []


def test_a_folder_of_claims_that_cannot_be_written_ends_the_run(tmp_path: Path, actor: Any) -> None:
    """Nobody would ever get an item."""
    (tmp_path / "l").write_text("a file")
    it = actor(names(3))
    ends = time.monotonic() + 10
    while (error := it.look().fatal) is None and time.monotonic() < ends:
        time.sleep(0.02)
    assert isinstance(error, StorageError) and str(tmp_path / "l") in str(error)
    assert it.take(ANN) is None


def test_a_worker_that_says_nothing_loses_its_item_and_then_its_place(tmp_path: Path) -> None:
    """Stopped, as on a machine that swaps: Ray sees a living process, the lease runs out."""
    items = ["stuck-0", *names(8, "slow99")]
    run = Run(tmp_path, items, ttl_s=1.5)()
    assert run.result is not None and run.result.complete
    assert {item for item, _ in run.results} == set(items)
    assert run.result.view.counts.expired == 1
    assert len({line.split()[1] for line in (tmp_path / "began").read_text().splitlines()}) == 3


def test_a_stop_finishes_what_is_in_hand(tmp_path: Path) -> None:
    stop = StopFlag()
    items = names(20, "slow40")
    run = Run(tmp_path, items, stop=stop)

    def look(view: View) -> None:
        run.results += view.results
        if view.counts.leased == 2:
            stop.set("SIGTERM")

    run.look = look  # type: ignore[method-assign]
    run()
    assert run.result is not None and not run.result.complete
    assert sorted(item for item, _ in run.results) == sorted(os.listdir(tmp_path / "done"))
    assert len(run.results) == len(run.began()) <= 4


def test_a_stop_with_a_deadline_does_not_wait_beyond_it(tmp_path: Path) -> None:
    stop = StopFlag()
    run = Run(tmp_path, names(4, "slow3000"), stop=stop)
    run.look = lambda view: stop.set("SIGTERM", time.time() + 1.0) if view.counts.leased else None  # type: ignore[method-assign]
    began = time.monotonic()
    run()
    assert run.result is not None and not run.result.complete
    assert time.monotonic() - began < 30 and not run.results


def test_a_second_run_on_the_folder_joins_in(tmp_path: Path) -> None:
    """Two drivers, each with its own lease actor and workers: the files tell each what the other works on."""
    items = names(50, "slow20")
    first, second = (Run(tmp_path, items, workers=1, ttl_s=60.0) for _ in range(2))  # none of them expires
    threads = [threading.Thread(target=run) for run in (first, second)]
    threads[0].start()
    while not (tmp_path / "began").exists():
        time.sleep(0.02)
    threads[1].start()
    for thread in threads:
        thread.join()
    assert first.result is not None and second.result is not None
    assert first.result.complete and second.result.complete
    done = [{item for item, _ in run.results} for run in (first, second)]
    assert done[0] | done[1] == set(items)
    assert min(map(len, done)) >= 10
    twice = {item: count for item, count in first.began().items() if count > 1}
    # at the very end, speculatively: what the other run has in hand, and what it has claimed ahead
    assert len(twice) <= 1 + _AHEAD_LEAST, twice
    assert any(view.others == 1 for view in first.views)
    assert read_claims(str(tmp_path / "leases")) == []


def test_a_run_that_is_gone_is_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "leases").mkdir()
    gone = {
        "owner": "0badc0de", "host": "elsewhere", "space": "s", "pid": 1, "born": 1.0, "beat": 3,
        "written": 1.0, "ends": 2.0,
        "items": dict.fromkeys(names(3), time.time()), "leased": {}, "done": {},
    }  # fmt: skip
    (tmp_path / "leases" / "0badc0de.json").write_text(json.dumps(gone))
    began = time.monotonic()
    run = Run(tmp_path, names(6), ttl_s=3.0)()
    assert run.result is not None and run.result.complete
    assert time.monotonic() - began < 60


def test_no_machine_is_large_enough(tmp_path: Path) -> None:
    with pytest.raises(ClusterAddressError, match=r"needs 99 CPUs, 0 GPUs and 0\.0 GiB, and the largest machine"):
        Run(tmp_path, names(1), need=Need(cpus=99))()


def test_as_many_workers_as_there_is_room_for(tmp_path: Path) -> None:
    Run(tmp_path, names(8, "pair"), workers=None, need=Need(cpus=2))()
    owners = {line.split()[1] for line in (tmp_path / "began").read_text().splitlines()}
    assert len(owners) == 2
    assert Need(cpus=2, gpus=1, memory_bytes=10).fits({"CPU": 9, "GPU": 3, "memory": 25}) == 2
    assert Need(cpus=2).fits({"GPU": 3}) == 0
