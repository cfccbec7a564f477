"""What the driver refuses of a run's inputs before it starts a worker, and how long it says the run is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from pydantic import TypeAdapter

from dataio.dataset import Dataset
from dataio.labels import LabelSample, LabelStore
from dataio.spec import DataError, DataSpec
from tests.dataio.fakes import labelled, shards_of, unlabelled, write_dataset
from trainer import run
from trainer.config import ConfigError, parse_config
from trainer.config_train import TrainConfig
from trainer.inputs import check_inputs, order_facts, order_lines
from trainer.run import train


def write_labels(folder: Path, dataset: Dataset, made_of: Mapping[str, Any] | None) -> str:
    """Complete labels of a dataset, which say that they were made of `made_of`."""
    description: dict[str, Any] = {"teacher": "test"} if made_of is None else {"dataset": dict(made_of)}
    store = LabelStore.create(str(folder), description)
    disparity_HW = np.linspace(0, 1, 28 * 42, dtype=np.float32).reshape(28, 42)
    for shard in dataset.shards:
        keys = [entry.key for entry in shard.index.samples]
        store.commit(shard.stem, [LabelSample.encoded(key, disparity_HW, {}) for key in keys], keys=keys)
    return str(folder)


def facts(dataset: Dataset) -> dict[str, Any]:
    return {"name": dataset.info.name, "fingerprint": dataset.fingerprint, "samples": dataset.info.samples}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Photographs in two datasets with the same shards and keys, and labels of either."""
    root = tmp_path_factory.mktemp("inputs")
    paths = {"truth": write_dataset(root / "truth", shards_of([4], labelled))}
    for name, first in (("mine", 0), ("other", 50)):
        shards = shards_of([5, 4], lambda seed, first=first: unlabelled(seed + first))
        paths[name] = write_dataset(root / name, shards, with_depth=False)
        dataset = Dataset.open(paths[name])
        paths[f"{name}_labels"] = write_labels(root / f"{name}_labels", dataset, facts(dataset))
    paths["unsigned_labels"] = write_labels(root / "unsigned_labels", Dataset.open(paths["mine"]), None)
    return paths


def student(places: Mapping[str, str], labels: str, runs: Path, **changes: Any) -> TrainConfig:
    roles = {
        "labelled": {"datasets": [places["truth"]], "batch": 2, "lanes": 1},
        "unlabelled": {"datasets": [places["mine"]], "labels": [labels], "batch": 4, "lanes": 1},
    }
    values: dict[str, Any] = {
        "name": "student",
        "runs": str(runs),
        "steps": 2,
        "task": {"kind": "student", "feature_weight": 0},
        "model": {"preset": "tiny"},
        "data": {"input_size": 28, "roles": roles},
    }
    return parse_config(TrainConfig, values | changes)


def test_labels_of_this_dataset_are_accepted(places: dict[str, str], tmp_path: Path) -> None:
    check_inputs(student(places, places["mine_labels"], tmp_path))
    check_inputs(student(places, places["unsigned_labels"], tmp_path))  # they do not say what they were made of


