"""In every Python process of the chaos test's machines: makes labelling slow where it matters, and notes what happens.

It is run by a sitecustomize.py, so it imports nothing heavy. It changes modules as they are imported: the work on an
image takes `pace_s` on average, and what is otherwise over within a millisecond, the steps of a commit, takes long
enough for a kill to fall between two of them. The product's files are left alone. Notes are lines of JSON in `events`.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import json
import os
import random
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

_SHARE = 0.5  # of the steps of a commit that are slowed down


class Saboteur(importlib.abc.MetaPathFinder):
    """Finds the modules that it changes as Python would, and changes them once they are loaded."""

    def __init__(self, events: str, pace_s: float, step_s: float) -> None:
        self._events, self._pace_s, self._step_s = events, pace_s, step_s
        self._draw = random.Random(os.urandom(8))
        self._changes: dict[str, Callable[[Any], None]] = {
            "cluster.drafts": self._drafts,
            "cluster.leases": self._leases,
            "cluster.leased_worker": self._worker,
            "dataio.label_commit": self._commit,
            "trainer.label_worker": self._labeller,
        }

    def find_spec(self, name: str, path: Sequence[str] | None, target: Any = None) -> Any:
        change = self._changes.get(name)
        spec = importlib.machinery.PathFinder.find_spec(name, path, target) if change else None
        if spec is None or spec.loader is None or change is None:
            return None
        load = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            load(module)
            change(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec

    def note(self, kind: str, **facts: Any) -> None:
        """One line in one write."""
        facts |= {"kind": kind, "at": round(time.time(), 3), "machine": socket.gethostname(), "pid": os.getpid()}
        handle = os.open(self._events, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            os.write(handle, (json.dumps(facts) + "\n").encode())
        finally:
            os.close(handle)

    def _dawdle(self) -> None:
        if self._draw.random() < _SHARE:
            time.sleep(self._draw.uniform(0, self._step_s))

    def _before(self, owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def later(*args: Any, **options: Any) -> Any:
            self._dawdle()
            return original(*args, **options)

        setattr(owner, name, later)

    def _drafts(self, module: Any) -> None:
        self._before(module, "_link")

    def _commit(self, module: Any) -> None:
        self._before(module.LabelSlot, "_enter")
        original = module.LabelSlot.commit

        def commit(slot: Any, *args: Any, **options: Any) -> Any:
            try:
                made = original(slot, *args, **options)
            except Exception as error:
                self.note("raised", stem=slot.stem, owner=slot.tag, error=f"{type(error).__name__}: {error}")
                raise
            self.note("commit", stem=slot.stem, owner=slot.tag, outcome=made.outcome, differs=made.differs)
            return made

        module.LabelSlot.commit = commit

    def _labeller(self, module: Any) -> None:
        original = module.watched

        def watched(predicted: Iterable[Any], *args: Any) -> Iterator[Any]:
            for each in original(predicted, *args):
                time.sleep(self._draw.uniform(0.5, 1.5) * self._pace_s)
                yield each

        module.watched = watched

    def _leases(self, module: Any) -> None:
        table = module.LeaseTable
        expire, bury, start = table._expire, table.bury, table.__post_init__

        def noted(self_: Any, now: float) -> None:
            before = self_._expired, self_._speculated
            expire(self_, now)
            if self_._expired > before[0]:
                self.note("expired", number=self_._expired - before[0])

        def buried(self_: Any, owner: str, now: float) -> Any:
            items = bury(self_, owner, now)
            self.note("buried", owner=owner, items=items)
            return items

        def started(self_: Any) -> None:
            start(self_)
            self.note("table", done=len(self_._done))

        table._expire, table.bury, table.__post_init__ = noted, buried, started
        give = table._give

        def given(self_: Any, item: str, owner: str, now: float, **options: Any) -> Any:
            lease = give(self_, item, owner, now, **options)
            self.note("lease", stem=item, owner=owner, speculative=lease.speculative)
            return lease

        table._give = given

    def _worker(self, module: Any) -> None:
        build = module.LeasedWorker.build

        def built(worker: Any) -> Any:
            found = build(worker)
            self.note("built", owner=found.owner)
            return found

        module.LeasedWorker.build = built


def install(events: str, pace_s: float, step_s: float) -> None:
    """Begin. `pace_s`: mean sleep between two images; `step_s`: longest sleep before a step of a commit."""
    sys.meta_path.insert(0, Saboteur(events, pace_s, step_s))
