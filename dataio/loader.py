"""The loader: plan, reader, DALI and CutMix in a background thread, handing out `Batch`es for ever.

Its whole state is the `cursor` of the last batch used, one counter per role; prefetched batches are no part of it.
"""

from __future__ import annotations

import atexit
import contextlib
import queue
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

import torch

from dataio.assemble import BatchBuilder, Prepared
from dataio.cache import Opener, ShardCache
from dataio.dali_batch import AHEAD, VIEWS
from dataio.plan import PLAN_VERSION, skipped_batches
from dataio.quarantine import Quarantine
from dataio.spec import DataError, DataSpec, RoleNeeds
from dataio.stream import RoleStream
from dataio.types import Batch

_PATCH = 14  # pixels of a ViT patch: the networks take no other multiples
_POLL_S = 0.1
_number_of_threads = threading.Lock()


class Loader:
    """Iterates over one rank's share of every global batch, without end; shapes never change.

    `needs` is what the task asks of each role of `data`; `views` are "student" and/or "clean". `cursor` continues after
    that many samples per role (absent: from the start), exactly, on any number of ranks up to the lanes. `device` is
    where the batches go; "cuda" decodes on the GPU. The thread starts with the first batch; `close` it, or use the
    loader as a context manager. What fails in the thread is raised by `next`, after the batches made before.

    Raises DataError, naming the field or file, for data and settings that cannot work.
    """

    def __init__(
        self,
        data: DataSpec,
        needs: Mapping[str, RoleNeeds],
        *,
        views: tuple[str, ...],
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
        cursor: Mapping[str, int] | None = None,
        quarantine: Quarantine | None = None,
    ) -> None:
        _check(data, needs, views)
        self._opener = Opener(ShardCache(data.cache, data.cache_bytes) if data.cache is not None else None)
        # sorted: the order of rows must not change with the order of a YAML file
        self._streams = [
            RoleStream(role, data, needs[role], seed=seed, rank=rank, world_size=world_size, opener=self._opener)
            for role in sorted(needs)
        ]
        self._seed, self._device = seed, torch.device(device)
        self._spent = dict.fromkeys(("read", "decode", "copy", "idle"), 0.0)
        self._skip = skipped_batches(data)
        self._cursor = _start(self._streams, cursor or {})
        self.quarantine = quarantine or Quarantine(None, data.max_bad_fraction)
        self._builder = BatchBuilder(
            self._streams, data, views=views, seed=seed, device=self._device, quarantine=self.quarantine
        )
        self._ready: queue.Queue[Batch | BaseException] = queue.Queue(data.prefetch)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def describe(self) -> dict[str, Any]:
        """What a checkpoint states beside the cursor: the order and content of samples depend on nothing else."""
        roles = {stream.role: dict(stream.describe()) for stream in self._streams}
        return {"plan_version": PLAN_VERSION, "seed": self._seed, "roles": roles}

    def number(self, cursor: Mapping[str, int]) -> int:
        """How many global batches of the order lie before a cursor, those passed over included."""
        return max(stream.plan.number(cursor.get(stream.role, 0)) for stream in self._streams)

    def seek(self, cursor: Mapping[str, int]) -> None:
        """Continue after so many samples per role. Before the first batch only; DataError for no state of this plan."""
        if self._thread is not None:
            raise RuntimeError("the loader has started")
        self._cursor = _start(self._streams, cursor)

    def samples(self, role: str) -> int:
        """How many samples one pass over the role has, on all ranks together."""
        return next(stream.plan.samples for stream in self._streams if stream.role == role)

    def read_counts(self) -> dict[str, int]:
        """What was read so far, prefetched batches included: bytes, cache_hits, cache_misses."""
        return self._opener.counts()

    def stage_seconds(self) -> dict[str, float]:
        """What the thread that makes batches has spent its time on so far: read, decode, copy (waiting for the device,
        perturbing there included) and idle (batches are ready)."""
        return dict(self._spent)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._stop.is_set():
            raise RuntimeError("the loader is closed")
        if self._failure is not None:
            raise self._failure
        if self._thread is None:
            self._thread = threading.Thread(target=self._produce, name="fathom-loader", daemon=True)
            self._thread.start()
            # a thread that the interpreter's end meets inside DALI takes the process down
            atexit.register(self.close)
        item = self._take()
        if isinstance(item, BaseException):
            self._failure = item
            raise item
        return _received(item, self._device)

    def close(self) -> None:
        """Stop and join the thread, dropping what it prepared. May be called again."""
        self._stop.set()
        atexit.unregister(self.close)
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
            self._thread = None
        self._builder.close()
        while not self._ready.empty():
            self._ready.get_nowait()

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _produce(self) -> None:
        _one_torch_thread()
        try:
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)
                with torch.cuda.stream(torch.cuda.Stream(self._device)):
                    self._produce_batches()
            else:
                self._produce_batches()
        except BaseException as error:  # noqa: BLE001  it is raised again by the consumer
            self._put(error)

    def _produce_batches(self) -> None:
        """While DALI decodes two batches, this thread reads the next and composes the one before."""
        cursor: Mapping[str, int] = self._cursor
        started: deque[Prepared] = deque()
        failure: Exception | None = None
        while not self._stop.is_set():
            try:
                while failure is None and len(started) < AHEAD:
                    with self._timed("read"):
                        prepared = self._builder.read(behind_skipped(self._streams, self._skip, cursor))
                    with self._timed("decode"):
                        self._builder.start(prepared)
                    started.append(prepared)
                    cursor = prepared.cursor
            except Exception as error:  # noqa: BLE001  the batches before it come first
                failure = error
            if not started:
                assert failure is not None
                raise failure
            with self._timed("decode"):
                batch = self._builder.finish(started.popleft())
            if self._device.type == "cuda":
                # on this thread's own stream: the consumer then needs no event, and DALI may take its buffers back
                with self._timed("copy"):
                    torch.cuda.current_stream(self._device).synchronize()
            with self._timed("idle"):
                self._put(batch)

    @contextlib.contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self._spent[stage] += time.perf_counter() - began

    def _take(self) -> Batch | BaseException:
        while not self._stop.is_set():
            try:
                return self._ready.get(timeout=_POLL_S)
            except queue.Empty:
                continue
        raise RuntimeError("the loader is closed")

    def _put(self, item: Batch | BaseException) -> None:
        while not self._stop.is_set():
            try:
                self._ready.put(item, timeout=_POLL_S)
                return
            except queue.Full:
                continue


