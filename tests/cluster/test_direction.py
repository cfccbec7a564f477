"""What makes ranks stop, and what the driver does not wait for; the actor and Ray are made up."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from cluster import direction
from cluster.control import View
from cluster.direction import Direction, Fit, Given, Watch
from cluster.failures import MachineLost, WorkerHung
from cluster.stop import StopFlag
from cluster.surroundings import Seen
from cluster.worker import Orders

HERE = frozenset({"a", "b"})  # where the ranks are


class Case:
    """A Given, what it gave, and what it sees."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, grow: Any = None) -> None:
        monkeypatch.setattr(direction, "own_node", lambda: "driver")
        self.orders: list[Orders] = []
        self.stop, self.around = StopFlag(), SimpleNamespace(seen=None)
        control = SimpleNamespace(order=SimpleNamespace(remote=self.orders.append))
        self.given = Given(control, self.stop, self.around, grow)  # type: ignore[arg-type]

    def look(self, **seen: Any) -> list[tuple[str | None, float | None]]:
        self.around.seen = Seen(**seen) if seen else None
        self.given.look(HERE)
        return [(order.reason, order.deadline) for order in self.orders]


def test_nothing_happens_without_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(monkeypatch)
    assert case.look() == case.look(room=9, leaving={"another": 5.0}) == []
    assert case.given.room() == 9


@pytest.mark.parametrize("node", ["a", "driver"])
def test_a_machine_that_goes_is_one_with_ranks_or_the_driver_s(monkeypatch: pytest.MonkeyPatch, node: str) -> None:
    assert Case(monkeypatch).look(leaving={node: 50.0}) == [("PREEMPTED", 50.0)]


def test_the_first_that_goes_sets_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Case(monkeypatch).look(leaving={"a": 50.0, "b": 40.0, "another": 10.0}) == [("PREEMPTED", 40.0)]
    assert Case(monkeypatch).look(leaving={"a": None, "b": 40.0}) == [("PREEMPTED", 40.0)]
    assert Case(monkeypatch).look(leaving={"a": None}) == [("PREEMPTED", None)]


def test_the_user_comes_first_and_the_first_reason_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(monkeypatch, grow=lambda room: True)
    case.stop.set("SIGTERM", 30.0)
    assert case.look(room=9, leaving={"a": 50.0}) == [("SIGTERM", 30.0)]
    assert len(case.look(leaving={"b": 1.0})) == 1


def test_room_for_more_is_a_reason_where_it_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    case = Case(monkeypatch, grow=lambda room: bool(asked.append(room)) or room > 2)
    assert case.look(room=2) == []
    assert case.look(room=3) == [("RESIZED", None)]
    assert asked == [2, 3]


def waiting(monkeypatch: pytest.MonkeyPatch, joined: int, room: int | None) -> None:
    monkeypatch.setattr(direction, "LOOK_EVERY_S", 0.001)
    monkeypatch.setattr(direction, "_JOIN_S", 0.05)
    monkeypatch.setattr(direction, "_NO_ROOM_S", 0.02)
    view = View(progress=None, joined=joined, nodes=HERE, begun=False, stuck=None, slow={})
    made = Direction(None, Fit(), 2, Watch(stacks="x"), poll_s=0.5, others=[])
    monkeypatch.setattr(made, "_look", lambda: view)
    monkeypatch.setattr(made, "refresh", dict)
    case = Case(monkeypatch)
    case.around.seen = None if room is None else Seen(room=room)
    made.wait(case.given, None)


def test_ranks_that_do_not_find_each_other_are_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be so for ever: the work's own budget, not that of machines, which has no end."""
    with pytest.raises(WorkerHung, match="only 1 of 2 workers have started"):
        waiting(monkeypatch, joined=1, room=2)


def test_ranks_without_room_are_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MachineLost, match="room for 1 of 2"):
        waiting(monkeypatch, joined=1, room=1)
