"""The recorder: what it writes, what it reads of the device, previews on all ranks, trackers that fail."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from prometheus_client import generate_latest
from torch import nn

from cluster.exporter import Exporter
from cluster.worker import WorkerContext
from dataio.show import colorize
from dataio.types import Batch, Target
from tests.trainer.batches import share, train_config
from tests.trainer.ranks import run_ranks
from trainer.engine import StepResult
from trainer.journal import read_json_lines
from trainer.loop import StepRecord
from trainer.record import TILE, Recorder, draw_preview, preview_rows
from trainer.report import loss_curves

STRIP = 16


class Loader:
    """Counts what a loader counts."""

    def __init__(self) -> None:
        self.quarantine = SimpleNamespace(counts=Counter())

    def read_counts(self) -> dict[str, int]:
        return {"bytes": 0, "cache_hits": 0, "cache_misses": 0}

    def stage_seconds(self) -> dict[str, float]:
        return {"read": 0.5, "decode": 0.0, "copy": 0.0, "idle": 0.0}


class Network(nn.Module):
    """Says the mean of the colours; counts its forward passes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, bool, bool]] = []

    def forward(self, image_BCHW: torch.Tensor) -> torch.Tensor:
        self.seen.append((len(image_BCHW), self.training, torch.is_grad_enabled()))
        return image_BCHW.mean(1)


class Task:
    term_weights: dict[str, float] = {"a": 1.0, "b": 0.5}  # noqa: RUF012

    def preview(self, module: nn.Module, image_BCHW: torch.Tensor) -> torch.Tensor:
        predicted: torch.Tensor = module(image_BCHW)
        return predicted


class Loop:
    """The parts of a loop that a recorder uses."""

    def __init__(self) -> None:
        self.engine = SimpleNamespace(module=Network())

    def global_terms(self, record: StepRecord) -> dict[str, float]:
        return {name: float(value) for name, value in record.terms.items()}


def settings(folder: Path, **changes: Any) -> Any:
    values = {"runs": str(folder), "name": "run", "steps": 20, "log_every": 5, "preview_every": 1000}
    return train_config("teacher", **(values | {"track": {"tensorboard": False}} | changes))


class Unserved(Exporter):
    """An exporter that nobody scrapes: stopping a server takes half a second."""

    address = "127.0.0.1:9"  # type: ignore[assignment]


class Rank:
    """A recorder with all it needs; keeps what it reported."""

    def __init__(self, config: Any, rank: int = 0, world_size: int = 1) -> None:
        self.reports: list[dict[str, Any]] = []
        self.context = WorkerContext(rank=rank, world_size=world_size)
        self.context.report = self.reports.append  # type: ignore[method-assign]
        self.exporter = Unserved("run", "train", rank=rank)
        self.loop, self.loader = Loop(), Loader()
        task: Any = Task()
        loader: Any = self.loader
        self.recorder = Recorder(config, task, self.context, self.exporter, loader)

    def __enter__(self) -> Rank:
        return self

    def __exit__(self, *exc: object) -> None:
        self.recorder.close()

    def step(self, record: StepRecord, batch: Batch) -> None:
        loop: Any = self.loop
        self.recorder.on_step(loop, record, batch)

    def metric(self, _: str, **labels: str) -> float | None:
        return self.exporter.registry.get_sample_value(_, labels)


def record_of(step: int, value: float = 1.0, **changes: Any) -> StepRecord:
    values: dict[str, Any] = {
        "step": step,
        "terms": {"a": torch.tensor(value), "b": torch.tensor(2 * value)},
        "result": StepResult(grad_norm=0.5, skipped=False),
        "learning_rates": {"encoder": 1e-5, "decoder": 1e-4},
        "images": 8,
        "phases": {"data_wait": 0.001, "anything": 0.25},
    }
    return StepRecord(**(values | changes))


@pytest.fixture
def batch() -> Batch:
    return share(train_config("teacher"), 0, 1)


