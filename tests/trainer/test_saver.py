"""Saving beside the training: what is written is the moment of `begin`; a failure costs the checkpoint alone."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster import storage
from tests.trainer.disks import fill, small_disk
from tests.trainer.ranks import run_ranks
from tests.trainer.test_engine import ROWS, Case, Network, Whole, advance, inputs, loss_of, make, rates
from trainer.checkpoint import About, TrainState, find_checkpoint, list_checkpoints, load_checkpoint, partial_folder
from trainer.config_train import EngineSection
from trainer.ema import Ema
from trainer.engine import Engine
from trainer.saver import Keep, Saved, Saver, require_space

STAGES = (0, 1, 2, 3)


def state_of(step: int) -> TrainState:
    return TrainState(step=step, applied_steps=step, cursor={"labelled": step * 8})


def written_later(rank: int, world_size: int, folder: Path) -> dict[int, Any]:
    """Begin a save, train on before it may be written, then let it."""
    import trainer.saver as module

    found = {}
    for stage in STAGES:
        gate, write = threading.Event(), module.write_moments

        def gated(*args: Any, gate: threading.Event = gate, write: Any = write) -> str:
            assert gate.wait(60)
            return write(*args)

        module.write_moments = gated
        engine = make(Case(stage))
        ema, saves = Ema(engine, 0.5), []
        saver = Saver(str(folder / str(stage)), engine, ema, Keep(newest=2), saves.append)
        advance(engine, range(2), rank, world_size)
        ema.update()
        expected = (
            {n: t.clone() for n, t in engine.whole_weights(everywhere=True).items()}, engine.optimizer_state(),
            {n: t.clone() for n, t in ema.whole(everywhere=True).items()},
        )  # fmt: skip
        saver.begin(state_of(2), About(frozen="f"))
        flags = [saver.flags()]
        advance(engine, range(2, 4), rank, world_size)
        ema.update()
        saver.settle(0, 0)
        assert saves == [] and not os.path.isdir(folder / str(stage) / "step_00000002")
        gate.set()
        module.write_moments = write
        saver.finish()
        flags.append(saver.flags())
        saver.close()
        found[stage] = (expected, flags, [(s.step, s.error) for s in saves], [s.stall_s <= s.seconds for s in saves])
        engine.close()
    return found


def test_a_checkpoint_is_of_the_moment_it_was_begun(tmp_path: Path) -> None:
    for found in run_ranks(written_later, 2, tmp_path / "ranks", tmp_path):
        for stage, ((weights, moments, ema), flags, saves, sane) in found.items():
            loaded = load_checkpoint(str(tmp_path / str(stage) / "step_00000002"))
            assert loaded.weights.keys() == weights.keys() == Network().state_dict().keys()
            assert all(torch.equal(loaded.weights[name], weights[name]) for name in weights)
            assert loaded.optimizer.keys() == moments.keys()
            assert all(torch.equal(loaded.optimizer[name], moments[name]) for name in moments)
            assert loaded.ema is not None and loaded.ema.keys() == weights.keys()
            assert all(torch.equal(loaded.ema[name], ema[name]) for name in ema)
            assert torch.equal(loaded.ema["frozen.weight"], weights["frozen.weight"])
            assert any(not torch.equal(ema[name], weights[name]) for name in ema)
            assert loaded.about.frozen == "f" and loaded.state == state_of(2)
            assert flags == [(0.0, 0.0), (0.0, 0.0)] and saves == [(2, None)] and sane == [True]


def settled(rank: int, world_size: int, folder: Path) -> Any:
    """The flags decide: a save ends when all ranks have written, not one flag earlier; an old sum ends no new save."""
    engine = make(Case(2))
    saves: list[Saved] = []
    saver = Saver(str(folder), engine, None, Keep(newest=1), saves.append)
    advance(engine, range(1), rank, world_size)
    saver.begin(state_of(1), About())
    saver._pending.writing.result()  # type: ignore[union-attr]
    saver.settle(world_size, 0)  # nobody has asked for flags yet: this sum is of something else
    early = len(saves)
    assert saver.flags() == (1.0, 0.0)
    saver.settle(world_size - 1, 0)
    partly = len(saves)
    saver.settle(world_size, 0)
    complete = len(saves)
    advance(engine, range(1, 2), rank, world_size)
    saver.begin(state_of(2), About())
    saver.begin(state_of(3), About())  # waits for the one before
    both = len(saves)
    saver.finish()
    saver.close()
    engine.close()
    return early, partly, complete, both, [s.step for s in saves]


def test_a_save_ends_when_all_ranks_are_done(tmp_path: Path) -> None:
    for found in run_ranks(settled, 2, tmp_path / "ranks", tmp_path / "c"):
        assert found == (0, 0, 1, 2, [1, 2, 3])
    assert list_checkpoints(str(tmp_path / "c")) == ["step_00000003"]
    assert sorted(os.listdir(tmp_path / "c")) == ["latest", "step_00000003"]


def failing(rank: int, world_size: int, folder: Path) -> Any:
    """The second of three saves fails on rank 1 alone, the commit of the fourth on rank 0."""
    import trainer.saver as module

    engine = make(Case(1))
    saves: list[Saved] = []
    saver = Saver(str(folder), engine, None, Keep(newest=9), saves.append)
    write, commit = module.write_moments, module.commit

    def refuse(*args: Any) -> str:
        raise storage.StorageError("rank 1: No space left on device")

    for step in range(1, 5):
        advance(engine, [step], rank, world_size)
        module.write_moments = refuse if step == 2 and rank == 1 else write
        module.commit = refuse if step == 4 else commit
        saver.begin(state_of(step), About())
        saver.finish()
    module.write_moments, module.commit = write, commit
    saver.close()
    engine.close()
    return [(s.step, s.error) for s in saves]


def test_a_failed_save_is_told_on_every_rank_and_leaves_nothing(tmp_path: Path) -> None:
    for saves in run_ranks(failing, 2, tmp_path / "ranks", tmp_path / "c"):
        assert [step for step, _ in saves] == [1, 2, 3, 4]
        assert [error is None for _, error in saves] == [True, False, True, False]
        assert "No space left on device" in saves[1][1]
    assert sorted(os.listdir(tmp_path / "c")) == ["latest", "step_00000001", "step_00000003"]
    assert find_checkpoint(str(tmp_path / "c")) == (str(tmp_path / "c" / "step_00000003"), [])


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    with small_disk(tmp_path / "disk", 1) as folder:
        yield folder


def filling(rank: int, world_size: int, folder: Path) -> Any:
    """Save; another program fills the disk; save; it leaves; save."""
    storage.require_free = lambda *args: None  # type: ignore[assignment]  # the space goes after that was asked
    engine = make(Case(2))
    saves: list[Saved] = []
    saver = Saver(str(folder / "checkpoints"), engine, None, Keep(newest=1), saves.append)
    found = []
    for step in range(1, 4):
        advance(engine, [step], rank, world_size)
        if step == 2:
            fill(folder / "other")
        saver.begin(state_of(step), About())
        saver.finish()
        found.append(find_checkpoint(str(folder / "checkpoints")))
        (folder / "other").unlink(missing_ok=True)
    saver.close()
    engine.close()
    return found, [(s.step, s.error) for s in saves]


def test_a_full_disk_costs_the_checkpoint_and_nothing_else(disk: Path, tmp_path: Path) -> None:
    ((found, saves),) = run_ranks(filling, 1, tmp_path / "ranks", disk)
    root = disk / "checkpoints"
    assert found == [(str(root / f"step_0000000{step}"), []) for step in (1, 1, 3)]
    assert [error is None for _, error in saves] == [True, False, True]
    assert "No space left" in saves[1][1] and "\n" not in saves[1][1]
    assert sorted(os.listdir(root)) == ["latest", "step_00000003"]


def space(rank: int, world_size: int, folder: Path) -> str:
    engine = make(Case(3))
    shutil.disk_usage = lambda path: type("Usage", (), {"free": 1000})()  # type: ignore[assignment,return-value]
    try:
        require_space(str(folder / "c"), engine, Keep(newest=3, best=2), existing=1)
    except storage.StorageError as error:
        return str(error)
    finally:
        engine.close()
    return "enough"


def test_a_disk_that_cannot_hold_the_run_is_said_before_it(tmp_path: Path) -> None:
    """Five that stay and the next one, less what is there: of whole tensors, whatever a rank has of them."""
    (first, second) = run_ranks(space, 2, tmp_path / "ranks", tmp_path)
    weights = sum(t.numel() for t in Network().parameters())
    trained = sum(p.numel() for p in Network().parameters() if p.requires_grad)
    assert first == second and "a run that keeps 5 checkpoints needs" in first
    assert storage.human_bytes(5 * 4 * (weights + 2 * trained)) in first


def averaged(rank: int, world_size: int) -> dict[int, Any]:
    found = {}
    for stage in STAGES:
        engine = make(Case(stage))
        ema = Ema(engine, 0.8)
        seen = [{n: t.clone() for n, t in engine.whole_weights(everywhere=True).items()}]
        for step in range(12):
            advance(engine, [step], rank, world_size)
            ema.update()
            seen.append({n: t.clone() for n, t in engine.whole_weights(everywhere=True).items()})
        whole = ema.whole(everywhere=True)
        other = Ema(engine, 0.8)
        other.load(whole)
        assert all(torch.equal(other.whole(everywhere=True)[name], whole[name]) for name in whole)
        found[stage] = (seen, {n: t.clone() for n, t in whole.items()})
        engine.close()
    return found


def test_the_average_is_that_of_its_formula(tmp_path: Path) -> None:
    for found in run_ranks(averaged, 2, tmp_path):
        for seen, whole in found.values():
            for name, tensor in whole.items():
                expected = seen[0][name].double()
                for n, weights in enumerate(seen[1:], start=1):
                    decay = min(0.8, (1 + n) / (10 + n))
                    expected = decay * expected + (1 - decay) * weights[name].double()
                assert torch.allclose(tensor.double(), expected, rtol=1e-5, atol=1e-7)


def crossed(rank: int, world_size: int, folder: Path) -> float:
    """What two ranks at stage 3 saved, on this many ranks at stage 1, in bf16."""
    path, passed = find_checkpoint(str(folder))
    assert path is not None and passed == []
    loaded, network = load_checkpoint(path), Network()
    network.load_state_dict(dict(loaded.weights))
    section = EngineSection(zero_stage=1, precision="bf16")
    engine = Engine(
        network, network.groups(), optim=Case(1).optim, engine=section, micro_batches=1, device=torch.device("cpu")
    )
    engine.load_optimizer_state(loaded.optimizer, loaded.state.applied_steps)
    moments = engine.optimizer_state()
    assert all(torch.equal(moments[name], loaded.optimizer[name]) for name in loaded.optimizer)
    engine.backward(loss_of(engine(inputs(5)[rank::world_size])) * len(inputs(5)[rank::world_size]) / ROWS, last=True)
    result = engine.step(rates(5))
    engine.close()
    return result.grad_norm


def saved_at_stage_3(rank: int, world_size: int, folder: Path) -> None:
    engine = make(Case(3))
    saver = Saver(str(folder), engine, None, Keep(newest=1), lambda saved: None)
    advance(engine, range(2), rank, world_size)
    saver.begin(replace(state_of(2), applied_steps=2), About())
    saver.finish()
    saver.close()
    engine.close()


def test_files_of_one_stage_and_size_are_read_at_another(tmp_path: Path) -> None:
    run_ranks(saved_at_stage_3, 2, tmp_path / "a", tmp_path / "c")
    assert all(norm > 0 for norm in run_ranks(crossed, 3, tmp_path / "b", tmp_path / "c"))
    with pytest.raises(KeyError):
        Whole().part("exp_avg/nothing", 0, 1)
    assert not os.path.exists(partial_folder(str(tmp_path / "c"), 2))
