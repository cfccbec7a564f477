"""`fathom label run|status`: offline pseudo-labelling."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated, Any

import typer

from launcher import options
from launcher.options import PositionOption, PresetOption

if TYPE_CHECKING:
    from trainer.config_label import LabelConfig


def register(app: typer.Typer) -> None:
    """Adds the group."""
    group = typer.Typer(help="Pseudo-label a dataset with a teacher.", no_args_is_help=True, rich_markup_mode=None)
    for verb in (run, status):
        group.command(verb.__name__)(verb)
    app.add_typer(group, name="label")


def run(
    dataset: Annotated[str, typer.Argument(help="Folder or URL of the dataset to label.")],
    weights: Annotated[str, typer.Option(help="The teacher: file or folder of a trained network.")],
    out: Annotated[str | None, typer.Option(help="Folder of sidecars; default: labels/ inside the dataset.")] = None,
    preset: PresetOption = None,
    position_mode: PositionOption = None,
    input_size: Annotated[int, typer.Option(help="Shorter side the teacher sees, a multiple of 14.")] = 518,
    flip: Annotated[bool, typer.Option("--flip/--no-flip", help="Average with the mirror image's prediction.")] = True,
    precision: Annotated[str, typer.Option(help="fp32 or bf16.")] = "fp32",
    batch: Annotated[int, typer.Option(min=1, help="Images per forward pass.")] = 8,
    workers: Annotated[int, typer.Option(min=1, help="Actors: one per GPU, or per some CPU cores.")] = 1,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of one actor.")] = 1,
    gpu: Annotated[bool, typer.Option("--gpu/--cpu", help="One GPU per actor.")] = False,
    address: Annotated[str | None, typer.Option(help="A Ray cluster; default: this machine.")] = None,
) -> int:
    """Label every shard that is not labelled yet; prints the sidecar's folder, which a student's configuration names.

    The folder's name is a digest of teacher, dataset and settings: labels of two kinds never mix. Ctrl-C finishes the
    shards in hand; the same command goes on.

    \b
    Example:
      fathom label run data/photos --weights runs/teacher/weights --workers 2
    """
    from cluster.progress import Progress
    from cluster.stop import StopFlag, exit_status

    config = config_of(
        dataset=dataset, weights=weights, out=out, preset=preset, position_mode=position_mode, input_size=input_size,
        flip=flip, precision=precision, batch=batch, workers=workers, threads=threads, gpu=gpu, address=address,
    )  # fmt: skip
    from trainer.labelling import run_labelling

    notice = "finishing the shards in hand; Ctrl-C again ends at once"
    with StopFlag(notice=notice) as stop, Progress("label", None, "shards") as bar:
        outcome = run_labelling(config, on_shard=lambda done, total, entry: bar.update(done, of=total), stop=stop)
    if outcome.failed:
        typer.echo(
            f"{outcome.failed} of {outcome.images} images have no label; `fathom label status` says why", err=True
        )
    if outcome.stopped:
        typer.echo(f"stopped by {outcome.stopped} after {outcome.shards} shards; the same command goes on", err=True)
        return exit_status(outcome.stopped)
    typer.echo(outcome.folder)
    return 0


def config_of(**given: Any) -> LabelConfig:
    """The configuration that the parameters of `label run` make. Raises ConfigError."""
    from trainer.config import parse_config
    from trainer.config_label import LabelConfig

    options.position_mode(given["position_mode"])
    return parse_config(LabelConfig, values_of(**given), source="label run")


def values_of(**given: Any) -> dict[str, Any]:
    """The same before it is looked at."""
    from trainer.config import absolute_paths

    workers, threads, gpu, address = (given.pop(name) for name in ("workers", "threads", "gpu", "address"))
    given["cluster"] = {"workers": workers, "threads": threads, "use_gpu": gpu, "address": address}
    return absolute_paths(given)


def status(
    labels: Annotated[str, typer.Argument(help="A sidecar's folder, as `label run` printed it.")],
    dataset: Annotated[str | None, typer.Option(help="The labelled dataset, to see what is missing.")] = None,
) -> int:
    """Sum up the ledger of a sidecar: shards, images, failures by reason.

    \b
    Example:
      fathom label status data/photos/labels/0123456789abcdef --dataset data/photos
    """
    from dataio.dataset import Dataset
    from dataio.labels import LabelStore

    found = LabelStore.open(labels).status(Dataset.open(dataset) if dataset else None)
    typer.echo(f"{found.shards} shards, {found.samples} images, {found.bytes} bytes, {found.seconds:.0f} s of work")
    for reason, count in sorted(found.failures.items()):
        typer.echo(f"failed {count}: {reason}")
    if dataset:
        missing = ", ".join(os.path.basename(stem) for stem in found.missing[:10])
        typer.echo(f"missing shards: {len(found.missing)}{f' ({missing})' if missing else ''}")
    return 0
