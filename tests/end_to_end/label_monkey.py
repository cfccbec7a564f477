"""Breaks what it finds of a labelling job: at random, by a seed.

The seed says which faults come in which order; whom they hit, and in the middle of what, is decided by the machine's
speed as well.
"""

from __future__ import annotations

import contextlib
import heapq
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from pathlib import Path

import psutil

from tests.bed import Machine
from tests.end_to_end.label_job import AT_WORK, DRIVER, LEASE_S, LEASES, WITH_RAY, WORKER, Job, heal, restore

_PATIENCE_S = 600.0
_LEAST_S = 1.0  # between two faults


class Monkey:
    """Breaks things until every driver has ended, then puts all in order again.

    `deck`: how often each fault is drawn before any is drawn again, but for those that find nothing to hit. `every`:
    shards done between two of them, at least and at most, and a second passes: a worker takes seconds to start, on a
    busy machine a minute, so faults by the clock alone would hit nothing but starts, or nothing at all. `marks`: at
    which share of the shards something is due that happens so often and no more: "driver" is killed and started again,
    a "second" one starts on another machine.
    """

    def __init__(
        self,
        job: Job,
        seed: int,
        *,
        deck: Mapping[str, int],
        every: tuple[int, int],
        marks: Sequence[tuple[float, str]],
    ) -> None:
        self.job, self.bed, self.seed = job, job.bed, seed
        self.done: Counter[str] = Counter()  # faults that hit
        self.late: dict[tuple[str, int], float] = {}  # machine and pid there of who was stopped beyond his lease -> end
        self._draw = random.Random(seed)
        self._kinds, self._deck, self._every = dict(deck), list[str](), every
        self._marks = sorted(marks)
        self._later: list[tuple[float, int, Callable[[], None]]] = []
        self._turns = count()
        self._stopped: set[psutil.Process] = set()
        self._broken: set[str] = set()  # machines that cannot be used now
        self._repairs: list[threading.Thread] = []
        self._failed: list[BaseException] = []
        self._second: str | None = None
        self._began = time.monotonic()

    def run(self) -> None:
        """Until all drivers have ended. AssertionError when one ended otherwise than well, or it takes too long."""
        heal(self.bed)
        self.job.start("head")
        ends = time.monotonic() + _PATIENCE_S
        next_at, next_done = 0.0, 1
        try:
            while not self._ended():
                assert time.monotonic() < ends, f"not ended after {_PATIENCE_S:.0f} s: {self.job.done()} done"
                assert not self._failed, self._failed
                self._due(time.monotonic())
                done = self.job.done()
                if done >= next_done and time.monotonic() >= next_at:
                    self._act()
                    next_at, next_done = time.monotonic() + _LEAST_S, done + self._draw.randint(*self._every)
                time.sleep(0.05)
            self.say(f"all drivers have ended: {dict(self.done)}")
        finally:
            self._put_in_order()

    def say(self, text: str) -> None:
        """To the test's output, with the time since the beginning and the shards done."""
        print(f"{time.monotonic() - self._began:7.1f} s {self.job.done():4d} done  {text}", flush=True)

    def _ended(self) -> bool:
        states = {name: driver.poll() for name, driver in self.job.drivers.items()}
        for name, state in states.items():
            assert state in (None, 0), f"the driver on {name} ended with {state}"
        return all(state == 0 for state in states.values()) and not any(kind == "second" for _, kind in self._marks)

    def _due(self, now: float) -> None:
        while self._later and self._later[0][0] <= now:
            heapq.heappop(self._later)[2]()
        share = self.job.done() / self.job.shards
        if self._marks and share >= self._marks[0][0]:
            kind = self._marks[0][1]
            if (self._kill_driver if kind == "driver" else self._start_second)():
                self._marks.pop(0)

    def _act(self) -> None:
        if not self._play():
            anew = [kind for kind, number in self._kinds.items() for _ in range(number)]
            self._draw.shuffle(anew)
            self._deck = anew + self._deck
            self._play()

    def _play(self) -> bool:
        """The first fault of the deck that finds something to hit; those before it keep their turn."""
        for place in reversed(range(len(self._deck))):
            kind = self._deck[place]
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):  # it has just ended
                if getattr(self, f"_{kind}")():
                    self.done[kind] += 1
                    del self._deck[place]
                    return True
        return False

    def _in(self, seconds: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._later, (time.monotonic() + seconds, next(self._turns), action))

    def _machines(self) -> list[Machine]:
        return [self.bed.machines[name] for name in WITH_RAY if name not in self._broken]

    def _one(self, word: str) -> tuple[Machine, psutil.Process] | None:
        """One of the processes called so, that is not stopped."""
        found = [(machine, process) for machine in self._machines() for process in machine.processes(word)]
        found = [pair for pair in found if pair[1] not in self._stopped]
        return self._draw.choice(found) if found else None

    def _kill_worker(self) -> bool:
        found = self._one(AT_WORK if self._draw.random() < 0.8 else WORKER)
        if found is None:
            return False
        what = title(found[1])
        found[1].kill()
        self.say(f"kill -9 {what} {found[1].pid} on {found[0].name}")
        return True

    def _kill_leases(self) -> bool:
        found = self._one(LEASES)
        if found is None:
            return False
        assert found[0].name in self.job.drivers, f"a lease actor on {found[0].name}, and no driver there"
        found[1].kill()
        self.say(f"kill -9 the lease actor {found[1].pid} on {found[0].name}")
        return True

    def _stop_worker(self) -> bool:
        found = self._one(AT_WORK)
        if found is not None:
            self._stop(*found, self._draw.uniform(1.3, 2.8) * LEASE_S, "worker")
        return found is not None

    def _stop_leases(self) -> bool:
        found = self._one(LEASES)
        if found is not None:
            self._stop(*found, self._draw.uniform(1.1, 1.8) * LEASE_S, "lease actor")
        return found is not None

    def _stop_driver(self) -> bool:
        found = self._one(DRIVER)
        if found is not None:
            self._stop(*found, self._draw.uniform(1.1, 1.8) * LEASE_S, "driver")
        return found is not None

    def _stop(self, machine: Machine, process: psutil.Process, seconds: float, what: str) -> None:
        """As on a machine that swaps, or is moved: it goes on later, and knows nothing of it."""
        process.send_signal(signal.SIGSTOP)
        self._stopped.add(process)
        inside = pid_inside(process)
        self.say(f"stop the {what} {process.pid} on {machine.name} for {seconds:.1f} s")

        def go_on() -> None:
            self._stopped.discard(process)
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGCONT)
                if what == "driver":  # `nsenter` stops with it
                    self.job.drivers[machine.name].send_signal(signal.SIGCONT)
                self.late[machine.name, inside] = time.time()
                self.say(f"the {what} {process.pid} on {machine.name} goes on")

        self._in(seconds, go_on)

    def _free(self) -> list[str]:
        """Machines beside the head that hold no driver, and can be broken: one at a time."""
        if self._broken:
            return []
        return [name for name in WITH_RAY[1:] if name != self._second]

    def _kill_raylet(self) -> bool:
        names = self._free()
        if not names:
            return False
        name = self._draw.choice(names)
        raylets = [each for each in self.bed.machines[name].processes("raylet/raylet") if each.name() == "raylet"]
        if not raylets:
            return False
        workers = len(self.bed.machines[name].processes(WORKER))
        self._broken.add(name)
        raylets[0].kill()
        anew = self._draw.random() < 0.3
        self.say(f"kill -9 the raylet on {name}, with {workers} workers")
        self._in(self._draw.uniform(3, 8), lambda: self._repair(name, anew))
        return True

    def _cut(self) -> bool:
        names = [name for name in WITH_RAY[1:] if name not in self.job.drivers or name in self.job.at_work()]
        if not names or self._broken:
            return False
        name = self._draw.choice(names)
        seconds = self._draw.uniform(6, 9) if name == self._second else self._draw.uniform(7, 20)
        self._broken.add(name)
        self.bed.cut(name)
        self.say(f"cut the network of {name} for {seconds:.1f} s")

        def mend() -> None:
            self.bed.mend(name)
            self._broken.discard(name)
            self.say(f"mend the network of {name}")

        self._in(seconds, mend)
        return True

    def _kill_driver(self) -> bool:
        found = self._one(DRIVER)
        if found is None:
            return False
        name = found[0].name
        found[1].kill()
        self.job.drivers[name].communicate()
        self.done["kill_driver"] += 1
        self.say(f"kill -9 the driver on {name}; it is started again")
        self.job.start(name)
        return True

    def _start_second(self) -> bool:
        names = self._free()
        if not names:
            return False
        self._second = self._draw.choice(names)
        self.job.start(self._second)
        self.done["second_driver"] += 1
        self.say(f"a second driver on {self._second}")
        return True

    def _repair(self, name: str, anew: bool) -> None:
        """Ray again on a machine, in a thread, for it takes some seconds: on the same one, or on a new one."""
        self.say(f"{'a new machine' if anew else 'Ray again'} for {name}")

        def work() -> None:
            try:
                restore(self.bed, name, anew)
                self._broken.discard(name)
                self.say(f"{name} is back")
            except BaseException as error:  # noqa: BLE001  the main thread tells
                self._failed.append(error)

        thread = threading.Thread(target=work)
        self._repairs.append(thread)
        thread.start()

    def _put_in_order(self) -> None:
        """All go on, all is mended: also what was to happen later."""
        while self._later:
            heapq.heappop(self._later)[2]()
        for thread in self._repairs:
            thread.join()


def title(process: psutil.Process) -> str:
    return " ".join(process.cmdline())[:40]


def pid_inside(process: psutil.Process) -> int:
    """The number that the process has on its machine."""
    for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
        if line.startswith("NSpid:"):
            return int(line.split()[-1])
    raise AssertionError("no NSpid")
