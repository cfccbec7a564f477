"""`fathom submit` and `fathom jobs`: verbs as jobs of a Ray cluster."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from launcher.job_state import Standing
    from launcher.jobs import Job
    from launcher.submission import Request

AddressOption = Annotated[
    str | None,
    typer.Option(
        metavar="URL", help="Of the cluster's dashboard; default: RAY_API_SERVER_ADDRESS, else http://127.0.0.1:8265."
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="JSON.")]
IdArgument = Annotated[str, typer.Argument(metavar="ID", help="A job's id: the run's name; NAME.2 for its second job.")]
GRACE_S = 600.0


def register(app: typer.Typer) -> None:
    """Adds the verbs."""
    # Everything behind VERB is the verb's own.
    app.command("submit", context_settings={"allow_interspersed_args": False, "ignore_unknown_options": False})(submit)
    jobs = typer.Typer(
        help="Look after the jobs of a cluster.", no_args_is_help=True, rich_markup_mode=None, add_completion=False
    )
    for name, verb in (
        ("list", list_jobs), ("status", status), ("logs", logs), ("wait", wait), ("stop", stop), ("resume", resume),
        ("delete", delete),
    ):  # fmt: skip
        jobs.command(name)(verb)
    app.add_typer(jobs, name="jobs")


def submit(
    verb: Annotated[list[str], typer.Argument(metavar="VERB ...", help="Any verb that works, with its arguments.")],
    address: AddressOption = None,
    name: Annotated[str | None, typer.Option(help="The job's id; default: the run's name.")] = None,
    wait: Annotated[
        bool, typer.Option("--wait", help="Show the log, and exit as `jobs wait` does when the job has ended.")
    ] = False,
    grace: Annotated[
        float, typer.Option(min=1, help="Seconds for a last checkpoint when the job is stopped, before it is killed.")
    ] = GRACE_S,
    restarts: Annotated[int, typer.Option(min=0, help="How often a killed driver is started again, in a row.")] = 5,
    folder: Annotated[
        bool, typer.Option("--folder/--no-folder", help="Ship this folder, less what .fathomignore names.")
    ] = True,
    max_size: Annotated[float, typer.Option(min=0.1, help="MiB that are shipped at most.")] = 100.0,
    env: Annotated[
        list[str] | None, typer.Option(metavar="NAME[=VALUE]", help="An environment variable; repeatable; no secrets.")
    ] = None,
    python: Annotated[str, typer.Option(help="The cluster's interpreter.")] = "python",
    as_json: JsonOption = False,
) -> int:
    """Run a verb as a job of a Ray cluster: it goes on when this machine is switched off. Prints the job's id.

    The configuration is resolved here; the code, and this folder, travel with it. Datasets, weights and the run's
    folder do not: the cluster has to see the same paths. Its own options come before VERB.

    \b
    Example:
      fathom submit --address http://head:8265 train teacher.yaml --set cluster.workers=16
      fathom jobs logs -f teacher
    """
    from launcher import submission

    asked = submission.request(verb, name)
    variables = submission.environment(env or [])
    where, job_id = _send(
        address, asked, asked.name, asked.name, grace, restarts, folder, max_size, variables, python
    )
    return _sent(where, job_id, asked, wait, as_json)


def _send(
    address: str | None,
    asked: Request,
    run: str,
    job_id: str,
    grace: float,
    restarts: int,
    folder: bool,
    max_size: float,
    env: dict[str, str],
    python: str,
) -> tuple[str, str]:
    from launcher import jobs, ship

    here = Path.cwd()
    shipped = ship.parcel(here, max_size) if folder and not ship.is_checkout(here) else None
    where = jobs.resolve_address(address)
    client = jobs.connect(address)
    metadata = asked.metadata(str(here), run) | {"python": python, "grace": f"{grace:g}", "restarts": str(restarts)}
    with tempfile.TemporaryDirectory(prefix="fathom-submit-") as parcel:
        ship.pack(Path(parcel), shipped, asked.config)
        jobs.submit(
            client,
            where,
            jobs.entrypoint(asked.arguments, restarts, str(here), python),
            job_id=job_id,
            folder=parcel,
            metadata=metadata,
            env={
                "RAY_JOB_STOP_WAIT_TIME_S": f"{grace:.0f}",
                "FATHOM_JOB": job_id,
                "FATHOM_SUBMITTED": metadata["submitted"],
                **env,
            },
        )
    return where, job_id


def _sent(where: str, job_id: str, asked: Request, wait: bool, as_json: bool) -> int:
    if as_json:
        told = {"id": job_id, "address": where, "run_folder": asked.run_folder, "config_digest": asked.digest}
        typer.echo(json.dumps(told))
    else:
        typer.echo(job_id)
    sys.stdout.flush()
    return _follow(where, job_id) if wait else 0


def list_jobs(address: AddressOption = None, as_json: JsonOption = False) -> None:
    """All jobs of the cluster, the newest first.

    \b
    Example:
      fathom jobs list
    """
    from launcher import job_state, jobs

    where = jobs.resolve_address(address)
    found = jobs.all_jobs(jobs.connect(address), where)
    standings = [(job, job_state.standing(job)) for job in found]
    if as_json:
        typer.echo(json.dumps([_facts(job, state) for job, state in standings], indent=1))
        return
    rows = [("ID", "STATE", "ATTEMPT", "BEGAN", "TOOK", "VERB")]
    rows += [
        (job.id, state.state, str(state.attempt or ""), _clock(job.started), _took(job), " ".join(job.verb))
        for job, state in standings
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        typer.echo("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())


def status(
    job: IdArgument,
    address: AddressOption = None,
    exit_code: Annotated[
        bool, typer.Option("--exit-code", help="Exit with 0 succeeded, 100 failed, 101 not finished, 103 cancelled.")
    ] = False,
    as_json: JsonOption = False,
) -> int:
    """How a job stands: its state, in which attempt, and why. Exit status 102 when there is none of this id.

    \b
    Example:
      fathom jobs status teacher --exit-code
    """
    from launcher import job_state, jobs

    where = jobs.resolve_address(address)
    found = jobs.find(jobs.connect(address), where, job)
    state = job_state.standing(found)
    if as_json:
        typer.echo(json.dumps(_facts(found, state), indent=1))
    else:
        for name, value in _facts(found, state).items():
            if value not in (None, ""):
                typer.echo(f"{name:<14} {value}")
    return found.answer if exit_code else 0


def logs(
    job: IdArgument,
    address: AddressOption = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job has ended.")] = False,
    as_json: JsonOption = False,
) -> int:
    """What a job has written. With -f a lost connection is made again.

    \b
    Example:
      fathom jobs logs -f teacher
    """
    from launcher import jobs

    where = jobs.resolve_address(address)
    client = jobs.connect(address)
    found = jobs.find(client, where, job)
    if follow and as_json:
        raise jobs.JobUsageError("--json: gives the whole log at once; leave out -f")
    if follow:
        _follow(where, found.id)
    elif as_json:
        typer.echo(json.dumps({"id": found.id, "log": jobs.log(client, where, found.id)}))
    else:
        _show(jobs.log(client, where, found.id))
    return 0


def wait(
    job: IdArgument,
    address: AddressOption = None,
    timeout: Annotated[float | None, typer.Option(min=0, help="Seconds; default: for ever.")] = None,
    as_json: JsonOption = False,
) -> int:
    """Wait for a job's end, and exit with 0 succeeded, 100 failed, 101 not finished, 102 unknown, 103 cancelled.

    \b
    Example:
      fathom jobs wait teacher --timeout 3600 && fathom jobs logs teacher
    """
    from launcher import jobs

    where = jobs.resolve_address(address)
    client = jobs.connect(address)
    found = jobs.wait(client, where, jobs.find(client, where, job).id, timeout)
    _tell(found, as_json)
    return found.answer


def stop(
    job: IdArgument,
    address: AddressOption = None,
    grace: Annotated[
        float | None, typer.Option(min=0, help="Seconds to wait for its end; default: as long as it may take.")
    ] = None,
    as_json: JsonOption = False,
) -> int:
    """Stop a job: it finishes its step, writes a checkpoint and ends; `fathom jobs resume` goes on with it.

    It is killed after the time that `submit --grace` gave it. Exit status 0 when it has ended, 101 when it still saves.

    \b
    Example:
      fathom jobs stop teacher --grace 120
    """
    from launcher import jobs

    where = jobs.resolve_address(address)
    client = jobs.connect(address)
    found = jobs.find(client, where, job)
    if not found.over:
        patience = grace if grace is not None else float(found.metadata.get("grace", GRACE_S)) + 30
        found = jobs.stop(client, where, found.id, patience)
    _tell(found, as_json)
    return 0 if found.over else jobs.UNFINISHED


def resume(
    job: IdArgument,
    address: AddressOption = None,
    wait: Annotated[bool, typer.Option("--wait", help="Show the log, and exit as `jobs wait` does.")] = False,
    folder: Annotated[bool, typer.Option("--folder/--no-folder", help="Ship this folder.")] = True,
    max_size: Annotated[float, typer.Option(min=0.1, help="MiB that are shipped at most.")] = 100.0,
    as_json: JsonOption = False,
) -> int:
    """Go on with a job that has ended: the same configuration, from the run's newest whole checkpoint, as a new job.

    \b
    Example:
      fathom jobs resume teacher
    """
    from launcher import jobs, submission

    where = jobs.resolve_address(address)
    client = jobs.connect(address)
    found = jobs.find(client, where, job)
    if not found.over:
        raise jobs.JobUsageError(f"{found.id}: is {found.status}; `fathom jobs stop {found.id}` first")
    asked = submission.again(found.metadata)
    run, before = found.run, found.metadata
    count = 1 + max(jobs.number_of(other.id, run) for other in jobs.all_jobs(client, where) if other.run == run)
    place, job_id = _send(
        address,
        asked,
        run,
        f"{run}.{count}",
        float(before.get("grace", GRACE_S)),
        int(before.get("restarts", 5)),
        folder,
        max_size,
        {},
        before.get("python", "python"),
    )
    return _sent(place, job_id, asked, wait, as_json)


def delete(job: IdArgument, address: AddressOption = None, as_json: JsonOption = False) -> int:
    """Forget a job that has ended, its log too. The run's folder stays.

    \b
    Example:
      fathom jobs delete teacher
    """
    from launcher import jobs

    where = jobs.resolve_address(address)
    client = jobs.connect(address)
    found = jobs.find(client, where, job)
    if not found.over:
        raise jobs.JobUsageError(f"{found.id}: is {found.status}; `fathom jobs stop {found.id}` first")
    jobs.delete(client, where, found.id)
    typer.echo(json.dumps({"id": found.id, "deleted": True}) if as_json else f"{found.id}: forgotten")
    return 0


def _follow(where: str, job_id: str) -> int:
    """Show the log until the end, and answer for the job. Ctrl-C leaves the job alone."""
    from launcher import jobs

    try:
        found = jobs.follow(jobs.connect(where), where, job_id, _show)
    except KeyboardInterrupt:
        typer.echo(
            f"the job goes on: `fathom jobs logs -f {job_id}` shows it, `fathom jobs stop {job_id}` stops it", err=True
        )
        raise
    _tell(found)
    return found.answer


def _show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _tell(job: Job, as_json: bool = False) -> None:
    """How it stands, and why: one line on stderr, or JSON on stdout."""
    from launcher import job_state

    state = job_state.standing(job)
    if as_json:
        typer.echo(json.dumps(_facts(job, state)))
        return
    typer.echo(f"{job.id}: {state.state}{f' ({state.reason})' if state.reason else ''}", err=True)


def _facts(job: Job, state: Standing) -> dict[str, Any]:
    return {
        "id": job.id,
        "run": job.run,
        "state": state.state,
        "reason": state.reason,
        "attempt": state.attempt or None,
        "step": state.step,
        "status": job.status,
        "exit_code": job.exit_code,
        "answer": job.answer,
        "verb": " ".join(job.verb),
        "began": _clock(job.started),
        "took": _took(job),
        "folder": job.metadata.get("folder"),
        "run_folder": job.metadata.get("run_folder"),
        "config_digest": job.metadata.get("config_digest"),
    }


def _clock(seconds: float | None) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(seconds)) if seconds else ""


def _took(job: Job) -> str:
    if not job.started:
        return ""
    seconds = int((job.ended or time.time()) - job.started)
    return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"
