"""The command `fathom`: one Typer app, put together from the `verbs_*.py` beside this file.

A module `verbs_NAME.py` has a function `register(app)` that adds its verbs. It imports nothing heavy at module level:
every invocation, `--help` too, imports all of them.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import sys
from pathlib import Path
from typing import NoReturn

import typer
from typer.core import TyperGroup

import launcher
from launcher.errors import run_main

# The order of the design's section 8, which is the order a newcomer needs them in.
ORDER = (
    "quickstart", "data", "train", "label", "evaluate", "predict", "weights", "report", "plan", "submit", "jobs",
    "monitor", "recipes", "doctor",
)  # fmt: skip


class _Ordered(TyperGroup):
    """Lists the verbs in the order of `ORDER`, others last."""

    def list_commands(self, ctx: object) -> list[str]:
        rank = {name: place for place, name in enumerate(ORDER)}
        return sorted(self.commands, key=lambda name: (rank.get(name, len(ORDER)), name))


def build_app() -> typer.Typer:
    """The app with the verbs of every `launcher/verbs_*.py`."""
    app = typer.Typer(
        name="fathom",
        cls=_Ordered,
        help="Train monocular depth foundation models: teacher, pseudo-labels, student. Start with: fathom quickstart",
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
    )
    for module in sorted(info.name for info in pkgutil.iter_modules(launcher.__path__)):
        if module.startswith("verbs_"):
            importlib.import_module(f"launcher.{module}").register(app)
    return app


def _find_own_tools() -> None:
    """Puts this environment's programs on PATH: DeepSpeed looks for `ninja` there, activated or not."""
    own = str(Path(sys.executable).parent)
    path = os.environ.get("PATH", os.defpath)
    if own not in path.split(os.pathsep):
        os.environ["PATH"] = own + os.pathsep + path


def main() -> NoReturn:
    """The console script."""
    _find_own_tools()
    run_main(build_app())


if __name__ == "__main__":
    main()
