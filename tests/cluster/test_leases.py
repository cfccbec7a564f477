"""The table of leases: every item to somebody, to one at a time while he lives, and to two only at the end."""

from __future__ import annotations

import random
from typing import Any

import pytest

from cluster.leases import Later, Lease, LeaseTable


def table(count: int = 4, **options: Any) -> LeaseTable:
    return LeaseTable(items=[f"s{i}" for i in range(count)], **{"ttl_s": 10.0, **options})


def given(got: Lease | Later | None) -> Lease:
    assert isinstance(got, Lease)
    return got


def take(it: LeaseTable, owner: str, now: float, **options: Any) -> str:
    return given(it.take(owner, now, **options)).item


def test_items_in_order_each_once() -> None:
    it = table(3, done=["s1", "unknown"])
    first, second = given(it.take("a", 0)), given(it.take("b", 0))
    assert [first.item, second.item] == ["s0", "s2"]
    assert first.token < second.token
    assert not it.finished
    assert it.complete("s0", first.token, 1) and it.complete("s2", second.token, 1)
    assert it.finished and it.take("a", 1) is None
    assert vars(it.counts()) == {
        "todo": 0, "leased": 0, "foreign": 0, "done": 3, "given_up": 0, "expired": 0, "speculated": 0, "deaths": 0,
        "late": 0,
    }  # fmt: skip


def test_a_beat_keeps_a_lease_and_silence_loses_it() -> None:
    it = table(1)
    lease = given(it.take("a", 0))
    for now in (8, 16, 24):
        assert it.beat("a", lease.token, "s0", now / 100, now)
    assert isinstance(it.take("b", 33.9), Later)
    again = given(it.take("b", 34.1))
    assert again.item == "s0" and again.token > lease.token
    assert not it.beat("a", lease.token, "s0", 0.5, 35)
    assert it.beat("b", again.token, "s0", 0.1, 35)
    assert it.counts().expired == 1


def test_who_comes_late_is_counted_and_changes_nothing() -> None:
    it = table(1)
    lease = given(it.take("a", 0))
    again = given(it.take("b", 11))
    assert it.complete("s0", lease.token, 12)  # he had lost it, and it is done all the same
    assert not it.complete("s0", again.token, 13)
    assert (it.counts().late, it.counts().done, it.finished) == (1, 1, True)
    assert not it.beat("b", again.token, "s0", 1, 14)


def test_nobody_takes_up_a_lease_that_this_table_has_ended() -> None:
    it = table(1)
    lease = given(it.take("a", 0))
    it.waiting(1, 11)  # ends it
    assert not it.beat("a", lease.token, "s0", 0, 11)
    assert take(it, "b", 12) == "s0"


def test_leases_of_a_table_before_this_are_taken_up() -> None:
    it = table(2, first_token=1000)
    assert it.beat("a", 7, "s0", 0.5, 0)
    assert not it.beat("b", 8, "s0", 0.5, 0)  # one holder is enough
    assert not it.beat("b", 8, "elsewhere", 0.5, 0)
    assert take(it, "b", 1) == "s1"
    assert it.complete("s0", 7, 2)


def test_at_the_end_the_slowest_item_is_done_twice() -> None:
    it = table(5)
    leases = {i: given(it.take("a", 0)) for i in range(3)}
    for i in range(3):
        it.complete(f"s{i}", leases[i].token, 4 + i)  # 5 s is usual
    slow, other = given(it.take("a", 7)), given(it.take("b", 8))
    assert isinstance(it.take("c", 11), Later)  # none takes longer than usual yet
    assert it.beat("a", slow.token, slow.item, 0.1, 12) and it.beat("b", other.token, other.item, 0.1, 12)
    copy = given(it.take("c", 12.5))
    assert (copy.item, copy.speculative) == (slow.item, True)
    assert take(it, "a", 13.5) == other.item  # never his own, which took longer
    assert isinstance(it.take("d", 30), Later | Lease)
    assert it.complete(copy.item, copy.token, 31)
    assert not it.beat("a", slow.token, slow.item, 0.2, 31)
    assert it.counts().speculated >= 2


def test_nobody_speaks_for_another() -> None:
    it = table(1)
    lease = given(it.take("a", 0))
    assert not it.beat("b", lease.token, "s0", 0.5, 8)
    assert take(it, "b", 10) == "s0", "that beat has put nothing off"


def test_what_waits_is_what_would_be_given_out() -> None:
    it = table(5)
    it.settle(["s1"])
    it.set_foreign({"s2": 0.0})
    it.give_up("s3", "broken")
    assert it.waiting(9, 0) == ["s0", "s4"]
    assert [take(it, "a", 0), take(it, "a", 0)] == ["s0", "s4"]


def test_what_is_done_twice_does_not_say_how_long_one_takes() -> None:
    """A copy is begun late: by its own time everything else would look slow."""
    it = table(8, ttl_s=100.0)
    leases = [given(it.take("a", 0)) for _ in range(7)]
    for lease in leases[:3]:
        it.complete(lease.item, lease.token, 9)  # 9 s is usual
    given(it.take("b", 9.9))
    for lease in leases[3:]:
        copy = given(it.take("c", 10))
        assert copy.speculative and copy.item == lease.item
        assert it.complete(copy.item, copy.token, 10.1)
    assert isinstance(it.take("c", 10.5), Later)


def test_no_item_has_three_holders() -> None:
    it = table(1)
    lease = given(it.take("a", 0))
    for now in range(5, 60, 5):
        it.beat("a", lease.token, "s0", now, now)
    assert given(it.take("b", 56)).speculative
    assert isinstance(it.take("c", 57), Later)


