"""`fathom doctor` and `fathom recipes`: what this machine and this installation offer."""

from __future__ import annotations

from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Adds `doctor`, `recipes list` and `recipes show`."""
    app.command("doctor")(doctor)
    group = typer.Typer(help="Complete, commented configurations.", no_args_is_help=True, rich_markup_mode=None)
    group.command("list")(list_recipes)
    group.command("show")(show_recipe)
    app.add_typer(group, name="recipes")


def doctor() -> int:
    """Check what this machine has, what is missing, and what to do about it. Exits with 1 when something fails.

    \b
    Example:
      fathom doctor
    """
    from launcher.doctor import doctor_command

    return doctor_command()


def list_recipes() -> None:
    """List the recipes that ship with fathom, one line each.

    \b
    Example:
      fathom recipes list
    """
    from launcher import recipes

    names = recipes.names()
    width = max(map(len, names), default=0)
    for name in names:
        typer.echo(f"{name:<{width}}  {recipes.summary(name)}".rstrip())


def show_recipe(name: Annotated[str, typer.Argument(help="A name from `fathom recipes list`.")]) -> None:
    """Print a recipe, ready to be saved and edited.

    \b
    Example:
      fathom recipes show quickstart-teacher > my.yaml
    """
    from launcher import recipes

    typer.echo(recipes.read(name), nl=False)
