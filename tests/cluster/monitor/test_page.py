"""The live page's server: what it answers, what it refuses, and how it ends."""

from __future__ import annotations

import http.client
import http.server
import itertools
import json
import shutil
import socket
import threading
import time
import urllib.parse
from collections.abc import Iterator
from typing import Any

import pytest

from cluster.monitor.boards import BOARDS
from cluster.monitor.page import Page
from cluster.monitor.page_data import MOST_SERIES, POINTS, legend, natural
from tests.cluster.monitor.synthetic import GONE, LABELLING, NODES, ODD, RATE, RUNS, Prometheus, World

THROUGHPUT, STATE, GRADIENT = "2-0", "0-0", "1-2"  # panels of the training board


class Answer:
    def __init__(self, address: str, path: str, method: str = "GET", body: str | None = None, **headers: str) -> None:
        connection = http.client.HTTPConnection(address, timeout=30)
        try:
            connection.request(method, path, body, headers)
            found = connection.getresponse()
            self.status, self.headers, self.text = found.status, dict(found.headers), found.read().decode()
        finally:
            connection.close()

    @property
    def json(self) -> Any:
        assert self.status == 200, self.text
        assert self.headers["Content-Type"] == "application/json; charset=utf-8"
        return json.loads(self.text, parse_constant=pytest.fail)


def api(address: str, what: str, **asked: object) -> Answer:
    return Answer(address, f"/api/{what}?{urllib.parse.urlencode(asked)}")


