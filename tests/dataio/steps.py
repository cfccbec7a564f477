"""A writer's system calls, one at a time: to kill it after any of them, or to let two writers take turns.

What is called on the way to the disk is wrapped in `os`, for paths below one folder. `fsync` is noted and left out:
a killed process loses nothing that it has written, and what must survive a power cut is a matter of order, which the
noted names show.
"""

from __future__ import annotations

import builtins
import io
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

_CHANGING = ("mkdir", "link", "replace", "rename", "unlink")
_LOOKING = ("stat", "listdir", "scandir")


@contextmanager
def watched(root: str, after: Callable[[str], None], *, looks: bool = False) -> Iterator[None]:
    """In the block `after(name)` is called right after each step below `root`: "link shards/000000.tar".

    A temporary name is shown without its tag. `looks` counts what only looks as a step, too.
    """

    def shown(path: str) -> str:
        return re.sub(r"\.[0-9a-f]{8}\.tmp$", ".tmp", os.path.relpath(path, root))

    def below(path: object) -> bool:
        return isinstance(path, str) and (path == root or path.startswith(root + "/"))

    def wrapped(name: str) -> Callable[..., Any]:
        original = getattr(os, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                return original(*args, **kwargs)
            finally:  # a refusal is an answer, too
                target = args[1] if name in ("link", "replace", "rename") else args[0]
                if below(target):
                    after(f"{name} {shown(target)}")

        return call

    real_open, real_builtin = os.open, builtins.open

    def opened(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        handle = real_open(path, flags, *args, **kwargs)
        if below(path) and flags & os.O_CREAT:
            after(f"open {shown(path)}")
        elif below(path) and looks:
            after(f"look {shown(path)}")
        return handle

    def opened_to_read(path: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return real_builtin(path, *args, **kwargs)
        finally:
            if below(path) and looks:
                after(f"look {shown(path)}")

    def synced(handle: int) -> None:
        path = os.readlink(f"/proc/self/fd/{handle}").removesuffix(" (deleted)")
        if below(path):
            after(f"fsync {shown(path)}")

    names = _CHANGING + (_LOOKING if looks else ())
    patches = {name: wrapped(name) for name in names} | {"open": opened, "fsync": synced}
    with (
        mock.patch.multiple(os, **patches),
        mock.patch.object(builtins, "open", opened_to_read),
        mock.patch.object(io, "BufferedWriter", partial(_Writing, below, lambda path: after(f"write {shown(path)}"))),
    ):
        yield


class _Writing(io.BufferedWriter):
    """Every write reaches the system at once."""

    def __init__(self, watches: Callable[[object], bool], after: Callable[[str], None], raw: io.RawIOBase) -> None:
        super().__init__(raw)
        self._watches, self._after = watches, after

    def write(self, data: Any, /) -> int:
        size = super().write(data)
        self.flush()
        path = os.readlink(f"/proc/self/fd/{self.fileno()}")
        if self._watches(path):
            self._after(path)
        return size


def steps_of(root: str, action: Callable[[], object]) -> list[str]:
    """The names of the steps that an action takes, in order."""
    names: list[str] = []
    with watched(root, names.append):
        action()
    return names


def killed_after(root: str, action: Callable[[], object], step: int) -> bool:
    """Do the action in a process of its own, which SIGKILL ends right after its step number `step` (from 1).

    False when it ended before. Forked: the action must not need threads.
    """
    child = os.fork()
    if child == 0:
        status, left = 3, step

        def count(name: str) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        try:
            with watched(root, count):
                action()
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the child failed"
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


class Turns:
    """Several actions, each in a thread of its own, of which one at a time goes on, by one step."""

    def __init__(self, *actions: Callable[[], Any]) -> None:
        self.results: list[Any] = [None] * len(actions)
        self.errors: list[BaseException] = []
        self._go = [threading.Semaphore(0) for _ in actions]
        self._back = threading.Semaphore(0)
        self._over = [False] * len(actions)
        self._numbers: dict[int, int] = {}
        self._threads = [
            threading.Thread(target=self._run, args=(number, action)) for number, action in enumerate(actions)
        ]
        for thread in self._threads:
            thread.start()

    def step(self, name: str = "") -> None:
        """To be called by the actions, as `watched` does."""
        number = self._numbers.get(threading.get_ident())
        if number is not None:
            self._back.release()
            self._go[number].acquire()

    def is_over(self, number: int) -> bool:
        """Whether that action has ended."""
        return self._over[number]

    def advance(self, number: int) -> bool:
        """Let an action take one step; False when it has ended."""
        if not self._over[number]:
            self._go[number].release()
            self._back.acquire()
        return not self._over[number]

    def finish(self, number: int) -> None:
        """Let an action go on to its end."""
        while self.advance(number):
            pass

    def close(self) -> None:
        """End all of them. Raises what one of them raised."""
        for number, thread in enumerate(self._threads):
            self.finish(number)
            thread.join()
        for error in self.errors:
            raise error

    def _run(self, number: int, action: Callable[[], Any]) -> None:
        self._numbers[threading.get_ident()] = number
        self._go[number].acquire()
        try:
            self.results[number] = action()
        except BaseException as error:  # noqa: BLE001  it is raised again by `close`
            self.errors.append(error)
        self._over[number] = True
        self._back.release()
