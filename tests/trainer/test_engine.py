"""DeepSpeed behind the engine: against plain PyTorch, at every ZeRO stage, on one to three ranks, through a saved state
and back at another stage."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from tests.trainer.ranks import run_ranks
from trainer.config_train import EngineSection, OptimSection
from trainer.engine import Engine, deepspeed_config
from trainer.engine_state import MOMENTS
from trainer.schedule import factor

ROWS = 6
STAGES = (0, 1, 2, 3)


class Case(NamedTuple):
    """One way to be set up."""

    stage: int
    clip: float = 0.0
    optimizer: str = "adamw"
    bare: bool = True  # norms and biases are decayed too
    offload: bool = False

    @property
    def optim(self) -> OptimSection:
        return OptimSection(
            weight_decay=0.1, clip=self.clip, optimizer=self.optimizer, decay_norms_and_biases=self.bare,
            betas=(0.8, 0.95), eps=1e-7,
        )  # fmt: skip


CASES = [
    *(Case(stage) for stage in STAGES),
    *(Case(stage, clip=0.1, optimizer="adam", bare=False) for stage in STAGES),
    *(Case(stage, offload=True) for stage in (1, 2, 3)),
]


class Network(nn.Module):
    """Two groups of several parameters, odd sizes, a norm, an embedding, a buffer, and one that is frozen."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3))
        self.pos_embed = nn.Parameter(torch.randn(1, 1, 5))
        self.decoder = nn.Sequential(nn.Linear(3, 11), nn.Linear(11, 1))
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.register_buffer("offset", torch.tensor([0.25]))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.decoder(self.frozen(self.encoder(x + self.pos_embed[0]).tanh()))
        return out + self.offset

    def groups(self) -> dict[str, list[tuple[str, nn.Parameter]]]:
        named = [(name, p) for name, p in self.named_parameters() if p.requires_grad]
        return {
            "encoder": [(n, p) for n, p in named if not n.startswith("decoder")],
            "decoder": [(n, p) for n, p in named if n.startswith("decoder")],
        }


class Whole(dict[str, Tensor]):
    """Whole tensors as what a checkpoint's reader gives."""

    def part(self, name: str, start: int, stop: int) -> Tensor:
        return self[name].reshape(-1)[start:stop]


def rates(step: int) -> dict[str, float]:
    scale = factor(step * ROWS, 200 * ROWS, 10 * ROWS, "cosine")
    return {"encoder": 1e-3 * scale, "decoder": 1e-2 * scale}


def inputs(step: int) -> Tensor:
    return torch.randn(ROWS, 5, generator=torch.Generator().manual_seed(step))


def loss_of(output: Tensor) -> Tensor:
    return (output - 3).square().mean()


def make(case: Case, network: Network | None = None, precision: str = "fp32") -> Engine:
    network = network or Network()
    section = EngineSection(zero_stage=case.stage, precision=precision, cpu_offload=case.offload)
    device = torch.device("cpu")
    return Engine(network, network.groups(), optim=case.optim, engine=section, micro_batches=2, device=device)


def advance(engine: Engine, steps: Iterable[int], rank: int, world_size: int) -> list[float]:
    """Each step in two micro-batches of this rank's rows; returns the gradient norms."""
    norms = []
    for step in steps:
        pieces = inputs(step)[rank::world_size].chunk(2)
        for index, piece in enumerate(pieces):
            engine.backward(loss_of(engine(piece)) * len(piece) * world_size / ROWS, last=index == 1)
        norms.append(engine.step(rates(step)).grad_norm)
    return norms


def facts(engine: Engine, norms: list[float]) -> dict[str, Any]:
    weights = {name: t.detach().clone() for name, t in engine.whole_weights(everywhere=True).items()}
    groups = [{k: v for k, v in entry.items() if k not in ("params", "lr")} for entry in engine.param_groups]
    rates_now = {entry["name"]: entry["lr"] for entry in engine.param_groups}
    parts = {name: engine.weight_part(name).clone() for name in engine.trained}
    return {
        "weights": weights, "moments": engine.optimizer_state(), "norms": norms, "applied": engine.applied_steps,
        "groups": groups, "rates": rates_now, "steps": engine.optimizer_steps(), "parts": parts, "spans": engine.spans,
    }  # fmt: skip


def trained(rank: int, world_size: int, steps: int) -> dict[Case, Any]:
    """Some steps of every case."""
    found = {}
    for case in CASES:
        engine = make(case)
        assert engine.optimizer_state() == {} and engine.moment_parts() == {}
        found[case] = facts(engine, advance(engine, range(steps), rank, world_size))
        engine.close()
    return found


