"""One gradient however the global batch is cut into ranks and micro-batches: for every way to train, in float64."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dataio.types import Batch
from tests.trainer.batches import FROZEN_PRESET, VARIANTS, encoder_file, share, task_of, variant_config
from tests.trainer.ranks import run_ranks
from tests.trainer.test_loop import make_loop

# ranks -> micro-batches per step, of a global batch of 8 or 12 rows: 1x8, 2x4 and 4x2 in two goes
CUTS = {1: 1, 2: 1, 4: 2}


def double(batch: Batch) -> Batch:
    """The batch in float64."""
    views = {name: view.double() for name, view in batch.views.items()}
    targets = {name: replace(t, value_BHW=t.value_BHW.double()) for name, t in batch.targets.items()}
    return replace(batch, views=views, targets=targets, weight_B=batch.weight_B.double())


def first_gradients(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    """Per variant: gradient by name (Adam's first moment after one step over 1 - beta1), terms and norm."""
    found = {}
    for variant in VARIANTS:
        config = variant_config(variant, folder)
        loop = make_loop(config, rank, world_size, CUTS[world_size])
        loop.engine.module.double()  # so that rounding does not hide a wrong denominator; the moments stay fp32
        if getattr(loop.task, "frozen", None) is not None:
            loop.task.frozen.double()
        record = loop.train_step(double(share(config, rank, world_size)))
        terms = loop.global_terms(record)
        state = loop.engine.optimizer_state()
        gradient = {
            k.removeprefix("exp_avg/"): (v / 0.1).double() for k, v in state.items() if k.startswith("exp_avg/")
        }
        found[variant] = (gradient, terms, record.result.grad_norm)
    return found if rank == 0 else {}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Where the encoders' files lie."""
    made = tmp_path_factory.mktemp("encoders")
    for preset in ("tiny", FROZEN_PRESET):
        encoder_file(made, preset)
    return str(made)


@pytest.fixture(scope="module")
def gradients(folder: str) -> dict[int, dict[str, Any]]:
    """Per number of ranks what `first_gradients` found."""
    return {ranks: run_ranks(first_gradients, ranks, Path(folder, str(ranks)), folder)[0] for ranks in CUTS}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("ranks", [2, 4])
def test_the_gradient_does_not_depend_on_how_the_batch_was_cut(
    gradients: dict[int, dict[str, Any]], variant: str, ranks: int
) -> None:
    expected, terms, norm = gradients[1][variant]
    found, found_terms, found_norm = gradients[ranks][variant]
    assert found.keys() == expected.keys()
    length = sum(float(g.square().sum()) for g in expected.values()) ** 0.5
    assert length > 1e-2
    error = sum(float((found[name] - expected[name]).square().sum()) for name in expected) ** 0.5
    assert error <= 1e-6 * length
    assert found_terms == pytest.approx(terms, rel=1e-5)
    assert found_norm == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_gradient_is_that_of_the_mean_over_good_images(
    gradients: dict[int, dict[str, Any]], variant: str, folder: str
) -> None:
    """Autograd of the weighted mean of every term's images, one image at a time, without engine, ranks or counts."""
    config = variant_config(variant, folder)
    torch.manual_seed(0)
    task: Any = task_of(config)
    module = task.build().double()
    if getattr(task, "frozen", None) is not None:
        task.frozen.double()
    ones = [one for one in double(share(config, 0, 1)).split(1) if one.weight_B.item() > 0]
    loss = torch.zeros((), dtype=torch.float64)
    for term, weight in task.term_weights.items():
        of_term = [one for one in ones if task.counts(one)[term] > 0]
        loss = loss + weight * torch.stack([task.sums(module, one)[term] for one in of_term]).mean()
    loss.backward()
    found, terms, _ = gradients[1][variant]
    total = sum(weight * terms[term] for term, weight in task.term_weights.items())
    assert total == pytest.approx(loss.item(), rel=1e-6)
    for name, parameter in module.named_parameters():
        if parameter.grad is not None and parameter.requires_grad:
            difference = (found[name] - parameter.grad).abs().max()
            assert difference <= 1e-5 * max(1.0, float(parameter.grad.abs().max())), name


def test_the_projection_is_trained_with_the_decoder(gradients: dict[int, dict[str, Any]]) -> None:
    found, _, _ = gradients[1]["student-projected"]
    assert found["projection.weight"].any() and found["projection.bias"].any()
