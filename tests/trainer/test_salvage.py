"""Everything that is wrong with a configuration at once, and the rest of it read all the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from trainer.config import ConfigError, parse_config
from trainer.config_evaluate import EvaluateConfig
from trainer.config_train import TrainConfig
from trainer.salvage import covered, salvage, salvage_file, without_consequences


def values(**changes: Any) -> dict[str, Any]:
    roles = {"labelled": {"datasets": ["/d"], "batch": 8, "lanes": 4}}
    sound = {"name": "run", "steps": 5, "task": {"kind": "teacher"}, "model": {"preset": "tiny"}}
    return {**sound, "data": {"input_size": 28, "roles": roles}, **changes}


def test_a_sound_one_is_read_as_ever() -> None:
    found = salvage(TrainConfig, values())
    assert found.problems == () and found.wrong == ()
    assert found.config == TrainConfig.model_validate(values())


def test_fields_and_what_they_say_together_are_told_at_once() -> None:
    given = values(cluster={"workers": 9}, engine={"micro_batch": -3}, optim={"betas": [2, 0.9]})
    given["data"]["roles"]["labelled"]["batch"] = 7
    given["stepz"] = given.pop("steps")
    found = salvage(TrainConfig, given)
    said = [line.partition(": ")[0] for line in found.problems]
    assert set(said) == {
        "stepz", "optim.betas.0", "data.roles.labelled.lanes", "engine.micro_batch",
    }  # fmt: skip
    [line] = [line for line in found.problems if line.startswith("engine.micro_batch: ")]
    assert line.endswith("found -3; input should be greater than or equal to 1, or input should be 'auto'")
    with pytest.raises(ConfigError, match=r"engine\.micro_batch: found -3; input .* or input should be 'auto'$"):
        parse_config(TrainConfig, values(engine={"micro_batch": -3}))
    assert sum("lanes may be 1, 7" in line or "cannot feed 9" in line for line in found.problems) == 2
    assert sorted(found.wrong) == ["engine.micro_batch", "optim.betas"]
    assert found.config is not None
    assert (found.config.steps, found.config.global_batch, found.config.cluster.workers) == (5, 7, 9)


@pytest.mark.parametrize(
    ("changes", "problems", "wrong"),
    [
        ({"steps": -5}, ["steps: found -5"], ["steps"]),  # not: neither steps nor passes are given
        ({"name": "a/b"}, ["name: found 'a/b'"], ["name"]),
        ({"engine": 5}, ["engine: found 5"], ["engine"]),
        ({"data": 5}, ["data: found 5"], ["data"]),  # not: data.roles is empty
        ({"data": {"roles": {"labelled": 5}}}, ["data.roles.labelled: found 5"], ["data.roles.labelled"]),
        ({"data": {"roles": {"labelled": {"datasets": ["/a", 5, "/b", 6], "batch": 2}}}},
         ["data.roles.labelled.datasets.1: found 5", "data.roles.labelled.datasets.3: found 6"],
         ["data.roles.labelled.datasets"]),
        ({"data": {"roles": {"labelled": {"datasets": ["/a"], "batch": "x", "lanes": 5}}}},
         ["data.roles.labelled.batch: found 'x'"], ["data.roles.labelled.batch"]),  # not: lanes do not divide it
        ({"track": {"wandb": {}}}, ["track.wandb.project: missing"], ["track.wandb.project"]),
        ({"engine": {"cpu_offload": True, "zero_stage": 0}}, ["engine.cpu_offload: needs engine.zero_stage"], []),
        ({"optim": {"encoder_lrr": -1}}, ["optim.encoder_lrr: unknown key", "optim.encoder_lr: found -1"],
         ["optim.encoder_lr"]),
        ({"nothing_like_it": 1}, ["nothing_like_it: unknown key"], []),
    ],
)  # fmt: skip
def test_the_rest_is_read(changes: dict[str, Any], problems: list[str], wrong: list[str]) -> None:
    found = salvage(TrainConfig, values(**changes))
    assert found.config is not None
    assert len(found.problems) == len(problems), found.problems
    assert all(line.startswith(start) for line, start in zip(found.problems, problems, strict=True)), found.problems
    assert list(found.wrong) == wrong


def test_nothing_at_all_is_told_too() -> None:
    found = salvage(TrainConfig, {})
    assert [line.partition(":")[0] for line in found.problems] == ["name", "task", "model", "data", "steps"]
    assert found.config is not None and found.config.global_batch == 0


def test_a_file_and_its_overrides(tmp_path: Path) -> None:
    (tmp_path / "e.yaml").write_text("weightz: /w\ndatasets: []\nbatch: 0\n")
    found = salvage_file(EvaluateConfig, tmp_path / "e.yaml", ["limit", "limit=0"])
    said = {line.partition(":")[0] for line in found.problems}
    assert said == {"--set 'limit'", "batch", "limit", "weightz", "datasets"} and len(found.problems) == 5
    assert found.config is not None and found.config.weights == "/w"  # a misspelt key is taken for what it means
    missing = salvage_file(EvaluateConfig, tmp_path / "none.yaml")
    assert missing.config is None and len(missing.problems) == 1


def test_what_follows_from_a_stand_in_is_left_out() -> None:
    assert covered("a.b.c", ["a.b"]) and covered("a.b", ["a.b"]) and covered("a", ["a.b"])
    assert not covered("a", ["a.b.c"]) and not covered("a.bc", ["a.b"])
    assert without_consequences(["task.kind: found 'unknown'", "/x: no such folder"], ["task"]) == [
        "/x: no such folder"
    ]
