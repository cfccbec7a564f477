"""`fathom plan`: what a command would take, and everything that is wrong with it."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from launcher.options import ConfigArgument, OverridesOption

if TYPE_CHECKING:
    from trainer.plan import Plan


def register(app: typer.Typer) -> None:
    """Adds the verb."""
    app.command("plan")(plan)


def plan(
    verb: Annotated[str, typer.Argument(metavar="VERB", help="train.")],
    config: ConfigArgument,
    overrides: OverridesOption = None,
    rate: Annotated[
        float | None, typer.Option(min=1e-9, help="Images a second of all ranks together, measured elsewhere.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> int:
    """What a command would take, before any of it is spent: ranks, batches, memory, disk, time; all that is wrong.

    Nothing is started, and no weights are read. Exit status 2 when something is wrong.

    \b
    Example:
      fathom plan train student.yaml --set cluster.workers=32 --rate 2400
    """
    if verb != "train":
        raise typer.BadParameter(f"{verb!r}; train", param_hint="VERB")
    from trainer.config import read_config
    from trainer.config_train import TrainConfig

    settings = read_config(TrainConfig, config, overrides or [])
    from trainer.plan import plan_train

    found = plan_train(settings, rate)
    if as_json:
        typer.echo(json.dumps(asdict(found), indent=1, default=str))
    else:
        show(found)
    return 2 if found.problems else 0


def show(found: Plan) -> None:
    """The plan as a table; problems on stderr, a line each."""
    width = max(len(name) for section in found.sections.values() for name in section)
    for title, section in found.sections.items():
        typer.echo(title)
        for name, value in section.items():
            typer.echo(f"  {name:<{width}}  {value}")
    for note in found.notes:
        typer.echo(f"({note})")
    for problem in found.problems:
        typer.echo(f"error: {problem}", err=True)
