"""A rank that is slow by itself is named, after a while and for as long as it is."""

from __future__ import annotations

from cluster.stragglers import Stragglers, slowdowns


def hear(made: Stragglers, **seconds: float) -> None:
    for rank, own in seconds.items():
        made.hear(int(rank[1:]), own)


def test_over_the_median_rank() -> None:
    assert slowdowns({0: 1.0, 1: 1.0, 2: 3.0}) == {0: 1.0, 1: 1.0, 2: 3.0}
    assert slowdowns({0: 1.0, 1: 3.0}) == {0: 1.0, 1: 3.0}  # of two, the slow one is slow against the other
    assert slowdowns({}) == {} and slowdowns({0: 0.0, 1: 0.0}) == {0: 1.0, 1: 1.0}


def test_named_once_it_has_been_slow_for_a_while() -> None:
    made = Stragglers(patience_s=10.0)
    for now in range(30):
        hear(made, r0=1.0, r1=1.0, r2=2.0 if now >= 5 else 1.0)
        found = made.named(float(now))
        assert (found != {}) == (now >= 16), now  # its average passes 1.5 a word later
    assert list(found) == [2] and 1.9 < found[2] <= 2.0
    assert made.slowdown(0) == 1.0 and 1.9 < (made.slowdown(2) or 0) <= 2.0


def test_one_bad_moment_is_forgiven() -> None:
    made = Stragglers(patience_s=10.0)
    for now in range(60):
        hear(made, r0=1.0, r1=30.0 if now == 20 else 1.0, r2=1.0)
        assert made.named(float(now)) == {}


def test_a_rank_that_recovers_begins_anew() -> None:
    made = Stragglers(patience_s=5.0)
    named = []
    for now in range(60):
        hear(made, r0=1.0, r1=1.0, r2=3.0 if now < 20 or now >= 40 else 1.0)
        named.append(bool(made.named(float(now))))
    assert named[10] and not named[30] and not named[42] and named[50]


def test_alone_there_is_nothing_to_compare() -> None:
    made = Stragglers(patience_s=0.0)
    hear(made, r0=5.0)
    assert made.named(1.0) == {} and made.slowdown(0) is None
