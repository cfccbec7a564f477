"""Layouts of published datasets, one module each: `fathom data pack --layout NAME`.

A module defines one class that derives from `base.Importer`. Adding a layout is one file here, its test and a line in
docs/importers.md.
"""

from __future__ import annotations

import importlib
import pkgutil

from dataio.importers.base import Importer
from dataio.spec import DataError

_NO_LAYOUTS = ("base", "formats")


def layout_names() -> list[str]:
    """The names of all layouts: the modules here."""
    return sorted(m.name.replace("_", "-") for m in pkgutil.iter_modules(__path__) if m.name not in _NO_LAYOUTS)


def get_importer(name: str) -> type[Importer]:
    """The importer of a layout. DataError, naming those there are."""
    if name not in layout_names():
        raise DataError(f"layout is {name!r}: there are {', '.join(layout_names())}")
    module = importlib.import_module(f"{__name__}.{name.replace('-', '_')}")
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Importer) and value.__module__ == module.__name__
    ]
    (importer,) = found
    return importer