def test_the_dead_give_back_and_what_kills_is_given_up() -> None:
    it = table(2, max_deaths=3)
    for round_ in range(3):
        lease = given(it.take(f"w{round_}", round_, allowed={"s0"}))
        assert lease.item == "s0"
        assert it.bury(f"w{round_}", round_) == ["s0"]
    assert it.given_up == {"s0": "3 workers died on it: killed, out of memory or crashed"}
    assert take(it, "x", 9) == "s1"
    assert it.bury("nobody", 9) == []
    assert it.counts().deaths == 3


def test_an_item_that_killed_waits_until_the_others_are_begun() -> None:
    it = table(3)
    it.take("a", 0)
    it.bury("a", 1)
    assert [take(it, "b", 2), take(it, "c", 2), take(it, "d", 2)] == ["s1", "s2", "s0"]


def test_a_store_that_does_not_answer_is_asked_later_and_later_and_not_for_ever() -> None:
    it = table(1)
    now, waits = 0.0, []
    while not it.given_up:
        lease = given(it.take("a", now))
        it.away(lease.token, "no answer", now)
        since = now
        while not it.given_up and isinstance(it.take("b", now), Later):
            now += 0.5
        waits.append(now - since)
        if not it.given_up:  # b has it now
            it.away(it.held()[0].token, "no answer", now)
            while not it.given_up and not it.waiting(1, now):
                now += 0.5
    assert waits[0] == 2 and now < 700
    assert it.given_up == {"s0": "tried 12 times: no answer"}
    assert it.finished


def test_who_has_lost_his_lease_says_nothing_of_its_store() -> None:
    it = table(1)
    lease = given(it.take("a", 0))
    assert take(it, "b", 11) == "s0"
    assert not it.away(lease.token, "no answer", 12)
    assert [held.owner for held in it.held()] == ["b"]


def test_an_item_given_back_comes_next() -> None:
    it = table(2)
    lease = given(it.take("a", 0))
    it.drop(lease.token, 1)
    assert take(it, "b", 1) == "s0"


def test_a_holder_that_beats_and_does_not_move_loses_it() -> None:
    it = table(1, still_s=30.0)
    lease = given(it.take("a", 0))
    for now in range(5, 41, 5):
        assert it.beat("a", lease.token, "s0", 0.5, now)
    assert [held.owner for held in it.stuck(36)] == ["a"]
    assert not it.beat("a", lease.token, "s0", 0.5, 46)
    assert take(it, "b", 46) == "s0"


def test_what_others_claim_is_left_until_they_do_no_more() -> None:
    it = table(3)
    it.set_foreign({"s0": -5.0, "s1": -5.0, "elsewhere": 0.0})
    assert take(it, "a", 0) == "s2"
    assert it.counts().foreign == 2
    assert isinstance(it.take("b", 1), Later)
    it.set_foreign({"s1": -5.0})
    assert take(it, "b", 1) == "s0"
    assert it.settle(["s1", "s1", "elsewhere"]) == ["s1"]
    assert it.counts().foreign == 0 and it.counts().done == 1


def test_what_others_claim_for_very_long_is_done_here_too() -> None:
    it = table(1)
    it.set_foreign({"s0": -51.0})
    lease = given(it.take("a", 0))
    assert lease.speculative
    it.set_foreign({"s0": -50.0})  # they still do
    assert it.beat("a", lease.token, "s0", 0.5, 1)


def test_only_what_is_allowed_is_begun() -> None:
    it = table(3)
    assert it.waiting(2, 0) == ["s0", "s1"]
    assert take(it, "a", 0, allowed={"s1"}) == "s1"
    assert isinstance(it.take("b", 0, allowed=set()), Later)
    assert it.waiting(9, 0) == ["s0", "s2"]
    assert take(it, "b", 0) == "s0"


@pytest.mark.parametrize("seed", range(30))
def test_whatever_happens_every_item_is_done_or_given_up_and_the_counts_add_up(seed: int) -> None:
    """Random owners, deaths, silences, foreign claims: two at most hold one item, nothing is lost."""
    rng = random.Random(seed)
    it = table(20, max_deaths=1000, still_s=1e9)
    holding: dict[str, Lease] = {}
    silent: set[str] = set()
    now = 0.0
    for step in range(5000):
        now += rng.choice([0.0, 0.1, 1.0])
        owner = f"w{rng.randrange(6)}"
        if owner not in holding:
            got = it.take(owner, now)
            if isinstance(got, Lease):
                holding[owner] = got
                silent.discard(owner)
        else:
            lease = holding[owner]
            match rng.choice(["beat", "beat", "complete", "die", "silent", "drop"]):
                case "beat" if owner not in silent:
                    if not it.beat(owner, lease.token, lease.item, step, now):
                        del holding[owner]
                case "complete":
                    it.complete(holding.pop(owner).item, lease.token, now)
                case "die" if rng.random() < 0.3:
                    it.bury(owner, now)
                    del holding[owner]
                case "silent":
                    silent.add(owner)
                case "drop":
                    it.drop(holding.pop(owner).token, now)
        if rng.random() < 0.05:
            it.set_foreign({f"s{rng.randrange(20)}": now - rng.random() * 20 for _ in range(3)} if step < 3000 else {})
        counts = it.counts()
        assert counts.todo >= 0
        assert counts.todo + counts.leased + counts.foreign + counts.done + counts.given_up == 20
        by_item: dict[str, int] = {}
        for held in it.held():
            by_item[held.item] = by_item.get(held.item, 0) + 1
        assert max(by_item.values(), default=0) <= 2
        if it.finished:
            break
    assert it.finished and it.take("last", now) is None