def lines(folder: Path) -> list[dict[str, Any]]:
    return read_json_lines(str(folder / "run" / "metrics.jsonl"))


def test_logged_steps_go_to_a_file_to_prometheus_and_to_the_driver(tmp_path: Path, batch: Batch) -> None:
    with Rank(settings(tmp_path)) as rank:
        for step in range(1, 12):
            rank.step(record_of(step, value=float(step)), batch)
        found = lines(tmp_path)
        assert [line["step"] for line in found] == [1, 5, 10]
        last = found[-1]
        assert (last["samples"], last["loss"], last["terms"]) == (80, 20.0, {"a": 10.0, "b": 20.0})
        assert last["lr"] == {"encoder": 1e-5, "decoder": 1e-4} and last["grad_norm"] == 0.5
        assert last["phases"] == {"data_wait": 0.001, "anything": 0.25} and last["skipped"] is False
        report = rank.reports[-1]
        assert (report["done"], report["total"], report["loss"], report["notes"]) == (10, 20, 20.0, [])
        assert report["shown"] == {"loss": 20.0, "images/s": pytest.approx(last["images_per_second"], abs=0.01)}
        assert report["metrics"] == rank.exporter.address
        assert rank.metric("fathom_loss", term="b") == 20.0 and rank.metric("fathom_loss", term="total") == 20.0
        assert rank.metric("fathom_step") == 11 and rank.metric("fathom_steps_planned") == 20
        assert rank.metric("fathom_loader_seconds_total", stage="read") == 0.5
        assert rank.metric("fathom_grad_norm") == 0.5
        assert rank.metric("fathom_steps_total") == 11
        assert rank.metric("fathom_images_total") == 11 * 8
        assert rank.metric("fathom_phase_seconds_total", phase="anything") == pytest.approx(11 * 0.25)
        assert rank.metric("fathom_learning_rate", group="encoder") == 1e-5


