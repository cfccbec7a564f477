"""`fathom data synth|pack|layouts|check|show`: make and look at datasets."""

from __future__ import annotations

from typing import Annotated, Any

import typer


def register(app: typer.Typer) -> None:
    """Adds the group."""
    group = typer.Typer(help="Make and look at datasets.", no_args_is_help=True, rich_markup_mode=None)
    for verb in (synth, pack, layouts, check, show):
        group.command(verb.__name__)(verb)
    app.add_typer(group, name="data")


def synth(
    out: Annotated[str, typer.Argument(help="Folder of the new dataset.")],
    domain: Annotated[str, typer.Option(help="labelled or wide: how much the scenes vary.")] = "labelled",
    count: Annotated[int, typer.Option(min=1, help="Scenes.")] = 800,
    size: Annotated[int, typer.Option(min=14, help="Pixels of a side.")] = 112,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    labels: Annotated[bool, typer.Option("--labels/--no-labels", help="Pack the exact depth too.")] = True,
    workers: Annotated[int, typer.Option(min=1, help="Processes.")] = 1,
    shard_samples: Annotated[int, typer.Option(min=1, help="Scenes of a shard; whole shards outlive Ctrl-C.")] = 500,
) -> int:
    """Render synthetic scenes with exact depth and pack them as a dataset. The same call resumes.

    \b
    Example:
      fathom data synth data/labelled --domain labelled --count 800
      fathom data synth data/wide --domain wide --count 4000 --no-labels
    """
    from dataio.pack_synth import pack_synth

    with _bar("render") as (bar, stop):
        report = pack_synth(
            domain, out, seed=seed, count=count, size=size, labelled=labels, samples_per_shard=shard_samples,
            workers=workers, progress=_watching(bar, stop),
        )  # fmt: skip
    typer.echo(f"{out}: {report}")
    return 0


def pack(
    source: Annotated[str, typer.Argument(help="Folder (or file) that holds the data.")],
    out: Annotated[str, typer.Argument(help="Folder or URL of the new dataset.")],
    layout: Annotated[str, typer.Option(help="Whose layout it has; `fathom data layouts` lists them.")] = "folder",
    role: Annotated[str | None, typer.Option(help="Of a folder: labelled, or unlabelled (the default).")] = None,
    name: Annotated[str | None, typer.Option(help="Default: the source's name.")] = None,
    depth_scale: Annotated[
        float | None, typer.Option(help="Metres per code of the 16-bit depth maps, where the layout does not say.")
    ] = None,
    depth_scale_of: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN=SCALE", help="Another scale for matching files, e.g. 'tum_*=0.0002'; repeatable."
        ),
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option("--option", "-o", metavar="NAME=VALUE", help="Of the layout; repeatable.")
    ] = None,
    sky: Annotated[
        str | None,
        typer.Option(metavar="MODULE:FUNCTION", help="Finds the sky of photographs that come without a mask."),
    ] = None,
    shard_mib: Annotated[int, typer.Option(min=1, help="MiB of a shard.")] = 256,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes. Default: one a processor.")] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Delete a half-made dataset and start anew.")] = False,
) -> int:
    """Pack photographs and depth maps as WebDataset shards; images are copied, never re-encoded. The same call resumes.

    What cannot be used is skipped and named, here and in pack_report.json.

    \b
    Example:
      fathom data pack photos data/photos
      fathom data pack rgbd data/rgbd --role labelled --depth-scale 0.001 --depth-scale-of 'tum_*=0.0002'
      fathom data pack vkitti data/vkitti --layout vkitti2 -o camera=0
    """
    import os

    from cluster.machine import whole_cpus
    from dataio.importers import get_importer
    from dataio.importers.base import parse_options
    from dataio.pack import pack as pack_dataset

    importer = get_importer(layout)
    options: dict[str, Any] = dict(_option(item) for item in option or ())
    if layout == "folder":
        options.setdefault("role", "unlabelled")
    for field, value in (("role", role), ("depth_scale", depth_scale)):
        if value is not None:
            options[field] = value
    if depth_scale_of:
        options["overrides"] = tuple(_scale(item) for item in depth_scale_of)
    found = importer(source, parse_options(importer, options))
    with _bar("pack") as (bar, stop):
        report = pack_dataset(
            found,
            out,
            name=name or os.path.splitext(os.path.basename(os.path.abspath(source)))[0],
            shard_bytes=shard_mib << 20,
            sky=sky,
            workers=workers or whole_cpus(),
            progress=_watching(bar, stop),
            restart=restart,
        )
    typer.echo(f"{out}: {report}")
    return 0


