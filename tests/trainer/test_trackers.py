"""Trackers: the real packages read back, a resume without a doubled stretch, and nothing that ends or stalls a run."""

from __future__ import annotations

import importlib.util
import io
import json
import struct
import threading
import time
from collections.abc import Iterator, Mapping
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.conftest import left_children
from tests.trainer.batches import train_config
from trainer.config import ConfigError
from trainer.config_train import TrainConfig
from trainer.trackers import Background, TensorBoardTracker, Tracker, check_trackers, last_logged_step, open_trackers

PICTURE_HWC = np.arange(6 * 8 * 3, dtype=np.uint8).reshape(6, 8, 3)


def tracked(runs: Path, **track: Any) -> TrainConfig:
    return train_config("teacher", runs=str(runs), name="run", track=track)


class Failures:
    """Counts what `failed` is told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, str]] = []

    def __call__(self, tracker: str, problem: str) -> None:
        self.told.append((tracker, problem))


def missing(monkeypatch: pytest.MonkeyPatch, *names: str, spec: ModuleSpec | None = None) -> None:
    """Makes packages look as if they were not installed."""
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: spec if name in names else find(name))


WANDB = {"project": "depth", "mode": "offline"}


def test_what_is_asked_for_must_be_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both, none = tracked(tmp_path, tensorboard=True, wandb=WANDB), tracked(tmp_path, tensorboard=False)
    check_trackers(both)
    missing(monkeypatch, "wandb", "tensorboard")
    check_trackers(none)
    with pytest.raises(ConfigError) as caught:
        check_trackers(both)
    assert str(caught.value) == (
        "track.tensorboard: is true, but tensorboard is not installed; `pip install tensorboard`, or set "
        "track.tensorboard to false; track.wandb: asks for project 'depth', but wandb is not installed; "
        "`pip install wandb`, or set track.wandb to null"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_folder_named_wandb_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """W&B leaves such a folder in the current directory; to Python it is a namespace."""
    (tmp_path / "wandb_left_this").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    spec = importlib.util.find_spec("wandb_left_this")
    assert spec is not None
    missing(monkeypatch, "wandb", spec=spec)
    with pytest.raises(ConfigError, match="pip install wandb"):
        check_trackers(tracked(tmp_path, tensorboard=False, wandb=WANDB))


def attempt(config: TrainConfig, steps: range, scale: float, failed: Failures) -> None:
    """One attempt of a run: logs `scale * step`, a picture at the end."""
    trackers = open_trackers(config, steps.start, failed)
    for step in steps:
        for tracker in trackers:
            tracker.log(step, {"loss": scale * step, "terms/labelled": 2 * scale * step})
    for tracker in trackers:
        tracker.image(steps[-1], "preview", PICTURE_HWC)
        tracker.close()
        tracker.close()


def test_tensorboard_s_curves_go_on_after_a_resume(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config, failed = tracked(tmp_path, tensorboard=True), Failures()
    attempt(config, range(1, 9), 1.0, failed)
    attempt(config, range(5, 8), 10.0, failed)  # the newest checkpoint was of step 4
    assert failed.told == []
    assert len(list((tmp_path / "run" / "tensorboard").iterdir())) == 2
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["loss", "terms/labelled"]
    for name, scale in (("loss", 1.0), ("terms/labelled", 2.0)):
        found = [(event.step, event.value) for event in events.Scalars(name)]
        assert found == [(step, scale * step * (10 if step > 4 else 1)) for step in range(1, 8)]
    (picture,) = events.Images("preview")  # that of step 8 is void
    assert picture.step == 7
    assert (np.asarray(Image.open(io.BytesIO(picture.encoded_image_string))) == PICTURE_HWC).all()


@pytest.fixture
def wandb_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """W&B with folders of its own, away from the user's, and no reports of its errors."""
    for name in ("CONFIG", "CACHE", "DATA"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / "home" / name.lower()))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")


def wandb_records(path: Path) -> Iterator[Any]:
    """The records of a .wandb file: after 7 bytes, a log in blocks of 32 KiB, each record in one to many pieces."""
    from wandb.proto import wandb_internal_pb2

    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


