"""A rank's whole life on real data, without Ray: validation, the best checkpoint, the average, previews, the export."""

from __future__ import annotations

import json
import threading
import time
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
from trainer import ranks
from trainer.checkpoint import list_checkpoints, load_checkpoint, verify_checkpoint
from trainer.config import ConfigError, parse_config
from trainer.config_train import TrainConfig
from trainer.divergence import TrainingDiverged
from trainer.evaluate_images import mean_of, measure_part, measurement
from trainer.folder import RunFolder
from trainer.journal import logged_lines
from trainer.ranks import attempt_of
from trainer.run import prepare_folder

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


class Told(WorkerContext):
    """Rank 1 hears that its machine goes away while it validates."""

    told = False

    def stop_requested(self) -> str | None:
        self.told = self.told or (self.rank == 1 and self._beat.phase == "validation")
        return "PREEMPTED" if self.told else None


class Leaving(WorkerContext):
    """Rank 1's machine goes away in no time, as it hears when the checkpoint of step 3 is under way."""

    begun = False

    def beat(self, step: int, phase: str) -> None:
        super().beat(step, phase)
        self.begun = self.begun or (self.rank == 1 and phase == "checkpoint")

    def stop_requested(self) -> str | None:
        return "PREEMPTED" if self.begun else None

    @property
    def deadline(self) -> float | None:
        return time.time() + 1 if self.begun else None


def leave(rank: int, world_size: int, runs: Path, data: dict[str, str], save_s: float) -> tuple[Any, int, int]:
    """The writing of a checkpoint takes a moment, so that it is under way when the ranks stop; `save_s`: how long the
    last one took."""
    from trainer.worker import RankTrainer

    config = config_of(runs, data, f"leaving-{save_s}", checkpoint={"every": 3}, validation={})
    context = Leaving(rank=rank, world_size=world_size)
    with RankTrainer(config, context, None) as trainer:
        write = trainer.saver._write
        trainer.saver._write = lambda *args: (time.sleep(1), write(*args))[1]  # type: ignore[method-assign]
        trainer._save_s = save_s
        return trainer.run(), trainer.loop.step, trainer.saved_step


@pytest.mark.parametrize(("save_s", "saved"), [(60.0, 3), (0.1, 4)])
def test_a_machine_that_goes_too_soon_leaves_the_checkpoint_that_was_under_way(
    tmp_path: Path, data: dict[str, str], save_s: float, saved: int
) -> None:
    for found in run_ranks(leave, 2, tmp_path / "ranks", tmp_path / "runs", data, save_s):
        assert found == ("PREEMPTED", 4, saved)
    checkpoints = str(tmp_path / "runs" / f"leaving-{save_s}" / "checkpoints")
    assert list_checkpoints(checkpoints)[-1] == f"step_{saved:08d}"
    verify_checkpoint(f"{checkpoints}/step_{saved:08d}")


