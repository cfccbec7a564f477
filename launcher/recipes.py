"""The recipes in the package: complete configurations as commented YAML files."""

from __future__ import annotations

import difflib
from importlib import resources
from importlib.resources.abc import Traversable


class RecipeError(ValueError):
    """No recipe of that name. Ends a command with status 2."""

    exit_status = 2


def folder() -> Traversable:
    """Where the recipes lie: `launcher/recipes` of the checkout or of the installed package."""
    return resources.files("launcher") / "recipes"


def names() -> list[str]:
    """The names of all recipes, sorted."""
    where = folder()
    if not where.is_dir():
        return []
    return sorted(entry.name.removesuffix(".yaml") for entry in where.iterdir() if entry.name.endswith(".yaml"))


def read(name: str) -> str:
    """A recipe's text. `name` may end in .yaml."""
    wanted = name.removesuffix(".yaml")
    known = names()
    if wanted not in known:
        near = difflib.get_close_matches(wanted, known, n=1)
        guess = f"did you mean '{near[0]}'?" if near else f"there are: {', '.join(known) or 'none'}"
        raise RecipeError(f"no recipe '{wanted}'; {guess}")
    return (folder() / f"{wanted}.yaml").read_text(encoding="utf-8")


def summary(name: str) -> str:
    """The first comment line of a recipe: what it is for."""
    for line in read(name).splitlines():
        if line.startswith("#") and line.strip("# "):
            return line.strip("# ")
        if line.strip() and not line.startswith("#"):
            break
    return ""
