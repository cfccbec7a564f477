"""What a dashboard consists of, as data: Grafana's JSON (grafana.py) and our own page (page.py) are made of it.

Expressions are PromQL with three variables: `$run` and `$node`, regular expressions of label values, and
`$__rate_interval`, a range over which a rate has enough samples.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Unit = Literal["", "seconds", "bytes", "bytes/s", "ratio", "1/s", "images/s"]
# lines: over time; stack: parts of a whole over time; stat: the latest value of each series, large
Kind = Literal["lines", "stack", "stat"]

VARIABLES = ("run", "node")


@dataclass(frozen=True, kw_only=True)
class Query:
    """An expression, and how its series are called: `{{label}}` stands for a label's value."""

    expr: str
    legend: str = "{{run}}"


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One picture. `help`: what it says and what to do about it. `low` and `high`: ends of the axis, None for those of
    the data. `name`: of a stat whose legend is the message (a state), not its value. `empty`: when there may be
    nothing to show, in words; "" where there always is something while a run of the dashboard's kind is on."""

    title: str
    help: str
    queries: tuple[Query, ...]
    unit: Unit = ""
    kind: Kind = "lines"
    low: float | None = 0.0
    high: float | None = None
    name: bool = False
    empty: str = ""


@dataclass(frozen=True, kw_only=True)
class Row:
    """Panels that answer one question."""

    question: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True, kw_only=True)
class Board:
    """A dashboard. `key`: its name in addresses and files. `roles`: of whose runs one chooses."""

    key: str
    title: str
    roles: tuple[str, ...]
    rows: tuple[Row, ...]

    def panels(self) -> dict[str, Panel]:
        """By a key that is unique in this dashboard: `ROW-PLACE`, from 0."""
        return {
            f"{number}-{place}": panel
            for number, row in enumerate(self.rows)
            for place, panel in enumerate(row.panels)
        }


def bound(expr: str, values: Mapping[str, str], window: str) -> str:
    """The expression with regular expressions for `$run` and `$node` (".*" where `values` has none) and `window`, such
    as "20s", for `$__rate_interval`. Values may hold any character."""
    texts = {name: _in_quotes(values.get(name, ".*")) for name in VARIABLES}
    texts["__rate_interval"] = window
    return re.sub(rf"\$({'|'.join(texts)})\b", lambda found: texts[found[1]], expr)


def _in_quotes(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def exactly(value: str) -> str:
    """A regular expression of Prometheus (RE2) for one value."""
    return re.sub(r"([\\.+*?()|\[\]{}^$])", r"\\\1", value)
