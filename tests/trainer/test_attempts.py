"""The row of attempts, with ranks that are made up: what follows what, from where, on how many; what is noted."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from cluster.direction import Watch
from cluster.failures import MachineLost, WorkerDied, WorkerHung
from cluster.runtime import ClusterAddressError, Session
from cluster.stop import StopFlag
from cluster.storage import FileMissing, StorageError, Unreachable
from cluster.surroundings import Seen
from tests.trainer.batches import train_config
from trainer import attempts
from trainer.attempts import Growth, TrainOutcome, had_checkpoint_before, policy_of, run_attempts
from trainer.config import read_config
from trainer.config_train import TrainConfig
from trainer.divergence import TrainingDiverged
from trainer.ends import CheckpointLost, OutOfMemory
from trainer.folder import state_of
from trainer.history import history_of
from trainer.journal import Journal

Attempt = Callable[["Script", Any], str | None]  # what the ranks do; returns the reason of their stop


@dataclass
class Script:
    """The attempts to come, and what was asked of those that were made."""

    folder: Path
    attempts: list[Attempt]
    rooms: list[int] = field(default_factory=list)  # answers of the cluster, the last one for ever
    unanswered: int = 0  # looks
    most: int | None = None  # room there would be if nobody else used the machines
    leaves: bool = False  # the driver's own machine
    asked: list[tuple[int, str | None]] = field(default_factory=list)  # workers, checkpoint
    skips: list[Any] = field(default_factory=list)
    stacks: list[str] = field(default_factory=list)
    begin: bool = False  # the ranks get to work
    stop: StopFlag = field(default_factory=StopFlag)
    said: list[str] = field(default_factory=list)
    embedded: bool = True

    def save(self, step: int) -> None:
        (self.folder / "checkpoints" / f"step_{step:08d}").mkdir(parents=True)
        Journal(str(self.folder)).write("checkpoint", step=step)

    def prune(self, step: int) -> None:
        (self.folder / "checkpoints" / f"step_{step:08d}").rmdir()

    def look(self, config: TrainConfig) -> Seen:
        if self.unanswered:
            self.unanswered -= 1
            raise RuntimeError("no control store\nsomewhere")
        room = self.rooms.pop(0) if len(self.rooms) > 1 else self.rooms[0]
        return Seen(room=room, most=self.most or room)

    def ranks(
        self, config: TrainConfig, workers: int, checkpoint: str | None, watch: Watch, *rest: Any
    ) -> TrainOutcome:
        self.asked.append((workers, Path(checkpoint).name if checkpoint else None))
        self.skips.append(config.data.skip_samples)
        self.stacks.append(Path(watch.stacks).name)
        if self.begin and watch.on_event:
            watch.on_event("running", {})
        stopped = self.attempts.pop(0)(self, rest[0])
        newest = sorted((self.folder / "checkpoints").glob("step_*"))
        return TrainOutcome(folder=str(self.folder), step=int(newest[-1].name[5:]) if newest else 0, stopped=stopped)

    def forget(self) -> None:
        """The journal's last line, as `kill -9` of the driver leaves it."""
        path = self.folder / "journal.jsonl"
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))

    def state(self) -> str:
        found = state_of(Journal(str(self.folder)).read())
        assert found is not None
        return found.state

    def events(self) -> list[str]:
        return [line["event"] for line in Journal(str(self.folder)).read() if line["event"] != "checkpoint"]


