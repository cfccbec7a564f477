"""`fathom plan`: what a command would take, and everything that is wrong with it."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from trainer.plan import Plan


def register(app: typer.Typer) -> None:
    """Adds the verb."""
    # Options that are not plan's own are the verb's.
    app.command("plan", context_settings={"ignore_unknown_options": True})(plan)


def plan(
    verb: Annotated[list[str], typer.Argument(metavar="VERB ...", help="train or label run, with its arguments.")],
    rate: Annotated[
        float | None, typer.Option(min=1e-9, help="Images a second of all ranks together, measured elsewhere.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> int:
    """What a command would take, before any of it is spent: ranks, batches, memory, disk, time; all that is wrong.

    Nothing is started. Exit status 2 when something is wrong.

    \b
    Example:
      fathom plan train student.yaml --set cluster.workers=32 --rate 2400
      fathom plan label run data/photos --weights runs/teacher/weights --workers 8
    """
    from launcher.parsing import NotAVerb, parsed

    words, given = parsed(verb)
    if words == ["train"]:
        from trainer.config import read_config
        from trainer.config_train import TrainConfig

        settings = read_config(TrainConfig, given["config"], given["overrides"] or [])
        from trainer.plan import plan_train

        found = plan_train(settings, rate)
    elif words == ["label", "run"]:
        from launcher.verbs_label import config_of

        labels = config_of(**given)
        from trainer.plan_label import plan_label

        found = plan_label(labels, rate)
    else:
        raise NotAVerb(f"VERB: {' '.join(words)!r} is none that can be planned; train, label run")
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