def test_the_driver_s_file_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network file system shows what was there before, for a while."""
    monkeypatch.setattr(ranks, "_SHARED_WAIT_S", 0.5)
    path, run = tmp_path / "environment.json", RunFolder(str(tmp_path))
    with pytest.raises(storage.StorageError, match=r"is not there.*must be a folder that all machines"):
        ranks.require_shared(run, "now")
    path.write_text('{"attempt": "before"}')
    with pytest.raises(storage.StorageError, match="of another attempt"):
        ranks.require_shared(run, "now")
    threading.Timer(0.2, path.write_text, ['{"attempt": "now"}']).start()
    ranks.require_shared(run, "now")


def train(rank: int, world_size: int, runs: Path, data: dict[str, str], names: list[str]) -> dict[str, bool]:
    from trainer.worker import RankTrainer

    trains = {}
    for name in names:
        with RankTrainer(config_of(runs, data, name), WorkerContext(rank=rank, world_size=world_size), None) as trainer:
            assert trainer.run() is None
            trains[name] = not trainer.exporter.registry.get_sample_value("fathom_checkpoint_failures_total")
    with RankTrainer(config_of(runs, data, "told"), Told(rank=rank, world_size=world_size), None) as trainer:
        trains["told"] = trainer.run() == "PREEMPTED" and trainer.loop.step == 3  # told with the next step
    return trains


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("data")
    return {
        "train": write_dataset(root / "train", shards_of([7, 6], labelled)),
        "a": write_dataset(root / "a", shards_of([3, 2], lambda seed: labelled(seed + 20))),
        "b": write_dataset(root / "b", shards_of([1], lambda seed: labelled(seed + 40))),
    }


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, data: dict[str, str]) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("worker")
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


def test_a_validation_is_left_off_by_all_ranks_when_one_is_to_stop(world: dict[str, Any]) -> None:
    """A notice of thirty seconds is for the checkpoint."""
    assert all(result["told"] for result in world["results"])
    assert lines(world, "told", event=True) == []
    assert list_checkpoints(str(world["runs"] / "told" / "checkpoints")) == ["step_00000003"]


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
    """The same batches, and losses that differ by rounding; every rank saw no failure.

    At these rates a step multiplies what rounding made by ten and more (2.8e-7, 2e-5, 2e-4, 2e-5, 4e-3 on a processor
    with AVX-512): a wrong sum shows in the second step.
    """
    first = [line["loss"] for line in lines(world, "plain", False)]
    assert len(first) == STEPS
    for name in CELLS:
        mine = [line["loss"] for line in lines(world, name, False)]
        assert mine[:2] == pytest.approx(first[:2], rel=1e-5)
        assert mine[:3] == pytest.approx(first[:3], rel=1e-3)
        assert mine == pytest.approx(first, rel=0.05)
    assert all(all(result[name] for name in CELLS) for result in world["results"])


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
    from trainer.ends import CheckpointLost
    from trainer.worker import RankTrainer

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
        failures = trainer.exporter.registry.get_sample_value("fathom_checkpoint_failures_total") or 0
        return ended, failures, trainer.loop.step, trainer.recorder._notes


def test_a_run_on_a_full_disk_goes_on_and_says_so(world: dict[str, Any], tmp_path: Path) -> None:
    """To its last step, whose checkpoint it cannot do without."""
    results = run_ranks(full_disk, 2, tmp_path / "ranks", tmp_path / "runs", world["data"])
    for rank, (ended, failures, step, notes) in enumerate(results):
        assert "No space left on device" in ended and step == STEPS
        assert failures >= 2 if rank == 0 else failures == 0  # of one checkpoint, however many ranks
        assert len(notes) == failures
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


def poison(trainer: Any, first: int) -> None:
    """From step `first` on every batch is NaN."""
    before = trainer.before_step

    def poisoned(batch: Any) -> None:
        before(batch)
        if trainer.loop.step >= first - 1:
            batch.views["student"][:] = float("nan")

    trainer.before_step = poisoned


def ended(config: TrainConfig, checkpoint: str | None, prepare: Any = None) -> str:
    """How a run of one rank ends."""
    from trainer.worker import RankTrainer

    with RankTrainer(config, WorkerContext(rank=0, world_size=1), checkpoint) as trainer:
        if prepare:
            prepare(trainer)
        try:
            return str(trainer.run())
        except TrainingDiverged as error:
            return str(error)


def lives(rank: int, world_size: int, runs: Path, data: dict[str, str]) -> dict[str, Any]:
    """One rank's runs that meet with this and that."""
    import trainer.saver as saver_module
    import trainer.worker as worker_module
    from dataio.loader import Loader
    from trainer.autobatch import micro_batch_count

    found: dict[str, Any] = {}

    def config(name: str, **changes: Any) -> TrainConfig:
        plain = {"validation": {}, "checkpoint": {"every": 2, "keep": 9}, "preview_every": 10**6}
        return config_of(runs, data, name, **(plain | changes))

    def step(name: str, number: int) -> str:
        return str(runs / name / "checkpoints" / f"step_{number:08d}")

    ended(config("clock", checkpoint={"every": None, "every_minutes": 1e-9, "keep": 9}), None)
    optim = {"encoder_lr": 1e-3, "decoder_lr": 1e-2, "ema_decay": 0.5}

    def diverging(most: int, keep: int) -> TrainConfig:
        saves = {"every": 2, "keep": keep}
        return config("nan", optim=optim, engine={"precision": "fp32", "max_skipped_steps": most}, checkpoint=saves)

    found["gave up"] = ended(diverging(3, 2), None, lambda trainer: poison(trainer, 3))
    found["kept"] = list_checkpoints(str(runs / "nan" / "checkpoints"))
    found["tried on"] = ended(diverging(2, 9), step("nan", 5), lambda trainer: poison(trainer, 6))

    best = config(
        "best",
        engine={"precision": "fp32", "max_skipped_steps": 2},
        checkpoint={"every": None, "every_minutes": 60, "keep_best": 1},
        validation={"datasets": [data["a"]], "every": 4, "batch": 2},
    )
    found["gave up validated"] = ended(best, None, lambda trainer: poison(trainer, 3))

    measured: list[str] = []

    def counting(config: TrainConfig, *rest: Any) -> int:
        measured.append(config.engine.precision)
        return micro_batch_count(config, *rest)

    worker_module.micro_batch_count = counting  # type: ignore[attr-defined]
    auto = {"precision": "fp32", "micro_batch": "auto"}
    ended(config("auto"), None)
    found["auto"] = [list(measured)]
    for engine in (auto, auto, auto | {"precision": "bf16"}):
        measured.clear()
        ended(config("auto", engine=engine), step("auto", 2 if not found["auto"][1:] else 4))
        found["auto"].append(list(measured))

    complete, tried = saver_module.commit, []

    def flaky(root: str, state: Any, *rest: Any) -> str:
        tried.append(state.step)
        if tried == [2, 4, 6]:
            raise storage.StorageError("cannot be completed")
        return complete(root, state, *rest)

    saver_module.commit = flaky  # type: ignore[assignment]
    found["twice"] = ended(config("twice"), None), tried
    saver_module.commit = complete
    take = Loader.__next__

    def slow(loader: Loader) -> Any:
        time.sleep(0.25)
        return take(loader)

    Loader.__next__ = slow  # type: ignore[method-assign]
    ended(config("slow"), None)
    return found


