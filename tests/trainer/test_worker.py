"""A rank's whole life on real data, without Ray: validation, the best checkpoint, the average, previews, the export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from cluster import storage
from cluster.worker import WorkerContext
from dataio.dataset import Dataset
from model import DepthAnything
from tests.dataio.fakes import labelled, shards_of, write_dataset
from tests.trainer.disks import fill, small_disk
from tests.trainer.ranks import run_ranks
from trainer.checkpoint import list_checkpoints, load_checkpoint, verify_checkpoint
from trainer.config import ConfigError, parse_config
from trainer.config_train import TrainConfig
from trainer.evaluate_images import mean_of, measure_part, measurement

STEPS = 6
CELLS = {  # name: ZeRO stage, average
    "plain": (2, None),
    "averaged": (1, 0.5),
    "cut": (3, None),
    "cut-averaged": (3, 0.5),
}


def config_of(runs: Path, folders: dict[str, str], name: str, **overrides: Any) -> TrainConfig:
    stage, average = CELLS.get(name, (2, None))
    values: dict[str, Any] = {
        "name": name,
        "runs": str(runs),
        "seed": 3,
        "steps": STEPS,
        "task": {"kind": "teacher"},
        "model": {"preset": "tiny"},
        "data": {
            "input_size": 28, "shuffle_window": 4, "roles": {"labelled": {"datasets": [folders["train"]], "batch": 4}},
        },
        "optim": {"encoder_lr": 1e-3, "decoder_lr": 1e-2, "ema_decay": average},
        "engine": {"zero_stage": stage, "precision": "fp32", "debug": True},
        "checkpoint": {"every": 5, "keep": 1, "keep_best": 1},
        "validation": {"datasets": [folders["a"], folders["b"]], "every": 2, "batch": 2},
        "track": {"tensorboard": False},
        "log_every": 1,
        "preview_every": 3,
    }  # fmt: skip
    return parse_config(TrainConfig, values | overrides)


def train(rank: int, world_size: int, runs: Path, data: dict[str, str], names: list[str]) -> dict[str, bool]:
    from trainer.worker import RankTrainer

    trains = {}
    for name in names:
        with RankTrainer(config_of(runs, data, name), WorkerContext(rank=rank, world_size=world_size), None) as trainer:
            assert trainer.run() is None
            trains[name] = trainer.exporter.metric("fathom_checkpoint_failures_total")._value.get() == 0
    return trains


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("worker")
    data = {
        "train": write_dataset(root / "train", shards_of([7, 6], labelled)),
        "a": write_dataset(root / "a", shards_of([3, 2], lambda seed: labelled(seed + 20))),
        "b": write_dataset(root / "b", shards_of([1], lambda seed: labelled(seed + 40))),
    }
    results = run_ranks(train, 2, root / "ranks", root / "runs", data, list(CELLS))
    return {"data": data, "runs": root / "runs", "results": results}


def lines(world: dict[str, Any], name: str, event: bool) -> list[dict[str, Any]]:
    text = (world["runs"] / name / "metrics.jsonl").read_text()
    return [line for line in map(json.loads, text.splitlines()) if ("event" in line) == event]


def measured(network: DepthAnything, path: str) -> dict[str, float]:
    """One process over the whole dataset."""

    @torch.no_grad()
    def predict(image_BCHW: torch.Tensor) -> torch.Tensor:
        disparity_BHW = network(image_BCHW).disparity_BHW
        assert disparity_BHW is not None
        return disparity_BHW

    what = measurement(network.preset, protocol="disparity", input_size=28, batch=2)
    return mean_of(measure_part(Dataset.open(path), predict, what))


@pytest.mark.parametrize("name", CELLS)
def test_validation_measures_what_is_exported_on_any_number_of_ranks(world: dict[str, Any], name: str) -> None:
    """Every image once: the last validation equals one process's over the exported weights."""
    events = lines(world, name, True)
    assert [(line["step"], line["event"]) for line in events] == [(step, "validation") for step in (2, 4, 6)]
    network = DepthAnything.from_pretrained(world["runs"] / name / "weights").eval()
    means = {folder: measured(network, world["data"][folder]) for folder in ("a", "b")}
    last = events[-1]["values"]
    for folder, mean in means.items():
        for metric, value in mean.items():
            assert last[f"{folder}/{metric}"] == pytest.approx(value, rel=1e-5), (folder, metric)
    assert last["abs_rel"] == pytest.approx((means["a"]["abs_rel"] + means["b"]["abs_rel"]) / 2, rel=1e-5)