def play(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: list[Attempt], rooms: list[int] | None = None,
    embedded: bool = True, **other: Any,
) -> tuple[Script, Callable[[], TrainOutcome]]:  # fmt: skip
    config = train_config("teacher", runs=str(tmp_path), name="run", cluster={"workers": 2}, **other)
    made = Script(tmp_path / "run", script, rooms or [2], embedded=embedded)
    made.folder.mkdir(parents=True)

    @contextmanager
    def session(*_: Any, **__: Any) -> Any:
        yield Session(address=None if embedded else "x", embedded=embedded, logs="")

    def newest(folder: str) -> tuple[str | None, list[str]]:
        found = sorted(Path(folder).glob("step_*"))
        return (str(found[-1]) if found else None), []

    monkeypatch.setattr("cluster.runtime.ray_session", session)
    monkeypatch.setattr(attempts, "run_ranks", made.ranks)
    monkeypatch.setattr(attempts, "look", made.look)
    monkeypatch.setattr(attempts, "leaves_here", lambda: made.leaves)
    monkeypatch.setattr(attempts, "_SETTLE_S", 0.03)
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
    script, run = play(tmp_path, monkeypatch, [ends(RuntimeError(), 10), ends(RuntimeError())])
    with pytest.raises(RuntimeError):
        run()
    assert script.said[0].startswith("RuntimeError; going on from step 10")
    script.attempts = [done]
    assert run().step == 90  # and its journal can be read


def test_too_many_in_a_row_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script, run = play(
        tmp_path, monkeypatch, [ends(WorkerDied(f"death {i}")) for i in range(9)], recovery={"max_failures": 2}
    )
    with pytest.raises(WorkerDied, match="death 2") as caught:
        run()
    assert "recovery.max_failures is 2" in caught.value.__notes__[0]
    assert len(script.asked) == 3 and script.events()[-2:] == ["failed", "gave_up"]


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
    script, run = play(
        tmp_path, monkeypatch, [ends(MachineLost("gone"), 10)], rooms=[1], recovery={"capacity_wait_s": 0.05}
    )
    with pytest.raises(MachineLost) as caught:
        run()
    assert "room for 1 workers" in caught.value.__notes__[0]
    assert script.state() == "FAILED" and history_of(Journal(str(script.folder)).read()).endings == []


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
    assert script.events() == ["started", "preempted", "pending", "stopped"]


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
    script, run = play(tmp_path, monkeypatch, [done], rooms=[0] * 9 + [1, 2], embedded=False)
    run()
    assert script.events() == ["pending", "started", "finished"]
    assert script.asked == [(2, None)]


def test_but_not_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recovery = {"capacity_wait_s": 0.05}
    script, run = play(tmp_path, monkeypatch, [done], rooms=[1], embedded=False, recovery=recovery)
    with pytest.raises(ClusterAddressError, match="room for 1 workers of 1 CPUs, 2 are needed"):
        run()
    assert script.asked == [] and script.state() == "FAILED"


def test_a_cluster_that_does_not_answer_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script, run = play(tmp_path, monkeypatch, [ends(WorkerDied("rank 1 died"), 10), done])
    script.unanswered = 3
    monkeypatch.setattr(attempts, "leaves_here", lambda: 1 / 0)
    monkeypatch.setattr(attempts, "_SETTLE_S", 0.0)
    assert run().step == 90
    assert "the cluster does not answer (no control store)" in script.said[0]


def test_one_that_never_does_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recovery = {"capacity_wait_s": 0.05}
    script, run = play(tmp_path, monkeypatch, [ends(WorkerDied("rank 1 died"), 10)], recovery=recovery)
    script.unanswered = 99
    with pytest.raises(WorkerDied):
        run()
    assert script.state() == "FAILED"


def asked_to_stop(reason: str, error: Exception) -> Attempt:
    def attempt(script: Script, grow: Any) -> None:
        script.save(10)
        script.stop.set(reason)
        raise error

    return attempt


def test_an_end_of_ranks_that_were_to_end_anyway_is_told_and_the_stop_obeyed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, run = play(tmp_path, monkeypatch, [asked_to_stop("SIGTERM", WorkerDied("rank 0 died"))])
    outcome = run()
    assert (outcome.stopped, outcome.step) == ("SIGTERM", 10)
    assert script.events()[-1] == "stopped"
    assert script.said == ["rank 0 died; ending at step 10, the newest checkpoint's"]


