"""What labelling would take: from nothing, from the shards labelled so far; and what is wrong, all at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster import storage
from dataio.dataset import Dataset
from dataio.labels import LabelStore, plan_digest
from tests.trainer.test_labelling import config_of, dataset, grip, labeller, save_network, weights
from trainer.labelling import describe
from trainer.plan_label import plan_label

__all__ = ["dataset", "weights"]  # fixtures


def test_before_the_first_shard(dataset: str, weights: str, tmp_path: Path) -> None:
    plan = plan_label(config_of(dataset, weights, out=str(tmp_path), cluster={"workers": 2}))
    assert plan.problems == ()
    work = plan.sections["work"]
    assert (work["actors"], work["shards"], work["samples"], work["forward_passes_of_an_image"]) == (2, 2, 12, 2)
    assert plan.sections["disk"]["labels_to_come_bytes"] is None
    assert plan.sections["time"]["left_seconds"] is None and "give --rate" in plan.notes[0]
    memory = plan.sections["memory_of_an_actor"]
    assert memory["weights_bytes"] == 4 * memory["parameters"] and memory["activations_of_a_forward_pass_bytes"] > 0
    assert list(tmp_path.iterdir()) == []


def test_a_rate_makes_a_time(dataset: str, weights: str, tmp_path: Path) -> None:
    config = config_of(dataset, weights, out=str(tmp_path), flip=False, quality="off")
    plan = plan_label(config, rate=0.01)  # 12 images: 20 minutes
    assert plan.sections["time"] == {"images_per_second": 0.01, "measured_by": "--rate", "left_seconds": 1200.0}
    assert plan.sections["work"]["forward_passes_of_an_image"] == 1 and plan.notes == ()


def test_what_is_labelled_tells_what_the_rest_takes(dataset: str, weights: str, tmp_path: Path) -> None:
    config = config_of(dataset, weights, out=str(tmp_path))
    opened = Dataset.open(dataset)
    description = describe(config, opened)
    store = LabelStore.create(storage.join(str(tmp_path), plan_digest(description)), description)
    with labeller(config, store) as worker:
        worker.process(opened.shards[0].stem, grip(opened.shards[0].stem))
    (entry,) = store.entries()
    plan = plan_label(config)
    disk = plan.sections["disk"]
    assert (disk["folder"], disk["shards_done"], disk["samples_done"]) == (store.path, 1, 8)
    assert disk["labels_to_come_bytes"] == int(entry.bytes / 8 * 4)
    assert plan.sections["time"]["measured_by"] == "1 shards labelled so far"


def test_everything_wrong_is_said_at_once(dataset: str, weights: str, tmp_path: Path) -> None:
    plan = plan_label(config_of(str(tmp_path / "no-data"), str(tmp_path / "no-weights")))
    assert len(plan.problems) == 2 and "no-data" in plan.problems[0] and "no-weights" in plan.problems[1]
    metric = save_network(tmp_path / "metric", 1, "tiny-metric-indoor")
    plan = plan_label(config_of(dataset, metric, cluster={"workers": 5}))
    assert len(plan.problems) == 2 and "5, but the dataset has 2 shards" in plan.problems[0]
    assert "predicts metres" in plan.problems[1]


def test_a_disk_that_is_too_small_is_said(
    dataset: str, weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(dataset, weights, out=str(tmp_path))
    opened = Dataset.open(dataset)
    description = describe(config, opened)
    store = LabelStore.create(storage.join(str(tmp_path), plan_digest(description)), description)
    with labeller(config, store) as worker:
        worker.process(opened.shards[0].stem, grip(opened.shards[0].stem))
    monkeypatch.setattr("trainer.plan_label.free_bytes", lambda folder: 10)
    (problem,) = plan_label(config).problems
    assert "free, and the labels to come take" in problem