def test_labels_of_another_dataset_are_refused_before_anything_starts(
    places: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, other = Dataset.open(places["mine"]), Dataset.open(places["other"])
    assert [(s.stem, s.samples) for s in mine.shards] == [(s.stem, s.samples) for s in other.shards]
    LabelStore.open(places["other_labels"]).complete_for(mine)  # so counting them says nothing
    monkeypatch.setattr(run, "run_attempts", lambda *_: pytest.fail("started"))
    config = student(places, places["other_labels"], tmp_path)
    for refused in (check_inputs, train):
        with pytest.raises(ConfigError, match="labels another dataset") as caught:
            refused(config)
        message = str(caught.value)
        assert message.startswith(f"data.roles.unlabelled.labels: {places['other_labels']} ")
        assert "(other, 9 samples)" in message and f"not {mine.path} (mine, 9 samples)" in message
        assert "\n" not in message
    assert list(tmp_path.iterdir()) == []


def test_other_inputs_are_refused_by_name(places: dict[str, str], tmp_path: Path) -> None:
    config = student(places, places["mine_labels"], tmp_path)
    swapped = config.model_dump(mode="json")
    swapped["data"]["roles"]["labelled"]["datasets"] = [places["mine"]]
    with pytest.raises(ConfigError, match=r"data\.roles\.labelled\.datasets: .*mine has no depth; .* as unlabelled"):
        check_inputs(parse_config(TrainConfig, swapped))
    encoder = {"preset": "tiny", "encoder_weights": "/no/such/file"}
    with pytest.raises(ConfigError, match=r"model\.encoder_weights: /no/such/file: no such file or folder"):
        check_inputs(student(places, places["mine_labels"], tmp_path, model=encoder))
    LabelStore.create(str(tmp_path / "empty"), {"dataset": facts(Dataset.open(places["mine"]))})
    with pytest.raises(DataError, match=r"2 of 2 shards .* have no labels"):
        check_inputs(student(places, str(tmp_path / "empty"), tmp_path))


def filtered(config: TrainConfig, **min_quality: float) -> TrainConfig:
    values = config.model_dump(mode="json")
    for role, least in min_quality.items():
        values["data"]["roles"][role]["min_quality"] = least
    return parse_config(TrainConfig, values)


def test_a_filter_by_quality_needs_labels_that_have_one(places: dict[str, str], tmp_path: Path) -> None:
    mine = Dataset.open(places["mine"])
    config = student(places, places["mine_labels"], tmp_path)
    with pytest.raises(DataError, match=r"^data\.roles\.unlabelled\.min_quality is 0\.5, .*label run --quality flip"):
        check_inputs(filtered(config, unlabelled=0.5))
    with pytest.raises(DataError, match=r"^data\.roles\.labelled\.min_quality is 0\.5, .*no pseudo-labels: remove it"):
        check_inputs(filtered(config, labelled=0.5))
    measured = LabelStore.create(str(tmp_path / "measured"), {"dataset": facts(mine), "quality": "flip"})
    for shard in mine.shards:
        ramp_HW = np.linspace(0, 1, 28 * 42, dtype=np.float32).reshape(28, 42)
        keys = [entry.key for entry in shard.index.samples]
        measured.commit(shard.stem, [LabelSample.encoded(key, ramp_HW, {"quality": 0.9}) for key in keys], keys=keys)
    assert check_inputs(filtered(student(places, measured.path, tmp_path), unlabelled=0.5))["unlabelled"] == 9
    with pytest.raises(DataError) as caught:  # told once, by what it is
        check_inputs(filtered(student(places, str(tmp_path / "nowhere"), tmp_path), unlabelled=0.5))
    assert "fathom label run" in str(caught.value) and "min_quality" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"data\.roles\.unlabelled\.min_quality: found 1\.5"):
        filtered(config, unlabelled=1.5)


def test_there_must_be_a_run_to_resume(places: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="student: no run to resume; start it without --resume"):
        train(student(places, places["mine_labels"], tmp_path), resume=True)
    assert list(tmp_path.iterdir()) == []


def test_the_length_of_a_pass_and_what_is_passed_over_are_told(tmp_path: Path) -> None:
    values = {"batch": 12, "lanes": 4, "datasets": ["u"]}
    data = {"roles": {"labelled": {"batch": 6, "datasets": ["l"]}, "unlabelled": values}, "skip_samples": [[40, 55]]}
    config = SimpleNamespace(data=TypeAdapter(DataSpec).validate_python(data))
    facts = order_facts(config, {"labelled": 13, "unlabelled": 4001})
    assert facts == {
        "passes": {"labelled": {"samples": 13, "steps": 3}, "unlabelled": {"samples": 4001, "steps": 334}},
        "passed_over": [{"steps": [2, 4], "samples": [36, 72]}],
    }
    assert order_lines(facts) == [
        "labelled: 13 samples, a pass is 3 steps",
        "unlabelled: 4001 samples, a pass is 334 steps",
        "passes over 2 global batches, samples 36:72 of the order",
    ]
