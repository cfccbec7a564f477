"""Who is stuck, and when that is said. Time is a number here."""

from __future__ import annotations

import pytest

from cluster.watchdog import ALWAYS_S, FIRST_S, HALF_LIFE_S, OTHER_FIRST_S, Beat, Stuck, Watchdog


class Group:
    """Ranks that say where they are every second, and an observer that asks as often."""

    def __init__(self, ranks: int, **settings: float) -> None:
        self.dog = Watchdog(**({"silence_s": 10.0, "factor": 10.0, "shortest_s": 5.0} | settings))  # type: ignore[arg-type]
        self.at = {rank: Beat(step=0, phase="start", count=0) for rank in range(ranks)}
        self.silent: set[int] = set()
        self.now = 0.0
        self.took: dict[int, dict[str, float]] = {rank: {} for rank in range(ranks)}
        self.since = dict.fromkeys(range(ranks), 0.0)

    def enter(self, phase: str, *ranks: int, step: int | None = None) -> None:
        for rank in ranks or self.at:
            old = self.at[rank]
            self.took[rank][old.phase] = self.now - self.since[rank]
            self.since[rank] = self.now
            self.at[rank] = Beat(step=old.step if step is None else step, phase=phase, count=old.count + 1)

    def second(self) -> Stuck | None:
        self.now += 1
        for rank, beat in self.at.items():
            if rank not in self.silent:
                self.dog.hear(rank, beat, self.now, self.took[rank])
                self.took[rank] = {}
        return self.dog.stuck(self.now)

    def until_stuck(self, most_s: int = 5000) -> tuple[int, Stuck]:
        for waited in range(1, most_s):
            if found := self.second():
                return waited, found
        raise AssertionError("never")

    def steps(self, count: int, seconds: int = 1) -> None:
        """Every rank waits for data and takes a step, `seconds` each."""
        for step in range(1, count + 1):
            for phase in ("data", "step"):
                self.enter(phase, step=step)
                for _ in range(seconds):
                    assert self.second() is None


def test_a_group_that_moves_is_left_alone() -> None:
    group = Group(3)
    group.steps(200)
    assert group.dog.longest_s["step"] <= 2


def test_before_anything_is_known_there_is_patience() -> None:
    waited, found = Group(2).until_stuck()
    assert waited == pytest.approx(ALWAYS_S["start"], abs=2) and found.phase == "start"
    assert found.ranks == (0, 1)
    assert Watchdog().limit_s("anything", first=True) == OTHER_FIRST_S


def test_the_rank_that_the_others_wait_for_is_named() -> None:
    group = Group(4)
    group.steps(5)
    group.enter("data", step=6)
    group.second()
    group.enter("step", 0, 1, 3)  # rank 2 is still waiting for its data
    waited, found = group.until_stuck()
    assert (found.ranks, found.phase, found.silent) == ((2,), "data", False)
    assert 8 <= waited <= 22  # ten times the second that it takes
    assert str(found).startswith("rank 2 has been in the phase 'data' of step 6 for ")


def test_a_frozen_process_is_told_by_its_silence() -> None:
    group = Group(3)
    group.steps(5)
    group.silent = {1}
    waited, found = group.until_stuck()
    assert (found.ranks, found.silent, waited) == ((1,), True, 11)
    assert str(found) == "rank 1 has not been heard of for 11 s; the limit is 10 s"


def test_all_in_the_same_collective_is_everybody_s_fault() -> None:
    """A cut network: each waits for the others, and none is behind."""
    group = Group(3)
    group.steps(5)
    group.enter("step", step=6)
    assert group.until_stuck()[1].ranks == (0, 1, 2)


def test_slow_phases_get_more_time() -> None:
    group = Group(2)
    group.steps(2, seconds=20)
    group.enter("data", step=3)
    waited, _ = group.until_stuck()
    assert 200 <= waited <= 220


@pytest.mark.parametrize("ranks", [1, 64])
def test_what_was_slow_once_is_forgotten_in_time(ranks: int) -> None:
    group = Group(ranks)
    group.steps(2, seconds=30)
    assert group.dog.limit_s("step") >= 290
    group.steps(int(HALF_LIFE_S) // 2)  # as many seconds for data as for a step
    assert group.dog.limit_s("step") == pytest.approx(150, rel=0.1)


def test_an_observer_that_stood_still_blames_nobody() -> None:
    group = Group(2)
    group.steps(3)
    group.now += 3600  # the laptop was closed
    assert group.second() is None
    group.silent = {0}
    assert group.until_stuck()[0] == 11


def test_nor_does_one_that_asks_before_it_has_heard_what_queued_up() -> None:
    group = Group(2)
    group.steps(3)
    group.now += 100
    assert group.dog.stuck(group.now) is None
    assert group.second() is None


def test_what_came_while_the_observer_stood_still_counts() -> None:
    """A rank that freezes right after it is found no later than any other."""
    group = Group(2)
    group.steps(3)
    group.now += 3600
    for rank in (0, 1):
        group.dog.hear(rank, group.at[rank], group.now)  # the words that had queued up
    assert group.dog.stuck(group.now) is None
    group.silent = {0}
    assert group.until_stuck()[0] == 11


def test_a_rank_that_is_done_may_be_silent() -> None:
    group = Group(2)
    group.steps(3)
    group.silent = {0}
    group.dog.forget(0)
    group.enter("export", 1)
    assert all(group.second() is None for _ in range(100))


def test_what_was_learned_serves_the_next_attempt() -> None:
    group = Group(2)
    group.steps(5)
    again = Watchdog(longest_s=dict(group.dog.longest_s), shortest_s=5.0)
    assert again.limit_s("step") == group.dog.limit_s("step") < 30


def test_a_new_attempt_may_take_its_time_at_first() -> None:
    """It loads a checkpoint, on other machines perhaps, compiles, and fills caches."""
    before = {"start": 5.0, "data": 0.1, "step": 0.2, "checkpoint": 0.05}
    group = Group(2)
    group.dog.longest_s.update(before)
    for phase, seconds in (("data", 850), ("step", 500), ("data", 500), ("step", 50)):
        for _ in range(seconds):
            assert group.second() is None
        group.enter(phase, step=1)


def test_waiting_for_a_disk_is_no_hang_however_fast_the_copy_before_it_was() -> None:
    group = Group(2)
    group.steps(20)
    for _ in range(10):
        group.enter("checkpoint")
        group.enter("data")
        group.second()
    group.enter("checkpoint")
    group.enter("saving")
    assert group.until_stuck()[0] == pytest.approx(ALWAYS_S["saving"], abs=2)


def test_phases_too_short_to_be_seen_are_known_by_the_rank_s_own_clock() -> None:
    """Of a thousand steps a second only one in a thousand is seen."""
    group = Group(1)
    for step in range(0, 5000, 997):
        group.at[0] = Beat(step=step, phase="step", count=2 * step + 1)
        group.took[0] = {"data": 0.0004, "step": 0.0006}
        assert group.second() is None
    assert group.dog.limit_s("step") == group.dog.limit_s("data") == 5.0


def test_who_waits_for_others_is_not_blamed_for_their_first_long_read() -> None:
    """Rank 1 is in a phase that nobody knows yet; the others' own limit is long over."""
    group = Group(2)
    group.steps(5)
    group.enter("data", 0, step=6)
    group.enter("step", 0)
    group.enter("validation", 1)
    waited, found = group.until_stuck()
    assert (found.ranks, found.phase) == ((1,), "validation")
    assert waited == pytest.approx(FIRST_S["validation"], abs=2)
