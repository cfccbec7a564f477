"""Where else a run's numbers go, beside metrics.jsonl and Prometheus: TensorBoard, Weights & Biases.

A tracker is a convenience, so it must never end or stall a run: each works in a thread of its own behind a bounded
queue (`Background`). What fails or does not fit is counted and told once, and the run goes on.

Shape suffixes: H W pixels, C colour channel (RGB).
"""

from __future__ import annotations

import importlib.util
import json
import os
import queue
import secrets
import threading
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from cluster import storage
from trainer.config import ConfigError
from trainer.config_train import TrainConfig
from trainer.folder import RunFolder
from trainer.journal import read_json_lines

Picture = npt.NDArray[np.uint8]
Failed = Callable[[str, str], None]  # (tracker, problem in one line), from any thread

_CAPACITY = 64  # calls that wait while a tracker is slow: at ten steps a line, hundreds of steps
_PATIENCE_S = 60.0  # what the end of a run waits for a tracker to send the rest
_FLUSH_EVERY_S = 20


class Tracker(Protocol):
    """Takes what rank 0 logs. `step` counts optimizer steps; values are finite."""

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Values at a step; a step may come in several parts."""

    def image(self, step: int, name: str, picture_HWC: Picture) -> None:
        """A picture at a step."""

    def close(self) -> None:
        """Send the rest. Nothing is called afterwards."""


def check_trackers(config: TrainConfig) -> None:
    """Raises ConfigError, for the driver before any worker starts, when a tracker is asked for but not installed."""
    track, problems = config.track, []
    if track.tensorboard and not _installed("tensorboard"):
        problems.append(
            "track.tensorboard: is true, but tensorboard is not installed; `pip install tensorboard`, or set "
            "track.tensorboard to false"
        )
    if track.wandb and not _installed("wandb"):
        problems.append(
            f"track.wandb: asks for project {track.wandb.project!r}, but wandb is not installed; `pip install wandb`, "
            "or set track.wandb to null"
        )
    if problems:
        raise ConfigError("; ".join(problems))


def _installed(package: str) -> bool:
    """A folder of that name in the current directory (wandb leaves one) is no package."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


def open_trackers(config: TrainConfig, next_step: int, failed: Failed) -> list[Tracker]:
    """The trackers of `config.track`, each in its thread. To be called before this attempt logs anything.

    Args:
        next_step: the step from which this attempt logs: what an earlier attempt logged from there on is void.
        failed: told of every call that is lost.
    """
    trackers: list[Tracker] = []
    if config.track.tensorboard:
        folder = os.path.join(config.folder, "tensorboard")
        trackers.append(Background("tensorboard", lambda: TensorBoardTracker(folder, next_step), failed))
    if config.track.wandb:
        logged = last_logged_step(config.folder)
        trackers.append(Background("wandb", lambda: WandbTracker(config, logged), failed))
    return trackers


def last_logged_step(folder: str) -> int:
    """The largest step of a run's metrics.jsonl, 0 without any."""
    steps = (line.get("step") for line in read_json_lines(RunFolder(folder).metrics))
    return max((step for step in steps if isinstance(step, int)), default=0)