def lately(seconds: float = 900.0) -> dict[str, float]:
    now = time.time()
    return {"start": now - seconds, "end": now}


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a page on a Prometheus that has scraped everything for some seconds."""
    if shutil.which("prometheus") is None:
        pytest.skip("prometheus is not installed")
    with World() as world, Prometheus(world, tmp_path_factory.mktemp("prometheus")) as prometheus:
        prometheus.until(f"count(count_over_time(up[1m]) >= 6) == {len(world.processes) + 1}")
        prometheus.until('ALERTS{alertname="FathomLabelGivenUp",alertstate="firing"}')
        prometheus.until('ALERTS{alertname="FathomTargetDown",alertstate="pending"}')
        with Page(f"http://{prometheus.address}", interval_s=1.0) as served:
            yield served.address


@pytest.fixture
def alone() -> Iterator[str]:
    """The address of a page whose Prometheus is not there."""
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        with Page(f"http://127.0.0.1:{nobody.getsockname()[1]}") as served:
            yield served.address


def test_the_page_and_its_files(alone: str) -> None:
    first = Answer(alone, "/")
    assert first.status == 200 and first.text.startswith("<!doctype html>")
    assert first.text == Answer(alone, "/page.html").text
    for path, kind in (("/page.js", "text/javascript"), ("/page.css", "text/css"), ("/page.html", "text/html")):
        answer = Answer(alone, path)
        assert (answer.status, answer.headers["Content-Type"]) == (200, f"{kind}; charset=utf-8")
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Cache-Control"] == "no-store"
        assert answer.headers["Content-Security-Policy"].startswith(
            "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:"
        )
        head = Answer(alone, path, "HEAD")
        assert (head.status, head.text) == (200, "")
        assert head.headers["Content-Length"] == str(len(answer.text.encode()))


def test_boards_come_without_their_expressions(alone: str) -> None:
    answer = api(alone, "boards")
    assert [board["key"] for board in answer.json] == list(BOARDS)
    for found in answer.json:
        board = BOARDS[found["key"]]
        assert (found["title"], [row["question"] for row in found["rows"]]) == (
            board.title, [row.question for row in board.rows],
        )  # fmt: skip
        panels = {panel["key"]: panel for row in found["rows"] for panel in row["panels"]}
        assert list(panels) == list(board.panels())
        for key, panel in board.panels().items():
            own = {name: getattr(panel, name)
                   for name in ("title", "help", "unit", "kind", "low", "high", "name", "empty")}  # fmt: skip
            assert panels[key] == {"key": key, **own, "legends": [query.legend for query in panel.queries]}
    assert all(query.expr not in answer.text for board in BOARDS.values()
               for panel in board.panels().values() for query in panel.queries)  # fmt: skip


def test_runs_and_nodes_are_those_of_the_boards_processes(page: str) -> None:
    training = api(page, "values", board="training").json
    assert (training["runs"], training["nodes"]) == (sorted(RUNS), list(NODES))
    assert abs(training["now"] - time.time()) < 60
    assert api(page, "values", board="labelling", **lately()).json["runs"] == [LABELLING]
    assert set(api(page, "values", board="cluster").json["runs"]) == {*RUNS, LABELLING}
    assert api(page, "values", board="training", start=1.6e9, end=1.6e9 + 60).json["runs"] == []


def test_a_panel_over_time(page: str) -> None:
    asked = lately()
    answer = api(page, "panel", board="training", panel=THROUGHPUT, **asked).json
    assert [one["legend"] for one in answer["series"]] == sorted(RUNS)
    assert {one["short"] for one in answer["series"]} == {""}
    assert (answer["step"], answer["left_off"]) == (3, 0)
    for one in answer["series"]:
        times = [t for t, _ in one["points"]]
        assert times == sorted(set(times)) and len(times) <= POINTS + 2
        assert times[-1] == pytest.approx(asked["end"], abs=0.001)
        assert {later - t for t, later in itertools.pairwise(times[:-1])} == {3}
        assert one["points"][0][1] is None  # before there was anything
        assert one["points"][-1][1] == pytest.approx(2 * RATE, rel=0.5)
    for key, panel in BOARDS["training"].panels().items():
        assert api(page, "panel", board="training", panel=key, **asked).json["series"], panel.title


def test_a_choice_is_meant_literally(page: str) -> None:
    def runs(**chosen: str) -> list[str]:
        answer = api(page, "panel", board="training", panel=THROUGHPUT, **lately(), **chosen).json
        return [one["labels"]["run"] for one in answer["series"]]

    assert runs(run=ODD) == [ODD]
    assert runs(run=RUNS[0], node=NODES[0]) == [RUNS[0]]
    for nothing in (".*", "vits.*", f"{RUNS[0]}|{ODD}", '"} or vector(1) or up{run="', "", "$node"):
        assert runs(run=nothing) == []
    assert runs(node="node.1") == []


def test_a_large_value_is_the_one_at_the_end(page: str) -> None:
    asked = lately()
    answer = api(page, "panel", board="training", panel=STATE, **asked).json
    assert [one["legend"] for one in answer["series"]] == [f"{run} RUNNING" for run in sorted(RUNS)]
    assert [one["short"] for one in answer["series"]] == ["RUNNING"] * 2
    assert all(one["points"] == [[pytest.approx(asked["end"], abs=0.001), 1.0]] for one in answer["series"])


def test_alerts_the_worst_first(page: str) -> None:
    found = api(page, "alerts").json
    order = [(alert["state"] != "firing", alert["severity"] != "critical") for alert in found]
    assert order == sorted(order)
    [given_up] = [alert for alert in found if alert["name"] == "FathomLabelGivenUp"]
    assert given_up.pop("since") and LABELLING in given_up.pop("summary")
    assert given_up == {
        "name": "FathomLabelGivenUp", "state": "firing", "severity": "warning",
        "runbook": "docs/runbook.md#fathomlabelgivenup",
    }  # fmt: skip
    [down] = [alert for alert in found if alert["name"] == "FathomTargetDown" and GONE["rank"] in alert["summary"]]
    assert down["state"] in ("pending", "firing")


PANEL = "/api/panel?board=training&panel=2-0"


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/nothing", 404), ("/api", 404), ("/api/query?query=up", 404), ("/../page.py", 404), ("/web/page.js", 404),
        ("/%2e%2e/page.py", 404), ("/page_data.py", 404), ("/api/panel/", 404),
        ("/api/values", 404), ("/api/values?board=other", 404),
        ("/api/panel?board=training&panel=9-9&start=1&end=2", 404), ("/api/panel?board=training&start=1&end=2", 404),
        (f"{PANEL}&start=1&end=2&query=up", 400), (f"{PANEL}&start=1&end=2&expr=up", 400),
        (f"{PANEL}&start=1&end=2&step=1", 400), ("/api/alerts?all=1", 400), ("/api/boards?x=", 400),
        (f"{PANEL}&start=1&end=2&run=a&run=b", 400), (PANEL, 400), (f"{PANEL}&start=1", 400),
        (f"{PANEL}&start=a&end=2", 400), (f"{PANEL}&start=2&end=1", 400), (f"{PANEL}&start=1&end=1", 400),
        (f"{PANEL}&start=nan&end=2", 400), (f"{PANEL}&start=1&end=inf", 400), (f"{PANEL}&start=-5&end=2", 400),
        (f"{PANEL}&start=0&end=1e9", 400), (f"{PANEL}&start=1e300&end=2e300", 400), (f"{PANEL}&run=%ff", 400),
        ("/api/values?board=training&start=1&end=x", 400),
    ],
)  # fmt: skip
def test_what_is_refused(alone: str, path: str, status: int) -> None:
    answer = Answer(alone, path)
    assert answer.status == status, answer.text
    assert answer.headers["Content-Type"].startswith("text/plain") and answer.text.count("\n") == 1


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "ODD"])
def test_nothing_but_get_and_head(alone: str, method: str) -> None:
    answer = Answer(alone, "/api/boards", method, body="query=up")
    assert (answer.status, answer.headers["Allow"]) == (405, "GET, HEAD")
    assert answer.text == "Method Not Allowed\n"


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200), ("LOCALHOST:1234", 200), ("127.0.0.1:9", 200), ("[::1]:80", 200), ("10.1.2.3", 200),
        (socket.gethostname(), 200), (f"{socket.gethostname()}:80", 200), ("evil.example", 403),
        ("evil.example:9840", 403), ("127.0.0.1.evil.example", 403), ("localhost.evil.example", 403), ("", 403),
        (f"{socket.gethostname()}.evil.example", 403), ("[::1", 400),
    ],
)  # fmt: skip
def test_only_under_our_own_names(alone: str, host: str, status: int) -> None:
    for path in ("/", "/api/boards"):
        assert Answer(alone, path, Host=host).status == status


def test_prometheus_gone(alone: str) -> None:
    for path in ("/api/values?board=training", "/api/alerts", f"{PANEL}&start=1&end=100"):
        answer = Answer(alone, path)
        assert (answer.status, answer.text) == (502, "Prometheus does not answer: Connection refused\n")


def test_the_port_is_ours_until_the_end(capfd: pytest.CaptureFixture[str]) -> None:
    before = set(threading.enumerate())
    with Page("http://127.0.0.1:9") as page:
        host, _, port = page.address.rpartition(":")
        assert host == "127.0.0.1"
        with pytest.raises(OSError):
            Page("http://127.0.0.1:9", port=int(port))
        idle = socket.create_connection((host, int(port)))  # as a browser does it
        assert Answer(page.address, "/").status == 200
        began = time.monotonic()
    assert time.monotonic() - began < 4
    assert idle.recv(1) == b""
    idle.close()
    assert {thread for thread in threading.enumerate() if thread.is_alive()} <= before
    with pytest.raises(ConnectionRefusedError):
        Answer(page.address, "/")
    page.close()
    with Page("http://127.0.0.1:9", port=int(port)) as again:
        assert again.address == page.address
    assert capfd.readouterr() == ("", "")
    with pytest.raises(OSError):
        Page("http://127.0.0.1:9", host="203.0.113.1")


class Canned:
    """A server in Prometheus' place: says `answer` to everything, and keeps what was asked."""

    def __init__(self, status: int, body: str) -> None:
        self.asked: list[tuple[str, dict[str, list[str]]]] = []
        canned = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                address = urllib.parse.urlsplit(self.path)
                canned.asked.append((address.path, urllib.parse.parse_qs(address.query)))
                self.send_response(status)
                self.end_headers()
                self.wfile.write(body.encode())

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)


