"""What an evaluation would take, and everything that is wrong with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.dataio.fakes import labelled, shards_of, unlabelled, write_dataset
from tests.trainer.test_labelling import save_network
from trainer.config import parse_config
from trainer.config_evaluate import EvaluateConfig
from trainer.plan_evaluate import plan_evaluate


def config_of(weights: str, datasets: list[str], **changes: Any) -> EvaluateConfig:
    values = {"weights": weights, "datasets": datasets, "input_size": 28, "batch": 4, "out": "/nowhere"}
    return parse_config(EvaluateConfig, values | changes)


def test_a_sound_one_is_laid_out(tmp_path: Path) -> None:
    weights = save_network(tmp_path / "w", 1, "tiny")
    data = write_dataset(tmp_path / "truth", shards_of([13, 10], labelled))
    plan = plan_evaluate(config_of(weights, [data, data], limit=20, cluster={"workers": 9}), rate=4.0)
    assert plan.problems == ()
    work = plan.sections["work"]
    assert (work["samples"], work["forward_passes_at_least"], work["workers"]) == (40, 10, 4)  # four units in all
    assert plan.sections["datasets"][f"0 {data}"] == {
        "benchmark": None, "protocols": ["depth", "disparity"], "samples": 20
    }  # fmt: skip
    memory = plan.sections["memory_of_a_worker"]
    assert memory["in_all_bytes"] > memory["weights_bytes"] == 4 * memory["parameters"]
    assert plan.sections["time"]["left_seconds"] == 10.0
    assert "give --rate" in plan_evaluate(config_of(weights, [data])).notes[0]


def test_everything_wrong_is_said_at_once(tmp_path: Path) -> None:
    photos = write_dataset(tmp_path / "photos", shards_of([9], unlabelled), with_depth=False)
    config = config_of(str(tmp_path / "none"), ["/no/such", photos], baseline={"dataset": "/no/baseline"})
    problems = plan_evaluate(config).problems
    assert len(problems) == 4
    for part in ("none", "/no/such", "has no depth to compare with", "/no/baseline"):
        assert sum(part in problem for problem in problems) == 1, (part, problems)
    weights = save_network(tmp_path / "w", 1, "tiny")
    (problem,) = plan_evaluate(config_of(weights, [write_dataset(tmp_path / "t", shards_of([9], labelled))],
                                         protocols=["metric"])).problems  # fmt: skip
    assert problem.startswith("datasets.0: protocol: found 'metric'")
