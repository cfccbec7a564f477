"""The step: no update on a non-finite gradient, one counter, one vote. test_one_gradient.py has the gradient itself."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.worker import Orders, WorkerContext
from dataio.types import Batch
from tests.trainer.batches import share, task_of, train_config
from tests.trainer.ranks import run_ranks
from trainer.divergence import SpikeDetector, TrainingDiverged
from trainer.loop import Loop, StepRecord, cut, poisoned, step_seed


class Watching:
    """Hooks that only note what they are told."""

    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        self.saved: list[tuple[int, bool]] = []
        self.pruned: list[bool] = []
        self.in_a_row: list[int] = []  # as a checkpoint made after a step would say
        self.said: list[tuple[bool, int, int]] = []
        self.flagged: dict[int, tuple[float, float, float]] = {}  # by step

    def before_step(self, batch: Batch) -> None: ...

    def after_step(self, record: StepRecord, batch: Batch) -> None:
        self.in_a_row.append(self.loop.skipped_in_a_row)

    def position(self, cursor: Any) -> int:
        return int(sum(cursor.values()))

    def flags(self) -> tuple[float, float, float]:
        return self.flagged.get(self.loop.step, (0.0, 0.0, 0.0))

    def agreed(self, due: bool, written: int, failed: int) -> None:
        self.said.append((due, written, failed))

    def checkpoint(self, *, last: bool, prune: bool = True) -> None:
        self.saved.append((self.loop.step, last))
        self.pruned.append(prune)


def make_loop(config: Any, rank: int, world_size: int, micro_batches: int, module: Any = None) -> Loop:
    from trainer.engine import Engine

    torch.manual_seed(0)
    task = task_of(config)
    module = module or task.build()
    engine = Engine(
        module,
        task.parameter_groups(module),
        optim=config.optim,
        engine=config.engine,
        micro_batches=micro_batches,
        device=torch.device("cpu"),
    )
    return Loop(
        config=config,
        task=task,
        engine=engine,
        context=WorkerContext(rank=rank, world_size=world_size),
        micro_batches=micro_batches,
    )


def poisoned_run(rank: int, world_size: int) -> dict[str, Any]:
    """Three steps, the second with a NaN on the last rank only."""
    config = train_config("teacher")
    loop = make_loop(config, rank, world_size, 1)
    weights, records = [], []
    for step in range(3):
        batch = share(config, rank, world_size, seed=step)
        if step == 1 and rank == world_size - 1:
            batch.views["student"][1] = float("nan")  # row 0 has no weight
        records.append(loop.train_step(batch))
        weights.append(torch.cat([p.detach().flatten() for p in loop.engine.module.parameters()]).numpy())
    return {
        "skipped": [r.result.skipped for r in records],
        "bad": [r.bad_keys for r in records],
        "weights": weights,
        "applied": loop.engine.applied_steps,
        "step": loop.step,
    }


def test_a_nan_on_one_rank_stops_the_update_on_all_and_names_the_samples(tmp_path: Path) -> None:
    first, last = run_ranks(poisoned_run, 2, tmp_path)
    assert first["skipped"] == last["skipped"] == [False, True, False]
    assert first["bad"] == [(), (), ()]
    assert last["bad"][1] == share(train_config("teacher"), 1, 2).keys[1:2]  # that one alone
    for result in (first, last):
        assert (result["weights"][0] == result["weights"][1]).all()
        assert (result["weights"][2] != result["weights"][1]).any()
        assert (result["weights"][2] == result["weights"][2]).all()
        assert (result["applied"], result["step"]) == (2, 3)
    assert (first["weights"][2] == last["weights"][2]).all()


def uneven_run(rank: int, world_size: int) -> Any:
    """Stage 3, a NaN on rank 1, which has one row less than rank 0."""
    config = train_config("teacher", engine={"precision": "fp32", "zero_stage": 3})
    loop = make_loop(config, rank, world_size, 1)
    records = []
    for step in range(3):
        batch = next(iter(share(config, rank, world_size, seed=step).split(4 - rank)))
        if step == 1 and rank == 1:
            batch.views["student"][2] = float("nan")
        records.append(loop.train_step(batch))
    cut_ones = [name for name in loop.engine.trained if len(loop.engine.spans[name]) > 0]
    partitioned = [p for p in loop.engine.module.parameters() if p.requires_grad and p.numel() == 0]
    return [r.result.skipped for r in records], records[1].bad_keys, len(cut_ones), len(partitioned), batch.keys


def test_ranks_with_unequal_rows_look_for_the_sample_together_at_stage_3(tmp_path: Path) -> None:
    """Each forward pass gathers weights: as many on every rank."""
    first, last = run_ranks(uneven_run, 2, tmp_path)
    assert first[0] == last[0] == [False, True, False]
    assert first[1] == () and last[1] == (share(train_config("teacher"), 1, 2, seed=1).keys[2],)
    assert min(first[2:4]) > 50  # parameters are really cut, and gone between steps
    assert (len(first[4]), len(last[4])) == (4, 3)


def sharp_corner(forward: Any, batch: Batch) -> dict[str, torch.Tensor]:
    """Finite sums; their gradient at the prediction of a row without weight is not: it is that of a root at 0."""
    disparity_BHW = forward(batch.views["student"]).disparity_BHW * batch.weight_B[:, None, None]
    return {"labelled": disparity_BHW.square().mean(dim=(1, 2)).sqrt().sum()}


def sharp_run(rank: int, world_size: int, stage: int) -> Any:
    """One row of the last rank has no weight, and a loss that cannot bear it."""
    config = train_config("teacher", engine={"precision": "fp32", "zero_stage": stage})
    loop = make_loop(config, rank, world_size, 1)
    batch = share(config, rank, world_size)
    batch.weight_B[:] = 1
    if rank == world_size - 1:
        batch.weight_B[1] = 0
    loop.task.sums = sharp_corner  # type: ignore[method-assign]
    before = {name: t.detach().clone() for name, t in loop.engine.whole_weights(everywhere=True).items()}
    record = loop.train_step(batch)
    after = loop.engine.whole_weights(everywhere=True)
    same = all(bool((after[name] == t).all()) for name, t in before.items())
    return record.result.skipped, record.bad_keys, same, bool(record.terms["labelled"].isfinite()), batch.keys[1]


@pytest.mark.parametrize("stage", [0, 3])
def test_a_finite_loss_with_a_gradient_that_is_not_names_its_sample(tmp_path: Path, stage: int) -> None:
    first, last = run_ranks(sharp_run, 2, tmp_path, stage)
    assert first[:4] == (True, (), True, True)
    assert last[:4] == (True, (last[4],), True, True)


def diverging_run(rank: int, world_size: int) -> tuple[Any, ...]:
    config = train_config("teacher", engine={"precision": "fp32", "max_skipped_steps": 2}, steps=10)
    loop = make_loop(config, rank, world_size, 1)
    good, bad = share(config, rank, world_size), share(config, rank, world_size)
    bad.views["student"][:] = float("nan")
    hooks, said, about = Watching(loop), "went on", None
    batches = [replace(batch, cursor={"labelled": 8 * (i + 1)}) for i, batch in enumerate([bad, good, bad, bad])]
    try:
        loop.run(iter([*batches, *[good] * 6]), hooks)
    except TrainingDiverged as error:
        said, about = str(error), (error.what, error.first_step, error.step, error.skip)
    return said, hooks.in_a_row, hooks.saved, hooks.pruned, about


def test_a_row_of_steps_without_update_gives_up(tmp_path: Path) -> None:
    """What was saved before stays, for it may be the weights that overflow."""
    ((said, in_a_row, saved, pruned, about),) = run_ranks(diverging_run, 1, tmp_path)
    assert said.startswith("step 4: 2 steps in a row") and "engine.max_skipped_steps" in said
    assert "step_00000004 has the weights of the last good step" in said
    assert in_a_row == [1, 0, 1, 2]
    assert (saved, pruned) == ([(4, True)], [False])
    assert about == ("non_finite", 3, 4, (16, 32))


def spiking_run(rank: int, world_size: int) -> tuple[Any, ...]:
    """The loss, the same batch again and again at a rate of 0, is ten times as high from step 13 on."""
    recovery = {"on_spike": "stop", "spike_steps": 3, "spike_window": 16, "spike_lead_steps": 2}
    optim = {"encoder_lr": 0.0, "decoder_lr": 0.0, "weight_decay": 0.0}
    config = train_config("teacher", recovery=recovery, optim=optim, steps=40)
    loop = make_loop(config, rank, world_size, 1)
    loop.spikes = SpikeDetector(factor=8.0, steps=3, window=16)
    sums, hooks = loop.task.sums, Watching(loop)
    loop.task.sums = lambda *args: {  # type: ignore[method-assign]
        name: value * (10 if loop.step >= 12 else 1) for name, value in sums(*args).items()
    }
    batch = share(config, rank, world_size)
    try:
        loop.run(iter([replace(batch, cursor={"labelled": 8 * (i + 1)}) for i in range(40)]), hooks)
    except TrainingDiverged as error:
        return str(error), error.what, error.first_step, error.step, error.skip, error.losses, hooks.saved
    return ()


def test_a_loss_that_leaves_its_course_ends_the_run_on_all_ranks(tmp_path: Path) -> None:
    """It is seen a step late, since the loss travels with the next step's counts."""
    first, last = run_ranks(spiking_run, 2, tmp_path)
    assert first == last
    said, what, first_step, step, skip, losses, saved = first
    assert said.startswith("step 13: the loss left its course") and "recovery.on_spike" in said
    assert (what, first_step, step, saved) == ("spike", 11, 16, [])
    assert skip == (80, 128)  # two steps before, the three, and one until it was seen
    assert losses[13] == pytest.approx(10 * losses[12], rel=1e-5)


