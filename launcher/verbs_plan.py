"""`fathom plan`: what a command would take, and everything that is wrong with it."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from trainer.plan import Plan


def register(app: typer.Typer) -> None:
    """Adds the verb."""
    # Options that are not plan's own are the verb's.
    app.command("plan", context_settings={"ignore_unknown_options": True})(plan)


def plan(
    verb: Annotated[
        list[str], typer.Argument(metavar="VERB ...", help="train, label run or evaluate, with its arguments.")
    ],
    rate: Annotated[
        float | None, typer.Option(help="Images a second of all ranks together, measured elsewhere.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> int:
    """What a command would take, before any of it is spent: ranks, batches, memory, disk, time; all that is wrong.

    Nothing is started. Exit status 2 when something is wrong.

    \b
    Example:
      fathom plan train student.yaml --set cluster.workers=32 --rate 2400
      fathom plan label run data/photos --weights runs/teacher/weights --workers 8
      fathom plan evaluate evaluate.yaml
    """
    from launcher.parsing import NotAVerb, parsed

    if rate is not None and not 0 < rate < math.inf:
        raise typer.BadParameter(f"{rate:g}; a number above 0", param_hint="--rate")
    words = verb[: 2 if any(name.startswith(f"{verb[0]} ") for name in PLANNED) else 1]
    name = " ".join(words)
    if name not in PLANNED:
        raise NotAVerb(f"VERB: {name!r} is none that can be planned; {', '.join(PLANNED)}")
    found = PLANNED[name](parsed(verb)[1], rate)
    if as_json:
        typer.echo(json.dumps(asdict(found), indent=1, default=str))
    else:
        show(found)
    return 2 if found.problems else 0


def _train(given: dict[str, Any], rate: float | None) -> Plan:
    from trainer.config_train import TrainConfig
    from trainer.plan import Plan, plan_train
    from trainer.salvage import salvage_file

    read = salvage_file(TrainConfig, given["config"], given["overrides"] or [])
    if read.config is None:
        return Plan(problems=read.problems)
    return plan_train(read.config, rate, problems=read.problems, wrong=read.wrong)


def _label(given: dict[str, Any], rate: float | None) -> Plan:
    from launcher.verbs_label import values_of
    from trainer.config_label import LabelConfig
    from trainer.plan import Plan
    from trainer.salvage import salvage

    read = salvage(LabelConfig, values_of(**given))
    if read.config is None:
        return Plan(problems=read.problems)
    from trainer.plan_label import plan_label

    return plan_label(read.config, rate, problems=read.problems, wrong=read.wrong)


def _evaluate(given: dict[str, Any], rate: float | None) -> Plan:
    from trainer.config_evaluate import EvaluateConfig
    from trainer.plan import Plan
    from trainer.salvage import salvage_file

    read = salvage_file(EvaluateConfig, given["config"], given["overrides"] or [])
    if read.config is None:
        return Plan(problems=read.problems)
    from trainer.plan_evaluate import plan_evaluate

    return plan_evaluate(read.config, rate, problems=read.problems, wrong=read.wrong)


PLANNED = {"train": _train, "label run": _label, "evaluate": _evaluate}


def show(found: Plan) -> None:
    """The plan as a table; problems on stderr, a line each."""
    told = {title: [shown(*entry) for entry in section.items()] for title, section in found.sections.items()}
    width = max((len(name) for lines in told.values() for name, _ in lines), default=0)
    for title, lines in told.items():
        typer.echo(title.replace("_", " "))
        for name, text in lines:
            typer.echo(f"  {name:<{width}}  {text}")
    for note in found.notes:
        typer.echo(f"({note})")
    for problem in found.problems:
        typer.echo(f"error: {problem}", err=True)


def shown(name: str, value: Any) -> tuple[str, str]:
    """A value for people: what it is called, and the value in the unit that its name ends with."""
    from trainer.plan import duration, gib

    for unit, convert in (("_bytes", gib), ("_seconds", duration)):
        if name.endswith(unit):
            return name.removesuffix(unit).replace("_", " "), "?" if value is None else convert(value)
    if isinstance(value, dict):
        nested = any(isinstance(one, dict) for one in value.values())
        between, after = ("; ", ": ") if nested else (", ", " ")
        return name, between.join(after.join(shown(*entry)) for entry in value.items())
    if isinstance(value, list):
        return name.replace("_", " "), ", ".join(map(str, value))
    text = "?" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
    return name.replace("_", " "), text