@pytest.mark.parametrize("error", [CheckpointLost("a full disk"), OutOfMemory("rank 0"), FileMissing("x: is gone")])
def test_what_the_user_has_to_know_is_not_lost_in_a_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """Exit status 75 would say: saved, try again."""
    _, run = play(tmp_path, monkeypatch, [asked_to_stop("SIGTERM", error)])
    with pytest.raises(type(error)):
        run()


def test_a_stop_while_waiting_for_machines_is_obeyed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def waits(script: Script, grow: Any) -> None:
        script.save(10)
        threading.Timer(0.2, script.stop.set, ["SIGTERM"]).start()
        raise MachineLost("gone")

    script, run = play(tmp_path, monkeypatch, [waits], rooms=[1])
    outcome = run()
    assert (outcome.stopped, outcome.step) == ("SIGTERM", 10)
    assert script.events() == ["started", "failed", "pending", "stopped"]


def test_a_stop_while_waiting_to_try_again_is_obeyed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script, run = play(tmp_path, monkeypatch, [ends(WorkerDied("rank 1 died"), 10)])
    monkeypatch.setattr("cluster.attempts.FIRST_WAIT_S", 60.0)
    threading.Timer(0.2, script.stop.set, ["SIGINT"]).start()
    assert run().stopped == "SIGINT"
    assert script.events() == ["started", "failed", "recovering", "stopped"]


@pytest.mark.parametrize("told", ["RESIZED", "PREEMPTED"])
def test_the_user_s_reason_counts_whatever_the_ranks_were_told_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: str
) -> None:
    def both(script: Script, grow: Any) -> str | None:
        script.stop.set("SIGINT")
        return stops(told, 10)(script, grow)

    script, run = play(tmp_path, monkeypatch, [both])
    assert run().stopped == "SIGINT"
    assert Journal(str(script.folder)).read()[-1]["reason"] == "SIGINT"


def test_a_driver_whose_own_machine_goes_ends_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """New ranks would be told to stop at once, again and again; another driver goes on elsewhere."""

    def goes(script: Script, grow: Any) -> str | None:
        script.leaves = True
        return stops("PREEMPTED", 10)(script, grow)

    script, run = play(tmp_path, monkeypatch, [goes])
    outcome = run()
    assert (outcome.stopped, outcome.step) == ("PREEMPTED", 10)
    script.attempts, script.stop = [done], StopFlag()
    assert run().stopped == "PREEMPTED"  # the supervisor's next driver, on the same machine still
    assert script.attempts == [done]


def test_a_machine_that_goes_while_ranks_are_started_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = ClusterAddressError("2 workers need 2 CPUs, the cluster has 1")
    script, run = play(tmp_path, monkeypatch, [ends(late), done], rooms=[2, 1, 1, 2], embedded=False)
    run()
    assert script.asked == [(2, None), (2, None)]


def test_more_workers_than_this_machine_has_are_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, run = play(tmp_path, monkeypatch, [ends(ClusterAddressError("2 workers need 2 CPUs, the cluster has 1"))])
    with pytest.raises(ClusterAddressError):
        run()


def test_a_store_that_does_not_answer_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    away = Unreachable("s3://bucket/a.tar: no answer")
    script, run = play(tmp_path, monkeypatch, [ends(away, 10), ends(StorageError("/x: stale file handle"), 20), done])
    script.begin = True
    assert run().step == 90


def test_for_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = [ends(StorageError(f"/runs: no space left ({i})")) for i in range(60)]
    script, run = play(tmp_path, monkeypatch, full)
    script.begin = True
    monkeypatch.setattr("cluster.attempts.LONGEST_WAIT_S", 0.001)
    monkeypatch.setattr(attempts, "_SETTLE_S", 0.0)
    with pytest.raises(StorageError) as caught:
        run()
    assert "31 in a row" in caught.value.__notes__[0] and len(script.asked) == 31