def resumed_spiking_run(rank: int, world_size: int) -> list[Any]:
    """As above, cut after each of these steps and gone on with from what a checkpoint keeps of it."""
    recovery = {"on_spike": "stop", "spike_steps": 3, "spike_window": 16, "spike_lead_steps": 2}
    optim = {"encoder_lr": 0.0, "decoder_lr": 0.0, "weight_decay": 0.0}
    config = train_config("teacher", recovery=recovery, optim=optim, steps=40)
    whole = make_loop(config, rank, world_size, 1)
    sums, batch, at = whole.task.sums, share(config, rank, world_size), [0]
    whole.task.sums = lambda *args: {  # type: ignore[method-assign]
        name: value * (10 if at[0] >= 12 else 1) for name, value in sums(*args).items()
    }

    def batches(first: int, last: int) -> Iterator[Batch]:
        for at[0] in range(first, last):
            yield replace(batch, cursor={"labelled": 8 * (at[0] + 1)})

    def loop_from(kept: tuple[int, Any, Any]) -> Loop:
        step, seen, recent = kept
        losses, began = json.loads(json.dumps(recent))
        return Loop(
            config=config, task=whole.task, engine=whole.engine, context=whole.context, micro_batches=1, step=step,
            cursor={"labelled": 8 * step}, spikes=SpikeDetector.of(config.recovery, seen), losses=losses, began=began,
        )  # fmt: skip

    found = []
    for cuts in ([], [11], [12], [13], [14], [15], [9, 10, 11, 12, 13, 14, 15], [13, 15]):
        kept: tuple[int, Any, Any] = (0, None, ([], []))
        try:
            for cut in [*cuts, 40]:
                loop = loop_from(kept)
                hooks = Watching(loop)

                def after_step(record: StepRecord, batch: Batch, loop: Loop = loop, cut: int = cut) -> None:
                    if record.step == cut:
                        loop.context._orders = Orders(reason="SIGTERM")

                def checkpoint(*, last: bool, loop: Loop = loop, **_: Any) -> None:
                    nonlocal kept
                    assert last and loop.spikes
                    kept = loop.step, loop.spikes.record(), loop.recent()

                hooks.after_step = after_step  # type: ignore[method-assign]
                hooks.checkpoint = checkpoint  # type: ignore[method-assign, assignment]
                loop.run(batches(loop.step, 40), hooks)
                loop.context._orders = Orders()
        except TrainingDiverged as error:
            found.append((str(error), error.first_step, error.step, error.skip))
    return found