class Background:
    """A tracker in a thread of its own. No method raises, none but `close` waits.

    `make` is called in the thread: importing a package and reaching a server take seconds. Where it fails, every call
    is lost. `failed` is told of every call that is lost.
    """

    def __init__(
        self,
        name: str,
        make: Callable[[], Tracker],
        failed: Failed,
        capacity: int = _CAPACITY,
        patience_s: float = _PATIENCE_S,
    ) -> None:
        self.name, self._make, self._failed, self._patience_s = name, make, failed, patience_s
        self._calls: queue.Queue[Callable[[Tracker], None] | None] = queue.Queue(capacity)
        self._closed = self._given_up = False
        self._thread = threading.Thread(target=self._run, name=f"fathom-track-{name}", daemon=True)
        self._thread.start()

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        values = dict(scalars)
        self._post(lambda tracker: tracker.log(step, values))

    def image(self, step: int, name: str, picture_HWC: Picture) -> None:
        self._post(lambda tracker: tracker.image(step, name, picture_HWC))

    def close(self) -> None:
        """Let it send the rest, for at most `patience_s` in all. Again is nothing."""
        if self._closed:
            return
        self._closed = True
        try:
            self._calls.put(None, timeout=self._patience_s / 2)
            self._thread.join(self._patience_s / 2)
        except queue.Full:
            pass
        if self._thread.is_alive():
            self._given_up = True
            self._failed(self.name, f"did not take the rest within {self._patience_s:g} s; it is given up")

    def _post(self, call: Callable[[Tracker], None]) -> None:
        if self._closed:
            return
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            self._failed(self.name, f"is too slow: {self._calls.maxsize} calls wait, further ones are left out")

    def _run(self) -> None:
        tracker: Tracker | None = None
        try:
            tracker = self._make()
        except Exception as error:  # noqa: BLE001  whatever a tracker raises, the run goes on
            self._failed(self.name, f"could not be started: {_one_line(error)}")
        while (call := self._calls.get()) is not None:
            self._do(tracker, call)
            if self._given_up:
                return
        if tracker is not None:
            self._do(tracker, lambda opened: opened.close())

    def _do(self, tracker: Tracker | None, call: Callable[[Tracker], None]) -> None:
        if tracker is None:
            self._failed(self.name, "was not started")
            return
        try:
            call(tracker)
        except Exception as error:  # noqa: BLE001  as above
            self._failed(self.name, _one_line(error))


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


class TensorBoardTracker:
    """Event files in runs/NAME/tensorboard, by PyTorch's SummaryWriter.

    Every attempt writes a file of its own that begins with the mark "void from `purge_step` on", which readers apply
    to the files before it: after a resume from step k, k + 1 and later steps of the attempt that died disappear.
    """

    def __init__(self, folder: str, purge_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # with TensorBoard behind it, a second or more

        self._writer = SummaryWriter(folder, purge_step=purge_step, flush_secs=_FLUSH_EVERY_S)

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def image(self, step: int, name: str, picture_HWC: Picture) -> None:
        self._writer.add_image(name, picture_HWC, step, dataformats="HWC")
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandbTracker:
    """One Weights & Biases run for all attempts of a run; its id is kept in runs/NAME/wandb.json.

    W&B cannot take back a step, so what an earlier attempt logged stays and the same steps are not logged again. Online
    the service knows how far it got; offline nobody does, and `logged`, the last step of metrics.jsonl, has to tell.
    """

    def __init__(self, config: TrainConfig, logged: int) -> None:
        import wandb

        wanted = config.track.wandb
        if wanted is None:
            raise ValueError("track.wandb is null")
        run_id, known = wandb_id(config)
        self._wandb = wandb
        self._run = wandb.init(
            project=wanted.project,
            entity=wanted.entity,
            mode=wanted.mode,
            id=run_id,
            resume="allow",
            name=config.name,
            dir=config.folder,
            config=config.model_dump(mode="json"),
            # No program, repository or terminal of the user's is sent anywhere.
            settings=wandb.Settings(
                console="off", silent=True, disable_git=True, disable_code=True, disable_job_creation=True
            ),
        )
        self._after = logged if known and wanted.mode == "offline" else 0

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        if step > self._after:
            self._run.log(dict(scalars), step=step)

    def image(self, step: int, name: str, picture_HWC: Picture) -> None:
        if step > self._after:
            self._run.log({name: self._wandb.Image(picture_HWC)}, step=step)

    def close(self) -> None:
        """Send the rest and end W&B's own process."""
        self._run.finish()
        self._wandb.teardown()


def wandb_id(config: TrainConfig) -> tuple[str, bool]:
    """The id of a run's W&B run, and whether an earlier attempt used it. Ids do not carry over to another project."""
    path = os.path.join(config.folder, "wandb.json")
    wanted = config.track.wandb
    assert wanted is not None
    place: dict[str, Any] = {"project": wanted.project, "entity": wanted.entity}
    known = read_json_lines(path)
    if known and known[0].get("id") and {key: known[0].get(key) for key in place} == place:
        return str(known[0]["id"]), True
    run_id = secrets.token_hex(4)
    storage.atomic_write(path, json.dumps({"id": run_id, **place}) + "\n")
    return run_id, False
