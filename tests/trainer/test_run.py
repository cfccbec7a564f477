"""What the driver refuses before it starts a worker, and what a resumed run may change. No Ray is started here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from pydantic import TypeAdapter

from dataio.dataset import Dataset
from dataio.labels import LabelStore
from dataio.spec import DataError, DataSpec
from tests.dataio.fakes import labelled, shards_of, unlabelled, write_dataset
from trainer import run
from trainer.config import ConfigError, dump_config, parse_config, read_config
from trainer.config_train import TrainConfig
from trainer.run import (
    check_inputs,
    order_facts,
    order_lines,
    prepare_folder,
    train,
)


def write_labels(folder: Path, dataset: Dataset, made_of: Mapping[str, Any] | None) -> str:
    """Complete labels of a dataset, which say that they were made of `made_of`."""
    description: dict[str, Any] = {"teacher": "test"} if made_of is None else {"dataset": dict(made_of)}
    store = LabelStore.create(str(folder), description)
    disparity_HW = np.linspace(0, 1, 28 * 42, dtype=np.float32).reshape(28, 42)
    for shard in dataset.shards:
        store.write_shard(shard.stem, [(entry.key, disparity_HW, {}, None) for entry in shard.index.samples])
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
    monkeypatch.setattr(run, "run_ranks", lambda *_: pytest.fail("started"))
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


def teacher(runs: Path, **changes: Any) -> TrainConfig:
    """A configuration whose data are never opened; changes at dotted paths (dots as __)."""
    values: dict[str, Any] = {
        "name": "run",
        "runs": str(runs),
        "steps": 4,
        "task": {"kind": "teacher"},
        "model": {"preset": "tiny"},
        "data": {"input_size": 28, "roles": {"labelled": {"datasets": ["/d"], "batch": 8, "lanes": 4}}},
    }
    for key, value in changes.items():
        node = values
        *parents, leaf = key.split("__")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return parse_config(TrainConfig, values)


def test_a_run_s_folder_is_made_once_and_says_what_made_it(tmp_path: Path) -> None:
    config, folder = teacher(tmp_path), tmp_path / "run"
    assert prepare_folder(config, False) is None
    assert read_config(TrainConfig, folder / "config.yaml") == config
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["workers"] == 1
    assert "torch" in environment["packages"]
    with pytest.raises(ConfigError, match=r"run: this run exists; go on with --resume or choose another name"):
        prepare_folder(config, False)


def test_a_refused_resume_changes_nothing_and_an_accepted_one_is_written_down(tmp_path: Path) -> None:
    saved = tmp_path / "run" / "config.yaml"
    prepare_folder(teacher(tmp_path), False)
    before = saved.read_text()
    (tmp_path / "run" / "metrics.jsonl").write_text("{}\n")  # it has taken a step
    with pytest.raises(ConfigError, match="seed: is 1"):
        prepare_folder(teacher(tmp_path, seed=1, steps=9), True)
    assert saved.read_text() == before
    longer = teacher(tmp_path, steps=9)
    assert prepare_folder(longer, True) is None  # it had no checkpoint yet
    assert saved.read_text() == dump_config(longer) != before


def test_a_run_that_never_took_a_step_may_change_anything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Such as a network that did not fit into memory."""
    prepare_folder(teacher(tmp_path), False)
    assert prepare_folder(teacher(tmp_path, seed=1, optim__optimizer="adam"), True) is None
    told = capsys.readouterr().err
    assert "changed on resume: seed: was 0, is 1" in told
    assert "changed on resume: optim.optimizer: was 'adamw', is 'adam'" in told


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


def test_a_finished_run_stays_finished_whatever_else_a_resume_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The change is told; no rank is started for steps that are done."""
    config = teacher(tmp_path)
    prepare_folder(config, False)
    run.Journal(config.folder).write("finished", step=4, reason=None)
    monkeypatch.setattr(run, "check_inputs", lambda config: {"labelled": 8})
    monkeypatch.setattr(run, "prepare_folder", lambda config, resume: (prepare_folder(config, resume), "step_4")[1])
    monkeypatch.setattr(run, "run_ranks", lambda *_: pytest.fail("started"))
    assert train(teacher(tmp_path, log_every=3), resume=True).step == 4
    assert "changed on resume: log_every: was 10, is 3" in capsys.readouterr().err
    events = [json.loads(line) for line in (tmp_path / "run" / "journal.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events] == ["finished", "configuration_changed"]


def test_a_resume_may_not_change_the_optimizer_nor_end_before_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare_folder(teacher(tmp_path), False)
    (tmp_path / "run" / "metrics.jsonl").write_text("{}\n")  # it has taken a step
    with pytest.raises(ConfigError, match=r"optim\.optimizer: is 'adam', but the run to resume has 'adamw'"):
        prepare_folder(teacher(tmp_path, optim__optimizer="adam"), True)
    monkeypatch.setattr(run, "find_checkpoint", lambda root: (f"{root}/step_00000009", []))
    with pytest.raises(ConfigError, match="steps: is 4, but the run has done 9"):
        prepare_folder(teacher(tmp_path), True)
