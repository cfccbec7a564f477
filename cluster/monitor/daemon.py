"""The monitor's own process: it keeps the list of targets, Prometheus and the page, until it is told to end.

    python -m cluster.monitor.daemon ORDER      ORDER: JSON of control.Order; `fathom monitor up` starts it
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator

import psutil

from cluster import storage
from cluster.lock import locked_folder
from cluster.monitor.control import PAGE_PORT, STATE, Order, State, targets_path
from cluster.monitor.page import Page
from cluster.monitor.prometheus import MonitorError, Server, write_files
from cluster.monitor.targets import Targets

_LOOK_EVERY_S = 2.0
_AGAIN_S = 5.0  # after Prometheus has ended by itself


def main(argv: list[str]) -> int:
    """The exit status: 0 when it was told to end, 2 when it could not begin."""
    try:
        serve(Order.from_json(argv[1]), lambda state: None)
    except (MonitorError, storage.StorageError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    return 0


def serve(order: Order, on_up: Callable[[State], None]) -> None:
    """Until SIGTERM or SIGINT; call it in the main thread. MonitorError and StorageError when something cannot be made
    or started, or is up already."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    with locked_folder(order.state, "this monitor"):
        paths = write_files(order.state, targets_path(order.state), order.settings)
        targets = Targets(order.folders, targets_path(order.state))
        targets.look()
        server = Server(order.state, paths["prometheus.yml"], order.settings.keep, order.prometheus_port)
        with contextlib.ExitStack() as stack:
            page = None
            if not order.targets_only:
                server.start()
                stack.callback(server.stop)
                page = stack.enter_context(_page(order, server)).address
            on_up(stack.enter_context(_told(order, page, server.address)))
            _watch(order, targets, server, stop)


def _watch(order: Order, targets: Targets, server: Server, stop: threading.Event) -> None:
    again = 0.0
    while not stop.wait(_LOOK_EVERY_S):
        try:
            targets.look()
            if not order.targets_only and not server.runs() and time.monotonic() >= again:
                again = time.monotonic() + _AGAIN_S
                _say("prometheus has ended; it is started again")
                server.start()
        except (MonitorError, storage.StorageError) as error:  # a full disk may be emptied
            _say(str(error))


def _page(order: Order, server: Server) -> Page:
    """The page at the port asked for, or at the usual one, or at a free one where that is taken."""
    where, every = f"http://{server.address}", order.settings.interval_s
    try:
        return Page(where, host=order.host, port=order.port or PAGE_PORT, interval_s=every)
    except OSError as error:
        if order.port is not None:
            raise MonitorError(
                f"--port {order.port}: cannot listen at {order.host}:{order.port} ({error.strerror}); choose another"
            ) from None
    try:
        return Page(where, host=order.host, port=0, interval_s=every)
    except OSError as error:
        raise MonitorError(f"--host {order.host}: cannot listen there ({error.strerror})") from None


@contextlib.contextmanager
def _told(order: Order, page: str | None, prometheus: str) -> Iterator[State]:
    """The state file, for as long as the monitor is up."""
    state = State(
        pid=os.getpid(),
        began=psutil.Process().create_time(),
        machine=socket.gethostname(),
        since=time.time(),
        order=order,
        page=page,
        prometheus=prometheus or None,
    )
    state.write()
    try:
        yield state
    finally:
        with contextlib.suppress(OSError):
            os.unlink(os.path.join(order.state, STATE))


def _say(line: str) -> None:
    print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