@pytest.fixture(scope="module")
def alone(world: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("alone")
    (found,) = run_ranks(lives, 1, root / "ranks", root / "runs", world["data"])
    return {**found, "runs": root / "runs"}


def test_the_clock_saves_too(alone: dict[str, Any]) -> None:
    """With so short an interval at every step whose all-reduce comes after one is due."""
    steps = [int(name.removeprefix("step_")) for name in list_checkpoints(str(alone["runs"] / "clock" / "checkpoints"))]
    assert steps[-1] == STEPS and len(steps) >= 3


def test_giving_up_leaves_the_last_good_weights_and_what_was_before(alone: dict[str, Any]) -> None:
    """Who resumes has all steps again."""
    assert alone["kept"] == [f"step_{step:08d}" for step in (2, 4, 5)]
    assert alone["tried on"] == "None"
    assert [line["step"] for line in logged_lines(str(alone["runs"] / "nan"))] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines(alone, "nan", event=True)] == [5]  # where it went on
    root = alone["runs"] / "nan" / "checkpoints"
    good, last = (load_checkpoint(str(root / f"step_{step:08d}")) for step in (2, 5))
    assert alone["gave up"].startswith("step 5: 3 steps in a row")
    assert "--skip-samples" in alone["gave up"]
    assert (last.state.skipped_in_a_row, last.state.applied_steps) == (0, 2)
    for name, tensor in good.weights.items():
        assert torch.equal(last.weights[name], tensor), name
    assert good.ema is not None and last.ema is not None  # nor has the average moved
    for name, tensor in good.ema.items():
        assert torch.equal(last.ema[name], tensor), name


