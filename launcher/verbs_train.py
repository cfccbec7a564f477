"""`fathom train`, `predict` and `quickstart`."""

from __future__ import annotations

import json
import os
from typing import Annotated, Any

import typer

from launcher import options
from launcher.options import ConfigArgument, OverridesOption, PositionOption, PresetOption


def register(app: typer.Typer) -> None:
    """Adds the verbs."""
    for verb in (quickstart, train, predict):
        app.command(verb.__name__)(verb)


def train(
    config: ConfigArgument,
    overrides: OverridesOption = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run's newest whole checkpoint.")] = False,
    begin_or_resume: Annotated[
        bool, typer.Option("--begin-or-resume", help="As --resume where there is a run, as without it otherwise.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Check invariants before and after every step; slow.")
    ] = False,
    skip_samples: Annotated[
        list[str] | None,
        typer.Option(metavar="FROM:TO", help="Pass over these samples of the run's order; repeatable. See the docs."),
    ] = None,
) -> int:
    """Train a teacher, a student or an encoder, as the configuration's task says.

    Ctrl-C finishes the step, writes a checkpoint and exits with 130; SIGTERM likewise with 75.

    \b
    Example:
      fathom recipes show teacher-v1-vitl > teacher.yaml
      fathom train teacher.yaml --set steps=1000 --set cluster.workers=2
      fathom train teacher.yaml --set steps=1000 --set cluster.workers=2 --resume
    """
    from cluster.progress import Progress
    from cluster.stop import StopFlag, exit_status
    from trainer.config import read_config
    from trainer.config_train import TrainConfig

    stretches = [list(_stretch(text)) for text in skip_samples or ()]
    added = [f"data.skip_samples={json.dumps(stretches)}"] if stretches else []
    added += ["engine.debug=true"] if debug else []
    settings = read_config(TrainConfig, config, [*(overrides or []), *added])
    from trainer.folder import RunFolder
    from trainer.run import show_step
    from trainer.run import train as run

    notice = "finishing the step and writing a checkpoint; Ctrl-C again ends at once"
    flag = StopFlag(settings.recovery.grace_s, notice)
    with flag as stop, Progress(settings.name, settings.steps or None, "steps") as bar:
        outcome = run(
            settings,
            resume=None if begin_or_resume and not resume else resume,
            on_progress=show_step(bar),
            stop=stop,
            say=lambda line: typer.echo(line, err=True),
        )
    if bad := RunFolder(outcome.folder).quarantined().total():
        typer.echo(f"skipped {bad} bad samples; {outcome.folder}/quarantine.*.jsonl names them", err=True)
    if outcome.stopped:
        typer.echo(f"stopped at step {outcome.step} by {outcome.stopped}; go on with --resume", err=True)
        return exit_status(outcome.stopped)
    typer.echo(f"{outcome.step} steps done; weights in {outcome.weights}")
    return 0


def _stretch(text: str) -> tuple[int, int]:
    start, colon, stop = text.partition(":")
    if not (colon and start.isdecimal() and stop.isdecimal() and int(start) < int(stop)):
        raise typer.BadParameter(
            f"{text!r}: expected FROM:TO, two whole numbers of samples, for example 120000:121536",
            param_hint="--skip-samples",
        )
    return int(start), int(stop)


def predict(
    inputs: Annotated[list[str], typer.Argument(metavar="IMAGE|FOLDER...", help="Photographs, or folders of them.")],
    weights: Annotated[str, typer.Option(help="File or folder of a trained network.")],
    out: Annotated[str, typer.Option(help="Where the pictures go.")],
    preset: PresetOption = None,
    position_mode: PositionOption = None,
    input_size: Annotated[int, typer.Option(help="Shorter side the network sees, a multiple of 14.")] = 518,
    gpu: Annotated[bool, typer.Option("--gpu/--cpu", help="Run on the first GPU.")] = False,
) -> int:
    """Predict depth for photographs: X.png (image | prediction), X.depth.png (16 bit) and X.depth.json (its code) each.

    \b
    Example:
      fathom predict photos/ --weights runs/student/weights --out predictions
    """
    if input_size <= 0 or input_size % 14:
        raise typer.BadParameter(f"{input_size} is not a multiple of 14", param_hint="--input-size")
    from cluster.progress import Progress
    from trainer.predict import predict as run

    mode = options.position_mode(position_mode)
    with Progress("predict", None, "images") as bar:
        outcome = run(
            inputs,
            weights,
            out,
            preset=preset,
            position_mode=mode,
            input_size=input_size,
            device="cuda" if gpu else "cpu",
            on_progress=lambda done, total: bar.update(done, of=total),
        )
    for file, reason in outcome.skipped.items():
        typer.echo(f"skipped {file}: {reason}", err=True)
    typer.echo(f"{len(outcome.written)} pictures in {out}")
    return 0


def quickstart(
    out: Annotated[str, typer.Option(help="Folder of everything the quickstart makes.")] = "quickstart",
    seed: Annotated[int, typer.Option(min=0, help="Scenes, initial weights and order.")] = 1,
    ladder: Annotated[bool, typer.Option("--ladder", help="Train the four control rows too.")] = False,
    encoder: Annotated[str | None, typer.Option(help="A DINOv2 file to start from and align to.")] = None,
    preset: Annotated[str, typer.Option(help="The network; with --encoder the one that fits it.")] = "tiny",
    scale: Annotated[
        float, typer.Option(min=0.001, max=100, help="Times the images and steps; for a quick look.")
    ] = 1.0,
) -> int:
    """The whole chain on this machine: scenes, teacher, pseudo-labels, student, evaluation, report.html.

    Four to seven minutes on 2 CPU cores. An interrupted quickstart goes on where it stopped when called again.

    \b
    Example:
      fathom quickstart --out quickstart
      fathom quickstart --out ladder --ladder
    """
    from cluster.stop import StopFlag, Stopped, exit_status
    from trainer.quickstart import Request, Sizes, table, verdict
    from trainer.quickstart import quickstart as run

    sizes = Sizes()
    if scale != 1.0:
        counts = {name: max(16, round(getattr(sizes, name) * scale)) for name in ("labelled", "wide", "evaluation")}
        sizes = Sizes(**counts, steps=scale)
    request = Request(
        out=os.path.abspath(out), recipes=_recipes(), seed=seed, ladder=ladder, encoder_weights=encoder, preset=preset,
        sizes=sizes,
    )  # fmt: skip
    with StopFlag(notice="stopping where the work can go on; Ctrl-C again ends at once") as stop:
        try:
            results = run(request, stop)
        except Stopped as stopped:
            typer.echo(f"stopped by {stopped.reason}; the same command goes on from here", err=True)
            return exit_status(stopped.reason)
    header, rows = table(results)
    widths = [max(len(str(row[i])) for row in [header, *rows]) for i in range(len(header))]
    for row in [header, *rows]:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        typer.echo("  ".join([row[0].ljust(widths[0]), *cells[1:]]))
    typer.echo(verdict(results, ladder))
    typer.echo(f"{sum(results.seconds.values()):.0f} s in all; report: {os.path.join(out, 'report.html')}")
    return 0


def _recipes() -> dict[str, Any]:
    import yaml

    from launcher import recipes

    return {name: yaml.safe_load(recipes.read(f"quickstart-{name}")) for name in ("encoder", "teacher", "student")}
