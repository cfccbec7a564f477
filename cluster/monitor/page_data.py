"""What the live page shows, as JSON: the boards, what there is to choose from, one panel's series, the alerts.

Only the panels' own expressions are run: a client chooses a panel, a run, a node and a time, never a query.
"""

from __future__ import annotations

import http.client
import json
import math
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cluster.monitor.boards import BOARDS
from cluster.monitor.panels import Board, Panel, Query, bound, exactly

Asked = Mapping[str, str]  # the parameters of a request
Point = tuple[float, float | None]
_Key = frozenset[tuple[str, str]]

POINTS = 300  # of a series, about
MOST_SERIES = 60  # of a panel: those with the largest values
_STAT_WINDOW_S = 60.0  # a step may take half a minute
_LONGEST_S = 400 * 86400.0
_DEFAULT_S = 3600.0
_ANSWER_S = 30.0
# No proxy of the environment's: Prometheus is on this machine.
_OPEN = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class PageError(Exception):
    """What the page answers instead: a status of HTTP and one line of text."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status, self.text = status, " ".join(text.split())


class PageData:
    """`prometheus`: its address with "http://". `interval_s`: between two scrapes. Methods raise PageError: 400 for
    parameters that make no sense, 404 for what does not exist, 502 when Prometheus does not answer as it should."""

    def __init__(self, prometheus: str, interval_s: float) -> None:
        self._prometheus, self._interval_s = prometheus.rstrip("/"), interval_s

    def boards(self, asked: Asked) -> Any:
        """All boards, without their expressions."""
        _only(asked)
        return [
            {
                "key": board.key,
                "title": board.title,
                "rows": [
                    {
                        "question": row.question,
                        "panels": [_described(f"{number}-{place}", panel) for place, panel in enumerate(row.panels)],
                    }
                    for number, row in enumerate(board.rows)
                ],
            }
            for board in BOARDS.values()
        ]

    def values(self, asked: Asked) -> Any:
        """The runs and nodes of a board's kind within a range (the last hour), and the time here: clocks differ."""
        _only(asked, "board", "start", "end")
        board = _board(asked)
        now = time.time()
        start, end = _range({"start": str(now - _DEFAULT_S), "end": str(now), **asked})
        # machines that only Ray knows
        ray = any("ray_" in query.expr for panel in board.panels().values() for query in panel.queries)
        return {
            "now": now,
            "runs": self._label_values("run", board.roles, start, end),
            "nodes": self._label_values("node", (*board.roles, *(["ray"] if ray else [])), start, end),
        }

    def panel(self, asked: Asked) -> Any:
        """A panel's series: on a grid of `step` seconds and at the end, or at the end only; null where there is no
        value. `left_off`: how many more there are."""
        _only(asked, "board", "panel", "run", "node", "start", "end")
        panel = _board(asked).panels().get(asked.get("panel", ""))
        if panel is None:
            raise PageError(404, "no such panel")
        start, end = _range(asked)
        chosen = {name: exactly(asked[name]) for name in ("run", "node") if name in asked}
        step = 0 if panel.kind == "stat" else max(1, math.ceil((end - start) / POINTS))
        window = max(4 * self._interval_s, 2 * step if step else _STAT_WINDOW_S)
        times = [float(t) for t in range(int(start // step) * step, int(end) + 1, step)] if step else []
        found: list[dict[str, Any]] = []
        for number, query in enumerate(panel.queries):
            expr = bound(query.expr, chosen, f"{round(window * 1000)}ms")
            series = self._series(expr, times, step, end)
            found += [_shown(number, query, dict(key), points) for key, points in series.items()]
        kept = sorted(found, key=_largest, reverse=True)[:MOST_SERIES]
        return {
            "start": start, "end": end, "step": step, "left_off": len(found) - len(kept),
            "series": sorted(kept, key=_place),
        }  # fmt: skip

    def alerts(self, asked: Asked) -> Any:
        """Those that fire and those that are about to, the worst first."""
        _only(asked)
        found = [
            {
                "name": alert["labels"]["alertname"],
                "state": alert["state"],
                "severity": alert["labels"].get("severity", ""),
                "summary": alert["annotations"].get("summary", ""),
                "runbook": alert["annotations"].get("runbook", ""),
                "since": alert["activeAt"],
            }
            for alert in self._ask("alerts", {})["alerts"]
            if alert["state"] in ("firing", "pending")
        ]
        return sorted(
            found, key=lambda a: (a["state"] != "firing", a["severity"] != "critical", a["name"], a["summary"])
        )

    def _series(self, expr: str, times: Sequence[float], step: int, end: float) -> dict[_Key, list[Point]]:
        """The grid stands still while the end moves on: its values do not change from one look to the next."""
        points: dict[_Key, dict[float, float | None]] = {}
        if times:
            asked = {"query": expr, "start": str(times[0]), "end": str(times[-1]), "step": str(step)}
            for one in self._ask("query_range", asked)["result"]:
                points[frozenset(one["metric"].items())] = {float(t): _number(value) for t, value in one["values"]}
        for one in self._ask("query", {"query": expr, "time": str(end)})["result"]:
            points.setdefault(frozenset(one["metric"].items()), {})[end] = _number(one["value"][1])
        grid = [*times, *([end] if end not in times else [])]
        return {key: [(t, values.get(t)) for t in grid] for key, values in points.items()}

    def _label_values(self, label: str, roles: Iterable[str], start: float, end: float) -> list[str]:
        """Of processes that play these roles."""
        of = f'{{role=~"{"|".join(roles)}"}}'
        asked = {"match[]": [f"fathom_build_info{of}", f"up{of}"], "start": str(start), "end": str(end)}
        return sorted((str(value) for value in self._ask(f"label/{label}/values", asked)), key=natural)

    def _ask(self, path: str, asked: Mapping[str, str | Sequence[str]]) -> Any:
        """The `data` of an answer of Prometheus' API. PageError when there is none."""
        url = f"{self._prometheus}/api/v1/{path}?{urllib.parse.urlencode(asked, doseq=True)}"
        try:
            with _OPEN.open(url, timeout=_ANSWER_S) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            with error:
                raise PageError(502, f"Prometheus: {_said(error)}") from None
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            raise PageError(502, f"Prometheus does not answer: {getattr(reason, 'strerror', None) or reason}") from None
        except (ValueError, KeyError, TypeError) as error:
            raise PageError(502, f"Prometheus answers something else than expected: {error}") from None


def natural(text: str) -> list[tuple[int, str]]:
    """A key that puts "rank 2" before "rank 10"."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", text)]


def legend(form: str, labels: Mapping[str, str]) -> str:
    """A series' name: `{{label}}` in `form` stands for a value; a space before one that is missing goes as well."""

    def value(found: re.Match[str]) -> str:
        text = labels.get(found[2], "")
        return found[1] + text if text else ""

    return re.sub(r"( ?)\{\{(\w+)\}\}", value, form)


def _described(key: str, panel: Panel) -> dict[str, Any]:
    names = ("title", "help", "unit", "kind", "low", "high", "name", "empty")
    legends = [query.legend for query in panel.queries]
    return {"key": key, **{name: getattr(panel, name) for name in names}, "legends": legends}


def _only(asked: Asked, *known: str) -> None:
    for name in asked:
        if name not in known:
            raise PageError(400, f"{name!r}: no parameter of this address; it has {', '.join(known) or 'none'}")


def _board(asked: Asked) -> Board:
    board = BOARDS.get(asked.get("board", ""))
    if board is None:
        raise PageError(404, f"no such board; there are {', '.join(BOARDS)}")
    return board


def _range(asked: Asked) -> tuple[float, float]:
    try:
        start, end = (round(float(asked[name]), 3) for name in ("start", "end"))
    except (KeyError, ValueError, OverflowError):
        raise PageError(400, "start and end must be numbers: seconds since 1970") from None
    if not (0 <= start < end <= 2**40 and end - start <= _LONGEST_S):  # not for NaN either
        raise PageError(400, "start must be before end, by 400 days at most")
    return start, end


def _shown(number: int, query: Query, labels: dict[str, str], points: list[Point]) -> dict[str, Any]:
    """`short`: its name where there is one run only."""
    return {
        "query": number,
        "labels": labels,
        "legend": legend(query.legend, labels),
        "short": legend(re.sub(r"^\{\{run\}\} ?", "", query.legend), labels),
        "points": points,
    }


def _largest(series: dict[str, Any]) -> float:
    return max((value for _, value in series["points"] if value is not None), default=-math.inf)


def _place(series: dict[str, Any]) -> Any:
    return natural(series["labels"].get("run", "")), series["query"], natural(series["legend"])


def _number(text: str) -> float | None:
    value = float(text)
    return value if math.isfinite(value) else None


def _said(error: urllib.error.HTTPError) -> str:
    """What Prometheus gives as the reason of a status."""
    try:
        return str(json.load(error)["error"])[:500]
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError):
        return f"status {error.code}"
