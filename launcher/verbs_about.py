"""`fathom doctor` and `fathom recipes`: what this machine and this installation offer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

PATIENCE_S = 60.0


def register(app: typer.Typer) -> None:
    """Adds `doctor`, `recipes list` and `recipes show`."""
    app.command("doctor")(doctor)
    group = typer.Typer(help="Complete, commented configurations.", no_args_is_help=True, rich_markup_mode=None)
    group.command("list")(list_recipes)
    group.command("show")(show_recipe)
    app.add_typer(group, name="recipes")


def doctor(
    cluster: Annotated[
        bool, typer.Option("--cluster", help="Join a Ray cluster and check every node, and nodes with one another.")
    ] = False,
    address: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="With --cluster: of its Ray; default: RAY_ADDRESS.")
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="With --cluster: where runs are kept; default: runs, if it is here, else ."),
    ] = None,
    timeout: Annotated[
        float | None,
        typer.Option(min=1, help=f"With --cluster: seconds a node has to answer a question; default: {PATIENCE_S:g}."),
    ] = None,
    every_pair: Annotated[
        bool, typer.Option("--every-pair", help="With --cluster: of many nodes try each with all others, not with 16.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON list of findings.")] = False,
) -> int:
    """Check what this machine has, what is missing, and what to do about it. Exits with 1 when something fails.

    With --cluster, to be run on a machine of the cluster, the same of all its nodes: equal code and versions, devices,
    a folder that all share, clocks, and whether every two nodes can reach and sum up with each other.

    \b
    Example:
      fathom doctor
      fathom doctor --cluster --address 10.0.0.1:6379 --folder /shared/runs
    """
    if cluster:
        from launcher.doctor_survey import cluster_command

        return cluster_command(address, folder, PATIENCE_S if timeout is None else timeout, every_pair, as_json)
    alone = {"--address": address, "--folder": folder, "--timeout": timeout, "--every-pair": every_pair or None}
    for name, given in alone.items():
        if given is not None:
            raise typer.BadParameter("goes with --cluster", param_hint=name)
    from launcher.doctor import doctor_command

    return doctor_command(as_json)


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