def test_the_next_driver_knows_that_it_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(script: Script, grow: Any) -> None:
        raise KeyboardInterrupt

    script, run = play(tmp_path, monkeypatch, [killed])
    script.begin = True
    with pytest.raises(KeyboardInterrupt):
        run()
    script.forget()
    script.begin, script.attempts = False, [ends(StorageError("/runs: stale file handle")), done]
    assert run().step == 90


@pytest.mark.parametrize("error", [Unreachable("s3://bukcet/a.tar: no such bucket"), StorageError("/x: is a folder")])
def test_a_wrong_input_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: StorageError) -> None:
    """Nothing had been done yet."""
    script, run = play(tmp_path, monkeypatch, [ends(error)])
    with pytest.raises(StorageError):
        run()
    assert script.said == []


def test_what_does_not_fit_on_fewer_workers_waits_for_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script, run = play(
        tmp_path, monkeypatch, [ends(MachineLost("gone"), 10), ends(OutOfMemory("rank 0")), done],
        rooms=[1, 1, 1, 2], recovery={"min_workers": 1},
    )  # fmt: skip
    run()
    assert [workers for workers, _ in script.asked] == [2, 1, 2]
    _, run = play(
        tmp_path / "other", monkeypatch, [ends(MachineLost("gone"), 10), ends(OutOfMemory("rank 0"))], rooms=[1],
        recovery={"min_workers": 1, "capacity_wait_s": 0.05},
    )  # fmt: skip
    with pytest.raises(OutOfMemory) as caught:
        run()
    assert "room for 1 workers, and 2 are needed (1 ran out of memory)" in caught.value.__notes__[0]


def test_room_that_others_use_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Theirs may be an attempt's that has just ended: it is looked at twice before fewer workers are taken."""
    script, run = play(
        tmp_path, monkeypatch, [ends(WorkerDied("rank 1 died"), 10), done], rooms=[1, 2], recovery={"min_workers": 1}
    )
    script.most = 2
    run()
    assert script.asked[1][0] == 2
    script, run = play(
        tmp_path / "other", monkeypatch, [ends(WorkerDied("rank 1 died"), 10), done], rooms=[1],
        recovery={"min_workers": 1},
    )  # fmt: skip
    script.most = 2
    run()
    assert script.asked[1][0] == 1


def test_a_full_disk_does_not_keep_ranks_from_being_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, run = play(tmp_path, monkeypatch, [ends(WorkerDied("rank 1 died"), 10), done])

    def full(journal: Journal, event: str, **facts: Any) -> None:
        if event != "checkpoint":
            raise StorageError("no space left")

    monkeypatch.setattr(Journal, "write", full)
    assert run().step == 90
    assert [line for line in script.said if "warning" in line] == [
        "warning: the journal lacks 'started' and maybe more: no space left"
    ]
    script, run = play(tmp_path / "other", monkeypatch, [stops("SIGTERM", 10)])
    assert run().stopped == "SIGTERM"  # exit status 75, not the journal's 2