def continued(rank: int, world_size: int, saved: dict[Case, Any], stages: Mapping[int, int]) -> dict[Case, Any]:
    """Two more steps from what `trained` gave, in another process and perhaps at another stage."""
    found = {}
    for case in CASES:
        network = Network()
        with torch.no_grad():
            network.frozen.weight.zero_()  # what the constructor makes is not what was saved
        network.load_state_dict(saved[case]["weights"])
        target = case._replace(stage=stages.get(case.stage, case.stage)) if not case.offload else case
        engine = make(target, network)
        engine.load_optimizer_state(Whole(saved[case]["moments"]), saved[case]["applied"])
        restored = engine.optimizer_state()
        for entry in engine.param_groups:  # as after a load that mixes groups up
            entry.update(lr=9.0, weight_decay=0.7, betas=(0.1, 0.2), eps=1.0)
        found[case] = facts(engine, advance(engine, range(2, 4), rank, world_size)) | {"restored": restored}
        engine.close()
    return found


def plain(case: Case, steps: int) -> dict[str, Any]:
    """The same in plain PyTorch on the whole batch."""
    network = Network()
    entries = []
    for group, named in network.groups().items():
        for name, p in named:
            decays = case.bare or (p.ndim > 1 and name != "pos_embed")
            entries.append({"params": [p], "weight_decay": 0.1 if decays else 0.0, "group": group})
    kind = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[case.optimizer]
    optimizer = kind(entries, lr=0.0, betas=(0.8, 0.95), eps=1e-7)
    norms = []
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(network(inputs(step))).backward()
        trainable = [entry["params"][0] for entry in entries]
        norms.append(float(nn.utils.clip_grad_norm_(trainable, case.clip or float("inf"))))
        for entry in optimizer.param_groups:
            entry["lr"] = rates(step)[entry["group"]]
        optimizer.step()
    names = [name for named in network.groups().values() for name, _ in named]
    parameters = dict(network.named_parameters())
    moments = {f"{m}/{n}": optimizer.state[parameters[n]][m] for m in MOMENTS for n in names}
    return {"weights": network.state_dict(), "moments": moments, "norms": norms}


OTHER = {0: 3, 1: 2, 2: 0, 3: 1}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder: Path = tmp_path_factory.mktemp("engine")
    pair = run_ranks(trained, 2, folder / "two", 2)
    alone = run_ranks(trained, 1, folder / "one", 2)[0]
    return {
        "two": pair[0],
        "two, rank 1": pair[1],
        "one": alone,
        "two, then one": run_ranks(continued, 1, folder / "a", pair[0], {})[0],
        "one, then three": run_ranks(continued, 3, folder / "b", alone, {})[1],
        "two, then two at another stage": run_ranks(continued, 2, folder / "c", pair[0], OTHER)[1],
    }


def close(found: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 1e-4) -> bool:
    return found.keys() == expected.keys() and all(
        torch.allclose(found[name], expected[name], rtol=rtol, atol=1e-6) for name in expected
    )


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("ranks", ["one", "two", "two, rank 1"])
def test_it_is_plain_pytorch(runs: dict[str, Any], ranks: str, case: Case) -> None:
    found, expected = runs[ranks][case], plain(case, 2)
    assert found["norms"] == pytest.approx(expected["norms"], rel=1e-4)
    assert close(found["weights"], expected["weights"])
    assert found["applied"] == 2 and found["steps"] == {2}


def test_over_a_hundred_steps_it_is_plain_pytorch(tmp_path: Path) -> None:
    """Every stage, with warm-up and cosine decay of both rates, clipping, Adam and AdamW."""
    found = run_ranks(trained, 2, tmp_path, 100)[0]
    for case in CASES:
        expected = plain(case, 100)
        assert found[case]["norms"] == pytest.approx(expected["norms"], rel=2e-3, abs=1e-3), case
        weights, start = expected["weights"], Network().state_dict()
        moved = sum(float((weights[n] - start[n]).square().sum()) for n in weights) ** 0.5
        apart = sum(float((found[case]["weights"][n] - weights[n]).square().sum()) for n in weights) ** 0.5
        assert apart <= 1e-3 * moved, case  # rounding grows with every step


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("ranks", ["one", "two", "two, rank 1"])
def test_the_moments_of_every_group_can_be_read(runs: dict[str, Any], ranks: str, case: Case) -> None:
    """Stages 1 and 2 of DeepSpeed link the states of the first group only."""
    moments = runs[ranks][case]["moments"]
    assert close(moments, plain(case, 2)["moments"])
    assert all(moment.abs().max() > 0 for moment in moments.values())
    assert not any("frozen" in name for name in moments)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("before", "after"),
    [("two", "two, then one"), ("one", "one, then three"), ("two", "two, then two at another stage")],
)
def test_a_state_goes_on_on_other_ranks_and_stages(runs: dict[str, Any], before: str, after: str, case: Case) -> None:
    saved, found, expected = runs[before][case], runs[after][case], plain(case, 4)
    assert all(torch.equal(found["restored"][name], moment) for name, moment in saved["moments"].items())
    assert found["restored"].keys() == saved["moments"].keys()
    assert close(found["weights"], expected["weights"])
    assert close(found["moments"], expected["moments"])
    assert found["applied"] == 4 and found["steps"] == {4}