def _one_torch_thread() -> None:
    """From now on PyTorch works in the calling thread alone; other threads keep their number.

    Its OpenMP threads wait for work by spinning: beside a busy network that costs far more than they save here.
    """
    with _number_of_threads:
        count = torch.get_num_threads()
        torch.set_num_threads(1)
        # that also became the number of all threads to come, which another one takes back
        other = threading.Thread(target=torch.set_num_threads, args=(count,))
        other.start()
        other.join()


def _check(data: DataSpec, needs: Mapping[str, RoleNeeds], views: tuple[str, ...]) -> None:
    if not views or set(views) - set(VIEWS):
        raise ValueError(f"views is {views}: choose from {VIEWS}")
    if not needs:
        raise ValueError("the task needs no role")
    absent, unused = sorted(set(needs) - set(data.roles)), sorted(set(data.roles) - set(needs))
    if absent:
        raise DataError(f"data.roles has no {absent[0]!r}, which the task needs: add it")
    if unused:
        raise DataError(f"data.roles.{unused[0]}: the task needs no such role: remove it (needed: {sorted(needs)})")
    if data.input_size < _PATCH or data.input_size % _PATCH:
        near = max(_PATCH, round(data.input_size / _PATCH) * _PATCH)
        raise DataError(f"data.input_size is {data.input_size}: it must be a multiple of {_PATCH}, for example {near}")
    for name in ("threads", "prefetch", "shuffle_window"):
        if getattr(data, name) < 1:
            raise DataError(f"data.{name} is {getattr(data, name)}: it must be at least 1")
    if not 0 <= data.max_bad_fraction <= 1:
        raise DataError(f"data.max_bad_fraction is {data.max_bad_fraction}: it must be between 0 and 1")


def behind_skipped(
    streams: Sequence[RoleStream], skip: Sequence[tuple[int, int]], cursor: Mapping[str, int]
) -> Mapping[str, int]:
    """The cursor itself, or behind the stretches of global batches that begin at or hold it."""
    for start, stop in skip:
        number = max(stream.plan.number(cursor[stream.role]) for stream in streams)
        if start <= number < stop:
            cursor = {
                stream.role: stream.plan.after(stream.plan.number(cursor[stream.role]) + stop - number)
                for stream in streams
            }
    return cursor


def _start(streams: list[RoleStream], cursor: Mapping[str, int]) -> dict[str, int]:
    unknown = sorted(set(cursor) - {stream.role for stream in streams})
    if unknown:
        raise DataError(f"the saved state has a role {unknown[0]!r} that the task does not have: it is another task's")
    start = {stream.role: int(cursor.get(stream.role, 0)) for stream in streams}
    for stream in streams:
        stream.plan.advance(start[stream.role])  # refuses a counter that is none of this plan
    return start


def _received(batch: Batch, device: torch.device) -> Batch:
    if device.type == "cuda":
        stream = torch.cuda.current_stream(device)
        tensors = [*batch.views.values(), *(t.value_BHW for t in batch.targets.values())]
        for tensor in [*tensors, batch.region_BHW, batch.weight_B]:
            tensor.record_stream(stream)  # made on the thread's stream: not to be reused before this one is done
    return batch
