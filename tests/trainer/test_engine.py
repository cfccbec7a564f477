"""DeepSpeed behind the engine: against plain AdamW, on one rank and on two, through a saved state and back."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.trainer.ranks import run_ranks
from trainer.config_train import EngineSection, OptimSection
from trainer.engine import MOMENTS, Engine, deepspeed_config

RATES = [{"encoder": 1e-3, "decoder": 1e-2}, {"encoder": 5e-4, "decoder": 5e-3}] * 2
ROWS = 4
CASES = [(stage, clip) for stage in (1, 2) for clip in (0.0, 0.1)]


class Network(nn.Module):
    """Two groups of several parameters, odd sizes, and one that is frozen."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
        self.decoder = nn.Sequential(nn.Linear(3, 11), nn.Linear(11, 1))
        self.frozen = nn.Linear(3, 3).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.decoder(self.frozen(self.encoder(x).tanh()))
        return out

    def groups(self) -> dict[str, list[tuple[str, nn.Parameter]]]:
        named = [(name, p) for name, p in self.named_parameters() if p.requires_grad]
        return {
            "encoder": [(n, p) for n, p in named if n.startswith("encoder")],
            "decoder": [(n, p) for n, p in named if n.startswith("decoder")],
        }


def inputs(step: int) -> Tensor:
    return torch.randn(ROWS, 5, generator=torch.Generator().manual_seed(step))


def loss_of(output: Tensor) -> Tensor:
    return (output - 3).square().mean()


def make(stage: int, clip: float, network: Network | None = None) -> Engine:
    network = network or Network()
    optim = OptimSection(weight_decay=0.1, clip=clip)
    section = EngineSection(zero_stage=stage, precision="fp32")
    device = torch.device("cpu")
    return Engine(network, network.groups(), optim=optim, engine=section, micro_batches=2, device=device)


def advance(engine: Engine, steps: Iterable[int], rank: int, world_size: int) -> list[float]:
    """Each step in two micro-batches of this rank's rows; returns the gradient norms."""
    norms = []
    for step in steps:
        pieces = inputs(step)[rank::world_size].chunk(2)
        for index, piece in enumerate(pieces):
            engine.backward(loss_of(engine(piece)) / 2, last=index == 1)
        norms.append(engine.step(RATES[step]).grad_norm)
    return norms


def facts(engine: Engine, norms: list[float]) -> dict[str, Any]:
    weights = {name: tensor.detach().clone() for name, tensor in engine.module.state_dict().items()}
    return {"weights": weights, "moments": engine.optimizer_state(), "norms": norms, "applied": engine.applied_steps}


def trained(rank: int, world_size: int) -> dict[Any, Any]:
    """Two steps of every case."""
    found = {}
    for case in CASES:
        engine = make(*case)
        assert engine.optimizer_state() == {}
        found[case] = facts(engine, advance(engine, range(2), rank, world_size))
        engine.close()
    return found


def continued(rank: int, world_size: int, saved: dict[Any, Any]) -> dict[Any, Any]:
    """Two more steps from what `trained` gave, in another process."""
    found = {}
    for case in CASES:
        network = Network()
        network.load_state_dict(saved[case]["weights"])
        engine = make(*case, network)
        engine.load_optimizer_state(saved[case]["moments"], saved[case]["applied"])
        restored = engine.optimizer_state()
        found[case] = facts(engine, advance(engine, range(2, 4), rank, world_size)) | {"restored": restored}
        engine.close()
    return found


def plain(clip: float, steps: int) -> dict[str, Any]:
    """The same in plain PyTorch on the whole batch."""
    network = Network()
    groups = network.groups()
    optimizer = torch.optim.AdamW([{"params": [p for _, p in groups[name]]} for name in groups], weight_decay=0.1)
    norms = []
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(network(inputs(step))).backward()
        trainable = [p for named in groups.values() for _, p in named]
        norms.append(float(nn.utils.clip_grad_norm_(trainable, clip if clip else float("inf"))))
        for group, name in zip(optimizer.param_groups, groups, strict=True):
            group["lr"] = RATES[step][name]
        optimizer.step()
    moments = {f"{m}/{n}": optimizer.state[p][m] for m in MOMENTS for named in groups.values() for n, p in named}
    return {"weights": network.state_dict(), "moments": moments, "norms": norms}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[Any, Any]]:
    folder: Path = tmp_path_factory.mktemp("engine")
    pair = run_ranks(trained, 2, folder / "two")
    alone = run_ranks(trained, 1, folder / "one")[0]
    return {
        "two": pair[0],
        "two, rank 1": pair[1],
        "one": alone,
        "two, then one": run_ranks(continued, 1, folder / "continued_one", pair[0])[0],
        "one, then two": run_ranks(continued, 2, folder / "continued_two", alone)[1],
    }


