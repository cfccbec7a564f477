"""What a run would take, and everything that is wrong with it, before it takes anything."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.dataio.fakes import labelled, shards_of, unlabelled, write_dataset
from trainer import plan as module
from trainer.config import ConfigError, parse_config
from trainer.config_train import TrainConfig
from trainer.inputs import check_inputs
from trainer.plan import duration, gib, plan_train
from trainer.salvage import salvage


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("plan")
    return {
        "truth": write_dataset(root / "truth", shards_of([13, 10], labelled)),
        "photos": write_dataset(root / "photos", shards_of([9], unlabelled), with_depth=False),
    }


def config_of(runs: Path, sets: Mapping[str, str], **changes: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "name": "run",
        "runs": str(runs),
        "steps": 50,
        "task": {"kind": "teacher"},
        "model": {"preset": "tiny"},
        "data": {"input_size": 28, "roles": {"labelled": {"datasets": [sets["truth"]], "batch": 8, "lanes": 4}}},
        "engine": {"precision": "fp32", "micro_batch": 3},
        "cluster": {"workers": 2},
    }
    return parse_config(TrainConfig, values | changes)


def test_a_sound_run_is_laid_out(tmp_path: Path, data: dict[str, str]) -> None:
    found = plan_train(config_of(tmp_path, data))
    assert found.problems == ()
    run = found.sections["run"]
    assert (run["ranks"], run["global_batch_samples"], run["rows_of_a_rank"]) == (2, 8, 4)
    assert (run["rows_of_a_forward_pass"], run["forward_passes_of_a_step"]) == (3, 2)
    assert (run["steps"], run["samples"], run["steps_done"]) == (50, 400, 0)
    labelled = {"step_samples": 8, "pass_samples": 23, "passes": pytest.approx(50 / 3)}  # a pass is three steps
    assert run["roles"] == {"labelled": labelled}
    assert found.sections["memory_of_a_rank"]["rows_3_in_all_bytes"] > 1 << 20
    disk = found.sections["disk"]
    assert disk["checkpoints_at_once"] == 3
    assert disk["to_come_bytes"] == disk["checkpoints_in_all_bytes"] == 3 * disk["checkpoint_bytes"]
    assert found.sections["time"]["left_seconds"] is None and "give --rate" in found.notes[-1]
    assert not (tmp_path / "run").exists()


def test_numbers_are_numbers(tmp_path: Path, data: dict[str, str]) -> None:
    """For programs: whatever is not a name is a number or not known; bytes and seconds are in the key."""
    text = {"folder", "measured_by"}
    for config in (config_of(tmp_path, data), config_of(tmp_path, data, engine={"micro_batch": "auto"})):
        for section in plan_train(config, rate=2.0).sections.values():
            for name, value in section.items():
                if name not in text and name != "roles":
                    assert value is None or isinstance(value, int | float), (name, value)
                if isinstance(value, int) and value > 1 << 16:
                    assert name.endswith("_bytes") or name == "parameters", (name, value)


def test_the_optimizer_s_main_memory_is_told(tmp_path: Path, data: dict[str, str]) -> None:
    kept = plan_train(config_of(tmp_path, data)).sections["memory_of_a_rank"]
    engine = {"precision": "fp32", "cpu_offload": True, "zero_stage": 1}
    moved = plan_train(config_of(tmp_path, data, engine=engine)).sections["memory_of_a_rank"]
    assert "main_memory_of_the_optimizer_bytes" not in kept
    assert moved["main_memory_of_the_optimizer_bytes"] >= 16 * moved["parameters"] * 0.48  # two ranks


def test_everything_that_is_wrong_is_said_at_once(tmp_path: Path, data: dict[str, str]) -> None:
    roles = {"labelled": {"datasets": ["/no/such", data["photos"]], "batch": 8, "lanes": 4}}
    config = config_of(
        tmp_path, data,
        data={"input_size": 28, "roles": roles},
        model={"preset": "tiny", "encoder_weights": "/no/encoder"},
        validation={"datasets": ["/no/validation", data["photos"]]},
    )  # fmt: skip
    problems = plan_train(config).problems
    for start in (
        "data.roles.labelled.datasets: /no/such: ",
        f"data.roles.labelled.datasets: {data['photos']} has no depth",
        "validation.datasets: /no/validation: ",
        f"validation.datasets: {data['photos']} has no depth",
        "model.encoder_weights: /no/encoder: no such file",
    ):
        assert sum(problem.startswith(start) for problem in problems) == 1, (start, problems)
    assert len(problems) == 5
    with pytest.raises(ConfigError) as caught:  # as `fathom train` says it
        check_inputs(config)
    assert tuple(str(caught.value).splitlines()) == problems


def test_a_configuration_that_is_wrong_by_itself_does_not_hide_the_rest(tmp_path: Path, data: dict[str, str]) -> None:
    values = config_of(tmp_path, data).model_dump(mode="json")
    values["stepz"] = values.pop("steps")
    del values["passes"]
    values["data"]["roles"]["labelled"] |= {"batch": 7, "datasets": ["/no/such"]}
    values["cluster"]["workers"] = 9
    values["task"]["gradient_weigth"] = 1
    values["task"]["loss"] = "other"
    values["model"]["encoder_weights"] = "/no/encoder"
    read = salvage(TrainConfig, values)
    assert read.config is not None
    found = plan_train(read.config, problems=read.problems, wrong=read.wrong)
    for start in (
        "stepz: unknown key; did you mean 'steps'",
        "data.roles.labelled.lanes: lanes is 4 and batch 7",
        "data.roles.labelled.lanes: 4 cannot feed 9 cluster.workers",
        "task.gradient_weigth: unknown key",
        "task.loss: found 'other'",
        "data.roles.labelled.datasets: /no/such: no such folder",
        "model.encoder_weights: /no/encoder: no such file",
    ):
        assert sum(problem.startswith(start) for problem in found.problems) == 1, (start, found.problems)
    assert len(found.problems) == 7
    assert found.sections["run"]["samples"] == 350 and "memory_of_a_rank" in found.sections


def test_a_task_that_cannot_be_made_hides_no_path(tmp_path: Path, data: dict[str, str]) -> None:
    for changes in ({"task": {"kind": "taecher"}}, {"model": {"preset": "v9"}}):
        model = {"encoder_weights": "/no/encoder", **changes.get("model", {})}
        found = plan_train(config_of(tmp_path, {"truth": "/no/such"}, **{**changes, "model": model}))
        assert len(found.problems) == 3 and "memory_of_a_rank" not in found.sections, found.problems


@pytest.mark.parametrize("kind", ["teacher", "pretext", "taecher"])
def test_a_preset_is_looked_at_whatever_the_task_is(tmp_path: Path, data: dict[str, str], kind: str) -> None:
    found = plan_train(config_of(tmp_path, data, task={"kind": kind}, model={"preset": "v9"})).problems
    assert sum(problem.startswith("model.preset: no preset 'v9'; there are: v1-vits") for problem in found) == 1
    assert any(problem.startswith("task.kind: found 'taecher'") for problem in found) == (kind == "taecher")


def test_passes_that_are_too_few_for_the_warm_up_are_told_beside_the_rest(tmp_path: Path, data: dict[str, str]) -> None:
    values = config_of(tmp_path, data).model_dump(mode="json") | {"passes": {"labelled": 2}}
    del values["steps"]
    values["optim"]["warmup_samples"], values["cluster"]["workers"] = 1000, 5
    read = salvage(TrainConfig, values)
    assert read.config is not None
    lanes, warmup = plan_train(read.config, problems=read.problems, wrong=read.wrong).problems
    assert lanes.startswith("data.roles.labelled.lanes: 4 cannot feed 5")
    assert warmup.startswith("optim.warmup_samples: 1000 must be less") and "2 of labelled are 6 steps" in warmup


def test_one_problem_keeps_its_own_error(tmp_path: Path, data: dict[str, str]) -> None:
    from dataio.spec import DataError

    with pytest.raises(DataError):
        check_inputs(config_of(tmp_path, {"truth": "/no/such"}))


def test_passes_become_steps_where_the_data_are_there(tmp_path: Path, data: dict[str, str]) -> None:
    passes = {"labelled": 2}
    config = config_of(tmp_path, data).model_dump(mode="json") | {"steps": 0, "passes": passes}
    del config["steps"]
    found = plan_train(parse_config(TrainConfig, config))
    assert found.sections["run"]["steps"] == 6
    config["data"]["roles"]["labelled"]["datasets"] = ["/no/such"]
    found = plan_train(parse_config(TrainConfig, config))
    assert found.sections["run"]["steps"] is None
    assert any(note.startswith("as many steps as the passes are") for note in found.notes)
    assert len(found.problems) == 1


def test_the_rate_is_the_run_s_own_or_a_given_one(tmp_path: Path, data: dict[str, str]) -> None:
    config = config_of(tmp_path, data, steps=10_000)
    assert plan_train(config, rate=8.0).sections["time"]["left_seconds"] == 10_000
    (tmp_path / "run").mkdir()
    lines = [{"step": step, "images_per_second": 16.0} for step in (1000, 2000)]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = plan_train(config)
    time = found.sections["time"]
    assert time["left_seconds"] == 8_000 * 8 / 16 and time["images_per_second"] == 16.0
    assert time["measured_by"].endswith("metrics.jsonl") and found.sections["run"]["steps_done"] == 2000
    assert plan_train(config, rate=8.0).sections["time"]["left_seconds"] == 8_000  # what is done is done


def test_a_checkpoint_tells_how_far_a_run_is(tmp_path: Path, data: dict[str, str]) -> None:
    (tmp_path / "run" / "checkpoints" / "step_00000049").mkdir(parents=True)
    found = plan_train(config_of(tmp_path, data), rate=8.0)
    assert found.sections["run"]["steps_done"] == 49 and found.sections["time"]["left_seconds"] == 1.0
    (tmp_path / "run" / "checkpoints" / "step_00000060").mkdir()
    assert plan_train(config_of(tmp_path, data), rate=8.0).sections["time"]["left_seconds"] == 0.0


def test_a_disk_that_is_too_small_is_a_problem(
    tmp_path: Path, data: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "free_bytes", lambda folder: 1 << 20)
    (problem,) = plan_train(config_of(tmp_path, data)).problems
    assert problem.startswith("runs: ") and "1.0 MiB free" in problem and "checkpoint.keep" in problem


def test_checkpoints_that_are_there_need_no_room(
    tmp_path: Path, data: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Room for one and a half: too little for three, enough for the one that is still to come."""
    config = config_of(tmp_path, data)
    each = plan_train(config).sections["disk"]["checkpoint_bytes"]
    monkeypatch.setattr(module, "free_bytes", lambda folder: each * 3 // 2)
    assert len(plan_train(config).problems) == 1
    for step in (10, 20):
        (tmp_path / "run" / "checkpoints" / f"step_{step:08d}").mkdir(parents=True)
    found = plan_train(config)
    assert found.problems == ()
    assert (found.sections["disk"]["checkpoints_there"], found.sections["disk"]["to_come_bytes"]) == (2, each)


def test_numbers_for_people() -> None:
    assert [gib(size) for size in (3 << 20, 3 << 30)] == ["3.0 MiB", "3.00 GiB"]
    assert [duration(s) for s in (29, 31, 3700, 90_061)] == ["0 h 0 min", "0 h 1 min", "1 h 2 min", "1 d 1 h 1 min"]