@pytest.mark.parametrize("case", CASES)
def test_every_group_keeps_its_own_hyper_parameters(runs: dict[str, Any], case: Case) -> None:
    """DeepSpeed's universal load at stage 3 gives every group those of the first."""
    for which in ("two", "two, then one", "one, then three"):
        groups = {entry["name"]: entry for entry in runs[which][case]["groups"]}
        bare = {} if case.bare else {"encoder.not_decayed": 0.0, "decoder.not_decayed": 0.0}
        assert {n: e["weight_decay"] for n, e in groups.items()} == {"encoder": 0.1, "decoder": 0.1} | bare
        assert all(entry["betas"] == (0.8, 0.95) and entry["eps"] == 1e-7 for entry in groups.values())
        step = 1 if which == "two" else 3
        expected = {name: rates(step)[name.split(".")[0]] for name in groups}
        assert runs[which][case]["rates"] == expected


@pytest.mark.parametrize("case", CASES)
def test_parts_of_all_ranks_make_every_parameter_whole(runs: dict[str, Any], case: Case) -> None:
    first, second = runs["two"][case], runs["two, rank 1"][case]
    for name in first["parts"]:
        whole = first["weights"][name].reshape(-1)
        covered = torch.zeros(len(whole), dtype=torch.int)
        for found in (first, second):
            span = found["spans"][name]
            covered[span.start : span.stop] += 1
            assert torch.equal(found["parts"][name], whole[span.start : span.stop])
        assert bool((covered == 1).all())


def test_clipping_changes_the_step(runs: dict[str, Any]) -> None:
    for stage in STAGES:
        case = Case(stage, clip=0.1, optimizer="adam", bare=False)
        clipped, free = runs["two"][case], runs["two"][Case(stage)]
        assert min(free["norms"]) > 0.2
        assert clipped["norms"][0] == pytest.approx(free["norms"][0])  # what is reported is the norm before clipping


@pytest.mark.parametrize("case", CASES)
def test_frozen_parameters_and_buffers_are_saved_and_come_back(runs: dict[str, Any], case: Case) -> None:
    """DeepSpeed's universal checkpoints leave frozen parameters as the constructor made them."""
    fresh = Network()
    for which in ("two", "two, then one", "two, then two at another stage"):
        weights = runs[which][case]["weights"]
        assert weights.keys() == fresh.state_dict().keys()
        for name in ("frozen.weight", "frozen.bias", "offset"):
            assert torch.equal(weights[name], fresh.state_dict()[name])


def bad_steps(rank: int, world_size: int) -> dict[Any, Any]:
    """A good step, one whose gradient is not finite on rank 1 alone, a good one."""
    found = {}
    for stage, offload in [*((stage, False) for stage in STAGES), (2, True), (3, True)]:
        for precision in ("fp32", "bf16"):
            engine = make(Case(stage, clip=1.0, offload=offload), precision=precision)
            rows = inputs(0)[rank::world_size]
            results, weights, moments = [], [], []
            for step in range(3):
                loss = loss_of(engine(rows)) * (float("nan") if step == 1 and rank == 1 else 1.0)
                engine.backward(loss, last=True)
                results.append(engine.step(rates(step + 5)))
                weights.append({n: t.clone() for n, t in engine.whole_weights(everywhere=True).items()})
                moments.append(engine.optimizer_state())
            found[stage, precision, offload] = (
                [r.skipped for r in results], weights, moments, engine.applied_steps, engine.optimizer_steps()
            )  # fmt: skip
            engine.close()
    return found


def test_a_non_finite_gradient_on_one_rank_changes_nothing_on_any(tmp_path: Path) -> None:
    """Nor does it count as an update; DeepSpeed's stage 0 applies it in fp32."""
    for found in run_ranks(bad_steps, 2, tmp_path):
        for cell, (skipped, weights, moments, applied, steps) in found.items():
            assert skipped == [False, True, False], cell
            assert all(torch.equal(weights[1][name], weights[0][name]) for name in weights[0])
            assert all(torch.equal(moments[1][name], moments[0][name]) for name in moments[0])
            assert not torch.equal(weights[2]["decoder.1.weight"], weights[1]["decoder.1.weight"])
            assert all(bool(t.isfinite().all()) for t in weights[2].values())
            assert applied == 2 and steps == {2}