@pytest.mark.parametrize("name", CELLS)
def test_the_export_is_the_average_where_there_is_one(world: dict[str, Any], name: str) -> None:
    root = world["runs"] / name / "checkpoints"
    last = load_checkpoint(str(root / f"step_{STEPS:08d}"))
    exported = DepthAnything.from_pretrained(world["runs"] / name / "weights").state_dict()
    expected = last.ema if CELLS[name][1] else last.weights
    assert (last.ema is not None) == bool(CELLS[name][1]) and expected is not None
    assert expected.keys() == exported.keys()
    assert all(torch.equal(exported[key], expected[key]) for key in exported)
    if last.ema is not None:
        from_checkpoint = DepthAnything.from_pretrained(root / f"step_{STEPS:08d}", ema=True).state_dict()
        assert all(torch.equal(exported[key], from_checkpoint[key]) for key in exported)
        assert any(not torch.equal(last.weights[key], exported[key]) for key in exported)


@pytest.mark.parametrize("name", CELLS)
def test_the_best_checkpoint_stays_beside_the_newest(world: dict[str, Any], name: str) -> None:
    scores = {line["step"]: line["values"]["abs_rel"] for line in lines(world, name, True)}
    best = min(scores, key=lambda step: scores[step])
    root = world["runs"] / name / "checkpoints"
    kept = {int(folder.removeprefix("step_")) for folder in list_checkpoints(str(root))}
    assert kept == {best, STEPS}
    about = load_checkpoint(str(root / f"step_{best:08d}")).about
    assert about.metric == "abs_rel" and about.score == pytest.approx(scores[best])


@pytest.mark.parametrize("name", CELLS)
def test_previews_are_drawn_at_every_stage(world: dict[str, Any], name: str) -> None:
    previews = sorted((world["runs"] / name / "previews").iterdir())
    assert [path.name for path in previews] == ["step_00000003.png", "step_00000006.png"]
    for path in previews:
        with Image.open(path) as picture:
            assert picture.width == 4 * 28 and len(picture.convert("L").getcolors(1 << 20) or ()) > 20


def test_stages_and_averages_do_not_change_what_is_learned(world: dict[str, Any]) -> None:
    """The same batches, and losses that differ by rounding; every rank saw no failure."""
    first = [line["loss"] for line in lines(world, "plain", False)]
    assert len(first) == STEPS
    for name in CELLS:
        assert [line["loss"] for line in lines(world, name, False)] == pytest.approx(first, rel=1e-3)
    assert all(all(result.values()) and len(result) == len(CELLS) for result in world["results"])


def refused(rank: int, world_size: int, runs: Path, data: dict[str, str]) -> list[str]:
    """What cannot be validated, in words."""
    from trainer.worker import RankTrainer

    roles = {"unlabelled": {"datasets": [data["train"]], "batch": 4}}
    pretext = {"task": {"kind": "pretext"}, "data": {"input_size": 28, "roles": roles}}
    section = {"datasets": [data["a"]], "every": 2}
    messages = []
    wrong = [section | {"protocol": "dispariti"}, section | {"protocol": "metric"}, section | {"metric": "absrel"}]
    for changes in (pretext, *({"validation": one} for one in wrong)):
        config = config_of(runs, data, "refused", **changes)
        try:
            with RankTrainer(config, WorkerContext(rank=rank, world_size=world_size), None):
                messages.append("went on")
        except ConfigError as error:
            messages.append(str(error))
    return messages


def test_what_cannot_be_validated_is_said_in_one_line(world: dict[str, Any], tmp_path: Path) -> None:
    (messages,) = run_ranks(refused, 1, tmp_path / "ranks", tmp_path / "runs", world["data"])
    assert "validation.datasets: task 'pretext' predicts no depth" in messages[0]
    assert "'dispariti'" in messages[1] and "disparity" in messages[1]
    assert "metric" in messages[2]
    assert "validation.metric: found 'absrel'; did you mean 'abs_rel'?" in messages[3]
    assert not any("\n" in message for message in messages)