def answered(status: int, body: str, **asked: object) -> tuple[Answer, Canned]:
    """A panel's answer where Prometheus gives `body`."""
    canned = Canned(status, body)
    thread = threading.Thread(target=canned.server.serve_forever, args=(0.02,))
    thread.start()
    try:
        with Page(f"http://127.0.0.1:{canned.server.server_address[1]}") as page:
            words = {"board": "training", "panel": GRADIENT, "start": 1000, "end": 1010.5, **asked}
            return api(page.address, "panel", **words), canned
    finally:
        canned.server.shutdown()
        canned.server.server_close()
        thread.join()


def result(*series: dict[str, Any]) -> str:
    return json.dumps({"status": "success", "data": {"result": list(series)}})


def test_gaps_and_values_that_are_no_numbers() -> None:
    values = [[1001, "1"], [1002, "NaN"], [1003, "+Inf"], [1007, "2.5e-3"]]
    answer, _ = answered(200, result({"metric": {"run": "a"}, "values": values, "value": [1010.5, "7"]}))
    [series] = answer.json["series"]
    assert series["points"][:9] == [
        [1000, None], [1001, 1], [1002, None], [1003, None], [1004, None], [1005, None], [1006, None], [1007, 0.0025],
        [1008, None],
    ]  # fmt: skip
    assert series["points"][-2:] == [[1010, None], [1010.5, 7]]


