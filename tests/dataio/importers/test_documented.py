"""docs/importers.md has a row for every layout, and the row says what the class says."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import get_args

import pytest

from dataio.importers import get_importer, layout_names
from dataio.importers.base import Importer, parse_options

PAGE = (Path(__file__).parents[3] / "docs" / "importers.md").read_text(encoding="utf-8")
COLUMNS = ["layout", "what it reads", "quantity and unit", "options", "defined at", "not verified"]


def wanted(importer: type[Importer]) -> tuple[str, str, str]:
    """The cells `options`, `defined at` and `not verified`: options with their defaults and (other choices)."""
    options = []
    for name, field in importer.Options.model_fields.items():
        shown = "" if field.default in ("", None, ()) else f" = {field.default}"
        words = [choice for kind in (field.annotation, *get_args(field.annotation)) for choice in get_args(kind)]
        others = [word for word in words if isinstance(word, str) and word != field.default]
        options.append(f"`{name}`{shown}" + (f" ({', '.join(others)})" if others else ""))
    return "; ".join(options), importer.definition, importer.unverified.replace("|", r"\|")


def table() -> list[list[str]]:
    """The cells of each line of the page's first table, its head included, the ruler left out."""
    lines = PAGE[PAGE.index("| layout |") :].split("\n\n")[0].splitlines()
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return [cells[0], *cells[2:]]


def commands() -> list[list[str]]:
    """The words of each example that packs."""
    return [shlex.split(line, comments=True) for line in PAGE.splitlines() if line.startswith("fathom data pack ")]


def test_the_table_has_a_row_for_each_layout() -> None:
    head, *rows = table()
    assert head == COLUMNS
    assert [row[0] for row in rows] == layout_names()
    assert all(len(row) == len(COLUMNS) and row[1] for row in rows)


@pytest.mark.parametrize("name", layout_names())
def test_a_row_says_what_the_class_says(name: str) -> None:
    importer = get_importer(name)
    _, _, quantity, *cells = next(row for row in table()[1:] if row[0] == name)
    assert quantity.split(",")[0] == importer.quantity.removesuffix("_m")
    assert tuple(cells) == wanted(importer)


@pytest.mark.parametrize("words", commands(), ids=lambda words: words[4])
def test_an_example_has_a_layout_and_options_that_there_are(words: list[str]) -> None:
    after = dict(zip(words[5::2], words[6::2], strict=True)) if "--layout" in words else {}
    importer = get_importer(after.get("--layout", "folder"))
    given = [value.split("=", 1) for flag, value in zip(words[5::2], words[6::2], strict=True) if flag == "-o"]
    assert parse_options(importer, dict(given))
    assert set(words[5::2]) <= {"--layout", "-o"}
