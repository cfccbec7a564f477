"""`fathom submit` and `fathom jobs`: verbs as jobs of a Ray cluster."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from launcher.jobs import GRACE_S, GRACE_VARIABLE
from launcher.ship import MOST_MIB
from launcher.supervisor import RESTARTS

if TYPE_CHECKING:
    from launcher.job_state import Standing
    from launcher.jobs import Job
    from launcher.ship import Parcel
    from launcher.submission import Request, Terms

AddressOption = Annotated[
    str | None,
    typer.Option(
        metavar="URL", help="Of the cluster's dashboard; default: RAY_API_SERVER_ADDRESS, else http://127.0.0.1:8265."
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="JSON.")]
IdArgument = Annotated[
    str, typer.Argument(metavar="ID", help="A run's name: its newest job; NAME.1 is the first, NAME.2 the second.")
]
MaxSizeOption = Annotated[
    float, typer.Option("--max-size", min=0.1, help=f"MiB that are shipped at most; {MOST_MIB:g} is Ray's own limit.")
]


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
    restarts: Annotated[
        int, typer.Option(min=0, help="How often a killed driver is started again, in a row.")
    ] = RESTARTS,
    folder: Annotated[
        bool, typer.Option("--folder/--no-folder", help="Ship this folder, less what .fathomignore names.")
    ] = True,
    max_size: MaxSizeOption = MOST_MIB,
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
    from launcher import jobs, ship, submission

    here = Path.cwd()
    asked = submission.request(verb, name)
    terms = submission.Terms(
        folder=str(here), grace_s=grace, restarts=restarts, python=python, env=submission.environment(env or [])
    )
    submission.refuse_secrets(asked, terms)
    shipped = ship.parcel(here, max_size) if folder else None
    job_id = asked.name
    client, where = jobs.connect(address)
    _send(client, where, asked, terms, shipped, run=job_id, job_id=job_id)
    return _sent(client, where, asked, job_id, wait, as_json)


def _send(
    client: Any, where: str, asked: Request, terms: Terms, shipped: Parcel | None, *, run: str, job_id: str
) -> None:
    from launcher import jobs, ship

    metadata = asked.metadata(run) | terms.metadata()
    with ship.packed(shipped, asked.config) as parcel:
        jobs.submit(
            client,
            where,
            jobs.entrypoint(asked.arguments, terms.restarts, terms.folder, terms.python),
            job_id=job_id,
            folder=str(parcel),
            metadata=metadata,
            env={
                GRACE_VARIABLE: metadata["grace"],
                "FATHOM_JOB": job_id,
                "FATHOM_SUBMITTED": metadata["submitted"],
                **terms.env,
            },
        )


def _sent(client: Any, where: str, asked: Request, job_id: str, wait: bool, as_json: bool) -> int:
    """Print the id; wait for the end and answer for the job, if that is wanted: the log is aside then from JSON."""
    from launcher import job_report

    if as_json:
        told = {"id": job_id, "address": where, "run_folder": asked.run_folder, "config_digest": asked.digest}
        typer.echo(json.dumps(told))
    else:
        typer.echo(job_id)
    sys.stdout.flush()
    if not wait:
        return 0
    found = _follow(client, where, job_id, job_report.show_aside if as_json else job_report.show)
    job_report.tell(found, _standing(client, where, found), as_json)
    return found.answer


def list_jobs(address: AddressOption = None, as_json: JsonOption = False) -> None:
    """All jobs of the cluster, the newest first.

    \b
    Example:
      fathom jobs list
    """
    from launcher import job_report, job_state, jobs

    client, where = jobs.connect(address)
    standings = [(job, job_state.standing(job)) for job in jobs.all_jobs(client, where)]
    if as_json:
        typer.echo(json.dumps([job_report.facts(job, state) for job, state in standings], indent=1))
    else:
        typer.echo("\n".join(job_report.table(standings)))


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
    from launcher import job_report, jobs

    client, where = jobs.connect(address)
    found = jobs.find(client, where, job)
    facts = job_report.facts(found, _standing(client, where, found))
    if as_json:
        typer.echo(json.dumps(facts, indent=1))
    else:
        for name, value in facts.items():
            if value not in (None, ""):
                typer.echo(f"{name:<14} {value}")
    return found.answer if exit_code else 0


def logs(
    job: IdArgument,
    address: AddressOption = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job has ended.")] = False,
    as_json: JsonOption = False,
) -> int:
    """What a job has written. With -f a lost connection is made again. JSON: an object with `line` for every line.

    \b
    Example:
      fathom jobs logs -f teacher
    """
    from launcher import job_log, job_report, jobs

    client, where = jobs.connect(address)
    found = jobs.find(client, where, job)
    lines = job_log.JsonLines(found.id)
    show = lines if as_json else job_report.show
    if follow:
        found = _follow(client, where, found.id, show)
    else:
        show(jobs.log(client, where, found.id))
    lines.close()
    if follow:
        job_report.tell(found, _standing(client, where, found), as_json=False)
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
    from launcher import job_report, jobs

    client, where = jobs.connect(address)
    found = jobs.find(client, where, job)
    if not found.over:
        found = jobs.wait(client, where, found.id, timeout, None if as_json else _waiting(found, timeout))
    job_report.tell(found, _standing(client, where, found), as_json)
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

    It is killed after the time that `submit --grace` gave it; one that others submitted after Ray's 3 s. Whether it
    saved is said. Exit status 0 when it has ended, 101 when it still saves.

    \b
    Example:
      fathom jobs stop teacher --grace 120
    """
    from launcher import job_report, jobs

    client, where = jobs.connect(address)
    found = jobs.find(client, where, job)
    if not found.over:
        if not found.ours:
            typer.echo(f"{found.id}: not submitted by fathom: Ray kills it in {found.grace_s:g} s", err=True)
        patience = grace if grace is not None else found.grace_s + 30
        found = jobs.stop(client, where, found.id, patience, None if as_json else _waiting(found, patience))
    job_report.tell(found, _standing(client, where, found), as_json)
    return 0 if found.over else jobs.UNFINISHED


