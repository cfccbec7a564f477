"""A run's folder: made once, resumed within limits, left alone when it is done. No Ray is started here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trainer import attempts, run
from trainer.config import ConfigError, dump_config, parse_config, read_config
from trainer.config_train import TrainConfig
from trainer.journal import Journal
from trainer.ranks import TrainOutcome
from trainer.run import prepare_folder, train


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


def test_a_resume_may_not_change_the_optimizer_nor_end_before_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare_folder(teacher(tmp_path), False)
    (tmp_path / "run" / "metrics.jsonl").write_text("{}\n")  # it has taken a step
    with pytest.raises(ConfigError, match=r"optim\.optimizer: is 'adam', but the run to resume has 'adamw'"):
        prepare_folder(teacher(tmp_path, optim__optimizer="adam"), True)
    monkeypatch.setattr(attempts, "find_checkpoint", lambda root: (f"{root}/step_00000009", []))
    with pytest.raises(ConfigError, match="steps: is 4, but the run has done 9"):
        prepare_folder(teacher(tmp_path), True)


def test_a_finished_run_is_left_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No rank is started for steps that are done, and the folder says on which machines they were done."""
    config, folder = teacher(tmp_path), tmp_path / "run"
    prepare_folder(config, False)
    Journal(config.folder).write("finished", step=4, reason=None)
    monkeypatch.setattr(run, "check_inputs", lambda config: {"labelled": 8})
    monkeypatch.setattr(attempts, "find_checkpoint", lambda root: (f"{root}/step_00000004", []))
    monkeypatch.setattr(run, "run_attempts", lambda *_: pytest.fail("started"))
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert train(teacher(tmp_path, log_every=3), resume=True).step == 4
    with pytest.raises(ConfigError, match="steps: is 3, but the run has done 4"):
        train(teacher(tmp_path, steps=3), resume=True)
    after = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert {name: after[name] for name in before} == before and before.keys() >= {"config.yaml", "environment.json"}


def test_a_run_is_begun_or_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The supervisor cannot know whether there was a run when its verb was killed."""
    started: list[TrainConfig] = []
    monkeypatch.setattr(run, "check_inputs", lambda config: {"labelled": 8})

    def attempted(config: TrainConfig, *_: Any) -> TrainOutcome:
        started.append(config)
        return TrainOutcome(folder=config.folder, step=4)

    monkeypatch.setattr(run, "run_attempts", attempted)
    train(teacher(tmp_path), resume=None)
    assert (tmp_path / "run" / "config.yaml").is_file()
    skipping = teacher(tmp_path, data__skip_samples=[[0, 8]])
    prepare_folder(skipping, True)
    train(teacher(tmp_path), resume=None)
    assert started == [teacher(tmp_path), skipping]  # with what earlier attempts passed over
    (tmp_path / "run" / "checkpoints" / "step_00000002").mkdir(parents=True)
    with pytest.raises(ConfigError, match="seed: is 1"):
        train(teacher(tmp_path, seed=1), resume=None)
    assert len(started) == 2


def test_a_wrong_field_is_refused_before_gigabytes_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare_folder(teacher(tmp_path), False)
    (tmp_path / "run" / "checkpoints" / "step_00000002").mkdir(parents=True)
    monkeypatch.setattr(attempts, "find_checkpoint", lambda root: pytest.fail("read"))
    with pytest.raises(ConfigError, match="seed: is 1"):
        prepare_folder(teacher(tmp_path, seed=1), True)
