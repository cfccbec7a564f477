"""Fine-tuning to metres: what counts, what does not, and what it starts from and leaves behind."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dataio.spec import RoleNeeds
from dataio.types import Batch
from model import DepthAnything
from model.types import DepthPrediction
from tests.trainer.batches import SIZE, share, task_of, train_config
from trainer.config import ConfigError
from trainer.tasks.base import make_task


class Forward:
    """Stands for the engine: a depth given beforehand, in metres."""

    def __init__(self, batch: Batch) -> None:
        noise_BHW = torch.rand(len(batch), SIZE, SIZE, generator=torch.Generator().manual_seed(4))
        self.depth_m_BHW = (20 * noise_BHW).requires_grad_()

    def __call__(self, image_BCHW: Tensor) -> DepthPrediction:
        return DepthPrediction(depth_m_BHW=self.depth_m_BHW)


def test_the_loss_is_silog_over_the_depths_in_range() -> None:
    config = train_config("metric", task={"kind": "metric", "min_depth": 2.0})
    task, batch = task_of(config), share(train_config("metric"), 0, 1)
    assert dict(task.needs) == {"labelled": RoleNeeds(target="depth_m")}
    forward = Forward(batch)
    found = task.sums(forward, batch)["labelled"]
    expected, valid_BHW = 0.0, torch.zeros(8, SIZE, SIZE, dtype=torch.bool)
    for row in (0, 2, 3, 4, 6, 7):  # 1 is bad, 5 is out of range
        depth_HW = batch.targets["depth_m"].value_BHW[row].double()
        valid_BHW[row] = (batch.region_BHW[row] > 0) & (depth_HW >= 2) & (depth_HW <= 20)
        d = depth_HW[valid_BHW[row]].log() - forward.depth_m_BHW[row][valid_BHW[row]].detach().double().log()
        expected += float((d.square().mean() - 0.5 * d.mean() ** 2).sqrt())
    assert found.item() == pytest.approx(expected, rel=1e-5)
    assert task.counts(batch)["labelled"].item() == 6
    found.backward()
    assert forward.depth_m_BHW.grad is not None
    assert torch.equal(forward.depth_m_BHW.grad != 0, valid_BHW)


def test_a_batch_without_any_depth_is_no_nan() -> None:
    """The published program takes the logarithm of nothing, and its step is NaN."""
    config = train_config("metric")
    task, batch = task_of(config), share(config, 0, 1)
    empty = replace(batch, region_BHW=torch.zeros_like(batch.region_BHW), weight_B=torch.zeros(8))
    far = replace(
        batch, targets={"depth_m": replace(batch.targets["depth_m"], value_BHW=torch.full((8, SIZE, SIZE), 21.0))}
    )
    module = task.build()
    for one in (empty, far):
        loss = task.sums(module, one)["labelled"]
        loss.backward()
        assert loss.item() == 0 and task.counts(one)["labelled"].item() == 0
        assert all(p.grad is None or not p.grad.any() for p in module.parameters())


def test_it_starts_from_a_trained_encoder_and_a_random_decoder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    relative = DepthAnything.from_preset("tiny")
    relative.save_pretrained(tmp_path / "relative")
    task: Any = make_task(train_config("metric", str(tmp_path / "relative")))
    network = task.build()
    assert network.preset.name == "tiny-metric-indoor" and task.max_depth_m == 20.0
    for name, tensor in network.pretrained.state_dict().items():
        assert torch.equal(tensor, relative.pretrained.state_dict()[name])
    theirs = relative.depth_head.state_dict()
    assert any(not torch.equal(tensor, theirs[name]) for name, tensor in network.depth_head.state_dict().items())
    task.export(network, str(tmp_path / "weights"))
    again = DepthAnything.from_pretrained(tmp_path / "weights")
    assert (again.preset.head, again.preset.max_depth_m) == ("metric", 20.0)
    assert again.fingerprint() == network.fingerprint()


def test_the_preview_is_brighter_where_it_is_nearer() -> None:
    task, batch = task_of(train_config("metric")), share(train_config("metric"), 0, 1)
    network = task.build()
    with torch.no_grad():
        depth_BHW = network(batch.views["student"]).depth_m_BHW
        nearness_BHW = task.preview(network, batch.views["student"])
    torch.testing.assert_close(nearness_BHW, 1 / depth_BHW)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"min_depth": 0}, "task.min_depth: found 0; input should be greater than 0"),
        (
            {"min_depth": 20.0},
            "task.min_depth: found 20.0; must be below the 20 m of model.preset 'tiny-metric-indoor'",
        ),
        ({"mean_weight": 1.5}, "task.mean_weight: found 1.5"),
        ({"max_depth": 10}, "task.max_depth: unknown key"),
    ],
)
def test_wrong_options(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_task(train_config("metric", task={"kind": "metric", **options}))
    assert words in str(caught.value)