def test_a_spike_is_found_where_it_is_however_often_the_run_was_resumed(tmp_path: Path) -> None:
    first, last = run_ranks(resumed_spiking_run, 2, tmp_path)
    assert first == last
    assert len(first) == 8 and len(set(first)) == 1, first
    assert first[0][1:] == (11, 16, (80, 128))


def stopping_run(rank: int, world_size: int) -> tuple[Any, ...]:
    """Only the last rank is asked to stop, during its second step."""
    config = train_config("teacher", steps=10)
    loop = make_loop(config, rank, world_size, 1)
    hooks = Watching(loop)

    def after_step(record: StepRecord, batch: Batch) -> None:
        if record.step == 2 and rank == world_size - 1:
            loop.context._orders = Orders(reason="SIGTERM")

    hooks.after_step = after_step  # type: ignore[method-assign]
    reason = loop.run(iter([share(config, rank, world_size, seed=s) for s in range(10)]), hooks)
    return reason, loop.step, hooks.saved, dict(loop.cursor)


def test_all_ranks_stop_after_the_same_step_and_save(tmp_path: Path) -> None:
    first, last = run_ranks(stopping_run, 2, tmp_path)
    assert first == last == ("SIGTERM", 3, [(3, True)], {"labelled": 8 * 3})


def flagging_run(rank: int, world_size: int) -> Any:
    """Rank 0's clock says at step 1 that a checkpoint is due; the ranks have written theirs at different steps."""
    config = train_config("teacher", steps=6, checkpoint={"every": 4})
    loop = make_loop(config, rank, world_size, 1)
    hooks = Watching(loop)
    hooks.flagged = {1: (1.0, 0.0, 0.0), 3: (0.0, 1.0, 0.0), 4: (0.0, 1.0, 0.0)} if rank == 0 else {4: (0.0, 0.0, 1.0)}
    assert loop.run(iter([share(config, rank, world_size, seed=s) for s in range(6)]), hooks) is None
    return hooks.said, hooks.saved


