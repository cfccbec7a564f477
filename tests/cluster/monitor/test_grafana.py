"""Grafana's dashboards fit Grafana's schema, and say what the boards say."""

from __future__ import annotations

import copy
import json
import re
import typing
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any, Literal

import pytest
from grafana_foundation_sdk.models import dashboard as schema
from grafana_foundation_sdk.models import prometheus, stat, timeseries

from cluster.monitor.alerts import ALERTS
from cluster.monitor.boards import BOARDS
from cluster.monitor.grafana import dashboard, write
from cluster.telemetry import METRICS

# What the schema leaves to a panel's or a data source's own.
OWN = {"stat": (stat.Options, None), "timeseries": (timeseries.Options, timeseries.FieldConfig)}
OF_TARGETS = {"run", "role", "node", "rank", "worker", "instance", "job"}
# Grafana's names of units (its own list, and `suffix:` for any other).
UNITS = {
    "": "short", "seconds": "s", "bytes": "bytes", "bytes/s": "Bps", "ratio": "percentunit", "1/s": "cps",
    "images/s": "suffix: images/s",
}  # fmt: skip
BOARD = pytest.mark.parametrize("key", BOARDS)


def faults(value: Any, hint: Any, where: str = "") -> list[str]:
    """Where a JSON value is not what a type of the SDK says: unknown keys, wrong types, values that no enum has."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any or hint is object:
        return []
    if origin is typing.Union:
        tried = [faults(value, part, where) for part in parts]
        return [] if not all(tried) else min(tried, key=len)
    if origin is Literal:
        return [] if value in parts else [f"{where}: {value!r} is none of {parts}"]
    if origin is list:
        if not isinstance(value, list):
            return [f"{where}: {value!r} is no list"]
        return [fault for number, item in enumerate(value) for fault in faults(item, parts[0], f"{where}[{number}]")]
    if origin is dict:
        return [] if isinstance(value, dict) else [f"{where}: {value!r} is no mapping"]
    if hint is type(None):
        return [] if value is None else [f"{where}: {value!r} is not null"]
    if issubclass(hint, Enum):
        return [] if value in {one.value for one in hint} else [f"{where}: {value!r} is no {hint.__name__}"]
    if hint in (int, float, str, bool):
        fits = isinstance(value, int | float) if hint is float else isinstance(value, hint)
        return [] if fits and isinstance(value, bool) == (hint is bool) else [f"{where}: {value!r} is no {hint}"]
    return object_faults(value, hint, where)


def object_faults(value: Any, kind: type[Any], where: str) -> list[str]:
    if not isinstance(value, dict):
        return [f"{where}: {value!r} is no {kind.__name__}"]
    if kind is schema.Panel and value.get("type") == "row":
        kind = schema.RowPanel
    hints = keys_of(kind)
    found = [f"{where}: {key!r} is no key of {kind.__name__}" for key in value.keys() - hints.keys()]
    special = own(value) if kind is schema.Panel else {}
    for key in value.keys() & hints.keys():
        found += faults(value[key], special.get(key, hints[key]), f"{where}.{key}")
    if kind is schema.Panel and value["type"] in OWN and OWN[value["type"]][1]:
        custom = value["fieldConfig"]["defaults"].get("custom", {})
        found += faults(custom, OWN[value["type"]][1], f"{where}.custom")
    return found


def own(panel: dict[str, Any]) -> dict[str, Any]:
    assert panel["type"] in OWN, panel["type"]
    return {"targets": list[prometheus.Dataquery], "options": OWN[panel["type"]][0]}


def keys_of(kind: type[Any]) -> dict[str, Any]:
    """JSON key -> type, by where each attribute turns up when the SDK encodes it."""
    hints = {name: hint for name, hint in typing.get_type_hints(kind).items() if not name.startswith("_")}
    found = {}
    for name, hint in hints.items():
        made, mark = kind(), object()
        setattr(made, name, mark)
        for key, value in made.to_json().items():
            if value is mark:
                found[key] = hint
    assert len(found) == len(hints)
    return found


@BOARD
def test_it_fits_the_schema(key: str) -> None:
    assert faults(dashboard(BOARDS[key]), schema.Dashboard, key) == []


@BOARD
def test_grafana_s_own_reader_keeps_all_of_it(key: str) -> None:
    """What it drops or changes it did not understand; what it adds are its defaults."""
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.cog.plugins import register_default_plugins

    register_default_plugins()
    made = dashboard(BOARDS[key])
    read = json.loads(json.dumps(schema.Dashboard.from_json(copy.deepcopy(made)), cls=JSONEncoder))
    assert kept(made, read)


def kept(made: Any, read: Any) -> bool:
    if isinstance(made, dict):
        return isinstance(read, dict) and all(key in read and kept(made[key], read[key]) for key in made)
    if isinstance(made, list):
        return isinstance(read, list) and len(made) == len(read) and all(map(kept, made, read))
    return bool(made == read)


def spoil(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(made: dict[str, Any]) -> None:
        *parents, last = path.split("/")
        for name in parents:
            made = made[int(name)] if isinstance(made, list) else made[name]
        made[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (spoil("tittle", "x"), "'tittle' is no key of Dashboard"),
        (spoil("schemaVersion", "36"), "'36' is no <class 'int'>"),
        (spoil("graphTooltip", 7), "is no DashboardCursorSync"),
        (spoil("panels/1/gridPos/h", 4.5), "4.5 is no <class 'int'>"),
        (spoil("panels/1/targets/0/exprs", "up"), "'exprs' is no key of Dataquery"),
        (spoil("panels/1/options/textMode", "names"), "is no BigValueTextMode"),
        (spoil("panels/7/fieldConfig/defaults/unitt", "s"), "'unitt' is no key of FieldConfig"),
        (spoil("panels/7/fieldConfig/defaults/custom/drawStyle", "curve"), "is no GraphDrawStyle"),
        (spoil("templating/list/1/type", "queries"), "is no VariableType"),
        (spoil("annotations/list/0/enabled", True), "'enabled' is no key of AnnotationQuery"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_found(change: Callable[[dict[str, Any]], None], words: str) -> None:
    made = copy.deepcopy(dashboard(BOARDS["training"]))
    change(made)
    (fault,) = faults(made, schema.Dashboard)
    assert words in fault


@BOARD
def test_no_panel_lies_on_another(key: str) -> None:
    taken: set[tuple[int, int]] = set()
    panels = dashboard(BOARDS[key])["panels"]
    for panel in panels:
        place = panel["gridPos"]
        assert place["w"] >= 4 and 0 <= place["x"] <= 24 - place["w"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken, panel["title"]
        taken |= cells
    assert sorted(panel["id"] for panel in panels) == list(range(1, len(panels) + 1))


@BOARD
def test_every_panel_of_the_board_is_there(key: str) -> None:
    board, made = BOARDS[key], dashboard(BOARDS[key])
    shown = [panel for panel in made["panels"] if panel["type"] != "row"]
    assert [panel["title"] for panel in made["panels"] if panel["type"] == "row"] == [r.question for r in board.rows]
    wanted = {panel.title: panel for panel in board.panels().values()}
    assert len(wanted) == len(shown) == len(board.panels())  # no title twice
    for panel in shown:
        own = wanted[panel["title"]]
        assert [(t["expr"], t["legendFormat"]) for t in panel["targets"]] == [(q.expr, q.legend) for q in own.queries]
        instant = own.kind == "stat"  # the latest value, not the last hour's
        assert all((t["instant"], t["range"]) == (instant, not instant) for t in panel["targets"])
        defaults = panel["fieldConfig"]["defaults"]
        assert defaults["unit"] == UNITS[own.unit]
        high = defaults.get("max", defaults.get("custom", {}).get("axisSoftMax"))
        assert (defaults.get("min"), high) == (own.low, own.high)
        assert own.kind != "stack" or "max" not in defaults  # of several runs
        assert own.help in panel["description"] and own.empty in panel["description"]


@BOARD
def test_every_variable_is_declared(key: str) -> None:
    made = dashboard(BOARDS[key])
    declared = {variable["name"] for variable in made["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(made))) - {"__rate_interval", "__all"}
    assert used <= declared and {"run", "node", "datasource"} <= declared


def test_files_are_the_same_every_time(tmp_path: Path) -> None:
    paths = [write(str(tmp_path / name)) for name in ("a", "b")]
    assert [Path(path).name for path in paths[0]] == [f"fathom-{key}.json" for key in BOARDS]
    for first, second in zip(*paths, strict=True):
        assert Path(first).read_bytes() == Path(second).read_bytes()
        json.loads(Path(first).read_text())


# -- names ------------------------------------------------------------------------------------------------------------


def expressions() -> list[str]:
    panels = [panel for board in BOARDS.values() for panel in board.panels().values()]
    return [query.expr for panel in panels for query in panel.queries] + [alert.expr for alert in ALERTS]


def declared_as(name: str) -> str | None:
    base = re.sub(r"_(bucket|sum|count)$", "", name)
    if base in METRICS and METRICS[base].kind == "histogram" and base != name:
        return base
    return name if name in METRICS else None


def test_every_name_is_declared_with_its_labels() -> None:
    for expr in expressions():
        for name, matchers in re.findall(r"(fathom_\w+)(?:\{([^}]*)\})?", expr):
            base = declared_as(name)
            assert base is not None, (name, expr)
            labels = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", matchers))
            assert labels <= set(METRICS[base].labels) | OF_TARGETS, (name, labels)
            for label, value in re.findall(r'(\w+)\s*=\s*"(\w+)"', matchers):
                known = METRICS[base].labels.get(label)
                assert not known or value in known, (name, label, value)


def test_every_metric_is_shown_or_watched() -> None:
    marks = [note["expr"] for board in BOARDS.values() for note in dashboard(board)["annotations"]["list"]]
    used = {declared_as(name) for expr in (*expressions(), *marks) for name in re.findall(r"fathom_\w+", expr)}
    assert set(METRICS) - used == set()
