"""A worker of a leased pool: it asks for items, says while it works that it does, and gives up what is not its own.

Two ways to learn that an item is lost: the answer to a beat, and no answer for as long as a lease lasts, as on a
machine that is cut off. Either is only advice: the commit decides.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

from cluster.background import Background
from cluster.failures import portable
from cluster.lease_actor import Worker
from cluster.leases import Later, Lease
from cluster.storage import StorageError, Swept, Unreachable

_CALL_S = 20.0  # of one call to the lease actor
_PATIENCE_S = 120.0  # with an actor that does not answer: Ray may be starting it again


class LeaseLost(Exception):
    """The item is somebody else's by now, or done."""


class Grip:
    """What a processor has of its lease. `token`: for the record. `worker`: who works."""

    def __init__(self, lease: Lease, worker: Worker, ask: Callable[[float], bool], ttl_s: float) -> None:
        self.token, self.item, self.worker = lease.token, lease.item, worker
        self._ask, self._ttl_s = ask, ttl_s
        self._progress = 0.0
        self._until = time.monotonic() + ttl_s
        self._lost = threading.Event()

    def progress(self, share: float) -> None:
        """How far it is, 0 to 1. Raises LeaseLost."""
        self._progress = share
        if self._lost.is_set():
            raise LeaseLost(self.item)

    def still_mine(self) -> bool:
        """Asks. True where nobody answers, for as long as a lease lasts: the commit tells."""
        self.beat()
        return not self._lost.is_set()

    def beat(self) -> None:
        """Say that it is worked on."""
        try:
            mine = self._ask(self._progress)
        except Exception:  # noqa: BLE001  whatever Ray raises of an actor that cannot be reached
            if time.monotonic() > self._until:
                self._lost.set()
            return
        if mine:
            self._until = time.monotonic() + self._ttl_s
        else:
            self._lost.set()


class LeasedProcessor(Protocol):
    """What `make` returns, inside a worker. `process` returns what the driver is to know; LeaseLost passes through."""

    device: str

    def process(self, item: str, grip: Grip) -> Any: ...

    def close(self) -> None: ...


class _Beats(Background):
    def __init__(self, every_s: float) -> None:
        super().__init__("beats", join_s=5)
        self._every_s = every_s
        self.grip: Grip | None = None

    def _run(self) -> None:
        while not self._closed.wait(self._every_s):
            grip = self.grip
            if grip is not None:
                grip.beat()


class LeasedWorker:
    """The actor. `build` makes the processor, in a call of its own so that its exception comes back as one."""

    def __init__(self, make: Callable[[str], LeasedProcessor], owner: str, leases: Any, ttl_s: float) -> None:
        self._make, self._owner, self._leases, self._ttl_s = make, owner, leases, ttl_s
        self._processor: LeasedProcessor | None = None
        self._worker: Worker | None = None

    def build(self) -> Worker:
        """Who this is, once it can work. Raises what `make` raises, made portable."""
        import ray

        try:
            self._processor = self._make(self._owner)
        except BaseException as error:  # noqa: BLE001  it is raised again, made portable
            raise portable(error, "a worker") from None
        self._worker = Worker(
            owner=self._owner,
            node=ray.get_runtime_context().get_node_id(),
            host=socket.gethostname(),
            pid=os.getpid(),
            device=self._processor.device,
        )
        return self._worker

    def work(self) -> None:
        """Process items until there is none for it. Raises what a processor raises beyond the errors of one item."""
        assert self._processor is not None and self._worker is not None
        try:
            with _Beats(self._ttl_s / 4) as beats:
                while (got := self._call("take", self._worker)) is not None:
                    if isinstance(got, Later):
                        time.sleep(got.seconds)
                        continue
                    grip = Grip(got, self._worker, self._beat(got), self._ttl_s)
                    beats.grip = grip
                    try:
                        self._process(got, grip)
                    finally:
                        beats.grip = None
        finally:
            self._processor.close()

    def _process(self, lease: Lease, grip: Grip) -> None:
        assert self._processor is not None
        try:
            result = self._processor.process(lease.item, grip)
        except LeaseLost:
            self._call("drop", lease.item, lease.token)
        except (Unreachable, Swept) as error:  # not at once again, and not for ever
            self._call("drop", lease.item, lease.token, away=str(error))
        except StorageError as error:
            self._call("drop", lease.item, lease.token)
            self._call("fail", portable(error, "a worker"))
        except ValueError as error:
            if getattr(error, "exit_status", None) != 2:
                raise portable(error, "a worker") from None
            self._call("give_up", lease.item, str(error))  # of this item's data, which the next reader finds as it is
        except BaseException as error:  # noqa: BLE001  it is raised again, made portable
            raise portable(error, "a worker") from None
        else:
            self._call("complete", lease.item, lease.token, result)

    def _beat(self, lease: Lease) -> Callable[[float], bool]:
        import ray

        def ask(progress: float) -> bool:
            reference = self._leases.beat.remote(self._owner, lease.token, lease.item, progress)
            return bool(ray.get(reference, timeout=min(_CALL_S, self._ttl_s)))

        return ask

    def _call(self, name: str, *args: Any, **options: Any) -> Any:
        """Ask the lease actor, with patience."""
        import ray

        ends = time.monotonic() + _PATIENCE_S
        while True:
            try:
                return ray.get(getattr(self._leases, name).remote(*args, **options), timeout=_CALL_S)
            except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
                if time.monotonic() > ends:
                    raise
                time.sleep(0.5)
