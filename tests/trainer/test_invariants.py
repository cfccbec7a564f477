"""--debug: each thing that must hold around a step, broken on purpose, is found and named; a sound run goes on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer.batches import share, train_config
from tests.trainer.ranks import run_ranks
from tests.trainer.test_loop import make_loop
from trainer.ema import Ema
from trainer.invariants import InvariantBroken, Invariants, of_batch

Break = Callable[[Any, Any, Any], None]  # loop, ema, record


def nan_weight(loop: Any, ema: Any, record: Any) -> None:
    name = next(name for name in loop.engine.trained if len(loop.engine.spans[name]))
    loop.engine.weight_part(name)[:1] = float("nan")


def frozen_weight(loop: Any, ema: Any, record: Any) -> None:
    frozen = [p for p in loop.engine.module.parameters() if not p.requires_grad]
    target = frozen[0].ds_tensor if hasattr(frozen[0], "ds_tensor") else frozen[0].data
    target.add_(1.0)


def nan_average(loop: Any, ema: Any, record: Any) -> None:
    next(part for part in ema.parts.values() if part.numel())[:1] = float("nan")


def gradient_left(loop: Any, ema: Any, record: Any) -> None:
    parameter = next(p for p in loop.engine.module.parameters() if p.requires_grad and p.ndim == 1)
    parameter.grad = torch.ones_like(parameter)


def wrong_rate(loop: Any, ema: Any, record: Any) -> None:
    loop.engine.param_groups[0]["lr"] *= 2


def wrong_count(loop: Any, ema: Any, record: Any) -> None:
    loop.engine.applied_steps += 1


def said_skipped(loop: Any, ema: Any, record: Any) -> None:
    record.result = replace(record.result, skipped=True)
    loop.engine.applied_steps -= 1


BROKEN: dict[str, tuple[Break, str]] = {
    "nan_weight": (nan_weight, "is not finite"),
    "frozen_weight": (frozen_weight, "a frozen tensor has changed"),
    "nan_average": (nan_average, "the moving average is not finite"),
    "gradient_left": (gradient_left, "has a gradient between steps"),
    "wrong_rate": (wrong_rate, "has learning rate"),
    "wrong_count": (wrong_count, "applied_steps went from"),
    "said_skipped": (said_skipped, "a skipped step has changed weights"),
}


def broken(rank: int, world_size: int, stage: int) -> dict[str, str]:
    """Each fault after a sound step, on rank 1 alone."""
    messages = {}
    for name, (spoil, _) in {"nothing": (lambda *_: None, ""), **BROKEN}.items():
        config = train_config("teacher", engine={"precision": "fp32", "zero_stage": stage})
        loop = make_loop(config, rank, world_size, 1)
        ema = Ema(loop.engine, 0.9)
        checks = Invariants(loop.engine, ema)
        batch = share(config, rank, world_size)
        try:
            for step in range(2):
                checks.before_step(batch)
                record = loop.train_step(batch)
                ema.update()
                if step == 1 and rank == 1:
                    spoil(loop, ema, record)
                checks.after_step(record)
            messages[name] = "held"
        except InvariantBroken as error:
            messages[name] = str(error)
        loop.engine.close()
    return messages


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_what_is_broken_on_one_rank_is_told_on_all(tmp_path: Path, stage: int) -> None:
    first, last = run_ranks(broken, 2, tmp_path, stage)
    assert first == last
    assert first.pop("nothing") == "held"
    for name, (_, words) in BROKEN.items():
        assert words in first[name], name
        assert "rank 1: " in first[name] and "--debug found" in first[name] and "\n" not in first[name]


def ranks_apart(rank: int, world_size: int) -> str:
    config = train_config("teacher", engine={"precision": "fp32", "zero_stage": 0})
    loop = make_loop(config, rank, world_size, 1)
    checks = Invariants(loop.engine, None)
    if rank:
        next(iter(loop.engine.trained.values())).data.add_(1e-6)
    try:
        checks.before_step(share(config, rank, world_size))
    except InvariantBroken as error:
        return str(error)
    return "held"


def test_weights_that_differ_between_ranks_are_found(tmp_path: Path) -> None:
    assert all("the ranks' weights differ" in message for message in run_ranks(ranks_apart, 2, tmp_path))


def test_what_is_wrong_with_a_batch() -> None:
    batch = share(train_config("teacher"), 0, 1)
    assert list(of_batch(batch)) == []
    image_BCHW = batch.views["student"].clone()
    image_BCHW[0, 0, 0, 0] = float("inf")
    target = batch.targets["disparity"]
    value_BHW = target.value_BHW.masked_fill(batch.region_BHW == 0, float("nan"))
    assert list(of_batch(replace(batch, targets={"disparity": replace(target, value_BHW=value_BHW)}))) == []
    value_BHW = torch.full_like(value_BHW, float("nan"))
    for changed, words in (
        (replace(batch, views={"student": image_BCHW}), "view 'student' is not finite"),
        (replace(batch, targets={"disparity": replace(target, value_BHW=value_BHW)}), "not finite at valid pixels"),
        (replace(batch, weight_B=torch.ones_like(batch.weight_B)), "contradict each other"),
        (replace(batch, roles=(("labelled", 7),)), "rows are not the batch's"),
    ):
        (found,) = of_batch(changed)
        assert words in found