@pytest.mark.parametrize(
    ("seconds", "step", "window_ms"),
    [(15, 1, 20_000), (300, 1, 20_000), (900, 3, 20_000), (3600, 12, 24_000), (30 * 86400, 8640, 17_280_000)],
)
def test_resolution_and_window(seconds: int, step: int, window_ms: int) -> None:
    end = 1_700_000_000.25
    answer, canned = answered(200, result(), panel=THROUGHPUT, start=end - seconds, end=end, run="a.b", node='"')
    (_, over), (_, at) = canned.asked
    assert [path for path, _ in canned.asked] == ["/api/v1/query_range", "/api/v1/query"]
    assert answer.json["step"] == step and over["step"] == [str(step)] and at["time"] == [str(end)]
    expr = f'sum by (run) (rate(fathom_images_total{{run=~"a\\\\.b",node=~"\\""}}[{window_ms}ms]))'
    assert over["query"] == at["query"] == [expr]
    assert float(over["start"][0]) % step == 0 and float(over["end"][0]) % step == 0
    assert (float(over["end"][0]) - float(over["start"][0])) / step <= POINTS + 1


def test_of_too_many_series_the_largest_are_shown() -> None:
    many = [{"metric": {"run": f"r{n}"}, "values": [], "value": [1, str(n % 90)]} for n in range(MOST_SERIES + 30)]
    answer = answered(200, result(*many))[0].json
    assert answer["left_off"] == 30 and len(answer["series"]) == MOST_SERIES
    assert [one["legend"] for one in answer["series"]] == [f"r{n}" for n in range(30, 90)]


@pytest.mark.parametrize(
    ("status", "body", "text"),
    [
        (422, '{"status": "error", "error": "too many\\nsamples"}', "Prometheus: too many samples"),
        (503, "starting", "Prometheus: status 503"),
        (200, "hello", "Prometheus answers something else than expected"),
        (200, "[]", "Prometheus answers something else than expected"),
    ],
)
def test_errors_of_prometheus_in_one_line(status: int, body: str, text: str) -> None:
    answer, _ = answered(status, body)
    assert answer.status == 502 and answer.text.startswith(text) and answer.text.count("\n") == 1


def test_names_of_series() -> None:
    assert legend("{{run}} rank {{rank}}", {"run": "a{{rank}}", "rank": "3"}) == "a{{rank}} rank 3"
    assert legend("{{alertname}} {{run}} ({{severity}})", {"alertname": "A", "severity": "warning"}) == "A (warning)"
    assert sorted(["rank 10", "rank 2", "a"], key=natural) == ["a", "rank 2", "rank 10"]