def seen_gradients(rank: int, world_size: int) -> dict[int, Any]:
    found = {}
    for stage in STAGES:
        engine = make(Case(stage))
        engine.backward(loss_of(engine(inputs(0)[rank::world_size])), last=True)
        found[stage] = engine.gradients()
        engine.step(rates(5))
        engine.close()
    return found


def test_gradients_can_be_read_before_the_step(tmp_path: Path) -> None:
    network = Network()
    loss_of(network(inputs(0))).backward()
    for found in run_ranks(seen_gradients, 2, tmp_path):
        for gradients in found.values():
            expected = {n: p.grad for named in network.groups().values() for n, p in named}
            assert close(gradients, expected)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", STAGES)
def test_deepspeed_knows_every_key(stage: int, precision: str) -> None:
    """DeepSpeed takes a misspelt top-level key without a word."""
    from deepspeed.runtime import constants
    from deepspeed.runtime.zero.config import ZERO_OPTIMIZATION, DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig

    section = EngineSection(zero_stage=stage, precision=precision, cpu_offload=stage > 0)
    config = deepspeed_config(OptimSection(clip=0.5), section, 3, 1000)
    known = {value for name, value in vars(constants).items() if name.isupper() and isinstance(value, str)}
    assert set(config) <= known | {ZERO_OPTIMIZATION}
    fields = DeepSpeedZeroConfig.model_fields
    assert set(config["zero_optimization"]) <= {*fields, *(field.alias for field in fields.values())}
    offload = config["zero_optimization"].get("offload_optimizer", {})
    assert set(offload) <= set(DeepSpeedZeroOffloadOptimizerConfig.model_fields)
    autocast = {value for name, value in vars(constants).items() if name.startswith("TORCH_AUTOCAST_")}
    assert set(config.get("torch_autocast", {})) <= autocast
    assert ("torch_autocast" in config) == (precision == "bf16")
    assert config["zero_optimization"]["stage"] == stage
    assert (config["gradient_clipping"], config["gradient_accumulation_steps"]) == (0.5 if stage else 0.0, 3)


def partitioned_step(rank: int, world_size: int) -> dict[int, Any]:
    """One step of a network whose large parameters ZeRO-3 really cuts (it keeps small ones whole)."""
    from model import DepthAnything
    from trainer.tasks.base import encoder_decoder_groups

    found = {}
    images = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))[rank::world_size]
    for stage in (0, 3):
        torch.manual_seed(0)
        network = DepthAnything.from_preset("v2-vits")
        optim, section = OptimSection(), EngineSection(zero_stage=stage, precision="fp32")
        engine = Engine(
            network, encoder_decoder_groups(network), optim=optim, engine=section, micro_batches=1,
            device=torch.device("cpu"),
        )  # fmt: skip
        prediction = engine(images, features=True)
        engine.backward(prediction.disparity_BHW.square().mean() + prediction.features_BND.square().mean(), last=True)
        gradients = engine.gradients()
        result = engine.step({"encoder": 1e-4, "decoder": 1e-3})
        cut = [name for name in engine.trained if 0 < len(engine.spans[name]) < engine.shape_of(name).numel()]
        whole = engine.whole_weights(everywhere=True)
        found[stage] = (gradients, result.grad_norm, cut, {n: t.clone() for n, t in whole.items()})
        engine.close()
    return found


def test_a_network_that_is_really_cut_computes_the_same(tmp_path: Path) -> None:
    for found in run_ranks(partitioned_step, 2, tmp_path):
        (gradients, norm, _, weights), (cut_gradients, cut_norm, cut, cut_weights) = found[0], found[3]
        assert "pretrained.pos_embed" in cut and "pretrained.blocks.11.attn.qkv.weight" in cut
        assert cut_norm == pytest.approx(norm, rel=1e-5)
        assert cut_gradients.keys() == gradients.keys()
        for name, gradient in gradients.items():
            assert torch.allclose(cut_gradients[name], gradient, rtol=1e-4, atol=1e-6 * norm), name
        assert cut_weights.keys() == weights.keys()  # the frozen ones, too
        # Adam's first step is the sign of the gradient: where that is rounding, so is the step
        assert all(torch.allclose(cut_weights[name], weights[name], atol=2.1e-3) for name in weights)