def test_giving_up_where_a_validation_has_just_saved_leaves_all_steps_again_too(alone: dict[str, Any]) -> None:
    """The score stays with the checkpoint."""
    assert alone["gave up validated"].startswith("step 4: 2 steps in a row")
    saved = load_checkpoint(str(alone["runs"] / "best" / "checkpoints" / "step_00000004"))
    assert saved.state.skipped_in_a_row == 0
    assert saved.about.score is not None


def test_auto_is_measured_again_only_in_other_circumstances(alone: dict[str, Any]) -> None:
    """A number that was configured is none that auto found; a found one stays until precision or ranks change."""
    assert alone["auto"] == [["fp32"], ["fp32"], [], ["bf16"]]


def test_the_last_checkpoint_is_tried_twice(alone: dict[str, Any]) -> None:
    assert alone["twice"] == ("None", [2, 4, 6, 6])
    assert verify_checkpoint(str(alone["runs"] / "twice" / "checkpoints" / f"step_{STEPS:08d}")) is None


def test_waiting_for_data_is_part_of_a_step(alone: dict[str, Any]) -> None:
    text = (alone["runs"] / "slow" / "metrics.jsonl").read_text()
    for line in map(json.loads, text.splitlines()):
        assert line["seconds"] >= 0.25 and line["images_per_second"] <= 4 / 0.25
        assert line["phases"]["data_wait"] >= 0.25


def started(rank: int, world_size: int, runs: Path, data: dict[str, str]) -> list[str]:
    """What Ray calls on every rank: with a folder that it does not see, as it should be, on too small a device."""
    from trainer.ends import OutOfMemory
    from trainer.loop import Loop

    ranks._SHARED_WAIT_S = 0.5

    def run_out(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee the documentation")

    found = []
    for name in ("unseen", "copied", "seen", "small"):
        config = config_of(runs, data, name, validation={}, checkpoint={"every": 5})
        if rank == 0 and name != "unseen":
            prepare_folder(config, False)
        torch.distributed.barrier()
        if name == "small":
            Loop.train_step = run_out  # type: ignore[assignment, method-assign]
        payload = {"config": config.model_dump(mode="json"), "folder": config.folder, "checkpoint": None,
                   "attempt": "none"}  # fmt: skip
        if name in ("seen", "small"):
            payload["attempt"] = attempt_of(config)
        try:
            found.append(str(ranks.on_rank(WorkerContext(rank=rank, world_size=world_size), payload)["step"]))
        except (storage.StorageError, OutOfMemory) as error:
            found.append(str(error))
    return found


def test_what_a_rank_needs_to_start_and_how_it_runs_out_of_memory(world: dict[str, Any], tmp_path: Path) -> None:
    results = run_ranks(started, 2, tmp_path / "ranks", tmp_path / "runs", world["data"])
    for rank, (unseen, copied, seen, small) in enumerate(results):
        for refused in (unseen, copied):  # a copy is of another attempt, though the configuration is the same
            assert "environment.json: is not there, or of another attempt" in refused
            assert "a folder that all machines of the cluster share" in refused
        assert seen == str(STEPS)
        assert small.startswith(f"rank {rank}: out of memory: CUDA out of memory. Tried to allocate 2.00 GiB. Use eng")
        assert "\n" not in small
    content = json.loads((tmp_path / "runs" / "seen" / "environment.json").read_text())
    assert len(content["ranks"]) == 2 and content["packages"]["torch"]
    assert all(one["host"] and one["device"] for one in content["ranks"])
