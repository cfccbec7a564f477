"""What goes through the actor between driver and ranks: words one way, orders the other."""

from __future__ import annotations

from cluster.control import About, Control
from cluster.stragglers import Stragglers
from cluster.watchdog import Beat
from cluster.worker import Orders, Word


def word(step: int, own_s: float | None = None, **progress: int) -> Word:
    return Word(progress=progress or None, beat=Beat(step=step, phase="step", count=step), own_s=own_s)


def about(node: str) -> About:
    return About(pid=1, born=0.0, host=f"host-{node}", node=node, actor=None, shared_memory="")


def test_every_rank_gets_the_last_orders_and_the_driver_rank_0_s_words() -> None:
    control = Control({})
    control.join(0, about("a"))
    control.join(1, about("b"))
    control.exchange(0, Word(progress=None, beat=Beat(step=0, phase="start", count=0)))
    assert not control.look().begun
    assert control.exchange(0, word(1, done=7)).reason is None
    control.exchange(1, word(1, done=8))
    control.order(Orders(reason="SIGTERM", deadline=5.0))
    assert [control.exchange(rank, word(2)).reason for rank in (0, 1)] == ["SIGTERM", "SIGTERM"]
    view = control.look()
    assert view.begun
    assert (view.progress, view.joined, view.nodes, view.stuck, view.slow) == ({"done": 7}, 2, {"a", "b"}, None, {})


def test_a_slow_rank_is_seen_by_the_driver_and_told_so() -> None:
    control = Control({})
    control._stragglers = Stragglers(patience_s=0.0)
    for rank, own_s in ((0, 1.0), (1, 1.0), (2, 3.0)):
        control.exchange(rank, word(1, own_s))
    assert control.look().slow == {2: 3.0}
    assert control.exchange(2, word(2)).slowdown == 3.0
    assert control.exchange(0, word(2)).slowdown == 1.0


def test_who_has_left_is_not_missed() -> None:
    control = Control({"silence_s": 0.0})
    control.exchange(0, word(1))
    control.exchange(1, word(1))
    control.leave(0)
    control.exchange(0, word(2))  # its link's last one
    stuck = control.look().stuck
    assert stuck is not None and stuck.ranks == (1,)