def layouts() -> int:
    """List the layouts that `fathom data pack --layout` reads, with their options.

    \b
    Example:
      fathom data layouts
    """
    from dataio.importers import get_importer, layout_names

    for name in layout_names():
        importer = get_importer(name)
        options = ", ".join(importer.Options.model_fields)
        typer.echo(
            f"{name:14} {(importer.__doc__ or '').splitlines()[0]}" + (f" Options: {options}." if options else "")
        )
    return 0


def check(
    dataset: Annotated[str, typer.Argument(help="Folder or URL of a dataset.")],
    duplicates: Annotated[bool, typer.Option("--duplicates", help="Look for pictures that are there twice.")] = False,
    distance: Annotated[
        int, typer.Option(min=0, max=16, help="Bits of 128 that duplicates' hashes may differ in.")
    ] = 2,
    checksums: Annotated[bool, typer.Option("--checksums", help="Compare the shards with SHA256SUMS.")] = False,
    quarantine: Annotated[
        bool,
        typer.Option("--quarantine", help="Write quarantine.jsonl into the dataset, for streams."),
    ] = False,
    report: Annotated[str | None, typer.Option(help="Write all findings there, as JSON.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes. Default: one a processor.")] = None,
) -> int:
    """Read every sample once: counts, sizes, value ranges, what cannot be used and why.

    Exit status 1 when something cannot be used and --quarantine was not given.

    \b
    Example:
      fathom data check data/photos --duplicates --quarantine
    """

    from cluster import storage
    from cluster.machine import whole_cpus
    from dataio.check import check_dataset, write_quarantine

    with _bar("check") as (bar, stop):
        found = check_dataset(
            dataset,
            workers=workers or whole_cpus(),
            distance=distance if duplicates else None,
            checksums=checksums,
            progress=_watching(bar, stop),
        )
    typer.echo(str(found))
    if report is not None:
        storage.atomic_write(report, found.to_json())
    if quarantine:
        typer.echo(f"{len(found.quarantine())} samples listed in {write_quarantine(found)}")
        return 1 if found.changed else 0
    return 1 if found.bad or found.changed else 0


def show(
    dataset: Annotated[str, typer.Argument(help="Folder or URL of a dataset.")],
    out: Annotated[str, typer.Option(help="The picture to write.")] = "show.png",
    count: Annotated[int, typer.Option(min=1, help="Samples.")] = 8,
    seed: Annotated[int, typer.Option(min=0, help="Which samples.")] = 0,
    labels: Annotated[str | None, typer.Option(help="A label sidecar to show in place of the depth.")] = None,
) -> int:
    """Draw a contact sheet: photograph, coloured depth, histogram of random samples.

    \b
    Example:
      fathom data show data/rgbd --out rgbd.png --count 4
    """
    from dataio.show import contact_sheet, save

    save(contact_sheet(dataset, count, seed, labels), out)
    typer.echo(f"written to {out}")
    return 0


def _scale(item: str) -> tuple[str, float]:
    pattern, equals, text = item.rpartition("=")
    try:
        scale = float(text)
    except ValueError:
        scale = 0.0
    if not equals or not pattern or scale <= 0:
        raise typer.BadParameter(
            f"{item!r}: expected PATTERN=SCALE, for example 'tum_*=0.0002'", param_hint="--depth-scale-of"
        )
    return pattern, scale


def _option(item: str) -> tuple[str, str]:
    name, equals, value = item.partition("=")
    if not equals or not name:
        raise typer.BadParameter(f"{item!r}: expected NAME=VALUE, for example split=train", param_hint="--option")
    return name, value


def _bar(title: str) -> Any:
    import contextlib

    from cluster.progress import Progress
    from cluster.stop import StopFlag

    @contextlib.contextmanager
    def both() -> Any:
        with StopFlag() as stop, Progress(title, None, "images") as bar:
            yield bar, stop

    return both()


def _watching(bar: Any, stop: Any) -> Any:
    from cluster.stop import exit_status

    def on_progress(done: int, total: int) -> None:
        if stop.reason:
            typer.echo(f"stopped by {stop.reason} after {done} of {total}; the same command goes on", err=True)
            raise typer.Exit(exit_status(stop.reason))
        bar.update(done, of=total)

    return on_progress
