"""One gradient however the global batch is cut into ranks and micro-batches: for every way to train, in float64.

The reference is autograd of the plain mean over good images, one image at a time. Against it stand the step's
arithmetic for every cut (`cut`, sums, counts), and the step itself, on real ranks with the real engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dataio.types import Batch
from tests.trainer.batches import FROZEN_PRESET, VARIANTS, encoder_file, share, task_of, variant_config
from tests.trainer.ranks import run_ranks
from trainer.config_train import TrainConfig
from trainer.loop import cut

# ranks, micro-batches per step; of a global batch of 8 or 12 rows
CUTS = [(1, 1), (1, 2), (1, 8), (2, 1), (2, 2), (2, 4), (4, 1), (4, 2)]
# The processes: ranks -> (micro-batches, variants). Four ranks say nothing of a task that two and every cut do not.
PROCESSES = {2: (2, tuple(VARIANTS)), 4: (2, ("student", "metric"))}

Gradient = dict[str, Tensor]


def double(batch: Batch) -> Batch:
    """The batch in float64."""
    views = {name: view.double() for name, view in batch.views.items()}
    targets = {name: replace(t, value_BHW=t.value_BHW.double()) for name, t in batch.targets.items()}
    return replace(batch, views=views, targets=targets, weight_B=batch.weight_B.double())


def built(config: TrainConfig) -> tuple[Any, nn.Module]:
    """Task and network in float64, so that rounding does not hide a wrong denominator."""
    torch.manual_seed(0)
    task: Any = task_of(config)
    module = task.build().double()
    if getattr(task, "frozen", None) is not None:
        task.frozen.double()
    return task, module


def gradient_of(module: nn.Module) -> Gradient:
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def distance(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Length of the difference over the length of what is expected."""
    length = sum(float(g.double().square().sum()) for g in expected.values()) ** 0.5
    assert length > 1e-2
    error = sum(float((found[name].double() - g.double()).square().sum()) for name, g in expected.items()) ** 0.5
    return error / length


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Where the encoders' files lie."""
    made = tmp_path_factory.mktemp("encoders")
    for preset in ("tiny", FROZEN_PRESET):
        encoder_file(made, preset)
    return str(made)


@pytest.fixture(scope="module")
def references(folder: str) -> dict[str, tuple[Gradient, float]]:
    """Per variant, gradient and loss of the weighted mean of every term's good images, one image at a time."""
    found = {}
    for variant in VARIANTS:
        config = variant_config(variant, folder)
        task, module = built(config)
        ones = [one for one in double(share(config, 0, 1)).split(1) if one.weight_B.item() > 0]
        loss = torch.zeros((), dtype=torch.float64)
        for term, weight in task.term_weights.items():
            of_term = [task.sums(module, one)[term] for one in ones if task.counts(one)[term] > 0]
            loss = loss + weight * torch.stack(of_term).mean()
        loss.backward()
        found[variant] = (gradient_of(module), loss.item())
    return found


@pytest.mark.parametrize("variant", VARIANTS)
def test_sums_over_counts_give_one_gradient_for_every_cut(
    variant: str, folder: str, references: dict[str, tuple[Gradient, float]]
) -> None:
    expected, expected_loss = references[variant]
    config = variant_config(variant, folder)
    task, module = built(config)
    for ranks, micro_batches in CUTS:
        module.zero_grad()
        shares = [double(share(config, rank, ranks)) for rank in range(ranks)]
        counts = {term: sum(task.counts(batch)[term] for batch in shares) for term in task.term_weights}
        total = 0.0
        for batch in shares:
            for micro in cut(batch, micro_batches):
                sums = task.sums(module, micro)
                loss = sum(weight * sums[term] / counts[term] for term, weight in task.term_weights.items())
                loss.backward()
                total += loss.item()
        # not nearer: of pixels that tie for the median, rounding says which one moves it
        assert distance(gradient_of(module), expected) < 1e-6, (ranks, micro_batches)
        assert total == pytest.approx(expected_loss, rel=1e-9)


def first_gradients(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    """Per variant: gradient by name (Adam's first moment after one step over 1 - beta1), loss and norm."""
    from tests.trainer.test_loop import make_loop

    micro_batches, variants = PROCESSES[world_size]
    found = {}
    for variant in variants:
        config = variant_config(variant, folder)
        loop = make_loop(config, rank, world_size, micro_batches)
        loop.engine.module.double()  # the moments stay fp32
        if getattr(loop.task, "frozen", None) is not None:
            loop.task.frozen.double()  # type: ignore[attr-defined]
        record = loop.train_step(double(share(config, rank, world_size)))
        terms = loop.global_terms(record)
        loss = sum(weight * terms[term] for term, weight in loop.task.term_weights.items())
        state = loop.engine.optimizer_state()
        gradient = {k.removeprefix("exp_avg/"): v / 0.1 for k, v in state.items() if k.startswith("exp_avg/")}
        found[variant] = (gradient, loss, record.result.grad_norm)
    return found if rank == 0 else {}


@pytest.fixture(scope="module")
def two(folder: str) -> dict[str, Any]:
    """What `first_gradients` finds on two ranks."""
    return run_ranks(first_gradients, 2, Path(folder, "2"), folder)[0]


@pytest.mark.parametrize("variant", PROCESSES[2][1])
def test_two_ranks_of_the_real_engine_take_that_gradient(
    two: dict[str, Any], references: dict[str, tuple[Gradient, float]], variant: str
) -> None:
    check(two[variant], references[variant])


@pytest.mark.slow
def test_so_do_four(folder: str, references: dict[str, tuple[Gradient, float]]) -> None:
    found = run_ranks(first_gradients, 4, Path(folder, "4"), folder)[0]
    for variant in PROCESSES[4][1]:
        check(found[variant], references[variant])


def check(taken: tuple[Gradient, float, float], reference: tuple[Gradient, float]) -> None:
    """What an engine took is the reference, up to its moments' float32."""
    (found, loss, norm), (expected, expected_loss) = taken, reference
    assert found.keys() == expected.keys()
    assert distance(found, expected) < 1e-6
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    length = sum(float(g.square().sum()) for g in expected.values()) ** 0.5
    assert norm == pytest.approx(length, rel=1e-5)


def test_the_projection_is_trained(references: dict[str, tuple[Gradient, float]]) -> None:
    gradient, _ = references["student-projected"]
    assert gradient["projection.weight"].any() and gradient["projection.bias"].any()