def test_the_rate_is_of_all_steps_since_the_last_line(
    tmp_path: Path, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What logging takes is no part of it; what the device still did for the step is."""
    now = [0.0]
    clock = SimpleNamespace(perf_counter=lambda: now[0], time=lambda: 1e9 + now[0])
    monkeypatch.setattr("trainer.record.time", clock)
    monkeypatch.setattr("trainer.step_metrics.time", clock)

    def waited_for(record: StepRecord) -> dict[str, float]:
        now[0] += 0.5
        return {"a": 1.0, "b": 1.0}

    with Rank(settings(tmp_path)) as rank:
        append = rank.recorder._append

        def slow(line: Mapping[str, Any]) -> None:
            now[0] += 1000.0
            append(line)

        monkeypatch.setattr(rank.loop, "global_terms", waited_for)
        monkeypatch.setattr(rank.recorder, "_append", slow)
        for step, seconds in enumerate((1.0, 1.0, 2.0, 1.0, 6.0, 4.0, 4.0, 4.0, 4.0, 4.0), start=1):
            if step == 7:
                with rank.recorder.timed("evaluation"):
                    now[0] += 30.0
                now[0] += 5.0  # whatever else
                rank.recorder.start_clock()
            now[0] += seconds
            rank.step(record_of(step), batch)
        assert rank.metric("fathom_step_duration_seconds_sum") == 32.5
        assert rank.metric("fathom_phase_seconds_total", phase="evaluation") == 30.0
    found = [(line["seconds"], line["images_per_second"]) for line in lines(tmp_path)]
    assert found == [(1.5, 5.33), (2.625, 3.05), (4.1, 1.95)]
    waits = [(line["spent"]["step"], line["spent"]["data_wait"]) for line in lines(tmp_path)]
    assert waits == [(1.499, 0.001), (10.496, 0.004), (20.495, 0.005)]
    assert lines(tmp_path)[-1]["spent"]["evaluation"] == 30.0
    assert [line["spent"]["other"] for line in lines(tmp_path)] == [0.0, 1000.0, 1005.0]  # 1000: the line before
    assert [line["time"] for line in lines(tmp_path)] == [1e9 + 1.5, 1e9 + 1012.0, 1e9 + 2067.5]


def test_utilisation_is_what_the_arithmetic_needs_of_a_step_s_time(tmp_path: Path, batch: Batch) -> None:
    with Rank(settings(tmp_path)) as rank:
        rank.recorder._ideal_s = 0.25
        rank.recorder._last -= 1.0  # the step took a second
        rank.step(record_of(1), batch)
        [line] = lines(tmp_path)
        assert line["mfu"] == pytest.approx(0.25 / line["seconds"], abs=1e-4) and 0.2 < line["mfu"] <= 0.25
        assert rank.metric("fathom_model_flops_utilization_ratio") == line["mfu"]


@pytest.mark.parametrize(
    ("checkpoint", "expected"),
    [
        ({"every": 100}, 200.0),
        ({"every": 100, "every_minutes": 1}, 60.0),
        ({"every": None, "every_minutes": 2}, 120.0),
    ],
)
def test_checkpoints_are_expected_at_the_present_pace(
    tmp_path: Path, batch: Batch, checkpoint: dict[str, Any], expected: float
) -> None:
    with Rank(settings(tmp_path, checkpoint=checkpoint)) as rank:
        rank.recorder._last -= 2.0
        rank.step(record_of(1), batch)
        interval = rank.metric("fathom_checkpoint_interval_seconds")
        assert interval == pytest.approx(expected, rel=0.1)


class Untouchable:
    """A number on a device: reading it waits for the device."""

    def __float__(self) -> float:
        raise AssertionError("read between log lines")


def test_between_log_lines_nothing_on_the_device_is_read(tmp_path: Path, batch: Batch) -> None:
    far = torch.zeros((), device="meta")  # has no value at all
    unread = Batch(
        views={"student": torch.zeros(8, 3, 28, 28, device="meta")},
        targets={},
        region_BHW=torch.zeros(8, 28, 28, device="meta"),
        weight_B=torch.zeros(8, device="meta"),
        roles=batch.roles,
        keys=batch.keys,
    )
    norm: Any = Untouchable()
    hidden = {"terms": {"a": far, "b": far}, "result": StepResult(grad_norm=norm, skipped=False)}
    with Rank(settings(tmp_path)) as rank:
        for step in (2, 3, 4, 6):
            rank.step(record_of(step, **hidden), unread)
        with pytest.raises(AssertionError, match="read between"):  # the guard works
            rank.step(record_of(5, result=StepResult(grad_norm=norm, skipped=False)), unread)
    assert lines(tmp_path) == []


def test_other_ranks_write_nothing(tmp_path: Path, batch: Batch) -> None:
    with Rank(settings(tmp_path, track={}), rank=1) as rank:
        rank.step(record_of(5), batch)
        rank.recorder.event("validation", 5, {"abs_rel": 0.5})
        assert rank.metric("fathom_steps_total") == 1
        assert "fathom_loss" not in rank.exporter._metrics  # rank 0 says it
        assert rank.reports == []
        assert b"fathom_event_result" not in generate_latest(rank.exporter.registry)
    assert list(tmp_path.iterdir()) == []


def test_events_have_lines_that_curves_of_the_loss_pass_over(tmp_path: Path, batch: Batch) -> None:
    with Rank(settings(tmp_path)) as rank:
        rank.step(record_of(5, value=3.0), batch)
        rank.recorder.event("validation", 5, {"nyu/abs_rel": 0.125, "nyu/rmse": math.nan})
        assert rank.metric("fathom_event_result", event="validation", name="nyu/abs_rel") == 0.125
    assert lines(tmp_path)[1:] == [
        {"step": 5, "event": "validation", "values": {"nyu/abs_rel": 0.125, "nyu/rmse": None}}
    ]
    assert loss_curves({"run": str(tmp_path / "run")}) == {"run": [(5.0, 6.0)]}


def test_a_skipped_step_is_named_and_counted(tmp_path: Path, batch: Batch) -> None:
    bad = record_of(2, result=StepResult(grad_norm=math.nan, skipped=True), bad_keys=("z", "a"))
    with Rank(settings(tmp_path)) as rank:
        rank.step(bad, batch)
        rank.step(record_of(5, value=math.inf, result=StepResult(grad_norm=math.inf, skipped=False)), batch)
        assert rank.metric("fathom_steps_skipped_total", reason="non_finite") == 1
        assert rank.metric("fathom_grad_norm") is None
    (entry,) = read_json_lines(str(tmp_path / "run" / "journal.jsonl"))
    assert (entry["event"], entry["step"], entry["keys"]) == ("step_skipped", 2, ["a", "z"])
    assert entry["singled_out"] is True
    (line,) = lines(tmp_path)
    assert (line["loss"], line["grad_norm"], line["terms"]) == (None, None, {"a": None, "b": None})


def test_a_skipped_step_without_suspects_names_its_whole_batch(tmp_path: Path, batch: Batch) -> None:
    filled_up = replace(batch, keys=("", *batch.keys[1:]))
    with Rank(settings(tmp_path)) as rank:
        rank.step(record_of(2, result=StepResult(grad_norm=math.nan, skipped=True)), filled_up)
        assert rank.metric("fathom_images_total") == len(batch) - 1  # a row without a key is no image
    (entry,) = read_json_lines(str(tmp_path / "run" / "journal.jsonl"))
    assert (entry["keys"], entry["singled_out"]) == (sorted(batch.keys[1:]), False)


def test_bad_samples_are_counted_once(tmp_path: Path, batch: Batch) -> None:
    with Rank(settings(tmp_path)) as rank:
        for step in (2, 3, 4):
            rank.loader.quarantine.counts["bad_image"] = step
            rank.step(record_of(step), batch)
        assert rank.metric("fathom_samples_skipped_total", reason="bad_image") == 4


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "run" / "tensorboard"))
    events.Reload()
    assert [picture.step for tag in events.Tags()["images"] for picture in events.Images(tag)] in ([], [20])
    return {tag: [(e.step, round(e.value, 6)) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_trackers_get_everything_and_go_on_where_a_resumed_run_does(tmp_path: Path, batch: Batch) -> None:
    config = settings(tmp_path, track={"tensorboard": True})
    with Rank(config) as rank:
        for step in range(1, 17):
            rank.step(record_of(step), batch)
            if step % 10 == 0:
                rank.recorder.event("validation", step, {"abs_rel": 0.5, "rmse": math.inf})
    with Rank(config) as rank:  # the first attempt died behind the checkpoint of step 10
        rank.recorder.event("validation", 10, {"again": 1.0})
        for step in range(11, 21):
            rank.step(record_of(step, value=4.0), batch)
        rank.recorder.event("validation", 20, {"abs_rel": 0.25})
        rank.recorder.close()
        rank.recorder.event("validation", 21, {"abs_rel": 0.125})  # no new writer for it
    found = scalars(tmp_path)
    assert found["loss"] == [(1, 2.0), (5, 2.0), (10, 2.0), (15, 8.0), (20, 8.0)]
    assert found["validation/abs_rel"] == [(10, 0.5), (20, 0.25)]
    assert found["validation/again"] == [(10, 1.0)]
    assert set(found) == {
        "loss", "terms/a", "terms/b", "grad_norm", "images_per_second", "lr/encoder", "lr/decoder", "phases/data_wait",
        "phases/anything", "validation/abs_rel", "validation/again",
    }  # fmt: skip
    assert len(list((tmp_path / "run" / "tensorboard").iterdir())) == 2


def test_a_tracker_that_fails_is_told_once_and_counted(
    tmp_path: Path, batch: Batch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tensorboard").write_text("a file where the folder should be")
    with Rank(settings(tmp_path, track={"tensorboard": True})) as rank:
        for step in range(1, 11):
            rank.step(record_of(step), batch)
        rank.recorder.close()
        rank.step(record_of(15), batch)
        assert rank.metric("fathom_tracker_failures_total", tracker="tensorboard") == 4  # the start and three lines
        (note,) = rank.reports[-1]["notes"]
    assert note.startswith("warning: track.tensorboard: could not be started: ")
    assert note.endswith("; the run goes on, and metrics.jsonl has everything")
    assert capsys.readouterr().err == note + "\n"
    assert [line["step"] for line in lines(tmp_path)] == [1, 5, 10, 15]
    (entry,) = read_json_lines(str(tmp_path / "run" / "journal.jsonl"))
    assert (entry["event"], entry["tracker"]) == ("tracker_failed", "tensorboard")


def test_a_preview_comes_every_so_often_and_at_the_end(tmp_path: Path, batch: Batch) -> None:
    with Rank(settings(tmp_path, preview_every=7)) as rank:
        rank.loop.engine.module.train()
        for step in range(1, 21):
            rank.step(record_of(step), batch)
        assert rank.loop.engine.module.seen == [(4, False, False)] * 3
        assert rank.loop.engine.module.training
    names = [f"step_{step:08d}.png" for step in (7, 14, 20)]
    assert sorted(path.name for path in (tmp_path / "run" / "previews").iterdir()) == names
    assert Image.open(tmp_path / "run" / "previews" / names[0]).size == (4 * 28, STRIP + 4 * (28 + STRIP))


@pytest.mark.parametrize(("count", "rows"), [(0, []), (1, [0]), (2, [0, 1]), (3, [0, 2, 1]), (8, [0, 7, 1, 6])])
def test_rows_of_a_preview_are_from_either_end(count: int, rows: list[int]) -> None:
    assert preview_rows(count) == rows


def panels(picture_HWC: np.ndarray, row: int, count: int, size: int = 28) -> list[np.ndarray]:
    top = STRIP + row * (size + STRIP) + STRIP
    return [picture_HWC[top : top + size, i * size : (i + 1) * size] for i in range(count)]


def test_a_preview_shows_image_target_prediction_and_where_the_loss_looks(batch: Batch) -> None:
    region_BHW = batch.region_BHW.clone()
    region_BHW[7, :4], region_BHW[7, 4:8], region_BHW[7, 8:] = 0, 2, 1
    batch = replace(batch, region_BHW=region_BHW)
    predicted_BHW = torch.rand(2, 28, 28, generator=torch.Generator().manual_seed(1))
    picture_HWC = draw_preview(batch, [0, 7], predicted_BHW)
    assert picture_HWC.shape == (STRIP + 2 * (28 + STRIP), 4 * 28, 3)
    image, target, prediction, valid = panels(picture_HWC, 1, 4)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    expected = (batch.views["student"][7].permute(1, 2, 0).numpy() * std + mean).clip(0, 1) * 255
    assert abs(image - expected).max() <= 0.51
    assert (target == colorize(batch.targets["disparity"].value_BHW[7].numpy(), region_BHW[7].numpy() > 0)).all()
    assert (target[:4] == 48).all() and (target[4:] != 48).any()
    assert (prediction == colorize(predicted_BHW[1].numpy())).all()
    assert [np.unique(valid[rows].reshape(-1, 3), axis=0).tolist() for rows in (slice(4), slice(4, 8), slice(8, 28))] \
        == [[[48, 48, 48]], [[90, 160, 230]], [[222, 222, 222]]]  # fmt: skip
    titles = picture_HWC[:STRIP]
    for column in range(4):  # every panel has its title
        assert (titles[:, column * 28 : (column + 1) * 28].sum(-1) < 300).any()


def test_depth_in_metres_is_shown_as_nearness_as_the_prediction_is(batch: Batch) -> None:
    depth_BHW = torch.linspace(1, 9, 28).expand(8, 28, 28).clone()  # near on the left
    region_BHW = torch.ones_like(batch.region_BHW)
    depth_BHW[:, 0], region_BHW[:, 0] = 0, 0
    metric = replace(batch, targets={"depth_m": Target(value_BHW=depth_BHW, quantity="depth_m")}, region_BHW=region_BHW)
    _, target, prediction, _ = panels(draw_preview(metric, [0], 1 / depth_BHW[:1].clamp(min=1)), 0, 4)
    assert (target[1:] == prediction[1:]).all() and (target[0] == 48).all()
    near, far = target[1, 0].astype(int), target[1, -1].astype(int)
    assert near[0] > near[2] and far[2] > far[0]  # red is near, blue is far


def test_without_a_target_there_is_neither_target_nor_valid(batch: Batch) -> None:
    bare = replace(batch, targets={})
    picture_HWC = draw_preview(bare, [0], torch.rand(1, 28, 28))
    assert picture_HWC.shape == (STRIP + 28 + STRIP, 2 * 28, 3)


def test_large_panels_are_made_smaller(batch: Batch) -> None:
    size = 2 * TILE
    large = replace(
        batch,
        views={"student": torch.rand(8, 3, size // 2, size)},
        targets={"disparity": Target(value_BHW=torch.rand(8, size // 2, size), quantity="disparity")},
        region_BHW=torch.ones(8, size // 2, size, dtype=torch.uint8),
    )
    picture_HWC = draw_preview(large, [0], torch.rand(1, size // 2, size))
    assert picture_HWC.shape == (STRIP + STRIP + TILE // 2, 4 * TILE, 3)


class Sharded(Network):
    """Like a network under ZeRO 3: a forward pass needs every rank, on as many rows."""

    def forward(self, image_BCHW: torch.Tensor) -> torch.Tensor:
        rows: list[Any] = [None, None]
        torch.distributed.all_gather_object(rows, len(image_BCHW))
        assert rows[0] == rows[1]
        return super().forward(image_BCHW)


def preview_on(rank: int, world_size: int, folder: Path) -> list[tuple[int, bool, bool]]:
    """One rank has eight rows, the other three."""
    whole = share(train_config("teacher"), 0, 1)
    with Rank(settings(folder, preview_every=2), rank, world_size) as one:
        one.loop.engine.module = Sharded()
        for step in (1, 2):
            one.step(record_of(step), whole if rank == 0 else next(whole.split(3)))
        bad = record_of(3, result=StepResult(grad_norm=math.nan, skipped=True), bad_keys=(f"of_rank_{rank}",))
        one.step(bad, whole)
        return one.loop.engine.module.seen


def test_every_rank_runs_the_forward_pass_of_a_preview_and_one_writes(tmp_path: Path) -> None:
    seen = run_ranks(preview_on, 2, tmp_path / "ranks", tmp_path)
    assert seen == [[(3, False, False)], [(3, False, False)]]
    assert [path.name for path in (tmp_path / "run" / "previews").iterdir()] == ["step_00000002.png"]
    picture = Image.open(tmp_path / "run" / "previews" / "step_00000002.png")
    assert picture.size == (4 * 28, STRIP + 3 * (28 + STRIP))
    (entry,) = read_json_lines(str(tmp_path / "run" / "journal.jsonl"))
    assert entry["keys"] == ["of_rank_0", "of_rank_1"]


def test_metrics_are_json_without_nan(tmp_path: Path, batch: Batch) -> None:
    with Rank(settings(tmp_path)) as rank:
        rank.step(record_of(5, value=math.nan), batch)
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=lambda name: pytest.fail(name))["loss"] is None