def wandb_history(path: Path) -> dict[int, dict[str, Any]]:
    """step -> what was logged there, W&B's own columns left out."""
    rows: dict[int, dict[str, Any]] = {}
    for record in wandb_records(path):
        if record.WhichOneof("record_type") == "history":
            items = {".".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
            rows[items["_step"]] = {name: value for name, value in items.items() if name[0] != "_"}
    return rows


@pytest.mark.usefixtures("wandb_alone")
def test_wandb_offline_is_one_run_for_all_attempts(tmp_path: Path) -> None:
    config, failed = tracked(tmp_path, tensorboard=False, wandb=WANDB), Failures()
    folder = tmp_path / "run"
    folder.mkdir()
    attempt(config, range(1, 5), 1.0, failed)
    identity = json.loads((folder / "wandb.json").read_text())
    assert identity == {"id": identity["id"], "project": "depth", "entity": None}
    (folder / "metrics.jsonl").write_text("".join(json.dumps({"step": step}) + "\n" for step in range(1, 5)))
    time.sleep(1.1)  # W&B names its folders by the second
    attempt(config, range(3, 7), 10.0, failed)  # the newest checkpoint was of step 2
    assert failed.told == []
    assert left_children() == []
    assert json.loads((folder / "wandb.json").read_text()) == identity
    first, second = sorted((folder / "wandb").glob(f"offline-run-*/run-{identity['id']}.wandb"))
    before, after = wandb_history(first), wandb_history(second)
    assert {step: row["loss"] for step, row in before.items()} == {1: 1.0, 2: 2.0, 3: 3.0, 4: 4.0}
    assert {step: row["loss"] for step, row in after.items()} == {5: 50.0, 6: 60.0}  # 3 and 4 stand already
    assert after[6]["terms/labelled"] == 120.0
    (picture,) = second.parent.glob("files/media/images/preview_6_*.png")
    assert (np.asarray(Image.open(picture)) == PICTURE_HWC).all()
    (run,) = [r.run for r in wandb_records(second) if r.WhichOneof("record_type") == "run"]
    assert (run.run_id, run.project, run.display_name) == (identity["id"], "depth", "run")
    assert "optim" in [item.key for item in run.config.update]


@pytest.mark.usefixtures("wandb_alone")
def test_another_project_is_another_wandb_run(tmp_path: Path) -> None:
    from trainer.trackers import wandb_id

    config = tracked(tmp_path, wandb=WANDB)
    first, known = wandb_id(config)
    assert not known
    assert wandb_id(config) == (first, True)
    other, known = wandb_id(tracked(tmp_path, wandb=WANDB | {"entity": "us"}))
    assert not known and other != first
    (tmp_path / "run" / "wandb.json").write_text('{"id": "torn')
    assert wandb_id(config)[1] is False


def test_the_last_logged_step(tmp_path: Path) -> None:
    assert last_logged_step(str(tmp_path)) == 0
    (tmp_path / "metrics.jsonl").write_text('{"step": 7}\n{"step": 3, "event": "validation"}\n{"x": 1}\n{"step": 9, "l')
    assert last_logged_step(str(tmp_path)) == 7


class Fake:
    """A tracker that remembers, raises or waits."""

    def __init__(self, gate: threading.Event | None = None, error: Exception | None = None) -> None:
        self.gate, self.error, self.entered = gate, error, threading.Event()
        self.calls: list[tuple[Any, ...]] = []

    def _call(self, *what: Any) -> None:
        self.entered.set()
        if self.gate is not None:
            self.gate.wait(20)
        self.calls.append(what)
        if self.error is not None:
            raise self.error

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        self._call("log", step, scalars)

    def image(self, step: int, name: str, picture_HWC: Any) -> None:
        self._call("image", step, name)

    def close(self) -> None:
        self.calls.append(("close",))


def test_calls_arrive_in_order_and_a_failing_one_stops_nothing() -> None:
    fake, failed = Fake(error=OSError("No space left\non device")), Failures()
    values = {"loss": 1.0}
    tracker = Background("fake", lambda: fake, failed)
    tracker.log(1, values)
    values["loss"] = 2.0  # the caller's own from now on
    tracker.image(2, "preview", PICTURE_HWC)
    tracker.close()
    tracker.log(3, values)  # nothing happens any more
    assert fake.calls == [("log", 1, {"loss": 1.0}), ("image", 2, "preview"), ("close",)]
    assert failed.told == [("fake", "OSError: No space left on device")] * 2


def test_one_that_cannot_be_started_loses_its_calls_only(tmp_path: Path) -> None:
    """The real one, where a file stands in the place of its folder."""
    (tmp_path / "tensorboard").write_text("in the way")
    failed = Failures()
    tracker = Background("tensorboard", lambda: TensorBoardTracker(str(tmp_path / "tensorboard"), 1), failed)
    tracker.log(1, {"loss": 1.0})
    tracker.close()
    assert [name for name, _ in failed.told] == ["tensorboard"] * 2
    assert failed.told[0][1].startswith("could not be started: ") and "\n" not in failed.told[0][1]
    assert failed.told[1][1] == "was not started"


@pytest.mark.parametrize("waiting", [1, 3])  # room for the word that it ends, or none
def test_one_that_hangs_stalls_nothing(waiting: int) -> None:
    gate, failed = threading.Event(), Failures()
    fake = Fake(gate=gate)
    tracker = Background("fake", lambda: fake, failed, capacity=3, patience_s=0.4)
    tracker.log(0, {})
    assert fake.entered.wait(10)
    began = time.monotonic()
    for step in range(waiting + (7 if waiting == 3 else 0)):
        tracker.log(step, {})
    assert time.monotonic() - began < 0.3
    lost = ("fake", "is too slow: 3 calls wait, further ones are left out")
    assert failed.told == ([lost] * 7 if waiting == 3 else [])
    tracker.close()
    assert time.monotonic() - began < 3
    assert failed.told[-1] == ("fake", "did not take the rest within 0.4 s; it is given up")
    told = len(failed.told)
    for step in range(10):  # nothing happens any more
        tracker.log(step, {})
    assert len(failed.told) == told
    gate.set()
    tracker._thread.join(10)
    assert not tracker._thread.is_alive()
    assert len(fake.calls) == 1  # what it hung at; the rest is lost


def test_none_is_opened_that_was_not_asked_for(tmp_path: Path) -> None:
    failed = Failures()
    assert open_trackers(tracked(tmp_path, tensorboard=False), 1, failed) == []
    trackers: list[Tracker] = open_trackers(tracked(tmp_path), 1, failed)  # TensorBoard is the default
    for tracker in trackers:
        tracker.close()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["tensorboard"]
    assert failed.told == []
