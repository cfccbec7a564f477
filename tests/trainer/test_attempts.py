"""The row of attempts, with ranks that are made up: what follows what, from where, on how many; what is noted."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from cluster.failures import MachineLost, WorkerDied, WorkerHung
from cluster.runtime import ClusterAddressError, Session
from cluster.stop import StopFlag
from tests.trainer.batches import train_config
from trainer import attempts
from trainer.attempts import Growth, TrainOutcome, policy_of, run_attempts
from trainer.config import read_config
from trainer.config_train import TrainConfig
from trainer.divergence import TrainingDiverged
from trainer.journal import Journal

Attempt = Callable[["Script", Any], str | None]  # what the ranks do; returns the reason of their stop


@dataclass
class Script:
    """The attempts to come, and what was asked of those that were made."""

    folder: Path
    attempts: list[Attempt]
    rooms: list[int] = field(default_factory=list)  # answers of the cluster, the last one for ever
    asked: list[tuple[int, str | None]] = field(default_factory=list)  # workers, checkpoint
    skips: list[Any] = field(default_factory=list)
    stop: StopFlag = field(default_factory=StopFlag)
    said: list[str] = field(default_factory=list)
    embedded: bool = True

    def save(self, step: int) -> None:
        (self.folder / "checkpoints" / f"step_{step:08d}").mkdir(parents=True)

    def room(self, config: TrainConfig) -> int:
        return self.rooms.pop(0) if len(self.rooms) > 1 else self.rooms[0]

    def ranks(self, config: TrainConfig, workers: int, checkpoint: str | None, *rest: Any) -> TrainOutcome:
        self.asked.append((workers, Path(checkpoint).name if checkpoint else None))
        self.skips.append(config.data.skip_samples)
        stopped = self.attempts.pop(0)(self, rest[1])
        newest = sorted((self.folder / "checkpoints").glob("step_*"))
        return TrainOutcome(folder=str(self.folder), step=int(newest[-1].name[5:]) if newest else 0, stopped=stopped)

    def events(self) -> list[str]:
        return [line["event"] for line in Journal(str(self.folder)).read()]


def play(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: list[Attempt], rooms: list[int] | None = None,
    embedded: bool = True, **other: Any,
) -> tuple[Script, Callable[[], TrainOutcome]]:  # fmt: skip
    config = train_config("teacher", runs=str(tmp_path), name="run", cluster={"workers": 2}, **other)
    made = Script(tmp_path / "run", script, rooms or [2], embedded=embedded)
    made.folder.mkdir()

    @contextmanager
    def session(*_: Any, **__: Any) -> Any:
        yield Session(address=None if embedded else "x", embedded=embedded, logs="")

    def newest(folder: str) -> tuple[str | None, list[str]]:
        found = sorted(Path(folder).glob("step_*"))
        return (str(found[-1]) if found else None), []

    monkeypatch.setattr("cluster.runtime.ray_session", session)
    monkeypatch.setattr(attempts, "run_ranks", made.ranks)
    monkeypatch.setattr(attempts, "room", made.room)
    monkeypatch.setattr(attempts, "find_checkpoint", newest)
    monkeypatch.setattr("cluster.attempts.FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(attempts, "_LOOK_EVERY_S", 0.01)
    return made, lambda: run_attempts(config, None, {}, None, made.stop, made.said.append)


def done(script: Script, grow: Any) -> None:
    script.save(90)


def ends(error: Exception, step: int | None = None) -> Attempt:
    def attempt(script: Script, grow: Any) -> None:
        if step is not None:
            script.save(step)
        raise error

    return attempt


def stops(reason: str, step: int) -> Attempt:
    def attempt(script: Script, grow: Any) -> str:
        script.save(step)
        return reason

    return attempt


def test_faults_are_survived_from_the_newest_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script, run = play(
        tmp_path, monkeypatch, [ends(WorkerDied("rank 1 died"), 10), ends(WorkerHung("rank 0 hangs"), 20), done]
    )
    assert run().step == 90
    assert script.asked == [(2, None), (2, "step_00000010"), (2, "step_00000020")]
    assert script.events() == [*["started", "failed", "recovering"] * 2, "started", "finished"]
    assert script.said[0] == "rank 1 died; going on from step 10 with 2 workers in 0 s"


def test_an_exception_without_a_word_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script, run = play(tmp_path, monkeypatch, [ends(RuntimeError(), 10), done])
    run()
    assert script.said[0].startswith("RuntimeError; going on from step 10")


def test_too_many_in_a_row_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script, run = play(
        tmp_path, monkeypatch, [ends(WorkerDied(f"death {i}")) for i in range(9)], recovery={"max_failures": 2}
    )
    with pytest.raises(WorkerDied, match="death 2") as caught:
        run()
    assert "recovery.max_failures is 2" in caught.value.__notes__[0]
    assert len(script.asked) == 3 and script.events()[-1] == "failed"


def test_fewer_machines_are_enough_when_that_is_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script, run = play(
        tmp_path, monkeypatch, [ends(MachineLost("gone"), 10), done], rooms=[1], recovery={"min_workers": 1}
    )
    run()
    assert script.asked == [(2, None), (1, "step_00000010")]


def test_otherwise_they_are_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script, run = play(tmp_path, monkeypatch, [ends(MachineLost("gone"), 10), done], rooms=[1, 1, 1, 2])
    run()
    assert script.asked[1] == (2, "step_00000010")


def test_and_given_up_in_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, run = play(
        tmp_path, monkeypatch, [ends(MachineLost("gone"), 10)], rooms=[1], recovery={"capacity_wait_s": 0.05}
    )
    with pytest.raises(MachineLost) as caught:
        run()
    assert "room for 1 workers" in caught.value.__notes__[0]


def test_a_machine_about_to_go_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script, run = play(
        tmp_path, monkeypatch, [stops("PREEMPTED", 10), done], rooms=[2], recovery={"max_failures": 0}
    )
    assert run().stopped is None
    assert script.asked == [(2, None), (2, "step_00000010")]
    assert script.events() == ["started", "preempted", "recovering", "started", "finished"]


def test_without_another_machine_it_ends_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit status 75: whoever started it starts it again elsewhere."""
    script, run = play(
        tmp_path, monkeypatch, [stops("PREEMPTED", 10)], rooms=[1], recovery={"capacity_wait_s": 0.05}
    )
    outcome = run()
    assert (outcome.stopped, outcome.step) == ("PREEMPTED", 10)
    assert script.events() == ["started", "preempted", "stopped"]


