"""`fathom report`: one page of what training runs left."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Adds the verb."""
    app.command("report")(report)


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders that `fathom train` made.")],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The page; default: RUN/report.html. Needed for several runs.")
    ] = None,
) -> int:
    """Show training runs as one HTML page: curves, evaluations, previews, configuration, what happened.

    The page needs no other file and no network. Runs that still train, failed or were killed have one as well; of
    several runs, curves lie over one another and the differences of their configurations are listed.

    \b
    Example:
      fathom report runs/teacher
      fathom report runs/student-a runs/student-b --out comparison.html
    """
    from trainer.report_run import write_report

    path = write_report([str(run) for run in runs], str(out) if out is not None else None)
    typer.echo(f"written to {path}")
    return 0
