"""`fathom evaluate`: weights against labelled datasets."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from launcher.options import ConfigArgument, OverridesOption

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trainer.evaluate_write import DatasetResult

_SHOWN = ("abs_rel", "delta1", "rmse", "accuracy")


def register(app: typer.Typer) -> None:
    """Adds the verb."""
    app.command("evaluate")(evaluate)


def evaluate(config: ConfigArgument, overrides: OverridesOption = None) -> int:
    """Compare weights with labelled datasets, under the protocols of the literature.

    The configuration has `weights:` and `datasets:`, paths or {path: ..., benchmark: nyu}; see docs/evaluation.md.

    \b
    Example:
      fathom evaluate evaluate.yaml --set out=evaluation/teacher --set cluster.workers=2
    """
    from cluster.progress import Progress
    from cluster.stop import StopFlag, Stopped, exit_status
    from trainer.config import read_config
    from trainer.config_evaluate import EvaluateConfig

    settings = read_config(EvaluateConfig, config, overrides or [])
    from trainer.evaluate import evaluate as run

    notice = "stopping; nothing is written; Ctrl-C again ends at once"
    with StopFlag(notice=notice) as stop, Progress("evaluate", None, "images") as bar:
        try:
            results = run(settings, on_progress=lambda done, total: bar.update(done, of=total), stop=stop)
        except Stopped as stopped:
            typer.echo(f"stopped by {stopped.reason}; nothing was written", err=True)
            return exit_status(stopped.reason)
    _show(results)
    typer.echo(f"written to {settings.out}: evaluation.md, evaluation.json, images.jsonl, sheet.png, worst.png")
    return 0 if any(result.images for result in results) else 1


def _show(results: Sequence[DatasetResult]) -> None:
    for result in results:
        name = f" ({result.benchmark})" if result.benchmark else ""
        typer.echo(f"{result.dataset}{name}: {result.images} images")
        for protocol, means in result.means.items():
            values = "  ".join(f"{metric} {means[metric]:.4f}" for metric in _SHOWN if metric in means)
            typer.echo(f"  {protocol:<18} {values}")
        if result.outside:
            typer.echo(f"  {result.outside} samples are not part of the benchmark")
        for reason, keys in result.skipped.items():
            typer.echo(f"  skipped {len(keys)}: {reason} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})")
