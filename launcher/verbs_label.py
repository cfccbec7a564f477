"""`fathom label run|status|verify|retry`: offline pseudo-labelling."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from launcher import options
from launcher.options import PositionOption, PresetOption

if TYPE_CHECKING:
    from trainer.config_label import LabelConfig
    from trainer.label_status import JobState
    from trainer.labelling import LabelOutcome

LabelsArgument = Annotated[str, typer.Argument(metavar="LABELS", help="A sidecar's folder, as `label run` printed it.")]
DatasetOption = Annotated[
    str | None, typer.Option("--dataset", help="The labelled dataset; default: the folder that labels/ lies in.")
]
WorkersOption = Annotated[
    int | None,
    typer.Option("--workers", min=1, help="At most; default: one per GPU, or per THREADS processors, memory allowing."),
]
ThreadsOption = Annotated[int, typer.Option("--threads", min=1, help="CPU threads of one worker.")]
AddressOption = Annotated[str | None, typer.Option("--address", help="A Ray cluster; default: this machine.")]
LeaseOption = Annotated[
    float, typer.Option("--lease", min=1, help="Seconds of silence after which a worker has lost its shard.")
]
MetricsHostOption = Annotated[
    str, typer.Option("--metrics-host", help="Where live metrics are served; 0.0.0.0: to all that reach it.")
]
TelemetryOption = Annotated[
    str | None,
    typer.Option(metavar="DIR", help="Announce metrics there, for `monitor up`; default: telemetry/ in local labels."),
]
_LOOPBACK = "127.0.0.1"
_SHOWN = 10
_GRACE_S = 25.0  # after a SIGTERM: most clusters give 30


def register(app: typer.Typer) -> None:
    """Adds the group."""
    group = typer.Typer(help="Pseudo-label a dataset with a teacher.", no_args_is_help=True, rich_markup_mode=None)
    for verb in (run, status, verify, retry):
        group.command(verb.__name__)(verb)
    app.add_typer(group, name="label")


def run(
    dataset: Annotated[str, typer.Argument(help="Folder or URL of the dataset to label.")],
    weights: Annotated[str, typer.Option(help="The teacher: file or folder of a trained network.")],
    out: Annotated[
        str | None, typer.Option(help="Folder or URL of sidecars; default: labels/ inside the dataset.")
    ] = None,
    preset: PresetOption = None,
    position_mode: PositionOption = None,
    input_size: Annotated[int, typer.Option(help="Shorter side the teacher sees, a multiple of 14.")] = 518,
    flip: Annotated[bool, typer.Option("--flip/--no-flip", help="Average with the mirror image's prediction.")] = False,
    quality: Annotated[
        str, typer.Option(help="Rate every label by how far predictions agree: off, flip or flip+scale.")
    ] = "off",
    precision: Annotated[str, typer.Option(help="fp32 or bf16.")] = "fp32",
    encoding: Annotated[str, typer.Option(help="png, npy (float16) or jxl.")] = "png",
    batch: Annotated[
        int | None, typer.Option(min=1, help="Images per forward pass; default: 1 on CPUs, 16 on GPUs.")
    ] = None,
    compile: Annotated[
        bool, typer.Option("--compile/--no-compile", help="torch.compile for the usual aspect ratios.")
    ] = False,
    workers: WorkersOption = None,
    threads: ThreadsOption = 1,
    gpu: Annotated[bool, typer.Option("--gpu/--cpu", help="One GPU per worker.")] = False,
    address: AddressOption = None,
    lease: LeaseOption = 60.0,
    metrics_host: MetricsHostOption = _LOOPBACK,
    telemetry: TelemetryOption = None,
) -> int:
    """Label every shard that is not labelled yet; prints the sidecar's folder, which a student's configuration names.

    The folder's name is a digest of teacher, dataset and settings: labels of two kinds never mix. Given again, or on
    another machine that sees the folder, the command goes on, or joins in. Ctrl-C finishes the shards in hand.

    --quality costs forward passes: flip one more (none with --flip), flip+scale another at three quarters of the size.

    \b
    Example:
      fathom label run data/photos --weights runs/teacher/weights --quality flip
    """
    config = config_of(
        dataset=dataset, weights=weights, out=out, preset=preset, position_mode=position_mode, input_size=input_size,
        flip=flip, quality=quality, precision=precision, encoding=encoding, batch=batch, compile=compile,
        workers=workers, threads=threads, gpu=gpu, address=address, lease=lease,
        metrics_host=metrics_host, telemetry=telemetry,
    )  # fmt: skip
    from trainer.labelling import run_labelling

    return _work(run_labelling, config)


def retry(
    labels: LabelsArgument,
    weights: Annotated[str, typer.Option(help="The same teacher that made the labels.")],
    dataset: DatasetOption = None,
    preset: PresetOption = None,
    reason: Annotated[
        list[str] | None, typer.Option(help="Only failures of this reason; repeatable. Default: all.")
    ] = None,
    workers: WorkersOption = None,
    address: AddressOption = None,
    lease: LeaseOption = 60.0,
    metrics_host: MetricsHostOption = _LOOPBACK,
    telemetry: TelemetryOption = None,
) -> int:
    """Label the samples that failed once more, and no others: after a repair of the dataset's files.

    Settings are those that the labels were made with. A shard is replaced as a whole; while that happens it is not
    there, so let no training read it meanwhile.

    \b
    Example:
      fathom label retry data/photos/labels/0123456789abcdef --weights runs/teacher/weights
    """
    from dataio.labels import LabelStore
    from trainer.label_retry import check_reasons, run_retry
    from trainer.labelling import config_again

    check_reasons(reason)
    cluster = {
        "workers": workers, "address": address, "lease_s": lease, "metrics_host": metrics_host,
        "telemetry": telemetry and _absolute(telemetry),
    }  # fmt: skip
    folder = LabelStore.open(_absolute(labels)).path
    config = config_again(folder, _dataset_of(folder, dataset), _absolute(weights), cluster, preset)

    def retried(config: LabelConfig, **given: Any) -> LabelOutcome:
        outcome = run_retry(config, folder, reasons=reason, **given)
        if not (outcome.shards or outcome.given_up or outcome.stopped):
            why = f" for {', '.join(reason)}" if reason else ""
            typer.echo(f"no sample has failed{why}: there is nothing to try again", err=True)
        return outcome

    return _work(retried, config)


def status(
    labels: LabelsArgument,
    dataset: DatasetOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> int:
    """How a sidecar stands: shards done, in hand and to do, failures by reason, rate, time left, machines.

    Reads the folder alone, so it may be asked anywhere, while the job runs or after.

    \b
    Example:
      fathom label status data/photos/labels/0123456789abcdef
    """
    import json
    from dataclasses import asdict

    from dataio.dataset import Dataset
    from dataio.labels import LabelStore
    from trainer.label_status import job_state

    store = LabelStore.open(labels)
    where = dataset or _around(labels)
    found = job_state(store, Dataset.open(where) if where else None)
    if as_json:
        typer.echo(json.dumps(asdict(found)))
        return 0
    for line in status_lines(found):
        typer.echo(line)
    return 0


def status_lines(found: JobState) -> list[str]:
    """For people."""
    from cluster.progress import duration_text

    done = found.status
    todo = "" if found.todo is None else f", {found.todo} to do"
    lines = [f"shards: {done.shards} done, {len(found.leased)} in hand{todo}; runs at work: {found.runs}"]
    failed = sum(done.failures.values(), 0)
    lines.append(f"images: {done.samples}, of which {failed} without a label; {done.bytes} bytes")
    lines += [f"failed {count}: {reason}" for reason, count in sorted(done.failures.items())]
    if found.images_per_second is not None:
        left = "" if found.left_s is None else f", {duration_text(found.left_s)} left"
        lines.append(f"rate: {found.images_per_second:.3g} images/s{left}")
    if done.quality is not None and any(done.quality):
        lines.append(f"quality: {_quantiles(done.quality)}")
    for name, node in found.nodes.items():
        rate = "" if node.images_per_second is None else f", {node.images_per_second:.3g} images/s"
        lines.append(f"machine {name}: {node.done} shards done, {node.leased} in hand, {node.images} images{rate}")
    if done.missing:
        names = ", ".join(done.missing[:_SHOWN]) + (", ..." if len(done.missing) > _SHOWN else "")
        lines.append(f"not done: {names}")
    return lines


def verify(
    labels: LabelsArgument,
    dataset: DatasetOption = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes that read.")] = 1,
    decode: Annotated[bool, typer.Option("--decode/--no-decode", help="Decode every label as well.")] = True,
    report: Annotated[str | None, typer.Option(help="Write all findings there, as JSON.")] = None,
) -> int:
    """Read everything again and prove it: every image labelled once or listed as failed, checksums, nothing else there.

    Exit status 1 when anything is found.

    \b
    Example:
      fathom label verify data/photos/labels/0123456789abcdef --workers 4
    """
    from cluster import storage
    from cluster.progress import Progress
    from dataio.dataset import Dataset
    from dataio.label_check import verify as verify_labels
    from dataio.labels import LabelStore

    store = LabelStore.open(labels)
    source = Dataset.open(_dataset_of(labels, dataset))
    with Progress("verify", None, "shards") as bar:
        bar.set_total(len(source.shards))
        found = verify_labels(
            store, source, workers=workers, decode=decode, progress=lambda done, total: bar.update(done)
        )
    if report:
        storage.atomic_write(report, found.to_json())
    typer.echo(str(found))
    return 0 if found.ok else 1


def _work(job: Any, config: LabelConfig) -> int:
    from cluster.progress import Progress
    from cluster.stop import StopFlag, exit_status

    notice = "finishing the shards in hand; Ctrl-C again ends at once"
    told: set[str] = set()
    with StopFlag(grace_s=_GRACE_S, notice=notice) as stop, Progress("label", None, "shards") as bar:

        def on_progress(now: Any) -> None:
            bar.set_total(now.total)
            others = {"other runs": now.others} if now.others else {}
            bar.update(now.done, **{"in hand": now.leased}, **others)
            if now.trouble and now.trouble not in told:
                told.add(now.trouble)
                bar.note(f"warning: {now.trouble}; trying again")

        outcome: LabelOutcome = job(config, on_progress=on_progress, stop=stop)
    if outcome.failed:
        typer.echo(
            f"{outcome.failed} of {outcome.images} images have no label; `fathom label status` says why", err=True
        )
    if outcome.differing:
        typer.echo(
            f"{outcome.differing} shards came out in other bytes on two workers: their hardware or libraries differ "
            "(the first of each counts)", err=True,
        )  # fmt: skip
    for stem, reason in list(outcome.given_up.items())[:_SHOWN]:
        typer.echo(f"error: shard {stem}: {reason}", err=True)
    if outcome.stopped:
        typer.echo(f"stopped by {outcome.stopped} after {outcome.shards} shards; the same command goes on", err=True)
        return exit_status(outcome.stopped)
    typer.echo(outcome.folder)
    if outcome.given_up:
        typer.echo(f"{len(outcome.given_up)} shards could not be labelled; the same command tries again", err=True)
        return 1
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

    names = {"gpu": "use_gpu", "lease": "lease_s"}
    own = ("workers", "threads", "gpu", "address", "lease", "metrics_host", "telemetry")
    given["cluster"] = {names.get(name, name): given.pop(name) for name in own}
    return absolute_paths(given)


def _around(labels: str) -> str | None:
    """The dataset that the labels lie in, two folders up, unless `--out` said otherwise."""
    from cluster import storage
    from dataio.dataset import INFO_NAME

    folder = _absolute(labels).rstrip("/").rsplit("/", 2)[0]
    return folder if storage.exists(storage.join(folder, INFO_NAME)) else None


def _dataset_of(labels: str, given: str | None) -> str:
    """The dataset that was `given`, or the one around. Raises BadParameter when there is none."""
    found = given or _around(labels)
    if found is None:
        raise typer.BadParameter(f"{labels} lies in no dataset; name the one it is of", param_hint="--dataset")
    return _absolute(found)


def _absolute(path: str) -> str:
    import os

    from cluster import storage

    return path if storage.is_url(path) else os.path.abspath(path)


def _quantiles(counts: list[int]) -> str:
    """Where the tenth, the half and nine tenths of the labels lie, of a histogram over [0, 1]."""
    total, below = sum(counts), 0
    found: list[str] = []
    wanted = [0.1, 0.5, 0.9]
    for number, count in enumerate(counts):
        below += count
        while wanted and below >= wanted[0] * total:
            found.append(f"{round(100 * wanted.pop(0))} % below {(number + 1) / len(counts):.2f}")
    return ", ".join(found)