def resume(
    job: IdArgument,
    address: AddressOption = None,
    wait: Annotated[bool, typer.Option("--wait", help="Show the log, and exit as `jobs wait` does.")] = False,
    folder: Annotated[
        bool, typer.Option("--folder/--no-folder", help="Ship the job's folder, where this machine has it.")
    ] = True,
    max_size: MaxSizeOption = MOST_MIB,
    as_json: JsonOption = False,
) -> int:
    """Go on with a job that has ended, from the run's newest whole checkpoint, as a new job.

    With the same configuration, variables (--env) and other options of `submit`, and in the same folder, wherever this
    is typed. What is shipped of that folder is what this machine has of it now.

    \b
    Example:
      fathom jobs resume teacher
    """
    from launcher import jobs, ship, submission

    client, where = jobs.connect(address)
    found = _ended(client, where, job)
    asked, terms, run = submission.again(found.metadata), submission.Terms.of(found.metadata), found.run
    submission.refuse_secrets(asked, terms)
    place = Path(terms.folder)
    if folder and not place.is_dir():
        typer.echo(f"{place}: is not on this machine and is not shipped", err=True)
    shipped = ship.parcel(place, max_size) if folder and place.is_dir() else None
    # of all jobs: a run of its own may be called RUN.2
    count = 1 + max(jobs.number_of(other.id, run) for other in jobs.all_jobs(client, where))
    job_id = f"{run}.{count}"
    _send(client, where, asked, terms, shipped, run=run, job_id=job_id)
    return _sent(client, where, asked, job_id, wait, as_json)


def delete(job: IdArgument, address: AddressOption = None, as_json: JsonOption = False) -> int:
    """Forget a job that has ended, its log too. The run's folder stays.

    \b
    Example:
      fathom jobs delete teacher
    """
    from launcher import jobs

    client, where = jobs.connect(address)
    found = _ended(client, where, job)
    jobs.delete(client, where, found.id)
    typer.echo(json.dumps({"id": found.id, "deleted": True}) if as_json else f"{found.id}: forgotten")
    return 0


def _ended(client: Any, where: str, name: str) -> Job:
    """The job, which must not run any more."""
    from launcher import jobs

    found = jobs.find(client, where, name)
    if not found.over:
        raise jobs.JobUsageError(f"{found.id}: is {found.status}; `fathom jobs stop {found.id}` first")
    return found


def _waiting(job: Job, seconds: float | None) -> Callable[[Job], None]:
    """Says that the job is waited for; gives what then tells how it stands."""
    from launcher import job_report

    typer.echo(f"{job.id}: waiting for its end{'' if seconds is None else f', {seconds:g} s at most'}", err=True)
    return job_report.Changes()


def _follow(client: Any, where: str, job_id: str, show: Callable[[str], None]) -> Job:
    """Show the log until the job has ended. Ctrl-C leaves the job alone."""
    from launcher import job_log

    try:
        return job_log.follow(client, where, job_id, show)
    except KeyboardInterrupt:
        typer.echo(
            f"the job goes on: `fathom jobs logs -f {job_id}` shows it, `fathom jobs stop {job_id}` stops it", err=True
        )
        raise


def _standing(client: Any, where: str, job: Job) -> Standing:
    from launcher import job_state, jobs

    return job_state.standing(job, lambda: jobs.log(client, where, job.id))
