"""The live page, for whoever has no Grafana: a small HTTP server over one Prometheus; the page itself is in web/."""

from __future__ import annotations

import functools
import ipaddress
import json
import socket
import socketserver
import threading
import time
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

from cluster.exporter import reachable
from cluster.monitor.page_data import Asked, PageData, PageError

_WEB = Path(__file__).parent / "web"
_KINDS = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}
_FIRST = "page.html"
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
_SILENT_S = 30.0  # of a client that has connected
_MOST_BODY = 1 << 16
_JOIN_S = 5.0


class Page:
    """Serves from `with` on until its end, in threads; the port is bound at once, and `address` ("host:port") is known.

    `prometheus`: its address with "http://". `host`: where to listen; 0.0.0.0 for all interfaces. `interval_s`:
    between two scrapes. OSError when the port is taken or the host is not this machine's.
    """

    def __init__(self, prometheus: str, *, host: str = "127.0.0.1", port: int = 0, interval_s: float = 5.0) -> None:
        self._server = _Server(host, port, PageData(prometheus, interval_s))
        self._thread: threading.Thread | None = None
        name = reachable() if host in ("0.0.0.0", "::", "") else host
        self.address = f"{f'[{name}]' if ':' in name else name}:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.1}, name="page", daemon=True
        )
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End all connections and threads, free the port. Again is nothing."""
        if self._thread is not None:
            self._server.shutdown()
            self._thread.join(timeout=_JOIN_S)
            self._thread = None
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    """Knows its connections: a browser keeps some open that never ask for anything."""

    def __init__(self, host: str, port: int, data: PageData) -> None:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        self.address_family = found[0][0]
        self.files = {f"/{path.name}": path for path in _WEB.iterdir() if path.suffix in _KINDS}
        self.data: dict[str, Callable[[Asked], Any]] = {
            "/api/boards": data.boards,
            "/api/values": data.values,
            "/api/panel": data.panel,
            "/api/alerts": data.alerts,
        }
        self._host = host.lower()
        self._open: dict[socket.socket, threading.Thread] = {}
        self._lock = threading.Lock()
        super().__init__((host, port), _Handler)

    def server_bind(self) -> None:
        """As TCP has it: HTTPServer asks the name service, which may take its time."""
        socketserver.TCPServer.server_bind(self)

    def process_request(self, request: Any, client_address: Any) -> None:
        thread = threading.Thread(
            target=self.process_request_thread, args=(request, client_address), name="page-request", daemon=True
        )
        with self._lock:
            self._open[request] = thread
        thread.start()

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._open.pop(request, None)
        super().shutdown_request(request)

    def server_close(self) -> None:
        super().server_close()
        with self._lock:
            left = list(self._open.items())
        for connection, _ in left:
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:  # has ended by itself
                continue
        ends = time.monotonic() + _JOIN_S
        for _, thread in left:
            thread.join(timeout=max(0.0, ends - time.monotonic()))

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away."""

    def knows(self, host: str) -> bool:
        """Whether a Host header is one of ours. Others come from a page elsewhere whose name was made to lead here (DNS
        rebinding), which must not read what we serve; nobody can do that to an address or to our own name."""
        name = urlsplit(f"//{host}").hostname or ""
        try:
            ipaddress.ip_address(name)
            return True
        except ValueError:
            own = ("localhost", self._host, socket.gethostname().lower())
            return name != "" and (name in own or name == self._full_name)

    @functools.cached_property
    def _full_name(self) -> str:
        return socket.getfqdn().lower()


class _Handler(BaseHTTPRequestHandler):
    """GET and HEAD of the files in web/ and of what PageData answers."""

    server: _Server
    timeout = _SILENT_S
    server_version, sys_version = "fathom", ""

    def do_GET(self) -> None:
        try:
            kind, body = self._answer()
        except PageError as error:
            self._send(error.status, "text/plain", f"{error.text}\n".encode())
        else:
            self._send(HTTPStatus.OK, kind, body)

    do_HEAD = do_GET

    def _answer(self) -> tuple[str, bytes]:
        """The kind and the text of what was asked for. PageError for anything else."""
        try:
            known = self.server.knows(self.headers.get("Host", ""))
            address = urlsplit(self.path)
            asked = parse_qs(address.query, keep_blank_values=True, errors="strict", max_num_fields=20)
        except ValueError:
            raise PageError(400, "bad address") from None
        if not known:
            raise PageError(403, "this name is not mine: use localhost, my address or the name of my machine")
        if any(len(values) > 1 for values in asked.values()):
            raise PageError(400, "a parameter is given twice")
        path = f"/{_FIRST}" if address.path == "/" else address.path
        if (file := self.server.files.get(path)) is not None:
            return _KINDS[file.suffix], file.read_bytes()
        if (data := self.server.data.get(path)) is not None:
            found = data({name: values[0] for name, values in asked.items()})
            return "application/json", json.dumps(found, allow_nan=False).encode()
        raise PageError(404, "no such address")

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the base class refuses by itself, another method than GET and HEAD among it."""
        code = HTTPStatus.METHOD_NOT_ALLOWED if code == HTTPStatus.NOT_IMPLEMENTED else HTTPStatus(code)
        if code is HTTPStatus.METHOD_NOT_ALLOWED:  # unread, it would end the connection before our answer is read
            length = self.headers.get("Content-Length", "")
            self.rfile.read(min(int(length), _MOST_BODY) if length.isdecimal() else 0)
        self._send(code, "text/plain", f"{code.phrase}\n".encode())

    def _send(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        if status == HTTPStatus.METHOD_NOT_ALLOWED:
            self.send_header("Allow", "GET, HEAD")
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: stderr is the monitor's."""