def close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        torch.allclose(found[name], expected[name], rtol=1e-4, atol=1e-6) for name in expected
    )


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("ranks", ["one", "two", "two, rank 1"])
def test_it_is_plain_adamw(runs: dict[str, dict[Any, Any]], ranks: str, case: tuple[int, float]) -> None:
    found, expected = runs[ranks][case], plain(case[1], 2)
    assert found["norms"] == pytest.approx(expected["norms"], rel=1e-4)
    assert close(found["weights"], expected["weights"])
    assert found["applied"] == 2


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("ranks", ["one", "two", "two, rank 1"])
def test_the_moments_of_every_group_can_be_read(
    runs: dict[str, dict[Any, Any]], ranks: str, case: tuple[int, float]
) -> None:
    moments = runs[ranks][case]["moments"]
    assert close(moments, plain(case[1], 2)["moments"])
    assert all(moment.abs().max() > 0 for moment in moments.values())
    assert not any("frozen" in name for name in moments)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("before", "after"), [("two", "two, then one"), ("one", "one, then two")])
def test_a_state_goes_on_on_another_number_of_ranks(
    runs: dict[str, dict[Any, Any]], before: str, after: str, case: tuple[int, float]
) -> None:
    saved, found, expected = runs[before][case], runs[after][case], plain(case[1], 4)
    assert all(torch.equal(found["restored"][name], moment) for name, moment in saved["moments"].items())
    assert found["restored"].keys() == saved["moments"].keys()
    assert close(found["weights"], expected["weights"])
    assert close(found["moments"], expected["moments"])
    assert found["applied"] == 4


def test_clipping_changes_the_step(runs: dict[str, dict[Any, Any]]) -> None:
    clipped, free = runs["two"][2, 0.1], runs["two"][2, 0.0]
    assert min(free["norms"]) > 0.2
    assert clipped["norms"][0] == pytest.approx(free["norms"][0])  # the norm before clipping is what is reported
    length = sum(float(m.square().sum()) for name, m in clipped["moments"].items() if name.startswith("exp_avg/"))
    assert length**0.5 <= 0.1


def test_frozen_parameters_stay_as_they_are(runs: dict[str, dict[Any, Any]]) -> None:
    for name, tensor in Network().frozen.state_dict().items():
        assert torch.equal(runs["two, then one"][2, 0.0]["weights"][f"frozen.{name}"], tensor)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [1, 2])
def test_deepspeed_knows_every_key(stage: int, precision: str) -> None:
    """DeepSpeed takes a misspelt top-level key without a word."""
    from deepspeed.runtime import constants
    from deepspeed.runtime.zero.config import ZERO_OPTIMIZATION, DeepSpeedZeroConfig

    section = EngineSection(zero_stage=stage, precision=precision)
    config = deepspeed_config(OptimSection(clip=0.5), section, 3)
    known = {value for name, value in vars(constants).items() if name.isupper() and isinstance(value, str)}
    assert set(config) <= known | {ZERO_OPTIMIZATION}
    assert set(config["zero_optimization"]) <= set(DeepSpeedZeroConfig.model_fields)
    autocast = {value for name, value in vars(constants).items() if name.startswith("TORCH_AUTOCAST_")}
    assert set(config.get("torch_autocast", {})) <= autocast
    assert ("torch_autocast" in config) == (precision == "bf16")
    assert config["zero_optimization"]["stage"] == stage
    assert (config["gradient_clipping"], config["gradient_accumulation_steps"]) == (0.5, 3)
