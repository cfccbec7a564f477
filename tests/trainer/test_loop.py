"""The step: one gradient however the batch is cut, no update on a non-finite one, one counter, one vote."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.worker import WorkerContext
from dataio.types import Batch
from tests.trainer.batches import share, task_of, train_config
from tests.trainer.ranks import run_ranks
from trainer.loop import Loop, TrainingDiverged, cut, step_seed

KINDS = ("teacher", "student", "pretext")


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


def double(batch: Batch) -> Batch:
    """The batch in float64."""
    views = {name: view.double() for name, view in batch.views.items()}
    targets = {name: replace(t, value_BHW=t.value_BHW.double()) for name, t in batch.targets.items()}
    return replace(batch, views=views, targets=targets, weight_B=batch.weight_B.double())


def encoder_file(folder: Path) -> str:
    from model import DepthAnything
    from model.save import save_encoder

    torch.manual_seed(3)
    path = folder / "encoder.safetensors"
    save_encoder(DepthAnything.from_preset("tiny").pretrained, path)
    return str(path)


def first_gradients(rank: int, world_size: int, micro_counts: list[int], encoder: str) -> dict[Any, Any]:
    """Per (kind, micro-batches): gradient by name (Adam's first moment after one step over 1 - beta1) and terms."""
    found = {}
    for kind in KINDS:
        config = train_config(kind, encoder)
        for micro_batches in micro_counts:
            loop = make_loop(config, rank, world_size, micro_batches)
            loop.engine.module.double()  # so that rounding does not hide a wrong denominator; the moments stay fp32
            if getattr(loop.task, "frozen", None) is not None:
                loop.task.frozen.double()
            record = loop.train_step(double(share(config, rank, world_size)))
            terms = loop.global_terms(record)
            state = loop.engine.optimizer_state()
            gradient = {k: (v / 0.1).double().numpy() for k, v in state.items() if k.startswith("exp_avg/")}
            found[kind, micro_batches] = (gradient, terms, record.result.grad_norm)
    return found


@pytest.fixture(scope="module")
def gradients(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    folder = tmp_path_factory.mktemp("gradients")
    encoder = encoder_file(folder)
    alone = run_ranks(first_gradients, 1, folder / "one", [1, 2], encoder)[0]
    pair = run_ranks(first_gradients, 2, folder / "two", [1, 2], encoder)[0]
    four = run_ranks(first_gradients, 4, folder / "four", [1], encoder)[0]
    return {1: alone, 2: pair, 4: four, "encoder": encoder}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cut_as", [(1, 2), (2, 1), (2, 2), (4, 1)])
def test_the_gradient_does_not_depend_on_how_the_batch_was_cut(
    gradients: dict[Any, Any], kind: str, cut_as: tuple[int, int]
) -> None:
    world_size, micro_batches = cut_as
    expected, terms, norm = gradients[1][kind, 1]
    found, found_terms, found_norm = gradients[world_size][kind, micro_batches]
    assert found.keys() == expected.keys()
    length = sum((g**2).sum() for g in expected.values()) ** 0.5
    assert length > 1e-2
    error = sum(((found[name] - expected[name]) ** 2).sum() for name in expected) ** 0.5
    assert error <= 1e-6 * length
    assert found_terms == pytest.approx(terms, rel=1e-5)
    assert found_norm == pytest.approx(norm, rel=1e-5)


def test_the_gradient_is_that_of_the_plain_formula(gradients: dict[Any, Any]) -> None:
    """Autograd of the mean over good images, without engine, ranks or counts."""
    from trainer.losses import regional_affine_invariant_loss

    config = train_config("teacher", gradients["encoder"])
    torch.manual_seed(0)
    task = task_of(config)
    module = task.build().double()
    batch = double(share(config, 0, 1))
    pred_BHW = module(batch.views["student"]).disparity_BHW
    good = batch.weight_B > 0
    loss = regional_affine_invariant_loss(
        pred_BHW[good], batch.targets["disparity"].value_BHW[good], batch.region_BHW[good], 1
    ).mean()
    loss.backward()
    found, terms, _ = gradients[1]["teacher", 1]
    assert terms["labelled"] == pytest.approx(loss.item(), rel=1e-5)
    for name, parameter in module.named_parameters():
        if parameter.grad is not None and parameter.requires_grad:
            difference = abs(found[f"exp_avg/{name}"] - parameter.grad.double().numpy()).max()
            assert difference <= 1e-5 * max(1.0, float(parameter.grad.abs().max())), name


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
    assert last["bad"][1] == share(train_config("teacher"), 1, 2).keys
    for result in (first, last):
        assert (result["weights"][0] == result["weights"][1]).all()
        assert (result["weights"][2] != result["weights"][1]).any()
        assert (result["weights"][2] == result["weights"][2]).all()
        assert (result["applied"], result["step"]) == (2, 3)
    assert (first["weights"][2] == last["weights"][2]).all()


def diverging_run(rank: int, world_size: int) -> str:
    config = train_config("teacher", engine={"precision": "fp32", "max_skipped_steps": 2}, steps=10)
    loop = make_loop(config, rank, world_size, 1)
    batch = share(config, rank, world_size)
    batch.views["student"][:] = float("nan")
    try:
        loop.run(iter([batch] * 10), on_step=lambda record, batch: None, on_checkpoint=lambda: None)
    except TrainingDiverged as error:
        return str(error)
    return "went on"


def test_a_row_of_steps_without_update_gives_up(tmp_path: Path) -> None:
    (message,) = run_ranks(diverging_run, 1, tmp_path)
    assert "2 steps in a row" in message and "engine.max_skipped_steps" in message


def stopping_run(rank: int, world_size: int) -> tuple[Any, ...]:
    """Only the last rank is asked to stop, during its second step."""
    config = train_config("teacher", steps=10)
    loop = make_loop(config, rank, world_size, 1)
    saved = []

    def on_step(record: Any, batch: Any) -> None:
        if record.step == 2 and rank == world_size - 1:
            loop.context._stop = ("SIGTERM", None)

    batches = iter([share(config, rank, world_size, seed=s) for s in range(10)])
    reason = loop.run(batches, on_step=on_step, on_checkpoint=lambda: saved.append(loop.step))
    return reason is not None, loop.step, saved, dict(loop.cursor)


def test_all_ranks_stop_after_the_same_step_and_save(tmp_path: Path) -> None:
    first, last = run_ranks(stopping_run, 2, tmp_path)
    assert first == last == (True, 3, [3], {"labelled": 8 * 3})


def test_pieces_are_as_many_on_every_rank() -> None:
    batch = share(train_config("teacher"), 0, 4)  # two rows
    pieces = list(cut(batch, 4))
    assert len(pieces) == 4
    assert [p.weight_B.sum().item() for p in pieces] == [*batch.weight_B.tolist(), 0.0, 0.0]


def test_seeds_differ_by_step_and_rank() -> None:
    seeds = {step_seed(1, step, rank) for step in range(100) for rank in range(64)}
    assert len(seeds) == 6400