def test_ranks_agree_on_checkpoints_in_the_steps_own_all_reduce(tmp_path: Path) -> None:
    """Every rank hears the sums, one step late."""
    first, last = run_ranks(flagging_run, 2, tmp_path)
    assert first == last
    said, saved = first
    assert said == [(False, 0, 0), (False, 0, 0), (True, 0, 0), (False, 0, 0), (False, 1, 0), (False, 1, 1)]
    assert saved == [(4, False), (6, True)]


def timed_run(rank: int, world_size: int) -> Any:
    config = train_config("teacher", steps=3)
    loop = make_loop(config, rank, world_size, 2)
    return [loop.train_step(share(config, rank, world_size, seed=s)).phases for s in range(3)]


def test_the_time_of_a_step_is_split(tmp_path: Path) -> None:
    (phases,) = run_ranks(timed_run, 1, tmp_path)
    assert all(set(one) == {"forward", "loss", "backward", "optimizer"} for one in phases)
    assert all(0 < seconds < 60 for one in phases for seconds in one.values())


def test_a_loss_that_is_not_finite_has_no_finite_gradient() -> None:
    """Where the graph behind it would hide it: its own gradient here is 1."""
    x = torch.tensor(2.0, requires_grad=True)
    for constant, expected in ((float("nan"), False), (float("inf"), False), (3.0, True)):
        (gradient,) = torch.autograd.grad(poisoned(x + constant), x)
        assert bool(gradient.isfinite()) is expected
    assert torch.equal(poisoned(x), x) and torch.autograd.grad(poisoned(x), x)[0] == 1


def test_pieces_are_as_many_on_every_rank() -> None:
    batch = share(train_config("teacher"), 0, 4)  # two rows
    pieces = list(cut(batch, 4))
    assert len(pieces) == 4
    assert [p.weight_B.sum().item() for p in pieces] == [*batch.weight_B.tolist(), 0.0, 0.0]


def test_seeds_differ_by_step_and_rank() -> None:
    seeds = {step_seed(1, step, rank) for step in range(100) for rank in range(64)}
    assert len(seeds) == 6400