def full_disk(rank: int, world_size: int, runs: Path, data: dict[str, str]) -> Any:
    """Saves fail from step 2 on; at the end, too."""
    import trainer.saver as module
    from trainer.worker import CheckpointLost, RankTrainer

    def refuse(*args: Any) -> str:
        raise storage.StorageError("weights.safetensors: cannot be written: No space left on device")

    config = config_of(runs, data, "full", checkpoint={"every": 1, "keep": 3}, validation={})
    with RankTrainer(config, WorkerContext(rank=rank, world_size=world_size), None) as trainer:
        before = trainer.before_step

        def filling(batch: Any) -> None:
            before(batch)
            if trainer.loop.step == 2:
                trainer.saver.finish()
                module.write_tensors = refuse

        trainer.before_step = filling  # type: ignore[method-assign]
        try:
            trainer.run()
            ended = "finished"
        except CheckpointLost as error:
            ended = str(error)
        failures = trainer.exporter.metric("fathom_checkpoint_failures_total")._value.get()
        return ended, failures, trainer.loop.step, trainer.recorder._notes


def test_a_run_on_a_full_disk_goes_on_and_says_so(world: dict[str, Any], tmp_path: Path) -> None:
    """To its last step, whose checkpoint it cannot do without."""
    results = run_ranks(full_disk, 2, tmp_path / "ranks", tmp_path / "runs", world["data"])
    for rank, (ended, failures, step, notes) in enumerate(results):
        assert "No space left on device" in ended and step == STEPS
        assert failures >= 2
        assert len(notes) == (0 if rank else failures)
    assert results[0][3][0].startswith("warning: checkpoint of step 3 failed: weights.safetensors: cannot be written")
    run = tmp_path / "runs" / "full"
    assert list_checkpoints(str(run / "checkpoints"))[-1] == "step_00000002"
    events = [json.loads(line)["event"] for line in (run / "journal.jsonl").read_text().splitlines()]
    assert events.count("checkpoint_failed") == results[0][1] and events[:2] == ["checkpoint", "checkpoint"]


def filled(rank: int, world_size: int, disk: Path, data: dict[str, str]) -> Any:
    """Another program takes the whole disk before step 3 and leaves before step 6."""
    from trainer.worker import RankTrainer

    config = config_of(disk / "runs", data, "full", checkpoint={"every": 1, "keep": 1}, validation={}, preview_every=1)
    with RankTrainer(config, WorkerContext(rank=rank, world_size=world_size), None) as trainer:
        before = trainer.before_step

        def filling(batch: Any) -> None:
            before(batch)
            if trainer.loop.step == 2:
                trainer.saver.finish()
                fill(disk / "other")
            if trainer.loop.step == 5:
                (disk / "other").unlink()

        trainer.before_step = filling  # type: ignore[method-assign]
        assert trainer.run() is None
        metric = trainer.exporter.metric
        counts = [metric(f"fathom_{name}_failures_total")._value.get() for name in ("checkpoint", "record")]
        return trainer.loop.step, counts, trainer.recorder._notes


def test_a_disk_that_is_full_for_a_while_costs_records_and_checkpoints(world: dict[str, Any], tmp_path: Path) -> None:
    """The run itself goes on, says so once for each kind, and ends whole."""
    with small_disk(tmp_path / "disk", 48) as disk:
        ((step, (checkpoints, records), notes),) = run_ranks(filled, 1, tmp_path / "ranks", disk, world["data"])
        assert step == STEPS and checkpoints >= 2 and records >= 3
        for words in ("checkpoint of step 3 failed", "a preview cannot be written"):  # small files may still find room
            assert sum(words in note for note in notes) == 1, words
        assert all("the run goes on" in note and "\n" not in note for note in notes)
        root = disk / "runs" / "full" / "checkpoints"
        assert list_checkpoints(str(root)) == [f"step_{STEPS:08d}"]
        assert verify_checkpoint(str(root / f"step_{STEPS:08d}")) is None
        assert sorted(path.name for path in root.iterdir()) == ["latest", f"step_{STEPS:08d}"]
