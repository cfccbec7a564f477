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
    assert (run["ranks"], run["global batch"], run["rows of a rank"]) == (2, 8, 4)
    assert (run["rows of a forward pass"], run["forward passes of a step"]) == (3, 2)
    assert (run["steps"], run["samples"]) == (50, 400)
    assert run["labelled: a step, samples, passes"] == f"8, 23, {50 / 3:.2f}"  # a pass is three steps
    assert "in all, 3 rows at once" in found.sections["memory of a rank"]
    assert found.sections["disk"]["checkpoints at once"] == 3
    assert "give --rate" in found.sections["time"]["left"]
    assert not (tmp_path / "run").exists()


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
        "/no/such: ",
        f"data.roles.labelled.datasets: {data['photos']} has no depth",
        "/no/validation: ",
        f"validation.datasets: {data['photos']} has no depth",
        "model.encoder_weights: /no/encoder: no such file",
    ):
        assert sum(problem.startswith(start) for problem in problems) == 1, (start, problems)
    assert len(problems) == 5
    with pytest.raises(ConfigError) as caught:  # as `fathom train` says it
        check_inputs(config)
    assert tuple(str(caught.value).splitlines()) == problems


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
    assert str(found.sections["run"]["steps"]).startswith("as many as the passes are")
    assert len(found.problems) == 1


def test_the_rate_is_the_run_s_own_or_a_given_one(tmp_path: Path, data: dict[str, str]) -> None:
    config = config_of(tmp_path, data, steps=10_000)
    assert plan_train(config, rate=8.0).sections["time"]["left"] == duration(10_000)
    (tmp_path / "run").mkdir()
    lines = [{"step": step, "images_per_second": 16.0} for step in (1000, 2000)]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    time = plan_train(config).sections["time"]
    assert time["left"] == duration(8_000 * 8 / 16)
    assert "metrics.jsonl, at step 2000" in time["images a second"]


def test_a_disk_that_is_too_small_is_a_problem(
    tmp_path: Path, data: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "free_bytes", lambda folder: 1 << 20)
    (problem,) = plan_train(config_of(tmp_path, data)).problems
    assert problem.startswith("runs: ") and "1.0 MiB free" in problem and "checkpoint.keep" in problem


def test_numbers_for_people() -> None:
    assert [gib(size) for size in (3 << 20, 3 << 30)] == ["3.0 MiB", "3.00 GiB"]
    assert [duration(s) for s in (29, 31, 3700, 90_061)] == ["0 h 0 min", "0 h 1 min", "1 h 2 min", "1 d 1 h 1 min"]