def test_a_second_driver_goes_on_counting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first was killed: budgets are not new, and stacks of its attempts stay."""

    def killed(script: Script, grow: Any) -> None:
        raise KeyboardInterrupt

    attempts = [ends(WorkerDied("rank 1 died")), killed]
    script, run = play(tmp_path, monkeypatch, attempts, recovery={"max_failures": 1})
    with pytest.raises(KeyboardInterrupt):
        run()
    script.forget()
    script.attempts = [ends(WorkerDied("rank 0 died"))]
    with pytest.raises(WorkerDied) as caught:
        run()
    assert "2 in a row" in caught.value.__notes__[0] and script.stacks == ["001", "002", "003"]
    script.attempts = [ends(WorkerDied("rank 0 died")), done]
    assert run().step == 90  # that one had given up: who starts another one has thought about it


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
    assert (script.folder / "checkpoints" / "latest").read_text() == "step_00000020"


def test_roll_backs_are_counted_until_the_run_has_got_past(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storm = [ends(astray(first, (0, 8)), step) for first, step in ((25, 20), (24, None), (90, 40), (85, None))]
    recovery = {"on_spike": "roll_back", "max_rollbacks": 2}
    _, run = play(tmp_path, monkeypatch, [*storm, done], recovery=recovery)
    assert run().step == 90
    _, run = play(tmp_path / "other", monkeypatch, [*storm[:2], ends(astray(29, (0, 8)))], recovery=recovery)
    with pytest.raises(TrainingDiverged) as caught:
        run()
    assert "went back 2 times without getting past step 30" in caught.value.__notes__[0]


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
    def goes_astray(script: Script, grow: Any) -> None:
        script.save(10)
        script.prune(10)  # only the newest is kept
        script.save(20)
        raise astray(first, (0, 8))

    script, run = play(tmp_path, monkeypatch, [goes_astray], recovery=recovery)
    with pytest.raises(TrainingDiverged) as caught:
        run()
    assert word in "".join(getattr(caught.value, "__notes__", []))
    assert (script.folder / "checkpoints" / "step_00000020").is_dir()


def test_what_was_saved_on_the_way_counts_and_not_what_was_gone_back_from() -> None:
    def saved(step: int) -> dict[str, Any]:
        return {"event": "checkpoint", "step": step}

    back = {"event": "rolled_back", "step": 0}
    assert not had_checkpoint_before(10, [])
    assert had_checkpoint_before(700, [saved(600)]) and not had_checkpoint_before(595, [saved(600)])
    assert not had_checkpoint_before(30, [saved(20), back]) and had_checkpoint_before(30, [saved(20), back, saved(20)])
    assert had_checkpoint_before(30, [saved(20), {**back, "step": 20}])


def test_a_stop_takes_no_checkpoint_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def both(script: Script, grow: Any) -> None:
        script.save(20)
        script.save(30)
        script.stop.set("SIGINT")
        raise astray(25, (192, 240))

    script, run = play(tmp_path, monkeypatch, [both], recovery={"on_spike": "roll_back"})
    with pytest.raises(TrainingDiverged):
        run()
    assert sorted(path.name for path in (script.folder / "checkpoints").iterdir()) == ["step_00000020", "step_00000030"]


def test_what_phases_take_is_kept_from_attempt_to_attempt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script, run = play(tmp_path, monkeypatch, [])
    learned: list[dict[str, float]] = []

    def ranks(config: TrainConfig, workers: int, checkpoint: str | None, watch: Watch, *rest: Any) -> TrainOutcome:
        learned.append(dict(watch.learned))
        watch.learned["step"] = 2.0
        if len(learned) == 1:
            raise WorkerDied("rank 1 died")
        return TrainOutcome(folder=str(script.folder), step=9)

    monkeypatch.setattr(attempts, "run_ranks", ranks)
    run()
    assert learned == [{}, {"step": 2.0}]


def test_ends_before_a_roll_back_are_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    died = [ends(WorkerDied(f"death {i}")) for i in range(4)]

    def spikes(script: Script, grow: Any) -> None:
        script.save(20)
        script.save(30)
        raise astray(25, (192, 240))

    recovery = {"on_spike": "roll_back", "max_failures": 2}
    _, run = play(tmp_path, monkeypatch, [*died[:2], spikes, *died[2:], done], recovery=recovery)
    assert run().step == 90


def test_a_second_ctrl_c_cancels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(script: Script, grow: Any) -> None:
        script.save(10)
        raise KeyboardInterrupt

    script, run = play(tmp_path, monkeypatch, [interrupted])
    with pytest.raises(KeyboardInterrupt):
        run()
    assert script.state() == "CANCELLED"
