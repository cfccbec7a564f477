"""Grafana's dashboards, made of the boards: JSON to be imported as it is (schema 36, Grafana 8 and later)."""

from __future__ import annotations

import json
import os
from typing import Any

from cluster import storage
from cluster.monitor.boards import BOARDS
from cluster.monitor.panels import Board, Panel

_SCHEMA = 36
_COLUMNS = 24
_STAT_HIGH, _LINES_HIGH = 4, 8
_LINES_BESIDE = 3
_SOURCE = {"type": "prometheus", "uid": "${datasource}"}
_UNITS = {
    "": "short", "seconds": "s", "bytes": "bytes", "bytes/s": "Bps", "ratio": "percentunit", "1/s": "cps",
    "images/s": "suffix: images/s",
}  # fmt: skip
_NAME_OF_TARGET = 'label_values(up{{role=~"{roles}"}}, run)'
_NODE_OF_TARGET = 'label_values(up{{role=~"{roles}|ray"}}, node)'


def write(folder: str) -> list[str]:
    """Write all of them into `folder`; returns the paths. StorageError when one cannot be written."""
    paths = []
    for key, board in BOARDS.items():
        path = os.path.join(folder, f"fathom-{key}.json")
        storage.atomic_write(path, json.dumps(dashboard(board), indent=1) + "\n")
        paths.append(path)
    return paths


def dashboard(board: Board) -> dict[str, Any]:
    """One dashboard. It asks for a Prometheus data source, and has variables for run and node."""
    panels: list[dict[str, Any]] = []
    top = 0
    for row in board.rows:
        panels.append(
            {
                "id": len(panels) + 1, "type": "row", "title": row.question, "collapsed": False, "panels": [],
                "gridPos": _place(0, top, _COLUMNS, 1),
            }
        )  # fmt: skip
        top += 1
        for line in _lines(row.panels):
            wide, high = _COLUMNS // len(line), max(_high(panel) for panel in line)
            for number, panel in enumerate(line):
                panels.append(_panel(panel, len(panels) + 1, _place(number * wide, top, wide, high)))
            top += high
    return {
        "uid": f"fathom-{board.key}",
        "title": board.title,
        "tags": ["fathom"],
        "timezone": "browser",
        "editable": True,
        "graphTooltip": 1,  # one crosshair for all panels
        "time": {"from": "now-1h", "to": "now"},
        "refresh": "10s",
        "schemaVersion": _SCHEMA,
        "panels": panels,
        "templating": {"list": _variables(board)},
        "annotations": {"list": _annotations()},
        "links": [],
    }


def _lines(panels: tuple[Panel, ...]) -> list[list[Panel]]:
    """Which stand beside one another: numbers in one line, curves in threes, or in pairs if that fits better."""
    found = [[panel for panel in panels if panel.kind == "stat"]]
    curves = [panel for panel in panels if panel.kind != "stat"]
    beside = 2 if len(curves) in (2, 4) else _LINES_BESIDE
    found += [curves[start : start + beside] for start in range(0, len(curves), beside)]
    return [line for line in found if line]


def _high(panel: Panel) -> int:
    return _STAT_HIGH if panel.kind == "stat" else _LINES_HIGH


def _place(left: int, top: int, wide: int, high: int) -> dict[str, int]:
    return {"x": left, "y": top, "w": wide, "h": high}


def _panel(panel: Panel, number: int, place: dict[str, int]) -> dict[str, Any]:
    empty = f" Nothing is shown {panel.empty}." if panel.empty else ""
    stat = panel.kind == "stat"
    return {
        "id": number,
        "type": "stat" if stat else "timeseries",
        "title": panel.title,
        "description": panel.help + empty,
        "datasource": _SOURCE,
        "gridPos": place,
        "targets": [
            {
                "refId": chr(ord("A") + place), "datasource": _SOURCE, "expr": query.expr,
                "legendFormat": query.legend, "instant": stat, "range": not stat, "editorMode": "code",
            }
            for place, query in enumerate(panel.queries)
        ],
        "fieldConfig": {"defaults": _stat_field(panel) if stat else _curve_field(panel), "overrides": []},
        "options": _stat_options(panel) if stat else _CURVE_OPTIONS,
    }  # fmt: skip


def _field(panel: Panel) -> dict[str, Any]:
    ends = {name: value for name, value in (("min", panel.low), ("max", panel.high)) if value is not None}
    return {"unit": _UNITS[panel.unit], "noValue": panel.empty or "no data", **ends}


def _stat_field(panel: Panel) -> dict[str, Any]:
    return {**_field(panel), "color": {"mode": "fixed", "fixedColor": "text"}}


def _curve_field(panel: Panel) -> dict[str, Any]:
    stack = panel.kind == "stack"
    field = _field(panel)
    soft = {"axisSoftMax": field.pop("max")} if stack and "max" in field else {}  # two runs have twice as much
    return {
        **field,
        "color": {"mode": "palette-classic"},
        "custom": {
            **soft,
            "drawStyle": "line", "lineInterpolation": "linear", "lineWidth": 1, "showPoints": "never",
            "spanNulls": False, "fillOpacity": 60 if stack else 0,
            "stacking": {"mode": "normal" if stack else "none", "group": "A"},
        },
    }  # fmt: skip


def _stat_options(panel: Panel) -> dict[str, Any]:
    return {
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
        "textMode": "name" if panel.name else "value_and_name",
        "colorMode": "value",
        "graphMode": "none",
        "justifyMode": "auto",
        "orientation": "auto",
    }


_CURVE_OPTIONS: dict[str, Any] = {
    "legend": {"displayMode": "table", "placement": "bottom", "showLegend": True, "calcs": ["lastNotNull"]},
    "tooltip": {"mode": "multi", "sort": "desc"},
}


def _variables(board: Board) -> list[dict[str, Any]]:
    roles = "|".join(board.roles)
    return [
        {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus", "hide": 0},
        _variable("run", _NAME_OF_TARGET.format(roles=roles)),
        _variable("node", _NODE_OF_TARGET.format(roles=roles)),
    ]


def _variable(name: str, query: str) -> dict[str, Any]:
    return {
        "name": name,
        "label": name,
        "type": "query",
        "datasource": _SOURCE,
        "query": query,
        "refresh": 2,  # when the time range changes
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"selected": True, "text": ["All"], "value": ["$__all"]},
        "hide": 0,
    }


def _annotations() -> list[dict[str, Any]]:
    """Lines across the curves where an attempt began."""
    return [
        {
            "name": "attempts", "enable": True, "hide": False, "iconColor": "orange", "datasource": _SOURCE,
            "expr": 'changes(fathom_run_attempts{run=~"$run"}[$__rate_interval]) > 0',
        }
    ]  # fmt: skip
