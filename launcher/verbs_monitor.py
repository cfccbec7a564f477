"""`fathom monitor up|down|status|config`: Prometheus, dashboards and alerts."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from cluster.monitor.control import Order, State
    from cluster.monitor.prometheus import Settings

FoldersArgument = Annotated[
    list[str] | None,
    typer.Argument(metavar="[FOLDER...]", help="Where runs and labels are; default: runs. Data are kept in the first."),
]
FolderArgument = Annotated[str, typer.Argument(metavar="[FOLDER]", help="As given to `monitor up`, the first one.")]
IntervalOption = Annotated[float, typer.Option("--interval", min=0.5, help="Seconds between two scrapes.")]
AlertmanagerOption = Annotated[
    list[str] | None, typer.Option("--alertmanager", metavar="HOST:PORT", help="Is told of alerts; repeatable.")
]
_RUNS = "runs"
_NOT_UP = 1


def register(app: typer.Typer) -> None:
    """Adds the group."""
    group = typer.Typer(help="Watch runs: Prometheus, dashboards, alerts.", no_args_is_help=True, rich_markup_mode=None)
    for verb in (up, down, status, config):
        group.command(verb.__name__)(verb)
    app.add_typer(group, name="monitor")


def up(
    folders: FoldersArgument = None,
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Of the page; default: 9840, or a free one.")
    ] = None,
    host: Annotated[str, typer.Option(help="Where the page is served; 0.0.0.0: to all that reach it.")] = "127.0.0.1",
    prometheus_port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Of Prometheus, always on 127.0.0.1; default: a free one.")
    ] = None,
    interval: IntervalOption = 5.0,
    keep: Annotated[str, typer.Option(help="How long samples are kept, e.g. 30d or 1y.")] = "90d",
    alertmanager: AlertmanagerOption = None,
    targets_only: Annotated[
        bool, typer.Option("--targets-only", help="Only keep the list of targets, for a Prometheus of your own.")
    ] = False,
    foreground: Annotated[
        bool, typer.Option("--foreground", help="Stay, until SIGTERM or Ctrl-C: in a container, under systemd.")
    ] = False,
) -> int:
    """Start Prometheus on this machine's or a cluster's runs, and a page that shows them; prints the addresses.

    Runs that begin later are found by themselves. Given again, it says where the monitor is. Processes on other
    machines are scraped if they serve their metrics to others (cluster.metrics_host: 0.0.0.0).

    \b
    Example:
      fathom monitor up
      fathom monitor up /shared/runs /shared/data/photos/labels --host 0.0.0.0
    """
    from cluster.monitor.control import Order
    from cluster.monitor.control import up as start

    order = Order(
        folders=_absolute(folders), settings=_settings(interval, keep, alertmanager), host=host, port=port,
        prometheus_port=prometheus_port, targets_only=targets_only,
    )  # fmt: skip
    if foreground:
        _stay(order)
        return 0
    state, before = start(order)
    typer.echo("is up already" if before else f"is up as process {state.pid}")
    _show(state)
    return 0


def down(folder: FolderArgument = _RUNS) -> int:
    """End the monitor. What it has collected stays in FOLDER/.monitor, and the next one goes on with it.

    \b
    Example:
      fathom monitor down
    """
    from cluster.monitor.control import down as end

    typer.echo("ended" if end(folder) else f"no monitor is up for {folder}")
    return 0


def status(
    folder: FolderArgument = _RUNS, as_json: Annotated[bool, typer.Option("--json", help="JSON.")] = False
) -> int:
    """Say whether the monitor is up, what it scrapes, and which alerts fire. Exit status 1 when it is not up.

    \b
    Example:
      fathom monitor status
    """
    import json
    from dataclasses import asdict

    from cluster.monitor.control import find
    from cluster.monitor.standing import standing
    from cluster.storage import human_bytes

    state = find(folder)
    if state is None:
        typer.echo('{"up": false}' if as_json else f"no monitor is up for {folder}: fathom monitor up {folder}")
        return _NOT_UP
    found = standing(state)
    if as_json:
        typer.echo(json.dumps({"up": True, "state": asdict(state), "standing": asdict(found)}, indent=1))
        return 0
    typer.echo(f"is up as process {state.pid} since {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(state.since))}")
    _show(state)
    typer.echo("scraped      " + (", ".join(f"{n} {role}" for role, n in sorted(found.up.items())) or "nothing now"))
    for line in found.silent:
        typer.echo(f"silent       {line}")
    if found.out_of_reach:
        typer.echo(
            f"out of reach {len(found.out_of_reach)} processes serve on other machines' loopback "
            f"({found.out_of_reach[0]}, ...): set cluster.metrics_host to 0.0.0.0 where the network is trusted"
        )
    for line in found.alerts or ["none fires"]:
        typer.echo(f"alerts       {line}")
    if state.prometheus:
        typer.echo(f"data         {human_bytes(found.data_bytes)}")
    if found.trouble:
        typer.echo(f"trouble      {found.trouble}")
    return 0


def config(
    folders: FoldersArgument = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write prometheus.yml, rules.yml and grafana/*.json there.")
    ] = None,
    interval: IntervalOption = 15.0,
    alertmanager: AlertmanagerOption = None,
) -> int:
    """Print what a site's own Prometheus takes over: scrape configuration and alert rules; with --out, files.

    The list of targets is kept by `fathom monitor up --targets-only`, which has to run beside it.

    \b
    Example:
      fathom monitor config /shared/runs --out /etc/prometheus/fathom
    """
    from cluster.monitor.alerts import rules
    from cluster.monitor.control import state_folder, targets_path
    from cluster.monitor.prometheus import configuration, write_files

    targets = targets_path(state_folder(_absolute(folders)[0]))
    settings = _settings(interval, "90d", alertmanager)
    if out is None:
        typer.echo("# prometheus.yml\n" + configuration(targets, "rules.yml", settings))
        typer.echo("# rules.yml\n" + rules(), nl=False)
        return 0
    for path in write_files(str(out.absolute()), targets, settings).values():
        typer.echo(path)
    return 0


def _absolute(folders: list[str] | None) -> tuple[str, ...]:
    from cluster.monitor.control import absolute

    return absolute(folders or [_RUNS])


def _settings(interval: float, keep: str, alertmanagers: list[str] | None) -> Settings:
    from cluster.monitor.prometheus import MonitorError, Settings

    if not re.fullmatch(r"(\d+(ms|[smhdwy]))+", keep):
        raise MonitorError(f"--keep: {keep!r} is no time; write it as 30d, 12h or 1y")
    return Settings(interval_s=interval, keep=keep, alertmanagers=tuple(alertmanagers or ()))


def _stay(order: Order) -> None:
    from cluster.monitor.daemon import serve

    serve(order, lambda state: _show(state))


def _show(state: State) -> None:
    if state.page:
        typer.echo(f"page         http://{state.page}/")
    if state.prometheus:
        typer.echo(f"Prometheus   http://{state.prometheus}/")
    typer.echo(f"watches      {', '.join(state.order.folders)}")
