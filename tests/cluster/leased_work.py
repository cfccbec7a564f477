"""Processors of the leased pool's tests: a module, so that they travel by name. What is done is a file per item."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from cluster.leased_worker import Grip
from cluster.storage import StorageError, Swept, Unreachable
from tests.cluster.work import UserError


class Processor:
    """Does what an item's name says, once; leaves NAME in `folder/done`, and a line in `folder/began` per beginning."""

    device = "test"

    def __init__(self, folder: str, owner: str) -> None:
        self.folder, self.owner = Path(folder), owner
        (self.folder / "done").mkdir(exist_ok=True)

    def process(self, item: str, grip: Grip) -> dict[str, Any]:
        with (self.folder / "began").open("a") as file:
            file.write(f"{item} {self.owner} {os.getpid()}\n")
        name = item.split("-")[0]
        again = (self.folder / f"again-{item}").exists()
        (self.folder / f"again-{item}").touch()
        if name == "die" or (name == "dieonce" and not again):
            os.kill(os.getpid(), signal.SIGKILL)
        if name == "wrong":
            raise UserError(f"{item}: found 1, allowed 2")
        if name == "full":
            raise StorageError(f"{item}: cannot write: the disk is full")
        if name == "away" and not again:
            raise Unreachable(f"{item}: no answer")
        if name == "swept" and not again:
            raise Swept(f"{item}: its unfinished file is gone")
        if name == "broken":
            raise RuntimeError("of no item in particular")
        if name == "stuck" and not again:
            os.kill(os.getpid(), signal.SIGSTOP)
        if name == "pair":
            self._await_two()
        for step in range(int(name[4:]) if name.startswith("slow") else 1):
            grip.progress(step / 100)
            time.sleep(0.02)
        (self.folder / "done" / item).write_text(self.owner)
        return {"item": item, "token": grip.token}

    def _await_two(self) -> None:
        """Until two are at work, however long the second takes to start."""
        ends = time.monotonic() + 60
        while len({line.split()[1] for line in (self.folder / "began").read_text().splitlines()}) < 2:
            if time.monotonic() > ends:
                raise RuntimeError("nobody else came")
            time.sleep(0.05)

    def close(self) -> None:
        (self.folder / f"closed-{self.owner}").touch()


def listed(folder: str) -> Collection[str]:
    done = Path(folder) / "done"
    return os.listdir(done) if done.exists() else []


def listed_once(folder: str) -> Collection[str]:
    """Raises when it is asked again."""
    asked = Path(folder) / "asked"
    if asked.exists():
        raise ValueError("labels.json is gone")
    asked.touch()
    return listed(folder)


def no_processor(owner: str) -> Processor:
    raise UserError("weights: no such file")


def stillborn(owner: str) -> Processor:
    os._exit(1)


def stillborn_at_first(folder: str, number: int, owner: str) -> Processor:
    """The first `number` die while they start, as those do whose machine is lost."""
    with (Path(folder) / "born").open("a") as file:
        file.write(".")
        if file.tell() <= number:
            file.flush()
            os._exit(1)
    return Processor(folder, owner)


Make = Callable[[str], Processor]
