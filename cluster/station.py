"""The actor that stands on a node while a cluster is looked over, and how two of them try the way between them."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from cluster.probe import MIB, one_line

_CONNECT_S = 3.0


@dataclass(frozen=True, kw_only=True)
class Meeting:
    """Two nodes' all-reduce of `mib` MiB. The store is rank 0's; `key` is new every time. `gpu`: a uuid, for NCCL."""

    backend: str
    rank: int
    host: str
    port: int
    key: str
    mib: int
    timeout_s: float
    gpu: str = ""


@dataclass(frozen=True)
class Door:
    """A Listener's `port` and `word`, and the port of the `store` in which this node's meetings as rank 0 begin."""

    port: int
    word: str
    store: int


class Listener:
    """A TCP port of one address that says a word to everyone who connects, until it is closed."""

    def __init__(self, address: str) -> None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self.word = secrets.token_hex(8)
        self._server = socket.create_server((address, 0), family=family)
        self.port = int(self._server.getsockname()[1])
        threading.Thread(target=self._serve, name="fathom-listener", daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._server.accept()
            except OSError:  # closed
                return
            with contextlib.suppress(OSError), connection:
                connection.sendall(self.word.encode())

    def close(self) -> None:
        """Free the port."""
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)  # wakes the thread
        self._server.close()


def reach(address: str, port: int, word: str) -> str:
    """Why a Listener cannot be reached from here; empty when it can."""
    try:
        with socket.create_connection((address, port), timeout=_CONNECT_S) as connection:
            connection.settimeout(_CONNECT_S)
            heard = connection.recv(64).decode(errors="replace")
    except OSError as error:
        return one_line(error)
    return "" if heard == word else "something else answers there"


def meet(meeting: Meeting, store: Any = None) -> float:
    """An all-reduce with the other node, in a group of its own; returns seconds. `store`: rank 0's, which has it.

    Raises RuntimeError (torch's DistError too) when they do not come together within `timeout_s`, or sum up wrongly.
    """
    import torch
    import torch.distributed as dist

    patience = timedelta(seconds=meeting.timeout_s)
    if store is None:
        store = dist.TCPStore(meeting.host, meeting.port, is_master=False, wait_for_workers=False, timeout=patience)
    store = dist.PrefixStore(meeting.key, store)
    store.set_timeout(patience)
    if meeting.backend == "nccl":
        device = _cuda_device(meeting.gpu)
        torch.cuda.set_device(device)
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = patience
        group: Any = dist.ProcessGroupNCCL(store, meeting.rank, 2, options)
    else:
        device = torch.device("cpu")
        group = dist.ProcessGroupGloo(store, meeting.rank, 2, patience)
    values = torch.full((meeting.mib * MIB // 4,), float(meeting.rank + 1), device=device)
    group.allreduce([values[:1].clone()]).wait(patience)  # connects
    _finish(device)
    begun = time.perf_counter()
    group.allreduce([values]).wait(patience)
    _finish(device)
    took = time.perf_counter() - begun
    if not bool((values == 3.0).all()):
        raise RuntimeError("the sum of both nodes' numbers is wrong")
    group.shutdown()
    return max(took, 1e-6)


def _cuda_device(uuid: str) -> Any:
    """torch's number of a GPU may differ from nvidia-smi's."""
    import torch

    for index in range(torch.cuda.device_count()):
        if uuid and str(getattr(torch.cuda.get_device_properties(index), "uuid", "")) in uuid:
            return torch.device("cuda", index)
    return torch.device("cuda", 0)


def _finish(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Station:
    """The actor on a node. One call at a time; it is thrown away when one takes too long."""

    def __init__(self) -> None:
        self._listener: Listener | None = None
        self._store: Any = None

    def hello(self) -> int:
        return os.getpid()

    def clock(self) -> float:
        """Seconds since the epoch, by this node."""
        return time.time()

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        return function(*args)

    def open(self) -> Door:
        """Opened once; raises OSError or torch's DistError."""
        import ray
        import torch.distributed as dist

        if self._listener is None:
            # It listens everywhere, as the one of a training run does: torch knows no other way.
            self._store = dist.TCPStore("0.0.0.0", 0, is_master=True, wait_for_workers=False)
            self._listener = Listener(ray.util.get_node_ip_address())
        return Door(self._listener.port, self._listener.word, self._store.port)

    def meet(self, meeting: Meeting) -> float:
        return meet(meeting, self._store if meeting.rank == 0 else None)

    def put(self, mib: int) -> list[Any]:
        """Bytes in this node's object store."""
        import ray

        return [ray.put(secrets.token_bytes(mib * MIB))]

    def fetch(self, reference: list[Any], timeout_s: float) -> float:
        """Seconds until another node's bytes are here; TimeoutError after `timeout_s`."""
        import ray

        begun = time.perf_counter()
        try:
            ray.get(reference[0], timeout=timeout_s)
        except ray.exceptions.GetTimeoutError:
            raise TimeoutError(f"not here within {timeout_s:.0f} s") from None
        return max(time.perf_counter() - begun, 1e-6)