def test_room_for_more_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def grows(script: Script, grow: Any) -> str:
        assert not grow(1) and grow(2)
        return stops("RESIZED", 20)(script, grow)  # type: ignore[return-value]

    recovery = {"min_workers": 1, "grow_patience_s": 0.0}
    script, run = play(
        tmp_path, monkeypatch, [ends(MachineLost("gone"), 10), grows, done], rooms=[1, 2], recovery=recovery
    )
    run()
    assert script.asked == [(2, None), (1, "step_00000010"), (2, "step_00000020")]
    assert "resizing" in script.events()


def test_a_full_group_has_nothing_to_grow_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def looks(script: Script, grow: Any) -> None:
        assert grow is None
        done(script, grow)

    play(tmp_path, monkeypatch, [looks])[1]()


def test_growth_wants_room_that_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(attempts.time, "monotonic", lambda: now[0])
    grow = Growth(1, policy_of(train_config("teacher", cluster={"workers": 4})), patience_s=10.0)
    asked = []
    for now[0], room in ((0, 1), (1, 2), (9, 2), (10, 1), (11, 3), (20, 3), (21, 3)):
        asked.append(grow(room))
    assert asked == [False] * 6 + [True]


def test_machines_that_are_still_coming_are_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script, run = play(tmp_path, monkeypatch, [done], rooms=[0, 0, 1, 2], embedded=False)
    run()
    assert script.events() == ["pending", "started", "finished"]
    assert script.asked == [(2, None)]


def test_but_not_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recovery = {"capacity_wait_s": 0.05}
    script, run = play(tmp_path, monkeypatch, [done], rooms=[1], embedded=False, recovery=recovery)
    with pytest.raises(ClusterAddressError, match="room for 1 workers of 1 CPUs, 2 are needed"):
        run()
    assert script.asked == []


def test_a_stop_while_waiting_is_obeyed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def last(script: Script, grow: Any) -> None:
        script.save(10)
        script.stop.set("SIGTERM")
        raise WorkerDied("rank 0 died")

    script, run = play(tmp_path, monkeypatch, [last])
    outcome = run()
    assert (outcome.stopped, outcome.step) == ("SIGTERM", 10)
    assert script.events()[-1] == "stopped"


def astray(first: int, skip: tuple[int, int], what: Any = "spike") -> TrainingDiverged:
    return TrainingDiverged(f"step {first}: so; do").about(what, first, first + 5, skip, {first: 9.0})


def test_a_spike_is_gone_back_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints from within it go, its samples are passed over, in the run's own configuration too."""

    def spikes(script: Script, grow: Any) -> None:
        script.save(20)
        script.save(30)
        raise astray(25, (192, 240))

    script, run = play(
        tmp_path, monkeypatch, [ends(WorkerDied("rank 1 died"), 10), spikes, done], recovery={"on_spike": "roll_back"}
    )
    run()
    assert script.asked == [(2, None), (2, "step_00000010"), (2, "step_00000020")]
    assert script.skips == [(), (), ((192, 240),)]
    assert read_config(TrainConfig, script.folder / "config.yaml").data.skip_samples == ((192, 240),)
    (told,) = [line for line in Journal(str(script.folder)).read() if line["event"] == "rolled_back"]
    assert (told["why"], told["step"], told["removed"], told["passed_over"], told["losses"]) == (
        "spike", 20, ["step_00000030"], [192, 240], {"25": 9.0},
    )  # fmt: skip
    assert script.said[-1].startswith("step 25: so; going back to step 20, and passing over the samples 192:240 of")


def test_so_is_a_storm_and_each_only_where_it_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storm = [ends(astray(5, (32, 80), "non_finite"), 10), done]
    script, run = play(tmp_path, monkeypatch, storm, recovery={"on_non_finite": "roll_back"}, checkpoint={"every": 10})
    run()
    assert script.asked == [(2, None), (2, None)] and script.skips[1] == ((32, 80),)  # it had no checkpoint yet


@pytest.mark.parametrize(
    ("recovery", "first", "word"),
    [
        ({"on_non_finite": "roll_back"}, 25, ""),
        ({"on_spike": "stop"}, 25, ""),
        ({"on_spike": "roll_back", "max_rollbacks": 0}, 25, "max_rollbacks is 0"),
        ({"on_spike": "roll_back"}, 12, "no checkpoint from before step 12"),
    ],
)
def test_otherwise_it_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recovery: dict[str, Any], first: int, word: str
) -> None:
    script, run = play(
        tmp_path, monkeypatch, [ends(astray(first, (0, 8)), 20)], recovery=recovery, checkpoint={"every": 10}
    )
    with pytest.raises(TrainingDiverged) as caught:
        run()
    assert word in "".join(getattr(caught.value, "__notes__", []))
    assert (script.folder / "checkpoints" / "step_00000020").is_dir()
