"""Bytes of the plan against those of a real engine's live tensors: two ranks, every stage, with offload and without."""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pytest
import torch

from tests.trainer.batches import train_config
from tests.trainer.ranks import run_ranks
from trainer import optim
from trainer.footprint import Footprint, footprint
from trainer.tasks.base import make_task

TOLERANCE = 0.08  # of the network's fp32 bytes: padding, counters, a parameter that two ranks have parts of
SMALL = 100  # elements that stay whole where stage 3 is given a limit


class Case(NamedTuple):
    """`gathered`: stage 3's limits in elements; None: as they are, which this small network never reaches."""

    stage: int
    offload: bool = False
    gathered: int | None = None


CASES = [
    *(Case(stage) for stage in (0, 1, 2, 3)),
    *(Case(stage, offload=True) for stage in (1, 2, 3)),
    Case(3, gathered=100_000),
]


def config_of(case: Case) -> Any:
    engine = {"precision": "fp32", "zero_stage": case.stage, "cpu_offload": case.offload}
    return train_config("teacher", engine=engine)


def live_bytes() -> int:
    """Of all tensors of this process, each storage once, gradients included."""
    gc.collect()
    storages = {}
    for tensor in (found for found in gc.get_objects() if issubclass(type(found), torch.Tensor)):
        for one in (tensor, tensor.grad if tensor.is_leaf else None):
            if one is not None and one.device.type != "meta":
                storages[one.untyped_storage()._cdata] = one.untyped_storage().nbytes()
    return sum(storages.values())


def held(rank: int, world_size: int, cases: list[Case]) -> list[dict[str, Any]]:
    """For every case: live bytes once the engine is built, after a step, and the most there were on the way."""
    return [_held(case, live_bytes if rank == 0 else int) for case in cases]


def _held(case: Case, live: Callable[[], int]) -> dict[str, Any]:
    import trainer.engine as module

    module.deepspeed_config = getattr(module.deepspeed_config, "__wrapped__", module.deepspeed_config)
    if case.gathered is not None:  # for good: these cases come last
        optim.GATHERED, optim.SMALL = case.gathered, SMALL
    config, before = config_of(case), live()
    task = make_task(config)
    torch.manual_seed(0)
    network = task.build().train()
    image_BCHW = torch.zeros(1, 3, config.data.input_size, config.data.input_size)
    engine = module.Engine(
        network, task.parameter_groups(network), optim=config.optim, engine=config.engine, micro_batches=2,
        device=torch.device("cpu"),
    )  # fmt: skip
    del network
    seen = {"built": live() - before}
    on_the_way = []
    for step in range(2):  # at stage 3 the first step records the order of the modules, and holds nothing
        for last in (False, True):
            loss = engine(image_BCHW).disparity_BHW.mean()
            if step:
                on_the_way.append(live() - before)
            engine.backward(loss, last=last)
            del loss
            if step and not last:
                on_the_way.append(live() - before)
        engine.step({"encoder": 1e-3, "decoder": 1e-3})
    seen["step"] = live() - before
    weights = engine.whole_weights(everywhere=True)
    digest = hashlib.sha256(b"".join(weights[name].detach().numpy().tobytes() for name in sorted(weights))).hexdigest()
    engine.close()
    return {**seen, "most": max(on_the_way), "weights": digest}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Mapping[Case, dict[str, Any]]:
    return dict(zip(CASES, run_ranks(held, 2, tmp_path_factory.mktemp("ranks"), CASES)[0], strict=True))


def planned(case: Case, monkeypatch: pytest.MonkeyPatch) -> Footprint:
    if case.gathered is not None:
        monkeypatch.setattr(optim, "GATHERED", case.gathered)
        monkeypatch.setattr(optim, "SMALL", SMALL)
    return footprint(config_of(case), 2)


def at_rest(case: Case, plan: Footprint) -> int:
    """By the plan, between two steps: no gradients, and the bucket at stage 3 alone. Of the 16 bytes a parameter that
    ZeRO cuts 4 are a gradient's, which are there while the optimizer steps, or always where it is in main memory."""
    share, bucket = plan.trained // 2, 4 * plan.trained
    if case.stage == 0:
        return plan.weights + plan.optimizer
    if case.stage < 3:
        own = buffers(case) if case.offload else plan.optimizer - 4 * share - bucket
        return plan.weights + own + plan.main_memory
    kept = plan.optimizer - (0 if case.offload else 4 * share)
    return plan.weights + plan.gathered + plan.gradients + kept + plan.main_memory


def buffers(case: Case) -> int:
    """On the device and in main memory one each, by which gradients travel; of a real network's size a hundredth."""
    with torch.device("meta"):
        network = make_task(config_of(case)).build()
    return 2 * 4 * max(p.numel() for p in network.parameters())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_a_real_engine_holds(
    case: Case, measured: Mapping[Case, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, seen = planned(case, monkeypatch), measured[case]
    expected, slack = at_rest(case, plan), TOLERANCE * 4 * plan.parameters
    if case.gathered is not None:  # with its limit stage 3 lets go of all between steps
        expected -= plan.gathered
        assert seen["most"] - seen["step"] > 0.5 * plan.gathered
    assert seen["step"] == pytest.approx(expected, abs=slack)
    # a forward pass makes what is gathered, the first step the moments, the first gradient what stage 2 adds up
    late = 8 * (plan.trained if case.stage == 0 else plan.trained // 2)
    late += plan.gathered if case.gathered is None else 0
    late += 4 * (plan.trained // 2) if case.stage == 2 and case.offload else 0
    assert seen["built"] == pytest.approx(expected - late, abs=slack)
    extra = buffers(case) if case.offload else 0
    assert seen["most"] <= plan.total(1) + plan.main_memory + extra + slack


def test_how_much_is_gathered_changes_no_weight(measured: Mapping[Case, dict[str, Any]]) -> None:
    digests = {measured[case]["weights"] for case in CASES if case.stage == 3 and not case.offload}
    assert len(digests) == 1


def test_deepspeed_is_told_the_limits_that_are_counted() -> None:
    from trainer.engine import deepspeed_config

    zero = deepspeed_config(config_of(Case(3)).optim, config_of(Case(3)).engine, 1, 10)["zero_optimization"]
    assert zero["stage3_max_live_parameters"] == zero["stage3_max_reuse_distance"] == optim.GATHERED
    assert zero["stage3_param_persistence_threshold"] == optim.SMALL
    assert optim.gathered_elements([optim.SMALL, optim.GATHERED, optim.GATHERED]) == optim.SMALL + optim.GATHERED
